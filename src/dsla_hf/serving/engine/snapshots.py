"""States of beginnings of texts, so that texts that begin alike go on from them: copies within a budget of bytes, the oldest go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...core.past import DualState
from .prefixes import History


@dataclass(eq=False)
class Snapshot:
    """What a text remembers behind its first `tokens`, beside the columns of its whole blocks.

    block: hash of its last whole block, see `extend_keys`. tail: the tokens behind that. history, level: as of a `Key`.
    states: of each layer with heads that are DSLA. keys, values: of the kept heads of the tail, `[groups, len(tail), C, D]`.
    size: bytes.
    """

    block: bytes
    tail: tuple[int, ...]
    tokens: int
    history: History
    level: int
    states: list[DualState]
    keys: Tensor
    values: Tensor
    size: int

    @property
    def name(self) -> tuple[object, ...]:
        """Two of the same name hold the same."""
        return self.block, self.tail, self.history, self.level


class Snapshots:
    """Snapshots by the text before them.

    budget: bytes that they may take. used: that they take. taken, evicted: counts.
    """

    def __init__(self, budget: int):
        self.budget, self.used = budget, 0
        self.taken = self.evicted = 0
        self._by_name: OrderedDict[tuple[object, ...], Snapshot] = OrderedDict()  # used least recently first
        self._behind: dict[bytes, list[Snapshot]] = {}  # by block

    def __len__(self) -> int:
        return len(self._by_name)

    def figures(self) -> dict[str, int]:
        """For pages and metrics."""
        return {"kept": len(self), "bytes": self.used, "budget": self.budget, "taken": self.taken, "evicted": self.evicted}

    def has(self, block: bytes, tail: tuple[int, ...], history: History, level: int) -> bool:
        """Whether there is one; it counts as just used."""
        if (name := (block, tail, history, level)) not in self._by_name:
            return False
        self._by_name.move_to_end(name)
        return True

    def add(self, size: int, make: Callable[[], Snapshot]) -> None:
        """Keep what `make` gives, of so many bytes, which is no more than the budget, and of the others as many as fit beside it."""
        while self.used + size > self.budget:
            self.drop(next(iter(self._by_name.values())))
            self.evicted += 1
        snapshot = make()
        self._by_name[snapshot.name] = snapshot
        self._behind.setdefault(snapshot.block, []).append(snapshot)
        self.used += snapshot.size
        self.taken += 1

    def behind(self, block: bytes, text: list[int], start: int, most: int) -> list[Snapshot]:
        """Those behind a block whose tails are what `text` has from `start` on, within its first `most` tokens; the longest first."""
        here = self._behind.get(block, ())
        fitting = [x for x in here if x.tokens <= most and list(x.tail) == text[start : x.tokens]]
        return sorted(fitting, key=lambda snapshot: -snapshot.tokens)

    def used_now(self, snapshot: Snapshot) -> None:
        """It goes last."""
        self._by_name.move_to_end(snapshot.name)

    def drop(self, snapshot: Snapshot) -> None:
        """Forget one."""
        del self._by_name[snapshot.name]
        others = self._behind[snapshot.block]
        others.remove(snapshot)
        if not others:
            del self._behind[snapshot.block]
        self.used -= snapshot.size

    def clear(self) -> None:
        """Forget all, and give back their memory."""
        self._by_name.clear()
        self._behind.clear()
        self.used = 0
