"""Drafts with one's own level: the text of the checking level, whatever was guessed, and its cache as without drafts."""

import copy
import math

import pytest
import torch
from head_layers import ORDER
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    StaticCache,
    StoppingCriteria,
)

from dsla_hf import LevelProcessor, cache_bytes
from dsla_hf.core.cache import DSLACacheLayer
from dsla_hf.core.draft_cache import DraftCache, take_back
from dsla_hf.levels.acceptance import Greedy, Rejection
from dsla_hf.levels.draft_length import PAUSE, PLAIN_STEPS, REFRESH, DraftLength

VOCABULARY = 97
LAYERS = {"layers": {}, "heads": {"conversion_unit": "head", "conversion_order": ORDER}}
WINDOWS = {"states": {}, "window": {"states": False}}


def text(tokens=30):
    return torch.randint(2, VOCABULARY, (1, tokens))


@pytest.fixture(params=LAYERS)
def units(request):
    return LAYERS[request.param]


@pytest.fixture(params=WINDOWS)
def recipe(request):
    return WINDOWS[request.param]


@pytest.fixture
def llama(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"), level=0).requires_grad_(False).eval()


def generate(model, ids, **options):
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(input_ids=ids, **options)


def highest(model):
    return model.level_sizes()["max_level"]


def pairs(model):
    """(checking level, draft level), with nothing, something and nearly all converted at the lower one."""
    most = highest(model)
    return [(0, most), (0, 1), (1, most), (most // 2, most // 2 + 1), (most - 1, most)]


# --- greedy text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, unit", [("llama", "heads"), ("llama", "layers"), ("qwen3", "layers"), ("mistral", "heads"), ("gemma2", "heads")]
)
def test_greedy_text_is_that_of_the_checking_level(tiny_model, adapter_model, recipe, kind, unit):
    base = tiny_model(kind, **({"sliding_window": 12} if kind in ("mistral", "gemma2") else {}))
    model = adapter_model(base, level=0, **LAYERS[unit], **recipe).requires_grad_(False)
    accepted = drafted = 0
    for seed, (low, high) in enumerate(pairs(model)):
        torch.manual_seed(seed)
        ids = text(3 + 11 * seed)
        model.set_level(low)
        expected = generate(model, ids, max_new_tokens=20, return_dict_in_generate=True)
        for tokens in (1, 5):
            found = generate(model, ids, max_new_tokens=20, draft_level=high, draft_tokens=tokens, return_dict_in_generate=True)
            assert torch.equal(found.sequences, expected.sequences), (low, high, tokens)
            assert model.get_level() == low
            assert found.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == ids.shape[1] + 19
            # Each check adds a token of its own, but for a last one that ends with a guess.
            assert found.checks + found.accepted in (19, 20)
            accepted, drafted = accepted + found.accepted, drafted + found.drafted
    assert 0 < accepted < drafted, "all guesses or none are right: the equality would prove nothing"


def test_a_text_ends_within_a_draft_where_it_would_without(llama):
    for seed in range(6):
        torch.manual_seed(seed)
        ids = text(20)
        whole = generate(llama, ids)[0, 20:].tolist()
        for end in (whole[3], whole[7]):
            expected = generate(llama, ids, eos_token_id=end)
            found = generate(llama, ids, eos_token_id=end, draft_level=3, draft_tokens=6)
            assert torch.equal(found, expected) and found[0, -1] == end
        for most in (1, 2, 5):
            assert torch.equal(
                generate(llama, ids, max_new_tokens=most, draft_level=3, draft_tokens=4),
                torch.cat([ids[0], ids.new_tensor(whole[:most])])[None],
            )


class Ends(StoppingCriteria):
    """Ends a text at a pair of tokens, as a stop string does, and keeps the lengths it was asked about."""

    def __init__(self, pair):
        self.pair, self.asked = pair, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape[1])
        return torch.tensor([input_ids[0, -2:].tolist() == self.pair])


def test_stopping_criteria_are_asked_once_about_each_token(llama):
    ids = text(20)
    whole = generate(llama, ids)[0].tolist()
    expected, found = Ends(whole[29:31]), Ends(whole[29:31])
    texts = [
        generate(llama, ids, stopping_criteria=[expected]),
        generate(llama, ids, stopping_criteria=[found], draft_level=2, draft_tokens=5),
    ]
    assert torch.equal(*texts) and texts[0].shape[1] < 50
    assert found.asked == expected.asked


class CharacterTokenizer:
    """A character for each token, as far as stop strings need one."""

    def __init__(self):
        self.vocabulary = {chr(ord("a") + token): token for token in range(VOCABULARY)}

    def get_vocab(self):
        return self.vocabulary

    def __len__(self):
        return VOCABULARY

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)

    def _convert_id_to_token(self, token):
        return chr(ord("a") + token)

    def __call__(self, string, **kwargs):
        return {"input_ids": [self.vocabulary[character] for character in string]}


