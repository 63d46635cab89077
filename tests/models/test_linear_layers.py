"""Bases some of whose layers, or parts of layers, are linear already: their softmax attention alone is converted, and what else they
remember stays theirs."""

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model_of
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.cache_utils import LinearAttentionLayer

from dsla_hf import DSLAConfig, cache_bytes
from dsla_hf.core.beside_linear import DSLABesideLinearLayer, PartialBesideLinearLayer
from dsla_hf.core.cache import DSLACacheLayer
from dsla_hf.inference.graph import GraphDecoder
from dsla_hf.inference.recorder import PlainRecording
from dsla_hf.models.adapter import dsla_layers
from dsla_hf.models.architectures import convertible_layers, has_linear_layers, query_rows
from dsla_hf.models.decoder import attentions_of, decoder_layers
from dsla_hf.models.layout_carrier import MaskWithLayout
from dsla_hf.models.trial.checks import HEADS, apart, generated, layer_order, pieces, text
from dsla_hf.serving.engine.levels import Levels

ALTERNATING = ("qwen3_next", "qwen3_5_text", "lfm2", "granitemoehybrid", "nemotron_h")
ALL = (*ALTERNATING, "falcon_h1")


@pytest.fixture(params=ALL)
def kind(request):
    return request.param


@pytest.fixture
def falcon():
    return tiny_model_of("falcon_h1", uneven=True).requires_grad_(False)


def converted(adapter_model, base, **config):
    return adapter_model(base, **{"conversion_order": layer_order(base), **config}).requires_grad_(False)


def linear_states(layer):
    """Copies of all tensors of the linear part of a cache layer."""
    return [x.clone() for states in (layer.conv_states, layer.recurrent_states) for x in states.values() if x is not None]


# --- what is converted ------------------------------------------------------------------------------------------


def test_the_plan_holds_the_layers_with_softmax_attention(kind):
    base = tiny_model_of(kind)
    layers = [i for i, attention in enumerate(attentions_of(base)) if hasattr(attention, "head_dim")]
    assert convertible_layers(base.config) == layers and has_linear_layers(base.config)
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["default"].conversion_order == layers and sorted(dsla_layers(model)) == layers


@pytest.mark.parametrize("kind", ALTERNATING)
def test_a_linear_layer_in_the_plan_is_refused_by_number(kind):
    base = tiny_model_of(kind)
    with pytest.raises(
        ValueError, match=r"names layers \[0\], which are no attention that DSLA could replace \((conv|linear_attention)\); those"
    ):
        get_peft_model(base, DSLAConfig(conversion_order=[0, layer_order(base)[0]]))


def test_shares_count_the_layers_with_softmax_attention():
    model = get_peft_model(tiny_model_of("lfm2"), DSLAConfig(task_type="CAUSAL_LM"))
    model.set_level("50%")
    assert model.get_level() == 2  # of 4, beside 2 convolutions
    assert model.base_model.level_sizes()["num_layers"] == 4
    with pytest.raises(ValueError, match=r"shares of up to 100\.0%|shares of up to 100%"):
        model.set_level("130%")


@pytest.mark.parametrize("kind, rows", [("qwen3_next", 24), ("qwen3_5_text", 16), ("falcon_h1", 8)])
def test_rows_of_a_query_head(kind, rows):
    base = tiny_model_of(kind)
    assert query_rows(attentions_of(base)[layer_order(base)[0]]) == rows


def test_the_attention_of_nemotron_h_has_another_name():
    model = get_peft_model(tiny_model_of("nemotron_h"), DSLAConfig(task_type="CAUSAL_LM"))
    assert model.peft_config["default"].target_modules == ["mixer"]
    assert model.peft_config["default"].base_dimensions["convertible_layers"] == [1, 3, 5, 6]


