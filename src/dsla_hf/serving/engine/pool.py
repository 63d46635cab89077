"""Keys and values of the softmax layers, in blocks that all layers and all texts share.

A block holds some tokens of one layer of one text. A layer that becomes DSLA gives its blocks back, and any layer of any
text can have them next: that is how a raised level makes room for newcomers.

Shape legend: N blocks, P tokens in a block, S slots (places of running texts), B rows of a call, T new tokens, L past tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from dsla_kernels import append


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
    """

    slots: slice | Tensor
    active: Tensor
    lengths: Tensor
    past: int
    seen: int | None = None
    whole_windows: bool = False
    in_blocks: bool = False


class OutOfBlocks(RuntimeError):
    """The pool has too few free blocks."""


class BlockPool:
    """`[N * P, Hkv, D]` keys and values, a list of free blocks, and the blocks of each layer and slot.

    Block 0 belongs to nobody: rows that do not take part write there.

    Args:
        num_blocks: N, block 0 not counted. block_size: P.
        num_layers, num_slots, max_tokens: what the tables are made for.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        num_layers: int,
        num_slots: int,
        max_tokens: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.num_blocks, self.block_size = num_blocks, block_size
        tokens = (num_blocks + 1) * block_size
        self.keys, self.values = (torch.zeros(tokens, kv_heads, head_dim, dtype=dtype, device=device) for _ in range(2))
        self.tables = torch.zeros(num_layers, num_slots, self.blocks_for(max_tokens), dtype=torch.long, device=device)
        self._free = list(range(num_blocks, 0, -1))
        self._owned: dict[tuple[int, int], list[int]] = {}  # (layer, slot) -> blocks
        # Of the call that is open, for each layer: where all tokens of its rows lie `[B, L + T]` (None: attention knows), and the new
        # ones `[B, T]`.
        self._index: Tensor | None = None
        self._write: Tensor | None = None

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    def blocks_for(self, tokens: int) -> int:
        """Blocks that one layer needs for so many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, layers: list[int], slot: int, tokens: int) -> None:
        """Give each of `layers` of a slot its blocks for a text of `tokens`.

        Raises:
            OutOfBlocks: if they are not there; nothing has changed then.
        """
        each = self.blocks_for(tokens)
        if each * len(layers) > self.free_blocks:
            raise OutOfBlocks(f"{each * len(layers)} blocks wanted, {self.free_blocks} of {self.num_blocks} are free")
        if not layers:
            return
        for layer in layers:
            self._owned[layer, slot] = [self._free.pop() for _ in range(each)]
        blocks = torch.tensor([self._owned[layer, slot] for layer in layers], device=self.tables.device)
        self.tables[layers, slot, :each] = blocks  # all at once: each copy from the host waits

    def release(self, layers: list[int] | range, slot: int) -> None:
        """Take back what `layers` of a slot have, if anything."""
        had = [layer for layer in layers if (layer, slot) in self._owned]
        for layer in had:
            self._free.extend(self._owned.pop((layer, slot)))
        if had:
            self.tables[had, slot] = 0

    def read(self, layer: int, slots: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """The first `tokens` keys and values of the texts in slots `[B]`, `[B, T, Hkv, D]`; of a shorter text what follows is anything."""
        position = torch.arange(tokens, device=self.tables.device)
        index = self.tables[layer, slots][:, position // self.block_size] * self.block_size + position % self.block_size
        return self.keys[index], self.values[index]

    def open(self, rows: Rows, tokens: int) -> None:
        """The next model call reads `tokens` more of these rows: find their places, once for all layers."""
        past = 0 if rows.in_blocks else rows.past
        position = (rows.lengths[:, None] - past + torch.arange(past + tokens, device=self.tables.device)).clamp_min(0)
        block = (position // self.block_size).clamp_max(self.tables.shape[2] - 1)  # padding may lie behind the longest text
        block = block.expand(self.tables.shape[0], -1, -1)
        index = self.tables[:, rows.slots].gather(2, block) * self.block_size + position % self.block_size
        self._index = None if rows.in_blocks else index
        self._write = torch.where(rows.active.view(rows.active.shape[0], -1), index[:, :, past:], 0)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write new keys and values `[B, Hkv, T, D]` behind those of their rows, and return all `[B, Hkv, L + T, D]`; for a call that
        reads them in their blocks the whole pool, `[N + 1, P, Hkv, D]`.

        Rows end at the right: what is shorter than L has padding before it, of any content.
        """
        assert self._write is not None, "open() comes before a model call"
        if self._index is None and k.shape[2] == 1:
            append(self.keys[None].transpose(1, 2), self.values[None].transpose(1, 2), k, v, self._write[layer, :, 0])
        else:
            self.keys[self._write[layer]], self.values[self._write[layer]] = k.transpose(1, 2), v.transpose(1, 2)
        if self._index is None:
            return self.keys.unflatten(0, (-1, self.block_size)), self.values.unflatten(0, (-1, self.block_size))
        if self._index.shape == self._write.shape:  # nothing came before
            return k, v
        return self.keys[self._index[layer]].transpose(1, 2), self.values[self._index[layer]].transpose(1, 2)


class PagedLayer(CacheLayerMixin):
    """A softmax layer of a transformers `Cache` whose keys and values lie in a `BlockPool`."""

    is_sliding = False
    is_compileable = False
    supports_early_init = False

    def __init__(self, pool: BlockPool, layer: int):
        super().__init__()
        self.pool, self.layer = pool, layer
        self.past = 0

    def open(self, rows: Rows) -> None:
        """The next model call works on these rows, for which the pool is open too."""
        self.past = rows.past

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the pool exists."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        return self.pool.extend(self.layer, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.past

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0
