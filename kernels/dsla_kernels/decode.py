"""One token in one kernel: gates, states, window, norm and the gate between them, in place and at fixed addresses.

One program a row and KV head; what counts are the bytes of its states and ring, and how many of them are on their way at a time.
Where that leaves processors idle, several programs share a head: some take channels of both states, with all their values, others
take slots of the ring. Every sum over channels or slots then lies in pieces, and a small second kernel joins them. Channels, not
values: a part needs the gates of its own channels alone, and what it reads lies in one stretch a state.

Nothing is read back by the host and no buffer moves, so a step can be captured in a CUDA graph. With a window the states are only
read, but for the one step in W / 2 that fills a block: that step takes the block before the last one from the ring into the states.
"""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ._ops import add_op_namespace_prefix, ops
from .checks import LARGEST_HEAD, check_softcap
from .common import INTERPRETED, LOG2_E, bounded_log_decay, dot_type, largest_tile, load_rows, on_its_device, padded, processors
from .ops.window.softmax import LN_2, softmax_scores, softmax_step, state_gate


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


FEW_ROWS = 4  # padding among more is left out at once; to look for it first costs a single row more than it spares
FEW_HEADS = 8  # query heads a KV head that are multiplied one by one; more go through tensor cores


@triton.jit
def _decay_gate(logits, inverse_normalizer, bound, EXACT: tl.constexpr):
    """`bounded_log_decay`, or a shorter form whose absolute error is fp32's rounding of 1: enough for tokens in bf16."""
    if EXACT:
        return bounded_log_decay(logits, inverse_normalizer, bound)
    else:  # where exp2 overflows, the bound applies
        return tl.maximum(tl.log2(1 + tl.exp2(logits * -LOG2_E)) * (-LN_2 * inverse_normalizer), bound)


@triton.jit
def _load_queries(q, part, group, group_ok, K: tl.constexpr, R: tl.constexpr, FEW: tl.constexpr):
    """Channels `part` of the group's queries: vectors if they are few, else a tile."""
    if FEW:
        queries = ()
        for r in tl.static_range(R):
            queries = queries + (tl.load(q + r * K + part, mask=part < K, other=0.0),)  # type: ignore[assignment]
        return queries
    else:
        return load_rows(q, group, group_ok, K, part, part < K)


