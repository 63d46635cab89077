"""The cache of a DSLA layer inside a transformers `Cache`, and the fold that makes one from a softmax layer's cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.utils import logging

from dsla_kernels import append

from .attention import DualState, DualStateAttention, clone_state
from .layout import TokenLayout

logger = logging.get_logger(__name__)

# Attribute of a `Cache` whose DSLA layers shall record; transformers marks only layers that exist when it asks for it.
RECORDS_PAST = "dsla_records_past"
# Tokens that a layer which records can forget at any time; of more than twice as many it keeps these alone, so that its size has a bound.
RECORDED_TOKENS = 4096
# Tokens of all rows that are folded at a time: their gates and decayed keys take many times the bytes that the cache has for them.
FOLDED_AT_ONCE = 8192
LEVEL_LOWERED = (
    "this cache layer holds DSLA states, but the model's layer is softmax attention now: the keys and values of the text so far are gone. "
    "The level was lowered within one text; go back up, or start again with a new cache (past_key_values=None)"
)


class DSLACacheLayer(CacheLayerMixin):
    """Two states, the softmax window and a token count: constant size, whatever the length.

    It takes the place of the key-value layer at its index. A DSLA layer fills it by `advance`; `update` is what a softmax layer calls, and
    gets an error.

    A state cannot be rolled back, so for assisted decoding the layer records (`activate_past_recording`): it keeps the state
    of the last `crop` and the keys and values since, and builds the state anew from those that a crop leaves. Of a text longer
    than twice `RECORDED_TOKENS` since then the older part goes into that state.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False  # not without recording
    supports_early_init = False
    whole_windows = False  # whether every entry of `state.lengths` is known to be a multiple of the window's size, and not 0
    counts = True  # whether a step of one token adds to lengths and tokens; False where somebody does it for all layers at once

    def __init__(self) -> None:
        super().__init__()
        self.state: DualState | None = None
        self.tokens: int | Tensor = 0  # cached positions, padding included: what other layers of the cache count
        self.seen: int | None = 0  # what every entry of `state.lengths` is, None where rows differ or the host does not know
        self.record_past = False
        self._state_before_log: DualState | None = None
        self._log: list[tuple[Tensor, Tensor, Tensor]] = []  # k, v `[B, T, Hkv, D]` and mask `[B, T]` of each call since then
        self._recorded = 0  # tokens in it
        self._replay = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the state is made by the layer that fills it."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """For softmax layers: raises RuntimeError, earlier keys and values are in the state alone."""
        raise RuntimeError(LEVEL_LOWERED)

    def current_state(self, attention: DualStateAttention) -> DualState | None:
        """The state that `attention` reads next, built anew after a crop."""
        if self._replay:
            self.state, self.seen = _fold_in_pieces(attention, *self._joined_log(), self._state_before_log), None
            self._clear_log()
        return self.state

    def advance(self, state: DualState, k: Tensor, v: Tensor, padding_mask: Tensor | None = None) -> None:
        """Store the state after the tokens with these k, v `[B, T, Hkv, D]`."""
        if self.record_past:
            if not self._log:
                self._state_before_log = self.state
            mask = k.new_ones(k.shape[:2], dtype=torch.bool) if padding_mask is None else padding_mask.bool()
            self._log.append((k, v, mask))
            self._recorded += k.shape[1]
        elif self._recorded:  # before the recording was ended
            self._clear_log()
        self.state, self.is_initialized = state, True
        self.tokens = self.tokens + k.shape[1]
        self.seen = None if self.seen is None or padding_mask is not None else self.seen + k.shape[1]

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs."""
        self.record_past = True

    def shorten_record(self, attention: DualStateAttention) -> None:
        """Of a long record keep the newest tokens, and of the others `attention`'s state."""
        if self._recorded <= 2 * RECORDED_TOKENS:
            return
        k, v, mask = self._joined_log()
        older = self._recorded - RECORDED_TOKENS
        self._state_before_log = _fold_in_pieces(attention, k[:, :older], v[:, :older], mask[:, :older], self._state_before_log)
        # Copies: views would keep all of it alive.
        self._log = [(k[:, older:].clone(), v[:, older:].clone(), mask[:, older:].clone())]
        self._recorded = RECORDED_TOKENS

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens: their number as a negative one, or as older releases of transformers have it, the number that
        is to remain as a positive one. Also marks the point up to which later calls can crop.

        Raises:
            NotImplementedError: if they were not recorded; nothing is forgotten then.
        """
        remove = int(tokens_to_remove)
        remove = max(int(self.tokens) - remove, 0) if remove > 0 else -remove
        if remove == 0:
            if not self._replay:
                self._clear_log()
            return
        if remove > self._recorded:
            raise NotImplementedError(self._why_not(remove))
        keep = self._recorded - remove
        self.tokens = self.tokens - remove
        if keep:
            k, v, mask = (x[:, :keep] for x in self._joined_log())
            self._log, self._recorded, self._replay = [(k, v, mask)], keep, True
        else:
            self.state, self.seen = self._state_before_log, None
            self._clear_log()

    @property
    def batch_size(self) -> int:
        if self.state is None:
            raise AttributeError("no batch size before the first token")  # what `Cache.batch_size` expects of a layer
        return self.state.lengths.shape[0]

    def get_seq_length(self) -> int:
        return self.tokens  # type: ignore[return-value]  # a tensor in static caches, as in transformers

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def memory_bytes(self) -> int:
        """Bytes of all tensors held."""
        tensors = [*(self.state or ()), *(self._state_before_log or ()), *(x for entry in self._log for x in entry)]
        return sum(x.numel() * x.element_size() for x in {id(x): x for x in tensors}.values())

    def reset(self) -> None:
        self.state, self.tokens, self.seen, self.is_initialized = None, 0, 0, False
        self._clear_log()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda x: x[indices])

    def offload(self) -> None:
        """Stays where it is: it is small."""

    def prefetch(self) -> None:
        """Never offloaded."""

    def _why_not(self, remove: int) -> str:
        bound = f", the last {RECORDED_TOKENS} of a longer text" if self._recorded >= RECORDED_TOKENS else ""
        return (
            f"a DSLA state cannot forget {remove} tokens, {self._recorded} are recorded{bound}: call activate_past_recording() on the "
            "cache before the tokens that may be taken back, or read the text again up to there"
        )

    def _joined_log(self) -> tuple[Tensor, Tensor, Tensor]:
        k, v, mask = (torch.cat(parts, dim=1) for parts in zip(*self._log, strict=True))
        return k, v, mask

    def _clear_log(self) -> None:
        self._state_before_log, self._log, self._recorded, self._replay = None, [], 0, False

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = DualState(*map(change, self.state))
        if self._state_before_log is not None:
            self._state_before_log = DualState(*map(change, self._state_before_log))
        self._log = [(change(k), change(v), change(mask)) for k, v, mask in self._log]


class StaticDSLACacheLayer(DSLACacheLayer):
    """The same inside a `StaticCache`: tensors keep their addresses and are written in place, as compiled steps and CUDA graphs
    need; the token count is a tensor, so that it costs no recompilation."""

    is_compileable = True

    def __init__(self, max_length: int) -> None:
        super().__init__()
        self.max_length = max_length
        self.tokens, self.seen = torch.tensor(0), None
        self._empty = True  # what the host knows of `tokens`: a prompt after `reset` is read as the first one is

    def current_state(self, attention: DualStateAttention) -> DualState | None:
        if self._empty or self.state is None:
            return None
        # A backward pass needs what was read as it was, and `advance` writes over these tensors.
        return clone_state(self.state) if torch.is_grad_enabled() else self.state

    def take(self, other: DSLACacheLayer) -> None:
        """Copy what `other` remembers into this layer's own tensors (`other` and this one have been filled)."""
        assert self.state is not None and other.state is not None
        for mine, theirs in zip(self.state, other.state, strict=True):
            mine.copy_(theirs)
        self.tokens.copy_(torch.as_tensor(other.tokens))  # type: ignore[union-attr]
        self._empty = False

    def advance(self, state: DualState, k: Tensor, v: Tensor, padding_mask: Tensor | None = None) -> None:
        if self.state is None:
            self.state, self.is_initialized = DualState(*(x.clone() for x in state)), True
            self.tokens = torch.as_tensor(self.tokens, device=k.device).clone()
            if not torch.compiler.is_compiling():
                for x in (*self.state, self.tokens):
                    torch._dynamo.mark_static_address(x)
        else:
            for old, new in zip(self.state, state, strict=True):
                if old is not new:  # a kernel has written it already
                    if old.requires_grad:  # all of it is replaced: no gradient goes back to what it was
                        old.detach_()
                    old.copy_(new)
        if self.counts:
            self.tokens.add_(k.shape[1])  # type: ignore[union-attr]
        self._empty = False

    def count_in(self, lengths: Tensor, tokens: Tensor) -> None:
        """Keep both counts in these tensors from now on, `[B]` and `[]`: parts of those of all layers."""
        assert self.state is not None
        lengths.copy_(self.state.lengths)
        tokens.copy_(torch.as_tensor(self.tokens))
        self.state, self.tokens = self.state._replace(lengths=lengths), tokens

    def activate_past_recording(self) -> None:
        raise NotImplementedError(self._why_not(0))

    def _why_not(self, remove: int) -> str:
        return "a static cache cannot be rolled back: use a dynamic one for assisted decoding"

    def get_seq_length(self) -> int:
        return self.tokens if self.is_initialized else 0  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_length, 0

    def reset(self) -> None:
        for x in (*(self.state or ()), self.tokens):
            x.zero_()
        self._empty = True


