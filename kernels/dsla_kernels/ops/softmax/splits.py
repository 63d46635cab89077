"""Into how many parts the tokens of a row are cut, so that processors are busy and none of them is at work alone at the end."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ...common import processors
from ...overlap import can_overlap, overlapping
from .tiles import DOT_TYPES, Launch, head_tiles

GROUP_TILE = 16  # queries of a product, as few as tensor cores take; a larger group of query heads has several programs
# Those of several tokens share a program as far as registers hold what they give, so that keys and values are read once.
MOST_QUERIES, MOST_RESULTS = 64, 8192
LEAST_TOKENS = 128  # a part, unless the caller wants a number of parts
# The same of rows in blocks, if there are several: of short ones the first part does all, and the others leave at once.
LEAST_OF_MANY = 512
MOST_PROGRAMS = 8192  # more than these only to leave at once would cost more than they spare
LITTLE_JOIN = 8  # parts up to which a join has few warps
tuned: Launch | None = None  # overrules the choice, for measurements


def choose_launch(row_bytes: int) -> Launch:
    """By the bytes of a key or value in registers. Tiles of 32 KB in all: with two more on their way a program asks for what a
    processor needs to reach the memory's speed, and two or three programs share its memory."""
    return Launch(max(16, min(64, 16384 // row_bytes)))


def choose_splits(programs: int, tiles: int, least: int, slots: int) -> int:
    """Parts a row: the fewest that take at most a tenth longer than the best number would.

    programs: with one part. tiles: of a row at most. least: tiles a part. slots: programs that the card holds at a time. What counts
    is how often it is filled, a last time with few programs perhaps, times the tiles of a part.
    """
    most = max(1, min(tiles // least, max(slots // programs, 8)))
    times = [-(-programs * splits // slots) * -(-tiles // splits) for splits in range(1, most + 1)]
    return next(splits for splits, time in enumerate(times, 1) if time <= 1.1 * min(times))


def choose_uneven_splits(batch: int, programs: int, tiles: int, least: int, slots: int) -> int:
    """The same for rows of which some may be much longer than others, as texts that share a pool of blocks are: the longest shall not be at
    work alone when all others are done. So a row has as many parts as if it were the only one, up to a number of programs."""
    alone = choose_splits(programs // batch, tiles, least, slots)
    return max(choose_splits(programs, tiles, least, slots), min(alone, max(MOST_PROGRAMS // programs, 4), max(tiles // least, 1)))


class Plan(NamedTuple):
    """All that a step of a shape is launched with."""

    grid: tuple[int]
    parts: int  # of a head's tokens in a row
    few: int  # of those of a head that sees the window, where others see all
    room: int  # tokens of a row at most
    least: int  # tiles a part
    options: dict[str, Any]  # of the kernel: sizes by name, warps, stages
    join: dict[str, Any]  # of the join, where there are several parts


def make_plan(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    block_table: Tensor | None,
    window: int | None,
    splits: int,
    places: Tensor | None = None,
    sinks: int | None = None,
    whole: int | None = None,
) -> Plan:
    """By shape; splits: the number of parts, or 0. Nothing depends on what lies in a tensor. places: of KV heads, sinks, whole: see
    `softmax_decode`."""
    if block_table is None:
        kv_heads, tokens, blocks = keys.shape[1] if places is None else places.shape[0], keys.shape[2], None
    else:
        kv_heads, tokens, blocks = keys.shape[2] if places is None else places.shape[0], keys.shape[1], block_table.shape[-1]
    seen = None if window is None else window + (sinks or 0)
    return _plan(q.shape, kv_heads, tokens, values.shape[-1], blocks, seen, whole or 0, splits, q.dtype, q.device, tuned)


@functools.lru_cache(maxsize=1024)  # layers and steps come one after the other, and most are alike
def _plan(
    q: torch.Size,
    kv_heads: int,
    tokens: int,  # of a row, or of a block
    value_dim: int,
    blocks: int | None,  # of a row, None without a block table
    window: int | None,
    whole: int,  # heads that see more than the window, if there is one
    splits: int,
    dtype: torch.dtype,
    device: torch.device,
    wanted: Launch | None,
) -> Plan:
    batch, queries, heads, key_dim = q
    room, block = (tokens, 0) if blocks is None else (tokens * blocks, tokens)
    block_key, block_value = head_tiles(key_dim, value_dim)
    launch = wanted or choose_launch(max(block_key, block_value) * dtype.itemsize)
    tiles = triton.cdiv(room if window is None or whole else min(room, window + queries - 1), launch.tokens)
    of_a_head = queries * (heads // kv_heads)
    together = (
        GROUP_TILE if queries == 1 else max(GROUP_TILE, min(triton.next_power_of_2(of_a_head), MOST_QUERIES, MOST_RESULTS // block_value))
    )
    of_each = triton.cdiv(of_a_head, together)
    mixed = window is not None and whole > 0
    # What others than whole heads have to do is little beside it.
    busy = batch * (whole if mixed else kv_heads) * of_each
    uneven = blocks is not None and batch > 1
    least = 1 if splits else triton.cdiv(LEAST_OF_MANY if uneven else LEAST_TOKENS, launch.tokens)
    if splits:
        parts = min(splits, tiles)
    elif uneven:
        parts = choose_uneven_splits(batch, busy, tiles, least, 2 * processors(device))
    else:
        parts = choose_splits(busy, tiles, least, 2 * processors(device))
    few = 0
    if mixed and window is not None:  # a window may begin within a tile, and the sinks end within one
        few = min(parts, triton.cdiv(triton.cdiv(min(room, window + queries - 1), launch.tokens) + 2, least))
    programs = busy * parts + batch * (kv_heads - whole) * of_each * few if mixed else busy * parts
    overlap = parts > 1 and can_overlap(device)
    shared = {"T": queries, "V": value_dim, "BV": block_value, "BN": launch.tokens, "OVERLAP": overlap}
    options = shared | {
        "HKV": kv_heads,
        "R": heads // kv_heads,
        "K": key_dim,
        "BK": block_key,
        "BM": together,
        "BLOCK": block,
        "DOT": DOT_TYPES[dtype],
        "num_warps": launch.warps,
        "num_stages": launch.stages,
    }
    at_a_time = max(1, 4096 // block_value)
    if parts <= LITTLE_JOIN:  # no more choices than two: each is compiled
        at_a_time = min(LITTLE_JOIN, at_a_time)
    warps = max(1, at_a_time * block_value // 1024)
    join = shared | {"HQ": heads, "R": heads // kv_heads, "BP": at_a_time, "num_warps": warps, **overlapping(overlap)}
    return Plan((programs,), parts, few, room, least, options, join)
