"""Layers converted in part: what they compute, how they are trained, cached, raised, saved and refused."""

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from tiny import ARCHITECTURE_OPTIONS
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.llama import modeling_llama

from dsla_hf import DSLACacheLayer, DSLAConfig, cache_bytes, fold
from dsla_hf.core.heads import HeadSplit
from dsla_hf.core.partial_cache import PartialCacheLayer
from dsla_hf.inference.graph import GraphDecoder
from dsla_hf.levels.policies import CacheMemory, FixedLevel, Stats
from dsla_hf.levels.reading import parse_level
from dsla_hf.models.adapter import dsla_layers
from dsla_hf.models.configuration import resolve_level
from dsla_hf.models.mixed_projections import MixedColumns, MixedRows
from dsla_hf.serving.engine.levels import Levels
from dsla_hf.training.ranking import rank_layers

# Of four layers with two KV heads each: layers 2, 0 and 3 are split at some levels, 3 is whole from level 4 on.
ORDER = [[2, 0], [0, 1], [3, 0], [3, 1], [1, 1], [0, 0], [2, 1], [1, 0]]
MIDDLE = [1, 3, 5, 7]
VOCABULARY = 97


@pytest.fixture
def head_model(tiny_model, adapter_model):
    """Factory of adapters over heads, far from their start: `head_model("llama", level=3)`; `base` goes to the base's config."""

    def make(kind="llama", base=None, **config):
        config = {"conversion_unit": "head", "conversion_order": ORDER, **config}
        return adapter_model(tiny_model(kind, **(base or {})), **config)

    return make


def text(batch=2, tokens=40):
    return torch.randint(2, VOCABULARY, (batch, tokens))


