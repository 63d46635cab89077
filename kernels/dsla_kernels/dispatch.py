"""Which implementation runs: chosen from the device of the inputs, and told on request."""

import torch
from torch import Tensor

from . import reference


def kernel_path(device: torch.device | str) -> str:
    """The implementation that runs on `device`, for people to read, e.g. by `dsla env`."""
    device = torch.device(device)
    if device.type == "cuda":
        return "chunked PyTorch (the Triton kernels are not in use yet: no speed of theirs has been measured)"
    return "chunked PyTorch"


def dual_state_attention(q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, mix: Tensor, **options) -> tuple[Tensor, Tensor | None]:
    """Dual-state linear attention by the fastest implementation for the device; see `reference.dual_state_attention`."""
    return reference.dual_state_attention(q, k, v, gate_logits, mix, **options)


def block_states(k: Tensor, v: Tensor, gate_logits: Tensor, block_size: int, **options) -> Tensor:
    """States at block boundaries by the fastest implementation for the device; see `reference.block_states`."""
    return reference.block_states(k, v, gate_logits, block_size, **options)


def dual_state_window_attention(
    q: Tensor, k: Tensor, v: Tensor, gate_logits: Tensor, mix: Tensor, window_size: int, **options
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Window and states by the fastest implementation for the device; see `reference.dual_state_window_attention`."""
    return reference.dual_state_window_attention(q, k, v, gate_logits, mix, window_size, **options)
