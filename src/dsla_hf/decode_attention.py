"""Softmax attention of one new token over a cache that is read as far as it is filled, and where it lies.

transformers hands an attention function keys, values and a mask of the same length. A static cache is then read to its end, and a paged
one is copied first. Steps inside `over_cache` use the split-KV kernel instead, which knows lengths and block tables; everything else
goes to SDPA as it would without this module.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from dsla_kernels import softmax_decode, uses_triton

ATTENTION_FUNCTION = "dsla_decode"


@dataclass(frozen=True)
class CachedTokens:
    """What the rows of a step hold in their caches.

    lengths: int `[B]`, tokens of each row, the new one included.
    mask: bool `[B, T]`, False at padding in the cache; None if there is none.
    block_tables: int `[layers, B, most blocks]`, where the cache is a pool of blocks that keys and values are handed over as
        (`[blocks, block_size, Hkv, D]`); None for `[B, Hkv, T, D]`.
    """

    lengths: Tensor
    mask: Tensor | None = None
    block_tables: Tensor | None = None


_cached: ContextVar[CachedTokens | None] = ContextVar("cached tokens of this step", default=None)


def can_attend_where_cached(model: Any) -> bool:
    """Whether the kernel runs on the device of `model`, and the user has not asked for another attention than SDPA."""
    head = torch.empty(0, 1, device=model.device, dtype=model.dtype)
    return model.config._attn_implementation in ("sdpa", ATTENTION_FUNCTION) and uses_triton(head, head)


@contextmanager
def attends_where_cached(model: Any) -> Iterator[None]:
    """Let `model` take this module's attention function for the time being."""
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION_FUNCTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def over_cache(cached: CachedTokens) -> Iterator[None]:
    """Calls of the model inside are steps of one token a row over caches that hold `cached`."""
    token = _cached.set(cached)
    try:
        yield
    finally:
        _cached.reset(token)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """query `[B, Hq, T, D]`, as transformers calls attention functions; o `[B, T, Hq, D]`."""
    cached = _cached.get()
    if cached is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    o = softmax_decode(
        query.transpose(1, 2),
        key,
        value,
        cached.lengths,
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap"),
        sink_logits=kwargs.get("s_aux"),
        window=kwargs.get("sliding_window"),
        mask=cached.mask,
        block_table=None if cached.block_tables is None else cached.block_tables[module.layer_idx],
    )
    return o, None


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _cached.get() is not None else ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


AttentionInterface.register(ATTENTION_FUNCTION, _attend)
AttentionMaskInterface.register(ATTENTION_FUNCTION, _mask)
