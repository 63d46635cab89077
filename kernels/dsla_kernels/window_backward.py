"""Gradients of the layer with a softmax window.

The states at block boundaries are computed again. Then, each step over all tiles side by side:

1. per query head: through gate and norm to the gradient u of the state output and the scalars of the softmax; dq; sums for the
   parameters and the sinks;
2. per KV head, from the end: the gradient D of the states at tile boundaries, D = exp(decay) D' + sum over the group of
   mix * scale * q^T u for the queries that read this boundary; in segments, as the states;
3. per KV head: dk, dv from the queries that see a key and from D; the gates' gradient from x = k dk: a token's log-decay
   shrinks what the tokens before it left behind, so within a tile it collects their x, plus S · exp(decay) D for all before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .common import (
    LOG2_E,
    channel_columns,
    inverse,
    load_mask,
    load_rows,
    load_write_gate,
    log_decay_slope,
    on_its_device,
    store_rows,
    sum_over_pairs,
)
from .decays import cumulative
from .states import load_middle, scan_segments, tile_products
from .window_forward import WindowLayer, score_slope, softmax_scores, state_gate, window_forward


@triton.jit
def _query_step(scores, visible, log_denominator, d_window, delta, k_tile, v_tile, dq, softcap, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Weights and score gradients `[C, BN]` of one tile of keys, and dq with its share."""
    weights = tl.where(visible, tl.exp2(scores - log_denominator[:, None] * LOG2_E), 0.0)
    d_weights = tl.dot(d_window, tl.trans(v_tile), input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[:, None])
    if softcap is not None:
        d_scores *= score_slope(scores, softcap)
    d_scores = d_scores.to(DOT)
    return weights.to(DOT), d_scores, tl.dot(d_scores, k_tile, acc=dq, input_precision=PRECISION)


