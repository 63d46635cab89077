"""The softmax over ring, sinks and the new token, and the token's place in the ring.

Arguments that belong together come as tuples: the ring's keys and values; query heads, columns of keys and values with the mask of those
that exist.
"""

import triton
import triton.language as tl

from ...common import LOG2_E, load_rows
from ..window.softmax import softmax_scores, softmax_step


@triton.jit
def load_slots(ring, slot, slot_ok, columns, values, HKV, K: tl.constexpr, V: tl.constexpr):
    k_tile = load_rows(ring[0], slot, slot_ok, HKV * K, columns[0], columns[1])
    return k_tile, load_rows(ring[1], slot, slot_ok, HKV * V, values[0], values[1])


@triton.jit
def attend(
    q_tile, k_tile, v_tile, visible, top, denominator, o, scale, softcap, DOT: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """One tile of slots; those that are not visible may hold anything. The compiler stages a factor of a product in shared memory
    where it is made: made here, of tiles that were loaded before, no load waits for another."""
    k_tile = tl.where(visible[:, None], k_tile, 0.0).to(DOT)
    v_tile = tl.where(visible[:, None], v_tile, 0.0).to(DOT)
    scores = softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, softcap)
    return softmax_step(scores, visible[None, :], v_tile, top, denominator, o, DOT, PRECISION)


@triton.jit
def begin_window(
    q,
    k,
    v,
    ring,
    first_slot,
    group,
    columns,
    values,
    HKV,
    K: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
    BN: tl.constexpr,
):
    """All first loads of the window: queries, the token, sinks (which count in the first part only) and the first slots."""
    q_tile = load_rows(q, group[0], group[1], K, columns[0], columns[1])
    k_new = tl.load(k + columns[0], mask=columns[1], other=0.0)
    v_new = tl.load(v + values[0], mask=values[1], other=0.0)
    sinks = ()
    if S > 0:
        sink = tl.arange(0, BS)
        sink_ok = (sink < S) & (first_slot == 0)
        sinks = load_slots(ring, sink, sink_ok, columns, values, HKV, K, V)
    slot = first_slot + tl.arange(0, BN)
    slots = load_slots(ring, S + slot, slot < W, columns, values, HKV, K, V)
    return q_tile, k_new, v_new, sinks, slots


@triton.jit
def attend_window(
    loaded,
    ring,
    sink_logits,
    length,
    first_slot,
    heads,
    columns,
    values,
    scale,
    softcap,
    HKV,
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
    q_tile = tl.where(heads[1][:, None], q_tile, 0.0).to(DOT)  # made here: see `attend`
    top = softmax_scores(tl.sum(q_tile.to(tl.float32) * k_new.to(tl.float32)[None, :], 1), scale, softcap)
    denominator = tl.full([BM], 1.0, tl.float32)
    o = tl.zeros([BM, BV], tl.float32) + v_new.to(tl.float32)[None, :]
    if sink_logits is not None:
        logit = tl.load(sink_logits + heads[0], mask=heads[1], other=0.0).to(tl.float32) * LOG2_E
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
            top, denominator, o = attend(
                q_tile, sinks[0], sinks[1], sink_visible, top, denominator, o, scale, softcap, DOT, PRECISION
            )  # fmt: skip
    k_tile, v_tile = slots
    for start in range(0, SLOTS, BN):
        slot = first_slot + start + tl.arange(0, BN)
        token = length - (length - slot + W) % W
        visible = (slot < W) & (token >= 0) & (token < length)
        top, denominator, o = attend(q_tile, k_tile, v_tile, visible, top, denominator, o, scale, softcap, DOT, PRECISION)
        if SLOTS > BN:
            slot += BN
            slot_ok = (slot < W) & (start + BN < SLOTS)
            k_tile, v_tile = load_slots(ring, S + slot, slot_ok, columns, values, HKV, K, V)
    return top, denominator, o


@triton.jit
def write_token(
    ring,
    k_new,
    v_new,
    length,
    columns,
    values,
    HKV,
    K: tl.constexpr,
    V: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
):
    """Into the ring and, of the first S tokens of a text, among the sinks. Other programs may read these slots before or after:
    they see neither token there."""
    here = (S + length % W) * HKV
    tl.store(ring[0] + here * K + columns[0], k_new, mask=columns[1])
    tl.store(ring[1] + here * V + values[0], v_new, mask=values[1])
    if length < S:
        tl.store(ring[0] + length * HKV * K + columns[0], k_new, mask=columns[1])
        tl.store(ring[1] + length * HKV * V + values[0], v_new, mask=values[1])
