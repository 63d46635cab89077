"""Gradient D of the states at tile boundaries, per KV head and from the end, in segments as the states themselves.

D = exp(decay) D' + the sum over the group of mix * scale * q^T u for the queries that read this boundary.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...common import COUNTS, channel_columns, load_rows, number_of, numbers, store_rows, strides
from ..states.decays import Decayed, load_middle
from ..states.gradients import state_gradients, store_segment_gradient
from ..states.segments import load_entry
from .inputs import WindowLayer


@triton.jit(do_not_specialize=COUNTS)
def _state_gradient_kernel(
    q,
    u,  # [B, T, Hq, V]
    at_middle, row_length, mix,
    entering,  # fp32 [B, segments, Hkv, 2, K, V]: gradient at each segment's end; written by ADDITIONS; None: zeros
    segment_decay,
    gradients,  # [B, tiles, Hkv, 2, K, V]: at the end of each tile
    d_initial,  # fp32 [B, Hkv, 2, K, V] or None
    q_b, q_t, q_h,
    T,
    state_tiles,  # tiles that decay the states; behind them only queries follow
    tiles, segments, per_segment, scale,
    HKV, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr, PER_BLOCK: tl.constexpr,
    FIRST_STATE: tl.constexpr, ADDITIONS: tl.constexpr,
):  # fmt: skip
    value_tile, segment, row_head = tl.program_id(0) // 2, tl.program_id(1), tl.program_id(2)
    row, kv_head = (row_head // HKV).to(tl.int64), row_head % HKV
    i = tl.program_id(0) % 2
    length = number_of(row_length, row, T)
    HQ = HKV * R
    gate_t = HKV * 2 * G
    q += row * q_b + kv_head * R * q_h
    u += (row * T * HQ + kv_head * R) * V
    if at_middle is not None:
        at_middle += ((row * state_tiles * HKV + kv_head) * 2 + i) * G
    channels, channel_ok, gates = channel_columns(K, G, BK)
    values, value_ok = numbers(value_tile * BV, V, BV)
    segment_place = ((row * segments + segment) * HKV + kv_head) * 2 + i
    gradient, decay = load_entry(entering, segment_place, channels, channel_ok, values, value_ok, K, V, BK, BV, ADDITIONS)

    first_tile = segment * per_segment
    end_tile = min(first_tile + per_segment, tiles)
    for step in range(end_tile - first_tile):
        tile = end_tile - 1 - step
        middle = tl.full([BK], 1.0, tl.float32)
        if at_middle is not None:
            middle = load_middle(at_middle, tile, tile < state_tiles, gate_t, gates, channel_ok)
        if not ADDITIONS:
            place = ((row * tiles + tile) * HKV + kv_head) * 2 + i
            store_rows(gradients + place * K * V, channels, channel_ok, V, values, value_ok, gradient)
        gradient *= (middle * middle)[:, None]
        if ADDITIONS:
            decay *= middle * middle
        if tile % PER_BLOCK == 0:
            # The states here are read by the block after the next boundary; those before the row also by its first block.
            boundary = tile // PER_BLOCK
            first = (boundary + 1) * SIZE
            count = PER_BLOCK * R
            if (FIRST_STATE == 0) & (boundary == 0):
                first = 0
                count = PER_BLOCK * R * 2
            for index in range(count):
                r = index % R
                within = index // R % PER_BLOCK * C + tl.arange(0, C)
                query = first + index // R // PER_BLOCK * SIZE + within
                query_ok = (within < SIZE) & (query < length)
                u_tile = load_rows(u + r * V, query, query_ok, HQ * V, values, value_ok).to(DOT)
                q_tile = load_rows(q + r * q_h, query, query_ok, q_t, channels, channel_ok).to(tl.float32)
                share = tl.load(mix + (kv_head * R + r) * 2 + i).to(tl.float32) * scale
                gradient = tl.dot(tl.trans((q_tile * share).to(DOT)), u_tile, acc=gradient, input_precision=PRECISION)

    store_segment_gradient(
        entering, segment_decay, d_initial, segment_place, (row * HKV + kv_head) * 2 + i, segment, gradient, decay, value_tile,
        channels, channel_ok, values, value_ok, K, V, ADDITIONS,
    )  # fmt: skip


def window_state_gradients(layer: WindowLayer, decayed: Decayed | None, u: Tensor, d_final: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """At the end of every tile `[B, tiles, Hkv, 2, K, V]`, from the gradient `u` of the states' output, and of the initial state or
    None."""
    inputs, heads = layer.inputs, layer.state_heads
    # One tile more than the states take in: at its start lies the last boundary that queries read.
    tiling = layer.state_tiling(layer.state_tokens + 1)

    def launch(entering, segment_decay, gradients, d_initial):
        _state_gradient_kernel[(2 * triton.cdiv(heads.V, heads.BV), tiling.segments, layer.programs)](
            inputs.q,
            u,
            None if decayed is None else decayed.at_middle,
            inputs.row_length,
            inputs.mix,
            entering,
            segment_decay,
            gradients,
            d_initial,
            *strides(inputs.q),
            layer.tokens,
            layer.state_tiles,
            tiling.tiles,
            tiling.segments,
            tiling.per_segment,
            inputs.scale,
            HKV=layer.kv_heads,
            R=layer.sizes["R"],
            **heads._asdict(),
            **layer.tile_sizes,
            FIRST_STATE=layer.first_state,
            ADDITIONS=segment_decay is not None,
            num_warps=4 if heads.BK * heads.BV <= 32 * 64 else 8,
            num_stages=2,
        )

    return state_gradients(layer.state_inputs, tiling, launch, d_final, inputs.initial_state is not None)
