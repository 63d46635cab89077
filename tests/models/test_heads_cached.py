"""Layers converted in part behind every cache: decoding, chunks, beams, crops, compiled steps, and raises by heads in mid-text."""

import itertools

import pytest
import torch
from head_layers import assert_close, full, kinds, pieces, positions, text
from tiny import ARCHITECTURE_OPTIONS
from transformers import DynamicCache, StaticCache

from dsla_hf import DSLACacheLayer, cache_bytes, fold
from dsla_hf.core.heads import of_heads
from dsla_hf.core.partial_cache import PartialCacheLayer
from dsla_hf.levels.policies import CacheMemory, FixedLevel, Stats
from dsla_hf.models.adapter import dsla_layers

MIDDLE = [1, 3, 5, 7]


# --- caches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURE_OPTIONS)
def test_every_architecture_decodes_as_it_reads(head_model, kind):
    model, ids = head_model(kind, level=3), text(2, 44)
    expected = full(model, ids)
    config = model.get_base_model().config
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=50)):
        assert_close(pieces(model, ids, [17, 9, 1, 5, *[1] * 12], cache), expected)
        assert kinds(cache).count("PartialCacheLayer") == 3
    assert_close(full(model.merge_and_unload(), ids), expected)


# Every level with each kind and with each window; pairs, not their product.
@pytest.mark.parametrize("level", MIDDLE)
@pytest.mark.parametrize("base_kind, window_size", [("llama", 0), ("qwen3", 8)])
def test_every_level_decodes_as_it_reads(head_model, base_kind, level, window_size):
    model, ids = head_model(base_kind, level=level, window_size=window_size), text()
    assert_close(pieces(model, ids, [11, *[1] * 29], DynamicCache()), full(model, ids))


def test_a_static_cache_is_reset_and_keeps_its_addresses(head_model):
    model = head_model(level=3)
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=60)
    addresses = []
    for ids in (text(), text()):
        assert_close(pieces(model, ids, [20, *[1] * 20], cache), full(model, ids))
        layer = cache.layers[2]
        addresses.append([x.data_ptr() for x in (layer.keys, layer.values, *layer.converted.state)])
        assert layer.keys.shape[1] == 1 and layer.softmax.num_heads == 1
        cache.reset()
    assert addresses[0] == addresses[1]
    with pytest.raises(ValueError, match="the static cache has room for 60 tokens"):
        pieces(model, text(2, 61), [61], cache)


def test_a_static_cache_that_was_used_at_level_0_is_used_in_part(head_model):
    model, ids = head_model(level=0), text()
    cache = StaticCache(config=model.get_base_model().config, max_cache_len=60)
    pieces(model, text(), [40], cache)
    cache.reset()
    model.set_level(3)
    assert_close(pieces(model, ids, [20, *[1] * 20], cache), full(model, ids))
    assert cache.layers[2].keys.shape[1] == 1


def test_rows_are_reordered_repeated_and_selected(head_model):
    model, ids = head_model(level=3), text(3, 30)
    cache = DynamicCache()
    pieces(model, ids[:, :20], [20], cache)
    assert cache.batch_size == 3
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 1, 4]))
    rows = torch.tensor([2, 2, 0])
    assert cache.layers[2].batch_size == 3
    with torch.no_grad():
        found = model(ids[rows, 20:], past_key_values=cache).logits
    assert_close(found, full(model, ids[rows])[:, 20:])
    with pytest.raises(ValueError, match="holds 3 rows, the call has 2"):
        model(ids[:2, :1], past_key_values=cache)


def test_beams_and_sampling_in_groups_give_what_a_full_forward_does(head_model):
    model, ids = head_model(level=5), text(2, 20)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=12, do_sample=False)
    uncached = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=12, do_sample=False, use_cache=False
    )
    assert torch.equal(out, uncached)


def test_generate_with_a_static_cache_and_chunks(head_model):
    model, ids = head_model(level=5), text(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {"input_ids": ids * mask, "attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "disable_compile": True}
    expected = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options), expected)
    assert torch.equal(model.generate(**options, cache_implementation="static"), expected)
    assert torch.equal(model.generate(**options, prefill_chunk_size=8), expected)


