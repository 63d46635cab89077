"""A kernel that is launched while the one before it still runs, and waits for it on the device: from Hopper on."""

import functools
from typing import Any

import torch

from .common import INTERPRETED


@functools.cache
def can_overlap(device: torch.device) -> bool:
    """Whether the device can do that."""
    return not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def overlapping(wanted: bool) -> dict[str, Any]:
    """Options of a launch that begins before the kernel in front of it has ended, or of one that does not."""
    return {"launch_pdl": True} if wanted else {}
