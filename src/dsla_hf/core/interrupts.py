"""What an interrupted command says: one line of what is kept, carried by the KeyboardInterrupt to the command line, which prints it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_interrupt(kept: Callable[[], str]) -> Iterator[None]:
    """Within it a KeyboardInterrupt without words (Ctrl-C, or a signal that the command line turns into one) leaves with those of `kept`:
    what is there after the interrupt, and how to go on. The innermost block speaks. The kind of the exception stays.

    Args:
        kept: called when the interrupt comes; may look at the disk.

    Raises:
        KeyboardInterrupt: with the line as its only argument.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if interrupt.args:
            raise
        raise type(interrupt)(kept()) from None
