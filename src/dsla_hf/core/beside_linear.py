"""Cache layers of decoder layers whose attention runs beside something linear (Falcon-H1): states of DSLA, and the linear part's own.

transformers has one cache layer for both there, and the linear part asks the cache for its convolution and recurrent states by the number
of its layer. So what takes the place of keys and values has that part, too: moved over as it is, and read and written by its owner alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import (
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndStaticFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
    LinearAttentionLayer,
)

from .cache import DSLACacheLayer, StaticDSLACacheLayer, VisibleStaticLayer
from .partial_cache import PartialCacheLayer


def has_linear_part(layer: Any) -> bool:
    """Whether a layer of a cache holds states of something linear, alone or beside attention."""
    return isinstance(layer, LinearAttentionCacheLayerMixin)


class _BesideLinear:
    """What is done with both parts. The attention's comes behind this in the order of bases, and then `LinearAttentionLayer`."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)  # the linear part alone asks

    def reset(self) -> None:
        LinearAttentionLayer.reset(self)
        super().reset()  # type: ignore[misc]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        LinearAttentionLayer.reorder_cache(self, beam_idx)
        super().reorder_cache(beam_idx)  # type: ignore[misc]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map_linear(lambda x: x.repeat_interleave(repeats, dim=0))
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map_linear(lambda x: x[indices])
        super().batch_select_indices(indices)  # type: ignore[misc]

    def memory_bytes(self) -> int:
        """Bytes of all tensors held."""
        own = sum(x.numel() * x.element_size() for states in self._linear_states() for x in states.values() if x is not None)
        return own + super().memory_bytes()  # type: ignore[misc]

    def _linear_states(self) -> list[dict[int, Any]]:
        return [self.conv_states, self.recurrent_states]  # type: ignore[attr-defined]

    def _map_linear(self, change: Callable[[Tensor], Tensor]) -> None:
        for states in self._linear_states():
            states.update({i: change(x) for i, x in states.items() if x is not None})


class DSLABesideLinearLayer(_BesideLinear, DSLACacheLayer, LinearAttentionLayer):
    """A `DSLACacheLayer` with the states of a linear part."""

    is_croppable = False


class StaticDSLABesideLinearLayer(_BesideLinear, StaticDSLACacheLayer, LinearAttentionLayer):
    """A `StaticDSLACacheLayer` with the states of a linear part."""

    is_croppable = False


class VisibleBesideLinearLayer(VisibleStaticLayer, LinearAttentionAndStaticFullAttentionLayer):
    """A `VisibleStaticLayer` with the states of a linear part."""


# Layers whose keys and values can be folded, and whose other part goes on.
BESIDE_LINEAR = (LinearAttentionAndFullAttentionLayer, LinearAttentionAndStaticFullAttentionLayer, VisibleBesideLinearLayer)
_BESIDE: dict[type, Any] = {
    DSLACacheLayer: DSLABesideLinearLayer,
    StaticDSLACacheLayer: StaticDSLABesideLinearLayer,
    VisibleStaticLayer: VisibleBesideLinearLayer,
}


def with_linear_part(layer: Any, before: Any) -> Any:
    """A layer of DSLA or a `VisibleStaticLayer` with the linear part of `before`, the cache layer whose place it takes; as it is if that
    has none. Both then have the same states."""
    if not has_linear_part(before):
        return layer
    kind = _BESIDE[type(layer)]
    new = kind.__new__(kind)
    linear = {name: getattr(before, name) for name in vars(LinearAttentionLayer())}
    new.__dict__.update({**layer.__dict__, **linear})
    new.record_past = getattr(layer, "record_past", before.record_past)  # of DSLA it is its own
    return new


class PartialBesideLinearLayer(PartialCacheLayer, LinearAttentionLayer):
    """A `PartialCacheLayer` whose softmax layer has the states of a linear part."""

    def __getattribute__(self, name: str) -> Any:
        if name in _OF_LINEAR_PART:
            return getattr(self.softmax, name)
        return super().__getattribute__(name)


# What a linear part asks of its cache layer, and what the cache itself does.
_OF_LINEAR_PART = {*vars(LinearAttentionLayer()), "update_conv_state", "update_recurrent_state"} - {"record_past"}


def partial_layer(softmax: Any, converted: DSLACacheLayer, heads: tuple[int, ...], kept: tuple[int, ...]) -> PartialCacheLayer:
    """The `PartialCacheLayer` of these, also where the softmax layer has a linear part beside it."""
    kind = PartialBesideLinearLayer if has_linear_part(softmax) else PartialCacheLayer
    return kind(softmax, converted, heads, kept)
