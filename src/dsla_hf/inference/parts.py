"""What of a model can be fused: its norms, rotations, gated MLPs and decoder layers, found by their structure and by what they compute.

Whether a module computes what a fused form does is tried: its own forward runs over small stand-ins for its children, in fp64 on the CPU,
and must give what the formula gives. So size, device, dtype and values of the weights play no part, nor does the way it is written; what
multiplies, cuts off or adds anything else is told apart.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..compat.attributes import children_of, has_hooks, with_children
from ..models.adapter_layer import AdapterLinear

ROTATION = "apply_rotary_pos_emb"  # what modules of transformers call the rotation of queries and keys
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}
# What a layer may hand on to its attention, and something that it cannot know.
HANDED_ON = ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings", "something_else")
WIDTH, INNER = 6, 10  # of stand-ins
PRECISION = 1e-9


class GatedMLP(NamedTuple):
    """`down(activation(gate(x)) * up(x))`. joined: gate and up are one matrix, `gate_up_proj`, gate first."""

    activation: str
    joined: bool

    def inner(self, module: Any) -> tuple[Tensor, Tensor]:
        """The weights of gate and up, `[N, K]` each."""
        if self.joined:
            gate, up = module.gate_up_proj.weight.chunk(2)
            return gate, up
        return module.gate_proj.weight, module.up_proj.weight


class Layer(NamedTuple):
    """Which norms a decoder layer has where, by name, None where it has none:

        h = x + scale * after_attention(attention(before_attention(x)))
        h + scale * after_mlp(mlp(before_mlp(h)))

    parallel: instead `x + attention(before_attention(x)) + mlp(before_attention(x))`.
    scale: None for 1. tuple_of_mlp: its MLP returns a tuple, whose first part counts.
    """

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None
    parallel: bool = False
    scale: float | None = None
    tuple_of_mlp: bool = False

    @property
    def norms(self) -> tuple[str | None, ...]:
        return self[:4]


# Llama and most others; Gemma 2 and 3; OLMo 2; Cohere 2.
LAYERS = (
    Layer("input_layernorm", None, "post_attention_layernorm", None),
    Layer("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    Layer(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    Layer("input_layernorm", None, None, None, parallel=True),
)


@dataclass(frozen=True)
class Parts:
    """What was found in a model.

    norms: modules of many small operations. mlps: gated ones, and others whose class is named so. gated, layers: with their form.
    rotations: by the module of Python that has the function.
    """

    norms: list[Any]
    mlps: list[Any]
    gated: dict[Any, GatedMLP]
    layers: dict[Any, Layer]
    rotations: dict[Any, Callable[..., Any]]


def parts_of(model: nn.Module) -> Parts:
    """What can be fused in a model. What has hooks, forwards of others, or weights of another kind where a fused form would pass them by
    is left out."""
    modules = [x for x in model.modules() if "forward" not in x.__dict__]
    gated = {x: form for x in modules if (form := _gated_form(x)) is not None}
    layers = {x: layer for x in modules if (layer := _layer_form(x)) is not None}
    mlps = [x for x in modules if x in gated or type(x).__name__.endswith("MLP")]
    homes = _homes(model.modules())
    return Parts([x for x in modules if _is_norm(x)], mlps, gated, layers, {home: getattr(home, ROTATION) for home in homes})


def fused_parts(model: nn.Module, parts: Parts | None = None) -> dict[str, tuple[int, int]]:
    """How many of a model's norms, rotations, gated MLPs and decoder layers are recognised, and so run fused in captured steps, each with
    how many there are. `parts`: those of the model, where they are known."""
    parts = parts or parts_of(model)
    norms = [x for x in model.modules() if type(x).__name__.endswith("Norm")]
    layers: list[Any] = [x for x in model.modules() if {"self_attn", "mlp"} <= children_of(x).keys()]
    rotated = [x for x in layers if _homes(x.self_attn.modules())]
    gated = [x for x in layers if x.mlp in parts.gated]
    found = {"norms": (parts.norms, norms), "rotations": (rotated, layers), "gated MLPs": (gated, layers), "layers": (parts.layers, layers)}
    return {name: (len(some), len(every)) for name, (some, every) in found.items()}


def summary(model: nn.Module, parts: Parts | None = None) -> str:
    """`fused_parts` in words."""
    return ", ".join(f"{name} {some} of {every}" for name, (some, every) in fused_parts(model, parts).items())


def is_plain(module: Any) -> bool:
    """Whether it computes what `nn.Linear` does and nobody has put anything else there: no quantised or sharded weight, no forward of
    accelerate's. (What a LoRA wraps is a layer like others.)"""
    return (
        type(module) in (nn.Linear, AdapterLinear)
        and "forward" not in module.__dict__
        and type(module.weight) is nn.Parameter
        and type(module.bias) in (nn.Parameter, type(None))
    )


def _is_norm(module: Any) -> bool:
    """Whether it is a norm written in many operations; PyTorch's own LayerNorm is one kernel."""
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and not isinstance(module, nn.LayerNorm)


def _homes(modules: Iterable[nn.Module]) -> set[Any]:
    """The modules of Python, of these and their classes, that have a rotation."""
    homes = {sys.modules.get(cls.__module__) for x in modules for cls in type(x).__mro__}
    return {home for home in homes if hasattr(home, ROTATION)}


