"""A block of tokens leaves the ring: its gates, and what it adds to the states."""

import triton
import triton.language as tl

from ...common import LOG2_E, bounded_log_decay, load_rows
from ..window.softmax import LN_2


@triton.jit
def decay_gate(logits, inverse_normalizer, bound, EXACT: tl.constexpr):
    """`bounded_log_decay`, or a shorter form whose absolute error is fp32's rounding of 1: enough for tokens in bf16."""
    if EXACT:
        return bounded_log_decay(logits, inverse_normalizer, bound)
    else:  # where exp2 overflows, the bound applies
        return tl.maximum(tl.log2(1 + tl.exp2(logits * -LOG2_E)) * (-LN_2 * inverse_normalizer), bound)


@triton.jit
def take_block(
    recurrent,
    ring,
    first,
    down,
    up,
    bias,
    write_weight,
    write_bias,
    head,
    first_channel,
    values,
    norm_eps,
    inverse_normalizer,
    bound,
    HKV,
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
            x = load_rows(ring[1], slots, taken, HKV * V, some, some < V).to(tl.float32)
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
        v_tile = load_rows(ring[1], slots, taken, HKV * V, values[0], values[1])
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
                log_decay = tl.where(taken[:, None], decay_gate(logits, inverse_normalizer, bound, GATE_PRECISION == "ieee"), 0.0)
                decay = tl.exp(tl.sum(log_decay, 0))
                to_end = write[:, None] * tl.exp(tl.dot(behind, log_decay, input_precision="ieee"))
                for half in range(K // G if PAIRED else 1):
                    part = half * G + channel
                    k_part = load_rows(ring[0], slots, taken, HKV * K, part, channel_ok).to(tl.float32)
                    added = tl.trans((k_part * to_end).to(DOT))
                    pointers = recurrent + (state * K + part)[:, None] * V + values[0][None, :]
                    mask = channel_ok[:, None] & values[1][None, :]
                    # Before the first block the states are empty, whatever another text may have left there.
                    old = tl.load(pointers, mask=mask & (first + tile * C > 0), other=0.0)
                    new = tl.dot(added, v_tile.to(DOT), acc=old * decay[:, None], input_precision=PRECISION)
                    tl.store(pointers, new, mask=mask)
        if PER_BLOCK > 1:
            tl.debug_barrier()
