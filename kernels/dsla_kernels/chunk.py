"""The pure layer in Triton: both states in one pass over q, k, v and the raw gates, segments of a row side by side.

A state pass (`states.py`) gives the states on entry of each segment. Then one program a segment and value tile goes through the
segment's chunks with both states in registers: what came before the chunk, what the chunk adds for its own queries, and the
update. All exponents refer to the middle m of the chunk's cumulative log-decays b: with Q = q exp(b - m), K = k exp(m - b) and
S~ = exp(m) S the output is Q S~ + tril(Q K^T) v and the next state exp(m) (S~ + K^T v), so one decayed copy of q and of k
serves all four products and no factor passes exp(40).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .common import (
    as_bytes,
    check_kernel_inputs,
    largest_tile,
    load_log_decay,
    load_mask,
    load_rows,
    load_states,
    load_write_gate,
    make_heads,
    make_tiling,
    on_its_device,
    row_span,
    store_rows,
    store_states,
    unit_stride,
)
from .ragged import rows_from_cu_seqlens
from .states import StateInputs, entering_states, value_tile


@triton.jit
def _from_middle(log_decay):
    """exp(b - m) `[C, KH]` and exp(m) `[KH]` of a chunk's cumulative log-decays b with middle m."""
    middle = tl.sum(log_decay, 0) * 0.5
    return tl.exp(tl.cumsum(log_decay, 0) - middle[None, :]), tl.exp(middle)


