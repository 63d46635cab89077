"""One token in one kernel: gates, states, window, norm and the gate between them, in place and at fixed addresses.

One program a row and KV head. Nothing is read back by the host and no buffer moves, so a step can be captured in a CUDA graph.
With a window the states are only read, but for the one step in W / 2 that fills a block: that step takes the block before the
last one from the ring into the states.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._ops import add_op_namespace_prefix, ops
from .common import LARGEST_HEAD, TILE, bounded_log_decay, dot_type, load_rows, on_its_device
from .window import LN_2, LOG2_E, check_softcap, softmax_scores, softmax_step, state_gate


class GateWeights(NamedTuple):
    """The map from a value vector, RMS-normalised, to the gates of its KV head.

    down `[Hkv, V, rank]`, up `[Hkv, rank, 2 G]`, bias `[Hkv, 2, G]`; write_weight `[Hkv, V, 2]` and write_bias `[Hkv, 2]`, or
    None without a write gate. Logits are `normalised v @ down @ up + bias`, `normalised v @ write_weight + write_bias`.
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    write_weight: Tensor | None = None
    write_bias: Tensor | None = None


@triton.jit
def _hidden(v_tile, down, head, values, value_ok, rank, norm_eps, V: tl.constexpr, RANK: tl.constexpr):
    """Normalised values `[C, BV]` and what the gates' first map makes of them `[C, BR]`, fp32."""
    normalised = v_tile * tl.rsqrt(tl.sum(v_tile * v_tile, 1) / V + norm_eps)[:, None]
    weight = load_rows(down + head * V * RANK, values, value_ok, RANK, rank, rank < RANK).to(tl.float32)
    return normalised, tl.dot(normalised, weight, input_precision="ieee")


@triton.jit
def _write_gate(normalised, write_weight, write_bias, head, values, value_ok, state, V: tl.constexpr):
    """Share of each token that a state takes in, `[C]`."""
    if write_weight is None:
        return tl.full([normalised.shape[0]], 1.0, tl.float32)
    else:
        weight = tl.load(write_weight + (head * V + values) * 2 + state, mask=value_ok, other=0.0).to(tl.float32)
        bias = tl.load(write_bias + head * 2 + state).to(tl.float32)
        return tl.sigmoid(tl.sum(normalised * weight[None, :], 1) + bias)


@triton.jit
def _log_decay(hidden, up, bias, head, rank, gate, gate_ok, inverse_normalizer, bound, state, G: tl.constexpr, RANK: tl.constexpr):
    """Log-decays `[C, channels]` of the channels whose gates are numbered `gate`."""
    weight = load_rows(up + head * RANK * 2 * G + state * G, rank, rank < RANK, 2 * G, gate, gate_ok).to(tl.float32)
    shift = tl.load(bias + (head * 2 + state) * G + gate, mask=gate_ok, other=0.0).to(tl.float32)
    return bounded_log_decay(tl.dot(hidden, weight, input_precision="ieee") + shift[None, :], inverse_normalizer, bound)


