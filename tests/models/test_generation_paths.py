"""All ways through a model agree: full forward, cached decoding, prefill in pieces, padded batches, generate, live raises."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor

import dsla_hf.core.fold
from dsla_hf import DSLACacheLayer, cache_bytes, fold
from dsla_hf.models.adapter import dsla_layers

ORDER = [2, 0, 3, 1]
LEVELS = [0, 1, 2, 4]
VOCABULARY = 97


@pytest.fixture(params=[0, 8], ids=["pure", "window8"])
def window_size(request):
    return request.param


@pytest.fixture(params=[("qwen3", 0), ("llama", 8)], ids=["qwen3-pure", "llama-window8"])
def model(request, tiny_model, adapter_model):
    """An adapter far from its start on a small base, each kind and window size once: norms of queries and keys are before all that a
    window or a cache is about, and the tests that take both fixtures have the other pairs."""
    kind, window_size = request.param
    return adapter_model(tiny_model(kind), window_size=window_size).requires_grad_(False)


def text(batch=2, tokens=70):
    """Token ids without the padding token 0."""
    return torch.randint(2, VOCABULARY, (batch, tokens))


def positions(mask):
    """As `generate` makes them."""
    return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)


def left_padded(lengths, tokens):
    """Random texts of these lengths, right-aligned, and their mask."""
    mask = (torch.arange(tokens) >= tokens - torch.tensor(lengths)[:, None]).long()
    return text(len(lengths), tokens) * mask, mask


def full_logits(model, tokens, mask=None):
    return model(tokens, attention_mask=mask, position_ids=None if mask is None else positions(mask), use_cache=False).logits


def cached_logits(model, tokens, sizes, mask=None, cache=None, past=0, at=None):
    """Logits of successive calls that share a cache; `at` maps a call's number to what is done before it."""
    cache = DynamicCache() if cache is None else cache
    logits, start = [], past
    for number, size in enumerate(sizes):
        if at and number in at:
            at[number](cache)
        piece = slice(start, start + size)
        options = {}
        if mask is not None:
            options = {"attention_mask": mask[:, : piece.stop], "position_ids": positions(mask[:, : piece.stop])[:, piece]}
        logits.append(model(tokens[:, piece], past_key_values=cache, **options).logits)
        start += size
    assert start == tokens.shape[1]
    return torch.cat(logits, 1)


def assert_close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def teacher_forced_choice(model, sequences, mask=None):
    """What greedy decoding chooses at every position, by one full forward."""
    return full_logits(model, sequences, mask)[:, :-1].argmax(-1)


def greedy(model, tokens, mask=None, **options):
    mask = torch.ones_like(tokens) if mask is None else mask
    return model.generate(input_ids=tokens, attention_mask=mask, **{"do_sample": False, "max_new_tokens": 24, **options})


# --- levels -------------------------------------------------------------------------------------------------------


def test_level_zero_is_the_base_bit_for_bit(tiny_model, adapter_model, base_kind, window_size):
    base = tiny_model(base_kind)
    tokens, mask = left_padded([70, 33], 70)
    expected = [
        full_logits(base, tokens),
        full_logits(base, tokens, mask),
        cached_logits(base, tokens, [50, *[1] * 20], mask),
        greedy(base, tokens, mask, max_new_tokens=20),
    ]
    model = adapter_model(base, window_size=window_size)

    def run():
        return [
            full_logits(model, tokens),
            full_logits(model, tokens, mask),
            cached_logits(model, tokens, [50, *[1] * 20], mask),
            greedy(model, tokens, mask, max_new_tokens=20),
        ]

    with torch.no_grad():
        converted = full_logits(model, tokens)
        with model.disable_adapter():
            disabled = run()
        model.set_level(0)
        for found in (run(), disabled):
            assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert (converted - expected[0]).abs().max() > 0.5, "the adapter does nothing: the equality would prove nothing"


def test_every_level_is_another_model(model):
    tokens = text()
    logits = []
    for level in range(5):
        model.set_level(level)
        logits.append(full_logits(model, tokens))
    for lower, higher in itertools.pairwise(logits):
        assert (lower - higher)[:, 40:].abs().max() > 0.05


# --- forward passes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sizes", [[20, *[1] * 30], [1] * 40, [7, 1, 30, 1, 1, 13, 17]], ids=["prefill_decode", "decode_only", "pieces"])
def test_cached_forward_equals_full_forward(model, level, sizes):
    model.set_level(level)
    tokens = text(tokens=sum(sizes))  # several windows of 8 each
    assert_close(cached_logits(model, tokens, sizes), full_logits(model, tokens))


