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
    load_log_decay,
    load_mask,
    load_rows,
    load_states,
    load_write_gate,
    log_decay_slope,
    on_its_device,
    store_decays,
    store_rows,
    store_states,
)
from .states import scan_segments
from .window import LOG2_E, WindowLayer, score_slope, softmax_scores, state_gate, window_forward


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
    d_mix1 = 0.0
    d_mix2 = 0.0
    d_gain = 0.0
    d_bias = 0.0
    if states is not None:
        if (block >= FIRST_STATE) & (first < length):
            states += ((row * boundaries + tl.maximum(block - 1, 0) * PER_BLOCK) * HKV + kv_head) * 2 * K * V
            mix1 = tl.load(mix + head * 2).to(tl.float32)
            mix2 = tl.load(mix + head * 2 + 1).to(tl.float32)
            gain = tl.load(state_gain + head).to(tl.float32)
            bias = tl.load(state_bias + head).to(tl.float32)
            weight = tl.load(norm_weight + head * V + values, mask=value_ok, other=0.0).to(tl.float32)
            read1 = tl.zeros([C, BV], tl.float32)
            read2 = tl.zeros([C, BV], tl.float32)
            for start in range(0, K, KC):
                part = start + tl.arange(0, KC)
                q_part = (load_rows(q, tokens, token_ok, q_t, part, part < K).to(tl.float32) * scale).to(DOT)
                state1 = load_rows(states, part, part < K, V, values, value_ok).to(DOT)
                state2 = load_rows(states + K * V, part, part < K, V, values, value_ok).to(DOT)
                read1 = tl.dot(q_part, state1, acc=read1, input_precision=PRECISION)
                read2 = tl.dot(q_part, state2, acc=read2, input_precision=PRECISION)
            o_state = mix1 * read1 + mix2 * read2
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
            d_mix1 = tl.sum(tl.sum(read1 * u, 1), 0)
            d_mix2 = tl.sum(tl.sum(read2 * u, 1), 0)
            state1 = load_rows(states, columns, column_ok, V, values, value_ok).to(DOT)
            dq_tile = tl.dot((u * mix1).to(DOT), tl.trans(state1), acc=dq_tile, input_precision=PRECISION)
            state2 = load_rows(states + K * V, columns, column_ok, V, values, value_ok).to(DOT)
            dq_tile = tl.dot((u * mix2).to(DOT), tl.trans(state2), acc=dq_tile, input_precision=PRECISION)
        store_rows(d_state_output + flat * V, tokens, written, HQ * V, values, value_ok, u)
    tl.store(alphas + flat + tokens * HQ, alpha, mask=written)
    tl.store(deltas + flat + tokens * HQ, delta, mask=written)
    tl.store(d_norm + part_offset * V + values, d_weight, mask=value_ok)
    tl.store(d_scalars + part_offset * 4, d_mix1)
    tl.store(d_scalars + part_offset * 4 + 1, d_mix2)
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
    gate_logits,
    mask,
    row_length,
    state_length,
    mix,
    entering,  # fp32 [B, segments, Hkv, 2, K, V]: gradient at each segment's end; written by ADDITIONS; None: zeros
    segment_decay,
    gradients,  # [B, tiles, Hkv, 2, K, V]: at the end of each tile
    d_initial,  # fp32 [B, Hkv, 2, K, V] or None
    q_b,
    q_t,
    q_h,
    T,
    taken,  # tokens that the states take in where state_length is None
    tiles,
    segments,
    scale,
    inverse_normalizer,
    bound,
    HKV: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KH: tl.constexpr,
    BKH: tl.constexpr,
    BV: tl.constexpr,
    SHARED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    PER_SEGMENT: tl.constexpr,
    FIRST_STATE: tl.constexpr,
    ADDITIONS: tl.constexpr,
):
    value_tile, segment, row_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, kv_head = (row_head // HKV).to(tl.int64), row_head % HKV
    length = T
    if row_length is not None:
        length = tl.load(row_length + row).to(tl.int32)
        taken = tl.load(state_length + row).to(tl.int32)
    G: tl.constexpr = KH if SHARED else K
    HQ: tl.constexpr = HKV * R
    q += row * q_b + kv_head * R * q_h
    u += (row * T * HQ + kv_head * R) * V
    gate_logits += (row * T * HKV + kv_head) * 2 * G
    low = tl.arange(0, BKH)
    high = KH + low
    low_ok = low < KH
    high_ok = high < K
    values = value_tile * BV + tl.arange(0, BV)
    value_ok = values < V
    segment_offset = ((row * segments + segment) * HKV + kv_head) * 2

    d1l = tl.zeros([BV, BKH], tl.float32)
    d1h = tl.zeros([BV, BKH], tl.float32)
    d2l = tl.zeros([BV, BKH], tl.float32)
    d2h = tl.zeros([BV, BKH], tl.float32)
    t1l = tl.zeros([BKH], tl.float32)
    t1h = tl.zeros([BKH], tl.float32)
    t2l = tl.zeros([BKH], tl.float32)
    t2h = tl.zeros([BKH], tl.float32)
    if not ADDITIONS and entering is not None:
        d1l, d1h, d2l, d2h = load_states(entering + segment_offset * K * V, low, low_ok, high, high_ok, values, value_ok, K, V)

    first_tile = segment * PER_SEGMENT
    end_tile = min(first_tile + PER_SEGMENT, tiles)
    for step in range(end_tile - first_tile):
        tile = end_tile - 1 - step
        if not ADDITIONS:
            store_states(
                gradients + ((row * tiles + tile) * HKV + kv_head) * 2 * K * V,
                low,
                low_ok,
                high,
                high_ok,
                values,
                value_ok,
                K,
                V,
                d1l,
                d1h,
                d2l,
                d2h,
            )
        inside = tile % PER_BLOCK * C + tl.arange(0, C)
        tokens = tile // PER_BLOCK * SIZE + inside
        token_ok = load_mask(mask, row * T, tokens, (inside < SIZE) & (tokens < taken))
        gate_t: tl.constexpr = HKV * 2 * G
        g1l = tl.sum(load_log_decay(gate_logits, tokens, token_ok, gate_t, low, low_ok, inverse_normalizer, bound), 0)
        g2l = tl.sum(load_log_decay(gate_logits + G, tokens, token_ok, gate_t, low, low_ok, inverse_normalizer, bound), 0)
        g1h = g1l
        g2h = g2l
        if not SHARED:
            g1h = tl.sum(load_log_decay(gate_logits, tokens, token_ok, gate_t, high, high_ok, inverse_normalizer, bound), 0)
            g2h = tl.sum(load_log_decay(gate_logits + G, tokens, token_ok, gate_t, high, high_ok, inverse_normalizer, bound), 0)
        d1l *= tl.exp(g1l)[None, :]
        d1h *= tl.exp(g1h)[None, :]
        d2l *= tl.exp(g2l)[None, :]
        d2h *= tl.exp(g2h)[None, :]
        if ADDITIONS:
            t1l += g1l
            t1h += g1h
            t2l += g2l
            t2h += g2h
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
                u_t = tl.trans(load_rows(u + r * V, query, query_ok, HQ * V, values, value_ok).to(DOT))
                q_low = load_rows(q + r * q_h, query, query_ok, q_t, low, low_ok).to(DOT)
                q_high = load_rows(q + r * q_h, query, query_ok, q_t, high, high_ok).to(DOT)
                mix1 = tl.load(mix + (kv_head * R + r) * 2).to(tl.float32) * scale
                mix2 = tl.load(mix + (kv_head * R + r) * 2 + 1).to(tl.float32) * scale
                read_low = tl.dot(u_t, q_low, input_precision=PRECISION)
                read_high = tl.dot(u_t, q_high, input_precision=PRECISION)
                d1l += mix1 * read_low
                d1h += mix1 * read_high
                d2l += mix2 * read_low
                d2h += mix2 * read_high

    if ADDITIONS:
        store_states(entering + segment_offset * K * V, low, low_ok, high, high_ok, values, value_ok, K, V, d1l, d1h, d2l, d2h)
        if value_tile == 0:
            store_decays(segment_decay + segment_offset * K, low, low_ok, high, high_ok, K, t1l, t1h, t2l, t2h)
    elif d_initial is not None:  # noqa: SIM102 (the first is decided at compile time)
        if segment == 0:
            offset = (row * HKV + kv_head) * 2 * K * V
            store_states(d_initial + offset, low, low_ok, high, high_ok, values, value_ok, K, V, d1l, d1h, d2l, d2h)


@triton.jit
def _gate_part(
    k_part, v_tile, dv, state, gradient, logits, write, token_ok, channels, channel_ok, values, value_ok,
    inverse_normalizer, bound, V: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one half of the channels of one state: dv with its share, the part's dk, the gradient of the write gate's product with
    k `[C]`, and of the log-decays `[C, BKH]`."""
    log_decay = tl.where(token_ok[:, None] & channel_ok[None, :], logits, 0.0)
    total = tl.sum(log_decay, 0)
    to_end = tl.exp(total[None, :] - tl.cumsum(log_decay, 0))
    before = load_rows(state, channels, channel_ok, V, values, value_ok)
    after = load_rows(gradient, channels, channel_ok, V, values, value_ok)
    kept = tl.sum(before.to(tl.float32) * after.to(tl.float32), 1) * tl.exp(total)
    after = after.to(DOT)
    d_k_to_end = tl.dot(v_tile, tl.trans(after), input_precision=PRECISION) * to_end
    k_to_end = k_part * (write[:, None] * to_end)
    dv = tl.dot(k_to_end.to(DOT), after, acc=dv, input_precision=PRECISION)
    d_write = tl.sum(d_k_to_end * k_part, 1)
    dk = d_k_to_end * write[:, None]
    product = dk * k_part
    return dv, dk, d_write, tl.cumsum(product, 0) - product + kept[None, :]


@triton.jit
def _key_kernel(
    q,
    k,
    v,
    do,
    log_denominators,
    alphas,
    deltas,
    states,
    gradients,
    gate_logits,
    write_logits,
    mask,
    row_length,
    state_length,
    dk,
    dv,
    d_gate_logits,
    d_write_logits,
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
    taken,
    boundaries,
    state_tiles,
    gradient_tiles,
    scale,
    softcap,
    inverse_normalizer,
    bound,
    HKV: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KH: tl.constexpr,
    BKH: tl.constexpr,
    BV: tl.constexpr,
    SHARED: tl.constexpr,
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
        taken = tl.load(state_length + row).to(tl.int32)
    written = (inside < SIZE) & (tokens < T)
    token_ok = (inside < SIZE) & (tokens < length)
    G: tl.constexpr = KH if SHARED else K
    HQ: tl.constexpr = HKV * R
    low = tl.arange(0, BKH)
    high = KH + low
    low_ok = low < KH
    high_ok = high < K
    values = tl.arange(0, BV)
    value_ok = values < V
    q += row * q_b + kv_head * R * q_h
    k += row * k_b + kv_head * k_h
    v += row * v_b + kv_head * v_h
    flat = row * T * HQ + kv_head * R
    kv_flat = row * T * HKV + kv_head

    k_low = load_rows(k, tokens, token_ok, k_t, low, low_ok)
    k_high = load_rows(k, tokens, token_ok, k_t, high, high_ok)
    v_tile = load_rows(v, tokens, token_ok, v_t, values, value_ok).to(DOT)
    dk_low = tl.zeros([C, BKH], tl.float32)
    dk_high = tl.zeros([C, BKH], tl.float32)
    dv_tile = tl.zeros([C, BV], tl.float32)
    last = tl.minimum(tl.minimum(first + C, tile // PER_BLOCK * SIZE + SIZE) + W - 1, length)
    for index in range(tl.maximum(tl.cdiv(last - first, BN), 0) * R):
        r = index % R
        query = first + index // R * BN + tl.arange(0, BN)
        query_ok = query < length
        q_low = load_rows(q + r * q_h, query, query_ok, q_t, low, low_ok).to(DOT)
        q_high = load_rows(q + r * q_h, query, query_ok, q_t, high, high_ok).to(DOT)
        do_tile = load_rows(do + (flat + r) * V, query, query_ok, HQ * V, values, value_ok).to(tl.float32)
        offset = flat + r + query * HQ
        log_denominator = tl.load(log_denominators + offset, mask=query_ok, other=0.0)
        alpha = tl.load(alphas + offset, mask=query_ok, other=0.0)
        delta = tl.load(deltas + offset, mask=query_ok, other=0.0)
        d_window = (do_tile * (1 - alpha)[:, None]).to(DOT)
        scores = tl.dot(k_low.to(DOT), tl.trans(q_low), input_precision=PRECISION)
        scores = tl.dot(k_high.to(DOT), tl.trans(q_high), acc=scores, input_precision=PRECISION)
        scores = softmax_scores(scores, scale, softcap)
        visible = (tokens[:, None] <= query[None, :]) & (tokens[:, None] > query[None, :] - W) & query_ok[None, :] & token_ok[:, None]
        weights = tl.where(visible, tl.exp2(scores - log_denominator[None, :] * LOG2_E), 0.0)
        d_weights = tl.dot(v_tile, tl.trans(d_window), input_precision=PRECISION)
        dv_tile = tl.dot(weights.to(DOT), d_window, acc=dv_tile, input_precision=PRECISION)
        d_scores = weights * (d_weights - delta[None, :])
        if softcap is not None:
            d_scores *= score_slope(scores, softcap)
        d_scores = d_scores.to(DOT)
        dk_low = tl.dot(d_scores, q_low, acc=dk_low, input_precision=PRECISION)
        dk_high = tl.dot(d_scores, q_high, acc=dk_high, input_precision=PRECISION)
    dk_low *= scale
    dk_high *= scale

    if gradients is not None:  # noqa: SIM102 (the first is decided at compile time)
        if tile < state_tiles:
            taken_in = load_mask(mask, row * T, tokens, token_ok & (tokens < taken))
            state = states + ((row * boundaries + tile) * HKV + kv_head) * 2 * K * V
            gradient = gradients + ((row * gradient_tiles + tile) * HKV + kv_head) * 2 * K * V
            gate_t: tl.constexpr = HKV * 2 * G
            kf_low = tl.where(taken_in[:, None], k_low.to(tl.float32), 0.0)
            kf_high = tl.where(taken_in[:, None], k_high.to(tl.float32), 0.0)
            for i in range(2):
                write = load_write_gate(write_logits, kv_flat * 2 + i, tokens, taken_in, HKV * 2)
                gates = gate_logits + kv_flat * 2 * G + i * G
                d_gates = d_gate_logits + kv_flat * 2 * G + i * G
                raw = load_rows(gates, tokens, taken_in, gate_t, low, low_ok).to(tl.float32)
                decay = load_log_decay(gates, tokens, taken_in, gate_t, low, low_ok, inverse_normalizer, bound)
                dv_tile, part, d_write, d_decay = _gate_part(
                    kf_low, v_tile, dv_tile, state + i * K * V, gradient + i * K * V, decay, write, taken_in, low, low_ok, values,
                    value_ok, inverse_normalizer, bound, V, DOT, PRECISION,
                )  # fmt: skip
                dk_low += part
                if not SHARED:
                    d_raw = tl.where(taken_in[:, None], d_decay * log_decay_slope(raw, inverse_normalizer, bound), 0.0)
                    store_rows(d_gates, tokens, written, gate_t, low, low_ok, d_raw)
                    raw = load_rows(gates, tokens, taken_in, gate_t, high, high_ok).to(tl.float32)
                    decay = load_log_decay(gates, tokens, taken_in, gate_t, high, high_ok, inverse_normalizer, bound)
                dv_tile, part, d_write_high, d_decay_high = _gate_part(
                    kf_high, v_tile, dv_tile, state + i * K * V, gradient + i * K * V, decay, write, taken_in, high, high_ok, values,
                    value_ok, inverse_normalizer, bound, V, DOT, PRECISION,
                )  # fmt: skip
                dk_high += part
                slope = log_decay_slope(raw, inverse_normalizer, bound)
                if SHARED:
                    d_raw = tl.where(taken_in[:, None], (d_decay + d_decay_high) * slope, 0.0)
                    store_rows(d_gates, tokens, written, gate_t, low, low_ok, d_raw)
                else:
                    d_raw = tl.where(taken_in[:, None], d_decay_high * slope, 0.0)
                    store_rows(d_gates, tokens, written, gate_t, high, high_ok, d_raw)
                if write_logits is not None:
                    d_logit = tl.where(taken_in, (d_write + d_write_high) * write * (1 - write), 0.0)
                    pointers = d_write_logits + kv_flat * 2 + i + tokens * HKV * 2
                    tl.store(pointers, d_logit.to(d_write_logits.dtype.element_ty), mask=written)
    store_rows(dk + kv_flat * K, tokens, written, HKV * K, low, low_ok, dk_low)
    store_rows(dk + kv_flat * K, tokens, written, HKV * K, high, high_ok, dk_high)
    store_rows(dv + kv_flat * V, tokens, written, HKV * V, values, value_ok, dv_tile)


def _state_gradients(layer: WindowLayer, q, u, mix, row_length, d_final, scale, first_state, with_initial, segment_blocks):
    """Gradient of the states at the end of every tile `[B, tiles, Hkv, 2, K, V]` and at the start of the rows (or None)."""
    inputs, heads = layer.inputs, layer.state_heads
    # One tile more than the states take in: at its start lies the last boundary that queries read.
    tiling = layer.state_tiling(segment_blocks, layer.state_tokens + 1)
    gradients = inputs.state_buffer(layer.batch, tiling.tiles, dtype=layer.state_dtype)
    d_initial = inputs.state_buffer(layer.batch) if with_initial else None

    def launch(entering, segment_decay, additions):
        _state_gradient_kernel[(layer.value_tiles, tiling.segments, layer.batch * layer.kv_heads)](
            q,
            u,
            inputs.gate_logits,
            inputs.mask,
            row_length,
            inputs.row_length,
            mix,
            entering,
            segment_decay,
            gradients,
            d_initial,
            *q.stride()[:3],
            layer.tokens,
            layer.state_tokens,
            tiling.tiles,
            tiling.segments,
            scale,
            inputs.inverse_normalizer,
            inputs.bound,
            HKV=layer.kv_heads,
            R=layer.sizes["R"],
            **heads._asdict(),
            SIZE=tiling.size,
            C=tiling.tile,
            PER_BLOCK=tiling.per_block,
            PER_SEGMENT=tiling.per_segment,
            FIRST_STATE=first_state,
            ADDITIONS=additions,
            num_warps=4 if heads.BKH * heads.BV <= 32 * 64 else 8,
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
    layer = WindowLayer(q, k, v, gate_logits, write_logits, state_mask, row_length, sink_k, window_size, gate_normalizer, lower_bound)
    inputs, sizes, heads = layer.inputs, layer.sizes, layer.state_heads
    tiles, single = layer.tiling.tiles, torch.float32
    states = layer.states(initial_state, None, segment_blocks, every_tile=True)
    first_state = 2 if initial_state is None else 0

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    u = None if states is None else torch.empty(o.shape, dtype=layer.state_dtype, device=o.device)
    alphas, deltas = torch.empty_like(log_denominators), torch.empty_like(log_denominators)
    d_norm = q.new_empty(layer.batch, tiles, *norm_weight.shape, dtype=single)
    d_scalars = q.new_empty(layer.batch, tiles, layer.heads, 4, dtype=single)
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
            layer, q, u, mix, row_length, d_final, scale, first_state, initial_state is not None, segment_blocks
        )
    d_gate_logits = torch.empty_like(gate_logits)
    d_write_logits = None if write_logits is None else torch.empty_like(write_logits)
    for x in (d_gate_logits, d_write_logits):
        if x is not None:
            x[:, layer.state_tokens :].zero_()
    _key_kernel[(tiles, layer.batch * layer.kv_heads)](
        q,
        k,
        v,
        do,
        log_denominators,
        alphas,
        deltas,
        states,
        gradients,
        gate_logits,
        write_logits,
        state_mask,
        row_length,
        inputs.row_length,
        dk,
        dv,
        d_gate_logits,
        d_write_logits,
        *strides,
        layer.tokens,
        layer.state_tokens,
        1 if states is None else states.shape[1],
        layer.state_tokens // layer.size * layer.tiling.per_block,
        1 if gradients is None else gradients.shape[1],
        scale,
        softcap,
        inputs.inverse_normalizer,
        inputs.bound,
        HKV=layer.kv_heads,
        R=sizes["R"],
        K=heads.K,
        V=heads.V,
        KH=heads.KH,
        BKH=heads.BKH,
        BV=sizes["BV"],
        SHARED=heads.SHARED,
        DOT=heads.DOT,
        PRECISION=heads.PRECISION,
        W=window_size,
        SIZE=layer.size,
        C=layer.tiling.tile,
        BN=sizes["BN"],
        PER_BLOCK=layer.tiling.per_block,
        num_warps=8 if sizes["BV"] >= 64 else 4,
        num_stages=1,
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
    *ctx.options, ctx.with_final, ctx.segment_blocks = inputs[16:]
    ctx.save_for_backward(*output[:2], *inputs[:16])


def _backward(ctx, do, _, d_final):
    o, log_denominators, *tensors = ctx.saved_tensors
    d_final = d_final.contiguous() if ctx.with_final else None
    gradients = ops.window_backward(do.contiguous(), d_final, o, log_denominators, *tensors, *ctx.options, ctx.segment_blocks)
    return *(None if x is None else d for x, d in zip(tensors[:13], gradients, strict=True)), *[None] * 11


window_forward.register_autograd(_backward, setup_context=_save)