@triton.jit
def _window_decode_kernel(
    q,
    k,
    v,
    recurrent,  # fp32 [B, Hkv, 2, K, V]
    window_k,  # [B, S + W, Hkv, K]
    window_v,
    lengths,  # int64 [B]
    real,  # uint8 [B] or None
    down,
    up,
    bias,
    write_weight,
    write_bias,
    mix,
    norm_weight,
    state_gain,
    state_bias,
    sink_logits,  # [Hq] or None
    o,
    scale,
    softcap,  # or None
    norm_eps,
    inverse_normalizer,
    bound,
    HKV: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KC: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
    BN: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    row, head = (tl.program_id(0) // HKV).to(tl.int64), tl.program_id(0) % HKV
    length = tl.load(lengths + row).to(tl.int32)
    is_real = True
    if real is not None:
        is_real = tl.load(real + row) != 0
    group = tl.arange(0, BM)
    group_ok = group < R
    columns = tl.arange(0, BK)
    column_ok = columns < K
    values = tl.arange(0, BV)
    value_ok = values < V
    q += (row * HKV + head) * R * K
    recurrent += (row * HKV + head) * 2 * K * V
    window_k += (row * (S + W) * HKV + head) * K
    window_v += (row * (S + W) * HKV + head) * V

    q_tile = load_rows(q, group, group_ok, K, columns, column_ok).to(DOT)
    k_new = tl.load(k + (row * HKV + head) * K + columns, mask=column_ok, other=0.0)
    v_new = tl.load(v + (row * HKV + head) * V + values, mask=value_ok, other=0.0)

    # The new token first, from registers: what its slot in the ring still holds has left the window.
    top = tl.sum(q_tile.to(tl.float32) * k_new.to(tl.float32)[None, :], 1)
    top = softmax_scores(top, scale, softcap)
    denominator = tl.full([BM], 1.0, tl.float32)
    o_window = tl.zeros([BM, BV], tl.float32) + v_new.to(tl.float32)[None, :]
    if sink_logits is not None:
        logit = tl.load(sink_logits + head * R + group, mask=group_ok, other=0.0).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, logit)
        weight_new = tl.exp2(top - new_top)
        denominator = weight_new + tl.exp2(logit - new_top)
        o_window *= weight_new[:, None]
        top = new_top
    for slot_first in range(0, tl.minimum(W, length), BN):  # slots fill from the first
        slot = slot_first + tl.arange(0, BN)
        token = length - (length - slot + W) % W
        visible = (slot < W) & (token >= 0) & (token < length)
        k_tile = load_rows(window_k + S * HKV * K, slot, visible, HKV * K, columns, column_ok).to(DOT)
        v_tile = load_rows(window_v + S * HKV * V, slot, visible, HKV * V, values, value_ok).to(DOT)
        scores = softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, softcap)
        top, denominator, o_window = softmax_step(scores, visible[None, :], v_tile, top, denominator, o_window, DOT, PRECISION)
    if S > 0:  # noqa: SIM102 (the first is decided at compile time)
        if length >= W:
            sink = tl.arange(0, BS)
            visible = (sink < S) & (sink <= length - W)
            k_tile = load_rows(window_k, sink, visible, HKV * K, columns, column_ok).to(DOT)
            v_tile = load_rows(window_v, sink, visible, HKV * V, values, value_ok).to(DOT)
            scores = softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, softcap)
            top, denominator, o_window = softmax_step(scores, visible[None, :], v_tile, top, denominator, o_window, DOT, PRECISION)
    o_window /= denominator[:, None]
    log_denominator = (top + tl.log2(denominator)) * LN_2

    heads = head * R + group
    mix1 = tl.load(mix + heads * 2, mask=group_ok, other=0.0).to(tl.float32)[:, None] * scale
    mix2 = tl.load(mix + heads * 2 + 1, mask=group_ok, other=0.0).to(tl.float32)[:, None] * scale
    o_state = tl.zeros([BM, BV], tl.float32)
    if length >= SIZE + SIZE:  # a state holds a block once another whole one has followed it
        for start in range(0, K, KC):
            part = start + tl.arange(0, KC)
            q_part = load_rows(q, group, group_ok, K, part, part < K).to(tl.float32)
            state1 = load_rows(recurrent, part, part < K, V, values, value_ok)
            state2 = load_rows(recurrent + K * V, part, part < K, V, values, value_ok)
            o_state = tl.dot(q_part * mix1, state1, acc=o_state, input_precision=STATE_PRECISION)
            o_state = tl.dot(q_part * mix2, state2, acc=o_state, input_precision=STATE_PRECISION)
    gain = tl.load(state_gain + heads, mask=group_ok, other=0.0).to(tl.float32)
    offset = tl.load(state_bias + heads, mask=group_ok, other=0.0).to(tl.float32)
    rms, log_rms, alpha = state_gate(o_state, log_denominator, gain, offset, norm_eps, V)
    weight = load_rows(norm_weight, heads, group_ok, V, values, value_ok).to(tl.float32)
    result = o_window + alpha[:, None] * (o_state * weight / rms[:, None] - o_window)
    store_ok = group_ok[:, None] & value_ok[None, :]
    result = tl.where(is_real, result, 0.0)
    tl.store(o + (row * HKV * R + heads)[:, None] * V + values[None, :], result.to(o.dtype.element_ty), mask=store_ok)

    if is_real:
        slot = (S + length % W) * HKV
        tl.store(window_k + slot * K + columns, k_new, mask=column_ok)
        tl.store(window_v + slot * V + values, v_new, mask=value_ok)
        if length < S:
            tl.store(window_k + length * HKV * K + columns, k_new, mask=column_ok)
            tl.store(window_v + length * HKV * V + values, v_new, mask=value_ok)
        length += 1
        if (length % SIZE == 0) & (length >= W):
            # The older half of the ring: tokens length - W to length - W + SIZE - 1, none of them written above.
            tl.debug_barrier()  # every thread has read the states
            rank = tl.arange(0, BR)
            for tile in range(PER_BLOCK):
                inside = tile * C + tl.arange(0, C)
                token = length - W + inside
                taken = (inside < SIZE) & (token >= S)
                slots = S + token % W
                v_tile = load_rows(window_v, slots, taken, HKV * V, values, value_ok)
                normalised, hidden = _hidden(v_tile.to(tl.float32), down, head, values, value_ok, rank, norm_eps, V, RANK)
                for state in range(2):
                    write = tl.where(taken, _write_gate(normalised, write_weight, write_bias, head, values, value_ok, state, V), 0.0)
                    for start in range(0, K, KC):
                        part = start + tl.arange(0, KC)
                        part_ok = part < K
                        log_decay = _log_decay(
                            hidden, up, bias, head, rank, part % G, part_ok, inverse_normalizer, bound, state, G, RANK
                        )  # fmt: skip
                        log_decay = tl.where(taken[:, None], log_decay, 0.0)
                        total = tl.sum(log_decay, 0)
                        k_part = load_rows(window_k, slots, taken, HKV * K, part, part_ok).to(tl.float32)
                        to_end = k_part * (write[:, None] * tl.exp(total[None, :] - tl.cumsum(log_decay, 0)))
                        pointers = recurrent + state * K * V + part[:, None] * V + values[None, :]
                        mask = part_ok[:, None] & value_ok[None, :]
                        old = tl.load(pointers, mask=mask, other=0.0) * tl.exp(total)[:, None]
                        new = tl.dot(tl.trans(to_end).to(DOT), v_tile.to(DOT), acc=old, input_precision=PRECISION)
                        tl.store(pointers, new, mask=mask)
                if PER_BLOCK > 1:
                    tl.debug_barrier()


