"""Requests of which a step reads several tokens, and which of them are read together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

# Requests are read together while the shortest of them has at least 1 / PADDING of the tokens of the longest.
PADDING = 2


class Prefill(NamedTuple):
    """A request, where the host knows it: tokens `start` to `end` of the step, after `seen` others."""

    start: int
    end: int
    seen: int


def alike(prefills: Sequence[Prefill]) -> list[slice]:
    """Requests that are read together: one behind the other, of like lengths, all from their first token on or none."""
    found: list[slice] = []
    for i, prefill in enumerate(prefills):
        if found:
            group = prefills[found[-1].start : i]
            lengths = [each.end - each.start for each in (*group, prefill)]
            if max(lengths) <= PADDING * min(lengths) and bool(group[0].seen) == bool(prefill.seen):
                found[-1] = slice(found[-1].start, i + 1)
                continue
        found.append(slice(i, i + 1))
    return found