def positions(mask):
    return (mask.long().cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def full(model, ids, mask=None, **options):
    position_ids = None if mask is None else positions(mask)
    return model(ids, attention_mask=mask, position_ids=position_ids, use_cache=False, **options).logits


@torch.no_grad()
def pieces(model, ids, sizes, cache, mask=None, before=()):
    """Logits of calls of these sizes that share a cache; `before`: what is done before the call of a number."""
    logits, start = [], 0
    for number, size in enumerate(sizes):
        dict(before).get(number, lambda: None)()
        piece, options = slice(start, start + size), {}
        if mask is not None:
            options = {"attention_mask": mask[:, : piece.stop], "position_ids": positions(mask)[:, piece]}
        logits.append(model(ids[:, piece], past_key_values=cache, **options).logits)
        start += size
    assert start == ids.shape[1]
    return torch.cat(logits, 1)


def assert_close(found, expected, atol=1e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def kinds(cache):
    return [type(layer).__name__ for layer in cache.layers]


# --- both ends of the scale -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size", [0, 8])
def test_level_0_is_the_base_and_all_heads_are_todays_layers(tiny_model, adapter_model, base_kind, window_size):
    ids = text()
    base = tiny_model(base_kind)
    expected = full(base, ids)
    layers = adapter_model(copy.deepcopy(base), window_size=window_size)
    heads = get_peft_model(base, DSLAConfig(conversion_unit="head", conversion_order=ORDER, window_size=window_size, task_type="CAUSAL_LM"))
    heads.load_state_dict(layers.state_dict())
    heads.eval().set_level(0)
    assert torch.equal(full(heads, ids), expected)
    heads.set_level(8)
    layers.set_level(4)
    gradients = []
    for model in (layers, heads):
        model.zero_grad()
        logits = model(ids, use_cache=False).logits
        logits.square().mean().backward()
        gradients.append((logits, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert gradients[0][1].keys() == gradients[1][1].keys() and len(gradients[0][1]) > 4 * 4
    assert all(torch.equal(gradient, gradients[1][1][name]) for name, gradient in gradients[0][1].items())


def test_a_whole_layer_of_a_head_plan_is_that_of_a_layer_plan(head_model, adapter_model, tiny_model):
    """At level 4 layer 3 is whole, and the cache has a plain layer for it."""
    model, cache = head_model(level=4), DynamicCache()
    pieces(model, text(), [40], cache)
    assert kinds(cache) == ["PartialCacheLayer", "DynamicLayer", "PartialCacheLayer", "DSLACacheLayer"]


# --- a middle level, against a mixture made by hand -------------------------------------------------------------


def mixture(model, hidden, embeddings, heads):
    """The attention output of a wrapped Llama or Qwen3 layer, head by head in plain PyTorch: rows and columns of the base for kept KV
    heads, the adapter's for the others."""
    base, name = model.base_layer, model.adapter_name
    core, own_q, own_o = model.dsla_core[name], model.dsla_q_proj[name], model.dsla_o_proj[name]
    cos, sin = (x[:, :, None] for x in embeddings)

    def rotated(x):
        x1, x2 = x.chunk(2, -1)
        return x * cos + torch.cat([-x2, x1], -1) * sin

    def heads_of(x, norm):
        x = x.unflatten(-1, (-1, base.head_dim))
        return x if norm is None else norm(x)

    q_norm, k_norm = (getattr(base, f"{x}_norm", None) for x in "qk")
    q_base, q_own = (rotated(heads_of(linear(hidden), q_norm)) for linear in (base.q_proj, own_q))
    k, v = rotated(heads_of(base.k_proj(hidden), k_norm)), heads_of(base.v_proj(hidden), None)
    converted = core(q_own, k, v)[0]  # the whole layer: heads know nothing of one another
    group = core.num_heads // core.num_kv_heads
    repeated = [x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v)]
    kept = F.scaled_dot_product_attention(q_base.transpose(1, 2), *repeated, is_causal=True, scale=base.scaling).transpose(1, 2)
    out = 0 if base.o_proj.bias is None else base.o_proj.bias
    for head in range(core.num_heads):
        columns = slice(head * base.head_dim, (head + 1) * base.head_dim)
        is_dsla = head // group in heads
        out = out + (converted if is_dsla else kept)[:, :, head] @ (own_o if is_dsla else base.o_proj).weight[:, columns].T
    return out


@pytest.mark.parametrize("heads", [(0,), (1,), (0, 2), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 8], ids=["grouped", "one-query-each"])
def test_a_layer_in_part_is_the_mixture_of_its_heads(head_model, base_kind, kv_heads, heads):
    sizes = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "attention_bias": True, "num_hidden_layers": 2}
    model = head_model(base_kind, base=sizes, conversion_order=[[1, head] for head in heads])
    layer = dsla_layers(model)[1]
    with torch.no_grad():
        layer.base_layer.o_proj.bias.normal_()
    found = {}
    layer.register_forward_hook(lambda module, args, kwargs, out: found.update(kwargs, out=out[0]), with_kwargs=True)
    logits = full(model, text())
    expected = mixture(layer, found["hidden_states"], found["position_embeddings"], heads)
    assert layer.converted_part == heads and logits.isfinite().all()
    assert_close(found["out"], expected, 1e-5)


def test_gradients_reach_rows_and_columns_of_converted_heads_alone(head_model):
    model = head_model(level=1)  # head 0 of layer 2
    layer = dsla_layers(model)[2]
    model(text(), use_cache=False).logits.square().mean().backward()
    q, o, core = layer.dsla_q_proj["default"], layer.dsla_o_proj["default"], layer.dsla_core["default"]
    assert q.weight.grad[:16].abs().sum(1).all() and not q.weight.grad[16:].any()
    assert o.weight.grad[:, :16].abs().sum(0).all() and not o.weight.grad[:, 16:].any()
    for name, parameter in core.named_parameters():
        half = len(parameter) // 2
        assert parameter.grad[:half].any() and not parameter.grad[half:].any(), name
    for other in (0, 1, 3):
        assert all(p.grad is None for part in dsla_layers(model)[other].adapter_parts() for p in part.parameters())


def test_gradients_are_those_of_a_model_whose_outputs_are_selected(head_model, monkeypatch):
    """Composed weights, and both projections computed one after the other, as over a quantised base."""
    for kind in ("llama", "phi3"):
        model, ids = head_model(kind, level=3, trained_projections=["q_proj", "k_proj", "v_proj", "o_proj"]), text()
        results = []
        for readable in (True, False):
            with monkeypatch.context() as patch:
                if not readable:
                    patch.setattr("dsla_hf.models.mixed_projections.MixedProjection._readable", lambda self: False)
                model.zero_grad()
                logits = model(ids, use_cache=False).logits
                logits.square().mean().backward()
                results.append((logits, [p.grad for p in model.parameters() if p.grad is not None]))
        assert_close(results[1][0], results[0][0], 1e-5)
        assert len(results[0][1]) > 10
        for found, expected in zip(results[1][1], results[0][1], strict=True):
            assert_close(found, expected, 1e-5)


def test_what_was_composed_is_made_anew_when_a_weight_changes(head_model):
    model, ids = head_model(level=3).requires_grad_(False), text()
    layer = dsla_layers(model)[2]
    before = full(model, ids)
    view = layer.dsla_attention(layer.converted_part)
    kept = view.q_proj._kept[1][0]
    assert isinstance(view.q_proj, MixedRows) and isinstance(view.o_proj, MixedColumns)
    assert torch.equal(full(model, ids), before) and view.q_proj._kept[1][0] is kept, "composed once"
    for part in (layer.dsla_q_proj, layer.dsla_o_proj, layer.dsla_core):
        with torch.no_grad():
            parameter = next(part["default"].parameters())
            parameter.mul_(1.5)
        after = full(model, ids)
        assert (after - before).abs().max() > 1e-4
        before = after
    fresh = head_model(level=3)
    fresh.load_state_dict(model.state_dict())
    assert_close(full(fresh, ids), before, 1e-6)


# --- padding, packing, masks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("window_size", [0, 8])
def test_padding_leaves_no_trace(head_model, side, window_size):
    model, lengths = head_model(level=5, window_size=window_size), (40, 27)
    ids, place = text(2, 40), torch.arange(40)
    mask = torch.stack([(place >= 40 - n) if side == "left" else (place < n) for n in lengths]).long()
    found = full(model, ids * mask, mask)
    for row, real in enumerate(mask.bool()):
        assert_close(found[row, real], full(model, ids[row : row + 1, real])[0])
    cached = pieces(model, ids * mask, [19, 7, *[1] * 14], DynamicCache(), mask)
    assert_close(cached[mask.bool()], found[mask.bool()])


def test_packed_texts_do_not_see_each_other(head_model):
    model, ids = head_model(level=5), text(1, 50)
    packed = torch.cat([torch.arange(31), torch.arange(19)])[None]
    with torch.no_grad():
        found = model(ids, position_ids=packed, use_cache=False).logits
    assert_close(found, torch.cat([full(model, ids[:, :31]), full(model, ids[:, 31:])], 1))


def test_a_mask_of_each_head_reaches_its_head(head_model):
    model, ids = head_model(level=5), text(2, 24)
    allowed = torch.ones(24, 24).tril().bool()
    per_head = torch.zeros(2, 4, 24, 24).masked_fill(~allowed, torch.finfo(torch.float32).min)
    with torch.no_grad():
        found = model(ids, attention_mask=per_head, use_cache=False).logits
    assert_close(found, full(model, ids))


def test_the_attention_that_the_model_is_told_to_run_is_run(head_model, monkeypatch):
    model, ids, calls = head_model(level=5), text(), []
    expected = full(model, ids)
    original = modeling_llama.eager_attention_forward

    def watched(module, q, k, *args, **kwargs):
        calls.append((q.shape[1], k.shape[1]))
        return original(module, q, k, *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", watched)
    model.get_base_model().set_attn_implementation("eager")
    assert_close(full(model, ids), expected)
    assert calls == [(2, 1)] * 3, "at level 5 layers 0, 1 and 2 keep one of two KV heads, layer 3 none"
    hybrid = model.merge_and_unload()
    hybrid.set_attn_implementation("sdpa")
    calls.clear()
    assert_close(full(hybrid, ids), expected)
    assert not calls
    hybrid.set_attn_implementation("eager")
    assert_close(full(hybrid, ids), expected)
    assert len(calls) == 3


# --- caches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURE_OPTIONS)
def test_every_architecture_decodes_as_it_reads(head_model, kind):
    model, ids = head_model(kind, level=3), text(2, 44)
    expected = full(model, ids)
    base = model.get_base_model()
    for cache in (DynamicCache(config=base.config), DynamicCache(), StaticCache(config=base.config, max_cache_len=50)):
        if type(cache) is DynamicCache and not cache.layers and getattr(base.config, "sliding_window", None):
            continue  # without a config it would keep what does not slide
        assert_close(pieces(model, ids, [17, 9, 1, 5, *[1] * 12], cache), expected)
        assert kinds(cache).count("PartialCacheLayer") == 3
    hybrid = copy.deepcopy(model).merge_and_unload()
    assert_close(full(hybrid, ids), expected)


@pytest.mark.parametrize("level", MIDDLE)
@pytest.mark.parametrize("window_size", [0, 8])
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
    cache.activate_past_recording()
    with torch.no_grad():
        model(text(2, 6), past_key_values=cache)
        cache.crop(-6)
        model(ids[:, 20:24], past_key_values=cache)
        cache.crop(-2)
        found = model(ids[:, 22:], past_key_values=cache).logits
    assert_close(found, full(model, ids)[:, 22:])


def test_assisted_decoding_gives_the_same_text(head_model):
    model = head_model(level=5)
    ids = text(1, 12).repeat(1, 3)
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 24}
    assert torch.equal(model.generate(**options, prompt_lookup_num_tokens=4), model.generate(**options))


def test_kept_heads_go_to_other_memory_and_come_back(head_model, monkeypatch):
    """Offloading goes through the cache; without a GPU its moves are to the CPU, and only that they are asked for is seen."""
    model, ids, calls = head_model(level=3), text(), []
    cache = DynamicCache()
    pieces(model, ids[:, :20], [20], cache)
    layer = cache.layers[2]
    for name in ("offload", "prefetch"):
        monkeypatch.setattr(layer.softmax, name, lambda name=name: calls.append(name), raising=False)
        getattr(layer, name)()
    assert calls == ["offload", "prefetch"]


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
        keys, values = (x[:, list(heads)] for x in (shadow.layers[1].keys, shadow.layers[1].values))
        by_hand = fold(core.of_heads(heads), keys, values, attention_mask=mask[:, :start]).state
        for found, expected in zip(states.state, by_hand, strict=True):
            assert_close(found, expected, 1e-5)
        if len(heads) < 4:
            kept = [head for head in range(4) if head not in heads]
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


# --- files ------------------------------------------------------------------------------------------------------


def test_an_adapter_of_heads_is_saved_and_loaded(head_model, tiny_model, tmp_path):
    model, ids = head_model(level=3), text()
    expected = full(model, ids)
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["conversion_order"] == ORDER and stored["conversion_unit"] == "head" and stored["format_version"] == 2
    assert "2.0, 0.1, 3.0" in (tmp_path / "README.md").read_text()
    base = copy.deepcopy(model.get_base_model())
    model.save_pretrained(tmp_path)  # over itself
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, level="kept:5")
    assert loaded.get_level() == 3 and torch.equal(full(loaded.eval(), ids), expected)
    assert base is not None and loaded.peft_config["default"].converted_heads == [(2, 0), (0, 1), (3, 0)]
    other = head_model(conversion_order=[[2, 0], [0, 1]])
    with pytest.raises(ValueError, match="holds another adapter"):
        other.save_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt_oss"])
@pytest.mark.parametrize("level", [3, 8])
def test_a_hybrid_with_layers_in_part_is_merged_saved_and_loaded(head_model, kind, level, tmp_path):
    model, ids = head_model(kind, level=level), text()
    expected = full(model, ids)
    hybrid = model.merge_and_unload()
    assert_close(full(hybrid, ids), expected, 1e-5)
    hybrid.save_pretrained(tmp_path)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation=hybrid.config._attn_implementation
    )
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(full(loaded.eval(), ids), full(hybrid, ids))
    assert loaded.get_level() == level == loaded.level_sizes()["min_level"]
    stored = json.loads((tmp_path / "config.json").read_text())["dsla_config"]
    assert stored["conversion_unit"] == "head"
    if level == 3:
        assert stored["converted_layers"] == [] and stored["converted_heads"] == [[2, 0], [0, 1], [3, 0]]
        core = loaded.model.layers[2].self_attn.dsla
        assert core.num_kv_heads == 1 and core.num_heads == 2, "nothing of kept heads is stored"
    else:
        assert stored["converted_layers"] == [2, 0, 3, 1] and stored["converted_heads"] == []
    assert_close(pieces(loaded, ids, [20, *[1] * 20], DynamicCache(config=loaded.config)), expected)
    cache = DynamicCache(config=loaded.config)
    with torch.no_grad():
        loaded(ids, past_key_values=cache)
    copied = copy.deepcopy(loaded)
    assert torch.equal(full(copied, ids), full(loaded, ids))


