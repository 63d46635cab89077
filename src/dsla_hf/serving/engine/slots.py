"""The memory of all running texts: blocks of keys and values, states per slot, and the transformers cache over both."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ...core.attention import DualState, clone_state
from ...core.cache import FOLDED_AT_ONCE, DSLACacheLayer
from ...core.heads import of_heads
from ...core.partial_cache import PartialCacheLayer
from ...inference.batching import out_of_memory
from .levels import Levels
from .pool import BlockPool, PagedLayer, Rows
from .prefixes import Column

logger = logging.getLogger(__name__)

# Blocks of the texts whose folds are rehearsed: one, some, a multiple of 16, and as many as are folded in several segments.
REHEARSED_BLOCKS = (1, 2, 3, 16, 17, 31, 32, 64, 65, 128, 129, 256, 257, 512)


class SlotStates(DSLACacheLayer):
    """The states of some KV heads of a layer for every slot: tensors that keep their addresses and are written in place.

    all_slots: of these heads and maybe others of the layer. heads: int32, which of them are those of this one, where they are not all.
    """

    def __init__(self, all_slots: DualState, heads: Tensor | None = None):
        super().__init__()
        self.all_slots, self.state_heads = all_slots, heads
        self._slots: slice | Tensor | None = None  # of the next model call

    def open(self, rows: Rows) -> None:
        """The next model call works on these rows."""
        self._slots, self.tokens, self.seen, self.whole_windows = rows.slots, rows.past, rows.seen, rows.whole_windows
        self.state = None if rows.seen == 0 else self.at(rows.slots)

    def at(self, slots: slice | Tensor) -> DualState:
        """Some slots, all heads: a view of a run of them, else a copy."""
        return DualState(*(x[slots] for x in self.all_slots))

    def store(self, slots: slice | Tensor, state: DualState, written: DualState | None = None) -> None:
        """Put the states of texts, of this layer's heads, into their slots (`[B]`, or a run of them). What is a tensor of `written` lies
        there already."""
        for number, (kept, new) in enumerate(zip(self.all_slots, state, strict=True)):
            if written is not None and new is written[number]:
                continue
            if self.state_heads is None or new.ndim == 1:  # counts, which are those of all heads
                kept[slots] = new
                continue
            heads = self.state_heads.long()
            if number > 0:  # heads come behind the places of a window
                kept, new = kept.transpose(1, 2), new.transpose(1, 2)
            if isinstance(slots, slice):
                kept[slots].index_copy_(1, heads, new)
            else:
                kept[slots[:, None], heads] = new

    def in_window(self, slots: Tensor, places: Tensor) -> list[Tensor]:
        """Keys and values `[B, T, H, D]` of this layer's heads, which lie in windows of slots `[B]` at places `[B, T]`."""
        found = [window[slots[:, None], places] for window in self.all_slots[1:3]]
        return found if self.state_heads is None else [x.index_select(2, self.state_heads) for x in found]

    def put_in_window(self, slots: Tensor, places: Tensor, both: Iterable[Tensor]) -> None:
        """Keys and values, as `in_window` has them, go there."""
        for window, x in zip(self.all_slots[1:3], both, strict=True):
            if self.state_heads is None:
                window[slots[:, None], places] = x.to(window.dtype)
            else:
                window[slots[:, None, None], places[..., None], self.state_heads.long()] = x.to(window.dtype)

    def advance(self, state: DualState, k: Tensor, v: Tensor, padding_mask: Tensor | None = None) -> None:
        assert self._slots is not None, "open() comes before a model call"
        if self.holds_back(k, v):
            return
        self.store(self._slots, state, self.state if isinstance(self._slots, slice) else None)  # a kernel writes in place
        self.tokens += k.shape[1]


