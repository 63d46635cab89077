"""A token through the layer with a softmax window: window and states are read, the token goes into the ring, a block into the states.
A window alone has no states: all that is theirs is left out when the kernel is compiled."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from ..._ops import add_op_namespace_prefix
from ...common import COUNTS, layer_head, load_rows, numbers, on_its_device
from ..operators import schema
from ..window.softmax import LN_2
from .gates import take_block
from .launch import plan_window
from .output import gated, join_kernel, make_pieces, output_of, store_output, store_pieces
from .ring import attend_window, begin_window, write_token
from .states import finished, load_mix, load_queries, load_states, read_states
from .step import TENSORS, WindowStep


@triton.jit(do_not_specialize=COUNTS)
def _window_decode_kernel(
    q,
    k,
    v,
    recurrent,  # fp32 [B, HELD, 2, K, V]; None of a window alone, as are all weights
    window_k,  # [B, S + W, HELD, K]
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
    kv_heads,  # [Hkv] or None: k and v are of these heads alone
    state_heads,  # [Hkv] or None: of the heads of states and ring these
    pages,  # int32 [B] or None: states and ring have pages in place of rows, and these are the rows'
    o,
    pieces,  # for the join, as are tops and denominators; None if one program does it all
    softmax,
    q_row,
    k_row,
    v_row,
    o_row,
    recurrent_page,
    window_k_page,
    window_v_page,
    scale,
    softcap,  # or None
    norm_eps,
    inverse_normalizer,
    bound,
    HELD,  # heads that states and ring have, HKV at least
    HKV,  # `HeadSizes`
    R: tl.constexpr,
    BM: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    G: tl.constexpr,
    RANK: tl.constexpr,
    BR: tl.constexpr,
    CHANNELS: tl.constexpr,
    KC: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    PARTS: tl.constexpr,
    STRIDE: tl.constexpr,
    FEW: tl.constexpr,
    GATE_PRECISION: tl.constexpr,
    OVERLAP: tl.constexpr,
    SKIP: tl.constexpr,
    S: tl.constexpr,  # `RingSizes`
    BS: tl.constexpr,
    W: tl.constexpr,
    SLOT_PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    GC: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row, head = (tl.program_id(0) // HKV).to(tl.int64), tl.program_id(0) % HKV
    group = numbers(0, R, BM)
    group_number, group_ok = group
    heads = head * R + group_number
    columns = numbers(0, K, BK)
    values = numbers(0, V, BV)
    value, value_ok = values
    store_ok = group_ok[:, None] & value_ok[None, :]
    q += row * q_row + head * R * K
    k += row * k_row + layer_head(kv_heads, head) * K
    v += row * v_row + layer_head(kv_heads, head) * V
    o += row * o_row
    held = layer_head(state_heads, head)
    is_real = True
    if pages is not None:
        found = tl.load(pages + row).to(tl.int64)
        is_real = found >= 0
        page = tl.maximum(found, 0)
        window_k += page * window_k_page
        window_v += page * window_v_page
    else:
        window_k += row * (S + W) * HELD * K
        window_v += row * (S + W) * HELD * V
    ring = window_k + held * K, window_v + held * V
    if recurrent is not None:
        mix_logits += head * R * 2
        if pages is not None:
            recurrent += page * recurrent_page
        else:
            recurrent += row * HELD * 2 * K * V
        recurrent += held * 2 * K * V
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
    if real is not None:
        is_real = is_real & (tl.load(real + row) != 0)
    if SKIP:  # noqa: SIM102 (known at compile time, the other is not)
        if not is_real:
            if PARTS == 1:
                store_output(o, tl.zeros([BM, BV], tl.float32), heads, group_ok, values, V)
            return
    if PARTS == 1:
        loaded = begin_window(q, k, v, ring, 0, group, columns, values, HELD, K, V, S, BS, W, BN)
        if recurrent is not None:
            mixes = load_mix(mix_logits, group, R, FEW)
            queries = load_queries(q, tl.arange(0, KC), group, K, R, FEW)
            states = load_states(recurrent, tl.arange(0, KC), values, K, V)
            gain = tl.load(state_gain + heads, mask=group_ok, other=0.0)
            offset = tl.load(state_bias + heads, mask=group_ok, other=0.0)
            weight = load_rows(norm_weight, heads, group_ok, V, value, value_ok)
        top, denominator, o_window = attend_window(
            loaded, ring, sink_logits, length, 0, (heads, group_ok), columns, values, scale, softcap, HELD, K, V, BM, BV, S, BS, W, SLOTS,
            BN, DOT, PRECISION,
        )  # fmt: skip
        result = o_window / denominator[:, None]
        if recurrent is not None:
            sums = read_states(
                recurrent, q, mixes, queries, states, 0, group, values, scale, R, BM, K, V, BV, CHANNELS, KC, ROWS, FEW, GATE_PRECISION,
            )  # fmt: skip
            log_denominator = (top + tl.log2(denominator)) * LN_2
            o_state = finished(sums, group, R, BM, BV, FEW)
            result = gated(o_state, result, log_denominator, length, weight, gain, offset, norm_eps, SIZE, V)
        result = tl.where(is_real, result, 0.0)
        store_output(o, result, heads, group_ok, values, V)
        if is_real:
            write_token(ring, loaded[1], loaded[2], length, columns, values, HELD, K, V, S, W)
    else:
        if piece < 0:
            loaded = begin_window(q, k, v, ring, number * SLOTS, group, columns, values, HELD, K, V, S, BS, W, BN)
            top, denominator, o_window = attend_window(
                loaded, ring, sink_logits, length, number * SLOTS, (heads, group_ok), columns, values, scale, softcap, HELD, K, V, BM, BV,
                S, BS, W, SLOTS, BN, DOT, PRECISION,
            )  # fmt: skip
            tl.store(pieces + (group_number * STRIDE + PIECES + number)[:, None] * V + value[None, :], o_window, mask=store_ok)
            tl.store(softmax + group_number * 2 * SLOT_PARTS + number, top, mask=group_ok)
            tl.store(softmax + (group_number * 2 + 1) * SLOT_PARTS + number, denominator, mask=group_ok)
            if is_real & (number == 0):
                write_token(ring, loaded[1], loaded[2], length, columns, values, HELD, K, V, S, W)
        elif recurrent is not None:
            part = first_channel + tl.arange(0, KC)
            mixes = load_mix(mix_logits, group, R, FEW)
            queries = load_queries(q, part, group, K, R, FEW)
            states = load_states(recurrent, part, values, K, V)
            sums = read_states(
                recurrent, q, mixes, queries, states, first_channel, group, values, scale, R, BM, K, V, BV, CHANNELS, KC, ROWS, FEW,
                GATE_PRECISION,
            )  # fmt: skip
            store_pieces(pieces, sums, piece, group, values, R, V, ROWS, PIECES, STRIDE, FEW)

    if recurrent is not None:
        length += 1
        if is_real & (length % SIZE == 0) & (length >= W) & (piece >= 0):
            # The older half of the ring: tokens length - W to length - W + SIZE - 1, none of them written above by any program.
            tl.debug_barrier()  # every thread has read the states
            take_block(
                recurrent, ring, length - W, down, up, bias, write_weight, write_bias, head, first_channel, values, norm_eps,
                inverse_normalizer, bound, HELD, K, V, G, CHANNELS, RANK, BR, GC, S, W, SIZE, C, PER_BLOCK, DOT, PRECISION, GATE_PRECISION,
            )  # fmt: skip


CHANGED = ("recurrent", "window_k", "window_v", "out")


@torch.library.custom_op(
    add_op_namespace_prefix("window_decode"), mutates_args=CHANGED, schema=schema(WindowStep, "Tensor", changed=CHANGED)
)
@on_its_device
def _window_decode(*fields) -> Tensor:
    step = WindowStep(*fields)
    plan = plan_window(step)
    o, returned = output_of(step)
    pieces, softmax = make_pieces(step.q, plan.head)
    _window_decode_kernel[plan.grid](
        *step[: TENSORS[WindowStep]],
        o,
        pieces,
        softmax,
        *(x.stride(0) for x in (step.q, step.k, step.v, o)),
        *(0 if x is None or step.pages is None else x.stride(0) for x in (step.recurrent, step.window_k, step.window_v)),
        step.scale,
        step.softcap,
        step.norm_eps,
        1.0 / step.gate_normalizer,
        step.lower_bound,
        HELD=step.window_k.shape[2],
        **plan.options,
    )
    if pieces is not None:
        join_kernel[(pieces.shape[0],)](
            pieces,
            softmax,
            step.lengths,
            step.real,
            step.pages,
            step.norm_weight,
            step.state_gain,
            step.state_bias,
            o,
            o.stride(0),
            step.norm_eps,
            **plan.join,
        )
    return returned


@_window_decode.register_fake
def _(*fields):
    return output_of(WindowStep(*fields))[1]
