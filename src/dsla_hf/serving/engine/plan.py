"""What the process that decides tells the others about a step, where several hold parts of one model."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

from ...inference.sampling import Sampling
from .request import Request

ROOM = 4096  # bytes that are sent at once, which hold most plans
COUNT_BYTES = 8
LONGEST_WAIT = timedelta(days=1)  # for the next plan: a step compiles for minutes, and one that hangs is the watchdog's


@dataclass(frozen=True)
class Arrival:
    """What the others must know of a new text; see `Request`."""

    number: int
    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    arrived: float
    pinned: int | None
    stop_strings: bool

    @classmethod
    def of(cls, request: Request) -> Arrival:
        return cls(**{name: getattr(request, name) for name in cls.__dataclass_fields__})

    def request(self) -> Request:
        """The same text, of which nobody hears here."""
        return Request(listener=lambda event: None, **vars(self))


@dataclass(frozen=True)
class Plan:
    """What a step is to do beyond what follows from the texts themselves.

    now: seconds of the first process's clock. arrived: new texts. ended: (number, finish) of texts that are given up. level, reason: to
    go to. owes: prompts wait until texts have been generated for as long as prompts took. over: there are no more steps.
    """

    now: float = 0.0
    arrived: tuple[Arrival, ...] = ()
    ended: tuple[tuple[int, str], ...] = ()
    level: int = 0
    reason: str = ""
    owes: bool = False
    over: bool = False


class OneProcess:
    """A model that is whole in this process: nobody is told anything."""

    size = 1
    first = True

    def tell(self, what: Any = None) -> Any:
        """What the first process tells all, in each of them."""
        return what

    def least(self, *values: int) -> tuple[int, ...]:
        """The least that any process has of each."""
        return values


class SharedProcesses(OneProcess):
    """The processes that hold parts of a model, all of torch.distributed's: the first decides, the others do the same.

    Plans go between CPUs, beside what the model's layers exchange.
    """

    def __init__(self) -> None:
        self.size = distributed.get_world_size()
        self.first = distributed.get_rank() == 0
        self._group = distributed.new_group(backend="gloo", timeout=LONGEST_WAIT)

    def tell(self, what: Any = None) -> Any:
        """What the first process tells all, in each of them.

        Raises:
            RuntimeError: if another process is gone.
        """
        payload = pickle.dumps(what) if self.first else b""
        head = torch.zeros(ROOM, dtype=torch.uint8)
        if self.first:
            _put(head, len(payload).to_bytes(COUNT_BYTES, "little") + payload[: ROOM - COUNT_BYTES])
        distributed.broadcast(head, 0, group=self._group)
        if self.first:
            rest = len(payload) - (ROOM - COUNT_BYTES)
        else:
            count = int.from_bytes(_bytes(head[:COUNT_BYTES]), "little")
            payload, rest = _bytes(head[COUNT_BYTES : COUNT_BYTES + count]), count - (ROOM - COUNT_BYTES)
        if rest > 0:
            more = torch.zeros(rest, dtype=torch.uint8)
            if self.first:
                _put(more, payload[-rest:])
            distributed.broadcast(more, 0, group=self._group)
            payload = payload if self.first else payload + _bytes(more)
        return what if self.first else pickle.loads(payload)

    def least(self, *values: int) -> tuple[int, ...]:
        """The least that any process has of each."""
        found = torch.tensor(values)
        distributed.all_reduce(found, distributed.ReduceOp.MIN, group=self._group)
        return tuple(found.tolist())


def _put(room: Tensor, content: bytes) -> None:
    room[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _bytes(content: Tensor) -> bytes:
    return content.numpy().tobytes()
