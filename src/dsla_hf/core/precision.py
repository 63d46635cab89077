"""In which dtype a layer computes, whatever autocast says around it."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dsla_kernels import uses_triton

from .past import DualState


def autocast_off(x: Tensor) -> Any:
    """A context in which operations on x's device keep the dtypes of their inputs."""
    return torch.autocast(x.device.type, enabled=False) if autocast_dtype(x.device) is not None else nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast rounds to on a device, or None where it is off."""
    kind = device.type
    if _knows_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


@torch.compiler.assume_constant_result  # dynamo before torch 2.13 cannot trace the question
def _knows_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def one_dtype(state: DualState | None, *tensors: Tensor) -> tuple[Any, ...]:
    """State and tensors, with the keys and values that the state holds, in one dtype: the widest among them.

    Under autocast they differ: over fp32 weights rotated and normalised keys are fp32, and values what autocast rounds to. Of fp16
    autocast it is fp32 at least, also where all come in fp16, whose range states and decays pass. Of bf16 autocast it is bf16 where
    kernels run: there fp32 takes several times the time, and the base's attention rounds all to bf16 too.
    """
    low = autocast_dtype(tensors[0].device)
    dtypes = {x.dtype for x in (*tensors, *((state.window_k, state.window_v) if state is not None else ()))}
    if low is None and len(dtypes) == 1:
        return state, *tensors
    if low == torch.float16:
        dtypes.add(torch.float32)
    elif low == torch.bfloat16 and tensors[0].device.type != "cpu" and uses_triton(tensors[0], tensors[-1], quietly=True):
        dtypes = {low}
    dtype = functools.reduce(torch.promote_types, dtypes)
    if state is not None:
        state = state._replace(window_k=state.window_k.to(dtype), window_v=state.window_v.to(dtype))
    return state, *(x.to(dtype) for x in tensors)
