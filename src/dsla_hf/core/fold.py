"""A softmax layer's part of a cache becomes that of a DSLA layer: what must be so before, and the fold itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.utils import logging

from .attention import DualStateAttention
from .beside_linear import BESIDE_LINEAR, partial_layer, with_linear_part
from .cache import LEVEL_LOWERED, RECORDS_PAST, DSLACacheLayer, StaticDSLACacheLayer, VisibleStaticLayer, fold_in_pieces
from .heads import HeadSplit, of_heads
from .layout import TokenLayout
from .partial_cache import PartialCacheLayer, join_states, with_heads
from .window_view import WindowView

logger = logging.get_logger(__name__)

# Cache layers of which keys and values can be read, so that they can be folded; subclasses may hold them otherwise (quantised, say).
FOLDABLE = (DynamicLayer, StaticLayer, VisibleStaticLayer, DynamicSlidingWindowLayer, StaticSlidingWindowLayer, *BESIDE_LINEAR)
# Static ones that keep all tokens.
FULL_STATIC = (StaticLayer, LinearAttentionAndStaticFullAttentionLayer)


def fold(
    attention: DualStateAttention,
    keys: Tensor,
    values: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    max_length: int | None = None,
    kv_heads: Tensor | None = None,
) -> DSLACacheLayer:
    """Turn the cached keys and values of a softmax layer into the state that `attention` would have built from them.

    Args:
        attention: the DSLA layer that will read the state.
        keys: `[B, Hkv, T, D]` as transformers caches them, rotated.
        values: `[B, Hkv, T, D]` as transformers caches them.
        attention_mask: `[B, T]`, nonzero at real tokens, None if all are; padding may lie anywhere.
        position_ids: `[B, T]`, only to make sure that each row is one text: the states need no positions, because
            cached keys are rotated already.
        max_length: of the `StaticCache` the layer is for; None for a dynamic one.
        kv_heads: int32 `[Hkv]`, where keys and values are those of more heads: the places of `attention`'s own among them.

    Where keys or values require a gradient (trained ones, or those of text that is trained on), it flows through the fold.

    Raises:
        ValueError: if shapes do not fit, or positions of a row restart (packed texts must not share a state).
    """
    heads = keys.shape[1] if kv_heads is not None and keys.ndim == 4 else attention.num_kv_heads
    expected = (heads, attention.key_dim, attention.value_dim)
    if (
        keys.ndim != 4
        or values.ndim != 4
        or keys.shape[:3] != values.shape[:3]
        or (keys.shape[1], keys.shape[3], values.shape[3]) != expected
    ):
        raise ValueError(
            f"cached keys {list(keys.shape)} and values {list(values.shape)} must be [B, {expected[0]}, T, {expected[1]} and {expected[2]}]"
        )
    if attention_mask is not None and attention_mask.shape != (keys.shape[0], keys.shape[2]):
        raise ValueError(f"attention_mask must be [{keys.shape[0]}, {keys.shape[2]}], got {list(attention_mask.shape)}")
    mask = None if attention_mask is None else attention_mask.bool()
    if position_ids is not None:
        falls = position_ids.diff(dim=1) <= 0
        if bool((falls if mask is None else falls & mask[:, 1:] & mask[:, :-1]).any()):
            raise ValueError("position_ids restart inside a row: several texts in one row cannot be folded into one state")
    layer = _empty_layer(max_length)
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    state = fold_in_pieces(attention, k, v, mask, kv_heads=kv_heads)
    layer.advance(state, k, v, mask)
    return layer


def check_cache(cache: Any, converted: Sequence[bool | tuple[int, ...]], rows: int, tokens: int, recorded: bool = False) -> int | Tensor:
    """Make sure that a call can go on from `cache`, before its first layer runs; the tokens that it holds.

    Args:
        cache: as the model was given it.
        converted: which of the model's layers are DSLA now; of one that is in part its converted KV heads.
        rows, tokens: of the call.
        recorded: the call is compiled or captured: no value is looked at.

    Raises:
        RuntimeError: if a layer (or a head) was DSLA and is softmax attention now, or a call has failed midway and left the cache half
            advanced.
        ValueError: for keys and values that cannot be folded, other rows, or too many tokens for a static cache.
    """
    layers = list(zip(getattr(cache, "layers", ()), converted, strict=False))
    for index, (layer, is_dsla) in enumerate(layers):
        partial = isinstance(layer, PartialCacheLayer)
        if partial or isinstance(layer, DSLACacheLayer):
            more = partial and isinstance(is_dsla, tuple) and set(layer.heads) <= set(is_dsla)
            if not (is_dsla is True or more):
                raise RuntimeError(f"layer {index}: {LEVEL_LOWERED}")
            states = layer.converted if partial else layer
            if states.state is not None and states.batch_size != rows:
                raise ValueError(f"the cache holds {states.batch_size} rows, the call has {rows}: give it a cache of its own")
            if partial and not layer.has_heads(is_dsla) and (recorded or _tokens_of(layer) > 0):
                _check_foldable(index, layer.softmax)
                if not recorded:
                    _check_reaches_back(index, layer)
        elif is_dsla and not isinstance(layer, WindowView) and (recorded or _tokens_of(layer) > 0):
            _check_foldable(index, layer)
    if recorded or not any(is_dsla for _, is_dsla in layers):
        return cache.get_seq_length()
    counts = [_tokens_of(part) for layer, _ in layers for part in getattr(layer, "parts", (layer,)) if counts_tokens(part)]
    if len(set(counts)) > 1:
        raise RuntimeError(
            f"the layers of the cache hold different numbers of tokens, {counts}: a call has failed midway. Start again with a new cache"
        )
    for layer, is_dsla in layers:
        layer = layer.softmax if isinstance(layer, PartialCacheLayer) else layer
        if is_dsla is not True and type(layer) in FULL_STATIC and counts[0] + tokens > _room(layer):
            raise ValueError(
                f"the static cache has room for {_room(layer)} tokens; {counts[0]} are there, and {tokens} come: make it with a "
                f"max_cache_len of {counts[0] + tokens} or more"
            )
    return counts[0]


def _check_foldable(index: int, layer: Any) -> None:
    if type(layer) not in FOLDABLE:
        raise ValueError(
            f"layer {index} cannot become DSLA in mid-text: its cache is a {type(layer).__name__}, whose keys and values cannot be "
            "read in full. Set the level before the text begins, or use a DynamicCache"
        )


def _check_reaches_back(index: int, layer: PartialCacheLayer) -> None:
    """Of one layer all states begin with the same token."""
    tokens = _tokens_of(layer)
    if (cached := _cached(layer.softmax, tokens)[0].shape[2]) < tokens:
        raise ValueError(
            f"layer {index} slides: of the {tokens} tokens so far its kept heads have the last {cached}, and states of further heads "
            "cannot be made to begin where those of its other heads do. Set the level before the text begins"
        )


def counts_tokens(layer: Any) -> bool:
    """Whether a layer of a cache knows how many tokens it has read: not so those of linear layers, and of layers without any attention."""
    return isinstance(layer, CacheLayerMixin)


def _room(layer: Any) -> int:
    """For how many tokens a layer of a static cache was made; those beside a linear part do not tell it as others do."""
    return getattr(layer, "max_cache_len", layer.get_max_length())


def _tokens_of(layer: Any) -> int:
    return int(layer.get_seq_length())


def dsla_cache_layer(
    cache: Cache, layer_idx: int, attention: DualStateAttention, layout: TokenLayout, exact: bool = True
) -> DSLACacheLayer:
    """The DSLA layer of `cache` at `layer_idx`; a key-value layer found there is folded and replaced, its memory freed. Of a layer that
    was converted in part the kept heads are folded, and go to the states of the others.

    With `exact` False (the DSLA layer has keys or values of its own) a fold is approximate, and that is said once.

    Raises:
        ValueError: for a kind of cache layer whose keys and values cannot be read.
    """
    layer = _layer_at(cache, layer_idx)
    if isinstance(layer, DSLACacheLayer):
        return layer
    new = _states_of(cache, layer_idx, attention, tuple(range(attention.num_kv_heads)), attention.num_kv_heads, layout, exact)
    cache.layers[layer_idx] = new = with_linear_part(new, layer)
    return new


def partial_cache_layer(
    cache: Cache, layer_idx: int, attention: DualStateAttention, split: HeadSplit, layout: TokenLayout, exact: bool = True
) -> PartialCacheLayer:
    """The layer of `cache` at `layer_idx` for a layer converted in part, as `dsla_cache_layer` for a whole one: of what is found there the
    converted heads' keys and values are folded, and those of kept heads alone stay in memory. Both kinds then lie in the order of `split`.

    attention: of the whole layer, or (in a hybrid) of the converted heads alone.

    Raises:
        RuntimeError: where heads that are kept now were converted before.
        ValueError: for a kind of cache layer whose keys and values cannot be read.
    """
    layer = _layer_at(cache, layer_idx)
    heads = split.converted
    if isinstance(layer, PartialCacheLayer):
        if (layer.heads, layer.kept) == (heads, split.kept):
            return layer
        held, softmax = layer.kept, layer.softmax
        lowered = not set(layer.heads) <= set(heads)
    else:
        held, softmax, lowered = tuple(range(split.num_kv_heads)), layer, isinstance(layer, DSLACacheLayer)
    if lowered:
        raise RuntimeError(f"layer {layer_idx}: {LEVEL_LOWERED}")
    states = _states_of(cache, layer_idx, attention, heads, split.num_kv_heads, layout, exact)
    kept = with_heads(softmax, [held.index(head) for head in split.kept])
    cache.layers[layer_idx] = new = partial_layer(kept, states, heads, split.kept)
    return new


def _layer_at(cache: Cache, layer_idx: int) -> Any:
    replicate = getattr(cache, "layer_class_to_replicate", None)
    while replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(replicate())
    return cache.layers[layer_idx]


def _states_of(
    cache: Cache,
    layer_idx: int,
    attention: DualStateAttention,
    heads: tuple[int, ...],
    num_kv_heads: int,
    layout: TokenLayout,
    exact: bool,
) -> DSLACacheLayer:
    """The DSLA layer of these of `num_kv_heads` heads, after the text that the cache holds at `layer_idx`: keys and values of all heads, or
    those of some beside states of others. `attention` is of all heads or of these."""
    layer: Any = cache.layers[layer_idx]
    before = layer if isinstance(layer, PartialCacheLayer) else None
    softmax = layer if before is None else before.softmax
    tokens = _tokens_of(softmax)
    max_length = max(map(_room, cache.layers)) if isinstance(softmax, StaticLayer) else None
    if tokens == 0:
        new = _empty_layer(max_length)
    else:
        _check_foldable(layer_idx, softmax)
        reordered = before is not None and before.has_heads(heads)
        if not exact and not reordered:
            logger.warning_once(
                "a text goes on at a higher level with trained k_proj or v_proj: the states are folded from the original model's keys "
                "and values, which is approximate. Set the level before the text begins, or train with the default trained_projections"
            )
        keys, values = _cached(softmax, tokens)
        cached = keys.shape[2]
        if cached < tokens and not reordered:
            logger.warning_once(
                f"layer {layer_idx} had a sliding window: of its {tokens} tokens the last {cached} are cached, and the states begin there"
            )
        mask = layout.past_mask(tokens, cached)
        folded, held = heads, tuple(range(num_kv_heads))
        if before is not None:
            if not reordered:
                _check_reaches_back(layer_idx, before)
            folded, held = tuple(head for head in heads if head not in before.heads), before.kept
        places = None
        if folded != held:
            places = torch.tensor([held.index(head) for head in folded], dtype=torch.int32, device=keys.device)

        def part(some: tuple[int, ...]) -> DualStateAttention:
            return of_heads(attention, some if attention.num_kv_heads == num_kv_heads else map(heads.index, some))

        if before is None:
            new = fold(part(folded), keys, values, attention_mask=mask, max_length=max_length, kv_heads=places)
        else:
            known = before.converted.current_state(part(before.heads))
            assert known is not None
            states, k, v = [known], keys.transpose(1, 2), values.transpose(1, 2)
            if folded:
                states.append(fold_in_pieces(part(folded), k, v, mask, kv_heads=places))
            new = _empty_layer(max_length)
            new.advance(join_states(states, [before.heads, folded][: len(states)], heads), k, v, mask)
            if reordered:
                new.seen = before.converted.seen
        new.tokens = new.tokens + (tokens - cached)
    if getattr(cache, RECORDS_PAST, False):
        new.activate_past_recording()
    return new


def _empty_layer(max_length: int | None) -> DSLACacheLayer:
    return DSLACacheLayer() if max_length is None else StaticDSLACacheLayer(max_length)


def _cached(layer: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hkv, T, D]` of the last tokens that a key-value layer still has."""
    slots = layer.keys.shape[2]
    if type(layer) is StaticSlidingWindowLayer and tokens >= slots:  # the oldest one leaves with the next token
        return layer.keys[:, :, 1:], layer.values[:, :, 1:]
    first = layer.out_of_window(tokens + 1) if isinstance(layer, VisibleStaticLayer) else 0
    kept = min(tokens, slots)
    return layer.keys[:, :, first:kept], layer.values[:, :, first:kept]
