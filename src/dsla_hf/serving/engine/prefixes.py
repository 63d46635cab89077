"""Beginnings of texts whose keys and values are still in blocks, found by what they hold and by the levels it was read at."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

# (first token, level) of each part of a text that was read at one level, in their order: keys and values of upper layers depend on it.
History = tuple[tuple[int, int], ...]


class Key(NamedTuple):
    """What lies in the blocks of a whole block of tokens.

    tokens: hash of these tokens, of all that come before them, and of the weights that read them. history: the levels all of them were
        read at. level: that a text must have to go on behind them, for its kept heads are those that have blocks.
    """

    tokens: bytes
    history: History
    level: int


def extend_keys(keys: list[bytes], tokens: list[int], block_size: int, root: bytes = b"") -> None:
    """Bring the hashes of a text's whole blocks up to its present `tokens`. Each stands for a block and all that comes before it; `root`
    for what reads them."""
    for start in range(len(keys) * block_size, len(tokens) - block_size + 1, block_size):
        before = keys[-1] if keys else root
        keys.append(blake2b(before + array("q", tokens[start : start + block_size]).tobytes(), digest_size=32).digest())


def history_until(history: History, end: int) -> History:
    """Of the first `end` tokens."""
    return history if history[-1][0] < end or len(history) == 1 else tuple(part for part in history if part[0] < end)


def keys_of(hashes: Iterable[bytes], history: History, level: int, block_size: int, start: int = 0) -> Iterator[Key]:
    """Of whole blocks, the first of which is the text's block `start`."""
    for place, tokens in enumerate(hashes, start + 1):
        yield Key(tokens, history_until(history, place * block_size), level)


@dataclass(eq=False)
class Column:
    """The blocks of the groups from `first` on for the same whole block of tokens.

    blocks: one of each group. users: texts that hold each of them: a raised one has given those of its first groups back.
    """

    key: Key
    first: int
    blocks: list[int]
    users: list[int]


class Prefixes:
    """Columns by key. Those that no text uses are idle: their blocks are as good as free, those used least recently first."""

    def __init__(self) -> None:
        self._columns: dict[Key, Column] = {}
        self._idle: OrderedDict[Key, Column] = OrderedDict()
        self.idle_blocks = 0

    def __contains__(self, key: Key) -> bool:
        return key in self._columns

    def find(self, keys: Iterable[Key]) -> list[Column]:
        """The columns of the longest beginning that is here; those that are idle count as just used."""
        found = []
        for key in keys:
            if (column := self._columns.get(key)) is None:
                break
            found.append(column)
        for column in reversed(found):  # the end of a text goes before its beginning, without which it is never found
            if column.key in self._idle:
                self._idle.move_to_end(column.key)
        return found

    def blocks_in_use(self, columns: list[Column]) -> int:
        """Blocks of these that some text holds: one more that joins needs none for them."""
        return sum(len(column.blocks) for column in columns if column.key not in self._idle)

    def add(self, key: Key, first: int, blocks: list[int]) -> Column:
        """Blocks of one text hold this."""
        self._columns[key] = column = Column(key, first, blocks, [1] * len(blocks))
        return column

    def join(self, column: Column) -> None:
        """One more text uses all of a column."""
        if self._idle.pop(column.key, None) is not None:
            self.idle_blocks -= len(column.blocks)
        column.users = [users + 1 for users in column.users]

    def leave(self, column: Column, first: int, until: int) -> list[int]:
        """A text no longer uses the blocks of these groups; those of them that are free now."""
        groups = range(first - column.first, until - column.first)
        for group in groups:
            column.users[group] -= 1
        if self._columns.get(column.key) is column:
            if not any(column.users):
                self._idle[column.key] = column
                self.idle_blocks += len(column.blocks)
            return []
        return [column.blocks[group] for group in groups if not column.users[group]]

    def forget(self, column: Column) -> None:
        """Never find a column again; texts that use it go on."""
        if self._columns.get(column.key) is column:
            del self._columns[column.key]

    def find_raised(self, column: Column, key: Key, first: int) -> None:
        """A forgotten column is found again, by another key, as the blocks of groups from `first` on, if all texts have given the others
        back, and there is no such column yet."""
        gone = first - column.first
        if key in self._columns or self._columns.get(column.key) is column or any(column.users[:gone]):
            return
        column.key, column.first, column.blocks, column.users = key, first, column.blocks[gone:], column.users[gone:]
        self._columns[key] = column

    def evict(self) -> list[int]:
        """The blocks of the idle column that was used least recently."""
        key, column = self._idle.popitem(last=False)
        self.idle_blocks -= len(column.blocks)
        del self._columns[key]
        return column.blocks