@triton.jit
def _pure_decode_kernel(
    q,
    k,
    v,
    recurrent,  # fp32 [B, Hkv, 2, K, V]
    real,  # uint8 [B] or None
    down,
    up,
    bias,
    write_weight,
    write_bias,
    mix,
    norm_weight,
    o,
    scale,
    norm_eps,
    inverse_normalizer,
    bound,
    HKV: tl.constexpr,
    R: tl.constexpr,
    BM: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    BV: tl.constexpr,
    KC: tl.constexpr,
    STATE_PRECISION: tl.constexpr,
):
    row, head = (tl.program_id(0) // HKV).to(tl.int64), tl.program_id(0) % HKV
    is_real = True
    if real is not None:
        is_real = tl.load(real + row) != 0
    group = tl.arange(0, BM)
    group_ok = group < R
    heads = head * R + group
    values = tl.arange(0, BV)
    value_ok = values < V
    q += (row * HKV + head) * R * K
    recurrent += (row * HKV + head) * 2 * K * V

    v_new = tl.load(v + (row * HKV + head) * V + values, mask=value_ok, other=0.0).to(tl.float32)
    normalised = v_new * tl.rsqrt(tl.sum(v_new * v_new, 0) / V + norm_eps)
    rank = tl.arange(0, BR)
    weight = load_rows(down + head * V * RANK, values, value_ok, RANK, rank, rank < RANK).to(tl.float32)
    hidden = tl.sum(normalised[:, None] * weight, 0)
    write1 = tl.max(_write_gate(normalised[None, :], write_weight, write_bias, head, values, value_ok, 0, V), 0)
    write2 = tl.max(_write_gate(normalised[None, :], write_weight, write_bias, head, values, value_ok, 1, V), 0)
    mix1 = tl.load(mix + heads * 2, mask=group_ok, other=0.0).to(tl.float32)[:, None] * scale
    mix2 = tl.load(mix + heads * 2 + 1, mask=group_ok, other=0.0).to(tl.float32)[:, None] * scale
    result = tl.zeros([BM, BV], tl.float32)
    for start in range(0, K, KC):
        part = start + tl.arange(0, KC)
        part_ok = part < K
        pointers = recurrent + part[:, None] * V + values[None, :]
        mask = part_ok[:, None] & value_ok[None, :]
        state1 = tl.load(pointers, mask=mask, other=0.0)
        state2 = tl.load(pointers + K * V, mask=mask, other=0.0)
        k_part = tl.load(k + (row * HKV + head) * K + part, mask=part_ok, other=0.0).to(tl.float32)
        q_part = load_rows(q, group, group_ok, K, part, part_ok).to(tl.float32)
        gates = up + head * RANK * 2 * G
        up1 = load_rows(gates, rank, rank < RANK, 2 * G, part % G, part_ok).to(tl.float32)
        up2 = load_rows(gates + G, rank, rank < RANK, 2 * G, part % G, part_ok).to(tl.float32)
        logits1 = tl.sum(hidden[:, None] * up1, 0) + tl.load(bias + head * 2 * G + part % G, mask=part_ok, other=0.0).to(tl.float32)
        logits2 = tl.sum(hidden[:, None] * up2, 0) + tl.load(bias + (head * 2 + 1) * G + part % G, mask=part_ok, other=0.0).to(tl.float32)
        decay1 = tl.exp(bounded_log_decay(logits1, inverse_normalizer, bound))
        decay2 = tl.exp(bounded_log_decay(logits2, inverse_normalizer, bound))
        state1 = state1 * decay1[:, None] + (k_part * write1)[:, None] * v_new[None, :]
        state2 = state2 * decay2[:, None] + (k_part * write2)[:, None] * v_new[None, :]
        if is_real:
            tl.store(pointers, state1, mask=mask)
            tl.store(pointers + K * V, state2, mask=mask)
        result = tl.dot(q_part * mix1, state1, acc=result, input_precision=STATE_PRECISION)
        result = tl.dot(q_part * mix2, state2, acc=result, input_precision=STATE_PRECISION)
    rms = tl.sqrt(tl.sum(result * result, 1) / V + norm_eps)
    result = result / rms[:, None] * load_rows(norm_weight, heads, group_ok, V, values, value_ok).to(tl.float32)
    result = tl.where(is_real, result, 0.0)
    store_ok = group_ok[:, None] & value_ok[None, :]
    tl.store(o + (row * HKV * R + heads)[:, None] * V + values[None, :], result.to(o.dtype.element_ty), mask=store_ok)


@torch.library.custom_op(add_op_namespace_prefix("window_decode"), mutates_args=("recurrent", "window_k", "window_v"))
@on_its_device
def _window_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recurrent: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    lengths: Tensor,
    real: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor,
    write_weight: Tensor | None,
    write_bias: Tensor | None,
    mix: Tensor,
    norm_weight: Tensor,
    state_gain: Tensor,
    state_bias: Tensor,
    sink_logits: Tensor | None,
    window_size: int,
    gate_normalizer: float,
    lower_bound: float,
    scale: float,
    norm_eps: float,
    softcap: float | None,
) -> Tensor:
    sizes = _sizes(q, v, k.shape[2], down, bias)
    size, sinks = window_size // 2, window_k.shape[1] - window_size
    tile = min(TILE, max(16, triton.next_power_of_2(size)))
    dot, precision = dot_type(q.dtype)
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    _window_decode_kernel[(q.shape[0] * k.shape[2],)](
        q,
        k,
        v,
        recurrent,
        window_k,
        window_v,
        lengths,
        real,
        down,
        up,
        bias,
        write_weight,
        write_bias,
        mix,
        norm_weight,
        state_gain,
        state_bias,
        sink_logits,
        o,
        scale,
        softcap,
        norm_eps,
        1.0 / gate_normalizer,
        lower_bound,
        **sizes,
        BK=max(16, triton.next_power_of_2(q.shape[-1])),
        S=sinks,
        BS=max(16, triton.next_power_of_2(sinks)),
        W=window_size,
        BN=min(64, max(16, triton.next_power_of_2(window_size))),
        SIZE=size,
        C=tile,
        PER_BLOCK=triton.cdiv(size, tile),
        DOT=dot,
        PRECISION=precision,
        num_warps=8 if sizes["BV"] >= 128 else 4,
        num_stages=2,
    )
    return o


