"""Gradients of the pure layer.

The states S at chunk boundaries are computed again, and from the end the gradient D of the states at the end of every chunk,
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
from .chunk import ChunkLayer, chunk_forward
from .common import (
    load_log_decay,
    load_mask,
    load_rows,
    load_states,
    load_write_gate,
    log_decay_slope,
    on_its_device,
    row_span,
    store_decays,
    store_rows,
    store_states,
)
from .states import entering_states, scan_segments


@triton.jit
def _state_gradient_kernel(
    q,
    do,  # [B, T, Hq, V]
    gate_logits,
    mask,
    row_first,
    row_length,
    mix,
    entering,  # fp32 [N, segments, Hkv, 2, K, V]: gradient at each segment's end; written by ADDITIONS; None: zeros
    segment_decay,
    gradients,  # [N, tiles, Hkv, 2, K, V]: at the end of each chunk
    d_initial,  # fp32 [N, Hkv, 2, K, V] or None
    q_b,
    q_t,
    q_h,
    T,
    length,
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
    C: tl.constexpr,
    PER_SEGMENT: tl.constexpr,
    ADDITIONS: tl.constexpr,
):
    value_tile, segment, row_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, kv_head = row_head // HKV, row_head % HKV
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    row = row.to(tl.int64)
    G: tl.constexpr = KH if SHARED else K
    HQ: tl.constexpr = HKV * R
    gate_t: tl.constexpr = HKV * 2 * G
    q += batch * q_b + first * q_t + kv_head * R * q_h
    do += (flat * HQ + kv_head * R) * V
    gate_logits += (flat * HKV + kv_head) * 2 * G
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
        base = entering + segment_offset * K * V
        d1l, d1h, d2l, d2h = load_states(base, low, low_ok, high, high_ok, values, value_ok, K, V)

    tile_first = segment * PER_SEGMENT
    tile_end = min(tile_first + PER_SEGMENT, tl.cdiv(length, C))
    for step in range(tl.maximum(tile_end - tile_first, 0)):
        tile = tile_end - 1 - step
        if not ADDITIONS:
            place = gradients + ((row * tiles + tile) * HKV + kv_head) * 2 * K * V
            store_states(place, low, low_ok, high, high_ok, values, value_ok, K, V, d1l, d1h, d2l, d2h)
        tokens = tile * C + tl.arange(0, C)
        token_ok = load_mask(mask, flat, tokens, tokens < length)
        g1l = load_log_decay(gate_logits, tokens, token_ok, gate_t, low, low_ok, inverse_normalizer, bound)
        g2l = load_log_decay(gate_logits + G, tokens, token_ok, gate_t, low, low_ok, inverse_normalizer, bound)
        f1l = tl.exp(tl.cumsum(g1l, 0))
        f2l = tl.exp(tl.cumsum(g2l, 0))
        s1l = tl.sum(g1l, 0)
        s2l = tl.sum(g2l, 0)
        f1h, f2h, s1h, s2h = f1l, f2l, s1l, s2l
        if not SHARED:
            g1h = load_log_decay(gate_logits, tokens, token_ok, gate_t, high, high_ok, inverse_normalizer, bound)
            g2h = load_log_decay(gate_logits + G, tokens, token_ok, gate_t, high, high_ok, inverse_normalizer, bound)
            f1h = tl.exp(tl.cumsum(g1h, 0))
            f2h = tl.exp(tl.cumsum(g2h, 0))
            s1h = tl.sum(g1h, 0)
            s2h = tl.sum(g2h, 0)
        d1l *= tl.exp(s1l)[None, :]
        d1h *= tl.exp(s1h)[None, :]
        d2l *= tl.exp(s2l)[None, :]
        d2h *= tl.exp(s2h)[None, :]
        for r in range(R):
            mix1 = tl.load(mix + (kv_head * R + r) * 2).to(tl.float32) * scale
            mix2 = tl.load(mix + (kv_head * R + r) * 2 + 1).to(tl.float32) * scale
            q_low = load_rows(q + r * q_h, tokens, token_ok, q_t, low, low_ok).to(tl.float32)
            q_high = load_rows(q + r * q_h, tokens, token_ok, q_t, high, high_ok).to(tl.float32)
            do_t = tl.trans(load_rows(do + r * V, tokens, token_ok, HQ * V, values, value_ok).to(DOT))
            d1l = tl.dot(do_t, (q_low * (f1l * mix1)).to(DOT), acc=d1l, input_precision=PRECISION)
            d1h = tl.dot(do_t, (q_high * (f1h * mix1)).to(DOT), acc=d1h, input_precision=PRECISION)
            d2l = tl.dot(do_t, (q_low * (f2l * mix2)).to(DOT), acc=d2l, input_precision=PRECISION)
            d2h = tl.dot(do_t, (q_high * (f2h * mix2)).to(DOT), acc=d2h, input_precision=PRECISION)
        if ADDITIONS:
            t1l += s1l
            t1h += s1h
            t2l += s2l
            t2h += s2h

    if ADDITIONS:
        base = entering + segment_offset * K * V
        store_states(base, low, low_ok, high, high_ok, values, value_ok, K, V, d1l, d1h, d2l, d2h)
        if value_tile == 0:
            store_decays(segment_decay + segment_offset * K, low, low_ok, high, high_ok, K, t1l, t1h, t2l, t2h)
    elif d_initial is not None:  # noqa: SIM102 (the first is decided at compile time)
        if segment == 0:
            base = d_initial + (row * HKV + kv_head) * 2 * K * V
            store_states(base, low, low_ok, high, high_ok, values, value_ok, K, V, d1l, d1h, d2l, d2h)


@triton.jit
def _store_sum(base, rows, row_ok, stride, columns, column_ok, x, add):
    """Writes the tile x, or adds it to what is there."""
    x += load_rows(base, rows, row_ok & add, stride, columns, column_ok).to(tl.float32)
    store_rows(base, rows, row_ok, stride, columns, column_ok, x)


@triton.jit
def _finish_half(
    k_half, k_scaled, dk_inside, crossing, v_tile, dv, state, gradient, from_middle, at_middle, write, channels, channel_ok, values,
    value_ok, V: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one half of one state: dv with its share, dk, gradient of the share that is written `[C]`, of the log-decays `[C, KH]`.

    `crossing` holds Q dQ, `dk_inside` the part dA^T Q of dK.
    """
    before = load_rows(state, channels, channel_ok, V, values, value_ok).to(tl.float32) * at_middle[:, None]
    after = load_rows(gradient, channels, channel_ok, V, values, value_ok).to(tl.float32) * at_middle[:, None]
    kept = tl.sum(before * after, 1)
    after = after.to(DOT)
    dk_after = tl.dot(v_tile, tl.trans(after), input_precision=PRECISION)
    dv = tl.dot(k_scaled.to(DOT), after, acc=dv, input_precision=PRECISION)
    inside = crossing - k_scaled * dk_inside
    passing = k_scaled * dk_after
    d_decay = kept[None, :] + (tl.cumsum(passing, 0) - passing) + (tl.sum(inside, 0)[None, :] - tl.cumsum(inside, 0) + inside)
    d_scaled = (dk_inside + dk_after) / from_middle
    return dv, d_scaled * write[:, None], tl.sum(d_scaled * k_half, 1), d_decay


