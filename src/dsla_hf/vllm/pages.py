"""What a converted layer keeps of a request: one page of vLLM's cache holds its states and the ring of its window's keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.attention import DualState


def head_size(config: Any) -> int:
    """K, the channels of a head of q, k and v."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def page_parts(config: Any, dtype: torch.dtype) -> tuple[tuple[tuple[int, ...], torch.dtype], ...]:
    """Shape and dtype of each tensor in a page, of one request, in the order of `DualState`.

    Args:
        config: of the hybrid, a `DSLAHybridConfig`.
        dtype: the model's, in which the ring is kept.

    Returns:
        Two states `(Hkv, 2, K, K)` in fp32 if the layer has states; keys and values `(W + S, Hkv, K)` if it has a window.
    """
    dsla = config.get_dsla_config()
    heads, size = config.num_key_value_heads, head_size(config)
    states = [((heads, 2, size, size), torch.float32)] if dsla.states else []
    ring = [((dsla.window_size + dsla.sink_tokens, heads, size), dtype)] * 2 if dsla.window_size else []
    return (*states, *ring)


def read_state(page: tuple[Tensor, ...], slots: Tensor, lengths: Tensor, size: int, states: bool, window: bool) -> DualState:
    """The state of some requests, a copy. Of a request without tokens it is empty, whatever another one has left in the page.

    Args:
        page: a layer's cache, the tensors of `page_parts` with slots in front.
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