@pytest.mark.parametrize("level", LEVELS)
def test_left_padded_rows_equal_the_rows_alone(model, level):
    model.set_level(level)
    lengths = [70, 61, 33, 3]
    tokens, mask = left_padded(lengths, 70)
    padded = full_logits(model, tokens, mask)
    decoded = cached_logits(model, tokens, [67, 1, 1, 1], mask)
    pieces = cached_logits(model, tokens, [20, 21, 1, 28], mask)
    for row, length in enumerate(lengths):
        alone = full_logits(model, tokens[row : row + 1, -length:])[0]
        for found in (padded, decoded, pieces):
            assert_close(found[row, -length:], alone)


@pytest.mark.parametrize("level", [1, 4])
def test_right_padded_rows_equal_the_rows_alone(model, level):
    model.set_level(level)
    tokens, mask = text(3, 70), torch.ones(3, 70, dtype=torch.long)
    mask[1, 40:], mask[2, 9:] = 0, 0
    logits = full_logits(model, tokens, mask)
    for row, length in enumerate(mask.sum(1).tolist()):
        assert_close(logits[row, :length], full_logits(model, tokens[row : row + 1, :length])[0])


def test_packed_texts_equal_the_texts_alone(model):
    tokens, cuts = text(1, 70), [0, 5, 39, 70]
    positions = torch.cat([torch.arange(end - start) for start, end in itertools.pairwise(cuts)])[None]
    for level in (1, 4):
        model.set_level(level)
        packed = model(tokens, position_ids=positions, use_cache=False).logits
        for start, end in itertools.pairwise(cuts):
            assert_close(packed[:, start:end], full_logits(model, tokens[:, start:end]))
        with pytest.raises(ValueError, match="packed texts"):
            model(tokens, position_ids=positions, use_cache=True)


def test_eager_attention_in_the_other_layers_changes_nothing(tiny_model, adapter_model, base_kind, window_size):
    model = adapter_model(tiny_model(base_kind), window_size=window_size).requires_grad_(False)
    tokens, mask = left_padded([70, 33], 70)
    model.set_level(2)
    expected = full_logits(model, tokens, mask)
    model.base_model.model.set_attn_implementation("eager")
    assert_close(full_logits(model, tokens, mask)[mask.bool()], expected[mask.bool()])
    assert_close(cached_logits(model, tokens, [50, *[1] * 20], mask)[mask.bool()], expected[mask.bool()])


@pytest.mark.parametrize("level", [1, 3])
def test_hybrid_equals_the_adapter_on_every_path(model, level):
    model.set_level(level)
    tokens, mask = left_padded([70, 33], 70)
    expected, continued = full_logits(model, tokens, mask)[mask.bool()], greedy(model, tokens, mask, max_new_tokens=10)
    hybrid = model.merge_and_unload()
    assert_close(full_logits(hybrid, tokens, mask)[mask.bool()], expected)
    assert_close(cached_logits(hybrid, tokens, [30, 1, 1, 20, *[1] * 18], mask)[mask.bool()], expected)
    assert torch.equal(greedy(hybrid, tokens, mask, max_new_tokens=10), continued)


def test_cache_of_converted_layers_does_not_grow(model):
    sizes = []
    for tokens in (20, 70):
        cache = DynamicCache()
        cached_logits(model, text(tokens=tokens), [tokens], cache=cache)
        assert all(isinstance(layer, DSLACacheLayer) for layer in cache.layers)
        sizes.append(cache_bytes(cache))
    assert sizes[0] == sizes[1] > 0


# --- generate -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_greedy_generate_equals_argmax_of_full_forwards(model, level):
    model.set_level(level)
    prompt = text(tokens=25)
    sequences = greedy(model, prompt)
    assert sequences.shape == (2, 49) and torch.equal(sequences[:, :25], prompt)
    assert torch.equal(sequences[:, 25:], teacher_forced_choice(model, sequences)[:, 24:])


@pytest.mark.parametrize("level", [0, 2, 4])
def test_left_padded_generate_equals_single_generates(model, level):
    model.set_level(level)
    lengths = [30, 17, 4]
    prompts, mask = left_padded(lengths, 30)
    sequences = greedy(model, prompts, mask)
    for row, length in enumerate(lengths):
        alone = greedy(model, prompts[row : row + 1, -length:])
        assert torch.equal(sequences[row, 30 - length :], alone[0])


@pytest.mark.parametrize("level", [1, 4])
def test_sampling_draws_the_same_with_and_without_cache(model, level):
    model.set_level(level)
    prompts, mask = left_padded([30, 17], 30)
    drawn = []
    for use_cache in (True, True, False):
        torch.manual_seed(7)
        options = {"do_sample": True, "top_k": 0, "temperature": 1.3, "max_new_tokens": 25, "use_cache": use_cache}
        drawn.append(model.generate(input_ids=prompts, attention_mask=mask, **options))
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], greedy(model, prompts, mask, max_new_tokens=25))


