"""The cache of a DSLA layer inside a transformers `Cache`, and the softmax layers that go with it in static caches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, StaticCache, StaticLayer

from dsla_kernels import append

from ..compat.attributes import keep_address
from ..compat.methods import around
from .attention import DualStateAttention
from .past import DualState, clone_state

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
    state_heads: Tensor | None = None  # where `state` has further heads: which of its heads are those of the layer that fills it
    counts = True  # whether a step of one token adds to lengths and tokens; False where somebody does it for all layers at once
    # While tokens are read that may be taken back: their keys and values `[rows, tokens, heads, D]` go there, and the state stays. For
    # layers at fixed addresses, which do not record.
    scratch: tuple[Tensor, Tensor] | None = None

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
            self.state, self.seen = fold_in_pieces(attention, *self._joined_log(), self._state_before_log), None
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

    def holds_back(self, k: Tensor, v: Tensor) -> bool:
        """Whether tokens with these k, v `[B, T, heads, D]` are not to change the state; they are in `scratch` then."""
        if self.scratch is None:
            return False
        for mine, new in zip(self.scratch, (k, v), strict=True):
            mine[: k.shape[0], : k.shape[1]].copy_(new)
        return True

    def activate_past_recording(self) -> None:
        """From now on keep what `crop` needs."""
        self.record_past = True

    def shorten_record(self, attention: DualStateAttention) -> None:
        """Of a long record keep the newest tokens, and of the others `attention`'s state."""
        if self._recorded <= 2 * RECORDED_TOKENS:
            return
        k, v, mask = self._joined_log()
        older = self._recorded - RECORDED_TOKENS
        self._state_before_log = fold_in_pieces(attention, k[:, :older], v[:, :older], mask[:, :older], self._state_before_log)
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
        if self.holds_back(k, v):
            return
        if self.state is None:
            self.state, self.is_initialized = clone_state(state), True
            self.tokens = torch.as_tensor(self.tokens, device=k.device).clone()
            if not torch.compiler.is_compiling():
                for x in (*self.state, self.tokens):
                    keep_address(x)
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
    above asks five launches for what a kernel does in one.

    It has room for all tokens of a text, also where attention slides: a mask, or the kernel, leaves out those that have left the window.

    count: int64 `[]`, where tokens are counted: a part of that of all layers. None: one of its own.
    window: of attention that slides, in tokens, a query's own included; None where all are seen.
    """

    def __init__(self, max_cache_len: int, count: Tensor | None = None, window: int | None = None) -> None:
        super().__init__(max_cache_len)
        if count is not None:
            self.cumulative_length = count
        self.window, self.is_sliding = window, window is not None
        self.visible = max_cache_len
        self.places: Tensor | None = None  # int `[B]`, where the next token goes, for a kernel that writes it; None: behind the others
        self.past: int | None = None  # tokens before a piece of a prompt that is read; None in steps, whose lengths no host knows

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if self.places is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
        else:
            keys, values = self.keys, self.values
            append(keys, values, key_states, value_states, self.places, self.cumulative_length)
        first = self._first()
        return keys[:, :, first : self.visible], values[:, :, first : self.visible]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.visible - self._first(), self._first()

    def _first(self) -> int:
        """The first place that is shown: of a prompt none that its first token does not see."""
        return 0 if self.past is None else self.out_of_window(self.past + 1)

    def out_of_window(self, tokens: int) -> int:
        """How many of so many tokens the last one does not see."""
        return 0 if self.window is None else max(tokens - self.window, 0)


def fold_in_pieces(
    attention: DualStateAttention,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    state: DualState | None = None,
    kv_heads: Tensor | None = None,
) -> DualState:
    """`attention.fold` of k, v `[B, T, Hkv, D]` and mask `[B, T]`, some tokens at a time; kv_heads as there."""
    piece = max(FOLDED_AT_ONCE // k.shape[0], 1)
    if not attention.states and attention.window_size and mask is None and not attention.reorders_keys:
        piece = max(k.shape[1], 1)  # it takes what its window has, and passes over the rest
    masks = [None] * -(-k.shape[1] // piece) if mask is None else mask.split(piece, 1)
    for k_part, v_part, mask_part in zip(k.split(piece, 1), v.split(piece, 1), masks, strict=True):
        state = attention.fold(k_part, v_part, mask_part, state, kv_heads=kv_heads)
    assert state is not None
    return state


# --- what caches of transformers cannot know or do alone; those without DSLA layers work as before ------------------


def _remember_to_record(activate: Callable[..., None], cache: Cache) -> None:
    """transformers asks a cache to record before the first forward, when the layers that DSLA layers will replace are still there: the
    cache remembers it."""
    activate(cache)
    if not isinstance(cache, StaticCache):
        setattr(cache, RECORDS_PAST, True)


def _crop_all_or_none(crop: Callable[..., None], cache: Cache, tokens_to_remove: int) -> None:
    """A crop that one layer refuses leaves the others as they were: layers crop by assignment, never in place."""
    layers = [part for layer in cache.layers for part in getattr(layer, "parts", (layer,))]  # of a `PartialCacheLayer` two
    has_states = any(isinstance(layer, DSLACacheLayer) for layer in layers)
    if has_states and tokens_to_remove and any(any(getattr(x, "is_recurrent_states_initialized", {}).values()) for x in layers):
        raise NotImplementedError("linear layers of this base cannot forget tokens (their crop would change nothing): read the text again")
    before = [dict(vars(layer)) for layer in layers] if has_states else []
    try:
        crop(cache, tokens_to_remove)
    except BaseException:
        for layer, values in zip(layers, before, strict=False):
            layer.__dict__ = values
        raise


around("transformers.cache_utils:Cache.activate_past_recording", _remember_to_record)
around("transformers.cache_utils:Cache.crop", _crop_all_or_none)


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that the layers of `cache` hold."""
    total = 0
    for layer in cache.layers:
        if hasattr(layer, "memory_bytes"):  # with DSLA in it
            total += layer.memory_bytes()
            continue
        held = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        held += [x for name in ("conv_states", "recurrent_states") for x in getattr(layer, name, {}).values()]  # linear layers of the base
        total += sum(x.numel() * x.element_size() for x in held if torch.is_tensor(x))
    return total