def test_a_crop_goes_back_in_both_parts_or_in_none(head_model):
    model, ids = head_model(level=3), text(2, 40)
    cache = DynamicCache()
    pieces(model, ids[:, :20], [20], cache)
    with pytest.raises(NotImplementedError, match="cannot forget 3 tokens"):
        cache.crop(-3)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [20] * 4
    cache.layers[0].activate_past_recording()
    with torch.no_grad():
        model(ids[:, 20:21], past_key_values=cache)
    with pytest.raises(NotImplementedError, match="cannot forget 1 tokens"):
        cache.crop(-1)  # layer 0 can, and layer 2, behind it, cannot
    assert [int(part.get_seq_length()) for part in (*cache.layers[0].parts, *cache.layers[2].parts)] == [21] * 4
    cache.activate_past_recording()
    with torch.no_grad():
        model(text(2, 6), past_key_values=cache)
        cache.crop(-6)
        model(ids[:, 21:24], past_key_values=cache)
        cache.crop(-2)
        found = model(ids[:, 22:], past_key_values=cache).logits
    assert_close(found, full(model, ids)[:, 22:])


def test_a_call_that_fails_between_both_parts_of_the_last_layer_is_noticed(head_model, monkeypatch):
    model, ids, cache = head_model(conversion_order=[[3, 0]]), text(), DynamicCache()
    pieces(model, ids[:, :20], [20], cache)

    def fails(*args):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(DSLACacheLayer, "advance", fails)
        with pytest.raises(MemoryError):
            model(ids[:, 20:30], past_key_values=cache)
    with pytest.raises(RuntimeError, match=r"different numbers of tokens, \[30, 30, 30, 30, 20\]: a call has failed midway"):
        model(ids[:, 20:30], past_key_values=cache)


def test_assisted_decoding_gives_the_same_text(head_model):
    model = head_model(level=5)
    ids = text(1, 12).repeat(1, 3)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
    assert torch.equal(model.generate(**options, prompt_lookup_num_tokens=4), model.generate(**options))


def test_kept_heads_go_to_other_memory_and_come_back(head_model, monkeypatch):
    """Offloading goes through the cache. Without a GPU there is no other memory: what is offloaded is hidden here until it is fetched."""
    model, ids = head_model(level=3), text()
    cache, hidden = DynamicCache(), []
    pieces(model, ids[:, :20], [20], cache)
    softmax = cache.layers[2].softmax
    monkeypatch.setattr(softmax, "offload", lambda: hidden.append((softmax.keys.clone(), softmax.keys.zero_())), raising=False)
    monkeypatch.setattr(softmax, "prefetch", lambda: hidden and softmax.keys.copy_(hidden.pop()[0]), raising=False)
    cache.layers[2].offload()
    assert not cache.layers[2].keys.any() and cache.layers[2].converted.state.recurrent.any()
    with torch.no_grad():
        found = model(ids[:, 20:], past_key_values=cache).logits
    assert_close(found, full(model, ids)[:, 20:])


@pytest.mark.parametrize("merged", [True, False], ids=["hybrid", "adapter"])
def test_compiled_steps_with_a_static_cache(head_model, merged):
    """A hybrid's step is one graph. An adapter's has gaps where heads are picked, and says so where none may be."""
    # One layer in part, one whole, in the hybrid one of softmax before them: compiling takes seconds a layer, and more with gaps.
    layers, order = (3, [[1, 0], [2, 1], [2, 0]]) if merged else (2, [[0, 0], [1, 1], [1, 0]])
    model, ids, compiled = head_model(base={"num_hidden_layers": layers}, conversion_order=order, level=3), text(), []
    model.requires_grad_(False)
    model = model.merge_and_unload() if merged else model
    cache = StaticCache(config=model.config, max_cache_len=60)
    torch._dynamo.reset()  # what other tests have compiled decides which sizes count as fixed
    step = torch.compile(model, backend=lambda graph, inputs: compiled.append(graph) or graph.forward, fullgraph=merged)
    with torch.no_grad():
        logits = [model(ids[:, :30], past_key_values=cache).logits]
        for i in range(30, 40):
            logits.append(step(ids[:, i : i + 1], position_ids=torch.full((2, 1), i), past_key_values=cache).logits)
        assert_close(torch.cat(logits, 1), full(model, ids))
        if merged:
            assert len(compiled) <= 2, "a step was compiled again and again"
        else:
            with pytest.raises(Exception, match="leave out fullgraph=True, or compile a hybrid"):
                torch.compile(model, backend="eager", fullgraph=True)(ids, use_cache=False)


