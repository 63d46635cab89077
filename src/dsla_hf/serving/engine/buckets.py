"""How many of the measured values were of which size, counted where there is no time for more."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator

# Seconds between two tokens of a text.
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2, 5, 10)


class Buckets:
    """Counts of values by size. One thread adds, others may read: what they see may lack the newest.

    Args:
        limits: rising; a bucket holds the values up to its limit, the last one all that are larger.
    """

    def __init__(self, limits: tuple[float, ...]):
        self.limits = limits
        self.counts = [0] * (len(limits) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.limits, value)] += 1
        self.sum += value

    def cumulated(self) -> Iterator[tuple[float, int]]:
        """(limit, how many values are not above it), the last limit being infinite."""
        total = 0
        for limit, count in zip((*self.limits, math.inf), list(self.counts), strict=True):
            total += count
            yield limit, total
