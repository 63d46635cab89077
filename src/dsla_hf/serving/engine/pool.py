"""Keys and values of heads that are softmax attention, in blocks that all of them and all texts share.

Heads lie in groups: those that become DSLA together, and those that never do. A block holds some tokens of one group of one text. What
becomes DSLA gives its blocks back, and any group of any text can have them next: that is how a raised level makes room for newcomers.

Shape legend: N blocks, P tokens in a block, C columns (heads) of a block, G groups, S slots (places of running texts), B rows of a call,
H heads of a layer, T new tokens, L past tokens.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from dsla_kernels import append
from dsla_kernels.narrow import bits, stored

from .prefixes import Column, Key, Prefixes


@dataclass(frozen=True)
class Rows:
    """Which slots a model call works on, and how much of their texts it has already read.

    slots: a run of slots, so that per-slot tensors are read and written in place; or int64 `[B]`, which a recorded call reads.
    active: bool `[B]`, rows that take part, or `[B, T]`, tokens that do; the others are padding, of no effect on their slots.
    lengths: int64 `[B]`, tokens in the cache; 0 where not active.
    past: L, the longest of them; 0 where keys and values are read in their blocks.
    seen: what every entry of `lengths` is, where the host knows it; 0: texts begin, and what their slots hold is of others.
    whole_windows: whether every entry of `lengths` is a multiple of the window's size of DSLA layers, and not 0.
    in_blocks: whether attention reads keys and values in their blocks, each row to its own end. Otherwise they are copied out.
    begins: whether attention to what `seen` 0 says is there needs no blocks, but the keys and values of the call alone.
    together: whether the call's tokens are one row, in which these rows lie one behind the other.
    """

    slots: slice | Tensor
    active: Tensor
    lengths: Tensor
    past: int
    seen: int | None = None
    whole_windows: bool = False
    in_blocks: bool = False
    begins: bool = False
    together: bool = False


class OutOfBlocks(RuntimeError):
    """The pool has too few free blocks."""


@dataclass(frozen=True)
class HeadPlaces:
    """Where in blocks some KV heads of a layer lie.

    heads: int32 `[H, 2]`, of each its group and its column. group: that of all, where they are the columns of one group in order.
    """

    heads: Tensor
    group: int | None = None

    @property
    def columns(self) -> Tensor:
        """`[H, 1, 1]`, of each head."""
        return self.heads[:, 1].long()[:, None, None]

    def of(self, x: Tensor) -> Tensor:
        """Of x `[G, ...]` what these heads have: `[...]` of their group, or `[H, ...]` of each one's."""
        return x[self.heads[:, 0].long()] if self.group is None else x[self.group]

    def for_attention(self) -> int | Tensor:
        """As `CachedTokens.places` has it."""
        return self.heads if self.group is None else self.group