# --- caches -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ALTERNATING)
def test_cache_layers_of_linear_layers_stay_as_they_are(kind, adapter_model):
    model, ids = converted(adapter_model, tiny_model_of(kind), level=0), text()
    cache = DynamicCache(config=model.config)
    before, plan = list(cache.layers), layer_order(model.get_base_model())
    for level, part in zip((0, 2, 4), (ids[:, :20], ids[:, 20:21], ids[:, 21:]), strict=True):
        model.set_level(level)
        model(part, past_key_values=cache)
        changed = {i for i, (old, new) in enumerate(zip(before, cache.layers, strict=True)) if old is not new}
        assert changed == set(plan[:level])
    assert all(isinstance(cache.layers[i], DSLACacheLayer) for i in plan)
    assert any(type(layer) is LinearAttentionLayer for layer in cache.layers)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_layer_with_both_hands_its_linear_part_on(static, adapter_model, falcon):
    """At a raise, from level 0 over a part of the layer to all of it; bit for bit, and with the text that follows."""
    model, ids = adapter_model(falcon, conversion_unit="head", conversion_order=HEADS, level=0).requires_grad_(False), text()
    cache = StaticCache(config=model.config, max_cache_len=48) if static else DynamicCache(config=model.config)
    first = HEADS[0][0]
    for level, kept in ((0, None), (1, PartialBesideLinearLayer), (7, DSLACacheLayer)):
        states = [] if level == 0 else linear_states(cache.layers[first])
        model.set_level(level)
        seen = []
        hook = falcon.model.layers[first].self_attn.register_forward_hook(
            lambda *_, seen=seen: seen.append(linear_states(cache.layers[first]))
        )
        here = falcon.model.layers[first].mamba.register_forward_hook(
            lambda *_, states=states: states.__setitem__(slice(None), linear_states(cache.layers[first]))
        )
        model(ids[:, level : level + 1] if level else ids[:, :20], past_key_values=cache)
        hook.remove()
        here.remove()
        assert states and all(torch.equal(x, y) for x, y in zip(states, seen[0], strict=True)), level
        assert kept is None or isinstance(cache.layers[first], kept)
        assert cache.has_previous_state(first) and cache.get_seq_length(first) == cache.get_seq_length()


@torch.no_grad()
def test_rows_of_both_parts_are_reordered_and_cut_together(adapter_model, falcon):
    model, ids = converted(adapter_model, falcon), text(3, 20)
    rows = torch.tensor([2, 0, 0])

    def go_on(change, ids, fresh):
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        assert all(type(layer) is DSLABesideLinearLayer for layer in cache.layers)
        change(cache)
        return model(fresh, past_key_values=cache).logits[:, -1]

    for change, picked in (
        (lambda cache: cache.reorder_cache(rows), rows),
        (lambda cache: cache.batch_select_indices(rows), rows),
        (lambda cache: cache.batch_repeat_interleave(2), torch.arange(3).repeat_interleave(2)),
    ):
        fresh = torch.arange(5, 5 + len(picked))[:, None]
        expected = model(torch.cat([ids[picked], fresh], 1)).logits[:, -1]
        assert apart(go_on(change, ids, fresh), expected) < 1e-5


@torch.no_grad()
def test_a_static_cache_is_used_again(adapter_model, kind):
    model = converted(adapter_model, tiny_model_of(kind), level=3)
    cache = StaticCache(config=model.config, max_cache_len=48)
    first, second = text(), text()
    pieces(model, first, cache)
    cache.reset()
    assert apart(pieces(model, second, cache), model(second, use_cache=False).logits) < 1e-4


@torch.no_grad()
def test_a_static_cache_that_is_too_short_is_refused(adapter_model, falcon):
    model = converted(adapter_model, falcon, level=3)
    with pytest.raises(ValueError, match="room for 16 tokens; 0 are there, and 20 come"):
        model(text(1, 20), past_key_values=StaticCache(config=model.config, max_cache_len=16))


@torch.no_grad()
def test_bytes_of_linear_layers_count_and_are_constant(adapter_model, kind):
    model = converted(adapter_model, tiny_model_of(kind))
    sizes = []
    for tokens in (20, 60):
        cache = DynamicCache(config=model.config)
        model(text(1, tokens), past_key_values=cache)
        sizes.append(cache_bytes(cache))
        own = sum(x.numel() * x.element_size() for layer in cache.layers if hasattr(layer, "conv_states") for x in linear_states(layer))
        assert 0 < own < sizes[-1]
    assert sizes[0] == sizes[1]


@torch.no_grad()
def test_what_cannot_be_taken_back_is_refused(adapter_model, kind):
    model = converted(adapter_model, tiny_model_of(kind), level=2)
    with pytest.raises(ValueError, match="draft_level=4: this base has linear layers, which cannot take guesses back"):
        generated(model, text(1, 20), draft_level=4)
    if kind == "lfm2":  # convolutions alone, which can
        return
    cache = DynamicCache(config=model.config)
    model(text(1, 20), past_key_values=cache)
    with pytest.raises(NotImplementedError, match="linear layers of this base cannot forget tokens"):
        cache.crop(-2)