def test_stop_strings(llama):
    ids, tokenizer = text(20), CharacterTokenizer()
    characters = list(tokenizer.vocabulary)
    whole = generate(llama, ids)[0].tolist()
    stop = {"stop_strings": "".join(characters[token] for token in whole[30:32]), "tokenizer": tokenizer}
    expected = generate(llama, ids, **stop)
    assert expected.shape[1] < 50
    assert torch.equal(generate(llama, ids, draft_level=2, draft_tokens=5, **stop), expected)


class Streamer:
    def __init__(self):
        self.got, self.ended = [], False

    def put(self, value):
        self.got.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_the_prompt_and_then_tokens_of_the_text_alone(llama):
    ids, streamers = text(20), [Streamer(), Streamer()]
    expected = generate(llama, ids, streamer=streamers[0])
    assert torch.equal(generate(llama, ids, streamer=streamers[1], draft_level=3, draft_tokens=4), expected)
    assert streamers[1].got == streamers[0].got and streamers[1].ended


class Counting(LogitsProcessor):
    """Bans the token that came last and keeps the texts it sees: it must see each text once."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append(input_ids[0].tolist())
        return scores.index_fill(1, input_ids[0, -1:], -math.inf)


def test_processors_see_each_text_once_and_known_ones_change_guesses_too(llama):
    ids, counting = text(20), [Counting(), Counting()]
    options = {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}
    expected = generate(llama, ids, logits_processor=LogitsProcessorList([counting[0]]), **options)
    found = generate(llama, ids, logits_processor=LogitsProcessorList([counting[1]]), draft_level=3, draft_tokens=5, **options)
    assert torch.equal(found, expected)
    assert counting[1].seen == counting[0].seen
    # Guesses that did not know of the penalty would be right less often.
    accepted = [
        generate(llama, ids, draft_level=1, draft_tokens=3, max_new_tokens=60, return_dict_in_generate=True, **options).accepted
        for options in ({}, options)
    ]
    assert accepted[1] > accepted[0] / 2


def test_padding_and_chunks_of_the_prompt(llama):
    ids = text(30)
    mask = torch.ones_like(ids)
    mask[:, :11] = 0
    for level in (0, 2):
        llama.set_level(level)
        expected = generate(llama, ids * mask, attention_mask=mask)
        for chunk in (None, 7):
            found = generate(llama, ids * mask, attention_mask=mask, draft_level=3, draft_tokens=4, prefill_chunk_size=chunk)
            assert torch.equal(found, expected)


@pytest.mark.parametrize("level", [0, 2])
def test_the_returned_cache_goes_on(llama, level):
    """With drafts or without them, and a raise of the level folds it."""
    llama.set_level(level)
    ids = text(20)
    options = {"return_dict_in_generate": True, "max_new_tokens": 10}
    whole = generate(llama, ids, max_new_tokens=30)
    for drafts in ({}, {"draft_level": 3, "draft_tokens": 4}):
        first = generate(llama, ids, draft_level=4, draft_tokens=5, **options)
        cache = first.past_key_values
        assert not any(getattr(layer, "record_past", False) for layer in cache.layers)
        second = generate(llama, first.sequences, past_key_values=cache, max_new_tokens=20, **drafts)
        assert torch.equal(second, whole)
    plain = generate(llama, ids, **options)
    first = generate(llama, ids, draft_level=4, draft_tokens=5, **options)
    llama.set_level(4)
    raised = [generate(llama, out.sequences, past_key_values=out.past_key_values, max_new_tokens=20) for out in (plain, first)]
    assert torch.equal(*raised)
    assert cache_bytes(first.past_key_values) == cache_bytes(plain.past_key_values)


def test_a_share_names_the_draft_level(llama):
    ids = text(20)
    outcomes = [generate(llama, ids, draft_level=level, draft_tokens=3, return_dict_in_generate=True).accepted for level in (4, "100%")]
    assert len(set(outcomes)) == 1


# --- the draft's cache ----------------------------------------------------------------------------------------------


def parts_at(model, level):
    model.set_level(level)
    return model.layer_parts()


def same_as_a_raise(model, drafts, cache, low, high, token):
    """Whether a draft's first logits are those of the model whose level is raised behind the text of `cache`."""
    model.set_level(high)
    with torch.no_grad():
        found = model(token, past_key_values=drafts.begin(), use_cache=True).logits
        raised = copy.deepcopy(cache)
        expected = model(token, past_key_values=raised, use_cache=True).logits
    model.set_level(low)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_draft_begins_as_if_the_level_were_raised(tiny_model, adapter_model, units, recipe):
    """Whatever was read, taken back, drafted and thrown away before."""
    model = adapter_model(tiny_model("qwen3"), level=0, **units, **recipe).requires_grad_(False)
    for low, high in pairs(model):
        draft, check = parts_at(model, high), parts_at(model, low)
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(text(21), past_key_values=cache, use_cache=True)
            cache.activate_past_recording()
            drafts = DraftCache(cache, draft, check)
            for read, back in ((1, 0), (4, 3), (6, 0), (5, 2), (9, 8)):
                same_as_a_raise(model, drafts, cache, low, high, text(1))
                model(text(read), past_key_values=cache, use_cache=True)
                take_back(cache, back)
            same_as_a_raise(model, drafts, cache, low, high, text(1))


