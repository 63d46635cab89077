"""Tiles of keys and values of a softmax layer, from wherever its cache has them."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ... import narrow

DOT_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
NOTHING = tl.constexpr(-1e30)  # top of a softmax that has seen nothing: finite, as differences of infinities are not numbers


LARGEST_FP8 = tl.constexpr(narrow.LARGEST)


@triton.jit
def load_tokens(cache, block, inside, visible, block_stride, token_stride, columns, column_ok, DTYPE: tl.constexpr):
    """A tile of keys or values in a dtype, zero where not visible: what lies there may be anything, NaN included."""
    places = block * block_stride + inside.to(tl.int64) * token_stride
    return tl.load(cache + places[:, None] + columns[None, :], mask=visible[:, None] & column_ok[None, :], other=0.0).to(DTYPE)


@triton.jit
def held_as(x, DTYPE: tl.constexpr):
    """x as a cache of a dtype holds it, see `narrow.stored`."""
    if DTYPE.is_fp8e4nv():
        x = tl.clamp(x.to(tl.float32), -LARGEST_FP8, LARGEST_FP8, propagate_nan=tl.PropagateNan.ALL)
    return x.to(DTYPE)


class Launch(NamedTuple):
    """How tokens are worked through."""

    tokens: int  # a tile
    warps: int = 4
    stages: int = 3  # tiles on their way, and the one that is multiplied


def head_tiles(key_dim: int, value_dim: int) -> tuple[int, int]:
    """Channels of a key and of a value in registers."""
    return max(16, triton.next_power_of_2(key_dim)), max(16, triton.next_power_of_2(value_dim))
