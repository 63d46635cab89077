"""Gradient of the states: exp(m) D at every chunk, from the end, in segments as the states themselves."""

import triton
import triton.language as tl
from torch import Tensor

from ...common import COUNTS, channel_columns, load_rows, numbers, row_span, store_rows, strides
from ..states.decays import Decayed, load_middle
from ..states.gradients import state_gradients, store_segment_gradient
from ..states.segments import load_entry
from .inputs import ChunkLayer


@triton.jit(do_not_specialize=COUNTS)
def _state_gradient_kernel(
    q,
    do,  # [B, T, Hq, V]
    query_factors, at_middle, row_first, row_length, mix,
    entering,  # fp32 [N, segments, Hkv, 2, K, V]: gradient at each segment's end; written by ADDITIONS; None: zeros
    segment_decay,
    gradients,  # exp(m) D `[N, tiles, Hkv, 2, K, V]`
    d_initial,  # fp32 [N, Hkv, 2, K, V] or None
    q_b, q_t, q_h,
    T, length, tiles, scale, segments, per_segment,
    HKV, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, ADDITIONS: tl.constexpr,
):  # fmt: skip
    value_tile, segment, row_head = tl.program_id(0) // 2, tl.program_id(1), tl.program_id(2)
    row, kv_head = row_head // HKV, row_head % HKV
    i = tl.program_id(0) % 2
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    row = row.to(tl.int64)
    gate_t = HKV * 2 * G
    q += batch * q_b + first * q_t + kv_head * R * q_h
    do += (flat * HKV + kv_head) * R * V
    query_factors += ((flat * HKV + kv_head) * 2 + i) * G
    at_middle += ((row * tiles * HKV + kv_head) * 2 + i) * G
    channels, channel_ok, gates = channel_columns(K, G, BK)
    values, value_ok = numbers(value_tile * BV, V, BV)
    segment_place = ((row * segments + segment) * HKV + kv_head) * 2 + i
    gradient, decay = load_entry(entering, segment_place, channels, channel_ok, values, value_ok, K, V, BK, BV, ADDITIONS)

    tile_first = segment * per_segment
    tile_end = min(tile_first + per_segment, tl.cdiv(length, C))
    middle = load_middle(at_middle, tile_end - 1, tile_first < tile_end, gate_t, gates, channel_ok)
    for step in range(tl.maximum(tile_end - tile_first, 0) * R):
        r = step % R
        tile = tile_end - 1 - step // R
        if r == 0:
            gradient *= middle[:, None]
            if not ADDITIONS:
                place = ((row * tiles + tile) * HKV + kv_head) * 2 + i
                store_rows(gradients + place * K * V, channels, channel_ok, V, values, value_ok, gradient)
        tokens = tile * C + tl.arange(0, C)
        token_ok = tokens < length
        do_tile = load_rows(do + r * V, tokens, token_ok, HKV * R * V, values, value_ok).to(DOT)
        q_tile = load_rows(q + r * q_h, tokens, token_ok, q_t, channels, channel_ok).to(tl.float32)
        factors = load_rows(query_factors, tokens, token_ok, gate_t, gates, channel_ok).to(tl.float32)
        share = tl.load(mix + (kv_head * R + r) * 2 + i).to(tl.float32) * scale
        gradient = tl.dot(tl.trans((q_tile * (factors * share)).to(DOT)), do_tile, acc=gradient, input_precision=PRECISION)
        if r == R - 1:
            gradient *= middle[:, None]
            if ADDITIONS:
                decay *= middle * middle
            middle = load_middle(at_middle, tile - 1, tile > tile_first, gate_t, gates, channel_ok)

    store_segment_gradient(
        entering, segment_decay, d_initial, segment_place, (row * HKV + kv_head) * 2 + i, segment, gradient, decay, value_tile,
        channels, channel_ok, values, value_ok, K, V, ADDITIONS,
    )  # fmt: skip


def chunk_state_gradients(layer: ChunkLayer, decayed: Decayed, do: Tensor, d_final: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """exp(m) times the gradient of the states at the end of every chunk `[N, tiles, Hkv, 2, K, V]`, and that of the initial state, or
    None."""
    inputs, heads, tiling = layer.inputs, layer.state_heads, layer.tiling

    def launch(entering, segment_decay, gradients, d_initial):
        _state_gradient_kernel[(2 * triton.cdiv(heads.V, heads.BV), tiling.segments, layer.programs)](
            inputs.q,
            do,
            decayed.query_factors,
            decayed.at_middle,
            inputs.row_first,
            inputs.row_length,
            inputs.mix,
            entering,
            segment_decay,
            gradients,
            d_initial,
            *strides(inputs.q),
            *layer.counts,
            tiling.segments,
            tiling.per_segment,
            **layer.sizes | heads._asdict(),
            ADDITIONS=segment_decay is not None,
            num_warps=8,
            num_stages=3,
        )

    return state_gradients(layer.state_inputs, tiling, launch, d_final, inputs.initial_state is not None)