# --- live raises ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_a_raise_by_heads_folds_what_the_heads_had_cached(head_model, static, padded):
    """From level 0 to parts, to more heads of the same layer, to the whole: each time as if states had been built by hand."""
    model, ids = (
        head_model(base={"num_key_value_heads": 4}, conversion_order=[[1, 2], [1, 0], [1, 3], [1, 1], [3, 0]], level=0),
        text(2, 52),
    )
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :7] = 0
    config = model.get_base_model().config
    cache = StaticCache(config=config, max_cache_len=60) if static else DynamicCache()
    core = dsla_layers(model)[1].dsla_core["default"]
    shadow = DynamicCache()  # keys and values of all heads at what was the input of layer 1, which no conversion changes
    sizes, start, seen = [20, 6, 1, 5, 1, 9, 1, 9], 0, []
    for number, size in enumerate(sizes):
        model.set_level([0, 0, 1, 1, 2, 2, 4, 4][number])
        piece = slice(start, start + size)
        options = {"attention_mask": mask[:, : piece.stop], "position_ids": positions(mask)[:, piece]} if padded else {}
        with torch.no_grad():
            model(ids[:, piece], past_key_values=cache, **options)
            level, _ = model.get_level(), model.set_level(0)
            model(ids[:, piece], past_key_values=shadow, **options)
            model.set_level(level)
        start += size
        heads = model.peft_config["default"].heads_of(1)
        if not heads:
            continue
        layer = cache.layers[1]
        states = layer if len(heads) == 4 else layer.converted
        if len(heads) < 4:
            heads = (2, 0)[: len(heads)]  # as they are converted
        keys, values = (x[:, list(heads)] for x in (shadow.layers[1].keys, shadow.layers[1].values))
        by_hand = fold(of_heads(core, heads), keys, values, attention_mask=mask[:, :start]).state
        for found, expected in zip(states.state, by_hand, strict=True):
            assert_close(found, expected, 3e-5)
        if len(heads) < 4:
            kept = [head for head in (0, 3, 1) if head not in heads]
            assert layer.kept == tuple(kept) and layer.heads == heads
            assert_close(layer.keys[:, :, :start], shadow.layers[1].keys[:, kept], 1e-5)
        seen.append(len(heads))
    assert seen == [1, 1, 2, 2, 4, 4]
    assert isinstance(cache.layers[1], DSLACacheLayer)


def test_the_text_after_a_raise_is_that_of_the_states(head_model):
    """Where nothing but layer 0 is converted, a raise before the text and in its middle end in the same states, and the same text."""
    model, ids = head_model(base={"num_hidden_layers": 1}, conversion_order=[[0, 1], [0, 0]], level=0), text()
    cache = DynamicCache()
    found = pieces(model, ids, [15, 10, 15], cache, before={1: lambda: model.set_level(1), 2: lambda: model.set_level(2)}.items())
    for level, piece in ((0, slice(15)), (1, slice(15, 25)), (2, slice(25, 40))):
        model.set_level(level)
        assert_close(found[:, piece], full(model, ids)[:, piece])


def test_bytes_fall_with_every_head(head_model):
    model, ids = head_model(level=0), text(2, 200)
    cache, sizes = DynamicCache(), []
    pieces(model, ids[:, :190], [190], cache)
    for level in range(9):
        model.set_level(level)
        with torch.no_grad():
            model(ids[:, 190 + level : 191 + level], past_key_values=cache)
        sizes.append(cache_bytes(cache))
        assert cache.layers[2].memory_bytes() if level in (1, 6) else True
    per_head = 2 * 191 * 2 * 8 * 4  # rows, tokens, k and v, channels, fp32
    states = 2 * (2 * 8 * 8 * 4 + (8 + 4) * 2 * 8 * 4)
    for before, after in itertools.pairwise(sizes):
        assert before - after > 0.9 * (per_head - states) - 8 * 2 * 8 * 8
    expected = Stats(200, 199, 2, 0, **model.base_model.level_sizes()).cache_bytes(8)
    assert abs(sizes[-1] - expected) < 8 * 2 * 8