def test_a_draft_refuses_other_caches_and_levels(llama):
    draft, check = parts_at(llama, 3), parts_at(llama, 0)
    cache = StaticCache(config=llama.config, max_cache_len=32)
    with torch.no_grad():
        llama(text(8), past_key_values=cache, use_cache=True)
    with pytest.raises(ValueError, match="cannot read a StaticLayer: use a DynamicCache"):
        DraftCache(cache, draft, check)
    cache = DynamicCache(config=llama.config)
    llama.set_level(3)
    with torch.no_grad():
        llama(text(8), past_key_values=cache, use_cache=True)
    assert isinstance(cache.layers[2], DSLACacheLayer)
    with pytest.raises(ValueError, match="converts what the level that checks it does"):
        DraftCache(cache, check, draft)


# --- sampling -------------------------------------------------------------------------------------------------------


def test_rejection_sampling_follows_the_checking_level():
    """Of many tokens, where draft and check differ much."""
    torch.manual_seed(5)
    draft, check = torch.randn(2, 7) * 1.5
    rule = Rejection(lambda ids, logits: logits, lambda ids, logits: logits)
    p, q = check.softmax(-1), draft.softmax(-1)
    count = 20_000
    tokens, hits = torch.zeros(7), 0
    for _ in range(count):
        guess, drawn_from = rule.guess(None, draft[None])
        token = rule.choose(None, check[None], guess, drawn_from)
        tokens[token] += 1
        hits += int(token == guess)
    chi_square = ((tokens - count * p) ** 2 / (count * p)).sum()
    assert chi_square < 22.5  # of 6 degrees of freedom, 0.1 %
    wrong = ((tokens - count * q) ** 2 / (count * q)).sum()
    assert wrong > 1000, "draft and check are alike: it would prove nothing"
    assert abs(hits / count - torch.minimum(p, q).sum()) < 0.015


def test_tokens_chosen_together_follow_the_same_probabilities():
    """A round of two guesses: the first token by its probabilities, the second by its own where the first guess was right."""
    torch.manual_seed(5)
    draft, check = torch.randn(2, 2, 7)
    processors = LogitsProcessorList()
    rule, count, ids = Rejection(processors, processors), 10_000, torch.zeros(1, 1, dtype=torch.long)
    first, second = torch.zeros(2, 7)
    logits = torch.cat([check, torch.full((1, 7), -math.inf).index_fill(1, torch.tensor([3]), 0.0)])
    for _ in range(count):
        guesses, drawn_from = zip(*(rule.guess(ids, one[None]) for one in draft), strict=True)
        tokens = rule.choose_all(ids, logits, torch.cat(guesses), drawn_from)
        first[tokens[0]] += 1
        if tokens[0] == guesses[0]:
            second[tokens[1]] += 1
        assert tokens[2] == 3
    for found, p, q in zip((first, second), check.softmax(-1), draft.softmax(-1), strict=True):
        assert (((found - found.sum() * p) ** 2) / (found.sum() * p)).sum() < 22.5  # as above
        assert (((found - found.sum() * q) ** 2) / (found.sum() * q)).sum() > 200, "draft and check are alike: it would prove nothing"


