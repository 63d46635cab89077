"""The pass over the states, in Triton: what they hold at the boundaries of blocks and at the end of rows.

The tokens of a row are cut into segments that run side by side. A first pass gives what each segment adds to both states and
its total decay; a small scan turns these into the states on entry of each segment; a second pass then goes through every
segment again from its entering state and writes the states at block boundaries. Where only the end is wanted (a fold), the
first pass and the scan are all; where one segment suffices, the second pass is.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...common import (
    COUNTS,
    Heads,
    Tiling,
    channel_columns,
    largest_tile,
    layer_head,
    load_rows,
    make_heads,
    make_tiling,
    numbers,
    processors,
    row_span,
    store_rows,
    strides,
    tile_tokens,
)
from .decays import Decayed, load_middle
from .inputs import StateInputs
from .segments import enter_segments, load_entry, store_addition


@triton.jit(do_not_specialize=COUNTS)
def _state_kernel(
    v, keys, at_middle,
    row_first,  # [N] or None: rows are the batch's
    row_length,  # [N] or None: `length` for all
    kv_heads,  # [Hkv] or None: v is of these heads alone
    entering,  # fp32 [N, segments, Hkv, 2, K, V]; written by ADDITIONS; None: zeros
    segment_decay,  # fp32 [N, segments, Hkv, 2, K]: factors, written by ADDITIONS
    states,  # [N, boundaries, Hkv, 2, K, V] or None
    final,  # fp32 [N, Hkv, 2, K, V] or None
    v_b, v_t, v_h,
    T, length, tiles, segments,
    per_segment,  # tiles
    boundaries,
    HKV, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,  # tokens of a block
    C: tl.constexpr,  # of a tile
    PER_BLOCK: tl.constexpr,  # tiles of a block
    EVERY: tl.constexpr,  # tiles from one boundary that is written to the next
    AT_MIDDLE: tl.constexpr,  # states are written at every tile, times exp(m): as its queries read them
    ADDITIONS: tl.constexpr,  # each segment from zero, its addition and decay written; otherwise from its entering state
):  # fmt: skip
    # One of the two states: programs that wait for different memory fill a processor better than one with both.
    value_tile, segment, row_head = tl.program_id(0) // 2, tl.program_id(1), tl.program_id(2)
    row, head_state = row_head // HKV, row_head % HKV * 2 + tl.program_id(0) % 2
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    row = row.to(tl.int64)
    gate_t = HKV * 2 * G
    v += batch * v_b + first * v_t + layer_head(kv_heads, head_state // 2) * v_h
    keys += (flat * HKV * 2 + head_state) * K
    at_middle += (row * tiles * HKV * 2 + head_state) * G

    channels, channel_ok, gates = channel_columns(K, G, BK)
    values, value_ok = numbers(value_tile * BV, V, BV)
    segment_place = (row * segments + segment) * HKV * 2 + head_state
    state, decay = load_entry(entering, segment_place, channels, channel_ok, values, value_ok, K, V, BK, BV, ADDITIONS)

    tile_first = segment * per_segment
    row_end = tiles
    if row_length is not None:  # boundaries behind a row's end are left as they are
        row_end = min(row_end, (length + SIZE - 1) // SIZE * PER_BLOCK)
    tile_end = min(tile_first + per_segment, row_end)
    middle = load_middle(at_middle, tile_first, tile_first < tile_end, gate_t, gates, channel_ok)
    for tile in range(tile_first, tile_end):
        next_middle = load_middle(at_middle, tile + 1, tile + 1 < tile_end, gate_t, gates, channel_ok)  # ahead of its use
        if states is not None and not AT_MIDDLE:  # noqa: SIM102 (the first is decided at compile time)
            if tile % EVERY == 0:
                boundary = (row * boundaries + tile // EVERY) * HKV * 2 + head_state
                store_rows(states + boundary * K * V, channels, channel_ok, V, values, value_ok, state)
        tokens, in_block = tile_tokens(tile, PER_BLOCK, SIZE, C)
        token_ok = in_block & (tokens < length)
        v_tile = load_rows(v, tokens, token_ok, v_t, values, value_ok).to(DOT)
        key = load_rows(keys, tokens, token_ok, HKV * 2 * K, channels, channel_ok)
        state *= middle[:, None]
        if AT_MIDDLE:
            boundary = (row * boundaries + tile) * HKV * 2 + head_state
            store_rows(states + boundary * K * V, channels, channel_ok, V, values, value_ok, state)
        state = tl.dot(tl.trans(key), v_tile, acc=state, input_precision=PRECISION) * middle[:, None]
        if ADDITIONS:
            decay *= middle * middle
        middle = next_middle

    if ADDITIONS:
        store_addition(entering, segment_decay, segment_place, state, decay, value_tile, channels, channel_ok, values, value_ok, K, V)
    elif (tile_end == row_end) & ((tile_first < row_end) | (segment == 0)):
        if states is not None and not AT_MIDDLE:  # nobody reads the states behind the last tile
            boundary = (row * boundaries + row_end // EVERY) * HKV * 2 + head_state
            store_rows(states + boundary * K * V, channels, channel_ok, V, values, value_ok, state)
        if final is not None:
            store_rows(final + (row * HKV * 2 + head_state) * K * V, channels, channel_ok, V, values, value_ok, state)


def state_pass(
    inputs: StateInputs,
    tiling: Tiling,
    heads: Heads,
    decayed: Decayed,
    initial: Tensor | None,
    states: Tensor | None = None,
    final: Tensor | None = None,
    every: int = 1,
    at_middle: bool = False,
) -> None:
    """Writes `states`, at every `every` tiles, and `final`, after the rows; either may be None.

    states: `[N, boundaries, Hkv, 2, K, V]`. final: fp32 `[N, Hkv, 2, K, V]`. initial: as `final`, None for zeros. at_middle: states on
    entry of every tile, times exp(m), as the queries of the tile read them.
    """
    only_end = states is None and tiling.segments > 1

    def add(entering, segment_decay):
        _launch(inputs, tiling, heads, decayed, entering, segment_decay, final=final if only_end else None)

    entering = enter_segments(inputs, tiling.segments, add, initial, final if only_end else None)
    if not only_end:
        _launch(inputs, tiling, heads, decayed, entering, None, states, final, every, at_middle)


def _launch(inputs, tiling, heads, decayed, entering, segment_decay, states=None, final=None, every=1, at_middle=False):
    """With `segment_decay` the additions of the segments, without it the states."""
    additions = segment_decay is not None
    # Where the end is not asked for, nobody reads what the last segment adds.
    segments = tiling.segments - (additions and final is None)
    _state_kernel[(2 * triton.cdiv(heads.V, heads.BV), segments, inputs.programs)](
        inputs.v,
        decayed.keys,
        decayed.at_middle,
        inputs.row_first,
        inputs.row_length,
        inputs.kv_heads,
        entering,
        segment_decay,
        states,
        final,
        *strides(inputs.v),
        inputs.k.shape[1],
        inputs.length,
        tiling.tiles,
        tiling.segments,
        tiling.per_segment,
        0 if states is None else states.shape[1],
        HKV=inputs.num_kv_heads,
        **heads._asdict(),
        SIZE=tiling.size,
        C=tiling.tile,
        PER_BLOCK=tiling.per_block,
        EVERY=every,
        AT_MIDDLE=at_middle,
        ADDITIONS=additions,
        num_warps=4 if heads.BK * heads.BV <= 32 * 64 else 8,
        num_stages=3,
    )


def state_heads(inputs: StateInputs) -> Heads:
    """Sizes of a head as the passes over the states name them."""
    return make_heads(inputs.k, inputs.v, inputs.gate_logits, _value_tile(inputs.k, inputs.v, inputs.programs))


def state_tiling(inputs: StateInputs, heads: Heads, tokens: int, size: int, segment_blocks: int | None) -> Tiling:
    """Blocks of `size` tokens and segments of the first `tokens` tokens; segment_blocks: blocks a segment, 0 or None for a choice by
    shape."""
    programs = inputs.programs * 2 * triton.cdiv(heads.V, heads.BV)
    return make_tiling(tokens, size, programs, inputs.k.device, segment_blocks or None, largest_tile(inputs.k, inputs.v))


def _value_tile(k: Tensor, v: Tensor, programs: int) -> int:
    """Values a program of the state pass, one for each of two states of `programs` rows and heads: few where they then fill the card
    without segments, which cost a second pass; otherwise as many as registers allow."""
    most = 64 if v.shape[-1] > 32 and k.shape[-1] * k.element_size() <= 256 else 32
    for tile in (64, 32):
        if tile <= most and 2 * programs * triton.cdiv(v.shape[-1], tile) >= 1.5 * processors(k.device):
            return tile
    return 32