@triton.jit
def _query_kernel(
    q,
    k,
    v,
    states,  # [N, boundaries, Hkv, 2, K, V] at every tile, or None
    mix,
    norm_weight,
    state_gain,
    state_bias,
    sink_k,
    sink_v,
    sink_logits,
    row_start,
    row_length,
    o,
    do,
    log_denominators,
    dq,
    d_state_output,  # u `[B, T, Hq, V]` or None
    alphas,  # fp32 [B, T, Hq]
    deltas,  # fp32 [B, T, Hq]
    d_norm,  # fp32 [B, tiles, Hq, V]
    d_scalars,  # fp32 [B, tiles, Hq, 4]: mix 1, mix 2, gain, bias
    d_sink_k,  # fp32 [B, tiles, Hq, S, K]
    d_sink_v,
    d_sink_logits,  # fp32 [B, tiles, Hq]
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    T,
    tiles,
    boundaries,
    scale,
    softcap,
    norm_eps,
    HKV: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KC: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    FIRST_STATE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, row_head = tl.program_id(0) // R, tl.program_id(1)
    row, kv_head = (row_head // HKV).to(tl.int64), row_head % HKV
    head = kv_head * R + tl.program_id(0) % R
    block = tile // PER_BLOCK
    inside = tile % PER_BLOCK * C + tl.arange(0, C)
    tokens = block * SIZE + inside
    first = block * SIZE + tile % PER_BLOCK * C
    length = T
    if row_length is not None:
        length = tl.load(row_length + row).to(tl.int32)
    text_start = 0
    if row_start is not None:
        text_start = tl.load(row_start + row).to(tl.int32)
    end = tl.minimum(tl.minimum(first + C, block * SIZE + SIZE), length)
    written = (inside < SIZE) & (tokens < T)
    token_ok = (inside < SIZE) & (tokens < length)

    columns = tl.arange(0, BK)
    column_ok = columns < K
    values = tl.arange(0, BV)
    value_ok = values < V
    HQ: tl.constexpr = HKV * R
    flat = row * T * HQ + head
    part_offset = (row * tiles + tile) * HQ + head
    q += row * q_b + head * q_h
    k += row * k_b + kv_head * k_h
    v += row * v_b + kv_head * v_h

    do_tile = load_rows(do + flat * V, tokens, token_ok, HQ * V, values, value_ok).to(tl.float32)
    o_tile = load_rows(o + flat * V, tokens, token_ok, HQ * V, values, value_ok).to(tl.float32)
    log_denominator = tl.load(log_denominators + flat + tokens * HQ, mask=token_ok, other=0.0)
    delta = tl.sum(do_tile * o_tile, 1)  # becomes do_window · o_window minus the gradient of the log-denominator
    alpha = tl.zeros([C], tl.float32)
    dq_tile = tl.zeros([C, BK], tl.float32)
    u = tl.zeros([C, BV], tl.float32)
    d_weight = tl.zeros([BV], tl.float32)
    d_gain = 0.0
    d_bias = 0.0
    if states is not None:
        if (block >= FIRST_STATE) & (first < length):
            states += ((row * boundaries + tl.maximum(block - 1, 0) * PER_BLOCK) * HKV + kv_head) * 2 * K * V
            gain = tl.load(state_gain + head).to(tl.float32)
            bias = tl.load(state_bias + head).to(tl.float32)
            weight = tl.load(norm_weight + head * V + values, mask=value_ok, other=0.0).to(tl.float32)
            q_scaled = load_rows(q, tokens, token_ok, q_t, columns, column_ok).to(tl.float32) * scale
            o_state = tl.zeros([C, BV], tl.float32)
            for i in tl.range(0, 2, loop_unroll_factor=1, num_stages=1):
                state = load_rows(states + i * K * V, columns, column_ok, V, values, value_ok).to(DOT)
                query = (q_scaled * tl.load(mix + head * 2 + i).to(tl.float32)).to(DOT)
                o_state = tl.dot(query, state, acc=o_state, input_precision=PRECISION)
            rms, log_rms, alpha = state_gate(o_state, log_denominator, gain, bias, norm_eps, V)
            normalised = o_state / rms[:, None]
            # With n = weight * normalised, o = (1 - alpha) o_window + alpha n: the gate's gradient needs no o_window,
            # d_gate = alpha (1 - alpha) do · (n - o_window) = alpha do · (n - o).
            d_n = tl.sum(do_tile * normalised * weight[None, :], 1)
            d_gate = alpha * (d_n - delta)
            delta = delta - alpha * d_n + d_gate
            d_normalised = do_tile * (alpha[:, None] * weight[None, :])
            d_log_rms = d_gate * gain - tl.sum(d_normalised * normalised, 1)
            u = (d_normalised + normalised * (d_log_rms / V)[:, None]) / rms[:, None]
            d_weight = tl.sum(do_tile * alpha[:, None] * normalised, 0)
            d_gain = tl.sum(d_gate * log_rms, 0)
            d_bias = tl.sum(d_gate, 0)
            u_factor = u.to(DOT)
            for i in tl.range(0, 2, loop_unroll_factor=1, num_stages=1):
                state = load_rows(states + i * K * V, columns, column_ok, V, values, value_ok).to(DOT)
                d_query = tl.dot(u_factor, tl.trans(state), input_precision=PRECISION)
                tl.store(d_scalars + part_offset * 4 + i, tl.sum(tl.sum(d_query * q_scaled, 1), 0))
                dq_tile += d_query * tl.load(mix + head * 2 + i).to(tl.float32)
        store_rows(d_state_output + flat * V, tokens, written, HQ * V, values, value_ok, u)
    tl.store(alphas + flat + tokens * HQ, alpha, mask=written)
    tl.store(deltas + flat + tokens * HQ, delta, mask=written)
    tl.store(d_norm + part_offset * V + values, d_weight, mask=value_ok)
    tl.store(d_scalars + part_offset * 4 + 2, d_gain)
    tl.store(d_scalars + part_offset * 4 + 3, d_bias)
    if sink_logits is not None:
        sink_score = tl.load(sink_logits + head).to(tl.float32) - log_denominator
        tl.store(d_sink_logits + part_offset, -tl.sum(tl.where(token_ok, tl.exp(sink_score) * delta, 0.0), 0))

    q_tile = load_rows(q, tokens, token_ok, q_t, columns, column_ok).to(DOT)
    d_window = (do_tile * (1 - alpha)[:, None]).to(DOT)
    if S > 0:
        sink = tl.arange(0, BS)
        d_key = tl.zeros([BS, BK], tl.float32)
        d_value = tl.zeros([BS, BV], tl.float32)
        if text_start + end - 1 >= W:
            k_tile = load_rows(sink_k + (row * S * HKV + kv_head) * K, sink, sink < S, HKV * K, columns, column_ok).to(DOT)
            v_tile = load_rows(sink_v + (row * S * HKV + kv_head) * V, sink, sink < S, HKV * V, values, value_ok).to(DOT)
            scores = softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, softcap)
            visible = (sink[None, :] <= text_start + tokens[:, None] - W) & (sink[None, :] < S) & token_ok[:, None]
            weights, d_scores, dq_tile = _query_step(
                scores, visible, log_denominator, d_window, delta, k_tile, v_tile, dq_tile, softcap, DOT, PRECISION
            )  # fmt: skip
            d_key = tl.dot(tl.trans(d_scores), q_tile, input_precision=PRECISION) * scale
            d_value = tl.dot(tl.trans(weights), d_window, input_precision=PRECISION)
        store_rows(d_sink_k + part_offset * S * K, sink, sink < S, K, columns, column_ok, d_key)
        store_rows(d_sink_v + part_offset * S * V, sink, sink < S, V, values, value_ok, d_value)
    for key_first in range(tl.maximum(first - W, 0), end, BN):
        keys = key_first + tl.arange(0, BN)
        k_tile = load_rows(k, keys, keys < length, k_t, columns, column_ok).to(DOT)
        v_tile = load_rows(v, keys, keys < length, v_t, values, value_ok).to(DOT)
        scores = softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, softcap)
        visible = (keys[None, :] <= tokens[:, None]) & (keys[None, :] > tokens[:, None] - W) & token_ok[:, None]
        _, _, dq_tile = _query_step(
            scores, visible, log_denominator, d_window, delta, k_tile, v_tile, dq_tile, softcap, DOT, PRECISION
        )  # fmt: skip
    store_rows(dq + flat * K, tokens, written, HQ * K, columns, column_ok, dq_tile * scale)