@torch.library.custom_op(add_op_namespace_prefix("pure_decode"), mutates_args=("recurrent",))
@on_its_device
def _pure_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recurrent: Tensor,
    real: Tensor | None,
    down: Tensor,
    up: Tensor,
    bias: Tensor,
    write_weight: Tensor | None,
    write_bias: Tensor | None,
    mix: Tensor,
    norm_weight: Tensor,
    gate_normalizer: float,
    lower_bound: float,
    scale: float,
    norm_eps: float,
) -> Tensor:
    sizes = _sizes(q, v, k.shape[2], down, bias)
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    _pure_decode_kernel[(q.shape[0] * k.shape[2],)](
        q,
        k,
        v,
        recurrent,
        real,
        down,
        up,
        bias,
        write_weight,
        write_bias,
        mix,
        norm_weight,
        o,
        scale,
        norm_eps,
        1.0 / gate_normalizer,
        lower_bound,
        **sizes,
        num_warps=8 if sizes["BV"] >= 128 else 4,
        num_stages=2,
    )
    return o


@_window_decode.register_fake
def _(q, k, v, *others):
    return q.new_empty(*q.shape[:3], v.shape[-1])


@_pure_decode.register_fake
def _(q, k, v, *others):
    return q.new_empty(*q.shape[:3], v.shape[-1])


