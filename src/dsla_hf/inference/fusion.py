"""Fewer and faster launches in a step of one token: the small functions of a decoder layer, each compiled into one kernel, and its linear
layers in kernels for few rows.

A norm of transformers takes eight launches, a rotation ten. Where a token takes three milliseconds of reading weights, they add as
much again. `torch.compile` fuses each of them once a class, in seconds; the model as a whole stays what it is, so that one level or
cache more costs no compilation. Reading the weights is most of the rest: queries, keys and values are one launch, the gate of an MLP and
what it gates another.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from dsla_kernels import gated_linear, linears, takes_few_rows

from ..models.adapter_layer import AdapterLinear, DSLALayer

logger = logging.getLogger(__name__)

ROTATION = "apply_rotary_pos_emb"  # what modules of transformers call the rotation of queries and keys
KINDS = ("RMSNorm", "MLP")  # endings of class names whose forward is worth it
# Rounding as in the separate functions.
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}
ACTIVATIONS = {type(ACT2FN[name]): kind for name, kind in {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}.items()}
LONG_PROMPT = 1024  # tokens from which on compiled functions are worth their calls in reading a prompt, too: fewer passes over memory
OVERLAP = False  # weights are asked for while the kernel before runs

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]

_compiled: dict[Any, Callable[..., Any]] = {}
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
    """Within it, norms, MLPs and rotations of `model` run compiled, and plain linear layers of few tokens, one a row, by the kernels for
    them, where these run. To be held while a step is run once and captured, or a piece of a prompt is read, not longer: other threads that
    run a model of the same kind meanwhile get the compiled rotation too, which computes the same. prompt: pieces of prompts run within it,
    not steps; each has compiled functions of its own."""
    with _lock:
        modules = [x for x in model.modules() if type(x).__name__.endswith(KINDS) and "forward" not in x.__dict__]
        forwards = {module: _bound(_once(type(module).forward, compile, prompt, _sizes(module)), module) for module in modules}
        # The layers of an MLP run within its compiled forward, which would be compiled anew for each were they replaced.
        inner = {part for module in modules for part in module.modules()}
        forwards |= _linear_forwards({x for x in model.modules() if x not in inner and _is_plain(x)}, _projections(model))
        forwards |= {module: _gated_forward(module, forwards[module]) for module in modules if _is_gated(module)}
        forwards |= {module: _layer_forward(module, compile, prompt) for module in model.modules() if _adds_before_norm(module)}
        homes = {sys.modules[cls.__module__] for x in model.modules() for cls in type(x).__mro__ if cls.__module__ in sys.modules}
        rotations = {home: getattr(home, ROTATION) for home in homes if hasattr(home, ROTATION)}
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


def _is_plain(module: Any) -> bool:
    """Whether it computes what `nn.Linear` does and nobody has put anything else there: no quantised or sharded weight, no forward of
    accelerate's. (What a LoRA wraps is a layer like others.)"""
    return (
        type(module) in (nn.Linear, AdapterLinear)
        and "forward" not in module.__dict__
        and type(module.weight) is nn.Parameter
        and type(module.bias) in (nn.Parameter, type(None))
    )


def _few_rows(x: Any, *modules: Any) -> bool:
    """Whether x is one token of each of a few rows `[B, 1, K]` that the kernels take."""
    return isinstance(x, Tensor) and x.ndim == 3 and x.shape[1] == 1 and takes_few_rows(x, *(module.weight for module in modules))


def _projections(model: nn.Module) -> list[list[Any]]:
    """Of every attention those of queries, keys and values: a converted layer has queries of its own over keys and values of its base."""
    views = [x.dsla_attention() for x in model.modules() if isinstance(x, DSLALayer) and x.converted]
    return [[x._modules.get(name) for name in ("q_proj", "k_proj", "v_proj")] for x in (*model.modules(), *views)]