def test_a_hybrid_takes_over_the_cache_of_its_base(head_model, tiny_model):
    model, ids = head_model(base={"num_hidden_layers": 1}, conversion_order=[[0, 1]], level=0), text()
    cache = DynamicCache()
    pieces(model, ids[:, :20], [20], cache)
    model.set_level(1)
    expected = full(model, ids)
    hybrid = model.merge_and_unload()
    with torch.no_grad():
        found = hybrid(ids[:, 20:], past_key_values=cache).logits
    assert_close(found, expected[:, 20:])


def test_a_hybrid_of_heads_is_checked_when_it_is_read(head_model, tmp_path):
    head_model(level=3).merge_and_unload().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    stored = json.loads(path.read_text())
    for entries, message in (
        ({"converted_heads": [[2, 2]]}, r"names a KV head that does not exist in \[\(2, 2\)\]: each KV head of this model is 0 to 1"),
        ({"converted_heads": [[4, 0]]}, r"names a layer that does not exist in \[\(4, 0\)\]"),
        ({"converted_heads": [[2, 0]], "converted_layers": [2]}, r"names heads of layers \[2\], which converted_layers names as a whole"),
        ({"conversion_unit": "row"}, r"conversion_unit must be one of \['layer', 'head'\], got 'row'"),
        ({"format_version": 3}, "written in format 3"),
    ):
        path.write_text(json.dumps({**stored, "dsla_config": {**stored["dsla_config"], **entries}}))
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)


