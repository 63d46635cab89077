"""Gradients per KV head: of keys and values, from the queries that see a key and from the gradient D of the states; of the gates.

The gates' gradient comes from x = k dk: a token's log-decay shrinks what the tokens before it left behind, so within a tile it
collects their x, plus S · exp(decay) D for all before.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import (
    COUNTS,
    LOG2_E,
    channel_columns,
    load_mask,
    load_rows,
    number_of,
    numbers,
    store_rows,
    strides,
    sum_over_pairs,
    tile_tokens,
)
from ..states.decays import Decayed, cumulative
from ..states.gradients import store_key_gradients, tile_products
from .inputs import WindowLayer
from .query_gradients import QueryGradients
from .softmax import in_window, query_tile, score_slope, softmax_scores


@triton.jit(do_not_specialize=COUNTS)
def _state_key_kernel(
    k, v,
    states,  # [B, boundaries, Hkv, 2, K, V]: at the start of each tile
    gradients, gate_logits, write_logits, mask, query_factors, keys, at_middle, state_length,
    dk_parts,  # [B, T, Hkv, 2, K]: by state
    dv_parts, d_gate_logits, d_write_logits,
    k_b, k_t, k_h, v_b, v_t, v_h,
    T,
    taken,  # tokens that the states take in where state_length is None
    boundaries, state_tiles, gradient_tiles, inverse_normalizer, bound,
    HKV, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    tile, i, row_head = tl.program_id(0) // 2, tl.program_id(0) % 2, tl.program_id(1)  # one state: both need too many registers
    row, kv_head = (row_head // HKV).to(tl.int64), row_head % HKV
    tokens, in_block = tile_tokens(tile, PER_BLOCK, SIZE, C)
    taken = number_of(state_length, row, taken)
    written = in_block & (tokens < T)
    token_ok = load_mask(mask, row * T, tokens, written & (tokens < taken))
    EXACT: tl.constexpr = tl.float32 == DOT
    channels, channel_ok, gates = channel_columns(K, G, BK)
    values, value_ok = numbers(0, V, BV)
    kv_flat = row * T * HKV + kv_head
    v_tile = load_rows(v + row * v_b + kv_head * v_h, tokens, token_ok, v_t, values, value_ok).to(DOT)
    place = kv_flat * 2 + i
    state = states + (((row * boundaries + tile) * HKV + kv_head) * 2 + i) * K * V
    gradient = gradients + (((row * gradient_tiles + tile) * HKV + kv_head) * 2 + i) * K * V
    middle = tl.load(at_middle + (((row * state_tiles + tile) * HKV + kv_head) * 2 + i) * G + gates, mask=channel_ok, other=0.0)
    after = (load_rows(gradient, channels, channel_ok, V, values, value_ok).to(tl.float32) * middle[:, None]).to(DOT)
    key = load_rows(keys + place * K, tokens, token_ok, HKV * 2 * K, channels, channel_ok)
    dk_scaled = tl.dot(v_tile, tl.trans(after), input_precision=PRECISION)
    d_value = tl.dot(key, after, input_precision=PRECISION)
    store_rows(dv_parts + place * V, tokens, written, HKV * 2 * V, values, value_ok, d_value)
    passing = sum_over_pairs(key.to(tl.float32) * dk_scaled, K, G)
    whole = tile_products(state, gradient, channels, channel_ok, V, BV) * middle * middle
    d_decay = tl.sum(sum_over_pairs(whole[None, :], K, G), 0)[None, :] + cumulative(passing, EXACT) - passing
    store_key_gradients(
        d_decay, dk_scaled, k + row * k_b + kv_head * k_h, gate_logits, write_logits, query_factors, d_gate_logits, d_write_logits,
        dk_parts, place, tokens, token_ok, written, k_t, channels, channel_ok, gates, inverse_normalizer, bound, HKV, K, G, EXACT,
    )  # fmt: skip


@triton.jit(do_not_specialize=COUNTS)
def _key_kernel(
    q, k, v, do, log_denominators,
    alphas,  # None of a window alone
    deltas, row_length,
    dk_parts,  # what the states' gradients gave, by state, for the first `state_tiles` tiles; None without states
    dv_parts, dk, dv,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, state_tiles, scale, softcap,
    HKV, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, PER_BLOCK: tl.constexpr,
):  # fmt: skip
    tile, row_head = tl.program_id(0), tl.program_id(1)
    row, kv_head = (row_head // HKV).to(tl.int64), row_head % HKV
    tokens, written, token_ok, first, tile_end, length = query_tile(tile, row, T, row_length, PER_BLOCK, SIZE, C)
    HQ = HKV * R
    columns, column_ok = numbers(0, K, BK)
    values, value_ok = numbers(0, V, BV)
    q += row * q_b + kv_head * R * q_h
    flat = row * T * HQ + kv_head * R
    kv_flat = row * T * HKV + kv_head
    k_tile = load_rows(k + row * k_b + kv_head * k_h, tokens, token_ok, k_t, columns, column_ok).to(DOT)
    v_tile = load_rows(v + row * v_b + kv_head * v_h, tokens, token_ok, v_t, values, value_ok).to(DOT)
    dk_tile = tl.zeros([C, BK], tl.float32)
    dv_tile = tl.zeros([C, BV], tl.float32)
    last = tl.minimum(tile_end + W - 1, length)
    for index in range(tl.maximum(tl.cdiv(last - first, BN), 0) * R):
        r = index % R
        query = first + index // R * BN + tl.arange(0, BN)
        query_ok = query < length
        q_tile = load_rows(q + r * q_h, query, query_ok, q_t, columns, column_ok).to(DOT)
        do_tile = load_rows(do + (flat + r) * V, query, query_ok, HQ * V, values, value_ok).to(DOT)
        offset = flat + r + query * HQ
        log_denominator = tl.load(log_denominators + offset, mask=query_ok, other=0.0)
        if alphas is not None:
            kept = 1 - tl.load(alphas + offset, mask=query_ok, other=0.0)
        delta = tl.load(deltas + offset, mask=query_ok, other=0.0)
        scores = softmax_scores(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION), scale, softcap)
        visible = in_window(tokens[:, None], query[None, :], W) & query_ok[None, :] & token_ok[:, None]
        weights = tl.where(visible, tl.exp2(scores - log_denominator[None, :] * LOG2_E), 0.0)
        d_weights = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION)
        shares = weights
        if alphas is not None:
            # The window's share of do goes with the weights: do itself then serves both products as it is.
            shares = weights * kept[None, :]
            d_weights *= kept[None, :]
        dv_tile = tl.dot(shares.to(DOT), do_tile, acc=dv_tile, input_precision=PRECISION)
        d_scores = weights * (d_weights - delta[None, :])
        if softcap is not None:
            d_scores *= score_slope(scores, softcap)
        dk_tile = tl.dot(d_scores.to(DOT), q_tile, acc=dk_tile, input_precision=PRECISION)
    dk_tile *= scale
    if dk_parts is not None:
        before = written & (tile < state_tiles)
        for i in tl.static_range(2):
            part = load_rows(dk_parts + (kv_flat * 2 + i) * K, tokens, before, HKV * 2 * K, columns, column_ok)
            dk_tile += part.to(tl.float32)
            part = load_rows(dv_parts + (kv_flat * 2 + i) * V, tokens, before, HKV * 2 * V, values, value_ok)
            dv_tile += part.to(tl.float32)
    store_rows(dk + kv_flat * K, tokens, written, HKV * K, columns, column_ok, dk_tile)
    store_rows(dv + kv_flat * V, tokens, written, HKV * V, values, value_ok, dv_tile)


class StateKeyGradients(NamedTuple):
    """What keys, values and gates get through the states: parts by state `[B, T, Hkv, 2, K]` and `[..., V]`, which hold something in
    the first tiles alone and are None without states, and the gradients of raw gates and write gates, if there are any."""

    dk_parts: Tensor | None
    dv_parts: Tensor | None
    d_gate_logits: Tensor | None
    d_write_logits: Tensor | None


def state_key_gradients(layer: WindowLayer, decayed: Decayed | None, states: Tensor | None, gradients: Tensor | None) -> StateKeyGradients:
    """From the states at every tile boundary and their gradients."""
    inputs = layer.inputs
    d_gate_logits, d_write_logits = (None if x is None else torch.empty_like(x) for x in (inputs.gate_logits, inputs.write_logits))
    for x in (d_gate_logits, d_write_logits):
        if x is not None:
            x[:, layer.state_tokens :].zero_()
    if decayed is None or states is None or gradients is None:
        return StateKeyGradients(None, None, d_gate_logits, d_write_logits)
    dk_parts, dv_parts = (x.new_empty(*x.shape[:3], 2, x.shape[3]) for x in (inputs.k, inputs.v))
    _state_key_kernel[(2 * layer.state_tiles, layer.programs)](
        inputs.k,
        inputs.v,
        states,
        gradients,
        inputs.gate_logits,
        inputs.write_logits,
        inputs.state_mask,
        *decayed,
        inputs.state_length,
        dk_parts,
        dv_parts,
        d_gate_logits,
        d_write_logits,
        *strides(inputs.k, inputs.v),
        layer.tokens,
        layer.state_tokens,
        states.shape[1],
        layer.state_tiles,
        gradients.shape[1],
        1.0 / inputs.gate_normalizer,
        inputs.lower_bound,
        HKV=layer.kv_heads,
        **layer.state_heads._asdict() | {"BV": layer.sizes["BV"]},
        **layer.tile_sizes,
        num_warps=4,
        num_stages=1,
    )
    return StateKeyGradients(dk_parts, dv_parts, d_gate_logits, d_write_logits)


def key_gradients(
    layer: WindowLayer, do: Tensor, log_denominators: Tensor, queries: QueryGradients, states: StateKeyGradients
) -> tuple[Tensor, Tensor]:
    """dk and dv, from the queries that see a key and with what the states gave."""
    inputs = layer.inputs
    dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (inputs.k, inputs.v))
    _key_kernel[(layer.tiling.tiles, layer.programs)](
        inputs.q,
        inputs.k,
        inputs.v,
        do,
        log_denominators,
        queries.alphas,
        queries.deltas,
        inputs.row_length,
        states.dk_parts,
        states.dv_parts,
        dk,
        dv,
        *strides(inputs.q, inputs.k, inputs.v),
        layer.tokens,
        layer.state_tiles,
        inputs.scale,
        inputs.softcap,
        **{name: size for name, size in layer.sizes.items() if name not in ("KC", "S", "BS")},
        num_warps=4,
        num_stages=2,
    )
    return dk, dv
