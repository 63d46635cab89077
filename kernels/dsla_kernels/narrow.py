"""Keys and values in eight bits: what a cache of `torch.float8_e4m3fn` makes of them. There are no scales, as in vLLM by default."""

import torch
from torch import Tensor

from .shapes import FP8

LARGEST = 448.0  # that e4m3 has


def stored(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x as a cache of a dtype holds it: in fp8 rounded to the nearest, and what lies beyond its largest number is that; NaN stays NaN.
    For any other dtype x as it is."""
    return x.clamp(-LARGEST, LARGEST).to(FP8) if dtype == FP8 else x


def bits(x: Tensor) -> Tensor:
    """A view of x that PyTorch indexes on every device and in every release: of fp8 its bytes, of all else x itself."""
    return x.view(torch.uint8) if x.dtype == FP8 else x