# --- configuration and levels -----------------------------------------------------------------------------------


def test_what_is_converted_at_a_level(head_model):
    config = head_model().peft_config["default"]
    assert config.level == 8 and config.layers_to_transform == [2, 0, 3, 1]
    config.level = 5
    assert config.converted_layers == [3] and config.converted_heads == [(2, 0), (0, 1), (1, 1)]
    assert [config.heads_of(layer) for layer in range(4)] == [(1,), (1,), (0,), (0, 1)]
    config.conversion_order.reverse()  # in place: nothing of before is remembered
    assert config.heads_of(2) == (1,) and config.heads_of(1) == (0, 1)


def test_all_heads_by_number_without_an_order(tiny_model):
    model = get_peft_model(tiny_model("llama"), DSLAConfig(conversion_unit="head", task_type="CAUSAL_LM"))
    config = model.peft_config["default"]
    assert config.conversion_order == [(layer, head) for layer in range(4) for head in range(2)] and config.level == 0
    local = get_peft_model(tiny_model("gemma3_text"), DSLAConfig(conversion_unit="head", task_type="CAUSAL_LM"))
    assert local.peft_config["default"].layers_to_transform == [1, 3], "layers that slide over little stay"


def test_layers_are_as_they_were(tiny_model):
    config = DSLAConfig(conversion_order=[3, 1, 2], level=2)
    assert config.conversion_unit == "layer" and config.converted_layers == [3, 1] and config.converted_heads == []
    assert "conversion_unit" not in config.to_hybrid_dict()
    with pytest.raises(ValueError, match="no base_dimensions"):
        config.heads_of(3)
    model = get_peft_model(tiny_model("llama"), config)
    assert model.peft_config["default"].heads_of(3) == (0, 1) and model.peft_config["default"].heads_of(0) == ()


