"""Tasks whose texts a window holds: what is measured on them says nothing of states."""

from __future__ import annotations


def fits_window(longest: int | None, window: int | None) -> bool:
    """Whether a task's longest text of `longest` tokens is read by a window of `window` tokens alone; False where either is not known."""
    return bool(longest and window and longest <= window)


def text_in_window(longest: int, window: int, whose: str = "Its") -> str:
    """What is said of such a task."""
    return (
        f"{whose} longest text ({longest:,} tokens) fits into the window ({window:,}), which alone reads it: this says nothing of states."
    )
