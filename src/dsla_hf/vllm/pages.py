"""What converted heads keep of a request: states and the ring of their window's keys and values, in pages of vLLM's cache.

All pages of a model are alike: one holds as many converted heads as the layer with the most of them has, those of that layer or of several
with fewer. Kept heads of a layer converted in part have their keys and values in pages of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.attention import DualState


def head_size(config: Any) -> int:
    """K, the channels of a head of q, k and v."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def converted_heads(config: Any) -> dict[int, tuple[int, ...]]:
    """The converted KV heads, by number, of each layer that has any.

    Args:
        config: of the hybrid, a `DSLAHybridConfig`.
    """
    dsla = config.get_dsla_config()
    if dsla.conversion_unit == "layer":
        return dict.fromkeys(dsla.converted_layers, tuple(range(config.num_key_value_heads)))
    return {layer: dsla.heads_of(layer) for layer in dsla.layers_to_transform}


class Place(NamedTuple):
    """Where the converted heads of a layer are: on which page, by number, and from which of its heads on."""

    page: int
    first: int


def places(converted: dict[int, int]) -> dict[int, Place]:
    """A place for the converted heads of each layer, in few pages.

    Args:
        converted: how many heads of each layer, by its number.
    """
    size = max(converted.values())
    free: list[int] = []  # heads that each page still has room for
    found = {}
    for layer, heads in sorted(converted.items(), key=lambda entry: -entry[1]):  # the large ones first, each where it fits
        page = next((i for i, room in enumerate(free) if room >= heads), len(free))
        free += [size] * (page == len(free))
        found[layer] = Place(page, size - free[page])
        free[page] -= heads
    return found


def page_parts(config: Any, dtype: torch.dtype, heads: int) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each tensor in a page, of one request, in the order of `DualState`.

    Args:
        config: of the hybrid, a `DSLAHybridConfig`.
        dtype: the model's, in which the ring is kept.
        heads: H, the converted KV heads that it holds.

    Returns:
        Two states `(H, 2, K, K)` in fp32 if layers have states; keys and values `(W + S, H, K)` if they have a window.
    """
    dsla, size = config.get_dsla_config(), head_size(config)
    states = [((heads, 2, size, size), torch.float32)] if dsla.states else []
    ring = [((dsla.window_size + dsla.sink_tokens, heads, size), dtype)] * 2 if dsla.window_size else []
    return (*states, *ring)


def of_heads(page: tuple[Tensor, ...], first: int, heads: int, states: bool) -> tuple[Tensor, ...]:
    """The part of a page of so many heads from `first` on, views; arguments as in `read_state`."""
    return tuple(tensor.narrow(1 if states and i == 0 else 2, first, heads) for i, tensor in enumerate(page))


def read_state(page: tuple[Tensor, ...], slots: Tensor, lengths: Tensor, size: int, states: bool, window: bool) -> DualState:
    """The state of some requests, a copy. Of a request without tokens it is empty, whatever another one has left in the page.

    Args:
        page: the layer's part of the cache, tensors of `page_parts` with slots in front.
        slots: int64 `[B]`, where each request's page lies.
        lengths: int64 `[B]`, how many tokens of each request the page has seen.
        size: K, as in `head_size`.
        states: whether the layer has states.
        window: whether it has a window.
    """
    parts = [tensor[slots] for tensor in page]
    for part in parts:
        part.masked_fill_((lengths == 0).view(-1, *[1] * (part.dim() - 1)), 0)
    heads = parts[0].shape[1] if states else parts[0].shape[2]
    batch = len(slots)
    recurrent = parts.pop(0) if states else page[0].new_empty(batch, heads, 0, size, size, dtype=torch.float32)
    k, v = parts if window else [recurrent.new_empty(batch, 0, heads, size) for _ in range(2)]
    return DualState(recurrent, k, v, lengths)


def write_state(page: tuple[Tensor, ...], slots: Tensor, state: DualState, states: bool) -> None:
    """Put the state of some requests into their pages; arguments as in `read_state`."""
    parts = (state.recurrent, state.window_k, state.window_v) if states else (state.window_k, state.window_v)
    for tensor, new in zip(page, parts, strict=False):  # a pure layer has no ring
        tensor[slots] = new.to(tensor.dtype)
