"""When values must not be looked at, or written over: in recorded steps, and where a gradient is asked for."""

from __future__ import annotations

import torch
from torch import Tensor


def records_steps(x: Tensor) -> bool:
    """Whether what runs on `x` is recorded to run again, compiled or in a CUDA graph: the host then cannot look at values."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def requires_gradient(*tensors: Tensor | None) -> bool:
    """Whether one of these takes part in a gradient: what was computed from it needs it as it was."""
    return any(x is not None and x.requires_grad for x in tensors)
