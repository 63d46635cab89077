"""What is recognised in each architecture, and what is told apart though it looks alike."""

import pytest
import torch
import torch.nn.functional as F
from tiny import ARCHITECTURE_OPTIONS
from torch import nn

from dsla_hf.inference import parts
from dsla_hf.inference.parts import GatedMLP, Layer, fused_parts, parts_of, summary
from dsla_hf.models.decoder import decoder_layers

LLAMA = Layer("input_layernorm", None, "post_attention_layernorm", None)
GEMMA = Layer("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
SILU, GELU = GatedMLP("silu", False), GatedMLP("gelu_tanh", False)
# Norms of the tiny models (4 layers), the form of their layers and of their MLPs (None: experts).
EXPECTED = {
    "llama": (9, LLAMA, SILU),
    "mistral": (9, LLAMA, SILU),
    "mixtral": (9, LLAMA, None),
    "qwen2": (9, LLAMA, SILU),
    "qwen3": (17, LLAMA, SILU),
    "qwen3_moe": (17, LLAMA, None),
    "gemma2": (17, GEMMA, GELU),
    "gemma3_text": (25, GEMMA, GELU),
    "phi3": (9, LLAMA, GatedMLP("silu", True)),
    "olmo2": (17, Layer(None, "post_attention_layernorm", None, "post_feedforward_layernorm"), SILU),
    "smollm3": (9, LLAMA, SILU),
    "granite": (9, LLAMA._replace(scale=0.9), SILU),
    "cohere2": (5, Layer("input_layernorm", None, None, None, parallel=True), SILU),
    "gpt_oss": (9, LLAMA._replace(tuple_of_mlp=True), None),
}


@pytest.mark.parametrize("kind", ARCHITECTURE_OPTIONS)
def test_what_is_recognised(tiny_model, kind):
    """In the transformers that is installed: where it writes a module in another way that computes something else, steps take longer."""
    norms, layer, mlp = EXPECTED[kind]
    model = tiny_model(kind)
    found = parts_of(model)
    layers = decoder_layers(model)
    assert found.layers == dict.fromkeys(layers, layer)
    assert found.gated == ({} if mlp is None else {x.mlp: mlp for x in layers})
    gated = 0 if mlp is None else 4
    assert fused_parts(model) == {"norms": (norms, norms), "rotations": (4, 4), "gated MLPs": (gated, 4), "layers": (4, 4)}
    assert summary(model) == f"norms {norms} of {norms}, rotations 4 of 4, gated MLPs {gated} of 4, layers 4 of 4"


@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_neither_device_nor_dtype_nor_modes_matter(tiny_model, kind):
    for kept in (parts._inputs, parts._linear):
        kept.cache_clear()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.device("meta"):
        expected = fused_parts(tiny_model(kind).to("meta"))
    assert expected["layers"] == (4, 4) and expected["gated MLPs"] == (4, 4)
    model = tiny_model(kind)
    assert fused_parts(model) == expected
    state = torch.get_rng_state()
    assert fused_parts(tiny_model(kind).to(torch.bfloat16).train()) == expected  # its dropouts drop nothing
    parts_of(tiny_model(kind, resid_pdrop=0.5).train())
    assert torch.is_grad_enabled()
    torch.set_rng_state(state)
    drawn = torch.rand(3)
    torch.set_rng_state(state)
    layer = decoder_layers(model)[0]
    layer.mlp.train()  # tried anew
    fused_parts(model)
    assert torch.equal(torch.rand(3), drawn)


def test_adapters_and_hybrids(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=2)
    assert fused_parts(model)["layers"] == (4, 4) and fused_parts(model)["rotations"] == (4, 4)
    assert fused_parts(model.merge_and_unload())["layers"] == (4, 4)


# --- what looks alike ----------------------------------------------------------------------------------------------


def mlp_of(model, forward):
    """An MLP of Llama with another forward."""
    mlp = decoder_layers(model)[0].mlp
    mlp.__class__ = type("SomeMLP", (type(mlp),), {"forward": forward})
    return mlp


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: 1.001 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)),
        lambda self, x: self.down_proj(self.act_fn(self.up_proj(x)) * self.gate_proj(x)),
        lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1)),
        lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=7)) * self.up_proj(x).clamp(-7, 7)),
        lambda self, x: self.down_proj(F.gelu(self.gate_proj(x)) * self.up_proj(x)),
        lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * (1 if x.shape[1] > 1 else 2),
        lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) + x,
        lambda self, x: (self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), None),
        lambda self, x: self.missing(x),
    ],
    ids=["scaled", "gate and up exchanged", "shifted", "clamped", "erf", "by length", "residual inside", "tuple", "broken"],
)
def test_other_mlps_are_told_apart(tiny_model, forward):
    model = tiny_model("llama")
    mlp = mlp_of(model, forward)
    found = parts_of(model)
    assert mlp not in found.gated and mlp in found.mlps and len(found.gated) == 3


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x))),
        lambda self, x: self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)),
    ],
    ids=["other order", "activation without a module"],
)
def test_the_same_written_otherwise_is_recognised(tiny_model, forward):
    model = tiny_model("llama")
    assert parts_of(model).gated[mlp_of(model, forward)] == SILU


