"""Layers converted in part: what they compute and how they are trained, which levels there are, and what refuses them."""

import copy

import pytest
import torch
import torch.nn.functional as F
from accelerate import cpu_offload
from head_layers import ORDER, assert_close, full, kinds, pieces, text
from peft import get_peft_model
from tiny import ARCHITECTURE_OPTIONS
from transformers import DynamicCache
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama

from dsla_hf import DSLAConfig, DSLATrainingArguments, distill
from dsla_hf.core.heads import HeadSplit
from dsla_hf.levels.reading import parse_level
from dsla_hf.models.adapter import dsla_layers
from dsla_hf.models.configuration import resolve_level
from dsla_hf.models.loading import check_whole_layers, load_config
from dsla_hf.models.mixed_projections import MixedColumns, MixedRows
from dsla_hf.training.ranking import rank_layers

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


def mixture(model, hidden, embeddings, heads, trained_keys):
    """The attention output of a wrapped Llama or Qwen3 layer, head by head in plain PyTorch: rows and columns of the base for kept KV
    heads, the adapter's for the others."""
    base, name = model.base_layer, model.adapter_name
    core, own_q, own_o = model.dsla_core[name], model.dsla_q_proj[name], model.dsla_o_proj[name]
    own_k, own_v = (getattr(model, f"dsla_{x}_proj")[name] if trained_keys else getattr(base, f"{x}_proj") for x in "kv")
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
    k_own, v_own = rotated(heads_of(own_k(hidden), k_norm)), heads_of(own_v(hidden), None)
    converted = core(q_own, k_own, v_own)[0]  # the whole layer: heads know nothing of one another
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
@pytest.mark.parametrize("trained_keys", [False, True], ids=["q-o", "q-k-v-o"])
def test_a_layer_in_part_is_the_mixture_of_its_heads(head_model, base_kind, kv_heads, heads, trained_keys):
    sizes = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "attention_bias": True, "num_hidden_layers": 2}
    trained = ["q_proj", "o_proj", *(["k_proj", "v_proj"] if trained_keys else [])]
    model = head_model(base_kind, base=sizes, conversion_order=[[1, head] for head in heads], trained_projections=trained)
    layer = dsla_layers(model)[1]
    with torch.no_grad():
        layer.base_layer.o_proj.bias.normal_()
    found = {}
    layer.register_forward_hook(lambda module, args, kwargs, out: found.update(kwargs, out=out[0]), with_kwargs=True)
    logits = full(model, text())
    expected = mixture(layer, found["hidden_states"], found["position_embeddings"], heads, trained_keys)
    assert layer.converted_part == heads and logits.isfinite().all()
    assert_close(found["out"], expected, 1e-5)


def heads_before_output(attention, **inputs):
    """What an attention hands to its output projection `[B, T, Hq, D]`."""
    found = []
    handle = attention.o_proj.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    with torch.no_grad():
        attention(**inputs)
    handle.remove()
    return found[0].unflatten(-1, (-1, attention.head_dim))


@pytest.mark.parametrize("kind", ARCHITECTURE_OPTIONS)
def test_each_head_is_that_of_the_base_or_that_of_the_whole_layer(head_model, kind):
    """In layers that slide and layers that do not, over the input that the layer has at this level."""
    order = [[0, 1], [1, 0]]
    model, ids, inputs = head_model(kind, conversion_order=order), text(), {}
    for index in (0, 1):
        layer = dsla_layers(model)[index]
        if kind == "olmo2":  # whose query norm goes over all heads: with the base's rows they are asked alike
            layer.dsla_q_proj["default"].load_state_dict(layer.base_layer.q_proj.state_dict())
        hook = layer.register_forward_hook(lambda module, args, kwargs, out: inputs.update(kwargs), with_kwargs=True)
        full(model, ids)
        hook.remove()
        found = heads_before_output(layer.dsla_attention(layer.converted_part), **inputs)
        whole = heads_before_output(layer.dsla_attention(), **inputs)
        base = heads_before_output(layer.base_layer, **{name: x for name, x in inputs.items() if name != "dsla_layout"})
        converted = [2, 3] if index == 0 else [0, 1]  # query heads
        kept = [0, 1] if index == 0 else [2, 3]
        assert_close(found[:, :, converted], whole[:, :, converted], 1e-5)
        assert_close(found[:, :, kept], base[:, :, kept], 1e-5)
        assert (whole - base).abs().max() > 1e-3