def _sizes(q, v, kv_heads, down, bias):
    group, rank = q.shape[2] // kv_heads, down.shape[-1]
    return {
        "HKV": kv_heads,
        "R": group,
        "BM": max(16, triton.next_power_of_2(group)),
        "K": q.shape[-1],
        "V": v.shape[-1],
        "G": bias.shape[-1],
        "RANK": rank,
        "BR": max(16, triton.next_power_of_2(rank)),
        "BV": max(16, triton.next_power_of_2(v.shape[-1])),
        "KC": 32 if q.shape[-1] > 16 else 16,
        "STATE_PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def window_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recurrent: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    lengths: Tensor,
    gates: GateWeights,
    mix: Tensor,
    norm_weight: Tensor,
    state_gain: Tensor,
    state_bias: Tensor,
    window_size: int,
    *,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    scale: float | None = None,
    norm_eps: float = 1e-6,
    padding_mask: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    advance: bool = True,
) -> Tensor:
    """One token a row through the layer with a softmax window; states, ring, sinks and lengths change in place.

    Args:
        q `[B, 1, Hq, K]`, k `[B, 1, Hkv, K]`, v `[B, 1, Hkv, V]`: the token, bf16, fp32 or fp16.
        recurrent: fp32 `[B, Hkv, 2, K, V]`, the states of the blocks of W / 2 tokens before the last full one.
        window_k, window_v: `[B, S + W, Hkv, K or V]` in q's dtype: S sinks, then the ring; token j lies at slot S + j % W.
        lengths: int64 `[B]`, tokens seen before this one.
        gates: of the layer, fp32, bf16 or fp16.
        mix `[Hq, 2]`, norm_weight `[Hq, V]`, state_gain and state_bias `[Hq]`: see `reference.fused_window_attention`.
        padding_mask: `[B, 1]`; a padded token leaves no trace and its output is zero.
        softcap, sink_logits `[Hq]`: of the window's softmax, see `reference.dual_state_window_attention`.
        advance: also count the token in `lengths`; False leaves it to the caller, for example once for all layers.

    Returns:
        o `[B, 1, Hq, V]` in q's dtype.

    Raises:
        ValueError: names the argument that does not fit, before anything is launched. Tensors that change in place must be
            contiguous.
    """
    _check(q, k, v, recurrent, gates, mix, norm_weight, padding_mask)
    if window_size < 2 or window_size % 2:
        raise ValueError(f"window_size must be an even number of tokens, got {window_size}")
    check_softcap(softcap)
    slots, heads = window_k.shape[1], q.shape[2]
    if not window_size <= slots <= window_size + window_size // 2:
        raise ValueError(f"window_k must have {window_size} slots and at most {window_size // 2} for sinks, got {slots}")
    for name, x, shape, dtype in (
        ("window_k", window_k, (q.shape[0], slots, *k.shape[2:]), q.dtype),
        ("window_v", window_v, (q.shape[0], slots, *v.shape[2:]), q.dtype),
        ("lengths", lengths, (q.shape[0],), torch.int64),
        ("state_gain", state_gain, (heads,), None),
        ("state_bias", state_bias, (heads,), None),
        ("sink_logits", sink_logits, (heads,), None),
    ):
        if x is not None:
            _check_tensor(name, x, shape, dtype, q.device)
    _check_in_place(recurrent=recurrent, window_k=window_k, window_v=window_v, lengths=lengths)
    real = None if padding_mask is None else padding_mask[:, -1].to(torch.uint8)
    o = ops.window_decode(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        recurrent,
        window_k,
        window_v,
        lengths,
        real,
        *(None if x is None else x.contiguous() for x in gates),
        mix.contiguous(),
        norm_weight.contiguous(),
        state_gain.contiguous(),
        state_bias.contiguous(),
        None if sink_logits is None else sink_logits.contiguous(),
        window_size,
        gate_normalizer,
        lower_bound,
        q.shape[-1] ** -0.5 if scale is None else scale,
        norm_eps,
        softcap,
    )
    if advance:
        lengths.add_(1 if real is None else real)
    return o


