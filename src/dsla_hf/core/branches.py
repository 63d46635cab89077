"""Two parts of a layer that need nothing of one another, on two streams: the layer waits for the longer one only, and small ones fill the
device together."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

First = TypeVar("First")
Second = TypeVar("Second")


def both(x: Tensor, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """The results of two functions, of which none writes what the other one reads or writes, and `second` frees nothing but what it made.

    On a CUDA device and without gradients they run beside each other (and are captured so), else one after the other."""
    if torch.compiler.is_compiling() or not x.is_cuda or torch.is_grad_enabled():
        return first(), second()
    here, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        two = second()  # its memory is used again on this stream alone, which always waits for the other one first
    one = first()
    here.wait_stream(side)
    return one, two


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