def _linear_forwards(modules: set[Any], projections: list[list[Any]]) -> dict[nn.Module, Callable[[Tensor], Tensor]]:
    """Forwards for linear layers. Whoever asks for queries is about to ask for keys and values of the very same x: they are computed
    with them, and kept until then."""
    kept: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    followers: dict[nn.Module, list[Any]] = {}
    for leader, *others in projections:
        group = [leader, *others]
        if modules.issuperset(group) and len({x.bias is None for x in group}) == 1 and not any(x._forward_pre_hooks for x in group):
            followers[leader] = others

    def forward_of(module: Any) -> Callable[[Tensor], Tensor]:
        def forward(input: Tensor) -> Tensor:
            of, result = kept.pop(module, (None, None))
            if result is not None and of is input:
                return result
            group = [module, *followers.get(module, ())]
            if not _few_rows(input, *group):
                group = [module]
            if not _few_rows(input, *group):
                return type(module).forward(module, input)
            biases = None if module.bias is None else [x.bias for x in group]
            result, *others = linears(input, [x.weight for x in group], biases, overlap=OVERLAP)
            kept.update({x: (input, other) for x, other in zip(group[1:], others, strict=True)})
            return result

        return forward

    return {module: forward_of(module) for module in modules}


def _gated_mlp(self, x):  # what a gated MLP looks like in transformers; the text is compared, so it is not ours to shorten
    down_proj = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
    return down_proj


def _decoder_layer(  # what a layer with norms before attention and MLP looks like in transformers, likewise
    self,
    hidden_states,
    attention_mask=None,
    position_ids=None,
    past_key_values=None,
    use_cache=False,
    position_embeddings=None,
    **kwargs,
):
    residual = hidden_states
    hidden_states = self.input_layernorm(hidden_states)
    hidden_states, _ = self.self_attn(
        hidden_states=hidden_states,
        attention_mask=attention_mask,
        position_ids=position_ids,
        past_key_values=past_key_values,
        use_cache=use_cache,
        position_embeddings=position_embeddings,
        **kwargs,
    )
    hidden_states = residual + hidden_states

    residual = hidden_states
    hidden_states = self.post_attention_layernorm(hidden_states)
    hidden_states = self.mlp(hidden_states)
    hidden_states = residual + hidden_states
    return hidden_states


def _program(function: Any) -> Any:
    code = getattr(inspect.unwrap(function), "__code__", None)  # transformers wraps layers, for checkpoints of gradients
    return code and (code.co_code, code.co_names, code.co_consts)


def _adds_before_norm(module: Any) -> bool:
    """Whether a module computes what `_decoder_layer` does, with a norm before the MLP that is a plain RMSNorm."""
    norm: Any = module._modules.get("post_attention_layernorm")
    return (
        norm is not None
        and _program(type(module).forward) == _program(_decoder_layer)
        and "forward" not in module.__dict__
        and type(norm).__name__.endswith("RMSNorm")
        and not (norm._forward_hooks or norm._forward_pre_hooks)
    )


@functools.cache
def _add_and_norm(norm_class: Any) -> Callable[..., tuple[Tensor, Tensor]]:
    def add_and_norm(norm: Any, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return norm_class.forward(norm, total), total

    return add_and_norm


def _layer_forward(module: Any, compile: Compile, prompt: bool) -> Callable[..., Tensor]:
    """`_decoder_layer`, where what attention adds and the norm of the sum are one kernel."""
    norm = module.post_attention_layernorm
    kind: Any = type(norm)
    add_and_norm = _once(_add_and_norm(kind), compile, prompt, _sizes(norm))

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args:
            return type(module).forward(module, hidden_states, *args, **kwargs)
        attended, _ = module.self_attn(hidden_states=module.input_layernorm(hidden_states), **kwargs)
        normed, total = add_and_norm(norm, attended, hidden_states)
        return total + module.mlp(normed)

    return forward


def _is_gated(module: Any) -> bool:
    """Whether an MLP computes what `_gated_mlp` does, in three plain layers without biases or hooks, and an activation that is known."""
    parts = [module._modules.get(name) for name in ("gate_proj", "up_proj", "down_proj")]
    return (
        _program(type(module).forward) == _program(_gated_mlp)
        and type(module._modules.get("act_fn")) in ACTIVATIONS
        and all(_is_plain(x) and x.bias is None and not (x._forward_hooks or x._forward_pre_hooks) for x in parts)
    )


def _gated_forward(module: Any, otherwise: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        gate, up, down = module.gate_proj, module.up_proj, module.down_proj
        if not _few_rows(x, gate, up):
            return otherwise(x)
        hidden = gated_linear(x, gate.weight, up.weight, ACTIVATIONS[type(module.act_fn)], overlap=OVERLAP)
        return linears(hidden, [down.weight], overlap=OVERLAP)[0]

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


def _bound(function: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(module, *args, **kwargs)