@triton.jit
def _chunk_part(q_half, k_half, v_t, e, m, write, share, state, scores, output, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """All that half of the channels of one state do in a chunk for a single query head: the scores and the output with their
    share, and the state after the chunk."""
    query = (q_half.to(tl.float32) * (e * share)).to(DOT)
    key = (k_half.to(tl.float32) * (write[:, None] / e)).to(DOT)
    state *= m[None, :]
    scores = tl.dot(query, tl.trans(key), acc=scores, input_precision=PRECISION)
    output = tl.dot(query, tl.trans(state.to(DOT)), acc=output, input_precision=PRECISION)
    state = tl.dot(v_t, key, acc=state, input_precision=PRECISION) * m[None, :]
    return scores, output, state


@triton.jit
def _chunk_kernel(
    q,
    k,
    v,
    gate_logits,
    write_logits,
    mix,
    mask,
    row_first,
    row_length,
    entering,
    o,
    final,
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
):
    value_tile, segment, row_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, kv_head = row_head // HKV, row_head % HKV
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    G: tl.constexpr = KH if SHARED else K
    gate_t: tl.constexpr = HKV * 2 * G
    k += batch * k_b + first * k_t + kv_head * k_h
    v += batch * v_b + first * v_t + kv_head * v_h
    q += batch * q_b + first * q_t + kv_head * R * q_h
    o += (flat * HKV + kv_head) * R * V
    gate_logits += (flat * HKV + kv_head) * 2 * G
    write_offset = (flat * HKV + kv_head) * 2

    low = tl.arange(0, BKH)
    high = KH + low
    low_ok = low < KH
    high_ok = high < K
    values = value_tile * BV + tl.arange(0, BV)
    value_ok = values < V
    s1l = tl.zeros([BV, BKH], tl.float32)
    s1h = tl.zeros([BV, BKH], tl.float32)
    s2l = tl.zeros([BV, BKH], tl.float32)
    s2h = tl.zeros([BV, BKH], tl.float32)
    if entering is not None:
        s1l, s1h, s2l, s2h = load_states(
            entering + ((row.to(tl.int64) * segments + segment) * HKV + kv_head) * 2 * K * V,
            low,
            low_ok,
            high,
            high_ok,
            values,
            value_ok,
            K,
            V,
        )

    causal = tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]
    for tile in range(segment * PER_SEGMENT, min(segment * PER_SEGMENT + PER_SEGMENT, tl.cdiv(length, C))):
        tokens = tile * C + tl.arange(0, C)
        in_row = tokens < length
        token_ok = load_mask(mask, flat, tokens, in_row)
        k_low = load_rows(k, tokens, token_ok, k_t, low, low_ok)
        k_high = load_rows(k, tokens, token_ok, k_t, high, high_ok)
        v_tile = load_rows(v, tokens, token_ok, v_t, values, value_ok).to(DOT)
        v_t_tile = tl.trans(v_tile)
        write1 = load_write_gate(write_logits, write_offset, tokens, token_ok, HKV * 2)
        write2 = load_write_gate(write_logits, write_offset + 1, tokens, token_ok, HKV * 2)
        if R == 1:
            # One state and half after the other: few tiles are alive at a time.
            mix1 = tl.load(mix + kv_head * 2).to(tl.float32) * scale
            mix2 = tl.load(mix + kv_head * 2 + 1).to(tl.float32) * scale
            q_low = load_rows(q, tokens, token_ok, q_t, low, low_ok)
            q_high = load_rows(q, tokens, token_ok, q_t, high, high_ok)
            scores = tl.zeros([C, C], tl.float32)
            output = tl.zeros([C, BV], tl.float32)
            e, m = _from_middle(load_log_decay(gate_logits, tokens, token_ok, gate_t, low, low_ok, inverse_normalizer, bound))
            scores, output, s1l = _chunk_part(q_low, k_low, v_t_tile, e, m, write1, mix1, s1l, scores, output, DOT, PRECISION)
            if not SHARED:
                e, m = _from_middle(load_log_decay(gate_logits, tokens, token_ok, gate_t, high, high_ok, inverse_normalizer, bound))
            scores, output, s1h = _chunk_part(q_high, k_high, v_t_tile, e, m, write1, mix1, s1h, scores, output, DOT, PRECISION)
            e, m = _from_middle(load_log_decay(gate_logits + G, tokens, token_ok, gate_t, low, low_ok, inverse_normalizer, bound))
            scores, output, s2l = _chunk_part(q_low, k_low, v_t_tile, e, m, write2, mix2, s2l, scores, output, DOT, PRECISION)
            if not SHARED:
                e, m = _from_middle(load_log_decay(gate_logits + G, tokens, token_ok, gate_t, high, high_ok, inverse_normalizer, bound))
            scores, output, s2h = _chunk_part(q_high, k_high, v_t_tile, e, m, write2, mix2, s2h, scores, output, DOT, PRECISION)
            scores = tl.where(causal, scores, 0.0).to(DOT)
            output = tl.dot(scores, v_tile, acc=output, input_precision=PRECISION)
            store_rows(o, tokens, in_row, HKV * V, values, value_ok, output)
        else:
            decay1 = load_log_decay(gate_logits, tokens, token_ok, gate_t, low, low_ok, inverse_normalizer, bound)
            decay2 = load_log_decay(gate_logits + G, tokens, token_ok, gate_t, low, low_ok, inverse_normalizer, bound)
            e1l, m1l = _from_middle(decay1)
            e2l, m2l = _from_middle(decay2)
            e1h, m1h, e2h, m2h = e1l, m1l, e2l, m2l
            if not SHARED:
                decay1 = load_log_decay(gate_logits, tokens, token_ok, gate_t, high, high_ok, inverse_normalizer, bound)
                decay2 = load_log_decay(gate_logits + G, tokens, token_ok, gate_t, high, high_ok, inverse_normalizer, bound)
                e1h, m1h = _from_middle(decay1)
                e2h, m2h = _from_middle(decay2)
            k1l = (k_low.to(tl.float32) * (write1[:, None] / e1l)).to(DOT)
            k1h = (k_high.to(tl.float32) * (write1[:, None] / e1h)).to(DOT)
            k2l = (k_low.to(tl.float32) * (write2[:, None] / e2l)).to(DOT)
            k2h = (k_high.to(tl.float32) * (write2[:, None] / e2h)).to(DOT)
            s1l *= m1l[None, :]
            s1h *= m1h[None, :]
            s2l *= m2l[None, :]
            s2h *= m2h[None, :]

            for r in range(R):
                mix1 = tl.load(mix + (kv_head * R + r) * 2).to(tl.float32) * scale
                mix2 = tl.load(mix + (kv_head * R + r) * 2 + 1).to(tl.float32) * scale
                q_low = load_rows(q + r * q_h, tokens, token_ok, q_t, low, low_ok).to(tl.float32)
                q_high = load_rows(q + r * q_h, tokens, token_ok, q_t, high, high_ok).to(tl.float32)
                q1l = (q_low * (e1l * mix1)).to(DOT)
                q1h = (q_high * (e1h * mix1)).to(DOT)
                q2l = (q_low * (e2l * mix2)).to(DOT)
                q2h = (q_high * (e2h * mix2)).to(DOT)
                scores = tl.dot(q1l, tl.trans(k1l), input_precision=PRECISION)
                scores = tl.dot(q1h, tl.trans(k1h), acc=scores, input_precision=PRECISION)
                scores = tl.dot(q2l, tl.trans(k2l), acc=scores, input_precision=PRECISION)
                scores = tl.dot(q2h, tl.trans(k2h), acc=scores, input_precision=PRECISION)
                output = tl.dot(q1l, tl.trans(s1l.to(DOT)), input_precision=PRECISION)
                output = tl.dot(q1h, tl.trans(s1h.to(DOT)), acc=output, input_precision=PRECISION)
                output = tl.dot(q2l, tl.trans(s2l.to(DOT)), acc=output, input_precision=PRECISION)
                output = tl.dot(q2h, tl.trans(s2h.to(DOT)), acc=output, input_precision=PRECISION)
                scores = tl.where(causal, scores, 0.0).to(DOT)
                output = tl.dot(scores, v_tile, acc=output, input_precision=PRECISION)
                store_rows(o + r * V, tokens, in_row, HKV * R * V, values, value_ok, output)

            s1l = tl.dot(v_t_tile, k1l, acc=s1l, input_precision=PRECISION) * m1l[None, :]
            s1h = tl.dot(v_t_tile, k1h, acc=s1h, input_precision=PRECISION) * m1h[None, :]
            s2l = tl.dot(v_t_tile, k2l, acc=s2l, input_precision=PRECISION) * m2l[None, :]
            s2h = tl.dot(v_t_tile, k2h, acc=s2h, input_precision=PRECISION) * m2h[None, :]

    if final is not None:  # noqa: SIM102 (the first is decided at compile time)
        if segment == segments - 1:
            store_states(
                final + (row.to(tl.int64) * HKV + kv_head) * 2 * K * V,
                low,
                low_ok,
                high,
                high_ok,
                values,
                value_ok,
                K,
                V,
                s1l,
                s1h,
                s2l,
                s2h,
            )