@triton.jit
def _store_write_gradient(d_write_logits, write_logits, offset, tokens, in_row, token_ok, stride, d_write):
    write = load_write_gate(write_logits, offset, tokens, token_ok, stride)
    d_logits = (d_write * write * (1 - write)).to(d_write_logits.dtype.element_ty)
    tl.store(d_write_logits + offset + tokens * stride, d_logits, mask=in_row)


@triton.jit
def _chunk_gradient_kernel(
    q,
    k,
    v,
    do,
    gate_logits,
    write_logits,
    mask,
    row_first,
    row_length,
    mix,
    states,  # [N, tiles + 1, Hkv, 2, K, V]
    gradients,  # [N, tiles, Hkv, 2, K, V]
    dq,
    dk,
    dv,
    d_gate_logits,
    d_write_logits,
    d_mix,  # fp32 [N, tiles, Hq, 2, 2]: of both states, from both halves
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
    KH: tl.constexpr,
    BKH: tl.constexpr,
    BV: tl.constexpr,
    SHARED: tl.constexpr,
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
    G: tl.constexpr = KH if SHARED else K
    HQ: tl.constexpr = HKV * R
    gate_t: tl.constexpr = HKV * 2 * G
    q += batch * q_b + first * q_t + kv_head * R * q_h
    k += batch * k_b + first * k_t + kv_head * k_h
    v += batch * v_b + first * v_t + kv_head * v_h
    do += (flat * HQ + kv_head * R) * V
    dq += (flat * HQ + kv_head * R) * K
    kv_flat = flat * HKV + kv_head
    states += ((row * (tiles + 1) + tile) * HKV + kv_head) * 2 * K * V
    gradients += ((row * tiles + tile) * HKV + kv_head) * 2 * K * V
    d_mix += ((row * tiles + tile) * HQ + kv_head * R) * 4

    values = tl.arange(0, BV)
    value_ok = values < V
    tokens = tile * C + tl.arange(0, C)
    in_row = tokens < length
    token_ok = load_mask(mask, flat, tokens, in_row)
    causal = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    v_tile = load_rows(v, tokens, token_ok, v_t, values, value_ok).to(DOT)
    dv_tile = tl.zeros([C, BV], tl.float32)
    d_write1 = tl.zeros([C], tl.float32)
    d_write2 = tl.zeros([C], tl.float32)

    # All products are sums over the two states and the two halves of the channels: one after the other, in loops that are not
    # unrolled, so that registers hold one of the four at a time. The product of do and v is made again for each.
    for half in range(2):
        channels = half * KH + tl.arange(0, BKH)
        channel_ok = (tl.arange(0, BKH) < KH) & (channels < K)
        gate_channels = tl.arange(0, BKH) if SHARED else channels
        k_half = load_rows(k, tokens, token_ok, k_t, channels, channel_ok).to(tl.float32)
        dk_half = tl.zeros([C, BKH], tl.float32)
        for i in range(2):
            gates = gate_logits + kv_flat * 2 * G + i * G
            write = load_write_gate(write_logits, kv_flat * 2 + i, tokens, token_ok, HKV * 2)
            decay = load_log_decay(gates, tokens, token_ok, gate_t, gate_channels, channel_ok, inverse_normalizer, bound)
            middle = tl.sum(decay, 0) * 0.5
            from_middle = tl.exp(tl.cumsum(decay, 0) - middle[None, :])
            at_middle = tl.exp(middle)
            k_scaled = k_half * (write[:, None] / from_middle)
            key = k_scaled.to(DOT)
            state = states + i * K * V
            state_tile = (load_rows(state, channels, channel_ok, V, values, value_ok).to(tl.float32) * at_middle[:, None]).to(DOT)
            dk_inside = tl.zeros([C, BKH], tl.float32)
            crossing = tl.zeros([C, BKH], tl.float32)
            for r in range(R):
                share = tl.load(mix + (kv_head * R + r) * 2 + i).to(tl.float32)
                q_half = load_rows(q + r * q_h, tokens, token_ok, q_t, channels, channel_ok).to(tl.float32) * (from_middle * scale)
                query = (q_half * share).to(DOT)
                do_tile = load_rows(do + r * V, tokens, token_ok, HQ * V, values, value_ok).to(DOT)
                scores = tl.where(causal, tl.dot(query, tl.trans(key), input_precision=PRECISION), 0.0).to(DOT)
                dv_tile = tl.dot(tl.trans(scores), do_tile, acc=dv_tile, input_precision=PRECISION)
                d_scores = tl.where(causal, tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION), 0.0).to(DOT)
                d_query = tl.dot(do_tile, tl.trans(state_tile), input_precision=PRECISION)
                d_query = tl.dot(d_scores, key, acc=d_query, input_precision=PRECISION)
                dk_inside = tl.dot(tl.trans(d_scores), query, acc=dk_inside, input_precision=PRECISION)
                product = q_half * d_query
                crossing += product * share
                tl.store(d_mix + (r * 2 + i) * 2 + half, tl.sum(tl.sum(product, 1), 0))
                d_query *= from_middle * (share * scale)
                _store_sum(dq + r * K, tokens, in_row, HQ * K, channels, channel_ok, d_query, i == 1)
            dv_tile, part, d_write, d_decay = _finish_half(
                k_half, k_scaled, dk_inside, crossing, v_tile, dv_tile, state, gradients + i * K * V, from_middle, at_middle, write,
                channels, channel_ok, values, value_ok, V, DOT, PRECISION,
            )  # fmt: skip
            dk_half += part
            d_write1 += tl.where(i == 0, d_write, 0.0)
            d_write2 += tl.where(i == 1, d_write, 0.0)
            logits = load_rows(gates, tokens, token_ok, gate_t, gate_channels, channel_ok).to(tl.float32)
            d_logits = tl.where(token_ok[:, None], d_decay * log_decay_slope(logits, inverse_normalizer, bound), 0.0)
            d_gates = d_gate_logits + kv_flat * 2 * G + i * G
            _store_sum(d_gates, tokens, in_row, gate_t, gate_channels, channel_ok, d_logits, SHARED & (half == 1))
            tl.debug_barrier()  # dq and the gates' gradients are read again
        store_rows(dk + kv_flat * K, tokens, in_row, HKV * K, channels, channel_ok, dk_half)
    store_rows(dv + kv_flat * V, tokens, in_row, HKV * V, values, value_ok, dv_tile)
    if write_logits is not None:
        _store_write_gradient(d_write_logits, write_logits, kv_flat * 2, tokens, in_row, token_ok, HKV * 2, d_write1)
        _store_write_gradient(d_write_logits, write_logits, kv_flat * 2 + 1, tokens, in_row, token_ok, HKV * 2, d_write2)