@triton.jit
def _load_states(recurrent, part, values, value_ok, K: tl.constexpr, V: tl.constexpr):
    """Channels `part` of both states, `[part, V]`. Nobody reads them again before the next token: others keep the L2 cache."""
    pointers = recurrent + part[:, None] * V + values[None, :]
    mask = (part < K)[:, None] & value_ok[None, :]
    state1 = tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")
    return state1, tl.load(pointers + K * V, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_mix(mix_logits, group, group_ok, R: tl.constexpr, FEW: tl.constexpr):
    """Weights of both states, a softmax of two: scalars for every query head if they are few, else columns."""
    if FEW:
        mix1, mix2 = (), ()
        for r in tl.static_range(R):
            lead = tl.load(mix_logits + r * 2).to(tl.float32) - tl.load(mix_logits + r * 2 + 1).to(tl.float32)
            mix1 = mix1 + (tl.sigmoid(lead),)  # type: ignore[assignment]
            mix2 = mix2 + (tl.sigmoid(-lead),)  # type: ignore[assignment]
        return mix1, mix2
    else:
        lead = tl.load(mix_logits + group * 2, mask=group_ok, other=0.0).to(tl.float32)
        lead -= tl.load(mix_logits + group * 2 + 1, mask=group_ok, other=0.0).to(tl.float32)
        return tl.sigmoid(lead)[:, None], tl.sigmoid(-lead)[:, None]


@triton.jit
def _no_sums(R: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr):
    if FEW:
        sums = ()
        for _ in tl.static_range(R):
            sums = sums + (tl.zeros([ROWS, BV], tl.float32),)  # type: ignore[assignment]
    else:
        sums = tl.zeros([BM, BV], tl.float32)
    return sums


@triton.jit
def _add_products(
    sums,
    queries,
    mix1,
    mix2,
    state1,
    state2,
    scale,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    FEW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what the queries read of a part of both states.

    A product of tiles would be padded to 16 rows and do up to 16 times the work, so few queries are multiplied one by one. Their
    sums over channels stay apart in ROWS rows, as many as the program's threads hold at a time: each adds its own registers.
    """
    if FEW:
        more = ()
        for r in tl.static_range(R):
            query = queries[r].to(tl.float32) * scale
            product = (query * mix1[r].to(tl.float32))[:, None] * state1 + (query * mix2[r].to(tl.float32))[:, None] * state2
            rows = tl.sum(tl.reshape(product, [product.shape[0] // ROWS, ROWS, product.shape[1]]), 0)
            more = more + (sums[r] + rows,)  # type: ignore[assignment]
        return more
    else:
        query = queries.to(tl.float32) * scale
        sums = tl.dot(query * mix1.to(tl.float32), state1, acc=sums, input_precision=PRECISION)
        return tl.dot(query * mix2.to(tl.float32), state2, acc=sums, input_precision=PRECISION)


@triton.jit
def _finished(sums, group, R: tl.constexpr, BM: tl.constexpr, BV: tl.constexpr, FEW: tl.constexpr):
    """The sums as a tile `[BM, BV]`."""
    if FEW:
        o = tl.zeros([BM, BV], tl.float32)
        for r in tl.static_range(R):
            o = tl.where(group[:, None] == r, tl.sum(sums[r], 0)[None, :], o)
        return o
    else:
        return sums


@triton.jit
def _store_pieces(
    pieces,
    sums,
    part,
    group,
    group_ok,
    values,
    value_ok,
    R: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    STRIDE: tl.constexpr,
    FEW: tl.constexpr,
):
    """The sums of a part, `[R, STRIDE, V]` a head. Where threads hold ROWS of them, these too are left to the join, so that no
    thread waits for another."""
    if FEW:
        piece = part * ROWS + tl.arange(0, ROWS)
        for r in tl.static_range(R):
            tl.store(pieces + (r * STRIDE + piece)[:, None] * V + values[None, :], sums[r], mask=value_ok[None, :])
    else:
        pointers = pieces + (group * STRIDE + part)[:, None] * V + values[None, :]
        tl.store(pointers, sums, mask=group_ok[:, None] & value_ok[None, :])


@triton.jit
def _store_zeros(o, rows, store_ok, values, V: tl.constexpr):
    pointers = o + rows[:, None] * V + values[None, :]
    tl.store(pointers, tl.zeros(pointers.shape, o.dtype.element_ty), mask=store_ok)


@triton.jit
def _normed(o_state, weight, norm_eps, V: tl.constexpr):
    """The output of the layer without a window."""
    rms = tl.sqrt(tl.sum(o_state * o_state, 1) / V + norm_eps)
    return o_state / rms[:, None] * weight.to(tl.float32)


@triton.jit
def _gated(o_state, o_window, log_denominator, length, weight, gain, offset, norm_eps, SIZE: tl.constexpr, V: tl.constexpr):
    """The output of the layer with a window. A state holds a block once another whole one has followed it."""
    o_state = tl.where(length >= SIZE + SIZE, o_state, 0.0)
    rms, log_rms, alpha = state_gate(o_state, log_denominator, gain.to(tl.float32), offset.to(tl.float32), norm_eps, V)
    return o_window + alpha[:, None] * (o_state * weight.to(tl.float32) / rms[:, None] - o_window)


@triton.jit
def _join_kernel(
    pieces,  # fp32 [B * Hq, STRIDE, V]: PIECES of the states, then SLOT_PARTS of the window
    softmax,  # fp32 [B * Hq, 2, SLOT_PARTS]: tops and denominators of the window; None without one
    lengths,
    real,
    norm_weight,
    state_gain,
    state_bias,
    o,
    norm_eps,
    HQ: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    PIECES: tl.constexpr,
    SLOT_PARTS: tl.constexpr,
    STRIDE: tl.constexpr,
    SIZE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Joins what the programs of a head have left; one program a row and query head."""
    number = tl.program_id(0).to(tl.int64)
    row, heads = number // HQ, number % HQ + tl.arange(0, 1)
    one = tl.full([1], 1, tl.int1)
    values = tl.arange(0, BV)
    value_ok = values < V
    # Not written by the programs that are waited for.
    is_real = True
    if real is not None:
        is_real = tl.load(real + row) != 0
    weight = load_rows(norm_weight, heads, one, V, values, value_ok)
    if softmax is not None:
        length = tl.load(lengths + row).to(tl.int32)
        gain, offset = tl.load(state_gain + heads), tl.load(state_bias + heads)
    if OVERLAP:
        gdc_wait()
    pieces += number * STRIDE * V
    state_pieces = load_rows(pieces, tl.arange(0, PIECES), tl.full([PIECES], 1, tl.int1), V, values, value_ok)
    if softmax is not None:
        part = tl.arange(0, SLOT_PARTS)
        window_pieces = load_rows(pieces, PIECES + part, part < SLOT_PARTS, V, values, value_ok)
        top = tl.load(softmax + number * 2 * SLOT_PARTS + part)
        denominators = tl.load(softmax + (number * 2 + 1) * SLOT_PARTS + part)
        highest = tl.max(top, 0)
        share = tl.exp2(top - highest)
        denominator = tl.sum(share * denominators, 0)
        o_window = (tl.sum(window_pieces * share[:, None], 0) / denominator)[None, :]
        log_denominator = tl.zeros([1], tl.float32) + (highest + tl.log2(denominator)) * LN_2
        o_state = tl.sum(state_pieces, 0)[None, :]
        result = _gated(o_state, o_window, log_denominator, length, weight, gain, offset, norm_eps, SIZE, V)
    else:
        result = _normed(tl.sum(state_pieces, 0)[None, :], weight, norm_eps, V)
    result = tl.where(is_real, result, 0.0)
    tl.store(o + number * V + values[None, :], result.to(o.dtype.element_ty), mask=value_ok[None, :])


@triton.jit
def _load_slots(
    window_k,
    window_v,
    slot,
    slot_ok,
    columns,
    column_ok,
    values,
    value_ok,
    HKV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
):
    k_tile = load_rows(window_k, slot, slot_ok, HKV * K, columns, column_ok)
    return k_tile, load_rows(window_v, slot, slot_ok, HKV * V, values, value_ok)


@triton.jit
def _attend(
    q_tile, k_tile, v_tile, visible, top, denominator, o, scale, softcap, DOT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One tile of slots; those that are not visible may hold anything. The compiler stages a factor of a product in shared memory
    where it is made: made here, of tiles that were loaded before, no load waits for another."""
    k_tile = tl.where(visible[:, None], k_tile, 0.0).to(DOT)
    v_tile = tl.where(visible[:, None], v_tile, 0.0).to(DOT)
    scores = softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, softcap)
    return softmax_step(scores, visible[None, :], v_tile, top, denominator, o, DOT, PRECISION)


@triton.jit
def _take_block(
    recurrent,
    window_k,
    window_v,
    first,
    down,
    up,
    bias,
    write_weight,
    write_bias,
    head,
    first_channel,
    values,
    value_ok,
    norm_eps,
    inverse_normalizer,
    bound,
    HKV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    CHANNELS: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    GC: tl.constexpr,  # channels at a time
    S: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
):
    """Takes the SIZE tokens from `first` on out of the ring into CHANNELS channels of the states."""
    PAIRED: tl.constexpr = CHANNELS == K  # with channel i also i + G, of the same decay; of a part every channel by itself
    COUNT: tl.constexpr = G if PAIRED else CHANNELS
    rank = tl.arange(0, BR)
    inside = tl.arange(0, C)
    behind = (inside[:, None] < inside[None, :]).to(tl.float32)  # a product with it sums over the tokens behind each one
    for tile in range(PER_BLOCK):
        token = first + tile * C + inside
        taken = (tile * C + inside < SIZE) & (token >= S)
        slots = S + token % W
        # Values a few at a time: this product in fp32 holds whole rows of its factors in registers.
        hidden = tl.zeros([C, BR], tl.float32)
        squares = tl.zeros([C], tl.float32)
        write1 = tl.zeros([C], tl.float32)
        write2 = tl.zeros([C], tl.float32)
        for start in range(0, V, 16):
            some = start + tl.arange(0, 16)
            x = load_rows(window_v, slots, taken, HKV * V, some, some < V).to(tl.float32)
            squares += tl.sum(x * x, 1)
            down_weight = load_rows(down + head * V * RANK, some, some < V, RANK, rank, rank < RANK).to(tl.float32)
            hidden = tl.dot(x, down_weight, acc=hidden, input_precision="ieee")
            if write_weight is not None:
                weights = write_weight + (head * V + some) * 2
                write1 += tl.sum(x * tl.load(weights, mask=some < V, other=0.0).to(tl.float32)[None, :], 1)
                write2 += tl.sum(x * tl.load(weights + 1, mask=some < V, other=0.0).to(tl.float32)[None, :], 1)
        inverse_rms = tl.rsqrt(squares / V + norm_eps)
        hidden *= inverse_rms[:, None]
        if write_weight is not None:
            write1 = tl.sigmoid(write1 * inverse_rms + tl.load(write_bias + head * 2).to(tl.float32))
            write2 = tl.sigmoid(write2 * inverse_rms + tl.load(write_bias + head * 2 + 1).to(tl.float32))
            write1 = tl.where(taken, write1, 0.0)
            write2 = tl.where(taken, write2, 0.0)
        else:
            write1 = taken.to(tl.float32)
            write2 = write1
        v_tile = load_rows(window_v, slots, taken, HKV * V, values, value_ok)
        for state in range(2):
            write = tl.where(state == 0, write1, write2)
            for start in range(0, COUNT, GC):
                inner = start + tl.arange(0, GC)
                channel = first_channel + inner
                gate = channel % G
                channel_ok = (inner < COUNT) & (channel < K)
                up_weight = load_rows(up + (head * RANK * 2 + state) * G, rank, rank < RANK, 2 * G, gate, channel_ok).to(tl.float32)
                shift = tl.load(bias + (head * 2 + state) * G + gate, mask=channel_ok, other=0.0).to(tl.float32)
                logits = tl.dot(hidden, up_weight, input_precision=GATE_PRECISION) + shift[None, :]
                log_decay = tl.where(taken[:, None], _decay_gate(logits, inverse_normalizer, bound, GATE_PRECISION == "ieee"), 0.0)
                decay = tl.exp(tl.sum(log_decay, 0))
                to_end = write[:, None] * tl.exp(tl.dot(behind, log_decay, input_precision="ieee"))
                for half in range(K // G if PAIRED else 1):
                    part = half * G + channel
                    k_part = load_rows(window_k, slots, taken, HKV * K, part, channel_ok).to(tl.float32)
                    added = tl.trans((k_part * to_end).to(DOT))
                    pointers = recurrent + (state * K + part)[:, None] * V + values[None, :]
                    mask = channel_ok[:, None] & value_ok[None, :]
                    old = tl.load(pointers, mask=mask, other=0.0)
                    new = tl.dot(added, v_tile.to(DOT), acc=old * decay[:, None], input_precision=PRECISION)
                    tl.store(pointers, new, mask=mask)
        if PER_BLOCK > 1:
            tl.debug_barrier()


@triton.jit
def _begin_window(
    q,
    k,
    v,
    window_k,
    window_v,
    first_slot,
    group,
    group_ok,
    columns,
    column_ok,
    values,
    value_ok,
    HKV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
    BN: tl.constexpr,
):
    """All first loads of the window: queries, the token, sinks (which count in the first part only) and the first slots."""
    q_tile = load_rows(q, group, group_ok, K, columns, column_ok)
    k_new = tl.load(k + columns, mask=column_ok, other=0.0)
    v_new = tl.load(v + values, mask=value_ok, other=0.0)
    sinks = ()
    if S > 0:
        sink = tl.arange(0, BS)
        sink_ok = (sink < S) & (first_slot == 0)
        sinks = _load_slots(window_k, window_v, sink, sink_ok, columns, column_ok, values, value_ok, HKV, K, V)
    slot = first_slot + tl.arange(0, BN)
    slots = _load_slots(window_k, window_v, S + slot, slot < W, columns, column_ok, values, value_ok, HKV, K, V)
    return q_tile, k_new, v_new, sinks, slots


@triton.jit
def _attend_window(
    loaded,
    window_k,
    window_v,
    sink_logits,
    length,
    first_slot,
    heads,
    group_ok,
    columns,
    column_ok,
    values,
    value_ok,
    scale,
    softcap,
    HKV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BV: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Top, denominator and output, not yet divided by it, of SLOTS slots; with the first ones of the token, sinks and sink logit.

    The new token comes first, from registers: what its slot in the ring still holds has left the window. Its score gives every
    part a finite top.
    """
    q_tile, k_new, v_new, sinks, slots = loaded
    q_tile = tl.where(group_ok[:, None], q_tile, 0.0).to(DOT)  # made here: see `_attend`
    top = softmax_scores(tl.sum(q_tile.to(tl.float32) * k_new.to(tl.float32)[None, :], 1), scale, softcap)
    denominator = tl.full([BM], 1.0, tl.float32)
    o = tl.zeros([BM, BV], tl.float32) + v_new.to(tl.float32)[None, :]
    if sink_logits is not None:
        logit = tl.load(sink_logits + heads, mask=group_ok, other=0.0).to(tl.float32) * LOG2_E
        new_top = tl.maximum(top, logit)
        weight_new = tl.exp2(top - new_top)
        denominator = weight_new + tl.exp2(logit - new_top)
        o *= weight_new[:, None]
        top = new_top
    if SLOTS < W:
        denominator = tl.where(first_slot == 0, denominator, 0.0)
        o = tl.where(first_slot == 0, o, 0.0)
    if S > 0:  # noqa: SIM102 (known at compile time, the other is not)
        if first_slot == 0:
            sink = tl.arange(0, BS)
            sink_visible = (sink < S) & (sink <= length - W)
            top, denominator, o = _attend(
                q_tile, sinks[0], sinks[1], sink_visible, top, denominator, o, scale, softcap, DOT, PRECISION
            )  # fmt: skip
    k_tile, v_tile = slots
    for start in range(0, SLOTS, BN):
        slot = first_slot + start + tl.arange(0, BN)
        token = length - (length - slot + W) % W
        visible = (slot < W) & (token >= 0) & (token < length)
        top, denominator, o = _attend(q_tile, k_tile, v_tile, visible, top, denominator, o, scale, softcap, DOT, PRECISION)
        if SLOTS > BN:
            slot += BN
            slot_ok = (slot < W) & (start + BN < SLOTS)
            k_tile, v_tile = _load_slots(window_k, window_v, S + slot, slot_ok, columns, column_ok, values, value_ok, HKV, K, V)
    return top, denominator, o


@triton.jit
def _write_token(
    window_k,
    window_v,
    k_new,
    v_new,
    length,
    columns,
    column_ok,
    values,
    value_ok,
    HKV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
):
    """Into the ring and, of the first S tokens of a text, among the sinks. Other programs may read these slots before or after:
    they see neither token there."""
    here = (S + length % W) * HKV
    tl.store(window_k + here * K + columns, k_new, mask=column_ok)
    tl.store(window_v + here * V + values, v_new, mask=value_ok)
    if length < S:
        tl.store(window_k + length * HKV * K + columns, k_new, mask=column_ok)
        tl.store(window_v + length * HKV * V + values, v_new, mask=value_ok)


@triton.jit
def _read_states(
    recurrent,
    q,
    mixes,
    queries,
    states,
    first_channel,
    group,
    group_ok,
    values,
    value_ok,
    scale,
    R: tl.constexpr,
    BM: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    CHANNELS: tl.constexpr,
    KC: tl.constexpr,
    ROWS: tl.constexpr,
    FEW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the queries read of CHANNELS channels; queries and states of the first KC are loaded."""
    sums = _no_sums(R, BM, BV, ROWS, FEW)
    for start in tl.static_range(0, CHANNELS, KC):
        part = first_channel + start + tl.arange(0, KC)
        state1, state2 = states
        if start + KC < CHANNELS:
            states = _load_states(recurrent, part + KC, values, value_ok, K, V)
        if start > 0:
            queries = _load_queries(q, part, group, group_ok, K, R, FEW)
        sums = _add_products(sums, queries, mixes[0], mixes[1], state1, state2, scale, R, ROWS, FEW, PRECISION)
    return sums


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
    mix_logits,
    norm_weight,
    state_gain,
    state_bias,
    sink_logits,  # [Hq] or None
    o,
    pieces,  # for the join, as are tops and denominators; None if one program does it all
    softmax,
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
    CHANNELS: tl.constexpr,  # of the program: K for one that does it all
    KC: tl.constexpr,  # of them at a time
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    PARTS: tl.constexpr,  # programs a head for the states, and if more than one
    SLOT_PARTS: tl.constexpr,  # programs for the window
    STRIDE: tl.constexpr,
    FEW: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    SKIP: tl.constexpr,  # padding at once
    S: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
    SLOTS: tl.constexpr,  # of the program
    BN: tl.constexpr,  # of them at a time
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    GC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, head = (tl.program_id(0) // HKV).to(tl.int64), tl.program_id(0) % HKV
    group = tl.arange(0, BM)
    group_ok = group < R
    heads = head * R + group
    columns = tl.arange(0, BK)
    column_ok = columns < K
    values = tl.arange(0, BV)
    value_ok = values < V
    store_ok = group_ok[:, None] & value_ok[None, :]
    q += (row * HKV + head) * R * K
    k += (row * HKV + head) * K
    v += (row * HKV + head) * V
    mix_logits += head * R * 2
    recurrent += (row * HKV + head) * 2 * K * V
    window_k += (row * (S + W) * HKV + head) * K
    window_v += (row * (S + W) * HKV + head) * V
    piece = 0
    if PARTS > 1:
        number = tl.program_id(1)
        piece = number - SLOT_PARTS  # below 0: of the window; these come first, as they take longest
        if OVERLAP:
            gdc_launch_dependents()
        pieces += (row * HKV + head) * R * STRIDE * V
        softmax += (row * HKV + head) * R * 2 * SLOT_PARTS
    first_channel = piece * CHANNELS

    # All first loads at once, none with a mask that another has to bring: a single row waits for memory once. The window comes
    # before the states, as it is needed first; last those that the compiler moves to other threads as soon as they are there.
    length = tl.load(lengths + row).to(tl.int32)
    is_real = True
    if real is not None:
        is_real = tl.load(real + row) != 0
    if SKIP:  # noqa: SIM102 (known at compile time, the other is not)
        if not is_real:
            if PARTS == 1:
                _store_zeros(o, row * HKV * R + heads, store_ok, values, V)
            return
    if PARTS == 1:
        loaded = _begin_window(
            q, k, v, window_k, window_v, 0, group, group_ok, columns, column_ok, values, value_ok, HKV, K, V, S, BS, W, BN
        )  # fmt: skip
        mixes = _load_mix(mix_logits, group, group_ok, R, FEW)
        queries = _load_queries(q, tl.arange(0, KC), group, group_ok, K, R, FEW)
        states = _load_states(recurrent, tl.arange(0, KC), values, value_ok, K, V)
        gain = tl.load(state_gain + heads, mask=group_ok, other=0.0)
        offset = tl.load(state_bias + heads, mask=group_ok, other=0.0)
        weight = load_rows(norm_weight, heads, group_ok, V, values, value_ok)
        top, denominator, o_window = _attend_window(
            loaded, window_k, window_v, sink_logits, length, 0, heads, group_ok, columns, column_ok, values, value_ok, scale, softcap,
            HKV, K, V, BM, BV, S, BS, W, SLOTS, BN, DOT, PRECISION,
        )  # fmt: skip
        o_window /= denominator[:, None]
        sums = _read_states(
            recurrent, q, mixes, queries, states, 0, group, group_ok, values, value_ok, scale, R, BM, K, V, BV, CHANNELS, KC, ROWS, FEW,
            GATE_PRECISION,
        )  # fmt: skip
        log_denominator = (top + tl.log2(denominator)) * LN_2
        o_state = _finished(sums, group, R, BM, BV, FEW)
        result = _gated(o_state, o_window, log_denominator, length, weight, gain, offset, norm_eps, SIZE, V)
        result = tl.where(is_real, result, 0.0)
        tl.store(o + (row * HKV * R + heads)[:, None] * V + values[None, :], result.to(o.dtype.element_ty), mask=store_ok)
        if is_real:
            _write_token(window_k, window_v, loaded[1], loaded[2], length, columns, column_ok, values, value_ok, HKV, K, V, S, W)
    else:
        if piece < 0:
            loaded = _begin_window(
                q, k, v, window_k, window_v, number * SLOTS, group, group_ok, columns, column_ok, values, value_ok, HKV, K, V, S, BS, W,
                BN,
            )  # fmt: skip
            top, denominator, o_window = _attend_window(
                loaded, window_k, window_v, sink_logits, length, number * SLOTS, heads, group_ok, columns, column_ok, values, value_ok,
                scale, softcap, HKV, K, V, BM, BV, S, BS, W, SLOTS, BN, DOT, PRECISION,
            )  # fmt: skip
            tl.store(pieces + (group * STRIDE + PIECES + number)[:, None] * V + values[None, :], o_window, mask=store_ok)
            tl.store(softmax + group * 2 * SLOT_PARTS + number, top, mask=group_ok)
            tl.store(softmax + (group * 2 + 1) * SLOT_PARTS + number, denominator, mask=group_ok)
            if is_real & (number == 0):
                _write_token(window_k, window_v, loaded[1], loaded[2], length, columns, column_ok, values, value_ok, HKV, K, V, S, W)
        else:
            part = first_channel + tl.arange(0, KC)
            mixes = _load_mix(mix_logits, group, group_ok, R, FEW)
            queries = _load_queries(q, part, group, group_ok, K, R, FEW)
            states = _load_states(recurrent, part, values, value_ok, K, V)
            sums = _read_states(
                recurrent, q, mixes, queries, states, first_channel, group, group_ok, values, value_ok, scale, R, BM, K, V, BV, CHANNELS,
                KC, ROWS, FEW, GATE_PRECISION,
            )  # fmt: skip
            _store_pieces(pieces, sums, piece, group, group_ok, values, value_ok, R, V, ROWS, PIECES, STRIDE, FEW)

    length += 1
    if is_real & (length % SIZE == 0) & (length >= W) & (piece >= 0):
        # The older half of the ring: tokens length - W to length - W + SIZE - 1, none of them written above by any program.
        tl.debug_barrier()  # every thread has read the states
        _take_block(
            recurrent, window_k, window_v, length - W, down, up, bias, write_weight, write_bias, head, first_channel, values, value_ok,
            norm_eps, inverse_normalizer, bound, HKV, K, V, G, CHANNELS, RANK, BR, GC, S, W, SIZE, C, PER_BLOCK, DOT, PRECISION,
            GATE_PRECISION,
        )  # fmt: skip


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
    mix_logits,
    norm_weight,
    o,
    pieces,  # for the join; None if one program does it all
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
    BG: tl.constexpr,  # decays of a state that the program needs
    BV: tl.constexpr,
    CHANNELS: tl.constexpr,  # of the program: K for one that does it all
    KC: tl.constexpr,  # of them at a time
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    PARTS: tl.constexpr,  # programs a head
    STRIDE: tl.constexpr,
    FEW: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    SKIP: tl.constexpr,
):
    row, head = (tl.program_id(0) // HKV).to(tl.int64), tl.program_id(0) % HKV
    piece = 0
    if PARTS > 1:
        piece = tl.program_id(1)
        if OVERLAP:
            gdc_launch_dependents()
    first_channel = piece * CHANNELS
    group = tl.arange(0, BM)
    group_ok = group < R
    heads = head * R + group
    values = tl.arange(0, BV)
    value_ok = values < V
    rank = tl.arange(0, BR)
    q += (row * HKV + head) * R * K
    k += (row * HKV + head) * K
    recurrent += (row * HKV + head) * 2 * K * V

    # All first loads at once, what the gates need in front of the states: a single row waits for memory once.
    is_real = True
    if real is not None:
        is_real = tl.load(real + row) != 0
    if SKIP:  # noqa: SIM102 (known at compile time, the other is not)
        if not is_real:
            if PARTS == 1:
                _store_zeros(o, row * HKV * R + heads, group_ok[:, None] & value_ok[None, :], values, V)
            return
    v_new = tl.load(v + (row * HKV + head) * V + values, mask=value_ok, other=0.0)
    down_weight = load_rows(down + head * V * RANK, values, value_ok, RANK, rank, rank < RANK)
    gate = tl.arange(0, 2 * BG)  # of one state and of the other
    gate_ok = gate < 2 * G
    if PARTS > 1:  # one for every channel of the part
        gate_ok = first_channel + gate % BG < K
        gate = gate // BG * G + (first_channel + gate % BG) % G
    elif BG > G:
        gate_ok = gate % BG < G
        gate = gate // BG * G + gate % BG
    up_weight = load_rows(up + head * RANK * 2 * G, rank, rank < RANK, 2 * G, gate, gate_ok)
    shift = tl.load(bias + head * 2 * G + gate, mask=gate_ok, other=0.0)
    if write_weight is not None:
        write_weight1 = tl.load(write_weight + (head * V + values) * 2, mask=value_ok, other=0.0)
        write_weight2 = tl.load(write_weight + (head * V + values) * 2 + 1, mask=value_ok, other=0.0)
        write1 = tl.load(write_bias + head * 2)
        write2 = tl.load(write_bias + head * 2 + 1)
    mix1, mix2 = _load_mix(mix_logits + head * R * 2, group, group_ok, R, FEW)
    weight = load_rows(norm_weight, heads, group_ok, V, values, value_ok)
    part = first_channel + tl.arange(0, KC)
    k_part = tl.load(k + part, mask=part < K, other=0.0)
    queries = _load_queries(q, part, group, group_ok, K, R, FEW)
    next1, next2 = _load_states(recurrent, part, values, value_ok, K, V)

    v_new = v_new.to(tl.float32)
    inverse_rms = tl.rsqrt(tl.sum(v_new * v_new, 0) / V + norm_eps)
    hidden = tl.sum(v_new[:, None] * down_weight.to(tl.float32), 0) * inverse_rms
    logits = tl.sum(hidden[:, None] * up_weight.to(tl.float32), 0) + shift.to(tl.float32)
    decays = tl.exp(bounded_log_decay(logits, inverse_normalizer, bound))
    if write_weight is not None:
        write1 = tl.sigmoid(tl.sum(v_new * write_weight1.to(tl.float32), 0) * inverse_rms + write1.to(tl.float32))
        write2 = tl.sigmoid(tl.sum(v_new * write_weight2.to(tl.float32), 0) * inverse_rms + write2.to(tl.float32))
    else:
        write1, write2 = 1.0, 1.0

    sums = _no_sums(R, BM, BV, ROWS, FEW)
    for start in tl.static_range(0, CHANNELS, KC):
        part = first_channel + start + tl.arange(0, KC)
        state1, state2 = next1, next2
        if start + KC < CHANNELS:  # before this part is stored: a load does not pass a store that may be to the same place
            next1, next2 = _load_states(recurrent, part + KC, values, value_ok, K, V)
        if start > 0:
            k_part = tl.load(k + part, mask=part < K, other=0.0)
            queries = _load_queries(q, part, group, group_ok, K, R, FEW)
        k_part = k_part.to(tl.float32)
        gate = start + tl.arange(0, KC)
        if PARTS == 1:
            gate = gate % G
        state1 = state1 * tl.gather(decays, gate, 0)[:, None] + (k_part * write1)[:, None] * v_new[None, :]
        state2 = state2 * tl.gather(decays, BG + gate, 0)[:, None] + (k_part * write2)[:, None] * v_new[None, :]
        pointers = recurrent + part[:, None] * V + values[None, :]
        mask = (part < K)[:, None] & value_ok[None, :] & is_real
        tl.store(pointers, state1, mask=mask)
        tl.store(pointers + K * V, state2, mask=mask)
        sums = _add_products(sums, queries, mix1, mix2, state1, state2, scale, R, ROWS, FEW, GATE_PRECISION)
    if PARTS == 1:
        result = _normed(_finished(sums, group, R, BM, BV, FEW), weight, norm_eps, V)
        result = tl.where(is_real, result, 0.0)
        store_ok = group_ok[:, None] & value_ok[None, :]
        tl.store(o + (row * HKV * R + heads)[:, None] * V + values[None, :], result.to(o.dtype.element_ty), mask=store_ok)
    else:
        pieces += (row * HKV + head) * R * STRIDE * V
        _store_pieces(pieces, sums, piece, group, group_ok, values, value_ok, R, V, ROWS, PIECES, STRIDE, FEW)


class Launch(NamedTuple):
    """How a head is worked through."""

    warps: int
    channels: int  # of both states in registers at a time, beside as many on their way
    slots: int = 64  # of the ring at a time
    registers: int | None = None  # a thread at most, so that more programs share a processor
    parts: int = 1  # programs a head; a power of two
    overlap: bool = True  # the join is launched while the parts still run, where the device can


tuned: Launch | None = None  # overrules the choice, for measurements
LEAST_CHANNELS = 16  # a part


def round_to_power(x: float) -> int:
    """The power of two next to a positive number, by ratio."""
    return int(2 ** round(math.log2(x)))


def choose_launch(programs: int, processors: int, key_dim: int, value_dim: int, slots: int, element_size: int) -> Launch:
    """By shape: programs of one row and KV head each, padded head sizes, slots of the ring (0 without one).

    Few heads are shared by about as many programs as there are processors, with all bytes of a part on their way at once: what
    counts is the latency. With many, programs have parts of 16 or 32 KB on their way, and so few registers that several share a
    processor and one computes while the others wait. With a window a head always has programs of its own for window and states:
    on an H200 four parts were faster than one up to 64 rows of 32 heads.
    """
    registers = 128 if value_dim <= 128 and element_size == 2 else None
    parts = min(max(1, round_to_power(processors / programs)), key_dim // LEAST_CHANNELS)
    if tuned is not None:
        chosen = tuned
    elif slots:
        chosen = Launch(4, max(16, 4096 // value_dim), 32, registers, max(parts, 4))
    elif parts > 1:
        chosen = Launch(4, max(16, 4096 // value_dim), 32, registers, parts)
    else:
        chosen = Launch(4, 16, registers=128 if value_dim <= 128 else None)
    parts = min(chosen.parts, key_dim // LEAST_CHANNELS)
    return chosen._replace(parts=parts, channels=min(chosen.channels, key_dim // parts))


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
    mix_logits: Tensor,
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
    size, sinks = window_size // 2, window_k.shape[1] - window_size
    block = max(16, triton.next_power_of_2(window_size))
    launch, sizes = _sizes(q, v, k.shape[2], down, bias, real, block)
    tile = min(largest_tile(q, v), 32, max(16, triton.next_power_of_2(size)))  # seldom: rather twice than with many registers
    dot, precision = dot_type(q.dtype)
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    rows = max(16, sizes["BM"])  # of a product of tiles
    channels = bias.shape[-1] if launch.parts == 1 else sizes["CHANNELS"]
    pieces = softmax = None
    if launch.parts > 1:
        pieces = _pieces(q, v, sizes["STRIDE"])
        softmax = torch.empty(q.shape[0] * q.shape[2], 2, sizes["SLOT_PARTS"], device=q.device)
    _window_decode_kernel[(q.shape[0] * k.shape[2], launch.parts + sizes["SLOT_PARTS"])](
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
        mix_logits,
        norm_weight,
        state_gain,
        state_bias,
        sink_logits,
        o,
        pieces,
        softmax,
        scale,
        softcap,
        norm_eps,
        1.0 / gate_normalizer,
        lower_bound,
        **sizes | {"BM": rows},
        BK=max(16, triton.next_power_of_2(q.shape[-1])),
        S=sinks,
        BS=max(_least_columns(rows), triton.next_power_of_2(sinks)),
        W=window_size,
        SLOTS=window_size if launch.parts == 1 else block // sizes["SLOT_PARTS"],
        BN=max(_least_columns(rows), min(launch.slots, block if launch.parts == 1 else block // sizes["SLOT_PARTS"])),
        SIZE=size,
        C=tile,
        PER_BLOCK=triton.cdiv(size, tile),
        GC=min(largest_tile(q, v), max(_least_columns(tile), triton.next_power_of_2(channels))),
        DOT=dot,
        PRECISION=precision,
        num_warps=launch.warps,
        maxnreg=launch.registers,
        num_stages=1,
    )
    if pieces is not None:
        _join(pieces, softmax, lengths, real, norm_weight, state_gain, state_bias, o, norm_eps, sizes, size, launch)
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
    mix_logits: Tensor,
    norm_weight: Tensor,
    gate_normalizer: float,
    lower_bound: float,
    scale: float,
    norm_eps: float,
) -> Tensor:
    launch, sizes = _sizes(q, v, k.shape[2], down, bias, real)
    o = q.new_empty(*q.shape[:3], v.shape[-1])
    pieces = None if launch.parts == 1 else _pieces(q, v, sizes["STRIDE"])
    _pure_decode_kernel[(q.shape[0] * k.shape[2], launch.parts)](
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
        mix_logits,
        norm_weight,
        o,
        pieces,
        scale,
        norm_eps,
        1.0 / gate_normalizer,
        lower_bound,
        **sizes,
        BG=max(16, triton.next_power_of_2(bias.shape[-1])) if launch.parts == 1 else sizes["CHANNELS"],
        num_warps=launch.warps,
        maxnreg=launch.registers,
        num_stages=1,
    )
    if pieces is not None:
        _join(pieces, None, None, real, norm_weight, None, None, o, norm_eps, sizes, 0, launch)
    return o


@_window_decode.register_fake
def _(q, k, v, *others):
    return q.new_empty(*q.shape[:3], v.shape[-1])


@_pure_decode.register_fake
def _(q, k, v, *others):
    return q.new_empty(*q.shape[:3], v.shape[-1])


def _sizes(q, v, kv_heads, down, bias, real, slots=0):
    group, rank = q.shape[2] // kv_heads, down.shape[-1]
    few = group <= FEW_HEADS
    block_key, block_value = max(16, triton.next_power_of_2(q.shape[-1])), padded(v.shape[-1])
    launch = choose_launch(q.shape[0] * kv_heads, processors(q.device), block_key, block_value, slots, q.element_size())
    rows = min(launch.channels, max(1, 128 * launch.warps // block_value))  # threads load 4 values at a time
    pieces = launch.parts * (rows if few else 1)
    slot_parts = 0
    if launch.parts > 1 and slots:  # of about as many bytes as those of the states
        slot_parts = triton.next_power_of_2(max(1, launch.parts * slots * q.element_size() // (4 * block_value)))
        slot_parts = min(slot_parts, slots // 16)
    return launch, {
        "HKV": kv_heads,
        "R": group,
        "BM": triton.next_power_of_2(group) if few else max(16, triton.next_power_of_2(group)),
        "K": q.shape[-1],
        "V": v.shape[-1],
        "G": bias.shape[-1],
        "RANK": rank,
        "BR": max(16, triton.next_power_of_2(rank)),
        "BV": block_value,
        "CHANNELS": q.shape[-1] if launch.parts == 1 else block_key // launch.parts,
        "KC": launch.channels,
        "ROWS": rows,
        "PIECES": pieces,
        "PARTS": launch.parts,
        "STRIDE": pieces + slot_parts,  # pieces of a query head
        "FEW": few,
        "GATE_PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
        "OVERLAP": launch.parts > 1 and _can_overlap(q.device),
        "SKIP": real is not None and q.shape[0] > FEW_ROWS,
        **({"SLOT_PARTS": slot_parts} if slots else {}),
    }


def _least_columns(rows: int) -> int:
    """Of a matrix product: with 64 rows Triton 3.6 multiplies on Hopper's tensor cores, and goes wrong with 16 columns."""
    return 32 if rows >= 64 else 16


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before it runs and wait for it there: from Hopper on."""
    return not INTERPRETED and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def _pieces(q: Tensor, v: Tensor, count: int) -> Tensor:
    return torch.empty(q.shape[0] * q.shape[2], count, v.shape[-1], device=q.device)


def _join(pieces, softmax, lengths, real, norm_weight, state_gain, state_bias, o, norm_eps, sizes, size, launch):
    _join_kernel[(pieces.shape[0],)](
        pieces,
        softmax,
        lengths,
        real,
        norm_weight,
        state_gain,
        state_bias,
        o,
        norm_eps,
        HQ=o.shape[2],
        **{name: sizes[name] for name in ("V", "BV", "PIECES", "STRIDE", "OVERLAP")},
        SLOT_PARTS=sizes.get("SLOT_PARTS", 0),
        SIZE=size,
        num_warps=max(1, sizes["PIECES"] * sizes["BV"] // 4096),  # one warp adds without a barrier
        **{"launch_pdl": True} if sizes["OVERLAP"] and launch.overlap else {},
    )


def window_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    recurrent: Tensor,
    window_k: Tensor,
    window_v: Tensor,
    lengths: Tensor,
    gates: GateWeights,
    mix_logits: Tensor,
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
        mix_logits `[Hq, 2]`, whose softmax is the mix of the states; norm_weight `[Hq, V]`, state_gain and state_bias `[Hq]`: see
            `reference.fused_window_attention`.
        padding_mask: `[B, 1]`; a padded token leaves no trace and its output is zero.
        softcap, sink_logits `[Hq]`: of the window's softmax, see `reference.dual_state_window_attention`.
        advance: also count the token in `lengths`; False leaves it to the caller, for example once for all layers.

    Returns:
        o `[B, 1, Hq, V]` in q's dtype.

    Raises:
        ValueError: names the argument that does not fit, before anything is launched. Tensors that change in place must be
            contiguous.
    """
    _check(q, k, v, recurrent, gates, mix_logits, norm_weight, padding_mask)
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
    real = None if padding_mask is None else _bytes(padding_mask[:, -1])
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
        mix_logits.contiguous(),
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
    mix_logits: Tensor,
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
    _check(q, k, v, recurrent, gates, mix_logits, norm_weight, padding_mask)
    _check_in_place(recurrent=recurrent)
    return ops.pure_decode(
        q.contiguous(),
        k.contiguous(),
        v.contiguous(),
        recurrent,
        None if padding_mask is None else _bytes(padding_mask[:, -1]),
        *(None if x is None else x.contiguous() for x in gates),
        mix_logits.contiguous(),
        norm_weight.contiguous(),
        gate_normalizer,
        lower_bound,
        q.shape[-1] ** -0.5 if scale is None else scale,
        norm_eps,
    )


def _bytes(mask: Tensor) -> Tensor:
    """A mask as every backend can load it, without a launch where it is bool."""
    return mask.contiguous().view(torch.uint8) if mask.dtype == torch.bool else mask.to(torch.uint8)


def _check(q, k, v, recurrent, gates, mix_logits, norm_weight, padding_mask):
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
        ("mix_logits", mix_logits, (heads, 2), None),
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