class ChunkLayer:
    """Shapes and launch parameters of one call, shared by its forward and backward."""

    def __init__(
        self, q, k, v, gate_logits, write_logits, mask, row_first, row_length, longest, gate_normalizer, lower_bound, segment_blocks
    ):
        self.inputs = StateInputs(k, v, gate_logits, write_logits, mask, row_first, row_length, longest, gate_normalizer, lower_bound)
        self.heads = make_heads(q, v, gate_logits, value_tile(k, v))
        self.value_tiles = triton.cdiv(self.heads.V, self.heads.BV)
        self.programs = self.inputs.rows * self.inputs.kv_heads
        chunk = largest_tile(q, v)
        self.tiling = make_tiling(longest, chunk, self.programs * self.value_tiles, q.device, segment_blocks or None, chunk)
        self.group = q.shape[2] // k.shape[2]
        self.warps = 8 if self.heads.BKH * self.heads.BV >= 32 * 64 else 4
        self.state_dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


@torch.library.custom_op(add_op_namespace_prefix("chunk_forward"), mutates_args=())
@on_its_device
def chunk_forward(
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
    output_final_state: bool,
    segment_blocks: int,
) -> tuple[Tensor, Tensor]:
    """o `[B, T, Hq, V]` and the final state (empty if not asked for)."""
    layer = ChunkLayer(
        q, k, v, gate_logits, write_logits, mask, row_first, row_length, longest, gate_normalizer, lower_bound, segment_blocks
    )
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    final = layer.inputs.state_buffer(layer.inputs.rows) if output_final_state else None
    tiling, heads = layer.tiling, layer.heads
    _chunk_kernel[(layer.value_tiles, tiling.segments, layer.programs)](
        q,
        k,
        v,
        gate_logits,
        write_logits,
        mix,
        mask,
        row_first,
        row_length,
        entering_states(layer.inputs, tiling, heads, initial_state),
        o,
        final,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        q.shape[1],
        longest,
        tiling.tiles,
        tiling.segments,
        scale,
        1.0 / gate_normalizer,
        lower_bound,
        HKV=layer.inputs.kv_heads,
        R=layer.group,
        **heads._asdict(),
        C=tiling.tile,
        PER_SEGMENT=tiling.per_segment,
        num_warps=layer.warps,
        num_stages=2 if tiling.tile == 64 else 1,
    )
    return o, o.new_empty(0, dtype=torch.float32) if final is None else final


@chunk_forward.register_fake
def _(q, k, v, *others):
    rows = k.shape[0] if others[6] is None else others[6].shape[0]
    final = (rows, k.shape[2], 2, k.shape[3], v.shape[3]) if others[-2] else (0,)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(final, dtype=torch.float32)


def dual_state_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    segment_blocks: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Dual-state linear attention: arguments, results and mathematics of `reference.dual_state_attention`.

    q, k, v are bf16, fp32 or fp16 of any strides with a dense last dimension (anything else is copied); what else is
    floating-point may be fp32, bf16 or fp16. Differentiable in every floating-point argument.

    segment_blocks: chunks of 64 tokens that one program goes through, 0 for a choice by shape.

    Raises:
        ValueError: names the argument that does not fit, before anything is launched.
    """
    check_kernel_inputs(q, k, v, gate_logits, mix, gate_normalizer, lower_bound, padding_mask, cu_seqlens, initial_state, write_logits)
    row_first, row_length, longest = None, None, q.shape[1]
    if cu_seqlens is not None:
        longest = rows_from_cu_seqlens(cu_seqlens, q.shape[1]).valid.shape[1]
        row_first, row_length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    o, final = ops.chunk_forward(
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        gate_logits.contiguous(),
        mix.contiguous(),
        None if write_logits is None else write_logits.contiguous(),
        None if initial_state is None else initial_state.contiguous(),
        as_bytes(padding_mask),
        row_first,
        row_length,
        longest,
        gate_normalizer,
        lower_bound,
        q.shape[-1] ** -0.5 if scale is None else scale,
        output_final_state,
        segment_blocks,
    )
    return o, final if output_final_state else None


from . import chunk_backward  # noqa: E402, F401 (registers the gradients, and needs what is defined above)
