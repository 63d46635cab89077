"""Two parts of a layer that need nothing of one another: two branches of a CUDA graph, so that a step of few rows waits for the longer
one only."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

First = TypeVar("First")
Second = TypeVar("Second")


def both(x: Tensor, first: Callable[[], First], second: Callable[[], Second]) -> tuple[First, Second]:
    """The results of two functions, of which none writes what the other one reads or writes. While a CUDA graph is captured on x's device
    they are captured beside each other, else one is run after the other."""
    if torch.compiler.is_compiling() or not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return first(), second()
    here, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        one = first()
    other = (
        second()
    )  # what the functions hold lives until both have ended, and what `first` allocates is used again on its own stream alone
    here.wait_stream(side)
    return one, other


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
