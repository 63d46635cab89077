"""From sums over states and window to the output of the layer: norm, gate, and the join of what several programs have left of a head."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from ...common import COUNTS, load_rows
from ...shapes import new_output
from ..window.softmax import LN_2, state_gate
from .launch import HeadSizes
from .step import PureStep, WindowStep


@triton.jit
def store_output(o, result, heads, group_ok, values, V: tl.constexpr):
    """Of query heads, into the row of o `[Hq, V]`."""
    pointers = o + heads[:, None] * V + values[0][None, :]
    tl.store(pointers, result.to(o.dtype.element_ty), mask=group_ok[:, None] & values[1][None, :])


@triton.jit
def normed(o_state, weight, norm_eps, V: tl.constexpr):
    """The output of the layer without a window."""
    rms = tl.sqrt(tl.sum(o_state * o_state, 1) / V + norm_eps)
    return o_state / rms[:, None] * weight.to(tl.float32)


@triton.jit
def gated(o_state, o_window, log_denominator, length, weight, gain, offset, norm_eps, SIZE: tl.constexpr, V: tl.constexpr):
    """The output of the layer with a window. A state holds a block once another whole one has followed it."""
    o_state = tl.where(length >= SIZE + SIZE, o_state, 0.0)
    rms, log_rms, alpha = state_gate(o_state, log_denominator, gain.to(tl.float32), offset.to(tl.float32), norm_eps, V)
    return o_window + alpha[:, None] * (o_state * weight.to(tl.float32) / rms[:, None] - o_window)


@triton.jit
def store_pieces(
    pieces,
    sums,
    part,
    group,
    values,
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
            tl.store(pieces + (r * STRIDE + piece)[:, None] * V + values[0][None, :], sums[r], mask=values[1][None, :])
    else:
        pointers = pieces + (group[0] * STRIDE + part)[:, None] * V + values[0][None, :]
        tl.store(pointers, sums, mask=group[1][:, None] & values[1][None, :])


@triton.jit(do_not_specialize=COUNTS)
def join_kernel(
    pieces,  # fp32 [B * Hq, STRIDE, V]: PIECES of the states, then SLOT_PARTS of the window
    softmax,  # fp32 [B * Hq, 2, SLOT_PARTS]: tops and denominators of the window; None without one
    lengths,
    real,
    pages,
    norm_weight,
    state_gain,
    state_bias,
    o,
    o_row,
    norm_eps,
    HQ,
    V: tl.constexpr,
    BV: tl.constexpr,
    PIECES: tl.constexpr,  # 0 of a window alone
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
    if pages is not None:
        is_real = is_real & (tl.load(pages + row) >= 0)
    if PIECES > 0:
        weight = load_rows(norm_weight, heads, one, V, values, value_ok)
    if PIECES > 0 and softmax is not None:
        length = tl.load(lengths + row).to(tl.int32)
        gain, offset = tl.load(state_gain + heads), tl.load(state_bias + heads)
    if OVERLAP:
        gdc_wait()
    pieces += number * STRIDE * V
    if PIECES > 0:
        state_pieces = load_rows(pieces, tl.arange(0, PIECES), tl.full([PIECES], 1, tl.int1), V, values, value_ok)
    if softmax is not None:
        part = tl.arange(0, SLOT_PARTS)
        window_pieces = load_rows(pieces, PIECES + part, part < SLOT_PARTS, V, values, value_ok)
        top = tl.load(softmax + number * 2 * SLOT_PARTS + part)
        denominators = tl.load(softmax + (number * 2 + 1) * SLOT_PARTS + part)
        highest = tl.max(top, 0)
        share = tl.exp2(top - highest)
        denominator = tl.sum(share * denominators, 0)
        result = (tl.sum(window_pieces * share[:, None], 0) / denominator)[None, :]
        if PIECES > 0:
            log_denominator = tl.zeros([1], tl.float32) + (highest + tl.log2(denominator)) * LN_2
            o_state = tl.sum(state_pieces, 0)[None, :]
            result = gated(o_state, result, log_denominator, length, weight, gain, offset, norm_eps, SIZE, V)
    else:
        result = normed(tl.sum(state_pieces, 0)[None, :], weight, norm_eps, V)
    result = tl.where(is_real, result, 0.0)
    store_output(o + row * o_row, result, heads, one, (values, value_ok), V)


def make_pieces(q: Tensor, sizes: HeadSizes) -> tuple[Tensor | None, Tensor | None]:
    """Room for what the join reads: sums in fp32 `[B * Hq, STRIDE, V]`, and `[B * Hq, 2, programs for the ring]` tops and denominators.
    None and None where one program does it all, the second also without a ring."""
    if sizes.PARTS == 1:
        return None, None
    heads, slot_parts = q.shape[0] * q.shape[2], sizes.STRIDE - sizes.PIECES
    pieces = torch.empty(heads, sizes.STRIDE, sizes.V, device=q.device)
    return pieces, torch.empty(heads, 2, slot_parts, device=q.device) if slot_parts else None


def output_of(step: PureStep | WindowStep) -> tuple[Tensor, Tensor]:
    """What a step writes to, and what its operator returns: that, or nothing where the caller has it."""
    o = new_output(step.q, step.v) if step.out is None else step.out
    return o, o if step.out is None else step.q.new_empty(0)
