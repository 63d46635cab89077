"""Fewer launches in a step of one token: the small functions of a decoder layer, each compiled into one kernel.

A norm of transformers takes eight launches, a rotation ten. Where a token takes three milliseconds of reading weights, they add as
much again. `torch.compile` fuses each of them once a class, in seconds; the model as a whole stays what it is, so that one level or
cache more costs no compilation.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

ROTATION = "apply_rotary_pos_emb"  # what modules of transformers call the rotation of queries and keys
KINDS = ("RMSNorm", "MLP")  # endings of class names whose forward is worth it
# Rounding as in the separate functions.
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}

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
def fused(model: nn.Module, compile: Compile = _compile) -> Iterator[None]:
    """Within it, norms, MLPs and rotations of `model` run compiled. To be held while a step is run once and captured, not longer:
    other threads that run a model of the same kind meanwhile get the compiled rotation too, which computes the same."""
    with _lock:
        modules = [x for x in model.modules() if type(x).__name__.endswith(KINDS) and "forward" not in x.__dict__]
        homes = {sys.modules[cls.__module__] for x in model.modules() for cls in type(x).__mro__ if cls.__module__ in sys.modules}
        rotations = {home: getattr(home, ROTATION) for home in homes if hasattr(home, ROTATION)}
        try:
            for module in modules:
                module.forward = _bound(_once(type(module).forward, compile), module)
            for home, rotation in rotations.items():
                setattr(home, ROTATION, _once(rotation, compile))
            yield
        finally:
            for module in modules:
                module.__dict__.pop("forward", None)
            for home, rotation in rotations.items():
                setattr(home, ROTATION, rotation)


def _once(function: Callable[..., Any], compile: Compile) -> Callable[..., Any]:
    key = function, compile
    if key not in _compiled:
        _compiled[key] = compile(function)
    return _compiled[key]


def _bound(function: Callable[..., Any], module: nn.Module) -> Callable[..., Any]:
    return lambda *args, **kwargs: function(module, *args, **kwargs)