def test_an_activation_that_is_exchanged_is_seen(tiny_model):
    mlp = (model := tiny_model("llama")).model.layers[1].mlp
    assert parts_of(model).gated[mlp] == SILU
    mlp.act_fn = nn.GELU(approximate="tanh")
    assert parts_of(model).gated[mlp] == GELU
    mlp.act_fn = nn.GELU()
    assert mlp not in parts_of(model).gated
    mlp.act_fn = nn.ReLU()
    assert mlp not in parts_of(model).gated


def layer_of(model, forward):
    layer = decoder_layers(model)[0]
    layer.__class__ = type("SomeLayer", (type(layer),), {"forward": forward})
    return layer


def of_residuals(self, hidden_states, scale=1.0, attention_mask=None, swallowed=(), **kwargs):
    kwargs = {name: value for name, value in kwargs.items() if name not in swallowed}
    attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), attention_mask=attention_mask, **kwargs)
    hidden_states = hidden_states + scale * attended
    return hidden_states + scale * self.mlp(self.post_attention_layernorm(hidden_states))


def after_the_norm(self, hidden_states, **kwargs):
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states = hidden_states + self.self_attn(hidden_states=hidden_states, **kwargs)[0]
    return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize(
    "forward, recognised",
    [
        (of_residuals, True),
        (lambda self, x, **kwargs: of_residuals(self, x, 0.5, **kwargs), False),
        (lambda self, x, **kwargs: of_residuals(self, x, swallowed=("something_else",), **kwargs), False),
        (lambda self, x, **kwargs: of_residuals(self, x, output_attentions=True, **kwargs), False),
        (lambda self, x, **kwargs: of_residuals(self, x, output_attentions=False, **kwargs), True),
        (lambda self, x, **kwargs: (of_residuals(self, x, **kwargs),), False),
        (after_the_norm, False),
    ],
    ids=["same", "scaled", "swallows", "hands more on", "hands a default on", "tuple", "residual behind the norm"],
)
def test_layers_are_told_apart(tiny_model, forward, recognised):
    model = tiny_model("llama")
    layer = layer_of(model, forward)
    assert (layer in parts_of(model).layers) == recognised


def test_hooks_and_forwards_of_others(tiny_model):
    model = tiny_model("llama")
    first, second, third, fourth = decoder_layers(model)
    first.post_attention_layernorm.register_forward_hook(lambda *_: None)
    second.post_attention_layernorm.forward = second.post_attention_layernorm.forward  # as accelerate's
    third.mlp.forward = third.mlp.forward
    fourth.mlp.up_proj.register_forward_hook(lambda *_: None)
    heard = []
    model.model.layers[2].register_forward_hook(lambda *_: heard.append(1))
    found = parts_of(model)
    assert set(found.layers) == {third, fourth} and set(found.gated) == {first.mlp, second.mlp} and not heard
    assert fused_parts(model)["norms"] == (8, 9)


def test_a_dropout_that_drops(tiny_model):
    model = tiny_model("phi3", resid_pdrop=0.5)
    assert fused_parts(model)["layers"] == (4, 4)
    assert fused_parts(model.train())["layers"] == (0, 4)
    assert fused_parts(model.eval())["layers"] == (4, 4)
