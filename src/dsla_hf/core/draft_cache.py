"""The cache of a draft: a model at a high level that guesses the next tokens of a text which the same model reads at a lower one.

Of the text it keeps nothing twice but the states of heads that the lower level has not converted. Those are the fold of the lower level's
keys and values, brought up to date before each draft; all else is the lower level's own cache. What the guesses add goes to copies, which
are thrown away with them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from .attention import DualStateAttention
from .cache import RECORDS_PAST, DSLACacheLayer, fold_in_pieces
from .heads import HeadSplit, of_heads
from .partial_cache import PartialCacheLayer, join_states, with_heads
from .past import DualState, clone_state


class LayerPart(NamedTuple):
    """What of a layer is DSLA at a level.

    attention: of all its KV heads; None where it is softmax attention. split: which heads are converted, None where all are.
    """

    attention: DualStateAttention | None = None
    split: HeadSplit | None = None

    @property
    def converted(self) -> tuple[int, ...]:
        """The converted KV heads, in the order in which they lie in a cache."""
        if self.attention is None:
            return ()
        return tuple(range(self.attention.num_kv_heads)) if self.split is None else self.split.converted

    def of(self, heads: tuple[int, ...]) -> DualStateAttention:
        """These heads of the layer, as a layer of its own."""
        assert self.attention is not None
        return of_heads(self.attention, heads)


class DraftCache:
    """Caches for drafts after the text that another cache holds.

        drafts = DraftCache(cache, draft=parts_of_high_level, check=parts_of_low_level)
        guesses = drafts.begin()  # a `DynamicCache` for forwards at the high level, as if it had read the text

    Args:
        cache: of the text at the lower level, with its prompt read. What is taken back from it (`crop`) must be so before `begin`.
        draft, check: of each layer what is DSLA at the higher and at the lower level.
        padding_mask: bool `[B, T]`, True at real tokens of the prompt; None: all are.

    Raises:
        ValueError: where a layer of the cache is of a kind whose keys and values cannot be read, or something that is converted at the
            lower level is not at the higher one.
    """

    def __init__(self, cache: Cache, draft: Sequence[LayerPart], check: Sequence[LayerPart], padding_mask: Tensor | None = None):
        self.cache = cache
        self._layers = []
        for index, (layer, high, low) in enumerate(zip(cache.layers, draft, check, strict=False)):
            softmax = getattr(layer, "softmax", layer)
            if not isinstance(layer, DSLACacheLayer) and type(softmax) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise ValueError(f"layer {index}: a draft cannot read a {type(softmax).__name__}: use a DynamicCache")
            if not set(low.converted) <= set(high.converted):
                raise ValueError(f"layer {index}: a draft converts what the level that checks it does, and more; {low.converted} is not")
            self._layers.append(_DraftLayer(high, low, padding_mask))

    def begin(self) -> DynamicCache:
        """A cache that holds the text as it is now, for the guesses that follow; what they write to it stays there."""
        drafts, tokens = DynamicCache(), int(self.cache.get_seq_length())
        drafts.layers = [mine.after(theirs, tokens) for mine, theirs in zip(self._layers, self.cache.layers, strict=False)]
        return drafts


class _DraftLayer:
    """A layer of a `DraftCache`, with the state of heads that the draft alone converts, after `tokens` tokens."""

    def __init__(self, draft: LayerPart, check: LayerPart, padding_mask: Tensor | None):
        self.draft, self.padding_mask = draft, padding_mask
        self.own = tuple(head for head in draft.converted if head not in check.converted)
        self.attention = draft.of(self.own) if self.own else None
        self.checked = check.of(check.converted) if check.converted else None
        self.state: DualState | None = None
        self.tokens = 0

    def after(self, layer: Any, tokens: int) -> Any:
        """The layer that guesses go to, after the tokens that the lower level's `layer` holds."""
        if self.draft.attention is None:
            return _copy(layer)
        states: list[Any] = []
        heads: list[tuple[int, ...]] = []
        if self.checked is not None:
            known = layer.converted if isinstance(layer, PartialCacheLayer) else layer
            states.append(known.current_state(self.checked))
            heads.append(layer.heads if isinstance(layer, PartialCacheLayer) else self.draft.converted)
        if self.attention is not None:
            self._catch_up(layer, tokens, self.attention)
            states.append(self.state)
            heads.append(self.own)
        converted = DSLACacheLayer()
        converted.state = clone_state(join_states(states, heads, self.draft.converted) if heads != [self.draft.converted] else states[0])
        converted.tokens, converted.seen, converted.is_initialized = tokens, None, True
        split = self.draft.split
        if split is None:
            return converted
        held, softmax = _held(layer, split.num_kv_heads)
        kept = softmax if held == split.kept else with_heads(softmax, [held.index(head) for head in split.kept])
        return PartialCacheLayer(_copy(kept), converted, split.converted, split.kept)

    def _catch_up(self, layer: Any, tokens: int, attention: DualStateAttention) -> None:
        """Fold what the lower level has read since the last time."""
        if tokens == self.tokens:
            return
        assert self.draft.attention is not None
        held, softmax = _held(layer, self.draft.attention.num_kv_heads)
        k, v = (x[:, :, -(tokens - self.tokens) :].transpose(1, 2) for x in (softmax.keys, softmax.values))
        mask = None
        if self.padding_mask is not None and self.tokens < self.padding_mask.shape[1]:
            mask = self.padding_mask.new_ones(k.shape[0], tokens)
            mask[:, : self.padding_mask.shape[1]] = self.padding_mask[:, :tokens]
            mask = mask[:, tokens - k.shape[1] :]
        places = None
        if held != self.own:
            places = torch.tensor([held.index(head) for head in self.own], dtype=torch.int32, device=k.device)
        self.state, self.tokens = fold_in_pieces(attention, k, v, mask, self.state, kv_heads=places), tokens


def _copy(softmax: Any) -> Any:
    """A softmax layer that grows apart from this one: dynamic layers are written by assignment. It takes nothing back."""
    copied = copy.copy(softmax)
    if hasattr(copied, "record_past"):
        copied.record_past = False
    return copied


def _held(layer: Any, num_kv_heads: int) -> tuple[tuple[int, ...], Any]:
    """The KV heads whose keys and values a layer of a cache holds, and the softmax layer that has them."""
    return (layer.kept, layer.softmax) if isinstance(layer, PartialCacheLayer) else (tuple(range(num_kv_heads)), layer)


def take_back(cache: Cache, tokens: int) -> None:
    """Forget the last tokens of a cache that records (`activate_past_recording`); what remains cannot be taken back later."""
    if tokens:
        cache.crop(-tokens)
        return
    for layer in cache.layers:
        for part in getattr(layer, "parts", (layer,)):
            if hasattr(part, "record_past"):  # older releases of transformers take crop(0) of the others for all
                part.crop(0)


def records(cache: Cache) -> bool:
    """Whether `activate_past_recording` was called."""
    return getattr(cache, RECORDS_PAST, False)


def end_recording(cache: Cache) -> None:
    """Undo `activate_past_recording`."""
    cache.__dict__.pop(RECORDS_PAST, None)
    for layer in cache.layers:
        for part in getattr(layer, "parts", (layer,)):
            if hasattr(part, "record_past"):
                part.record_past = False
