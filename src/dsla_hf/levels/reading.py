"""Levels as users write them: a number of layers, or a share of them."""

from __future__ import annotations

import math
import re
from typing import Any


def is_whole(value: Any) -> bool:
    """Whether it is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def parse_level(level: int | str, num_layers: int) -> int:
    """The number of layers that `8`, `"8"` or `"50%"` of `num_layers` means. A share is rounded to the nearest whole layer, halves
    upwards.

    Raises:
        ValueError: if it is none of these, or more than all.
    """
    text = str(level).strip() if isinstance(level, str) or is_whole(level) else ""
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text, re.ASCII)
    if share and float(share[1]) <= 100:
        return math.floor(num_layers * float(share[1]) / 100 + 0.5)
    if share or not re.fullmatch(r"\d+", text, re.ASCII):
        raise ValueError(f"level must be a whole number, 0 or more, or a share up to 100% such as '50%', got {level!r}")
    return int(text)
