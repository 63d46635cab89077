"""Softmax in base 2, a tile of keys at a time, over a window and sinks, and the gate between it and the states."""

import triton
import triton.language as tl

from ...common import LOG2_E, load_rows, number_of, tile_tokens

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """tanh to fp32's relative precision: by exponentials, and near 0, where those cancel, by its series."""
    small = tl.exp(-2 * tl.abs(x))
    large = (1 - small) / (1 + small)
    square = x * x
    series = -0.33333334 + square * (0.13333334 + square * (-0.05396825 + square * 0.02186949))
    return tl.where(square < 0.0625, x + x * square * series, tl.where(x < 0, -large, large))


@triton.jit
def softmax_scores(products, scale, softcap):
    """Scores in base 2 from products of queries and keys, capped unless softcap is None."""
    if softcap is None:
        return products * (scale * LOG2_E)
    else:
        return tanh(products * (scale / softcap)) * (softcap * LOG2_E)


@triton.jit
def score_slope(scores, softcap):
    """Derivative of capped scores in base 2 with respect to what they were before."""
    ratio = scores / (softcap * LOG2_E)
    return 1 - ratio * ratio


@triton.jit
def softmax_step(scores, visible, v_tile, top, denominator, o, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """One tile of keys of an online softmax in base 2."""
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp2(scores - new_top[:, None])
    rescale = tl.exp2(top - new_top)
    denominator = denominator * rescale + tl.sum(weights, 1)
    o = tl.dot(weights.to(DOT), v_tile, acc=o * rescale[:, None], input_precision=PRECISION)
    return new_top, denominator, o


@triton.jit
def load_scores(
    q_tile, k, v, keys, key_ok, k_t, v_t, columns, column_ok, values, value_ok, scale, softcap, DOT: tl.constexpr, PRECISION: tl.constexpr
):
    """A tile of keys and values, and the scores of a tile of queries, `[C, keys]`."""
    k_tile = load_rows(k, keys, key_ok, k_t, columns, column_ok).to(DOT)
    v_tile = load_rows(v, keys, key_ok, v_t, values, value_ok).to(DOT)
    return k_tile, v_tile, softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, softcap)


@triton.jit
def in_window(keys, queries, W: tl.constexpr):
    """Whether queries see keys of their window: themselves and the W - 1 tokens before."""
    return (keys <= queries) & (keys > queries - W)


@triton.jit
def in_sinks(sinks, tokens, text_start, S: tl.constexpr, W: tl.constexpr):
    """Whether the queries `tokens` see sinks, which lie before their window, `[C, BS]`."""
    return (sinks[None, :] <= text_start + tokens[:, None] - W) & (sinks[None, :] < S)


@triton.jit
def query_program(HKV, R: tl.constexpr):
    """Of a program: its tile, row, KV head and query head. The heads of a group lie side by side: they share keys, values and states."""
    row, kv_head = (tl.program_id(1) // HKV).to(tl.int64), tl.program_id(1) % HKV
    return tl.program_id(0) // R, row, kv_head, kv_head * R + tl.program_id(0) % R


@triton.jit
def query_tile(tile, row, T, row_length, PER_BLOCK: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """Tokens of a tile `[C]`; which of them are there and which are real; the first one, the end of the tile, and of the row."""
    length = number_of(row_length, row, T)
    tokens, in_block = tile_tokens(tile, PER_BLOCK, SIZE, C)
    start = tile // PER_BLOCK * SIZE
    first = start + tile % PER_BLOCK * C
    return tokens, in_block & (tokens < T), in_block & (tokens < length), first, tl.minimum(first + C, start + SIZE), length


@triton.jit
def state_gate(o_state, log_denominator, gain, bias, norm_eps, V: tl.constexpr):
    """rms of what the states give `[C]`, its logarithm, and their weight alpha, 0 for empty states."""
    rms = tl.sqrt(tl.sum(o_state * o_state, 1) / V + norm_eps)
    log_rms = tl.log(rms)
    alpha = tl.sigmoid(gain * log_rms + bias - log_denominator)
    return rms, log_rms, tl.where(tl.max(tl.abs(o_state), 1) > 0, alpha, 0.0)
