"""Levels that rise in mid-`generate`: exact in every way of decoding, and one line for the common case."""

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, StaticCache

from dsla_hf import CacheMemory, FixedLevel, LevelProcessor, PromptLength, Stats, cache_bytes, lower_level
from dsla_hf.core.cache import DSLACacheLayer

VOCABULARY = 97
OLD_TRANSFORMERS = Version(transformers.__version__) < Version("5.23")


def text(batch=2, tokens=30):
    return torch.randint(2, VOCABULARY, (batch, tokens))


@pytest.fixture
def model(tiny_model, adapter_model):
    """With norms of queries and keys; `llama` has none."""
    return adapter_model(tiny_model("qwen3"), level=0).requires_grad_(False).eval()


@pytest.fixture
def llama(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"), level=0).requires_grad_(False).eval()


def steps(*changes):
    """A policy: level by the number of tokens, from (tokens, level) pairs."""

    def policy(stats: Stats) -> int:
        return ([0] + [level for tokens, level in changes if stats.tokens >= tokens])[-1]

    return policy


RISING = steps((35, 1), (41, 3), (50, 4))


def generate(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"do_sample": False, "max_new_tokens": 30, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(input_ids=ids, attention_mask=mask, **options)


class ByHand:
    """Decoding written out: the level is set before each forward, as the policy has it for the tokens read and accepted so far."""

    def __init__(self, model, policy):
        self.model, self.policy = model, policy

    def __call__(self, ids, mask=None, new=30):
        mask = torch.ones_like(ids) if mask is None else mask
        cache, fresh = DynamicCache(config=self.model.config), ids
        for _ in range(new):
            level = self.policy(Stats(prompt_tokens=0, tokens=ids.shape[1], rows=1, level=0, max_level=4, num_layers=4))
            self.model.set_level(level)
            positions = (mask.cumsum(-1) - 1).clamp_min(0)[:, -fresh.shape[1] :]
            logits = self.model(fresh, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
            fresh = logits.argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, fresh], 1), torch.cat([mask, torch.ones_like(fresh)], 1)
        return ids


# --- exactness ----------------------------------------------------------------------------------------------------


def test_greedy_raises_are_those_written_out_by_hand(model):
    ids = text()
    expected = ByHand(model, RISING)(ids)
    processor = LevelProcessor(model, RISING)
    model.set_level(0)
    assert torch.equal(generate(model, ids, stopping_criteria=[processor]), expected)
    assert processor.history[0][1] == 0 and [change for change in processor.history if change[1]] == [(35, 1), (41, 3), (50, 4)]
    assert model.get_level() == 4
    model.set_level(0)
    assert not torch.equal(generate(model, ids), expected), "the raises change nothing: the equality would prove nothing"


def test_level_policy_is_the_same_in_one_line(model):
    ids = text()
    expected = ByHand(model, RISING)(ids)
    for level in (0, 4):  # whatever the level was before
        model.set_level(level)
        assert torch.equal(generate(model, ids, level_policy=RISING), expected)


def test_left_padded_rows_answer_as_alone(model):
    ids = text(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    together = generate(model, ids * mask, mask, level_policy=RISING)
    assert torch.equal(together, ByHand(model, RISING)(ids * mask, mask))
    # Alone the row is 11 tokens shorter: the same raises come 11 tokens earlier.
    alone = generate(model, ids[:1, 11:], level_policy=steps((24, 1), (30, 3), (39, 4)))
    assert torch.equal(together[:1, 11:], alone)


def test_sampling_follows_the_same_raises(llama):
    ids = text(1)
    torch.manual_seed(1)
    found = generate(llama, ids, do_sample=True, level_policy=RISING)
    torch.manual_seed(1)
    llama.set_level(0)
    again = generate(llama, ids, do_sample=True, stopping_criteria=[LevelProcessor(llama, RISING)])
    assert torch.equal(found, again) and llama.get_level() == 4


def test_beams_with_a_cache_equal_beams_without(llama):
    ids = text(2, 30)

    def beams(**options):
        llama.set_level(0)
        return generate(llama, ids, num_beams=3, max_new_tokens=12, level_policy=FixedLevel(3), **options)

    assert torch.equal(beams(), beams(use_cache=False))
    llama.set_level(0)
    rising = generate(llama, ids, num_beams=3, max_new_tokens=12, level_policy=steps((33, 2), (37, 4)))
    assert llama.get_level() == 4 and rising.shape == (2, 42)


def test_beams_raise_between_the_steps(llama):
    """One beam of one row is greedy decoding, through the code of beams; with more the caches are reordered around the raise."""
    ids = text(1, 30)
    seen = []

    def policy(stats):
        seen.append((stats.tokens, stats.level))
        return RISING(stats)

    generate(llama, ids, num_beams=2, max_new_tokens=15, level_policy=policy)
    assert [tokens for tokens, _ in seen] == [30, *range(31, 46)]


def test_prompt_lookup_and_assisted_decoding_count_accepted_tokens(llama, tiny_model):
    ids = text(1, 12).repeat(1, 3)  # repeats, so that lookup finds candidates
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": tiny_model("llama").eval()}):
        tokens = []

        def policy(stats, tokens=tokens):
            tokens.append(stats.tokens)
            return 0 if stats.tokens < 45 else 3

        out = generate(llama, ids, level_policy=policy, **options)
        assert llama.get_level() == 3
        if OLD_TRANSFORMERS:
            continue  # asks stopping criteria about candidates too, so the raise may come some tokens early
        assert tokens == sorted(tokens) and tokens[-1] >= out.shape[1]
        # The text is what greedy decoding gives with the raise where it took place.
        raised_at = next(count for count in tokens if count >= 45)
        assert torch.equal(out, ByHand(llama, steps((raised_at, 3)))(ids, new=out.shape[1] - 36))


def test_static_cache_gives_the_text_of_a_dynamic_one(model):
    ids = text()
    expected = generate(model, ids, level_policy=RISING)
    assert torch.equal(generate(model, ids, level_policy=RISING, cache_implementation="static"), expected)
    cache = StaticCache(config=model.config, max_cache_len=80)
    assert torch.equal(generate(model, ids, level_policy=RISING, past_key_values=cache), expected)
    assert all(isinstance(layer, DSLACacheLayer) for layer in cache.layers)


def test_streaming_yields_tokens_while_the_level_rises(llama):
    class Streamer:
        def __init__(self):
            self.seen = []

        def put(self, tokens):
            self.seen.append((tokens.numel(), llama.get_level()))

        def end(self):
            self.seen.append("end")

    ids, streamer = text(1), Streamer()
    generate(llama, ids, streamer=streamer, level_policy=RISING)
    assert streamer.seen[0] == (30, 0) and streamer.seen[-1] == "end"
    levels = [level for count, level in streamer.seen[1:-1] if count == 1]
    assert levels == sorted(levels) and set(levels) == {0, 1, 3, 4}


def test_states_after_a_raise_are_those_folded_by_hand(llama):
    """Converting a layer at a step and going on equals computing its states from the cached keys and values."""
    ids = text(2, 40)
    cache = DynamicCache(config=llama.config)
    llama(ids[:, :33], past_key_values=cache)
    layers = [llama.get_base_model().model.layers[i].self_attn for i in range(4)]
    keys, values = ([getattr(layer, name).transpose(1, 2).clone() for layer in cache.layers] for name in ("keys", "values"))
    by_hand = [layer.dsla_core["default"].fold(k, v) for layer, k, v in zip(layers, keys, values, strict=True)]
    llama.set_level(4)
    llama(ids[:, 33:34], past_key_values=cache)
    for state, cached in zip(by_hand, cache.layers, strict=True):
        assert (cached.state.lengths == 34).all()
        assert torch.equal(cached.state.recurrent, state.recurrent), "33 tokens and one more: no block was filled"


def test_memory_of_folded_layers_is_what_the_policy_reckoned_with(llama):
    ids = text(2, 60)
    for level in range(5):
        out = generate(llama, ids, level_policy=level, max_new_tokens=4, return_dict_in_generate=True)
        tokens = out.past_key_values.get_seq_length()
        stats = Stats(prompt_tokens=60, tokens=tokens, rows=2, level=level, **llama.base_model.level_sizes())
        assert cache_bytes(out.past_key_values) == stats.cache_bytes(level), level


def test_cache_memory_keeps_the_cache_below_its_budget(llama):
    ids = text(2, 30)
    sizes = llama.base_model.level_sizes()
    budget = Stats(prompt_tokens=0, tokens=45, rows=2, level=0, **sizes).cache_bytes(0)
    largest = []

    class Measure(LogitsProcessor):
        def __call__(self, input_ids, scores):
            largest.append(cache_bytes(cache))
            return scores

    cache = DynamicCache(config=llama.config)
    options = {
        "level_policy": CacheMemory(budget, headroom=1),
        "past_key_values": cache,
        "logits_processor": LogitsProcessorList([Measure()]),
    }
    generate(llama, ids, max_new_tokens=60, **options)
    assert llama.get_level() > 0 and max(largest) <= budget and max(largest) > 0.7 * budget


# --- where the level begins ---------------------------------------------------------------------------------------


def test_prompt_is_read_at_the_level_its_length_asks_for(llama):
    calls = []
    hook = llama.get_base_model().register_forward_pre_hook(
        lambda m, a, k: calls.append((k["input_ids"].shape[1], llama.get_level())), with_kwargs=True
    )
    for prompt, level in ((10, 0), (30, 2), (60, 4)):
        calls.clear()
        out = generate(
            llama,
            text(1, prompt),
            level_policy=PromptLength(((0, 0), (20, 2), (50, "100%"))),
            max_new_tokens=2,
            return_dict_in_generate=True,
        )
        assert calls[0] == (prompt, level) and llama.get_level() == level
        folded = [isinstance(layer, DSLACacheLayer) for layer in out.past_key_values.layers]
        assert sum(folded) == level
    hook.remove()


def test_named_policy_of_the_issue(llama):
    generate(llama, text(1, 10), level_policy="prompt-length", max_new_tokens=2)
    assert llama.get_level() == 1  # 12.5 % of four layers, rounded upwards at the half


@pytest.mark.parametrize("states", [True, False])
def test_texts_that_are_too_short_to_save_memory_are_the_bases(tiny_model, adapter_model, states):
    model = adapter_model(tiny_model("llama"), states=states)
    base = model.get_base_model()
    sizes = model.level_sizes()
    enough = sizes["dsla_bytes"] // sizes["softmax_bytes_per_token"]  # tokens
    assert states or enough == 8 + 4, "a window and its sinks"
    ids, options = text(1, enough - 4), {"max_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    found = generate(model, ids, level_policy="saving", **options)
    model.set_level(0)
    expected = generate(base, ids, **options)
    assert torch.equal(found.sequences, expected.sequences) and all(map(torch.equal, found.logits, expected.logits))

    processor = LevelProcessor(model, "saving:50%")
    long = generate(model, ids, level_policy=processor, max_new_tokens=20)
    assert processor.history == [(enough - 4, 0), (enough + 1, 2)]
    assert torch.equal(long, ByHand(model, lambda stats: 2 if stats.tokens > enough else 0)(ids, new=20))
    generate(model, text(1, enough + 1), level_policy=processor, max_new_tokens=1)
    assert processor.history[0] == (enough + 1, 2), "the prompt is read at the level"


def test_next_request_may_be_lower_and_a_text_that_goes_on_may_not(llama):
    policy = PromptLength(((0, 1), (20, 3)))
    long, short = text(1, 30), text(1, 10)
    first = generate(llama, long, level_policy=policy, max_new_tokens=3, return_dict_in_generate=True)
    assert llama.get_level() == 3
    generate(llama, first.sequences, level_policy=FixedLevel(0), past_key_values=first.past_key_values, max_new_tokens=1)
    assert llama.get_level() == 3, "the cache holds states"
    generate(llama, short, level_policy=policy, max_new_tokens=3)
    assert llama.get_level() == 1


def test_policy_that_asks_for_less_in_mid_text_is_not_followed(llama):
    ids = text(1)
    found = generate(llama, ids, level_policy=lambda stats: 3 if stats.tokens < 40 else 1)
    assert llama.get_level() == 3 and torch.equal(found, ByHand(llama, lambda stats: 3)(ids))


def test_lowering_by_reading_again_equals_the_lower_level_from_the_start(llama):
    ids = text(2, 30)
    llama.set_level(4)
    half = generate(llama, ids, max_new_tokens=10)
    cache = lower_level(llama, 1, half[:, :-1])
    assert llama.get_level() == 1
    found = generate(llama, half, past_key_values=cache, max_new_tokens=10)
    llama.set_level(1)
    assert torch.equal(found, generate(llama, half, max_new_tokens=10))


def test_raise_between_the_chunks_of_a_prefill(llama):
    waiting = iter([0] * 2 + [99] * 100)
    processor = LevelProcessor(llama, lambda stats: 4 if stats.queue_depth else 0, load=lambda: (next(waiting), 0))
    seen = []
    hook = llama.get_base_model().register_forward_hook(
        lambda m, a, k, out: seen.append((k["input_ids"].shape[1], llama.get_level())), with_kwargs=True
    )
    ids = text(1, 40)
    out = generate(llama, ids, level_policy=processor, prefill_chunk_size=10, max_new_tokens=3)
    hook.remove()
    assert [count for count, _ in seen] == [10, 10, 10, 10, 1, 1]
    assert [level for _, level in seen] == [0, 4, 4, 4, 4, 4]
    assert processor.history == [(40, 0), (20, 4)] and out.shape == (1, 43)
    assert not llama.get_base_model()._forward_pre_hooks


# --- what a policy sees -------------------------------------------------------------------------------------------


def test_stats_of_a_request(llama):
    seen = []
    times = iter(range(0, 10_000, 2))  # two seconds pass between any two looks at the clock

    def policy(stats):
        seen.append(stats)
        return 2 if stats.tokens >= 35 else 0

    processor = LevelProcessor(llama, policy, load=lambda: (7, 800), clock=lambda: float(next(times)))
    generate(llama, text(2, 30), level_policy=processor, num_return_sequences=3, do_sample=True, max_new_tokens=10)
    assert [stats.tokens for stats in seen] == list(range(30, 41))
    assert {(stats.prompt_tokens, stats.rows, stats.max_level, stats.num_layers, stats.min_level) for stats in seen} == {(30, 6, 4, 4, 0)}
    assert {(stats.queue_depth, stats.longest_waiting_prompt) for stats in seen} == {(7, 800)}
    assert seen[0].seconds_per_token is None and seen[3].seconds_per_token == pytest.approx(4.0)
    assert [stats.level for stats in seen] == [0] * 6 + [2] * 5
    assert [stats.tokens_since_change for stats in seen[6:]] == [1, 2, 3, 4, 5] and seen[6].seconds_per_token is None
    assert seen[0].seconds_since_change == float("inf") and 0 < seen[7].seconds_since_change < 20


def test_policy_of_three_lines(llama):
    def long_texts(stats: Stats) -> int:
        return 4 if stats.tokens > 40 else 0

    generate(llama, text(1, 30), level_policy=long_texts)
    assert llama.get_level() == 4


# --- hybrids, other criteria, bad input ---------------------------------------------------------------------------


def test_hybrid_takes_a_policy_and_keeps_its_level(llama):
    ids = text(1)
    llama.set_level(2)
    expected = generate(llama, ids)
    hybrid = llama.merge_and_unload()
    assert hybrid.get_level() == 2
    for policy in ("prompt-length", FixedLevel(0), FixedLevel(4)):
        assert torch.equal(generate(hybrid, ids, level_policy=policy), expected)
    with pytest.raises(ValueError, match="has level 2 and no other, so not 3"):
        hybrid.set_level(3)


def test_criteria_of_the_user_stay(llama):
    class Stop:
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 37)

    criteria = [Stop()]
    assert generate(llama, text(1), level_policy=3, stopping_criteria=criteria).shape[1] == 37 and len(criteria) == 1


def test_without_a_policy_nothing_changes(llama):
    ids = text(1)
    llama.set_level(2)
    assert torch.equal(generate(llama, ids, level_policy=None), generate(llama, ids)) and llama.get_level() == 2


def test_positional_arguments_are_understood(llama):
    ids = text(1)
    expected = generate(llama, ids, level_policy=3)
    found = llama.base_model.generate(
        ids, None, None, None, level_policy=3, do_sample=False, max_new_tokens=30, pad_token_id=0, eos_token_id=None
    )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("wrong", [5, -1, 2.5, "3"])
def test_policies_that_ask_for_no_level_are_named(llama, wrong):
    with pytest.raises(ValueError, match="asked for level"):
        generate(llama, text(1), level_policy=lambda stats: wrong)
    assert llama.get_level() == 0


def test_models_without_levels_are_refused(tiny_model):
    with pytest.raises(ValueError, match="LlamaForCausalLM has no levels: give a PeftModel with a DSLA adapter"):
        LevelProcessor(tiny_model("llama"), 3)


def test_unknown_policy_is_refused_before_anything_runs(llama, monkeypatch):
    monkeypatch.setattr(type(llama.get_base_model()), "forward", None)
    with pytest.raises(ValueError, match="level_policy must be one of"):
        generate(llama, text(1), level_policy="longest")
