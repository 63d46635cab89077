"""Every supported type with all unusual settings at once that its config admits: YaRN, heads wider than the hidden states, biases, and
embeddings tied where its small model has them untied, or the other way round; partial rotary embeddings and short sliding windows stay."""

import pytest
import torch
from peft import get_peft_model
from tiny import IN_DEPTH, WITHOUT_HEAD_DIM, YARN, tiny_config, tiny_model_of
from transformers import DynamicCache

from dsla_hf import DSLAConfig
from dsla_hf.models.architectures import SUPPORTED_BASES
from dsla_hf.models.trial.checks import apart, layer_order, text

BIASES = ("attention_bias", "use_bias", "use_qkv_bias", "attention_out_bias", "mlp_bias", "qkv_bias")

# What configs have, and models of transformers do not run with.
NOT_ADMITTED = {
    "gemma4_text": "rope_parameters",
    "helium": "head_dim",
    "olmoe": "head_dim",
    "phi3": "rope_parameters",
    "phimoe": "rope_parameters",
    "stablelm": "head_dim",
}


def unusual(kind):
    """Options of the config of a small model."""
    values = tiny_config(kind).to_dict()
    options = {name: True for name in BIASES if values.get(name) is False}
    options["tie_word_embeddings"] = not values["tie_word_embeddings"]
    if values.get("head_dim") is not None and kind not in WITHOUT_HEAD_DIM:
        options["head_dim"] = 12
    rope = values.get("rope_parameters") or {}
    if "full_attention" in rope:
        options["rope_parameters"] = {**rope, "full_attention": {**rope["full_attention"], **YARN}}
    elif rope.get("rope_type") == "default":
        options["rope_parameters"] = {**rope, **YARN}
    return options


@torch.no_grad()
@pytest.mark.parametrize("kind", [kind if kind in IN_DEPTH else pytest.param(kind, marks=pytest.mark.slow) for kind in SUPPORTED_BASES])
def test_all_at_once(adapter_model, kind):
    """The base at level 0 and inside the window, decoded as read, and merged."""
    options = {name: value for name, value in unusual(kind).items() if name != NOT_ADMITTED.get(kind)}
    base, ids = tiny_model_of(kind, uneven=True, **options), text()
    assert all(getattr(base.config, name) == value for name, value in options.items() if name != "rope_parameters")
    order = layer_order(base)
    expected, short = base(ids).logits, base(ids[:, :12]).logits
    fresh = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", conversion_order=order, window_size=16)).eval()
    assert apart(fresh(ids[:, :12]).logits, short) < 1e-4
    model = adapter_model(fresh.unload(), level=3, conversion_order=order)
    found = model(ids, use_cache=False).logits
    assert apart(found, expected) > 1e-3, "the adapter does nothing"
    cache = DynamicCache(config=model.config)
    steps = [model(part, past_key_values=cache).logits for part in ids.split([33, 1, 1, 1, 1, 1, 1, 1], 1)]
    assert apart(torch.cat(steps, 1), found) < 2e-4
    model.set_level(0)
    assert torch.equal(model(ids).logits, expected)
    model.set_level(3)
    assert torch.equal(model.merge_and_unload()(ids, use_cache=False).logits, found)


@torch.no_grad()
@pytest.mark.parametrize("kind, name", NOT_ADMITTED.items())
def test_what_is_left_out_the_base_itself_does_not_run_with(kind, name):
    with pytest.raises(Exception, match=r"size of tensor|cannot be multiplied|rope_parameters"):
        tiny_model_of(kind, **{name: unusual(kind)[name]})(text())
