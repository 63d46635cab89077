"""Beginnings of texts whose keys and values are still in blocks, found by what they hold.

Only tokens that were read where all heads are softmax attention: keys and values of upper layers depend on the level that the layers
below were read at, and a text at a level above 0 also needs states, which are not kept here.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b


def extend_keys(keys: list[bytes], tokens: list[int], block_size: int) -> None:
    """Bring the keys of a text's whole blocks up to its present `tokens`. A key stands for a block and all that comes before it."""
    for start in range(len(keys) * block_size, len(tokens) - block_size + 1, block_size):
        before = keys[-1] if keys else b""
        keys.append(blake2b(before + array("q", tokens[start : start + block_size]).tobytes(), digest_size=32).digest())


@dataclass(eq=False)
class Column:
    """The blocks of all groups for the same whole block of tokens.

    blocks: one of each group. users: texts that hold each of them: a raised one has given those of its first groups back.
    """

    key: bytes
    blocks: list[int]
    users: list[int]


class Prefixes:
    """Columns by key. Those that no text uses are idle: their blocks are as good as free, those used least recently first."""

    def __init__(self) -> None:
        self._columns: dict[bytes, Column] = {}
        self._idle: OrderedDict[bytes, Column] = OrderedDict()

    @property
    def idle_blocks(self) -> int:
        # Of one pool: all columns have as many blocks.
        return len(self._idle) * len(next(iter(self._idle.values())).blocks) if self._idle else 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._columns

    def find(self, keys: list[bytes]) -> list[Column]:
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

    def add(self, key: bytes, blocks: list[int]) -> Column:
        """Blocks of one text hold this."""
        self._columns[key] = column = Column(key, blocks, [1] * len(blocks))
        return column

    def join(self, column: Column) -> None:
        """One more text uses all of a column."""
        self._idle.pop(column.key, None)
        column.users = [users + 1 for users in column.users]

    def leave(self, column: Column, first: int, until: int) -> list[int]:
        """A text no longer uses the blocks of these groups; those of them that are free now."""
        for group in range(first, until):
            column.users[group] -= 1
        if self._columns.get(column.key) is column:
            if not any(column.users):
                self._idle[column.key] = column
            return []
        return [column.blocks[group] for group in range(first, until) if not column.users[group]]

    def forget(self, column: Column) -> None:
        """Never find a column again; texts that use it go on."""
        if self._columns.get(column.key) is column:
            del self._columns[column.key]

    def evict(self) -> list[int]:
        """The blocks of the idle column that was used least recently."""
        key, column = self._idle.popitem(last=False)
        del self._columns[key]
        return column.blocks
