"""Gradients of the values of every chunk."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import COUNTS, channel_columns, load_rows, numbers, row_span, store_rows, strides
from ..states.decays import Decayed
from .inputs import ChunkLayer


@triton.jit(do_not_specialize=COUNTS)
def _value_kernel(
    q, do, query_factors, keys, row_first, row_length, mix,
    gradients,  # exp(m) D `[N, tiles, Hkv, 2, K, V]`
    dv,
    q_b, q_t, q_h,
    T, length, tiles, scale,
    HKV, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    tile, row_head = tl.program_id(0), tl.program_id(1)
    row, kv_head = row_head // HKV, row_head % HKV
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    row = row.to(tl.int64)
    if tile * C >= length:
        return
    HQ = HKV * R
    q += batch * q_b + first * q_t + kv_head * R * q_h
    do += (flat * HQ + kv_head * R) * V
    kv_flat = flat * HKV + kv_head
    gradients += ((row * tiles + tile) * HKV + kv_head) * 2 * K * V
    channels, channel_ok, gates = channel_columns(K, G, BK)
    values, value_ok = numbers(0, V, BV)
    tokens = tile * C + tl.arange(0, C)
    in_row = tokens < length
    seen = tl.arange(0, C)[:, None] <= tl.arange(0, C)[None, :]  # keys by queries
    dv_tile = tl.zeros([C, BV], tl.float32)
    for i in tl.range(0, 2, loop_unroll_factor=1, num_stages=1):
        key = load_rows(keys + (kv_flat * 2 + i) * K, tokens, in_row, HKV * 2 * K, channels, channel_ok)
        gradient = load_rows(gradients + i * K * V, channels, channel_ok, V, values, value_ok)
        factors = load_rows(query_factors + (kv_flat * 2 + i) * G, tokens, in_row, HKV * 2 * G, gates, channel_ok).to(tl.float32)
        dv_tile = tl.dot(key, gradient, acc=dv_tile, input_precision=PRECISION)
        for r in tl.range(0, R, num_stages=1):
            share = tl.load(mix + (kv_head * R + r) * 2 + i).to(tl.float32) * scale
            q_tile = load_rows(q + r * q_h, tokens, in_row, q_t, channels, channel_ok).to(tl.float32)
            do_tile = load_rows(do + r * V, tokens, in_row, HQ * V, values, value_ok).to(DOT)
            scores = tl.dot(key, tl.trans((q_tile * (factors * share)).to(DOT)), input_precision=PRECISION)
            dv_tile = tl.dot(tl.where(seen, scores, 0.0).to(DOT), do_tile, acc=dv_tile, input_precision=PRECISION)
    store_rows(dv + kv_flat * V, tokens, in_row, HKV * V, values, value_ok, dv_tile)


def value_gradients(layer: ChunkLayer, decayed: Decayed, gradients: Tensor, do: Tensor) -> Tensor:
    """dv, from the queries of a chunk and from the gradient of the states at its end."""
    inputs, v = layer.inputs, layer.inputs.v
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _value_kernel[(layer.tiling.tiles, layer.programs)](
        inputs.q,
        do,
        decayed.query_factors,
        decayed.keys,
        inputs.row_first,
        inputs.row_length,
        inputs.mix,
        gradients,
        dv,
        *strides(inputs.q),
        *layer.counts,
        **layer.whole_sizes,
        num_warps=4,
        num_stages=1,
    )
    return dv