def test_tokens_are_chosen_one_by_one_where_a_processor_may_keep_count():
    known, counting = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(1.5)]), LogitsProcessorList([Counting()])
    ids, logits, guesses = torch.tensor([[4, 5]]), torch.randn(3, 9), torch.tensor([1, 2])
    for kind in (Greedy, Rejection):
        assert kind(counting, LogitsProcessorList()).choose_all(ids, logits, guesses, [None, None]) is None
    together = Greedy(known, known).choose_all(ids, logits, guesses, [None, None])
    texts = [ids, torch.tensor([[4, 5, 1]]), torch.tensor([[4, 5, 1, 2]])]
    one_by_one = [Greedy(known, known).choose(text, one[None]) for text, one in zip(texts, logits, strict=True)]
    assert torch.equal(together, torch.cat(one_by_one)) and not Greedy(known, known).likeliest


def test_sampled_texts_follow_the_checking_level(llama):
    """The first three tokens of many texts, whose joint probabilities are those of the checking level."""
    ids, options = text(12), {"do_sample": True, "top_k": 3, "temperature": 1.5, "max_new_tokens": 3}
    probabilities = {}

    def branch(prefix, probability):
        if prefix.shape[1] == 15:
            probabilities[tuple(prefix[0, 12:].tolist())] = probability
            return
        with torch.no_grad():
            scores = llama(prefix).logits[0, -1] / 1.5
        values, tokens = scores.topk(3)
        for share, token in zip(values.softmax(-1).tolist(), tokens, strict=True):
            branch(torch.cat([prefix, token[None, None]], 1), probability * share)

    branch(ids, 1.0)
    count, found = 600, dict.fromkeys(probabilities, 0)
    for _ in range(count):
        found[tuple(generate(llama, ids, draft_level=4, draft_tokens=2, **options)[0, 12:].tolist())] += 1
    likely = [key for key, p in probabilities.items() if count * p >= 5]
    chi_square = sum((found[key] - count * probabilities[key]) ** 2 / (count * probabilities[key]) for key in likely)
    assert len(likely) > 5
    assert chi_square < torch.distributions.Chi2(len(likely)).mean + 4 * math.sqrt(2 * len(likely))


def test_sampling_is_set_by_the_generators_seed(llama):
    ids = text(20)

    def sampled(seed):
        torch.manual_seed(seed)
        return generate(llama, ids, do_sample=True, draft_level=3, draft_tokens=4)

    assert torch.equal(sampled(1), sampled(1)) and not torch.equal(sampled(1), sampled(2))


# --- how many to draft ----------------------------------------------------------------------------------------------


def rounds(lengths, tokens, acceptance, guess, more, plain=1.0):
    """Lets `lengths` decide for so many tokens of a text, of which a share is accepted; the lengths that it chose."""
    chosen, made = [], 0.0
    generator = torch.Generator().manual_seed(3)
    while made < tokens:
        k = lengths.next()
        accepted = 0
        while accepted < k and torch.rand((), generator=generator) < acceptance:
            accepted += 1
        lengths.record(k, accepted, k * guess, plain + k * more)
        chosen.append(k)
        made += accepted + 1
    return chosen


def test_drafts_grow_where_guesses_are_cheap_and_right():
    chosen = rounds(DraftLength(), 400, 0.97, 0.1, 0.01)
    assert chosen[:PLAIN_STEPS] == [0] * PLAIN_STEPS and chosen[-1] == 8
    short = rounds(DraftLength(), 400, 0.6, 0.2, 0.02)[-20:]
    assert 1 <= sum(short) / 20 <= 3
    assert max(rounds(DraftLength(longest=3), 200, 1.0, 0.05, 0.0)) == 2


def test_drafts_end_where_they_do_not_pay_and_are_tried_again():
    chosen = rounds(DraftLength(), 2000, 0.3, 0.6, 0.1)
    assert 0 < sum(k > 0 for k in chosen) < 40, "few tries"
    pauses = [len(pause) for pause in "".join("x" if k else "." for k in chosen[PLAIN_STEPS:]).split("x") if pause]
    assert pauses[0] >= PAUSE and all(pause >= PAUSE << number for number, pause in enumerate(pauses[:-1])) and len(pauses) > 3