# --- calls ------------------------------------------------------------------------------------------------------


def test_linear_layers_get_no_arguments_of_ours(adapter_model, kind):
    """Their kernels take what they know."""
    model = converted(adapter_model, tiny_model_of(kind))
    base = model.get_base_model()
    seen = {True: 0, False: 0}

    def look(module, args, kwargs):
        ours = hasattr(module, "converted_part")
        assert ours or "dsla_layout" not in kwargs
        assert ours or not isinstance(kwargs.get("attention_mask"), MaskWithLayout)
        seen[ours] += 1

    for layer in decoder_layers(base):
        for child in layer.children():
            child.register_forward_pre_hook(look, with_kwargs=True)
    mask = torch.ones(2, 40, dtype=torch.long)
    mask[0, :5] = 0
    model(text(), attention_mask=mask)
    assert all(seen.values())


def test_checkpointed_layers_get_the_layout_of_their_own_forward(adapter_model):
    """Another call between forward and backward changes nothing."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = adapter_model(tiny_model_of("lfm2"), conversion_order=[4, 1]).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        mask = torch.ones(2, 40, dtype=torch.long)
        mask[0, :9] = 0
        torch.manual_seed(1)
        loss = model(text(), attention_mask=mask).logits[:, 9:].square().mean()
        with torch.no_grad():
            model(text(1, 7))
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@torch.no_grad()
def test_an_adapter_taken_off_leaves_no_hooks(adapter_model, kind):
    base, ids = tiny_model_of(kind), text()
    expected = base(ids).logits
    base = converted(adapter_model, base).unload()
    assert torch.equal(base(ids).logits, expected)
    assert not any(module._forward_pre_hooks for module in base.modules())


# --- files and servers ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_hybrid_is_loaded_with_what_its_base_computes_at_the_start(adapter_model, kind, tmp_path):
    """Falcon-H1 has multipliers that no file holds; Granite and Nemotron name the kinds of their layers in the config."""
    model, ids = converted(adapter_model, tiny_model_of(kind, uneven=True), level=3), text()
    hybrid = model.merge_and_unload()
    expected = hybrid(ids).logits
    hybrid.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(ids).logits, expected)
    assert torch.equal(generated(loaded, ids), generated(hybrid, ids))


def test_a_card_draws_linear_layers_apart(adapter_model, tmp_path):
    """Of six layers the first and the fourth are convolutions."""
    model = adapter_model(tiny_model_of("lfm2"), conversion_unit="head", conversion_order=[[2, 0], [5, 1]], level=2)
    picture = "```text\nlayer      0\nKV head 0  -#.-##\nKV head 1  -##-#.\n```"
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    for folder in ("adapter", "hybrid"):
        card = (tmp_path / folder / "README.md").read_text()
        assert picture in card and "(`.`); `-` are layers without attention that could be converted:" in card


def test_servers_say_that_they_do_not_know_linear_states(adapter_model, kind):
    model = converted(adapter_model, tiny_model_of(kind))
    with pytest.raises(ValueError, match=f"'{kind}' has layers that are linear already, whose states the server does not keep"):
        Levels(model)
    assert GraphDecoder(model, record=PlainRecording).obstacle() is None
    with pytest.raises(ValueError, match="whose states the server does not keep"):
        Levels(model.merge_and_unload())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lfm2", "falcon_h1", "nemotron_h", "stablelm", "gemma4_text"])
def test_compiled_calls_get_their_layout_too(kind, adapter_model):
    """Through hooks of decoder layers, in code that is traced."""
    model, ids = converted(adapter_model, tiny_model_of(kind), level=3), text()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    expected = model(ids, attention_mask=mask, use_cache=False).logits[:, 7:]
    torch._dynamo.reset()
    compiled = torch.compile(model.get_base_model(), backend="eager")
    found = compiled(ids, attention_mask=mask, use_cache=False).logits[:, 7:]
    assert apart(found, expected) < 1e-6
    alone = model(ids[:1, 7:], use_cache=False).logits
    assert apart(found[:1], alone) < 1e-4
