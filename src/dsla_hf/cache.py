"""The cache of a DSLA layer inside a transformers `Cache`, and the fold that makes one from a softmax layer's cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.utils import logging

from .attention import DualState, DualStateAttention
from .layout import TokenLayout

logger = logging.get_logger(__name__)


class DSLACacheLayer(CacheLayerMixin):
    """Two states, the softmax window and a token count: constant size, whatever the length.

    It takes the place of the key-value layer at its index. `update` only passes keys and values through, and only when
    the DSLA layer has announced itself by `expect_update`; a softmax layer that finds it gets an error.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, max_length: int = -1):
        super().__init__()
        self.state: DualState | None = None
        self.tokens = 0  # cached positions, padding included: what other layers of the cache count
        self.max_length = max_length
        self._update_expected = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the state is made by the layer that fills it."""

    def expect_update(self) -> None:
        """Announce that the next `update` comes from a DSLA layer."""
        self._update_expected = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Keys and values as they come: earlier ones are in the state.

        Raises:
            RuntimeError: when a softmax layer calls it.
        """
        if not self._update_expected:
            raise RuntimeError(
                "this cache layer holds DSLA states, but the model's layer is softmax attention now: the keys and values of the "
                "text so far are gone. The level was lowered within one text; start again with a new cache (past_key_values=None)"
            )
        self._update_expected = False
        return key_states, value_states

    def advance(self, state: DualState, tokens: int) -> None:
        """Store the state after `tokens` more positions."""
        self.state, self.is_initialized = state, True
        self.tokens += tokens

    @property
    def batch_size(self) -> int:
        if self.state is None:
            raise AttributeError("no batch size before the first token")  # what `Cache.batch_size` expects of a layer
        return self.state.lengths.shape[0]

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return (self.tokens + query_length if self.max_length < 0 else self.max_length), 0

    def memory_bytes(self) -> int:
        """Bytes of all tensors held."""
        return 0 if self.state is None else sum(x.numel() * x.element_size() for x in self.state)

    def reset(self) -> None:
        self.state, self.tokens, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Raises NotImplementedError unless there is nothing to remove: a state cannot be rolled back."""
        if int(tokens_to_remove) != 0:
            raise NotImplementedError("a DSLA state cannot be cropped; generate without assistant or prompt lookup, or at level 0")

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

    def _map(self, change) -> None:
        if self.state is not None:
            self.state = DualState(*(change(x) for x in self.state))


def fold(
    attention: DualStateAttention,
    keys: Tensor,
    values: Tensor,
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> DSLACacheLayer:
    """Turn the cached keys and values of a softmax layer into the state that `attention` would have built from them.

    Args:
        attention: the DSLA layer that will read the state.
        keys, values: `[B, Hkv, T, D]` as transformers caches them (keys rotated).
        attention_mask: `[B, T]`, nonzero at real tokens, None if all are; padding may lie anywhere.
        position_ids: `[B, T]`, only to make sure that each row is one text: the states need no positions, because
            cached keys are rotated already.

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
    layer = DSLACacheLayer()
    layer.advance(attention.fold(keys.transpose(1, 2), values.transpose(1, 2), mask), keys.shape[2])
    return layer


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
    tokens = int(layer.get_seq_length())
    max_length = layer.get_max_length() if isinstance(layer, StaticLayer) else -1
    if tokens == 0:
        new = DSLACacheLayer(max_length)
    elif type(layer) in (DynamicLayer, StaticLayer):
        if not exact:
            logger.warning_once(
                "a text goes on at a higher level with trained k_proj or v_proj: the states are folded from the original model's keys "
                "and values, which is approximate. Set the level before the text begins, or train with the default trained_projections"
            )
        keys, values = (x[:, :, :tokens] for x in (layer.keys, layer.values))
        new = fold(attention, keys, values, attention_mask=layout.past_mask(tokens))
        new.max_length = max_length
    else:
        raise ValueError(
            f"layer {layer_idx} cannot become DSLA in mid-text: its cache is a {type(layer).__name__}, whose keys and values cannot be "
            "read in full. Set the level before the text begins, or use a DynamicCache"
        )
    cache.layers[layer_idx] = new
    return new


def cache_bytes(cache: Cache) -> int:
    """Bytes of all tensors that the layers of `cache` hold."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, DSLACacheLayer):
            total += layer.memory_bytes()
        elif torch.is_tensor(getattr(layer, "keys", None)):
            total += sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))
    return total