@pytest.mark.parametrize(
    "config, message",
    [
        ({"conversion_unit": "row"}, r"conversion_unit must be one of \['layer', 'head'\], got 'row'"),
        ({"conversion_order": [[0, 1], 2]}, r"must hold pairs \[layer, KV head\] where heads are the unit, got \[2\]"),
        ({"conversion_order": [3, 1]}, r"got \[3, 1\]: conversion_unit='layer' takes layers"),
        ({"conversion_order": [[0, 1], [0, True]]}, r"got \[\[0, True\]\]"),
        ({"conversion_order": [[0, 1], [2, 0], [0, 1]]}, r"names heads more than once: \[\(0, 1\)\]"),
        ({"conversion_order": [[0, -1]]}, r"names a KV head that does not exist in \[\(0, -1\)\]"),
        ({"conversion_order": []}, r"must be a list of pairs \[layer, KV head\], got \[\]"),
        ({"conversion_order": [[0, 1]], "level": 0.5}, r"level must be a whole number of converted heads, 0 or more, got 0.5"),
        ({"conversion_order": [[0, 1]], "level": 2}, r"level 2 is above the plan: conversion_order holds 1 heads"),
        ({"conversion_unit": "layer", "conversion_order": [[0, 1]]}, r"must be a list of layer numbers, got \[\[0, 1\]\]"),
        ({"window_heads": [3]}, r"window_heads must hold pairs"),
    ],
)
def test_bad_configs_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        DSLAConfig(**{"conversion_unit": "head", **config})