@triton.jit
def _state_gradient_kernel(
    q,
    u,  # [B, T, Hq, V]
    at_middle,
    row_length,
    mix,
    entering,  # fp32 [B, segments, Hkv, 2, K, V]: gradient at each segment's end; written by ADDITIONS; None: zeros
    segment_decay,
    gradients,  # [B, tiles, Hkv, 2, K, V]: at the end of each tile
    d_initial,  # fp32 [B, Hkv, 2, K, V] or None
    q_b,
    q_t,
    q_h,
    T,
    state_tiles,  # tiles that decay the states; behind them only queries follow
    tiles,
    segments,
    per_segment,
    scale,
    HKV: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    FIRST_STATE: tl.constexpr,
    ADDITIONS: tl.constexpr,
):
    value_tile, segment, row_head = tl.program_id(0) // 2, tl.program_id(1), tl.program_id(2)
    row, kv_head = (row_head // HKV).to(tl.int64), row_head % HKV
    i = tl.program_id(0) % 2
    length = T
    if row_length is not None:
        length = tl.load(row_length + row).to(tl.int32)
    HQ: tl.constexpr = HKV * R
    gate_t: tl.constexpr = HKV * 2 * G
    q += row * q_b + kv_head * R * q_h
    u += (row * T * HQ + kv_head * R) * V
    if at_middle is not None:
        at_middle += ((row * state_tiles * HKV + kv_head) * 2 + i) * G
    channels, channel_ok, gates = channel_columns(K, G, BK)
    values = value_tile * BV + tl.arange(0, BV)
    value_ok = values < V
    segment_place = ((row * segments + segment) * HKV + kv_head) * 2 + i
    gradient = tl.zeros([BK, BV], tl.float32)
    decay = tl.full([BK], 1.0, tl.float32)
    if not ADDITIONS and entering is not None:
        gradient = load_rows(entering + segment_place * K * V, channels, channel_ok, V, values, value_ok)

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

    if ADDITIONS:
        store_rows(entering + segment_place * K * V, channels, channel_ok, V, values, value_ok, gradient)
        if value_tile == 0:
            tl.store(segment_decay + segment_place * K + channels, decay, mask=channel_ok)
    elif d_initial is not None:  # noqa: SIM102 (the first is decided at compile time)
        if segment == 0:
            place = (row * HKV + kv_head) * 2 + i
            store_rows(d_initial + place * K * V, channels, channel_ok, V, values, value_ok, gradient)


@triton.jit
def _state_key_kernel(
    k,
    v,
    states,  # [B, boundaries, Hkv, 2, K, V]: at the start of each tile
    gradients,
    gate_logits,
    write_logits,
    mask,
    query_factors,
    keys,
    at_middle,
    state_length,
    dk_parts,  # [B, T, Hkv, 2, K]: by state
    dv_parts,
    d_gate_logits,
    d_write_logits,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    T,
    taken,  # tokens that the states take in where state_length is None
    boundaries,
    state_tiles,
    gradient_tiles,
    inverse_normalizer,
    bound,
    HKV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):
    tile, i, row_head = tl.program_id(0) // 2, tl.program_id(0) % 2, tl.program_id(1)  # one state: both need too many registers
    row, kv_head = (row_head // HKV).to(tl.int64), row_head % HKV
    inside = tile % PER_BLOCK * C + tl.arange(0, C)
    tokens = tile // PER_BLOCK * SIZE + inside
    if state_length is not None:
        taken = tl.load(state_length + row).to(tl.int32)
    written = (inside < SIZE) & (tokens < T)
    token_ok = load_mask(mask, row * T, tokens, written & (tokens < taken))
    EXACT: tl.constexpr = tl.float32 == DOT
    gate_t: tl.constexpr = HKV * 2 * G
    channels, channel_ok, gates = channel_columns(K, G, BK)
    BG: tl.constexpr = BK if G == K else BK // 2
    gate = tl.arange(0, BG)
    values = tl.arange(0, BV)
    value_ok = values < V
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
    logits = load_rows(gate_logits + place * G, tokens, token_ok, gate_t, gate, gate < G).to(tl.float32)
    d_logits = tl.where(token_ok[:, None], d_decay * log_decay_slope(logits, inverse_normalizer, bound), 0.0)
    store_rows(d_gate_logits + place * G, tokens, written, gate_t, gate, gate < G, d_logits)
    factors = load_rows(query_factors + place * G, tokens, token_ok, gate_t, gates, channel_ok).to(tl.float32)
    d_written = tl.where(token_ok[:, None] & channel_ok[None, :], dk_scaled * inverse(factors, EXACT), 0.0)
    if write_logits is None:
        d_key = d_written
    else:
        write = load_write_gate(write_logits, place, tokens, token_ok, HKV * 2)
        d_key = d_written * write[:, None]
        k_tile = load_rows(k + row * k_b + kv_head * k_h, tokens, token_ok, k_t, channels, channel_ok)
        d_write = tl.sum(d_written * k_tile.to(tl.float32), 1) * write * (1 - write)
        pointers = d_write_logits + place + tokens * HKV * 2
        tl.store(pointers, d_write.to(d_write_logits.dtype.element_ty), mask=written)
    store_rows(dk_parts + place * K, tokens, written, HKV * 2 * K, channels, channel_ok, d_key)


@triton.jit
def _key_kernel(
    q,
    k,
    v,
    do,
    log_denominators,
    alphas,
    deltas,
    row_length,
    dk_parts,  # what the states' gradients gave, by state, for the first `state_tiles` tiles; None without states
    dv_parts,
    dk,
    dv,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    T,
    state_tiles,
    scale,
    softcap,
    HKV: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    PER_BLOCK: tl.constexpr,
):
    tile, row_head = tl.program_id(0), tl.program_id(1)
    row, kv_head = (row_head // HKV).to(tl.int64), row_head % HKV
    inside = tile % PER_BLOCK * C + tl.arange(0, C)
    first = tile // PER_BLOCK * SIZE + tile % PER_BLOCK * C
    tokens = tile // PER_BLOCK * SIZE + inside
    length = T
    if row_length is not None:
        length = tl.load(row_length + row).to(tl.int32)
    written = (inside < SIZE) & (tokens < T)
    token_ok = (inside < SIZE) & (tokens < length)
    HQ: tl.constexpr = HKV * R
    columns = tl.arange(0, BK)
    column_ok = columns < K
    values = tl.arange(0, BV)
    value_ok = values < V
    q += row * q_b + kv_head * R * q_h
    flat = row * T * HQ + kv_head * R
    kv_flat = row * T * HKV + kv_head
    k_tile = load_rows(k + row * k_b + kv_head * k_h, tokens, token_ok, k_t, columns, column_ok).to(DOT)
    v_tile = load_rows(v + row * v_b + kv_head * v_h, tokens, token_ok, v_t, values, value_ok).to(DOT)
    dk_tile = tl.zeros([C, BK], tl.float32)
    dv_tile = tl.zeros([C, BV], tl.float32)
    last = tl.minimum(tl.minimum(first + C, tile // PER_BLOCK * SIZE + SIZE) + W - 1, length)
    for index in range(tl.maximum(tl.cdiv(last - first, BN), 0) * R):
        r = index % R
        query = first + index // R * BN + tl.arange(0, BN)
        query_ok = query < length
        q_tile = load_rows(q + r * q_h, query, query_ok, q_t, columns, column_ok).to(DOT)
        do_tile = load_rows(do + (flat + r) * V, query, query_ok, HQ * V, values, value_ok).to(DOT)
        offset = flat + r + query * HQ
        log_denominator = tl.load(log_denominators + offset, mask=query_ok, other=0.0)
        kept = 1 - tl.load(alphas + offset, mask=query_ok, other=0.0)
        delta = tl.load(deltas + offset, mask=query_ok, other=0.0)
        scores = softmax_scores(tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION), scale, softcap)
        visible = (tokens[:, None] <= query[None, :]) & (tokens[:, None] > query[None, :] - W) & query_ok[None, :] & token_ok[:, None]
        weights = tl.where(visible, tl.exp2(scores - log_denominator[None, :] * LOG2_E), 0.0)
        # The window's share of do goes with the weights: do itself then serves both products as it is.
        dv_tile = tl.dot((weights * kept[None, :]).to(DOT), do_tile, acc=dv_tile, input_precision=PRECISION)
        d_weights = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION) * kept[None, :]
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


def _state_gradients(layer: WindowLayer, decayed, q, u, mix, row_length, d_final, scale, first_state, with_initial, segment_blocks):
    """Gradient of the states at the end of every tile `[B, tiles, Hkv, 2, K, V]` and at the start of the rows (or None)."""
    inputs, heads = layer.inputs, layer.state_heads
    # One tile more than the states take in: at its start lies the last boundary that queries read.
    tiling = layer.state_tiling(segment_blocks, layer.state_tokens + 1)
    gradients = inputs.state_buffer(layer.batch, tiling.tiles, dtype=layer.inputs.dtype)
    d_initial = inputs.state_buffer(layer.batch) if with_initial else None

    def launch(entering, segment_decay, additions):
        _state_gradient_kernel[(2 * layer.value_tiles, tiling.segments, layer.batch * layer.kv_heads)](
            q,
            u,
            None if decayed is None else decayed.at_middle,
            row_length,
            mix,
            entering,
            segment_decay,
            gradients,
            d_initial,
            *q.stride()[:3],
            layer.tokens,
            layer.state_tokens // layer.size * layer.tiling.per_block,
            tiling.tiles,
            tiling.segments,
            tiling.per_segment,
            scale,
            HKV=layer.kv_heads,
            R=layer.sizes["R"],
            **heads._asdict(),
            SIZE=tiling.size,
            C=tiling.tile,
            PER_BLOCK=tiling.per_block,
            FIRST_STATE=first_state,
            ADDITIONS=additions,
            num_warps=4 if heads.BK * heads.BV <= 32 * 64 else 8,
            num_stages=2,
        )

    if tiling.segments == 1:
        entering = None if d_final is None else d_final.float()[:, None].contiguous()
    else:
        entering = inputs.state_buffer(layer.batch, tiling.segments)
        segment_decay = entering.new_empty(entering.shape[:-1])
        launch(entering, segment_decay, True)
        scan_segments(entering, segment_decay, d_final, None, reverse=True)
    launch(entering, None, False)
    return gradients, d_initial


@torch.library.custom_op(add_op_namespace_prefix("window_backward"), mutates_args=())
@on_its_device
def _window_backward(
    do: Tensor,
    d_final: Tensor | None,
    o: Tensor,
    log_denominators: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    norm_weight: Tensor,
    state_gain: Tensor,
    state_bias: Tensor,
    write_logits: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    sink_logits: Tensor | None,
    initial_state: Tensor | None,
    state_mask: Tensor | None,
    row_length: Tensor | None,
    state_length: Tensor | None,
    row_start: Tensor | None,
    window_size: int,
    gate_normalizer: float,
    lower_bound: float,
    scale: float,
    norm_eps: float,
    softcap: float | None,
    segment_blocks: int,
) -> list[Tensor]:
    """Gradients of q to initial_state, in the order of the arguments; an empty tensor for an argument that is None."""
    layer = WindowLayer(
        q, k, v, gate_logits, write_logits, state_mask, row_length, state_length, sink_k, window_size, gate_normalizer, lower_bound
    )
    inputs, sizes, heads = layer.inputs, layer.sizes, layer.state_heads
    tiles, single = layer.tiling.tiles, torch.float32
    decayed = layer.decayed()
    states = layer.states(decayed, initial_state, None, segment_blocks, every_tile=True)
    first_state = 2 if initial_state is None else 0

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    u = None if states is None else torch.empty(o.shape, dtype=layer.inputs.dtype, device=o.device)
    alphas, deltas = torch.empty_like(log_denominators), torch.empty_like(log_denominators)
    d_norm = q.new_empty(layer.batch, tiles, *norm_weight.shape, dtype=single)
    d_scalars = q.new_zeros(layer.batch, tiles, layer.heads, 4, dtype=single)
    d_sink_k, d_sink_v = (
        None if x is None else q.new_empty(layer.batch, tiles, layer.heads, x.shape[1], x.shape[3], dtype=single) for x in (sink_k, sink_v)
    )
    d_sink_logits = None if sink_logits is None else q.new_empty(layer.batch, tiles, layer.heads, dtype=single)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    warps = 8 if sizes["BV"] >= 128 else 4
    _query_kernel[(tiles * sizes["R"], layer.batch * layer.kv_heads)](
        q,
        k,
        v,
        states,
        mix,
        norm_weight,
        state_gain,
        state_bias,
        sink_k,
        sink_v,
        sink_logits,
        row_start,
        row_length,
        o,
        do,
        log_denominators,
        dq,
        u,
        alphas,
        deltas,
        d_norm,
        d_scalars,
        d_sink_k,
        d_sink_v,
        d_sink_logits,
        *strides,
        layer.tokens,
        tiles,
        1 if states is None else states.shape[1],
        scale,
        softcap,
        norm_eps,
        **sizes,
        FIRST_STATE=first_state,
        num_warps=warps,
        num_stages=1,
    )
    gradients = d_initial = None
    if states is not None:
        gradients, d_initial = _state_gradients(
            layer, decayed, q, u, mix, row_length, d_final, scale, first_state, initial_state is not None, segment_blocks
        )
    d_gate_logits = torch.empty_like(gate_logits)
    d_write_logits = None if write_logits is None else torch.empty_like(write_logits)
    for x in (d_gate_logits, d_write_logits):
        if x is not None:
            x[:, layer.state_tokens :].zero_()
    tile_sizes = {name: sizes[name] for name in ("SIZE", "C", "PER_BLOCK")}
    state_tiles = layer.state_tokens // layer.size * layer.tiling.per_block
    dk_parts = dv_parts = None
    if decayed is not None and states is not None and gradients is not None:
        dk_parts, dv_parts = (x.new_empty(*x.shape[:3], 2, x.shape[3]) for x in (k, v))
        _state_key_kernel[(2 * state_tiles, layer.batch * layer.kv_heads)](
            k,
            v,
            states,
            gradients,
            gate_logits,
            write_logits,
            state_mask,
            *decayed,
            inputs.row_length,
            dk_parts,
            dv_parts,
            d_gate_logits,
            d_write_logits,
            *strides[3:],
            layer.tokens,
            layer.state_tokens,
            states.shape[1],
            state_tiles,
            gradients.shape[1],
            1.0 / gate_normalizer,
            lower_bound,
            HKV=layer.kv_heads,
            **heads._asdict() | {"BV": sizes["BV"]},
            **tile_sizes,
            num_warps=4,
            num_stages=1,
        )
    _key_kernel[(tiles, layer.batch * layer.kv_heads)](
        q,
        k,
        v,
        do,
        log_denominators,
        alphas,
        deltas,
        row_length,
        dk_parts,
        dv_parts,
        dk,
        dv,
        *strides,
        layer.tokens,
        state_tiles,
        scale,
        softcap,
        **{name: size for name, size in sizes.items() if name not in ("KC", "S", "BS")},
        num_warps=4,
        num_stages=2,
    )
    d_scalars = d_scalars.sum((0, 1))
    d_sinks = [
        None if part is None else part.sum(1).unflatten(1, (layer.kv_heads, -1)).sum(2).transpose(1, 2) for part in (d_sink_k, d_sink_v)
    ]
    gradient_list = [
        (dq, q),
        (dk, k),
        (dv, v),
        (d_gate_logits, gate_logits),
        (d_scalars[:, :2].clone(), mix),
        (d_norm.sum((0, 1)), norm_weight),
        (d_scalars[:, 2].clone(), state_gain),
        (d_scalars[:, 3].clone(), state_bias),
        (d_write_logits, write_logits),
        (d_sinks[0], sink_k),
        (d_sinks[1], sink_v),
        (None if d_sink_logits is None else d_sink_logits.sum((0, 1)), sink_logits),
        (d_initial, initial_state),
    ]
    return [q.new_empty(0) if x is None or d is None else d.to(x.dtype).contiguous() for d, x in gradient_list]


@_window_backward.register_fake
def _(do, d_final, o, log_denominators, *inputs):
    return [do.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:13]]


def _save(ctx, inputs, output):
    *ctx.options, ctx.with_final, ctx.segment_blocks = inputs[17:]
    ctx.save_for_backward(*output[:2], *inputs[:17])


def _backward(ctx, do, _, d_final):
    o, log_denominators, *tensors = ctx.saved_tensors
    d_final = d_final.contiguous() if ctx.with_final else None
    gradients = ops.window_backward(do.contiguous(), d_final, o, log_denominators, *tensors, *ctx.options, ctx.segment_blocks)
    return *(None if x is None else d for x, d in zip(tensors[:13], gradients, strict=True)), *[None] * 12


window_forward.register_autograd(_backward, setup_context=_save)
