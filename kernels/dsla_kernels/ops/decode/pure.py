"""A token through the layer without a window: its states decay, take the token in and are read in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from ..._ops import add_op_namespace_prefix
from ...common import COUNTS, bounded_log_decay, layer_head, load_rows, numbers, on_its_device
from ..operators import schema
from .launch import plan_pure
from .output import join_kernel, make_pieces, normed, output_of, store_output, store_pieces
from .states import add_products, finished, load_mix, load_queries, load_states, no_sums
from .step import TENSORS, PureStep


@triton.jit(do_not_specialize=COUNTS)
def _pure_decode_kernel(
    q,
    k,
    v,
    recurrent,  # fp32 [B, HELD, 2, K, V]
    lengths,  # int64 [B], with pages
    real,  # uint8 [B] or None
    down,
    up,
    bias,
    write_weight,
    write_bias,
    mix_logits,
    norm_weight,
    kv_heads,  # [Hkv] or None: k and v are of these heads alone
    state_heads,  # [Hkv] or None: of the heads of the states these
    pages,  # int32 [B] or None: the states have pages in place of rows, and these are the rows'
    o,
    pieces,  # for the join; None if one program does it all
    q_row,
    k_row,
    v_row,
    o_row,
    recurrent_page,
    scale,
    norm_eps,
    inverse_normalizer,
    bound,
    HELD,  # heads that the states have, HKV at least
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
    BG: tl.constexpr,  # decays of a state that the program needs
):
    row, head = (tl.program_id(0) // HKV).to(tl.int64), tl.program_id(0) % HKV
    piece = 0
    if PARTS > 1:
        piece = tl.program_id(1)
        if OVERLAP:
            gdc_launch_dependents()
    first_channel = piece * CHANNELS
    group = numbers(0, R, BM)
    heads = head * R + group[0]
    values = numbers(0, V, BV)
    value, value_ok = values
    rank = tl.arange(0, BR)
    q += row * q_row + head * R * K
    k += row * k_row + layer_head(kv_heads, head) * K
    v += row * v_row + layer_head(kv_heads, head) * V
    o += row * o_row
    is_real = True
    if pages is not None:
        found = tl.load(pages + row).to(tl.int64)
        is_real = found >= 0
        recurrent += tl.maximum(found, 0) * recurrent_page
    else:
        recurrent += row * HELD * 2 * K * V
    recurrent += layer_head(state_heads, head) * 2 * K * V

    # All first loads at once, what the gates need in front of the states: a single row waits for memory once.
    if real is not None:
        is_real = is_real & (tl.load(real + row) != 0)
    if SKIP:  # noqa: SIM102 (known at compile time, the other is not)
        if not is_real:
            if PARTS == 1:
                store_output(o, tl.zeros([BM, BV], tl.float32), heads, group[1], values, V)
            return
    v_new = tl.load(v + value, mask=value_ok, other=0.0)
    down_weight = load_rows(down + head * V * RANK, value, value_ok, RANK, rank, rank < RANK)
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
        write_weight1 = tl.load(write_weight + (head * V + value) * 2, mask=value_ok, other=0.0)
        write_weight2 = tl.load(write_weight + (head * V + value) * 2 + 1, mask=value_ok, other=0.0)
        write1 = tl.load(write_bias + head * 2)
        write2 = tl.load(write_bias + head * 2 + 1)
    mixes = load_mix(mix_logits + head * R * 2, group, R, FEW)
    weight = load_rows(norm_weight, heads, group[1], V, value, value_ok)
    part = first_channel + tl.arange(0, KC)
    k_part = tl.load(k + part, mask=part < K, other=0.0)
    queries = load_queries(q, part, group, K, R, FEW)
    next1, next2 = load_states(recurrent, part, values, K, V)
    begun = True
    if lengths is not None:
        begun = tl.load(lengths + row) > 0

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

    sums = no_sums(R, BM, BV, ROWS, FEW)
    for start in tl.static_range(0, CHANNELS, KC):
        part = first_channel + start + tl.arange(0, KC)
        state1, state2 = next1, next2
        if start + KC < CHANNELS:  # before this part is stored: a load does not pass a store that may be to the same place
            next1, next2 = load_states(recurrent, part + KC, values, K, V)
        if start > 0:
            k_part = tl.load(k + part, mask=part < K, other=0.0)
            queries = load_queries(q, part, group, K, R, FEW)
        if lengths is not None:
            state1, state2 = tl.where(begun, state1, 0.0), tl.where(begun, state2, 0.0)
        k_part = k_part.to(tl.float32)
        gate = start + tl.arange(0, KC)
        if PARTS == 1:
            gate = gate % G
        state1 = state1 * tl.gather(decays, gate, 0)[:, None] + (k_part * write1)[:, None] * v_new[None, :]
        state2 = state2 * tl.gather(decays, BG + gate, 0)[:, None] + (k_part * write2)[:, None] * v_new[None, :]
        pointers = recurrent + part[:, None] * V + value[None, :]
        mask = (part < K)[:, None] & value_ok[None, :] & is_real
        tl.store(pointers, state1, mask=mask)
        tl.store(pointers + K * V, state2, mask=mask)
        sums = add_products(sums, queries, mixes, state1, state2, scale, R, ROWS, FEW, GATE_PRECISION)
    if PARTS == 1:
        result = normed(finished(sums, group, R, BM, BV, FEW), weight, norm_eps, V)
        result = tl.where(is_real, result, 0.0)
        store_output(o, result, heads, group[1], values, V)
    else:
        pieces += (row * HKV + head) * R * STRIDE * V
        store_pieces(pieces, sums, piece, group, values, R, V, ROWS, PIECES, STRIDE, FEW)


CHANGED = ("recurrent", "out")


@torch.library.custom_op(add_op_namespace_prefix("pure_decode"), mutates_args=CHANGED, schema=schema(PureStep, "Tensor", changed=CHANGED))
@on_its_device
def _pure_decode(*fields) -> Tensor:
    step = PureStep(*fields)
    plan = plan_pure(step)
    o, returned = output_of(step)
    pieces, _ = make_pieces(step.q, plan.head)
    _pure_decode_kernel[plan.grid](
        *step[: TENSORS[PureStep]],
        o,
        pieces,
        *(x.stride(0) for x in (step.q, step.k, step.v, o)),
        0 if step.pages is None else step.recurrent.stride(0),
        step.scale,
        step.norm_eps,
        1.0 / step.gate_normalizer,
        step.lower_bound,
        HELD=step.recurrent.shape[1],
        **plan.options,
    )
    if pieces is not None:
        join_kernel[(pieces.shape[0],)](
            pieces, None, None, step.real, step.pages, step.norm_weight, None, None, o, o.stride(0), step.norm_eps, **plan.join
        )
    return returned


@_pure_decode.register_fake
def _(*fields):
    return output_of(PureStep(*fields))[1]
