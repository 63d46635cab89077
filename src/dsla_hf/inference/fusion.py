"""Fewer and faster launches in a step of one token: the small functions of a decoder layer, each compiled into one kernel, and its linear
layers in kernels for few rows.

A norm of transformers takes eight launches, a rotation ten. Where a token takes three milliseconds of reading weights, they add as
much again. `torch.compile` fuses each of them once a class, in seconds; the model as a whole stays what it is, so that one level or
cache more costs no compilation. Reading the weights is most of the rest: queries, keys and values are one launch, the gate of an MLP and
what it gates another; of few rows by kernels for them, of more where the weights lie beside each other (`dsla_hf.inference.joined`).
`dsla_hf.inference.parts` says which of them a model has (`dsla env --model`).
"""

from __future__ import annotations

import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsla_kernels import gated_linear, linears, takes_few_rows

from ..compat.attributes import children_of, has_hooks
from ..models.adapter_layer import DSLALayer
from .joined import whole_of
from .parts import ACTIVATIONS, ROTATION, GatedMLP, Layer, is_plain, parts_of, summary

logger = logging.getLogger(__name__)

# Rounding as in the separate functions.
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}
LONG_PROMPT = 1024  # tokens from which on compiled functions are worth their calls in reading a prompt, too: fewer passes over memory
OVERLAP = False  # weights are asked for while the kernel before runs

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

