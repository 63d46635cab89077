"""Into how many parts the tokens of a row are cut, so that processors are busy and none of them is at work alone at the end."""

from typing import NamedTuple

import triton
from torch import Tensor

from ...common import processors
from .tiles import Launch, head_tiles

GROUP_TILE = 16  # query heads of a product, as few as tensor cores take; a larger group has several programs
LEAST_TOKENS = 128  # a part, unless the caller wants a number of parts
# The same of rows in blocks, if there are several: of short ones the first part does all, and the others leave at once.
LEAST_OF_MANY = 512
MOST_PROGRAMS = 8192  # more than these only to leave at once would cost more than they spare
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
    """How the tokens of rows are shared out."""

    launch: Launch
    kv_heads: int
    room: int  # tokens of a row at most
    block: int  # tokens of a block; 0 without a block table
    programs: int  # of one part of every row
    parts: int
    least: int  # tiles a part


def make_plan(q: Tensor, keys: Tensor, values: Tensor, block_table: Tensor | None, window: int | None, splits: int) -> Plan:
    """By shape; splits: the number of parts, or 0. Nothing depends on what lies in a tensor."""
    batch, _, heads, key_dim = q.shape
    if block_table is None:
        kv_heads, room, block = keys.shape[1], keys.shape[2], 0
    else:
        block, kv_heads = keys.shape[1:3]
        room = block * block_table.shape[1]
    launch = tuned or choose_launch(max(head_tiles(key_dim, values.shape[-1])) * q.element_size())
    tiles = triton.cdiv(room if window is None else min(room, window), launch.tokens)
    programs = batch * kv_heads * triton.cdiv(heads // kv_heads, GROUP_TILE)
    uneven = block_table is not None and batch > 1
    least = 1 if splits else triton.cdiv(LEAST_OF_MANY if uneven else LEAST_TOKENS, launch.tokens)
    if splits:
        parts = min(splits, tiles)
    elif uneven:
        parts = choose_uneven_splits(batch, programs, tiles, least, 2 * processors(q.device))
    else:
        parts = choose_splits(programs, tiles, least, 2 * processors(q.device))
    return Plan(launch, kv_heads, room, block, programs, parts, least)