def test_heads_that_the_base_lacks_are_refused(tiny_model):
    base = tiny_model("llama")
    for order, message in (([[0, 2]], "each KV head of this model is 0 to 1"), ([[4, 0]], "each layer of this model is 0 to 3")):
        with pytest.raises(ValueError, match=message):
            get_peft_model(base, DSLAConfig(conversion_unit="head", conversion_order=order))
    with pytest.raises(NotImplementedError, match="heads that keep a window alone are reserved"):
        get_peft_model(base, DSLAConfig(conversion_unit="head", conversion_order=[[0, 0]], window_heads=[[1, 0]]))
    with pytest.raises(ValueError, match=r"not \[0, 1\]"):
        HeadSplit((0, 1), 2, 2)


def test_converted_heads_need_the_base(head_model):
    config = DSLAConfig(conversion_unit="head", conversion_order=ORDER, level=3)
    with pytest.raises(ValueError, match="base_dimensions"):
        _ = config.converted_layers
    with pytest.raises(ValueError, match="number of KV heads of the base"):
        DSLAConfig.from_hybrid_dict(head_model(level=3).peft_config["default"].to_hybrid_dict())


@pytest.mark.parametrize(
    "level, expected",
    [(3, 3), ("3", 3), ("50%", 4), ("kept:0", 8), ("kept:3", 5), ("kept:25%", 6), ("kept:100%", 0), ("kept: 10 %", 7), ("kept:1%", 8)],
)
def test_levels_of_heads_as_users_write_them(head_model, level, expected):
    model = head_model()
    assert resolve_level(level, model.peft_config["default"], 4) == expected
    if not (isinstance(level, str) and level.isdigit()):
        model.set_level(level)
        assert model.get_level() == expected


