"""Gradients of the keys of every chunk, and of raw gates and write gates.

The gradient of a token's log-decay collects what crosses the token, as in GLA (arXiv 2312.06635): Q dQ of it and of later
queries, less K dK of it and of later keys inside the chunk, the K dK towards D of the keys before it, and S~ · D~.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import COUNTS, channel_columns, load_mask, load_rows, numbers, row_span, strides, sum_over_pairs
from ..states.decays import Decayed, cumulative
from ..states.gradients import store_key_gradients, tile_products
from .inputs import ChunkLayer


@triton.jit(do_not_specialize=COUNTS)
def _key_kernel(
    q, k, v, do, gate_logits, write_logits, mask, query_factors, keys, row_first, row_length, mix,
    states,  # exp(m) S `[N, tiles, Hkv, 2, K, V]`
    gradients,  # exp(m) D `[N, tiles, Hkv, 2, K, V]`
    crossings,
    dk_parts,  # [B, T, Hkv, 2, K]: by state
    d_gate_logits, d_write_logits,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, length, tiles, scale, inverse_normalizer, bound,
    HKV, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    tile, i, row_head = tl.program_id(0) // 2, tl.program_id(0) % 2, tl.program_id(1)  # one state: both need too many registers
    row, kv_head = row_head // HKV, row_head % HKV
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    row = row.to(tl.int64)
    if tile * C >= length:
        return
    HQ = HKV * R
    gate_t = HKV * 2 * G
    EXACT: tl.constexpr = tl.float32 == DOT
    q += batch * q_b + first * q_t + kv_head * R * q_h
    do += (flat * HQ + kv_head * R) * V
    crossings += (flat * HQ + kv_head * R) * 2 * G
    kv_flat = flat * HKV + kv_head
    states += ((row * tiles + tile) * HKV + kv_head) * 2 * K * V
    gradients += ((row * tiles + tile) * HKV + kv_head) * 2 * K * V
    channels, channel_ok, gates = channel_columns(K, G, BK)
    BG: tl.constexpr = BK if G == K else BK // 2
    gate, gate_ok = numbers(0, G, BG)
    values, value_ok = numbers(0, V, BV)
    tokens = tile * C + tl.arange(0, C)
    in_row = tokens < length
    token_ok = load_mask(mask, flat, tokens, in_row)
    seen = tl.arange(0, C)[:, None] <= tl.arange(0, C)[None, :]  # keys by queries
    v_tile = load_rows(v + batch * v_b + first * v_t + kv_head * v_h, tokens, token_ok, v_t, values, value_ok).to(DOT)
    factors_at = query_factors + (kv_flat * 2 + i) * G
    dk_scaled = tl.zeros([C, BK], tl.float32)
    d_decay = tl.zeros([C, BG], tl.float32)
    for r in tl.range(0, R, num_stages=1):
        factors = load_rows(factors_at, tokens, in_row, gate_t, gates, channel_ok).to(tl.float32)
        share = tl.load(mix + (kv_head * R + r) * 2 + i).to(tl.float32) * scale
        q_tile = load_rows(q + r * q_h, tokens, in_row, q_t, channels, channel_ok).to(tl.float32)
        do_tile = load_rows(do + r * V, tokens, in_row, HQ * V, values, value_ok).to(DOT)
        d_scores = tl.where(seen, tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION), 0.0).to(DOT)
        dk_scaled = tl.dot(d_scores, (q_tile * (factors * share)).to(DOT), acc=dk_scaled, input_precision=PRECISION)
        d_decay += load_rows(crossings + (r * 2 + i) * G, tokens, in_row, HQ * 2 * G, gate, gate_ok).to(tl.float32)
    # What queries read, less what keys gave inside the chunk, meets the tokens before; what keys leave behind, those after.
    key = load_rows(keys + (kv_flat * 2 + i) * K, tokens, in_row, HKV * 2 * K, channels, channel_ok)
    d_decay -= sum_over_pairs(key.to(tl.float32) * dk_scaled, K, G)
    gradient = load_rows(gradients + i * K * V, channels, channel_ok, V, values, value_ok)
    dk_after = tl.dot(v_tile, tl.trans(gradient), input_precision=PRECISION)
    passing = sum_over_pairs(key.to(tl.float32) * dk_after, K, G)
    whole = tile_products(states + i * K * V, gradients + i * K * V, channels, channel_ok, V, BV)
    meeting = tl.sum(d_decay, 0) + tl.sum(sum_over_pairs(whole[None, :], K, G), 0)
    d_decay = meeting[None, :] + d_decay - passing + cumulative(passing - d_decay, EXACT)
    store_key_gradients(
        d_decay, dk_scaled + dk_after, k + batch * k_b + first * k_t + kv_head * k_h, gate_logits, write_logits, query_factors,
        d_gate_logits, d_write_logits, dk_parts, kv_flat * 2 + i, tokens, token_ok, in_row, k_t, channels, channel_ok, gates,
        inverse_normalizer, bound, HKV, K, G, EXACT,
    )  # fmt: skip


def key_gradients(
    layer: ChunkLayer, decayed: Decayed, states: Tensor, gradients: Tensor, crossings: Tensor, do: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk, d_gate_logits and d_write_logits (or None), from `states` and their `gradients` and the `crossings` of `query_gradients`."""
    inputs, k, sizes = layer.inputs, layer.inputs.k, layer.whole_sizes
    d_gate_logits = torch.empty_like(inputs.gate_logits)
    d_write_logits = None if inputs.write_logits is None else torch.empty_like(inputs.write_logits)
    dk_parts = k.new_empty(*k.shape[:3], 2, k.shape[3])
    _key_kernel[(2 * layer.tiling.tiles, layer.programs)](
        inputs.q,
        k,
        inputs.v,
        do,
        inputs.gate_logits,
        inputs.write_logits,
        inputs.mask,
        decayed.query_factors,
        decayed.keys,
        inputs.row_first,
        inputs.row_length,
        inputs.mix,
        states,
        gradients,
        crossings,
        dk_parts,
        d_gate_logits,
        d_write_logits,
        *strides(inputs.q, k, inputs.v),
        *layer.counts,
        1.0 / inputs.gate_normalizer,
        inputs.lower_bound,
        **sizes,
        num_warps=8 if sizes["G"] == sizes["K"] else 4,
        num_stages=1,
    )
    return dk_parts.sum(3), d_gate_logits, d_write_logits
