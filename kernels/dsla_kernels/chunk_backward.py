"""Gradients of the pure layer.

The states S on entry of the chunks are computed again, and from the end the gradient D of the states at the end of every chunk,
both in segments side by side. Then every chunk of a KV head runs by itself. In the notation of `chunk.py`, with D~ = exp(m) D
and dA = tril(do v^T), per state:

    dQ = do S~^T + dA K        dK = dA^T Q + v D~^T        dv = tril(Q K^T)^T do + K D~

The gradient of a token's log-decay collects what crosses the token, as in GLA (arXiv 2312.06635): Q dQ of it and of later
queries, less K dK of it and of later keys inside the chunk, the K dK towards D of the keys before it, and S~ · D~.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .chunk_forward import ChunkLayer, chunk_forward
from .common import (
    channel_columns,
    inverse,
    load_mask,
    load_rows,
    load_write_gate,
    log_decay_slope,
    on_its_device,
    padded,
    row_span,
    store_rows,
    sum_over_pairs,
)
from .decays import cumulative
from .states import load_middle, scan_segments, tile_products


@triton.jit
def _state_gradient_kernel(
    q,
    do,  # [B, T, Hq, V]
    query_factors,
    at_middle,
    row_first,
    row_length,
    mix,
    entering,  # fp32 [N, segments, Hkv, 2, K, V]: gradient at each segment's end; written by ADDITIONS; None: zeros
    segment_decay,
    gradients,  # exp(m) D `[N, tiles, Hkv, 2, K, V]`
    d_initial,  # fp32 [N, Hkv, 2, K, V] or None
    q_b,
    q_t,
    q_h,
    T,
    length,
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
    C: tl.constexpr,
    ADDITIONS: tl.constexpr,
):
    value_tile, segment, row_head = tl.program_id(0) // 2, tl.program_id(1), tl.program_id(2)
    row, kv_head = row_head // HKV, row_head % HKV
    i = tl.program_id(0) % 2
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    row = row.to(tl.int64)
    gate_t: tl.constexpr = HKV * 2 * G
    q += batch * q_b + first * q_t + kv_head * R * q_h
    do += (flat * HKV + kv_head) * R * V
    query_factors += ((flat * HKV + kv_head) * 2 + i) * G
    at_middle += ((row * tiles * HKV + kv_head) * 2 + i) * G
    channels, channel_ok, gates = channel_columns(K, G, BK)
    values = value_tile * BV + tl.arange(0, BV)
    value_ok = values < V
    segment_place = ((row * segments + segment) * HKV + kv_head) * 2 + i
    gradient = tl.zeros([BK, BV], tl.float32)
    decay = tl.full([BK], 1.0, tl.float32)
    if not ADDITIONS and entering is not None:
        gradient = load_rows(entering + segment_place * K * V, channels, channel_ok, V, values, value_ok)

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

    if ADDITIONS:
        store_rows(entering + segment_place * K * V, channels, channel_ok, V, values, value_ok, gradient)
        if value_tile == 0:
            tl.store(segment_decay + segment_place * K + channels, decay, mask=channel_ok)
    elif d_initial is not None:  # noqa: SIM102 (the first is decided at compile time)
        if segment == 0:
            place = (row * HKV + kv_head) * 2 + i
            store_rows(d_initial + place * K * V, channels, channel_ok, V, values, value_ok, gradient)


@triton.jit
def _query_kernel(
    q,
    v,
    do,
    query_factors,
    keys,
    row_first,
    row_length,
    mix,
    states,  # exp(m) S `[N, tiles, Hkv, 2, K, V]`
    dq,
    crossings,  # [B, T, Hq, 2, G]: Q dQ, summed over the channels of a gate
    d_mix,  # fp32 [N, tiles, Hq, 2]
    q_b,
    q_t,
    q_h,
    v_b,
    v_t,
    v_h,
    T,
    length,
    tiles,
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
    C: tl.constexpr,
):
    tile, row_head = tl.program_id(0) // R, tl.program_id(1)  # the heads of a group side by side
    row, kv_head = row_head // HKV, row_head % HKV
    head = kv_head * R + tl.program_id(0) % R
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    row = row.to(tl.int64)
    if tile * C >= length:
        return
    HQ: tl.constexpr = HKV * R
    tokens = tile * C + tl.arange(0, C)
    in_row = tokens < length
    channels, channel_ok, gates = channel_columns(K, G, BK)
    BG: tl.constexpr = BK if G == K else BK // 2
    gate = tl.arange(0, BG)
    values = tl.arange(0, BV)
    value_ok = values < V
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
        store_rows(crossings + ((flat * HQ + head) * 2 + i) * G, tokens, in_row, HQ * 2 * G, gate, gate < G, product * share)
    store_rows(dq + (flat * HQ + head) * K, tokens, in_row, HQ * K, channels, channel_ok, dq_tile)


@triton.jit
def _value_kernel(
    q,
    do,
    query_factors,
    keys,
    row_first,
    row_length,
    mix,
    gradients,  # exp(m) D `[N, tiles, Hkv, 2, K, V]`
    dv,
    q_b,
    q_t,
    q_h,
    T,
    length,
    tiles,
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
    C: tl.constexpr,
):
    tile, row_head = tl.program_id(0), tl.program_id(1)
    row, kv_head = row_head // HKV, row_head % HKV
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    row = row.to(tl.int64)
    if tile * C >= length:
        return
    HQ: tl.constexpr = HKV * R
    q += batch * q_b + first * q_t + kv_head * R * q_h
    do += (flat * HQ + kv_head * R) * V
    kv_flat = flat * HKV + kv_head
    gradients += ((row * tiles + tile) * HKV + kv_head) * 2 * K * V
    channels, channel_ok, gates = channel_columns(K, G, BK)
    values = tl.arange(0, BV)
    value_ok = values < V
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


@triton.jit
def _key_kernel(
    q,
    k,
    v,
    do,
    gate_logits,
    write_logits,
    mask,
    query_factors,
    keys,
    row_first,
    row_length,
    mix,
    states,  # exp(m) S `[N, tiles, Hkv, 2, K, V]`
    gradients,  # exp(m) D `[N, tiles, Hkv, 2, K, V]`
    crossings,
    dk_parts,  # [B, T, Hkv, 2, K]: by state
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
    length,
    tiles,
    scale,
    inverse_normalizer,
    bound,
    HKV: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    C: tl.constexpr,
):
    tile, i, row_head = tl.program_id(0) // 2, tl.program_id(0) % 2, tl.program_id(1)  # one state: both need too many registers
    row, kv_head = row_head // HKV, row_head % HKV
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    row = row.to(tl.int64)
    if tile * C >= length:
        return
    HQ: tl.constexpr = HKV * R
    gate_t: tl.constexpr = HKV * 2 * G
    EXACT: tl.constexpr = tl.float32 == DOT
    q += batch * q_b + first * q_t + kv_head * R * q_h
    do += (flat * HQ + kv_head * R) * V
    crossings += (flat * HQ + kv_head * R) * 2 * G
    kv_flat = flat * HKV + kv_head
    states += ((row * tiles + tile) * HKV + kv_head) * 2 * K * V
    gradients += ((row * tiles + tile) * HKV + kv_head) * 2 * K * V
    channels, channel_ok, gates = channel_columns(K, G, BK)
    BG: tl.constexpr = BK if G == K else BK // 2
    gate = tl.arange(0, BG)
    gate_ok = gate < G
    values = tl.arange(0, BV)
    value_ok = values < V
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
    logits = load_rows(gate_logits + (kv_flat * 2 + i) * G, tokens, token_ok, gate_t, gate, gate_ok).to(tl.float32)
    d_logits = tl.where(token_ok[:, None], d_decay * log_decay_slope(logits, inverse_normalizer, bound), 0.0)
    store_rows(d_gate_logits + (kv_flat * 2 + i) * G, tokens, in_row, gate_t, gate, gate_ok, d_logits)
    # Loaded again rather than held.
    factors = load_rows(factors_at, tokens, in_row, gate_t, gates, channel_ok).to(tl.float32)
    d_written = tl.where(token_ok[:, None] & channel_ok[None, :], (dk_scaled + dk_after) * inverse(factors, EXACT), 0.0)
    if write_logits is None:
        d_key = d_written
    else:
        write = load_write_gate(write_logits, kv_flat * 2 + i, tokens, token_ok, HKV * 2)
        d_key = d_written * write[:, None]
        k_tile = load_rows(k + batch * k_b + first * k_t + kv_head * k_h, tokens, token_ok, k_t, channels, channel_ok)
        d_write = tl.sum(d_written * k_tile.to(tl.float32), 1) * write * (1 - write)
        pointers = d_write_logits + kv_flat * 2 + i + tokens * HKV * 2
        tl.store(pointers, d_write.to(d_write_logits.dtype.element_ty), mask=in_row)
    store_rows(dk_parts + (kv_flat * 2 + i) * K, tokens, in_row, HKV * 2 * K, channels, channel_ok, d_key)


def _state_gradients(layer: ChunkLayer, decayed, q, do, mix, d_final, scale, with_initial):
    """exp(m) times the gradient of the states at the end of every chunk `[N, tiles, Hkv, 2, K, V]`, and the gradient at the start
    of the rows (or None)."""
    inputs, heads, tiling = layer.inputs, layer.state_heads, layer.tiling
    gradients = inputs.state_buffer(inputs.rows, tiling.tiles, dtype=inputs.dtype)
    d_initial = inputs.state_buffer(inputs.rows) if with_initial else None

    def launch(entering, segment_decay, additions):
        _state_gradient_kernel[(2 * triton.cdiv(heads.V, heads.BV), tiling.segments, layer.programs)](
            q,
            do,
            decayed.query_factors,
            decayed.at_middle,
            inputs.row_first,
            inputs.row_length,
            mix,
            entering,
            segment_decay,
            gradients,
            d_initial,
            *q.stride()[:3],
            q.shape[1],
            inputs.length,
            tiling.tiles,
            tiling.segments,
            tiling.per_segment,
            scale,
            HKV=inputs.kv_heads,
            R=layer.group,
            **heads._asdict(),
            C=tiling.tile,
            ADDITIONS=additions,
            num_warps=8,
            num_stages=3,
        )

    if tiling.segments == 1:
        entering = None if d_final is None else d_final.float()[:, None].contiguous()
    else:
        entering = inputs.state_buffer(inputs.rows, tiling.segments)
        segment_decay = entering.new_empty(entering.shape[:-1])
        launch(entering, segment_decay, True)
        scan_segments(entering, segment_decay, d_final, None, reverse=True)
    launch(entering, None, False)
    return gradients, d_initial


@torch.library.custom_op(add_op_namespace_prefix("chunk_backward"), mutates_args=())
@on_its_device
def _chunk_backward(
    do: Tensor,
    d_final: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    write_logits: Tensor | None,
    initial_state: Tensor | None,
    mask: Tensor | None,
    row_first: Tensor | None,
    row_length: Tensor | None,
    longest: int,
    gate_normalizer: float,
    lower_bound: float,
    scale: float,
    segment_blocks: int,
) -> list[Tensor]:
    """Gradients of q, k, v, gate_logits, mix, write_logits, initial_state; an empty tensor for an argument that is None."""
    layer = ChunkLayer(
        q, k, v, gate_logits, write_logits, mask, row_first, row_length, longest, gate_normalizer, lower_bound, segment_blocks
    )
    inputs, tiling = layer.inputs, layer.tiling
    decayed = inputs.decayed(tiling)
    states = layer.states(decayed, initial_state)
    gradients, d_initial = _state_gradients(layer, decayed, q, do, mix, d_final, scale, initial_state is not None)
    dq, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, v))
    d_gate_logits = torch.empty_like(gate_logits)
    d_write_logits = None if write_logits is None else torch.empty_like(write_logits)
    d_mix = q.new_zeros(inputs.rows, tiling.tiles, q.shape[2], 2, dtype=torch.float32)
    sizes = layer.heads._asdict() | {"BV": padded(layer.heads.V)}
    crossings = q.new_empty(*q.shape[:3], 2, gate_logits.shape[-1], dtype=inputs.dtype)
    strides = (*k.stride()[:3], *v.stride()[:3])
    _query_kernel[(tiling.tiles * layer.group, layer.programs)](
        q,
        v,
        do,
        decayed.query_factors,
        decayed.keys,
        row_first,
        row_length,
        mix,
        states,
        dq,
        crossings,
        d_mix,
        *q.stride()[:3],
        *v.stride()[:3],
        q.shape[1],
        longest,
        tiling.tiles,
        scale,
        HKV=inputs.kv_heads,
        R=layer.group,
        **sizes,
        C=tiling.tile,
        num_warps=4,
        num_stages=1,
    )
    _value_kernel[(tiling.tiles, layer.programs)](
        q,
        do,
        decayed.query_factors,
        decayed.keys,
        row_first,
        row_length,
        mix,
        gradients,
        dv,
        *q.stride()[:3],
        q.shape[1],
        longest,
        tiling.tiles,
        scale,
        HKV=inputs.kv_heads,
        R=layer.group,
        **sizes,
        C=tiling.tile,
        num_warps=4,
        num_stages=1,
    )
    dk_parts = k.new_empty(*k.shape[:3], 2, k.shape[3])
    _key_kernel[(2 * tiling.tiles, layer.programs)](
        q,
        k,
        v,
        do,
        gate_logits,
        write_logits,
        mask,
        decayed.query_factors,
        decayed.keys,
        row_first,
        row_length,
        mix,
        states,
        gradients,
        crossings,
        dk_parts,
        d_gate_logits,
        d_write_logits,
        *q.stride()[:3],
        *strides,
        q.shape[1],
        longest,
        tiling.tiles,
        scale,
        1.0 / gate_normalizer,
        lower_bound,
        HKV=inputs.kv_heads,
        R=layer.group,
        **sizes,
        C=tiling.tile,
        num_warps=8 if sizes["G"] == sizes["K"] else 4,
        num_stages=1,
    )
    pairs = (
        (dq, q),
        (dk_parts.sum(3), k),
        (dv, v),
        (d_gate_logits, gate_logits),
        (d_mix.sum((0, 1)), mix),
        (d_write_logits, write_logits),
        (d_initial, initial_state),
    )
    return [q.new_empty(0) if x is None or d is None else d.to(x.dtype) for d, x in pairs]


@_chunk_backward.register_fake
def _(do, d_final, *inputs):
    return [do.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in inputs[:7]]


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:10])
    *ctx.options, ctx.with_final, ctx.segment_blocks = inputs[10:]


def _backward(ctx, do, d_final):
    tensors = ctx.saved_tensors
    gradients = ops.chunk_backward(
        do.contiguous(), d_final.contiguous() if ctx.with_final else None, *tensors, *ctx.options, ctx.segment_blocks
    )
    return *(None if x is None else d for x, d in zip(tensors[:7], gradients, strict=True)), *[None] * 9


chunk_forward.register_autograd(_backward, setup_context=_save)