class BlockPool:
    """`[N * P, C, D]` keys and values, a list of free blocks, and the blocks of each group and slot.

    A text has blocks of the groups from one on: those before it are DSLA. Block 0 belongs to nobody: rows that do not take part write
    there. Texts that begin alike can share whole blocks, see `Prefixes`: nobody writes there, for all tokens in them are cached.

    Args:
        num_blocks: N, block 0 not counted. block_size: P. columns: C.
        num_groups, num_slots, max_tokens: what the tables are made for.
        dtype: that keys and values have for attention. kept_dtype: that they lie in, `torch.float8_e4m3fn` or dtype, if None.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_groups: int,
        num_slots: int,
        max_tokens: int,
        columns: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
        kept_dtype: torch.dtype | None = None,
    ):
        self.dtype = dtype
        self.num_blocks, self.block_size, self.num_groups, self.columns = num_blocks, block_size, num_groups, columns
        tokens = (num_blocks + 1) * block_size
        self.keys, self.values = (torch.zeros(tokens, columns, head_dim, dtype=kept_dtype or dtype, device=device) for _ in range(2))
        self.tables = torch.zeros(num_groups, num_slots, self.blocks_for(max_tokens), dtype=torch.long, device=device)
        self._free = list(range(num_blocks, 0, -1))
        self._owned: dict[int, tuple[int, int, list[int]]] = {}  # slot -> its first group, blocks of a group, and all of them in order
        self.prefixes = Prefixes()
        self._shared: dict[int, dict[int, Column]] = {}  # slot -> of its columns those that others find, by place, rising
        # Of the call that is open, for each group: where all tokens of its rows lie `[G, B, L + T]` (None: attention knows), and the new
        # ones `[G, B, T]`.
        self._index: Tensor | None = None
        self._write: Tensor | None = None
        self._begins = False  # whether its texts begin with its new tokens

    @property
    def free_blocks(self) -> int:
        """Those that hold what a new text could begin with are among them."""
        return len(self._free) + self.prefixes.idle_blocks

    def blocks_for(self, tokens: int) -> int:
        """Blocks that one group needs for so many tokens."""
        return -(-tokens // self.block_size)

    def places(self, heads: list[tuple[int, int]]) -> HeadPlaces:
        """Of KV heads by (group, column)."""
        whole = [(heads[0][0], column) for column in range(self.columns)] if heads else None
        index = torch.tensor(heads, dtype=torch.int32, device=self.tables.device)
        return HeadPlaces(index, heads[0][0] if heads == whole else None)

    def allocate(self, slot: int, tokens: int, first: int, begins: list[Column] | None = None) -> None:
        """Give a slot blocks of all groups from `first` on for a text of `tokens`, which begins with these columns.

        Raises:
            OutOfBlocks: if they are not there; nothing has changed then.
        """
        each, groups, begins = self.blocks_for(tokens), self.num_groups - first, begins or []
        wanted = each * groups
        if (missing := wanted - self.prefixes.blocks_in_use(begins)) > self.free_blocks:
            raise OutOfBlocks(f"{missing} blocks wanted, {self.free_blocks} of {self.num_blocks} are free")
        if not wanted:
            return
        for column in begins:
            self.prefixes.join(column)
        own = each - len(begins)
        blocks = taken = self._take(own * groups)
        if begins:
            self._shared[slot] = dict(enumerate(begins))
            blocks = [
                block
                for group in range(groups)
                for block in (*(column.blocks[group] for column in begins), *taken[group * own : (group + 1) * own])
            ]
        self._owned[slot] = first, each, blocks
        numbers = torch.frombuffer(array("q", blocks), dtype=torch.long)  # of a list PyTorch makes a tensor slowly
        self.tables[first:, slot, :each] = numbers.view(groups, each).to(self.tables.device)  # at once: each copy waits

    def release(self, slot: int, until: int | None = None) -> None:
        """Take back what a slot has of the groups before `until`, or of all."""
        if slot not in self._owned:
            return
        first, each, blocks = self._owned.pop(slot)
        until = self.num_groups if until is None else max(until, first)
        gone = (until - first) * each
        if shared := self._shared.pop(slot, None):
            self._free.extend(block for place, block in enumerate(blocks[:gone]) if place % each not in shared)
            for column in reversed(shared.values()):  # the end of a text is to be evicted before its beginning
                if until < self.num_groups:  # a column without the blocks of some groups is of no use to others
                    self.prefixes.forget(column)
                self._free.extend(self.prefixes.leave(column, first, until))
            if until < self.num_groups:
                self._shared[slot] = shared
        else:
            self._free.extend(blocks[:gone])
        if blocks[gone:]:
            self._owned[slot] = until, each, blocks[gone:]
        self.tables[first:until, slot] = 0

    def publish(self, slot: int, start: int, keys: Iterable[Key]) -> None:
        """Whole blocks of the text in a slot, from place `start` on, have been read and hold what `keys` stand for: others find them."""
        if slot not in self._owned:
            return
        first, each, blocks = self._owned[slot]
        shared = self._shared.setdefault(slot, {})
        for place, key in enumerate(keys, start):
            if place in shared:
                self.prefixes.find_raised(shared[place], key, first)
            elif key not in self.prefixes:
                shared[place] = self.prefixes.add(key, first, blocks[place::each])

    def reuse(self, slot: int, columns: list[Column]) -> None:
        """Let the text in a slot, of which nothing is read, begin with these columns. Those that it begins with already are the first of
        them; the blocks that it had for the others are free."""
        known = len(self._shared.get(slot, ()))
        if len(columns) <= known:
            return
        first, each, blocks = self._owned[slot]
        shared = self._shared.setdefault(slot, {})
        for place, column in enumerate(columns[known:], known):
            self._free.extend(blocks[place::each])
            blocks[place::each] = column.blocks
            self.prefixes.join(column)
            shared[place] = column
        numbers = torch.tensor([column.blocks for column in columns[known:]]).t()
        self.tables[first:, slot, known : len(columns)] = numbers.to(self.tables.device)

    def part_of_block(self, slot: int, tokens: int) -> tuple[Tensor, Tensor]:
        """A copy of keys and values of a slot's text from its last whole block to its first `tokens`, `[groups, tokens % P, C, D]`, as the
        pool has them."""
        blocks, rest = self._block_at(slot, tokens), tokens % self.block_size
        keys, values = (bits(x)[blocks, :rest].view(x.dtype) for x in self._whole_blocks())
        return keys, values

    def put_part_of_block(self, slot: int, tokens: int, keys: Tensor, values: Tensor) -> None:
        """Such keys and values are those of a slot's text: they go into a block that is its own."""
        blocks, rest = self._block_at(slot, tokens), tokens % self.block_size
        for kept, new in zip(self._whole_blocks(), (keys, values), strict=True):
            bits(kept)[blocks, :rest] = bits(new)

    def put_columns(self, slot: int, columns: list[Column]) -> None:
        """Copy what lies in columns into the first blocks of a slot, which are its own; both have the same groups."""
        _, each, blocks = self._owned[slot]
        source = torch.tensor([block for column in columns for block in column.blocks], device=self.tables.device)
        goal = torch.tensor([block for place in range(len(columns)) for block in blocks[place::each]], device=self.tables.device)
        for kept in map(bits, self._whole_blocks()):
            kept[goal] = kept[source]

    def columns_of(self, slot: int) -> list[Column]:
        """Those that the text in a slot shares, or lets others find, in their order."""
        return list(self._shared.get(slot, {}).values())

    def part_bytes(self, groups: int, tokens: int) -> int:
        """Of what `part_of_block` gives of so many groups."""
        return 2 * groups * (tokens % self.block_size) * self.keys[0].numel() * self.keys.element_size()

    def leave(self, column: Column) -> None:
        """Who joined a column without a slot needs it no more."""
        self._free.extend(self.prefixes.leave(column, column.first, self.num_groups))

    def forget_idle(self) -> None:
        """Find nothing of texts that are over."""
        while self.prefixes.idle_blocks:
            self._free.extend(self.prefixes.evict())

    def _whole_blocks(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[N + 1, P, C, D]`, views."""
        return self.keys.unflatten(0, (-1, self.block_size)), self.values.unflatten(0, (-1, self.block_size))

    def _block_at(self, slot: int, tokens: int) -> Tensor:
        """Of each group that a slot has, the block where its token of this number lies."""
        if slot not in self._owned:
            return torch.zeros(0, dtype=torch.long, device=self.tables.device)
        first = self._owned[slot][0]
        return self.tables[first:, slot, tokens // self.block_size]

    def unshare(self, slot: int) -> None:
        """The text in a slot is about to be read anew: give it blocks of its own for those that others use, and let none be found.

        Raises:
            OutOfBlocks: if they are not there; nothing has changed then.
        """
        shared = self._shared.get(slot)
        if not shared:
            return
        first, each, blocks = self._owned[slot]
        places = [place for place, column in shared.items() if column.users[-1] > 1]
        groups = self.num_groups - first
        if (wanted := len(places) * groups) > self.free_blocks:
            raise OutOfBlocks(f"{wanted} blocks wanted, {self.free_blocks} of {self.num_blocks} are free")
        del self._shared[slot]
        for place, column in shared.items():
            if place in places:
                blocks[place::each] = new = self._take(groups)
                self._free.extend(self.prefixes.leave(column, first, self.num_groups))
                self.tables[first:, slot, place] = torch.tensor(new, device=self.tables.device)
            else:
                self.prefixes.forget(column)

    def _take(self, wanted: int) -> list[int]:
        """So many free blocks, which are there; one at least."""
        while len(self._free) < wanted:
            self._free.extend(self.prefixes.evict())
        blocks = self._free[-wanted:]
        del self._free[-wanted:]
        return blocks

    def read(self, places: HeadPlaces, slots: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The first `tokens` keys and values of the texts in slots `[B]`, `[B, T, H, D]`; of a shorter text what follows is anything."""
        position = torch.arange(tokens, device=self.tables.device)
        table = places.of(self.tables)[..., slots, :]
        return self._at(places, table[..., position // self.block_size] * self.block_size + position % self.block_size)

    def read_at(self, places: HeadPlaces, slots: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, T, H, D]` of the tokens `position` `[B, T]` of the texts in slots `[B]`; of those that there are not,
        anything."""
        table = places.of(self.tables)[..., slots, :]
        block = (position // self.block_size).clamp_max(table.shape[-1] - 1).expand(*table.shape[:-1], -1)
        return self._at(places, table.gather(-1, block) * self.block_size + position % self.block_size)

    def beside(self, num_slots: int) -> BlockPool:
        """The same blocks with tables for so many other slots, which own none of them."""
        other = copy.copy(self)
        other.tables = self.tables.new_zeros(self.num_groups, num_slots, self.tables.shape[2])
        other._index = other._write = None
        return other

    def _at(self, places: HeadPlaces, index: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, T, H, D]` at `index`, `[B, T]` of a group or `[H, B, T]`."""
        at = index if places.group is not None else (index, places.columns)
        found = (bits(x)[at].view(x.dtype).to(self.dtype) for x in (self.keys, self.values))
        keys, values = found if places.group is not None else (x.permute(1, 2, 0, 3) for x in found)
        return keys, values

    def open(self, rows: Rows, tokens: int) -> None:
        """The next model call reads `tokens` more of these rows: find their places, once for all layers."""
        past = 0 if rows.in_blocks else rows.past
        position = (rows.lengths[:, None] - past + torch.arange(past + tokens, device=self.tables.device)).clamp_min(0)
        block = (position // self.block_size).clamp_max(self.tables.shape[2] - 1)  # padding may lie behind the longest text
        block = block.expand(self.tables.shape[0], -1, -1)
        index = self.tables[:, rows.slots].gather(2, block) * self.block_size + position % self.block_size
        self._index = None if rows.in_blocks else index
        self._begins = rows.begins
        self._write = torch.where(rows.active.view(rows.active.shape[0], -1), index[:, :, past:], 0)
        if rows.together:
            self._write = self._write.flatten(1)[:, None]

    def extend(self, places: HeadPlaces, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values `[B, H, T, D]` behind those of their rows, and return all `[B, H, L + T, D]`; for a call that reads
        them in their blocks the whole pool, `[N + 1, P, C, D]`, unless its texts begin with the new ones. All are as the pool has them:
        what a text says does not hang on which of its tokens were read together.

        Rows end at the right: what is shorter than L has padding before it, of any content.
        """
        assert self._write is not None, "open() comes before a model call"
        if self._index is None and k.shape[2] == 1 and not self._begins:
            pool = self.keys[None].transpose(1, 2), self.values[None].transpose(1, 2)
            if places.group is not None:
                append(*pool, k, v, self._write[places.group, :, 0])
            else:
                append(*pool, k, v, self._write[:, :, 0], heads=places.heads)
            return self._whole_blocks()
        new_k, new_v = stored(k, self.keys.dtype), stored(v, self.values.dtype)
        for kept, new in ((self.keys, new_k), (self.values, new_v)):
            if places.group is not None:
                bits(kept)[places.of(self._write)] = bits(new).transpose(1, 2)
            else:
                bits(kept)[places.of(self._write), places.columns] = bits(new).transpose(0, 1)
        if self._begins:  # nothing came before
            return new_k.to(k.dtype), new_v.to(v.dtype)
        if self._index is None:
            return self._whole_blocks()
        if self._index.shape == self._write.shape:
            return new_k.to(k.dtype), new_v.to(v.dtype)
        keys, values = self._at(places, places.of(self._index))
        return keys.transpose(1, 2), values.transpose(1, 2)


class PagedLayer(CacheLayerMixin):
    """Softmax attention of some KV heads of a layer, in a transformers `Cache`, whose keys and values lie in a `BlockPool`."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, pool: BlockPool, places: HeadPlaces):
        super().__init__()
        self.pool, self.places = pool, places
        self.past = 0

    def open(self, rows: Rows) -> None:
        """The next model call works on these rows, for which the pool is open too."""
        self.past = rows.past

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the pool exists."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self.pool.extend(self.places, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.past

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0
