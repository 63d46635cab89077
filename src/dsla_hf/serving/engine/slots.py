"""The memory of all running texts: blocks of keys and values, states per slot, and the transformers cache over both."""

from __future__ import annotations

import itertools
import logging

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...core.attention import DualState, DualStateAttention
from ...core.cache import FOLDED_AT_ONCE, DSLACacheLayer
from ...inference.batching import out_of_memory
from .levels import Levels
from .pool import BlockPool, PagedLayer, Rows

logger = logging.getLogger(__name__)

# Blocks of the texts whose folds are rehearsed: one, some, a multiple of 16, and as many as are folded in several segments.
REHEARSED_BLOCKS = (1, 2, 3, 16, 17, 31, 32, 64, 65, 128, 129, 256, 257, 512)


class SlotStates(DSLACacheLayer):
    """The states of one DSLA layer for every slot: tensors that keep their addresses and are written in place."""

    def __init__(self, attention: DualStateAttention, num_slots: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        heads, key_dim, value_dim = attention.num_kv_heads, attention.key_dim, attention.value_dim
        cached = attention.window_size + attention.sink_tokens
        self.all_slots = DualState(
            torch.zeros(num_slots, heads, 2, key_dim, value_dim, dtype=torch.float32, device=device),
            torch.zeros(num_slots, cached, heads, key_dim, dtype=dtype, device=device),
            torch.zeros(num_slots, cached, heads, value_dim, dtype=dtype, device=device),
            torch.zeros(num_slots, dtype=torch.long, device=device),
        )
        self._slots: slice | Tensor | None = None  # of the next model call

    def open(self, rows: Rows) -> None:
        """The next model call works on these rows."""
        self._slots, self.tokens, self.seen, self.whole_windows = rows.slots, rows.past, rows.seen, rows.whole_windows
        self.state = None if rows.seen == 0 else self.at(rows.slots)

    def at(self, slots: slice | Tensor) -> DualState:
        """Some slots: a view of a run of them, else a copy."""
        return DualState(*(x[slots] for x in self.all_slots))

    def store(self, slots: Tensor, state: DualState) -> None:
        """Put the states of texts into their slots `[B]`."""
        for kept, new in zip(self.all_slots, state, strict=True):
            kept[slots] = new

    def advance(self, state: DualState, k: Tensor, v: Tensor, padding_mask: Tensor | None = None) -> None:
        assert self._slots is not None, "open() comes before a model call"
        viewed = self.state if isinstance(self._slots, slice) else None
        for index, (kept, new) in enumerate(zip(self.all_slots, state, strict=True)):
            if viewed is None or new is not viewed[index]:  # else a kernel has written it already
                kept[self._slots] = new
        self.tokens += k.shape[1]


class SlotMemory:
    """What the texts in `num_slots` slots remember, at any level.

    Args:
        levels: of the model.
        num_slots: S, texts that can run at a time.
        num_blocks, block_size: of the pool.
        max_tokens: longest text.
        max_level: states are kept ready for the layers of this level.
    """

    def __init__(self, levels: Levels, *, num_slots: int, num_blocks: int, block_size: int, max_tokens: int, max_level: int):
        self.levels, self.num_slots = levels, num_slots
        self.pool = BlockPool(
            num_blocks,
            block_size,
            num_layers=levels.num_layers,
            num_slots=num_slots,
            max_tokens=max_tokens,
            kv_heads=levels.kv_heads,
            head_dim=levels.head_dim,
            dtype=levels.dtype,
            device=levels.device,
        )
        self._paged = [PagedLayer(self.pool, i) for i in range(levels.num_layers)]
        self._states = {i: SlotStates(levels.cores[i], num_slots, levels.dtype, levels.device) for i in levels.converted(max_level)}

    def cache(self, level: int, rows: Rows, tokens: int) -> Cache:
        """The cache of a model call at a level that reads `tokens` more of each of `rows`."""
        self.pool.open(rows, tokens)
        converted = set(self.levels.converted(level))
        layers = [self._states[i] if i in converted else self._paged[i] for i in range(self.levels.num_layers)]
        for layer in layers:
            layer.open(rows)
        return Cache(layers=layers)

    def softmax_layers(self, level: int) -> list[int]:
        converted = set(self.levels.converted(level))
        return [i for i in range(self.levels.num_layers) if i not in converted]

    def blocks_for(self, tokens: int, level: int) -> int:
        """Blocks that a text of so many tokens needs at a level."""
        return self.pool.blocks_for(tokens) * len(self.softmax_layers(level))

    def allocate(self, slot: int, tokens: int, level: int) -> None:
        """Take all blocks that a text may come to need.

        Raises:
            OutOfBlocks: if they are not there; nothing has changed then.
        """
        self.pool.allocate(self.softmax_layers(level), slot, tokens)

    def release(self, slot: int) -> None:
        """The text in a slot is over."""
        self.pool.release(range(self.levels.num_layers), slot)

    @torch.no_grad()
    def fold(self, slots: list[int], tokens: list[int], old: int, new: int) -> None:
        """Raise the texts in some slots, of which so many `tokens` are cached: layers that become DSLA fold their keys and values into
        states, and their blocks are free. Texts of about the same length make the least work together."""
        layers = self.levels.converted(new)[old:]
        if any(tokens):
            self._fold(layers, slots, tokens)
        for slot in slots:
            self.pool.release(layers, slot)

    @torch.no_grad()
    def rehearse_folds(self) -> None:
        """Compile what folds of any length need, so that the first raise does not wait for it. Nobody's block is folded, into slots that
        must be free. Folds that never come are left out, and so is what finds no memory."""
        layers, size = list(self._states)[:1], self.pool.block_size
        most = min(self.pool.tables.shape[2], self.pool.num_blocks)
        try:
            for texts, blocks in itertools.product((1, 2, 3), REHEARSED_BLOCKS):
                if blocks <= most and texts <= self.num_slots and (texts == 1 or texts * blocks * size <= FOLDED_AT_ONCE):
                    self._fold(layers, list(range(texts)), [blocks * size] * texts)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            logger.warning("memory does not suffice for the fold of a long text: give less to keys and values (kv_bytes, --kv-gib)")

    def _fold(self, layers: list[int], slots: list[int], tokens: list[int]) -> None:
        """Whole blocks, the ends hidden by a mask: kernels are compiled anew for lengths that are no multiples of 16."""
        room = self.pool.blocks_for(max(tokens)) * self.pool.block_size
        places, counts = (torch.tensor(x, device=self.levels.device) for x in (slots, tokens))
        inside = torch.arange(room, device=self.levels.device) < counts[:, None]
        for layer in layers:
            k, v = self.pool.read(layer, places, room)
            self._states[layer].store(places, self.levels.cores[layer].fold(k, v, inside, padding_at_end=True))