@pytest.mark.parametrize("acceptance", [0.1, 0.4, 0.6])
@pytest.mark.parametrize("guess", [0.5, 0.8])
def test_little_is_lost_where_drafts_do_not_pay(acceptance, guess):
    for seed in range(5):
        lengths, generator, seconds, tokens = DraftLength(), torch.Generator().manual_seed(seed), 0.0, 0
        while tokens < 300:
            k = lengths.next()
            right = int((torch.rand(k, generator=generator) < acceptance).int().cumprod(0).sum())
            took = k * guess, 1 + 0.1 * (k > 0)
            lengths.record(k, right, *took)
            seconds, tokens = seconds + sum(took), tokens + right + 1
        assert tokens / seconds > 0.97


def test_drafts_come_back_when_they_begin_to_pay():
    lengths = DraftLength()
    assert rounds(lengths, 500, 0.9, 1.2, 0.1)[-1] == 0
    assert sum(rounds(lengths, 3000, 0.9, 0.2, 0.0)[-10:]) > 20


def test_slow_first_rounds_and_texts_that_grow_do_not_mislead():
    """Such as those that compile and record; and a token takes four times as long after a while."""
    lengths, chosen, slow = DraftLength(), [], {0: 2, 2: 2, 4: 2, 8: 2}
    for number in range(400):
        k = lengths.next()
        first, slow[k] = slow[k] > 0, slow[k] - 1
        plain = 1.0 if number < 100 else 4.0
        lengths.record(k, k, 0.4 * k, (100.0 if first else plain) + 0.01 * k)
        chosen.append(k)
    assert chosen[PLAIN_STEPS + 5 :].count(0) == len(chosen) // REFRESH and chosen[-1] == 8


def test_an_adapting_draft_gives_the_same_text(llama):
    ids = text(20)
    expected = generate(llama, ids, max_new_tokens=60)
    found = generate(llama, ids, max_new_tokens=60, draft_level=2, return_dict_in_generate=True)
    assert torch.equal(found.sequences, expected) and found.drafted > 0


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_does_not_go_together_is_refused_before_anything_runs(llama, tiny_model, monkeypatch):
    ids = text(20)
    llama.set_level(2)

    def refused(match, **options):
        with pytest.raises(ValueError, match=match):
            generate(llama, options.pop("ids", ids), **{"draft_level": 3, **options})
        assert llama.get_level() == 2

    runs = []
    llama.get_base_model().register_forward_pre_hook(lambda *args: runs.append(args))
    refused(r"above the level that checks, got 2 \(level 2\) at level 2", draft_level=2)
    refused("above the level that checks, got 1", draft_level=1)
    refused("the plan", draft_level=9)
    for tokens in (0, -1, 1.5, True):
        refused(f"draft_tokens must be 1 or more, or None to let it adapt, got {tokens!r}", draft_tokens=tokens)
    refused("draft_tokens=3 without draft_level", draft_level=None, draft_tokens=3)
    refused("assistant_model beside draft_level", assistant_model=tiny_model("llama"))
    refused("prompt_lookup_num_tokens beside", prompt_lookup_num_tokens=3)
    refused("level_policy beside", level_policy=4)
    refused("num_beams", num_beams=2)
    refused("num_return_sequences", num_return_sequences=2, do_sample=True)
    refused("2 texts in a batch", ids=ids.repeat(2, 1))
    refused("output_scores", output_scores=True, return_dict_in_generate=True)
    refused("use_cache=False", use_cache=False)
    refused("a cache that is static", cache_implementation="static")
    refused("a cache that is StaticCache", past_key_values=StaticCache(config=llama.config, max_cache_len=64))
    refused("in the model's memory", past_key_values=DynamicCache(config=llama.config, offloading=True))
    with monkeypatch.context() as patch:
        patch.setattr("dsla_hf.levels.drafting.is_tensor_parallel", lambda model: True)
        refused("tensor parallel")
    refused("give the whole text", attention_mask=torch.ones(1, 30))
    assert not runs


def test_a_hybrid_has_no_level_to_draft_with(llama):
    llama.set_level(2)
    hybrid = llama.merge_and_unload()
    with pytest.raises(ValueError, match="draft_level: this model has level 2 and no other"):
        generate(hybrid, text(20), draft_level=3)


def test_a_policy_put_in_by_hand_is_refused(llama):
    with pytest.raises(ValueError, match="level_policy beside draft_level"):
        generate(llama, text(20), draft_level=3, stopping_criteria=[LevelProcessor(llama, 4)])
