"""Texts that begin as others did go on from what these have left: whole blocks of keys and values, and above level 0 a snapshot of states.

Blocks are found wherever texts part. States cannot be taken back, so they are kept where somebody will want them: where the last piece of a
prompt begins and ends, where a text ends, and where it parts from others that wait, run or were read.
"""

from __future__ import annotations

import itertools
import logging
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...inference.batching import out_of_memory
from .pool import OutOfBlocks
from .prefixes import Column, History, extend_keys, keys_of
from .request import Request
from .slots import SlotMemory
from .snapshots import Snapshot, Snapshots

logger = logging.getLogger(__name__)

REMEMBERED_BLOCKS = 2**16  # that were read, so that it is seen where a text parts from them


@dataclass
class Match:
    """What a text can begin with: `tokens` of its first ones, read with this `history`, whose kept heads are those of `level`."""

    tokens: int = 0
    columns: list[Column] = field(default_factory=list)
    snapshot: Snapshot | None = None
    history: History = ((0, 0),)
    level: int = 0


class PrefixReuse:
    """What running texts leave for others, and what these begin with.

    Args:
        memory: of all texts.
        budget: bytes for snapshots; 0: levels with states share nothing.
        lower: whether a text may go on from what was read at lower levels, folded as a raise does; otherwise only from what was read at its
            own. Such a text is that of a raise in its prompt.

    Attributes:
        hits: texts that began with something, by what: "blocks", "snapshot", or "lower".
    """

    def __init__(self, memory: SlotMemory, budget: int, lower: bool = False):
        self.memory, self.lower = memory, lower
        self.snapshots = Snapshots(budget)
        self.size, self.window = memory.pool.block_size, memory.levels.window
        self.hits = {"blocks": 0, "snapshot": 0, "lower": 0}
        self._here: dict[bytes, int] = {}  # of blocks of prompts that wait or run, in how many
        self._read: OrderedDict[bytes, None] = OrderedDict()  # blocks that were, those of long ago first

    # --- texts come and go ------------------------------------------------------------------------------------------

    def arrived(self, request: Request) -> None:
        """A text waits."""
        self._extend(request, request.prompt)
        if self.snapshots.budget:
            for key in request.keys:
                self._here[key] = self._here.get(key, 0) + 1

    def gone(self, request: Request) -> None:
        """It has ended; `arrived` was told of it."""
        if not self.snapshots.budget:
            return
        for key in request.keys[: len(request.prompt) // self.size]:
            if self._here[key] == 1:
                del self._here[key]
            else:
                self._here[key] -= 1

    def forget(self) -> None:
        """Find nothing of what was read until now. No text runs."""
        self.memory.pool.forget_idle()
        self.snapshots.clear()
        self._read.clear()

    # --- what a text begins with --------------------------------------------------------------------------------------

    def match(self, request: Request, level: int, lower: bool = False) -> Match:
        """The most that a text can begin with at a level; at least its last token is to be read, for its logits. lower: of lower levels
        too, where that is allowed."""
        if request.scores_prompt:
            return Match()
        found = self._at_level(request, ((0, level),), level)
        if lower and self.lower and level and self.memory.levels.lowest == 0:
            of_states = (x for x in self._snapshots(request) if all(read <= level for _, read in x.history) and x.level <= level)
            longest = next((match for x in of_states if (match := self._of_snapshot(request, x)).tokens), Match())
            found = max(found, longest, self._at_level(request, ((0, 0),), 0), key=lambda match: match.tokens)
        return found

    def begin(self, request: Request, match: Match) -> None:
        """A text in a slot, which has read nothing, begins with a match of its level or a lower one, if it has not begun with as much. It
        may have its columns already."""
        if match.tokens <= request.cached or request.slot is None:
            return
        same = match.level == request.level
        if same:
            self.memory.pool.reuse(request.slot, match.columns)
            self._put_snapshot(request.slot, match)
            request.history = match.history
        elif self._begin_lower(request, match):
            request.history = (*match.history, (match.tokens, request.level))
        else:
            return
        request.cached = request.given = match.tokens
        request.published = len(match.columns) if same else 0
        if match.snapshot is not None:
            self.snapshots.used_now(match.snapshot)
        if not request.tokens:
            request.reused = match.tokens

    def leave(self, request: Request, level: int) -> None:
        """A text that has read nothing yet, and is about to be raised, no longer begins with what others have left: these go on, and it is
        read at one level. It stays as it is where memory has no room for that."""
        slot, memory = request.slot, self.memory
        assert slot is not None
        columns = memory.pool.columns_of(slot)
        memory.release(slot)
        try:
            memory.allocate(slot, request.most_tokens, level)
        except OutOfBlocks:
            memory.allocate(slot, request.most_tokens, request.level, columns)
            return
        request.cached = request.given = request.reused = request.published = 0

    def count(self, request: Request) -> None:
        """A text that begins with something has been read from there on."""
        lower = any(level != request.level for _, level in request.history)
        self.hits["lower" if lower else "snapshot" if request.level else "blocks"] += 1

    # --- what a text leaves -------------------------------------------------------------------------------------------

    def piece(self, request: Request, tokens: int) -> tuple[int, bool]:
        """Of a piece of so many tokens those up to the first place where the text parts from others, if there is one, and whether states
        are to be kept behind them. That is behind whole windows, so that what follows is read as without a stop."""
        if self._leaves_states(request):
            end, step = request.cached + tokens, self.window or self.size
            most = len(request.prompt) // self.size
            for blocks in range(request.cached // self.size + 1, min((end + step - 1) // self.size, most) + 1):
                stop = blocks * self.size // step * step
                if request.cached < stop <= end and self._part_behind(request, blocks):
                    return stop - request.cached, True
        return tokens, False

    def publish(self, request: Request) -> None:
        """Let others find the whole blocks of what is cached of a text."""
        if not self._leaves(request):
            return
        assert request.slot is not None
        whole, first = request.cached // self.size, request.published
        if first >= whole:
            return
        self._extend(request, request.text)
        new = request.keys[first:whole]
        self.memory.pool.publish(request.slot, first, keys_of(new, request.history, request.level, self.size, first))
        request.published = whole
        if self.snapshots.budget:
            for key in new:
                self._read[key] = None
                self._read.move_to_end(key)
            while len(self._read) > REMEMBERED_BLOCKS:
                self._read.popitem(last=False)

    def keep(self, request: Request) -> None:
        """Keep states of a text as it is, for texts that go on from here, and let its blocks be found."""
        self.publish(request)
        tokens, slot, level, pool = request.cached, request.slot, request.level, self.memory.pool
        if slot is None or not self._leaves_states(request) or tokens < max(self.window, self.size):
            return
        blocks = tokens // self.size
        block, tail = self._behind(request, blocks), tuple(request.text[blocks * self.size : tokens])
        if self.snapshots.has(block, tail, request.history, level):
            return
        size = self.memory.state_bytes(level) + pool.part_bytes(pool.num_groups - self.memory.levels.rung(level), tokens)

        def copy() -> Snapshot:
            states = self.memory.copy_states(slot, level)
            return Snapshot(block, tail, tokens, request.history, level, states, *pool.part_of_block(slot, tokens), size)

        try:
            self.snapshots.add(size, copy)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            logger.warning("memory does not suffice for snapshots of states: the %d bytes of them are given back", self.snapshots.used)
            self.snapshots.clear()

    # --- within -------------------------------------------------------------------------------------------------------

    def _at_level(self, request: Request, history: History, level: int) -> Match:
        """What was read at one level alone."""
        if level:
            if self.snapshots.budget:
                for snapshot in self._snapshots(request):
                    if snapshot.history == history and (match := self._of_snapshot(request, snapshot)).tokens:
                        return match
            return Match()
        hashes = itertools.islice(request.keys, (request.length - 1) // self.size)
        columns = self.memory.pool.prefixes.find(keys_of(hashes, history, level, self.size))
        return Match(len(columns) * self.size, columns, None, history, level)

    def _snapshots(self, request: Request) -> Iterator[Snapshot]:
        """Those that a text begins with, the longest first."""
        text, most = request.text, request.length - 1
        for blocks in range(min(most // self.size, len(request.keys)), -1, -1):
            yield from self.snapshots.behind(self._behind(request, blocks), text, blocks * self.size, most)

    def _of_snapshot(self, request: Request, snapshot: Snapshot) -> Match:
        """A snapshot with the columns before it; nothing if these are gone, and then it is of no use."""
        blocks, pool = snapshot.tokens // self.size, self.memory.pool
        columns: list[Column] = []
        if self.memory.levels.rung(snapshot.level) < pool.num_groups:  # else there are none
            hashes = itertools.islice(request.keys, blocks)
            columns = pool.prefixes.find(keys_of(hashes, snapshot.history, snapshot.level, self.size))
            if len(columns) < blocks:
                self.snapshots.drop(snapshot)
                return Match()
        return Match(snapshot.tokens, columns, snapshot, snapshot.history, snapshot.level)

    def _put_snapshot(self, slot: int, match: Match) -> None:
        if (snapshot := match.snapshot) is not None:
            self.memory.put_states(slot, match.level, snapshot.states)
            if snapshot.tail:
                self.memory.pool.put_part_of_block(slot, match.tokens, snapshot.keys, snapshot.values)

    def _begin_lower(self, request: Request, match: Match) -> bool:
        """Copy what was read at a lower level into blocks of the text's own, and raise it; whether there were enough of them."""
        slot, pool, memory = request.slot, self.memory.pool, self.memory
        assert slot is not None
        for column in match.columns:  # so that they are not evicted for the copies
            pool.prefixes.join(column)
        memory.release(slot)
        try:
            memory.allocate(slot, request.most_tokens, match.level)
            pool.put_columns(slot, match.columns)
            self._put_snapshot(slot, match)
            memory.fold([slot], [match.tokens], match.level, request.level)
            return True
        except RuntimeError as error:
            if not (isinstance(error, OutOfBlocks) or out_of_memory(error)):
                raise
            memory.release(slot)
            memory.allocate(slot, request.most_tokens, request.level)
            return False
        finally:
            for column in match.columns:
                pool.leave(column)

    def _part_behind(self, request: Request, blocks: int) -> bool:
        """Whether some text goes on otherwise than this one behind so many of its prompt's whole blocks: one that is here, or was read."""
        key = request.keys[blocks - 1]
        following = request.keys[blocks] if blocks < len(request.prompt) // self.size else None
        if self._here[key] > 1 and (following is None or self._here[following] < self._here[key]):
            return True
        return key in self._read and (following is None or following not in self._read)

    def _leaves(self, request: Request) -> bool:
        """Whether others can begin with a text."""
        if request.slot is None or (request.level and not self.snapshots.budget):
            return False
        return self.lower or request.history == ((0, request.level),)

    def _leaves_states(self, request: Request) -> bool:
        return request.level > 0 and self._leaves(request)

    def _extend(self, request: Request, tokens: list[int]) -> None:
        extend_keys(request.keys, tokens, self.size, b"" if request.keys else self._root())

    def _behind(self, request: Request, blocks: int) -> bytes:
        """The hash of so many whole blocks of a text."""
        return request.keys[blocks - 1] if blocks else self._root()

    def _root(self) -> bytes:
        return self.memory.levels.identity()
