"""A mean over the last seconds, at a cost that does not grow with what was measured in them."""

from __future__ import annotations

import threading
from collections import deque


class RecentMean:
    """The mean of what was measured in the last `seconds`, of `most` values at most. Threads may read and write it."""

    def __init__(self, seconds: float, most: int):
        self.seconds, self.most = seconds, most
        self._lock = threading.Lock()
        self._values: deque[tuple[float, float]] = deque()  # (when, value)
        self._sum = 0.0

    def add(self, now: float, value: float) -> None:
        with self._lock:
            self._values.append((now, value))
            self._sum += value
            self._drop(now)

    def mean(self, now: float) -> float | None:
        """None if nothing was measured."""
        with self._lock:
            self._drop(now)
            return self._sum / len(self._values) if self._values else None

    def clear(self) -> None:
        with self._lock:
            self._values.clear()
            self._sum = 0.0

    def _drop(self, now: float) -> None:
        while self._values and (self._values[0][0] < now - self.seconds or len(self._values) > self.most):
            self._sum -= self._values.popleft()[1]
        if not self._values:
            self._sum = 0.0  # and nothing of rounding
