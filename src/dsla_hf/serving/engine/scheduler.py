"""Who waits, who runs, and whose prompt is read next."""

from __future__ import annotations

from collections import deque

from .request import Request


class QueueFull(RuntimeError):
    """Too many requests wait."""


class Scheduler:
    """A queue in order of arrival, and the slots of running texts.

    Args:
        num_slots: texts that run at a time.
        max_waiting: requests that may wait; more are refused.
    """

    def __init__(self, num_slots: int, max_waiting: int):
        self.slots: list[Request | None] = [None] * num_slots
        self.waiting: deque[Request] = deque()
        self.max_waiting = max_waiting

    @property
    def running(self) -> list[Request]:
        """In order of their slots."""
        return [request for request in self.slots if request is not None]

    def free_slot(self) -> int | None:
        """The lowest: a batch spans the slots up to its highest."""
        return next((slot for slot, request in enumerate(self.slots) if request is None), None)

    def place(self, request: Request, slot: int) -> None:
        """The first in the queue begins to run."""
        # In this order: whoever looks on from another thread finds it in one place or the other.
        self.slots[slot], request.slot = request, slot
        self.waiting.popleft()

    def remove(self, request: Request) -> None:
        """A request has ended, wherever it is."""
        if request.slot is not None:
            self.slots[request.slot] = None
            request.slot = None
        elif request in self.waiting:
            self.waiting.remove(request)

    def to_read(self) -> list[Request]:
        """Running texts whose prompts are not read yet, oldest first."""
        return sorted((request for request in self.running if not request.decoding), key=lambda request: request.number)

    @property
    def generates(self) -> bool:
        """Whether any running text waits for its next token."""
        return any(request is not None and request.decoding for request in self.slots)

    def decoding(self) -> dict[int, list[Request]]:
        """Level -> running texts that wait for their next token."""
        cohorts: dict[int, list[Request]] = {}
        for request in self.running:
            if request.decoding:
                cohorts.setdefault(request.level, []).append(request)
        return cohorts
