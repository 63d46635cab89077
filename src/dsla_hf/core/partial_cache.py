"""The cache of a layer converted in part: keys and values of the heads that it keeps, states of the others, and how more heads go over."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, StaticLayer

from ..compat.attributes import keep_address
from .cache import LEVEL_LOWERED, DSLACacheLayer
from .past import DualState


class PartialCacheLayer(CacheLayerMixin):
    """A softmax layer for kept KV heads beside a DSLA layer for converted ones; to the cache it looks like the softmax layer.

    `update` takes keys and values of kept heads alone, and is called through the cache, which may bring earlier ones in from elsewhere
    (offloading). The DSLA layer is filled by `converted.advance`.

    softmax: of the class that the layer would have at level 0. converted: of the other heads.
    heads, kept: which the converted and the kept ones are, in the order in which they lie in it.
    """

    supports_early_init = False
    is_croppable = False  # as its converted part

    def __init__(self, softmax: Any, converted: DSLACacheLayer, heads: tuple[int, ...], kept: tuple[int, ...]) -> None:
        self.softmax, self.converted, self.heads, self.kept = softmax, converted, heads, kept

    @property
    def parts(self) -> tuple[Any, DSLACacheLayer]:
        """The two layers in it."""
        return self.softmax, self.converted

    def has_heads(self, heads: Any) -> bool:
        """Whether these are its converted heads, in whatever order."""
        return isinstance(heads, tuple) and set(heads) == set(self.heads)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.softmax.lazy_initialization(key_states, value_states)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As the softmax layer, with keys and values `[B, kept, T, D]`.

        Raises:
            RuntimeError: for other heads, as a layer of softmax attention alone has them.
        """
        if key_states.shape[1] != len(self.kept):
            raise RuntimeError(LEVEL_LOWERED)
        self.prefetch()  # a cache that offloads does so ahead of time, but not behind every layer
        return self.softmax.update(key_states, value_states, *args, **kwargs)

    # --- what a cache asks of its layers ------------------------------------------------------------------------

    @property
    def keys(self) -> Tensor | None:
        return self.softmax.keys

    @property
    def values(self) -> Tensor | None:
        return self.softmax.values

    @property
    def is_initialized(self) -> bool:
        return self.softmax.is_initialized

    @property
    def is_sliding(self) -> bool:
        return self.softmax.is_sliding

    @property
    def is_compileable(self) -> bool:
        return self.softmax.is_compileable and self.converted.is_compileable

    @property
    def record_past(self) -> bool:
        return self.converted.record_past

    @property
    def batch_size(self) -> int:
        return self.converted.batch_size

    def get_seq_length(self) -> int:
        return self.softmax.get_seq_length()

    def get_max_length(self) -> int:
        return self.softmax.get_max_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.softmax.get_mask_sizes(query_length)

    def memory_bytes(self) -> int:
        """Bytes of all tensors held."""
        return self.converted.memory_bytes() + sum(x.numel() * x.element_size() for x in (self.keys, self.values) if torch.is_tensor(x))

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs."""
        for part in self.parts:
            if hasattr(part, "activate_past_recording"):
                part.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, in both parts or (where the DSLA layer refuses) in none."""
        self.converted.crop(tokens_to_remove)
        self.softmax.crop(tokens_to_remove)

    def reset(self) -> None:
        for part in self.parts:
            part.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for part in self.parts:
            part.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for part in self.parts:
            part.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        for part in self.parts:
            part.batch_select_indices(indices)

    def offload(self) -> None:
        self.softmax.offload()

    def prefetch(self) -> None:
        if self.is_initialized:
            self.softmax.prefetch()


def with_heads(softmax: Any, places: list[int]) -> Any:
    """A softmax cache layer that holds some heads alone, by their places in `softmax`; its memory holds no others."""
    if not softmax.is_initialized or not torch.is_tensor(softmax.keys) or softmax.keys.ndim != 4:
        return softmax  # it takes what it is given first
    smaller = copy.copy(softmax)
    index = torch.tensor(places, device=softmax.keys.device)
    smaller.keys, smaller.values = softmax.keys.index_select(1, index), softmax.values.index_select(1, index)
    if isinstance(smaller, StaticLayer):
        smaller.num_heads = len(places)
        if not torch.compiler.is_compiling():
            for x in (smaller.keys, smaller.values):
                keep_address(x)
    return smaller


def last_heads(softmax: Any, heads: int) -> Any:
    """A static cache layer of so many heads in the memory of the last ones of `softmax`, which counts tokens for both."""
    return heads_from(softmax, softmax.num_heads - heads, heads)


def heads_from(softmax: Any, first: int, heads: int) -> Any:
    """The same of heads that lie side by side, from the place `first` on."""
    part = copy.copy(softmax)
    part.keys, part.values = (x[:, first : first + heads] for x in (softmax.keys, softmax.values))
    part.num_heads = heads
    return part


def join_states(states: list[DualState], heads: list[tuple[int, ...]], order: tuple[int, ...]) -> DualState:
    """The state of all heads of `order`, of those of some each. They have read the same tokens: `lengths` is that of the first."""
    lie = [head for some in heads for head in some]
    index = torch.tensor([lie.index(head) for head in order], device=states[0].lengths.device)
    recurrent = torch.cat([state.recurrent for state in states], 1).index_select(1, index)
    window_k, window_v = (torch.cat(parts, 2).index_select(2, index) for parts in zip(*(state[1:3] for state in states), strict=True))
    return DualState(recurrent, window_k, window_v, states[0].lengths)
