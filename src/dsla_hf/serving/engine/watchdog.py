"""Notices a step that does not end: a thread that hangs in a kernel or a driver is alive, and no error comes of it."""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

LOOKS = 4  # in the time that a step may take; at least one a second


class Watchdog:
    """Looks from a thread of its own at the steps of another one.

    Args:
        seconds: that a step may take; 0: any number.
        preparing: whether something is compiled or recorded now, which takes its time: the time of a step begins anew behind it.
        clock: in seconds.
    """

    def __init__(self, seconds: float, preparing: Callable[[], bool], clock: Callable[[], float]):
        self.seconds, self.preparing, self.clock = seconds, preparing, clock
        self._began: float | None = None  # the step that runs
        self._said = False  # of that step
        self._steps: int | None = None  # the thread that steps
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around a step, in the thread that does it."""
        self._steps, self._began = threading.get_ident(), self.clock()
        try:
            yield
        finally:
            if self._said:
                logger.warning("the step that took so long has ended, after %.0f s", self.elapsed)
            self._began, self._said = None, False

    @property
    def elapsed(self) -> float:
        """Seconds that the step which runs has taken; 0 between two, and while something is prepared."""
        if self._began is None:
            return 0.0
        if self.preparing():
            self._began = self.clock()
        began = self._began
        return 0.0 if began is None else max(self.clock() - began, 0.0)

    @property
    def problem(self) -> str | None:
        """What hangs, None if nothing does."""
        elapsed = self.elapsed
        if not self.seconds or elapsed < self.seconds:
            return None
        return f"a step of the engine has not ended for {elapsed:.0f} s (--step-timeout {self.seconds:g}): the server hangs"

    def start(self) -> None:
        if self.seconds:
            self._thread = threading.Thread(target=self._look, name="dsla-watchdog", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _look(self) -> None:
        while not self._ended.wait(min(self.seconds / LOOKS, 1.0)):
            if (problem := self.problem) is not None and not self._said:
                self._said = True
                frame = None if self._steps is None else sys._current_frames().get(self._steps)
                where = "" if frame is None else "".join(traceback.format_stack(frame)[-8:])
                logger.error("%s; it is at\n%s", problem, where)
