"""Gradients of the queries of every chunk and of the mix, and what the gates' gradient needs of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import COUNTS, channel_columns, load_rows, numbers, row_span, store_rows, strides, sum_over_pairs
from ..states.decays import Decayed
from .inputs import ChunkLayer


@triton.jit(do_not_specialize=COUNTS)
def _query_kernel(
    q, v, do, query_factors, keys, row_first, row_length, mix,
    states,  # exp(m) S `[N, tiles, Hkv, 2, K, V]`
    dq,
    crossings,  # [B, T, Hq, 2, G]: Q dQ, summed over the channels of a gate
    d_mix,  # fp32 [N, tiles, Hq, 2]
    q_b, q_t, q_h, v_b, v_t, v_h,
    T, length, tiles, scale,
    HKV, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    tile, row_head = tl.program_id(0) // R, tl.program_id(1)  # the heads of a group side by side
    row, kv_head = row_head // HKV, row_head % HKV
    head = kv_head * R + tl.program_id(0) % R
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    row = row.to(tl.int64)
    if tile * C >= length:
        return
    HQ = HKV * R
    tokens = tile * C + tl.arange(0, C)
    in_row = tokens < length
    channels, channel_ok, gates = channel_columns(K, G, BK)
    BG: tl.constexpr = BK if G == K else BK // 2
    gate, gate_ok = numbers(0, G, BG)
    values, value_ok = numbers(0, V, BV)
    query_factors += (flat * HKV + kv_head) * 2 * G
    keys += (flat * HKV + kv_head) * 2 * K
    states += ((row * tiles + tile) * HKV + kv_head) * 2 * K * V
    do_tile = load_rows(do + (flat * HQ + head) * V, tokens, in_row, HQ * V, values, value_ok).to(DOT)
    v_tile = load_rows(v + batch * v_b + first * v_t + kv_head * v_h, tokens, in_row, v_t, values, value_ok).to(DOT)
    q_tile = load_rows(q + batch * q_b + first * q_t + head * q_h, tokens, in_row, q_t, channels, channel_ok)
    causal = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    d_scores = tl.where(causal, tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION), 0.0).to(DOT)
    dq_tile = tl.zeros([C, BK], tl.float32)
    for i in tl.range(0, 2, loop_unroll_factor=1, num_stages=1):
        key = load_rows(keys + i * K, tokens, in_row, HKV * 2 * K, channels, channel_ok)
        state = load_rows(states + i * K * V, channels, channel_ok, V, values, value_ok)
        share = tl.load(mix + head * 2 + i).to(tl.float32)
        factors = load_rows(query_factors + i * G, tokens, in_row, HKV * 2 * G, gates, channel_ok).to(tl.float32)
        d_query = tl.dot(do_tile, tl.trans(state), input_precision=PRECISION)
        d_query = tl.dot(d_scores, key, acc=d_query, input_precision=PRECISION) * (factors * scale)
        dq_tile += d_query * share
        product = sum_over_pairs(d_query * q_tile.to(tl.float32), K, G)
        tl.store(d_mix + ((row * tiles + tile) * HQ + head) * 2 + i, tl.sum(tl.sum(product, 1), 0))
        store_rows(crossings + ((flat * HQ + head) * 2 + i) * G, tokens, in_row, HQ * 2 * G, gate, gate_ok, product * share)
    store_rows(dq + (flat * HQ + head) * K, tokens, in_row, HQ * K, channels, channel_ok, dq_tile)


def query_gradients(layer: ChunkLayer, decayed: Decayed, states: Tensor, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq; d_mix fp32 `[Hq, 2]`; and Q dQ `[B, T, Hq, 2, G]`, summed over the channels of a gate."""
    inputs, q = layer.inputs, layer.inputs.q
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    crossings = q.new_empty(*q.shape[:3], 2, inputs.gate_logits.shape[-1], dtype=layer.state_inputs.dtype)
    d_mix = q.new_zeros(layer.state_inputs.rows, layer.tiling.tiles, q.shape[2], 2, dtype=torch.float32)
    _query_kernel[(layer.tiling.tiles * layer.group, layer.programs)](
        q,
        inputs.v,
        do,
        decayed.query_factors,
        decayed.keys,
        inputs.row_first,
        inputs.row_length,
        inputs.mix,
        states,
        dq,
        crossings,
        d_mix,
        *strides(q, inputs.v),
        *layer.counts,
        **layer.whole_sizes,
        num_warps=4,
        num_stages=1,
    )
    return dq, d_mix.sum((0, 1)), crossings