def test_a_level_lowered_within_a_text_is_refused(head_model):
    model, ids = head_model(level=6), text()
    cache = DynamicCache()
    pieces(model, ids, [40], cache)
    for level in (5, 4, 1, 0):
        model.set_level(level)
        with pytest.raises(RuntimeError, match=r"layer \d: .*The level was lowered within one text"):
            model(ids[:, :1], past_key_values=cache)
    assert [int(layer.get_seq_length()) for layer in cache.layers] == [40] * 4, "nothing was advanced"
    model.set_level(6)
    model(ids[:, :1], past_key_values=cache)
    partial = next(layer for layer in cache.layers if isinstance(layer, PartialCacheLayer))
    with pytest.raises(RuntimeError, match="lowered"):  # as a softmax layer would call it
        partial.update(*torch.zeros(2, 2, 2, 1, 8))


def test_states_of_a_sliding_layer_are_not_joined_where_they_begin_apart(head_model):
    model, ids = head_model("gemma2", conversion_order=[[0, 0], [0, 1], [1, 0]], level=1), text(2, 40)
    config = model.get_base_model().config
    short, long = DynamicCache(config=config), DynamicCache(config=config)
    pieces(model, ids[:, :9], [9], short)
    pieces(model, ids, [40], long)
    model.set_level(2)
    with pytest.raises(ValueError, match=r"layer 0 slides: of the 40 tokens so far its kept heads have the last 11"):
        model(ids[:, :1], past_key_values=long)
    with torch.no_grad():
        model(ids[:, 9:10], past_key_values=short)
    assert isinstance(short.layers[0], DSLACacheLayer)


def test_a_policy_raises_heads_while_text_is_generated(head_model):
    model, ids = head_model(level=0), text(2, 20)
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=20,
        do_sample=False,
        level_policy=lambda stats: min((stats.tokens - 18) // 3, stats.max_level),
    )
    assert out.shape == (2, 40) and model.get_level() == 7
    assert FixedLevel("kept:25%")(Stats(1, 1, 1, 0, **model.base_model.level_sizes())) == 6
    stats = Stats(1, 1000, 1, 0, **model.base_model.level_sizes())
    assert stats.num_layers == 8 and stats.cache_bytes(0) == 4 * 1000 * 2 * 2 * 8 * 4, "four layers of two heads, k and v of 8 channels"
    assert CacheMemory(stats.cache_bytes(3, 1128))(stats) == 3


def test_a_policy_raises_heads_of_padded_rows_in_every_cache(head_model):
    model, ids = head_model(level=5), text(2, 30)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    options = {"input_ids": ids * mask, "attention_mask": mask, "max_new_tokens": 14, "do_sample": False, "disable_compile": True}
    texts = []
    for cache in ({}, {"cache_implementation": "static"}):
        model.set_level(5)
        texts.append(model.generate(**options, **cache, level_policy=lambda stats: min(5 + (stats.tokens - 30) // 4, 8)))
        assert model.get_level() == 8
    assert torch.equal(*texts)


def test_a_raise_within_assisted_decoding_goes_on(head_model):
    model = head_model(level=0)
    ids = text(1, 12).repeat(1, 3)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
    out = model.generate(**options, prompt_lookup_num_tokens=4, level_policy=lambda stats: min((stats.tokens - 34) // 3, 8))
    assert out.shape == (1, 60) and model.get_level() >= 7


@pytest.mark.parametrize("window_size", [0, 8])
def test_kernels_take_some_heads_of_a_layer(head_model, interpreted_kernels, monkeypatch, window_size):
    model, ids = head_model(level=3, window_size=window_size).requires_grad_(False), text(2, 14)
    found = pieces(model, ids, [11, 1, 1, 1], DynamicCache())
    monkeypatch.undo()
    assert_close(found, full(model, ids), 1e-3)