class SlotMemory:
    """What the texts in `num_slots` slots remember, at any level of the ladder.

    Args:
        levels: of the model.
        num_slots: S, texts that can run at a time.
        num_blocks, block_size: of the pool.
        max_tokens: longest text.
        max_level: states are kept ready for the heads of this level.
        kv_dtype: that keys and values of kept heads lie in; None: the model's.
    """

    def __init__(
        self,
        levels: Levels,
        *,
        num_slots: int,
        num_blocks: int,
        block_size: int,
        max_tokens: int,
        max_level: int,
        kv_dtype: torch.dtype | None = None,
    ):
        self.levels, self.num_slots, self.max_tokens = levels, num_slots, max_tokens
        self.pool = BlockPool(
            num_blocks,
            block_size,
            num_groups=len(levels.groups),
            num_slots=num_slots,
            max_tokens=max_tokens,
            columns=levels.columns,
            head_dim=levels.head_dim,
            dtype=levels.dtype,
            device=levels.device,
            kept_dtype=kv_dtype,
        )
        self._held = levels.converted(max_level)
        self._states = {layer: self._new_states(layer, len(heads)) for layer, heads in self._held.items()}
        self._at = {head: (group, column) for group, heads in enumerate(levels.groups) for column, head in enumerate(heads)}
        self._layers: dict[int, list[Any]] = {}  # by level
        self._places: dict[int, list[int | Tensor | None]] = {}
        self._converted: dict[int, list[SlotStates]] = {}
        self._state_bytes: dict[int, int] = {}

    def cache(self, level: int, rows: Rows, tokens: int) -> Cache:
        """The cache of a model call at a level, which the model is at, that reads `tokens` more of each of `rows`."""
        self.pool.open(rows, tokens)
        layers = self._layers_at(level)
        for layer in layers:
            for part in getattr(layer, "parts", (layer,)):
                part.open(rows)
        return Cache(layers=list(layers))

    def places(self, level: int) -> list[int | Tensor | None]:
        """Of each layer, where attention finds its heads at a level, which the model is at; see `CachedTokens`."""
        if level not in self._places:
            softmax = [getattr(layer, "parts", (layer,))[0] for layer in self._layers_at(level)]
            self._places[level] = [x.places.for_attention() if isinstance(x, PagedLayer) else None for x in softmax]
        return self._places[level]

    def states(self, level: int) -> list[tuple[int, tuple[int, ...], SlotStates]]:
        """Of each layer with DSLA at a level, which the model is at: its number, the converted heads in their order, and their states."""
        found = []
        for number, layer in enumerate(self._layers_at(level)):
            part = layer.converted if isinstance(layer, PartialCacheLayer) else layer
            if isinstance(part, SlotStates):
                found.append((number, layer.heads if part is not layer else tuple(range(self.levels.kv_heads)), part))
        return found

    def blocks_for(self, tokens: int, level: int) -> int:
        """Blocks that a text of so many tokens needs at a level."""
        return self.pool.blocks_for(tokens) * (self.pool.num_groups - self.levels.rung(level))

    def allocate(self, slot: int, tokens: int, level: int, begins: list[Column] | None = None) -> None:
        """Take all blocks that a text may come to need, but for those of the columns that it begins with.

        Raises:
            OutOfBlocks: if they are not there; nothing has changed then.
        """
        self.pool.allocate(slot, tokens, self.levels.rung(level), begins)

    def release(self, slot: int) -> None:
        """The text in a slot is over."""
        self.pool.release(slot)

    def states_at(self, level: int) -> list[SlotStates]:
        """The states of the heads that are DSLA at a level, layer by layer."""
        if level not in self._converted:
            self._converted[level] = [self._states_of(layer, heads) for layer, heads in self.levels.converted(level).items()]
        return self._converted[level]

    def state_bytes(self, level: int) -> int:
        """Of the states of a text at a level, as `copy_states` has them."""
        if level not in self._state_bytes:
            heads = [len(heads) for heads in self.levels.converted(level).values()]
            states = [part.at(slice(0, 1)) for part in self.states_at(level)]
            of_a_head = [sum(x.numel() * x.element_size() for x in state[:3]) // state.recurrent.shape[1] for state in states]
            self._state_bytes[level] = sum(count * size + 8 for count, size in zip(heads, of_a_head, strict=True))  # and a count of tokens
        return self._state_bytes[level]

    def snapshot_bytes(self, level: int) -> int:
        """Of the largest snapshot at a level: the states, and keys and values of all but a block."""
        pool = self.pool
        return self.state_bytes(level) + pool.part_bytes(pool.num_groups - self.levels.rung(level), pool.block_size - 1)

    @torch.no_grad()
    def copy_states(self, slot: int, level: int) -> list[DualState]:
        """What the heads that are DSLA at a level remember of the text in a slot, layer by layer, in memory of its own."""
        copies = []
        for part in self.states_at(level):
            state = part.at(slice(slot, slot + 1))
            copies.append(clone_state(state if part.state_heads is None else state.of_heads(part.state_heads.long())))
        return copies

    @torch.no_grad()
    def put_states(self, slot: int, level: int, states: list[DualState]) -> None:
        """The text in a slot goes on from such copies, which are left as they are."""
        for part, state in zip(self.states_at(level), states, strict=True):
            part.store(slice(slot, slot + 1), state)

    @torch.no_grad()
    def fold(self, slots: list[int], tokens: list[int], old: int, new: int) -> None:
        """Raise the texts in some slots, of which so many `tokens` are cached: heads that become DSLA fold their keys and values into
        states, and their blocks are free. Texts of about the same length make the least work together."""
        if any(tokens):
            self._fold(self._raised(old, new), slots, tokens)
        for slot in slots:
            self.pool.release(slot, self.levels.rung(new))

    @torch.no_grad()
    def rehearse_folds(self, levels: Iterable[int] | None = None) -> None:
        """Compile what folds of any length need, so that the first raise does not wait for it: from each of these levels (None: of the
        ladder's) to the next. Nobody's block is folded, into slots that must be free. Folds that never come are left out, and so is what
        finds no memory."""
        size = self.pool.block_size
        most = min(self.pool.tables.shape[2], self.pool.num_blocks)
        by_count: dict[int, tuple[int, tuple[int, ...]]] = {}  # a layer for each number of heads that is folded
        for old, new in itertools.pairwise(sorted(self.levels.ladder if levels is None else levels)):
            for layer, heads in self._raised(old, new).items():
                if layer in self._held and set(heads) <= set(self._held[layer]):
                    by_count.setdefault(len(heads), (layer, heads))
        try:
            for texts, blocks in itertools.product((1, 2, 3), REHEARSED_BLOCKS):
                if blocks <= most and texts <= self.num_slots and (texts == 1 or texts * blocks * size <= FOLDED_AT_ONCE):
                    self._fold(dict(by_count.values()), list(range(texts)), [blocks * size] * texts)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            logger.warning("memory does not suffice for the fold of a long text: give less to keys and values (kv_bytes, --kv-gib)")

    def _fold(self, folded: dict[int, tuple[int, ...]], slots: list[int], tokens: list[int]) -> None:
        """These heads of layers. Whole blocks, the ends hidden by a mask: kernels are compiled anew for lengths that are no multiples
        of 16."""
        room = self.pool.blocks_for(max(tokens)) * self.pool.block_size
        places, counts = (torch.tensor(x, device=self.levels.device) for x in (slots, tokens))
        inside = torch.arange(room, device=self.levels.device) < counts[:, None]
        for layer, heads in folded.items():
            k, v = self.pool.read(self.pool.places([self._at[layer, head] for head in heads]), places, room)
            core = of_heads(self.levels.cores[layer], heads)
            self._states_of(layer, heads).store(places, core.fold(k, v, inside, padding_at_end=True))

    def _raised(self, old: int, new: int) -> dict[int, tuple[int, ...]]:
        """The heads of each layer that go over between two levels."""
        before, after = self.levels.converted(old), self.levels.converted(new)
        raised = {layer: tuple(head for head in heads if head not in before.get(layer, ())) for layer, heads in after.items()}
        return {layer: heads for layer, heads in raised.items() if heads}

    def _layers_at(self, level: int) -> list[Any]:
        """The cache's layers at a level, which the model is at: their tensors are made once, for recordings have their addresses."""
        if level not in self._layers:
            converted = self.levels.converted(level)
            self._layers[level] = [self._layer_at(i, converted.get(i, ())) for i in range(self.levels.num_layers)]
        return self._layers[level]

    def _layer_at(self, layer: int, heads: tuple[int, ...]) -> Any:
        if len(heads) == self.levels.kv_heads:
            return self._states_of(layer, heads)
        if not heads:
            return self._softmax_of(layer, tuple(range(self.levels.kv_heads)))
        split = self.levels.split(layer)
        assert split is not None and set(split.converted) == set(heads), "the model is at another level"
        return PartialCacheLayer(self._softmax_of(layer, split.kept), self._states_of(layer, split.converted), split.converted, split.kept)

    def _softmax_of(self, layer: int, heads: tuple[int, ...]) -> PagedLayer:
        return PagedLayer(self.pool, self.pool.places([self._at[layer, head] for head in heads]))

    def _states_of(self, layer: int, heads: tuple[int, ...]) -> SlotStates:
        """The states of these heads, in this order; a view of what is kept for the layer."""
        held = self._held[layer]
        if heads == held:
            return SlotStates(self._states[layer])
        columns = torch.tensor([held.index(head) for head in heads], dtype=torch.int32, device=self.levels.device)
        return SlotStates(self._states[layer], columns)

    def _new_states(self, layer: int, heads: int) -> DualState:
        core, dtype, device, slots = self.levels.cores[layer], self.levels.dtype, self.levels.device, self.num_slots
        cached = core.window_size + core.sink_tokens
        return DualState(
            torch.zeros(slots, heads, core.num_states, core.key_dim, core.value_dim, dtype=torch.float32, device=device),
            torch.zeros(slots, cached, heads, core.key_dim, dtype=dtype, device=device),
            torch.zeros(slots, cached, heads, core.value_dim, dtype=dtype, device=device),
            torch.zeros(slots, dtype=torch.long, device=device),
        )
