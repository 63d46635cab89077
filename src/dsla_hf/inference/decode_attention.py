"""Softmax attention over a cache that is read as far as it is filled, and where it lies.

transformers hands an attention function keys, values and a mask of the same length. A static cache is then read to its end, a paged one
is copied first, and a prompt that goes on behind a cache has a mask, with which SDPA cannot run its flash kernel. Steps of one token or a
few inside `over_cache` use the split-KV kernel instead, which knows lengths and block tables, and pieces of prompts over blocks one that
knows them too. Prompts inside `over_prompt`, and pieces that texts begin with, need no mask: see `prompt_attention`.
Everything else goes to SDPA as it would without this module.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from dsla_kernels import softmax_decode, softmax_prompt, uses_triton

from ..compat.attention_functions import ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS
from ..compat.attributes import attention_implementation
from .prompt_attention import attend_to_prompt

ATTENTION_FUNCTION = "dsla_decode"
QUERIES = 512  # of a prompt that read a sliding window at a time, at least: as many as the window is long, where that is longer
FEW = 16  # tokens a row up to which the cache is cut into parts, as for one: there are too few queries to keep a GPU at work


@dataclass(frozen=True)
class CachedTokens:
    """What the rows of a step hold in their caches.

    lengths: int `[B]`, tokens of each row, the new ones included.
    mask: bool `[B, T]`, False at padding in the cache; None if there is none.
    block_tables: int `[groups, B, most blocks]`, where the cache is a pool of blocks that keys and values are handed over as
        (`[blocks, block_size, heads, D]`); None for `[B, Hkv, T, D]`.
    places: with block tables, by layer, where its heads lie: the number of its own table, or int32 `[Hkv, 2]`, of each its table and which
        of the heads of a block it is.
    starts: int `[B]`, tokens of each row before the new ones, where rows differ in these, or they are more than `FEW` (with block tables).
        More rows than the call has: its one row holds that many pieces, of equal room and maybe of one text, one behind the other.
    begins: texts begin with the new tokens, so that these are all there is to attend to; keys and values are then those of the call.
    recorded: the call is recorded, and so has this shape whenever it is replayed.
    """

    lengths: Tensor
    mask: Tensor | None = None
    block_tables: Tensor | None = None
    starts: Tensor | None = None
    places: Sequence[int | Tensor | None] = ()
    begins: bool = False
    recorded: bool = False


_cached: ContextVar[CachedTokens | None] = ContextVar("cached tokens of this step", default=None)
_prompt: ContextVar[bool] = ContextVar("whether a prompt without padding is read", default=False)


def can_attend_where_cached(model: Any) -> bool:
    """Whether the kernel runs on the device of `model`, and the user has not asked for another attention than SDPA."""
    head = torch.empty(0, 1, device=model.device, dtype=model.dtype)
    return attention_implementation(model.config) in ("sdpa", ATTENTION_FUNCTION) and uses_triton(head, head)


@contextmanager
def attends_where_cached(model: Any) -> Iterator[None]:
    """Let `model` take this module's attention function for the time being."""
    before = attention_implementation(model.config)
    model.set_attn_implementation(ATTENTION_FUNCTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def over_cache(cached: CachedTokens) -> Iterator[None]:
    """Calls of the model inside read one token a row, or some, over caches that hold `cached` with them."""
    token = _cached.set(cached)
    try:
        yield
    finally:
        _cached.reset(token)


def run_token(model: Any, space: Any, mask: Tensor | None, by_length: bool) -> None:
    """A step of one token a row: the logits after `space.tokens` `[B, 1]` at `space.positions`, over `space.cache`, into `space.logits`.

    mask: `[B, T]` of what is shown of the cache, None without padding. by_length: attention reads `space.lengths` `[B]` in place of a mask.
    """
    with over_cache(CachedTokens(space.lengths, mask)) if by_length else nullcontext():
        logits = model(
            input_ids=space.tokens,
            attention_mask=mask,
            position_ids=space.positions,
            past_key_values=space.cache,
            use_cache=True,
        ).logits
    space.logits.copy_(logits[:, -1])


@contextmanager
def over_prompt() -> Iterator[None]:
    """Calls of the model inside read prompts without padding: every token sees all cached ones and those before it."""
    token = _prompt.set(True)
    try:
        yield
    finally:
        _prompt.reset(token)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any) -> tuple[Tensor, None]:
    """query `[B, Hq, T, D]`, as transformers calls attention functions; o `[B, T, Hq, D]`."""
    cached = _cached.get()
    if cached is None and not _prompt.get():
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    scale, window = kwargs.get("scaling"), kwargs.get("sliding_window")
    if cached is None or cached.begins:
        if window is None or key.shape[2] <= window:
            return attend_to_prompt(query, key, value, scale, recorded=cached is not None and cached.recorded), None
        return _attend_sliding(query, key, value, window, scale).transpose(1, 2).contiguous(), None
    table = heads = None
    if cached.block_tables is not None:
        place = cached.places[module.layer_idx]
        table, heads = (cached.block_tables, place) if isinstance(place, Tensor) else (cached.block_tables[place], None)
    q = query.transpose(1, 2)
    if cached.starts is not None and len(cached.starts) > len(q):
        q = q[0].unflatten(0, (len(cached.starts), -1))
    options: dict[str, Any] = {"scale": scale, "window": window, "heads": heads}
    if cached.starts is not None and table is not None and q.shape[1] > FEW:
        o = softmax_prompt(q, key, value, cached.starts, cached.lengths, table, **options)
    else:
        options |= {"mask": cached.mask, "block_table": table}
        o = softmax_decode(q, key, value, cached.lengths, starts=cached.starts, **options)
    return o.view(query.shape[0], -1, *o.shape[2:]), None


def _attend_sliding(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float | None) -> Tensor:
    """The last tokens, of which each sees so many, over all of them, o as query `[B, Hq, T, D]`."""
    new, tokens, group = query.shape[2], key.shape[2], query.shape[1] // key.shape[1]
    parts, past, at_once = [], tokens - new, max(window, QUERIES)
    for start in range(0, new, at_once):
        q = query[:, :, start : start + at_once]
        last = past + start + q.shape[2]
        first = max(past + start + 1 - window, 0)
        # With a mask SDPA has no fast kernel for shared heads.
        k, v = (x[:, :, first:last].repeat_interleave(group, 1) for x in (key, value))
        mask = _in_window(q.shape[2], last - first, window, query.device)
        parts.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale))
    return torch.cat(parts, 2)


def _in_window(new: int, tokens: int, window: int, device: torch.device) -> Tensor:
    """Which of so many tokens each of the last `new` sees, bool `[new, tokens]`."""
    query, key = torch.arange(tokens - new, tokens, device=device)[:, None], torch.arange(tokens, device=device)
    return (key <= query) & (key > query - window)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _cached.get() is not None or _prompt.get() else ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](*args, **kwargs)


AttentionInterface.register(ATTENTION_FUNCTION, _attend)
AttentionMaskInterface.register(ATTENTION_FUNCTION, _mask)