def pure_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recurrent: Tensor,
    gates: GateWeights,
    mix: Tensor,
    norm_weight: Tensor,
    *,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    scale: float | None = None,
    norm_eps: float = 1e-6,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """One token a row through the pure layer and its norm, `norm_weight * o / sqrt(mean(o²) + norm_eps)`; the states change in place.

    Arguments, result and errors as `window_decode`, without the window.
    """
    _check(q, k, v, recurrent, gates, mix, norm_weight, padding_mask)
    _check_in_place(recurrent=recurrent)
    return ops.pure_decode(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        recurrent,
        None if padding_mask is None else padding_mask[:, -1].to(torch.uint8),
        *(None if x is None else x.contiguous() for x in gates),
        mix.contiguous(),
        norm_weight.contiguous(),
        gate_normalizer,
        lower_bound,
        q.shape[-1] ** -0.5 if scale is None else scale,
        norm_eps,
    )


def _check(q, k, v, recurrent, gates, mix, norm_weight, padding_mask):
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4 or q.shape[1] != 1:
        raise ValueError(f"q, k, v must be [B, 1, H, D], one token a row, got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}")
    batch, _, heads, key_dim = q.shape
    kv_heads, value_dim = k.shape[2], v.shape[-1]
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the kernels take fp32, bf16 and fp16, got {q.dtype}")
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the {heads} query heads must be a multiple of the {kv_heads} key-value heads")
    if max(key_dim, value_dim) > LARGEST_HEAD:
        raise ValueError(f"the kernels take heads of up to {LARGEST_HEAD} channels, got K = {key_dim}, V = {value_dim}")
    decays, rank = gates.bias.shape[-1], gates.down.shape[-1]
    if decays not in (key_dim, key_dim / 2):
        raise ValueError(f"gates.bias must have {key_dim} or {key_dim / 2:g} decays a state, got {decays}")
    if (gates.write_weight is None) != (gates.write_bias is None):
        raise ValueError("gates.write_weight and gates.write_bias must be given together")
    for name, x, shape, dtype in (
        ("k", k, (batch, 1, kv_heads, key_dim), q.dtype),
        ("v", v, (batch, 1, kv_heads, value_dim), q.dtype),
        ("recurrent", recurrent, (batch, kv_heads, 2, key_dim, value_dim), torch.float32),
        ("gates.down", gates.down, (kv_heads, value_dim, rank), None),
        ("gates.up", gates.up, (kv_heads, rank, 2 * decays), None),
        ("gates.bias", gates.bias, (kv_heads, 2, decays), None),
        ("gates.write_weight", gates.write_weight, (kv_heads, value_dim, 2), None),
        ("gates.write_bias", gates.write_bias, (kv_heads, 2), None),
        ("mix", mix, (heads, 2), None),
        ("norm_weight", norm_weight, (heads, value_dim), None),
    ):
        if x is not None:
            _check_tensor(name, x, shape, dtype, q.device)
    if padding_mask is not None and (padding_mask.shape[0] != batch or padding_mask.device != q.device):
        raise ValueError(f"padding_mask must be [{batch}, 1] on {q.device}, got {list(padding_mask.shape)} on {padding_mask.device}")


def _check_tensor(name, x, shape, dtype, device):
    if x.shape != shape or x.device != device:
        raise ValueError(f"{name} must be {list(shape)} on {device}, got {list(x.shape)} on {x.device}")
    if (x.dtype != dtype) if dtype is not None else (x.dtype not in (torch.float32, torch.bfloat16, torch.float16)):
        raise ValueError(f"{name} must be {dtype or 'fp32, bf16 or fp16'}, got {x.dtype}")


def _check_in_place(**tensors):
    for name, x in tensors.items():
        if not x.is_contiguous():
            raise ValueError(f"{name} changes in place and must be contiguous, got strides {x.stride()}")