def test_levels_that_no_plan_has_are_refused(head_model):
    model = head_model(conversion_order=ORDER[:5], level=2)
    config = model.peft_config["default"]
    for level, message in (
        ("kept:1", r"level kept:1, 7 of 8 heads, is above the plan; this plan has levels 0 to 5, .* up to 62.5%"),
        ("kept:9", r"level 'kept:9' keeps more KV heads than the 8 that the model has"),
        ("100%", r"level 100%, 8 of 8 heads, is above the plan"),
        ("kept:x", "level must be a whole number"),
        ("kept:104%", "share up to 100%"),
        (0.5, "level must be a whole number"),
        (6, "level 6 is above the plan"),
    ):
        with pytest.raises(ValueError, match=message):
            resolve_level(level, config, 4)
        with pytest.raises(ValueError, match="level"):
            model.set_level(level)
    assert model.get_level() == 2
    with pytest.raises(ValueError, match=r"level 'kept:10%' says which share of KV heads is kept.*a share of them such as '50%'"):
        parse_level("kept:10%", 8)


# --- what knows whole layers alone ------------------------------------------------------------------------------


def test_order_and_context_take_heads(head_model):
    model, ids = head_model(level=3), text()
    tuner = model.base_model
    with tuner.converted([(0, 1), (2, 0)]):
        assert model.peft_config["default"].converted_heads == [(0, 1), (2, 0)]
    tuner.set_conversion_order(ORDER[::-1], {tuple(unit): i / 10 for i, unit in enumerate(ORDER)})
    assert model.peft_config["default"].order_scores["2.0"] == 0.0 and full(model, ids).isfinite().all()
    with pytest.raises(ValueError, match="must hold the heads that have DSLA weights"):
        tuner.set_conversion_order(ORDER[:3])


def test_a_backward_pass_at_another_level_is_refused(head_model):
    model = head_model(level=2)
    loss = model(text(), use_cache=False).logits.sum()
    model.set_level(3)
    with pytest.raises(
        RuntimeError, match=r"layers \[0 \(heads 1\), 2 \(heads 0\)\] were DSLA, now \[0 \(heads 1\), 2 \(heads 0\), 3 \(heads 0\)\]"
    ):
        loss.backward()


def test_gradient_checkpointing_gives_the_same_gradients(head_model):
    model, ids, results = head_model(level=5), text(), []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, use_cache=False).logits.square().mean().backward()
        results.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(results[0]) == len(results[1]) > 10
    for found, expected in zip(results[1], results[0], strict=True):
        assert_close(found, expected, 1e-6)


def test_what_knows_whole_layers_alone_says_so(head_model):
    model = head_model(level=3)
    hybrid = copy.deepcopy(model).merge_and_unload()
    with pytest.raises(NotImplementedError, match="rank_layers ranks whole layers, and this plan converts heads"):
        rank_layers(model, [text(2, 200)])
    for whole in (model, hybrid):
        assert "levels count heads" in GraphDecoder(whole, record=lambda step, pool: None).obstacle()
        with pytest.raises(NotImplementedError, match=r"the server: layers converted in part .* use a plan of whole layers"):
            Levels(whole)
    with pytest.raises(NotImplementedError, match="tensor parallel"):
        type(hybrid).from_pretrained("nowhere", config=hybrid.config, tp_plan="auto")