def _gated_form(module: Any) -> GatedMLP | None:
    """The form of a gated MLP of plain layers without biases or hooks; None if it is none."""
    for joined, names in ((False, ("gate_proj", "up_proj", "down_proj")), (True, ("gate_up_proj", "down_proj"))):
        parts: list[Any] = [children_of(module).get(name) for name in names]
        if all(is_plain(x) and x.bias is None and not has_hooks(x) for x in parts):
            forms = [GatedMLP(activation, joined) for activation in ACTIVATIONS]
            return _first(forms, module, _computes_mlp)
    return None


def _layer_form(module: Any) -> Layer | None:
    """The form of a decoder layer whose norms are such that a fused form may call them; None if it is none."""
    children: dict[str, Any] = {**children_of(module)}
    if not {"self_attn", "mlp"} <= children.keys():
        return None
    norms = {name: child for name, child in children.items() if type(child).__name__.endswith("Norm")}
    if not all(_is_norm(x) and "forward" not in x.__dict__ and not has_hooks(x) for x in norms.values()):
        return None
    scale = getattr(module, "residual_multiplier", None)
    forms = [
        form._replace(scale=scale, tuple_of_mlp=more)
        for form in LAYERS
        if {name for name in form.norms if name} == norms.keys()
        for more in (False, True)
    ]
    return _first(forms, module, _computes_layer)


# --- what a module computes ------------------------------------------------------------------------------------------------

# By module what it was when it was tried, and the form that was found.
_tried: weakref.WeakKeyDictionary[nn.Module, tuple[Any, Any]] = weakref.WeakKeyDictionary()


def _first(forms: list[Any], module: Any, computes: Callable[[Any, Any], bool]) -> Any:
    """The first form that a module computes; None if it computes none."""
    state = [(name, value) for name, value in module.__dict__.items() if isinstance(value, (bool, int, float, str))]
    now = (
        type(module).forward,
        state,
        [(name, None if child is None else weakref.ref(child)) for name, child in children_of(module).items()],
        forms,
    )
    before, found = _tried.get(module, (None, None))
    if before != now:
        # Dropouts of a module in training draw numbers, which those that come after shall not notice.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
            found = next((form for form in forms if _safely(computes, module, form)), None)
        _tried[module] = now, found
    return found


def _safely(computes: Callable[[Any, Any], bool], module: Any, form: Any) -> bool:
    try:
        return computes(module, form)
    except Exception:  # whatever a forward raises over stand-ins: then it is another one
        return False


def _over(module: Any, children: dict[str, nn.Module]) -> Callable[..., Any]:
    """The forward of a module over other children, without its hooks."""
    other = with_children(module, children)
    return lambda *args, **kwargs: type(module).forward(other, *args, **kwargs)


class _StandIn(nn.Module):
    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.forward = function


def _numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float64, device="cpu")


@functools.cache
def _inputs() -> Tensor:
    """Hidden states `[2, 3, WIDTH]`, one row so large that it meets whatever cuts off."""
    return _numbers(0, 2, 3, WIDTH) * torch.tensor([1.0, 100.0], dtype=torch.float64, device="cpu")[:, None, None]


@functools.cache
def _linear(seed: int, rows: int, columns: int) -> nn.Linear:
    layer = nn.utils.skip_init(nn.Linear, columns, rows, bias=False, dtype=torch.float64, device="cpu")
    layer.weight = nn.Parameter(_numbers(seed, rows, columns), requires_grad=False)
    return layer


def _computes_mlp(module: Any, form: GatedMLP) -> bool:
    children: dict[str, Any] = {"down_proj": _linear(1, WIDTH, INNER)}
    if form.joined:
        children["gate_up_proj"] = _linear(2, 2 * INNER, WIDTH)
    else:
        children |= {"gate_proj": _linear(2, INNER, WIDTH), "up_proj": _linear(3, INNER, WIDTH)}
    forward = _over(module, children)
    gate, up = form.inner(SimpleNamespace(**children))
    whole = _inputs()
    for x in (whole, whole[:, :1]):
        expected = F.linear(ACTIVATIONS[form.activation](F.linear(x, gate)) * F.linear(x, up), children["down_proj"].weight)
        if not torch.allclose(forward(x), expected, rtol=PRECISION, atol=PRECISION):
            return False
    return True


def _computes_layer(module: Any, form: Layer) -> bool:
    def norm(name: str | None) -> Callable[[Tensor], Tensor]:
        if name is None:
            return lambda x: x
        number = form.norms.index(name) + 2
        return lambda x: torch.tanh(x / number + number / 8)

    def mlp(x: Tensor) -> Tensor:
        return torch.cos(x)

    heard: list[dict[str, Any]] = []

    def attention(hidden_states: Tensor, **handed_on: Any) -> tuple[Tensor, None]:
        heard.append(handed_on)
        return torch.sin(hidden_states), None

    children: dict[str, nn.Module] = {name: _StandIn(norm(name)) for name in form.norms if name}
    children["self_attn"] = _StandIn(attention)
    children["mlp"] = _StandIn((lambda x: (mlp(x), None)) if form.tuple_of_mlp else mlp)
    given = {name: object() for name in HANDED_ON}
    x, scale = _inputs(), 1.0 if form.scale is None else form.scale
    found = _over(module, children)(x, **given)
    first, second, third, fourth = map(norm, form.norms)
    if form.parallel:
        expected = x + torch.sin(first(x)) + mlp(first(x))
    else:
        hidden = x + scale * second(torch.sin(first(x)))
        expected = hidden + scale * fourth(mlp(third(hidden)))
    (passed,) = heard
    own = [passed[name] for name in passed.keys() - given.keys()]  # defaults of what it was not given
    return torch.allclose(found, expected, rtol=PRECISION, atol=PRECISION) and given.items() <= passed.items() and not any(own)
