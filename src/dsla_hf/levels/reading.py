"""Levels as users write them: a number of units (layers, or KV heads), a share of them, or what is kept of them."""

from __future__ import annotations

import math
import re
from typing import Any

KEPT = "kept:"


def is_whole(value: Any) -> bool:
    """Whether it is an integer, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def read_level(level: int | str) -> tuple[bool, float | None, int]:
    """What is written: whether it says what stays softmax attention (`"kept:9"`), a share in per cent or None, and a number where there
    is no share.

    Raises:
        ValueError: if it is no level.
    """
    text = str(level).strip() if isinstance(level, str) or is_whole(level) else ""
    kept = text.startswith(KEPT)
    text = text.removeprefix(KEPT).strip()
    share = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text, re.ASCII)
    if share and float(share[1]) <= 100:
        return kept, float(share[1]), 0
    if share or not re.fullmatch(r"\d+", text, re.ASCII):
        raise ValueError(f"level must be a whole number, 0 or more, or a share up to 100% such as '50%', got {level!r}")
    return kept, None, int(text)


def parse_level(level: int | str, units: int, unit: str = "layer") -> int:
    """The number of units that `8`, `"8"` or `"50%"` of a model's `units` means; where the unit is a head also `"kept:10%"` or `"kept:9"`:
    all but these. A share is rounded to the nearest whole number of units, halves upwards.

    Raises:
        ValueError: if it is none of these, or more than all.
    """
    kept, share, number = read_level(level)
    number = number if share is None else math.floor(units * share / 100 + 0.5)
    if not kept:
        return number
    if unit != "head":
        raise ValueError(
            f"level {level!r} says which share of KV heads is kept, and this plan converts whole layers (conversion_unit='layer'): give a "
            "number of converted layers, or a share of them such as '50%'"
        )
    if number > units:
        raise ValueError(f"level {level!r} keeps more KV heads than the {units} that the model has")
    return units - number