def test_sink_logits_reach_their_heads(head_model, monkeypatch):
    """As an argument, which flash and flex attention read, and as an attribute, which eager attention does."""
    model, calls = head_model("gpt_oss", conversion_order=[[1, 0]]), []
    original = modeling_gpt_oss.eager_attention_forward

    def watched(module, *args, s_aux, **kwargs):
        calls.append((module.layer_idx, s_aux, module.sinks))
        return original(module, *args, **kwargs)

    monkeypatch.setattr(modeling_gpt_oss, "eager_attention_forward", watched)
    model.get_base_model().set_attn_implementation("eager")
    full(model, text())
    expected = dsla_layers(model)[1].base_layer.sinks[2:]
    found = next((argument, attribute) for index, argument, attribute in calls if index == 1)
    assert torch.equal(found[0], expected) and torch.equal(found[1], expected) and expected.abs().min() > 0


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
    view = layer.dsla_attention(layer.converted_part, in_order=False)
    assert isinstance(view.q_proj, MixedRows) and isinstance(view.o_proj, MixedColumns)
    weights = [x.weights()[0] for x in (view.q_proj, view.o_proj)]
    assert all(x.weights()[0] is kept for x, kept in zip((view.q_proj, view.o_proj), weights, strict=True)), "composed once"
    for part in (layer.dsla_q_proj, layer.dsla_o_proj, layer.dsla_core):
        with torch.no_grad():
            parameter = next(part["default"].parameters())
            parameter.mul_(1.5)
        after = full(model, ids)
        assert (after - before).abs().max() > 1e-4
        before = after
    assert not torch.equal(view.q_proj.weights()[0], weights[0]) and not torch.equal(view.o_proj.weights()[0], weights[1])
    fresh = head_model(level=3)
    fresh.load_state_dict(model.state_dict())
    assert_close(full(fresh, ids), before, 1e-6)


def test_a_pass_without_gradients_leaves_nothing_that_training_cannot_use(head_model):
    model, ids = head_model(level=3), text()
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits  # the first pass: all that is kept is made within it
    model.requires_grad_(False)
    with torch.inference_mode():
        model(ids)
    model.get_base_model().get_input_embeddings().requires_grad_(True)
    for trained in (False, True):
        model.requires_grad_(trained)
        model.get_base_model().get_input_embeddings().requires_grad_(True)
        logits = model(ids, use_cache=False).logits
        logits.sum().backward()
        assert_close(logits.detach(), expected.clone(), 1e-5)  # outputs are summed in another order where they are trained


def test_a_base_whose_weights_cannot_be_read_computes_by_itself(head_model):
    quantization = pytest.importorskip("torchao.quantization")
    model, ids = head_model(level=3).requires_grad_(False), text()
    expected = full(model, ids)
    offloaded = copy.deepcopy(model)
    cpu_offload(offloaded.get_base_model(), execution_device=torch.device("cpu"))
    assert all(p.is_meta for p in offloaded.parameters())
    assert_close(full(offloaded, ids), expected)
    base = {layer.base_layer for layer in dsla_layers(model).values()}
    linear = {module for attention in base for module in attention.children() if isinstance(module, torch.nn.Linear)}
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, name: module in linear)
    found = full(model, ids)
    assert 0 < (found - expected).norm() / expected.norm() < 0.05
    assert_close(pieces(model, ids, [20, *[1] * 20], DynamicCache()), found)
    layer = dsla_layers(model)[2]
    assert not layer.dsla_attention(layer.converted_part).q_proj._readable()


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
    model.set_level("25%")
    assert model.get_level() == 1
    with pytest.raises(ValueError, match=r"level 'kept:25%' says which share of KV heads is kept, and this plan converts whole layers"):
        model.set_level("kept:25%")


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
        (
            {"conversion_unit": "layer", "conversion_order": [[0, 1]]},
            r"must be a list of layer numbers, got \[\[0, 1\]\]; pairs .* conversion_unit='head'",
        ),
        ({"conversion_unit": "layer", "conversion_order": [3, [0, 1]]}, r"got \[3, \[0, 1\]\]; pairs"),
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
    with pytest.raises(NotImplementedError, match="tensor parallel"):
        type(hybrid).from_pretrained("nowhere", config=hybrid.config, tp_plan="auto")


def test_commands_that_know_whole_layers_alone_say_so_before_they_load(head_model, tmp_path):
    model = head_model(level=3)
    model.save_pretrained(tmp_path / "adapter")
    model.get_base_model().config.save_pretrained(tmp_path / "base")
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    for folder, adapter in (("base", tmp_path / "adapter"), ("hybrid", None)):
        config = load_config(str(tmp_path / folder))
        with pytest.raises(ValueError, match=r"dsla order: layers converted in part .* use a plan of whole layers"):
            check_whole_layers("dsla order", config, adapter and str(adapter))
    check_whole_layers("dsla order", load_config(str(tmp_path / "base")), None)


def test_a_plan_of_heads_is_distilled_at_random_levels(head_model, tmp_path):
    model = head_model(window_size=2, sink_tokens=0)
    data = [{"input_ids": text(1, 64)[0]} for _ in range(8)]
    args = DSLATrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=2, report_to=[])
    with pytest.raises(ValueError, match="one whole layer after the other, and this plan counts heads"):
        distill(model, data, args, alignment_steps=1, logits_steps=8, method="chain")
    before = {name: p.clone() for name, p in model.named_parameters() if "dsla_q_proj" in name}
    distill(model, data, args, alignment_steps=1, logits_steps=4)
    assert before and all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    assert model.get_level() == 8
