"""Weights of layers converted in part in one buffer: rows and columns of every level, where they lie, and when they do not."""

import itertools

import pytest
import torch
from head_layers import assert_close, full, text
from transformers import DynamicCache, StaticCache

from dsla_hf.core.heads import of_heads
from dsla_hf.models.adapter import dsla_layers

FOUR = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2, "attention_bias": True}
ORDER = [[1, 2], [1, 0], [1, 3], [0, 1]]


@pytest.fixture
def model(head_model):
    return head_model(base=FOUR, conversion_order=ORDER, level=1).requires_grad_(False)


def test_every_level_is_a_view_of_the_same_rows_and_columns(model):
    """Bit for bit those that are composed of both, in the order of conversion: kept heads first."""
    layer, places = dsla_layers(model)[1], []
    for level, (converted, kept) in enumerate([((2,), (0, 3, 1)), ((2, 0), (3, 1)), ((2, 0, 3), (1,))], 1):
        model.set_level(level)
        view, composed = layer.dsla_attention(layer.converted_part), layer.dsla_attention(layer.converted_part, in_order=False)
        assert view.ordered and not composed.ordered and (view.split.converted, view.split.kept) == (converted, kept)
        queries = torch.tensor([2 * head + i for head in (*kept, *converted) for i in range(2)])
        channels = (queries[:, None] * 8 + torch.arange(8)).flatten()
        (weight, bias), (o_weight, o_bias) = composed.q_proj.weights(), composed.o_proj.weights()
        assert torch.equal(view.q_proj.weight, weight[channels]) and torch.equal(view.q_proj.bias, bias[channels])
        assert torch.equal(view.o_proj.weight, o_weight[:, channels]) and torch.equal(view.o_proj.bias, o_bias)
        expected = of_heads(layer.dsla_core["default"], converted)
        for name, x in view.converted_core().named_parameters():
            assert torch.equal(x, dict(expected.named_parameters())[name]), name
        assert view.converted_core().num_kv_heads == level and view.converted_core().num_heads == 2 * level
        places.append([x.data_ptr() for x in (view.q_proj.weight, view.o_proj.weight, view.converted_core().mix_logits)])
    head = 2 * 8 * 4  # bytes of a column, or of an entry of a row, of one KV head
    for (q, o, core), (q_next, o_next, core_next) in itertools.pairwise(places):
        assert q_next - q == head * 32 and o_next - o == head and core_next == core


def test_outputs_are_those_of_composed_weights(model):
    ids = text()
    for level in (1, 2, 3):
        model.set_level(level)
        layer = dsla_layers(model)[1]
        ordered = full(model, ids)
        assert layer._ordered is not None
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(layer), "_ordered_view", lambda *args: None)
            assert_close(full(model, ids), ordered, 1e-5)


def test_the_same_heads_are_the_same_module_until_something_is_replaced(model):
    layer = dsla_layers(model)[1]
    first = layer.dsla_attention((2,))
    second = layer.dsla_attention((0, 2))
    place = first.q_proj.weight.data_ptr()
    with torch.no_grad():
        layer.dsla_q_proj["default"].weight.mul_(2)
    assert layer.dsla_attention((2,)) is first and layer.dsla_attention((0, 2)) is second
    assert first.q_proj.weight.data_ptr() == place, "written anew where it lies"
    assert torch.equal(first.q_proj.weight[-16:], layer.dsla_q_proj["default"].weight[32:48])
    layer.base_layer.q_proj = torch.nn.Linear(32, 64).requires_grad_(False)
    assert layer.dsla_attention((2,)) is not first
    model.double()
    assert layer.dsla_attention((2,)).q_proj.weight.dtype == torch.float64
    assert full(model, text()).dtype == torch.float64


def test_what_is_trained_or_is_not_the_first_of_the_plan_is_composed(model):
    layer = dsla_layers(model)[1]
    assert not layer.dsla_attention((0,)).ordered, "head 2 comes first"
    assert layer.dsla_attention((2,)).ordered
    layer.requires_grad_(True)
    assert not layer.dsla_attention((2,)).ordered and layer._ordered is None, "a gradient is asked for"
    with torch.no_grad():
        assert layer.dsla_attention((2,)).ordered


def test_training_gives_the_memory_back_at_any_level(model):
    full(model, text())
    layer = dsla_layers(model)[1]
    assert layer._ordered is not None
    model.set_level(0)
    full(model, text())
    assert layer._ordered is not None, "for the next text"
    model.train()
    model(text(), use_cache=False)
    assert layer._ordered is None


def test_a_norm_over_all_queries_follows(head_model):
    model = head_model("olmo2", base={"num_key_value_heads": 4, "num_hidden_layers": 2}, conversion_order=ORDER, level=2)
    layer = dsla_layers(model)[1]
    with torch.no_grad():
        layer.base_layer.q_norm.weight.uniform_(0.5, 2)
        ids = text()
        ordered = full(model, ids)
        view = layer.dsla_attention((0, 2))
        assert view.ordered and torch.equal(view.q_norm.weight.view(4, -1), layer.base_layer.q_norm.weight.view(4, -1)[[3, 1, 2, 0]])
        layer.base_layer.q_norm.weight.mul_(2)
        assert torch.equal(view.q_norm.weight, layer.dsla_attention((0, 2)).q_norm.weight)
        layer.base_layer.q_norm.weight.div_(2)
    assert_close(model(ids, use_cache=False).logits.detach(), ordered, 1e-5)  # composed


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda layer: layer.base_layer.q_proj.register_forward_hook(lambda *args: None), "q_proj cannot be read"),
        (lambda layer: layer.base_layer.o_proj.to("meta"), "o_proj cannot be read"),
    ],
)
def test_why_weights_do_not_lie_in_order(model, change, words):
    layer = dsla_layers(model)[1]
    assert layer.cannot_be_ordered() is None
    change(layer)
    assert words in layer.cannot_be_ordered()
    assert not layer.dsla_attention((2,)).ordered


def test_another_order_of_conversion_in_mid_text(head_model):
    """The cache of a layer in part is put in the new order, and nothing is folded."""
    model = head_model(base=FOUR, conversion_order=[*ORDER, [0, 0]], level=2).requires_grad_(False)
    ids = text(2, 40)
    expected = full(model, ids)
    for cache in (DynamicCache(), StaticCache(config=model.get_base_model().config, max_cache_len=50)):
        model.base_model.set_conversion_order([*ORDER, [0, 0]])
        with torch.no_grad():
            model(ids[:, :30], past_key_values=cache)
            assert cache.layers[1].heads == (2, 0)
            model.base_model.set_conversion_order([[1, 0], [1, 2], [1, 3], [0, 1], [0, 0]])
            found = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 40)]
        assert cache.layers[1].heads == (0, 2) and cache.layers[1].kept == (3, 1)
        assert_close(torch.cat(found, 1), expected[:, 30:])