_compiled: dict[Any, Callable[..., Any]] = {}
_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models of which it was said what is fused
_lock = threading.RLock()  # rotations are replaced for all models of a kind


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, options=OPTIONS)


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` works on this machine; it needs a C compiler."""
    try:
        _compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception:  # whatever the backend raises
        logger.debug("torch.compile failed", exc_info=True)
        return False
    return True


@contextmanager
def fused(model: nn.Module, compile: Compile = _compile, prompt: bool = False) -> Iterator[None]:
    """Within it, norms, MLPs and rotations of `model` run compiled, plain linear layers of few tokens by the kernels for them, where these
    run, and of more tokens those of one x as one product, where their weights lie beside each other. To be held while a step is run once
    and captured, or a piece of a prompt is read, not longer: other threads that run a model of the same kind meanwhile get the compiled
    rotation too, which computes the same. prompt: pieces of prompts run within it, not steps; each has compiled functions of its own."""
    with _lock:
        parts = parts_of(model)
        if model not in _told:
            _told.add(model)
            logger.info("fused in %s: %s", type(model).__name__, summary(model, parts))
        forwards = {module: _compiled_forward(module, compile, prompt) for module in (*parts.norms, *parts.mlps)}
        # The layers of an MLP run within its compiled forward, which would be compiled anew for each were they replaced.
        inner = {part for module in forwards for part in module.modules()}
        views = _views(model)
        linear = {x for module in (model, *views) for x in module.modules() if x not in inner and is_plain(x)}
        forwards |= _linear_forwards(linear, _projections([*model.modules(), *views]))
        forwards |= {module: _gated_forward(module, form, forwards[module], compile, prompt) for module, form in parts.gated.items()}
        forwards |= {module: _layer_forward(module, form, compile, prompt) for module, form in parts.layers.items()}
        rotations = parts.rotations
        try:
            for module, forward in forwards.items():
                module.forward = forward
            for home, rotation in rotations.items():
                setattr(home, ROTATION, _once(rotation, compile, prompt))
            yield
        finally:
            for module in forwards:
                module.__dict__.pop("forward", None)
            for home, rotation in rotations.items():
                setattr(home, ROTATION, rotation)


def _few_rows(x: Any, *weights: Tensor) -> bool:
    """Whether x `[B, T, K]` has as few tokens as the kernels take, with these weights: one of each of a few rows, or a checked draft's."""
    return isinstance(x, Tensor) and x.ndim == 3 and takes_few_rows(x, *weights)


def _views(model: nn.Module) -> list[nn.Module]:
    """The attentions of an adapter's converted layers, which have queries of their own over keys and values of the base."""
    running = [x.running_attention() for x in model.modules() if isinstance(x, DSLALayer)]
    return [attention for attention in running if attention is not None]


def _projections(modules: list[nn.Module]) -> list[list[Any]]:
    """Of every attention among them those of queries, keys and values."""
    return [[children_of(x).get(name) for name in ("q_proj", "k_proj", "v_proj")] for x in modules]


def _linear_forwards(modules: set[Any], projections: list[list[Any]]) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Forwards for linear layers. Whoever asks for queries is about to ask for keys and values of the very same x: they are computed
    with them, and kept until then."""
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    followers: dict[nn.Module, list[Any]] = {}
    for leader, *others in projections:
        group = [leader, *others]
        if (
            modules.issuperset(group)
            and len({x.bias is None for x in group}) == 1
            and not any(has_hooks(x, before_only=True) for x in group)
        ):
            followers[leader] = others
            followers.setdefault(others[0], others[1:])  # where queries cannot be computed with them

    def forward_of(module: Any) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            of, result = kept.pop(module, (None, None))
            if result is not None and of is input:
                return result
            group = [module, *(followers.get(module, ()) if result is None else ())]  # one that was kept in vain: each has an x of its own
            results = None
            for some in (group, [module]):
                weights = [x.weight for x in some]
                if _few_rows(input, *weights):
                    biases = None if module.bias is None else [x.bias for x in some]
                    results = linears(input, weights, biases, overlap=OVERLAP)
                elif len(some) > 1:
                    results = _as_one(input, some)
                if results:
                    break
            else:
                return type(module).forward(module, input)
            result, *others = results
            kept.update({x: (input, other) for x, other in zip(some[1:], others, strict=True)})
            return result

        return forward

    return {module: forward_of(module) for module in modules}


def _as_one(x: Any, group: list[Any]) -> list[Tensor]:
    """What plain linear layers give for x `[..., K]`, by one product; nothing where their weights do not lie beside each other, or a
    gradient is wanted."""
    if not isinstance(x, Tensor) or not _as_it_is(x, *(layer.weight for layer in group)):
        return []
    weight, bias = whole_of([layer.weight for layer in group]), None
    if weight is None or (group[0].bias is not None and (bias := whole_of([layer.bias for layer in group])) is None):
        return []
    return list(F.linear(x, weight, bias).split([len(layer.weight) for layer in group], -1))


def _as_it_is(x: Tensor, *weights: Tensor) -> bool:
    """Whether a product of x and these weights needs no gradient and no other dtype."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type) and all(w.dtype == x.dtype for w in weights)


@functools.cache
def _join(after: Any, before: Any, scale: float | None) -> Callable[..., Any]:
    """What stands between two parts of a layer: a norm of the class `after` of what the first adds, the sum, and a norm of the class
    `before` for the second. Returns `(normed, total)`, and without `before` the total alone."""

    def join(after_norm: Any, before_norm: Any, x: Tensor, residual: Tensor) -> Any:
        if after is not None:
            x = after.forward(after_norm, x)
        if scale is not None:
            x = x * scale
        total = residual + x
        return total if before is None else (before.forward(before_norm, total), total)

    return join


def _add(residual: Tensor, attended: Tensor, mixed: Tensor) -> Tensor:
    return residual + attended + mixed


def _layer_forward(module: Any, form: Layer, compile: Compile, prompt: bool) -> Callable[..., Tensor]:
    """The forward of a decoder layer, where what stands between attention and MLP, and behind the MLP, are one kernel each."""
    first, after, before, last = (children_of(module)[name] if name else None for name in form.norms)

    def joined(after: Any, before: Any) -> Callable[[Tensor, Tensor], Any]:
        if after is None and before is None and form.scale is None:
            return lambda x, residual: residual + x  # a kernel as it is
        classes: list[Any] = [None if norm is None else type(norm) for norm in (after, before)]
        compiled = _once(_join(*classes, form.scale), compile, prompt, _sizes(after or before or module))
        return lambda x, residual: compiled(after, before, x, residual)

    between, behind = joined(after, before), joined(last, None)
    add = _once(_add, compile, prompt) if form.parallel else _add

    def mlp(x: Tensor) -> Tensor:
        return module.mlp(x)[0] if form.tuple_of_mlp else module.mlp(x)

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            return type(module).forward(module, hidden_states, *args, **kwargs)
        x = hidden_states if first is None else first(hidden_states)
        attended = module.self_attn(hidden_states=x, **kwargs)[0]
        if form.parallel:
            return add(hidden_states, attended, mlp(x))
        total = between(attended, hidden_states)
        normed, total = (total, total) if before is None else total
        return behind(mlp(normed), total)

    return forward


@functools.cache
def _gated(activation: str) -> Callable[[Tensor], Tensor]:
    """What stands between the products of an MLP, of gate and up `[..., 2 N]` beside each other."""

    def gated(both: Tensor) -> Tensor:
        gate, up = both.chunk(2, -1)
        return ACTIVATIONS[activation](gate) * up

    return gated


def _gated_forward(
    module: Any, form: GatedMLP, otherwise: Callable[..., Any], compile: Compile, prompt: bool
) -> Callable[[Tensor], Tensor]:
    beside = not form.joined and whole_of(form.inner(module)) is not None
    activate = _once(_gated(form.activation), compile, prompt) if beside else None

    def forward(x: Tensor) -> Tensor:
        gate, up = form.inner(module)
        if _few_rows(x, gate, up):
            hidden = gated_linear(x, gate, up, form.activation, overlap=OVERLAP)
            return linears(hidden, [module.down_proj.weight], overlap=OVERLAP)[0]
        both = whole_of([gate, up]) if activate is not None and _as_it_is(x, gate, up) else None
        if activate is None or both is None:
            return otherwise(x)
        return F.linear(activate(F.linear(x, both)), module.down_proj.weight)

    return forward


def _once(function: Callable[..., Any], compile: Compile, prompt: bool, sizes: Any = None) -> Callable[..., Any]:
    key = function, compile, prompt, sizes
    if key not in _compiled:
        _compiled[key] = compile(_copy(function, f"{'prompt' if prompt else 'step'}_{len(_compiled)}"))
    return _compiled[key]


def _sizes(module: nn.Module) -> Any:
    """What tells modules of a class apart that see other shapes: norms of heads and of hidden states, models of other sizes."""
    return next((weight.shape for weight in module.parameters()), None)


def _copy(function: Any, suffix: str) -> Any:
    """The same function with code of its own. `torch.compile` compiles the code of a function for eight kinds of inputs, then for none:
    prompts and steps, one row and several, would be too many together."""
    code = getattr(function, "__code__", None)
    if code is None:
        return function
    code = code.replace(co_name=f"{code.co_name}_{suffix}")
    copy = types.FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__qualname__ = function.__kwdefaults__, function.__qualname__
    return copy


def _compiled_forward(module: Any, compile: Compile, prompt: bool) -> Callable[..., Any]:
    function = _once(type(module).forward, compile, prompt, _sizes(module))
    return lambda *args, **kwargs: function(module, *args, **kwargs)