@pytest.mark.parametrize("level", [1, 4])
def test_beams_are_the_same_with_and_without_cache(model, level):
    model.set_level(level)
    prompts, mask = left_padded([30, 17], 30)
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 20, "return_dict_in_generate": True, "output_scores": True}
    with_cache = greedy(model, prompts, mask, **options)
    without = greedy(model, prompts, mask, use_cache=False, **options)
    assert torch.equal(with_cache.sequences, without.sequences)
    assert_close(with_cache.sequences_scores, without.sequences_scores)
    assert (with_cache.beam_indices[:, :20].diff(dim=1) != 0).any(), "no beam was ever reordered"


@pytest.mark.parametrize("level", [1, 4])
def test_several_turns_with_the_returned_cache_equal_one_text(model, level):
    model.set_level(level)
    conversation, cache = text(1, 20), None
    for _ in range(3):
        result = greedy(model, conversation, past_key_values=cache, max_new_tokens=13, return_dict_in_generate=True)
        assert torch.equal(result.sequences, greedy(model, conversation, max_new_tokens=13))
        cache = result.past_key_values
        assert cache.get_seq_length() == result.sequences.shape[1] - 1
        conversation = torch.cat([result.sequences, text(1, 6)], 1)


@pytest.mark.parametrize("level", [0, 1, 4])
def test_generate_with_a_static_cache_equals_the_dynamic_one(model, level):
    model.set_level(level)
    prompts, mask = left_padded([30, 17], 30)
    found = greedy(model, prompts, mask, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, greedy(model, prompts, mask))


def test_prefill_in_chunks_by_generate_equals_one_prefill(model):
    model.set_level(2)
    prompts, mask = left_padded([30, 17], 30)
    assert torch.equal(greedy(model, prompts, mask, prefill_chunk_size=7), greedy(model, prompts, mask))


# --- raising and lowering the level within a text -----------------------------------------------------------------


def fold_by_hand(model, layers, mask=None):
    """Puts folded states into a cache in place of key-value layers."""

    def change(cache):
        for index in layers:
            layer = cache.layers[index]
            attention = dsla_layers(model)[index].dsla_attention().dsla
            past = None if mask is None else mask[:, : layer.keys.shape[2]]
            cache.layers[index] = fold(attention, layer.keys, layer.values, attention_mask=past)

    return change


STEPS, PIECES = [30, 1, 1, *[1] * 18], [15, 15, 2, 9, 9]  # after the raise two windows and more


# Each raise in steps and in pieces, and with padding and without.
@pytest.mark.parametrize(
    "low, high, padded, sizes",
    [
        pytest.param(low, high, padded != (number % 2), sizes, id=f"{low}-{high}-{padded != (number % 2)}-{name}")
        for number, (low, high) in enumerate([(0, 1), (0, 4), (1, 3), (2, 4)])
        for padded, sizes, name in [(False, STEPS, "steps"), (True, PIECES, "pieces")]
    ],
)
def test_raising_in_mid_text_equals_layers_folded_by_hand(model, low, high, padded, sizes):
    tokens, mask = left_padded([50, 33], 50)
    mask = mask if padded else None

    def raise_level(cache):
        model.set_level(high)

    model.set_level(low)
    raised = DynamicCache()
    found = cached_logits(model, tokens, sizes, mask, raised, at={3: raise_level})
    assert [isinstance(layer, DSLACacheLayer) for layer in raised.layers] == [index in ORDER[:high] for index in range(4)]
    by_hand = fold_by_hand(model, ORDER[low:high], mask)

    def fold_and_raise(cache):
        assert not any(isinstance(cache.layers[index], DSLACacheLayer) for index in ORDER[low:high])
        by_hand(cache)
        raise_level(cache)

    model.set_level(low)
    expected = cached_logits(model, tokens, sizes, mask, at={3: fold_and_raise})
    real = slice(None) if mask is None else mask.bool()
    assert_close(found[real], expected[real], atol=1e-6)
    model.set_level(low)
    stayed = cached_logits(model, tokens, sizes, mask)
    before = sum(sizes[:3])
    assert torch.equal(stayed[:, :before], found[:, :before])
    assert (stayed - found)[:, before:].abs().max() > 0.05