class VisibleStaticLayer(StaticLayer):
    """Keys and values of a softmax layer at fixed addresses, of which attention is shown the first `visible` places only: a cache
    made for a long text is then not read to its end while the text is short. A step of one token may be told its `places`: the layer
    above asks five launches for what a kernel does in one."""

    def __init__(self, max_cache_len: int) -> None:
        super().__init__(max_cache_len)
        self.visible = max_cache_len
        self.places: Tensor | None = None  # int `[B]`, where the next token goes, for a kernel that writes it; None: behind the others

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.places is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        else:
            keys, values = self.keys, self.values
            append(keys, values, key_states, value_states, self.places, self.cumulative_length)
        return keys[:, :, : self.visible], values[:, :, : self.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.visible, 0


def fold(
    attention: DualStateAttention,
    keys: Tensor,
    values: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    max_length: int | None = None,
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

    Where keys or values require a gradient (trained ones, or those of text that is trained on), it flows through the fold.

    Raises:
        ValueError: if shapes do not fit, or positions of a row restart (packed texts must not share a state).
    """
    expected = (attention.num_kv_heads, attention.key_dim, attention.value_dim)
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
    layer = DSLACacheLayer() if max_length is None else StaticDSLACacheLayer(max_length)
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    state = _fold_in_pieces(attention, k, v, mask)
    layer.advance(state, k, v, mask)
    return layer


def _fold_in_pieces(
    attention: DualStateAttention, k: Tensor, v: Tensor, mask: Tensor | None = None, state: DualState | None = None
) -> DualState:
    """`attention.fold` of k, v `[B, T, Hkv, D]` and mask `[B, T]`, some tokens at a time."""
    piece = max(FOLDED_AT_ONCE // k.shape[0], 1)
    masks = [None] * -(-k.shape[1] // piece) if mask is None else mask.split(piece, 1)
    for k_part, v_part, mask_part in zip(k.split(piece, 1), v.split(piece, 1), masks, strict=True):
        state = attention.fold(k_part, v_part, mask_part, state)
    assert state is not None
    return state


# Cache layers of which keys and values can be read, so that they can be folded; subclasses may hold them otherwise (quantised, say).
FOLDABLE = (DynamicLayer, StaticLayer, VisibleStaticLayer, DynamicSlidingWindowLayer, StaticSlidingWindowLayer)


def check_cache(cache: Any, converted: list[bool], rows: int, tokens: int, recorded: bool = False) -> int | Tensor:
    """Make sure that a call can go on from `cache`, before its first layer runs; the tokens that it holds.

    Args:
        cache: as the model was given it.
        converted: which of the model's layers are DSLA now.
        rows, tokens: of the call.
        recorded: the call is compiled or captured: no value is looked at.

    Raises:
        RuntimeError: if a layer was DSLA and is softmax attention now, or a call has failed midway and left the cache half advanced.
        ValueError: for keys and values that cannot be folded, other rows, or too many tokens for a static cache.
    """
    layers = list(zip(getattr(cache, "layers", ()), converted, strict=False))
    for index, (layer, is_dsla) in enumerate(layers):
        if isinstance(layer, DSLACacheLayer):
            if not is_dsla:
                raise RuntimeError(f"layer {index}: {LEVEL_LOWERED}")
            if layer.state is not None and layer.batch_size != rows:
                raise ValueError(f"the cache holds {layer.batch_size} rows, the call has {rows}: give it a cache of its own")
        elif is_dsla and (recorded or _tokens_of(layer) > 0):
            _check_foldable(index, layer)
    if recorded or not any(is_dsla for _, is_dsla in layers):
        return cache.get_seq_length()
    counts = [_tokens_of(layer) for layer, _ in layers]
    if len(set(counts)) > 1:
        raise RuntimeError(
            f"the layers of the cache hold different numbers of tokens, {counts}: a call has failed midway. Start again with a new cache"
        )
    for layer, is_dsla in layers:
        if not is_dsla and type(layer) is StaticLayer and counts[0] + tokens > layer.get_max_length():
            raise ValueError(
                f"the static cache has room for {layer.get_max_length()} tokens; {counts[0]} are there, and {tokens} come: make it with a "
                f"max_cache_len of {counts[0] + tokens} or more"
            )
    return counts[0]


def _check_foldable(index: int, layer: Any) -> None:
    if type(layer) not in FOLDABLE:
        raise ValueError(
            f"layer {index} cannot become DSLA in mid-text: its cache is a {type(layer).__name__}, whose keys and values cannot be "
            "read in full. Set the level before the text begins, or use a DynamicCache"
        )


def _tokens_of(layer: Any) -> int:
    return int(layer.get_seq_length())


def dsla_cache_layer(
    cache: Cache, layer_idx: int, attention: DualStateAttention, layout: TokenLayout, exact: bool = True
) -> DSLACacheLayer:
    """The DSLA layer of `cache` at `layer_idx`; a key-value layer found there is folded and replaced, its memory freed.

    With `exact` False (the DSLA layer has keys or values of its own) a fold is approximate, and that is said once.

    Raises:
        ValueError: for a kind of cache layer whose keys and values cannot be read.
    """
    replicate = getattr(cache, "layer_class_to_replicate", None)
    while replicate is not None and len(cache.layers) <= layer_idx:
        cache.layers.append(replicate())
    layer = cache.layers[layer_idx]
    if isinstance(layer, DSLACacheLayer):
        return layer
    tokens = _tokens_of(layer)
    max_length = max(other.get_max_length() for other in cache.layers) if isinstance(layer, StaticLayer) else None
    if tokens == 0:
        new = DSLACacheLayer() if max_length is None else StaticDSLACacheLayer(max_length)
    else:
        _check_foldable(layer_idx, layer)
        if not exact:
            logger.warning_once(
                "a text goes on at a higher level with trained k_proj or v_proj: the states are folded from the original model's keys "
                "and values, which is approximate. Set the level before the text begins, or train with the default trained_projections"
            )
        keys, values = _cached(layer, tokens)
        cached = keys.shape[2]
        if cached < tokens:
            logger.warning_once(
                f"layer {layer_idx} had a sliding window: of its {tokens} tokens the last {cached} are cached, and the states begin there"
            )
        new = fold(attention, keys, values, attention_mask=layout.past_mask(tokens, cached), max_length=max_length)
        new.tokens = new.tokens + (tokens - cached)
    if getattr(cache, RECORDS_PAST, False):
        new.activate_past_recording()
    cache.layers[layer_idx] = new
    return new


def _cached(layer: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values `[B, Hkv, T, D]` of the last tokens that a key-value layer still has."""
    slots = layer.keys.shape[2]
    if type(layer) is StaticSlidingWindowLayer and tokens >= slots:  # the oldest one leaves with the next token
        return layer.keys[:, :, 1:], layer.values[:, :, 1:]
    kept = min(tokens, slots)
    return layer.keys[:, :, :kept], layer.values[:, :, :kept]


def _teach_caches() -> None:
    """Give `Cache` what its layers cannot know or do alone, wherever `generate` comes from. Caches without DSLA layers work as before.

    transformers asks a cache to record before the first forward, when the layers that DSLA layers will replace are still there: the cache
    remembers it. And a crop that one layer refuses leaves the others as they were.
    """
    activate, crop = Cache.activate_past_recording, Cache.crop

    @functools.wraps(activate)
    def activate_past_recording(self: Cache) -> None:
        activate(self)
        if not isinstance(self, StaticCache):
            setattr(self, RECORDS_PAST, True)

    @functools.wraps(crop)
    def crop_all_or_none(self: Cache, tokens_to_remove: int) -> None:
        # Layers crop by assignment, never in place.
        before = [dict(vars(layer)) for layer in self.layers] if any(isinstance(layer, DSLACacheLayer) for layer in self.layers) else []
        try:
            crop(self, tokens_to_remove)
        except BaseException:
            for layer, values in zip(self.layers, before, strict=False):
                layer.__dict__ = values
            raise

    Cache.activate_past_recording, Cache.crop = activate_past_recording, crop_all_or_none


_teach_caches()


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that the layers of `cache` hold."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, DSLACacheLayer):
            total += layer.memory_bytes()
        elif torch.is_tensor(getattr(layer, "keys", None)):
            total += sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
    return total
