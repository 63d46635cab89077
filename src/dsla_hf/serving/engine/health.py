"""Whether an engine works: what failed in a row, and errors after which nothing on the device works any more."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger(__name__)

FAILURES = 3  # of the same work, in a row, from which on an engine is unhealthy
LONGEST_REASON = 200  # characters
# What CUDA says of errors that stay with the process (sticky): every later call fails as well, and only a new process helps.
STICKY = (
    "an illegal memory access was encountered",
    "an illegal instruction was encountered",
    "device-side assert triggered",
    "misaligned address",
    "unspecified launch failure",
    "the launch timed out and was terminated",
    "operation not supported on global/shared address space",
    "invalid program counter",
    "hardware stack error",
    "uncorrectable ecc error encountered",
    "uncorrectable nvlink error detected",
    "context is destroyed",
)
DEVICES = ("cuda", "hip")  # one of them is in such a message, of torch as of Triton


def is_sticky(error: BaseException) -> bool:
    """Whether nothing on the device works any more after this error, or the one that it came of."""
    text = str(error).lower()
    if any(device in text for device in DEVICES) and any(words in text for words in STICKY):
        return True
    cause = error.__cause__ or error.__context__
    return cause is not None and is_sticky(cause)


class Health:
    """Failures of an engine's work, by kind ("prefill", "decode", "step"): a success of one says nothing of the others.

    Attributes:
        failed_steps: so many failed since the start. over: set when the engine cannot go on, and everyone has been told.
    """

    def __init__(self) -> None:
        self.failed_steps = 0
        self.over = threading.Event()
        self._in_a_row: dict[str, int] = {}
        self._reasons: dict[str, str] = {}
        self._fatal: str | None = None

    def succeeded(self, work: str) -> None:
        if self._in_a_row.pop(work, 0) >= FAILURES:
            logger.info("%s works again", work)

    def failed(self, work: str, error: Exception) -> None:
        """Count a failure; one that is sticky is the end."""
        self.failed_steps += 1
        self._in_a_row[work] = count = self._in_a_row.get(work, 0) + 1
        self._reasons[work] = _in_short(error)
        if is_sticky(error):
            self.end(error)
        elif count == FAILURES:
            logger.error("%s failed %d times in a row: the server is unhealthy until it works again", work, count)

    def end(self, error: BaseException) -> None:
        """Nothing can be served any more."""
        if self._fatal is None:
            self._fatal = f"the engine has ended, start the server anew: {_in_short(error)}"
            logger.critical(self._fatal)

    @property
    def fatal(self) -> bool:
        """Whether only a new process can serve."""
        return self._fatal is not None

    @property
    def problem(self) -> str | None:
        """Why requests are not served, None while they are."""
        if self._fatal is not None:
            return self._fatal
        worst = max(list(self._in_a_row.items()), key=lambda item: item[1], default=("", 0))
        return f"{worst[0]} failed {worst[1]} times in a row: {self._reasons[worst[0]]}" if worst[1] >= FAILURES else None


def _in_short(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:LONGEST_REASON].rstrip(": ")
