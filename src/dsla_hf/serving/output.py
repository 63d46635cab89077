"""Output that may be lost: a server whose log cannot be written, on a full disk or into a closed pipe, goes on answering."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class LossyStream:
    """A text stream whose writes do not fail: what cannot be written is lost, and later writes are tried again."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lossy_output() -> Iterator[None]:
    """Within it neither `print` nor logs nor progress bars fail for want of a place to write to."""
    before: tuple[Any, Any] = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (None if stream is None else LossyStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