@pytest.mark.parametrize("padded", [False, True])
def test_raising_the_last_layer_in_mid_text_is_exact(tiny_model, adapter_model, base_kind, window_size, padded):
    """What the last layer reads of the past does not depend on its own kind: as if it had been DSLA from the start."""
    model = adapter_model(tiny_model(base_kind), window_size=window_size, conversion_order=[3, 2, 1, 0]).requires_grad_(False)
    tokens, mask = left_padded([70, 45], 70)
    mask = mask if padded else None
    model.set_level(0)
    found = cached_logits(model, tokens, [29, 1, 1, 1, 1, *[1] * 37], mask, at={3: lambda cache: model.set_level(1)})
    assert_close(found[:, 31:], full_logits(model, tokens, mask)[:, 31:])


def test_raising_within_generate_folds_the_cache(model):
    """By a logits processor, as the library's own level policies do it."""

    class RaiseAt(LogitsProcessor):
        def __init__(self, length):
            self.length = length

        def __call__(self, input_ids, scores):
            if input_ids.shape[1] == self.length:
                model.set_level(3)
            return scores

    prompts, mask = left_padded([30, 17], 30)
    model.set_level(1)
    result = greedy(
        model, prompts, mask, logits_processor=[RaiseAt(45)], max_new_tokens=40, return_dict_in_generate=True, output_logits=True
    )
    assert [isinstance(layer, DSLACacheLayer) for layer in result.past_key_values.layers] == [True, False, True, True]
    # The same text through forwards: of a prompt of 30 and single tokens, the first 16 calls fill the cache with 45.
    sequences, whole = result.sequences, torch.cat([mask, torch.ones(2, 40, dtype=torch.long)], 1)
    model.set_level(1)
    sizes = [30, *[1] * 39]
    expected = cached_logits(model, sequences[:, :-1], sizes, whole, at={16: lambda cache: model.set_level(3)})
    assert_close(torch.stack(result.logits, 1), expected[:, 29:])
    model.set_level(1)
    assert not torch.equal(sequences, greedy(model, prompts, mask, max_new_tokens=40))


def test_only_own_keys_and_values_make_a_live_raise_approximate(tiny_model, adapter_model, monkeypatch):
    said = []
    monkeypatch.setattr(dsla_hf.core.fold.logger, "warning_once", said.append)
    for projections in (("q_proj", "o_proj"), ("q_proj", "v_proj")):
        model = adapter_model(tiny_model("llama"), trained_projections=projections).requires_grad_(False)
        tokens = text()
        for level in (0, 2):
            model.set_level(level)
            assert_close(cached_logits(model, tokens, [30, *[1] * 40]), full_logits(model, tokens))
        assert not said
        model.set_level(0)
        cached_logits(model, tokens, [30, 1, 39], at={1: lambda cache, model=model: model.set_level(1)})
        assert len(said) == ("v_proj" in projections)


def test_raising_within_generate_works_on_a_static_cache(model):
    class RaiseAt(LogitsProcessor):
        def __call__(self, input_ids, scores):
            model.set_level(1 if input_ids.shape[1] < 45 else 3)
            return scores

    prompts, mask = left_padded([30, 17], 30)
    results = []
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        model.set_level(1)
        results.append(greedy(model, prompts, mask, logits_processor=[RaiseAt()], **options))
    assert torch.equal(*results)


@pytest.mark.parametrize("tokens", [1, 5])
def test_lowering_in_mid_text_is_refused(model, tokens):
    model.set_level(3)
    cache, ids = DynamicCache(), text()
    cached_logits(model, ids[:, :30], [30], cache=cache)
    model.set_level(1)
    with pytest.raises(RuntimeError, match="level was lowered within one text"):
        model(ids[:, 30 : 30 + tokens], past_key_values=cache)
    assert_close(cached_logits(model, ids, [30, *[1] * 40]), full_logits(model, ids))


def test_two_texts_with_caches_of_their_own_do_not_mix(model):
    model.set_level(3)
    first, second = text(1), text(1)
    caches = DynamicCache(), DynamicCache()
    logits = [[], []]
    for start in range(0, 70, 10):
        for tokens, cache, out in zip((first, second), caches, logits, strict=True):
            out.append(model(tokens[:, start : start + 10], past_key_values=cache).logits)
    for tokens, out in zip((first, second), logits, strict=True):
        assert_close(torch.cat(out, 1), full_logits(model, tokens))


def test_a_copied_cache_goes_its_own_way(model):
    """As for prompts that share a prefix."""
    model.set_level(3)
    tokens = text(1)
    cache = DynamicCache()
    cached_logits(model, tokens[:, :40], [40], cache=cache)
    twin = copy.deepcopy(cache)
    cached_logits(model, text(1, 70), [1] * 30, cache=cache, past=40)
    assert_close(cached_logits(model, tokens, [1] * 30, cache=twin, past=40), full_logits(model, tokens)[:, 40:])
