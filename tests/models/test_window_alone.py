"""Adapters and hybrids whose converted heads keep a window alone, without states."""

import json

import pytest
import torch
from head_layers import ORDER, assert_close, full, pieces, text
from peft import PeftModel
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from dsla_hf import DSLACacheLayer, DSLAConfig, cache_bytes
from dsla_hf.models.sizes import text_bytes


@pytest.fixture
def alone(head_model):
    """Factory of models without states; heads as units."""

    def make(kind="llama", level=3, **config):
        return head_model(kind, level=level, **{"states": False, "window_size": 8, "sink_tokens": 2, **config})

    return make


@pytest.mark.parametrize("level", [3, 8])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_every_cache_decodes_as_it_reads(alone, kind, level):
    model, ids = alone(kind, level), text(2, 44)
    expected, config = full(model, ids), model.get_base_model().config
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=50)):
        assert_close(pieces(model, ids, [17, 9, 1, 5, *[1] * 12], cache), expected)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    padded = full(model, ids, mask)
    assert_close(pieces(model, ids, [21, *[1] * 23], DynamicCache(config=config), mask)[mask.bool()], padded[mask.bool()])


def test_a_raise_in_mid_text_keeps_the_window(alone):
    """Nothing else of what was read is needed: sinks, and the last tokens where a ring has them."""
    model, ids = alone(level=0), text(2, 30)
    cache = DynamicCache(config=model.get_base_model().config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        before = [(layer.keys.transpose(1, 2), layer.values.transpose(1, 2)) for layer in cache.layers]
        model.set_level(8)
        assert model(text(2, 1), past_key_values=cache).logits.isfinite().all()
        for (keys, values), layer in zip(before, cache.layers, strict=True):
            assert isinstance(layer, DSLACacheLayer) and layer.state.recurrent.shape[2] == 0
            slots, places = [0, 1, *range(2, 8), 9], [0, 1, *range(24, 30), 23]  # the new token, number 30, lies in slot 8
            for window, cached in ((layer.state.window_k, keys), (layer.state.window_v, values)):
                assert torch.equal(window[:, slots], cached[:, places])


def test_files_say_so_and_load(alone, tiny_model, tmp_path):
    model, ids = alone(level=3), text()
    expected = full(model, ids)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["states"] is False
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapter")
    assert torch.equal(full(loaded.eval(), ids), expected)
    hybrid = model.merge_and_unload()
    hybrid.save_pretrained(tmp_path / "hybrid")
    hybrid, report = AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_close(full(hybrid.eval(), ids), expected, 1e-5)
    assert not any(name.endswith("gate_bias") for name, _ in hybrid.named_parameters())


def test_the_layer_is_the_base_where_the_text_fits_into_the_window(alone):
    """Own projections start as copies: an adapter without states begins as the model with a window."""
    model, ids = alone(level=8, window_size=64), text(2, 40)
    for module in model.modules():
        for name in ("dsla_q_proj", "dsla_o_proj"):
            if (own := getattr(module, name, None)) is not None:
                own["default"].weight.data.copy_(getattr(module.base_layer, name.removeprefix("dsla_")).weight)
    expected = full(model, ids)
    model.set_level(0)
    assert_close(expected, full(model, ids), 1e-5)


def test_bytes_are_those_of_the_window(alone):
    model = alone(level=8)
    base, config = model.get_base_model(), model.peft_config["default"]
    cache = DynamicCache(config=base.config)
    with torch.no_grad():
        model(text(1, 40), past_key_values=cache)
    windows = len(ORDER) * 2 * (8 + 2) * base.config.head_dim * 4
    assert cache_bytes(cache) == windows + 4 * 8, "a counter a layer"
    assert text_bytes(base, config, 40, 8) == text_bytes(base, config, 4000, 8) == windows + len(ORDER) * 8, "a counter a unit"


def test_gradients_reach_the_projections(alone):
    model = alone(level=8).train()
    model(text(), labels=text()).loss.backward()
    grads = [p.grad for name, p in model.named_parameters() if p.requires_grad]
    assert len(grads) == 8 and all(grad is not None and grad.any() for grad in grads)


def test_neither_window_nor_states_is_refused():
    with pytest.raises(ValueError, match="states=False leaves a window alone, and window_size=0 none"):
        DSLAConfig(window_size=0, states=False)
    with pytest.raises(ValueError, match="states must be True or False, got 'no'"):
        DSLAConfig(states="no")
