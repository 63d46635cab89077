"""`merge_and_unload` with the options that peft has for it; and hybrids of mixtures of experts."""

import pytest
import torch

from dsla_hf import DSLAConfig
from dsla_hf.models.hybrid import hybrid_classes

IDS = torch.randint(2, 97, (2, 30), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def two_adapters(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), conversion_order=[2, 0])
    model.add_adapter("b", DSLAConfig(conversion_order=[3, 1], window_size=0))
    return model.requires_grad_(False)


@pytest.mark.parametrize("names", [["b"], "b"])
def test_the_adapter_that_is_named_is_merged(two_adapters, names):
    two_adapters.set_adapter("b")
    expected = two_adapters(IDS).logits
    two_adapters.set_adapter("default")
    merged = two_adapters.merge_and_unload(adapter_names=names)
    assert merged.config.get_dsla_config().converted_layers == [3, 1]
    assert torch.equal(merged(IDS).logits, expected)


@pytest.mark.parametrize(
    "names, message", [(["default", "b"], "one DSLA adapter is active at a time"), (["c"], r"no adapters \['c'\], only \['b', 'default'\]")]
)
def test_adapters_that_cannot_be_merged_are_refused_and_nothing_changes(two_adapters, names, message):
    expected = two_adapters(IDS).logits
    with pytest.raises(ValueError, match=message):
        two_adapters.merge_and_unload(adapter_names=names)
    assert torch.equal(two_adapters(IDS).logits, expected)


def test_a_merge_refused_for_another_reason_leaves_the_active_adapter(two_adapters):
    expected = two_adapters(IDS).logits
    two_adapters.get_base_model().hf_quantizer = object()
    with pytest.raises(ValueError, match="the base is quantised"):
        two_adapters.merge_and_unload(adapter_names=["b"])
    assert two_adapters.active_adapters == ["default"] and torch.equal(two_adapters(IDS).logits, expected)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", ["dsla_q_proj.default.weight", "dsla_core.default.norm_weight"])
def test_safe_merge_refuses_broken_weights_and_nothing_changes(tiny_model, adapter_model, broken, weight):
    model = adapter_model(tiny_model("llama"), level=2).requires_grad_(False)  # layers 2 and 0
    parameters = dict(model.named_parameters())
    name = next(name for name in parameters if name.endswith(f"layers.0.self_attn.{weight}"))
    parameters[name].view(-1)[0] = broken
    before = {name: p.clone() for name, p in parameters.items()}
    with pytest.raises(ValueError, match=r"The adapter default seems to be broken \(layer 0\)"):
        model.merge_and_unload(safe_merge=True)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and all(torch.equal(after[n].nan_to_num(), p.nan_to_num()) for n, p in before.items())
    model.set_level(1)  # layer 0 is not merged, so it may be broken
    assert model.merge_and_unload(safe_merge=True)(IDS).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_hybrids_compute_experts_as_their_base_does(tiny_model, adapter_model, kind, tmp_path):
    """Whether a class can, transformers reads from the source of its module."""
    hybrid_class = hybrid_classes(kind)[1]
    assert hybrid_class._can_set_experts_implementation() and not hybrid_classes("llama")[1]._can_set_experts_implementation()
    base = tiny_model(kind)
    expected = base.config._experts_implementation
    adapter_model(base, level=2).merge_and_unload().save_pretrained(tmp_path)
    loaded = hybrid_class.from_pretrained(tmp_path)
    assert loaded.config._experts_implementation == expected
    with torch.no_grad():
        logits = loaded.eval()(IDS).logits
        loaded.set_experts_implementation("eager")
        torch.testing.assert_close(loaded(IDS).logits, logits, atol=1e-4, rtol=0)