def _state_gradients(layer: ChunkLayer, q, do, mix, d_final, scale, with_initial):
    """Gradient of the states at the end of every chunk `[N, tiles, Hkv, 2, K, V]` and at the start of the rows (or None)."""
    inputs, heads, tiling = layer.inputs, layer.heads, layer.tiling
    gradients = inputs.state_buffer(inputs.rows, tiling.tiles, dtype=layer.state_dtype)
    d_initial = inputs.state_buffer(inputs.rows) if with_initial else None

    def launch(entering, segment_decay, additions):
        _state_gradient_kernel[(layer.value_tiles, tiling.segments, layer.programs)](
            q,
            do,
            inputs.gate_logits,
            inputs.mask,
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
            scale,
            inputs.inverse_normalizer,
            inputs.bound,
            HKV=inputs.kv_heads,
            R=layer.group,
            **heads._asdict(),
            C=tiling.tile,
            PER_SEGMENT=tiling.per_segment,
            ADDITIONS=additions,
            num_warps=layer.warps,
            num_stages=2 if tiling.tile == 64 else 1,
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
    inputs, heads, tiling = layer.inputs, layer.heads, layer.tiling
    states = inputs.state_buffer(inputs.rows, tiling.tiles + 1, dtype=layer.state_dtype)
    inputs.launch(tiling, heads, entering_states(inputs, tiling, heads, initial_state), states=states)
    gradients, d_initial = _state_gradients(layer, q, do, mix, d_final, scale, initial_state is not None)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_gate_logits = torch.empty_like(gate_logits)
    d_write_logits = None if write_logits is None else torch.empty_like(write_logits)
    d_mix = q.new_zeros(inputs.rows, tiling.tiles, q.shape[2], 2, 2, dtype=torch.float32)
    sizes = heads._asdict() | {"BV": max(16, triton.next_power_of_2(heads.V))}
    _chunk_gradient_kernel[(tiling.tiles, layer.programs)](
        q,
        k,
        v,
        do,
        gate_logits,
        write_logits,
        mask,
        row_first,
        row_length,
        mix,
        states,
        gradients,
        dq,
        dk,
        dv,
        d_gate_logits,
        d_write_logits,
        d_mix,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        q.shape[1],
        longest,
        tiling.tiles,
        scale,
        inputs.inverse_normalizer,
        inputs.bound,
        HKV=inputs.kv_heads,
        R=layer.group,
        **sizes,
        C=tiling.tile,
        num_warps=8 if sizes["BV"] >= 64 else 4,
        num_stages=1,
    )
    pairs = (
        (dq, q),
        (dk, k),
        (dv, v),
        (d_gate_logits, gate_logits),
        (d_mix.sum((0, 1, 4)), mix),
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
