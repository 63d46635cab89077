"""Values between host and device for which neither waits longer than it must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def sent(values: Tensor, device: torch.device) -> Tensor:
    """To a device; the host goes on at once."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def received(values: Tensor) -> Callable[[], list[Any]]:
    """Bring values from their device, behind what has been launched there; who asks for them waits no longer than for that."""
    if values.device.type != "cuda":
        return values.tolist
    here = torch.empty_like(values, device="cpu", pin_memory=True).copy_(values, non_blocking=True)
    there = torch.cuda.Event()
    there.record(torch.cuda.current_stream(values.device))

    def wait() -> list[Any]:
        there.synchronize()
        return here.tolist()

    return wait
