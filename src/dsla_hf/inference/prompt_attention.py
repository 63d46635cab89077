"""Causal softmax attention of prompts by PyTorch's kernels, and which of them reads what: the rule is in `planned_tokens` alone.

On Hopper cuDNN's kernel takes half the time of the flash kernel, but makes a plan for every new shape and stride, which takes as long as
many prompts: without care a server whose prompts are all of other lengths makes one for each. So the first tokens of a prompt go to cuDNN,
as many as one of few lengths has, and its last ones, which see all of them, to the flash kernel. A query's output does not depend on other
queries: nothing is computed twice, and nothing joined. `eval/benchmarks/prompt_attention.py` has the times of both.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda, cudnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

SHORTEST_PLAN = 2048  # tokens; of shorter prompts cuDNN would spare less than a tenth of a millisecond a layer
SHORTEST_RECORDED = 1024  # the same of calls that are recorded, whose plans are made once and before any text comes
PLANS_AN_OCTAVE, LEAST_STEP = 8, 1024  # so many lengths between a power of two and the next, so many tokens apart at least
WHOLE = 128  # older cuDNN reads behind the end of lengths that are no multiples of it
LARGEST_HEAD = 128  # that cuDNN takes on every card, in multiples of 8

# In the order in which they are to be tried, and whether the user allows them.
_switches = {
    SDPBackend.CUDNN_ATTENTION: cuda.cudnn_sdp_enabled,
    SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled,
    SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled,
    SDPBackend.MATH: cuda.math_sdp_enabled,
}
_lock = threading.Lock()  # PyTorch's choice of kernels is one of the process: two threads that set it back could leave it changed


@functools.cache
def cudnn_is_fast(device: torch.device) -> bool:
    """Whether cuDNN's attention is the faster one on a device: from Hopper on, as PyTorch itself has it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in (9, 10) and (cudnn.version() or 0) >= 90000


def planned_tokens(tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device, recorded: bool = False) -> int:
    """How many of the first tokens of a prompt go to cuDNN, 0 for none.

    recorded: the call is recorded, and so has this shape whenever it is replayed.
    """
    fits = dtype in (torch.bfloat16, torch.float16) and head_dim <= LARGEST_HEAD and head_dim % 8 == 0
    if not (fits and cudnn_is_fast(device) and cuda.cudnn_sdp_enabled()):
        return 0
    if recorded:
        return tokens if tokens >= SHORTEST_RECORDED and tokens % WHOLE == 0 else 0
    if tokens < SHORTEST_PLAN:
        return 0
    step = max((1 << (tokens.bit_length() - 1)) // PLANS_AN_OCTAVE, LEAST_STEP)
    return tokens - tokens % step


def attend_to_prompt(query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, *, recorded: bool = False) -> Tensor:
    """Attention of the last T of L tokens, each of which sees all before it and itself. No gradient.

    Args:
        query: `[B, Hq, T, D]`. key, value: `[B, Hkv, L, D]`, Hq a multiple of Hkv. All of one dtype, of any strides.
        scale: of scores; None: D ** -0.5.
        recorded: as in `planned_tokens`.

    Returns:
        `[B, T, Hq, D]`, dense.
    """
    new, tokens = query.shape[2], key.shape[2]
    whole = new == tokens
    planned = planned_tokens(new, query.shape[3], query.dtype, query.device, recorded) if whole else 0
    parts = []
    if planned:
        parts.append(_by_cudnn(query[:, :, :planned], key[:, :, :planned], value[:, :, :planned], scale))
    if planned < new:
        parts.append(_without_plans(query[:, :, planned:], key, value, scale))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _by_cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Row by row, in strides that do not tell how long a text or its cache is: plans are of a number of tokens alone."""
    grouped = query.shape[1] != key.shape[1]
    rows = []
    with _prefers([backend for backend, is_on in _switches.items() if is_on()]):
        for row in zip(query, key, value, strict=True):
            q, k, v = map(_by_token, row)
            rows.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped))
    o = rows[0] if len(rows) == 1 else torch.cat(rows)
    return o.transpose(1, 2).contiguous()


def _by_token(x: Tensor) -> Tensor:
    """`[1, H, T, D]` of x `[H, T, D]`, a token's heads beside each other; a copy of what lies as in a cache."""
    if x.stride(0) > x.stride(1):
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    return x[None]


def _without_plans(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """By any kernel but cuDNN's, where that would be the first choice."""
    new, tokens = query.shape[2], key.shape[2]
    which: dict[str, Any] = {"is_causal": True} if new == tokens else {"attn_mask": causal_lower_right(new, tokens)}
    grouped = query.shape[1] != key.shape[1]
    others = [backend for backend, is_on in _switches.items() if backend is not SDPBackend.CUDNN_ATTENTION and is_on()]
    with _prefers(others) if others and cudnn_is_fast(query.device) else nullcontext():
        o = F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped, **which)
    return o.transpose(1, 2).contiguous()


@contextmanager
def _prefers(order: Sequence[SDPBackend]) -> Iterator[None]:
    """Within it PyTorch takes the first of these kernels that can, and no other."""
    with _lock, sdpa_kernel(list(order), set_priority=True):
        yield
