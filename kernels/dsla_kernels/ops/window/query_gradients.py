"""Gradients per query head: through gate and norm to the states' output and the scalars of the softmax, queries, parameters, sinks."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import COUNTS, LOG2_E, load_rows, number_of, numbers, store_rows, strides
from .inputs import WindowLayer
from .softmax import in_sinks, in_window, load_scores, query_program, query_tile, score_slope, state_gate


class QueryGradients(NamedTuple):
    """What the kernel writes, in its order; sums over tokens lie in a part a tile."""

    dq: Tensor
    d_state_output: Tensor | None  # u `[B, T, Hq, V]`; None where all states are empty
    alphas: Tensor | None  # fp32 [B, T, Hq]; this and what follows of the states is None of a window alone
    deltas: Tensor  # fp32 [B, T, Hq]
    d_norm: Tensor | None  # fp32 [B, tiles, Hq, V]
    d_scalars: Tensor | None  # fp32 [B, tiles, Hq, 4]: mix 1, mix 2, gain, bias
    d_sink_k: Tensor | None  # fp32 [B, tiles, Hq, S, K]
    d_sink_v: Tensor | None
    d_sink_logits: Tensor | None  # fp32 [B, tiles, Hq]

    def parameters(self) -> tuple[Tensor | None, ...]:
        """Of mix, norm_weight, state_gain and state_bias."""
        if self.d_scalars is None or self.d_norm is None:
            return (None,) * 4
        scalars = self.d_scalars.sum((0, 1))
        return scalars[:, :2].clone(), self.d_norm.sum((0, 1)), scalars[:, 2].clone(), scalars[:, 3].clone()

    def sinks(self, kv_heads: int) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of sink_k, sink_v and sink_logits."""
        keys, values = (
            None if part is None else part.sum(1).unflatten(1, (kv_heads, -1)).sum(2).transpose(1, 2)
            for part in (self.d_sink_k, self.d_sink_v)
        )
        return keys, values, None if self.d_sink_logits is None else self.d_sink_logits.sum((0, 1))


@triton.jit
def _query_step(scores, visible, log_denominator, d_window, delta, k_tile, v_tile, dq, softcap, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """Weights and score gradients `[C, BN]` of one tile of keys, and dq with its share."""
    weights = tl.where(visible, tl.exp2(scores - log_denominator[:, None] * LOG2_E), 0.0)
    d_weights = tl.dot(d_window, tl.trans(v_tile), input_precision=PRECISION)
    d_scores = weights * (d_weights - delta[:, None])
    if softcap is not None:
        d_scores *= score_slope(scores, softcap)
    d_scores = d_scores.to(DOT)
    return weights.to(DOT), d_scores, tl.dot(d_scores, k_tile, acc=dq, input_precision=PRECISION)


@triton.jit
def _through_gate(o_state, do_tile, delta, log_denominator, gain, bias, weight, norm_eps, V: tl.constexpr):
    """alpha `[C]`; delta as the window needs it; u `[C, BV]`; gradients of norm weight, gain and bias."""
    rms, log_rms, alpha = state_gate(o_state, log_denominator, gain, bias, norm_eps, V)
    normalised = o_state / rms[:, None]
    # With n = weight * normalised, o = (1 - alpha) o_window + alpha n: the gate's gradient needs no o_window,
    # d_gate = alpha (1 - alpha) do · (n - o_window) = alpha do · (n - o).
    d_n = tl.sum(do_tile * normalised * weight[None, :], 1)
    d_gate = alpha * (d_n - delta)
    d_normalised = do_tile * (alpha[:, None] * weight[None, :])
    d_log_rms = d_gate * gain - tl.sum(d_normalised * normalised, 1)
    u = (d_normalised + normalised * (d_log_rms / V)[:, None]) / rms[:, None]
    d_weight = tl.sum(do_tile * alpha[:, None] * normalised, 0)
    return alpha, delta - alpha * d_n + d_gate, u, d_weight, tl.sum(d_gate * log_rms, 0), tl.sum(d_gate, 0)


@triton.jit(do_not_specialize=COUNTS)
def _query_kernel(
    q, k, v,
    states,  # [N, boundaries, Hkv, 2, K, V] at every tile, or None
    mix, norm_weight, state_gain, state_bias, sink_k, sink_v, sink_logits, row_start, row_length, o, do, log_denominators,
    dq, d_state_output, alphas, deltas, d_norm, d_scalars, d_sink_k, d_sink_v, d_sink_logits,  # as `QueryGradients` has them
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, tiles, boundaries, scale, softcap, norm_eps,
    HKV, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, KC: tl.constexpr,
    S: tl.constexpr, BS: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    PER_BLOCK: tl.constexpr, FIRST_STATE: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, row, kv_head, head = query_program(HKV, R)
    block = tile // PER_BLOCK
    tokens, written, token_ok, first, tile_end, length = query_tile(tile, row, T, row_length, PER_BLOCK, SIZE, C)
    end = tl.minimum(tile_end, length)
    text_start = number_of(row_start, row, 0)

    columns, column_ok = numbers(0, K, BK)
    values, value_ok = numbers(0, V, BV)
    HQ = HKV * R
    flat = row * T * HQ + head
    part_offset = (row * tiles + tile) * HQ + head
    q += row * q_b + head * q_h
    k += row * k_b + kv_head * k_h
    v += row * v_b + kv_head * v_h

    do_tile = load_rows(do + flat * V, tokens, token_ok, HQ * V, values, value_ok).to(tl.float32)
    o_tile = load_rows(o + flat * V, tokens, token_ok, HQ * V, values, value_ok).to(tl.float32)
    log_denominator = tl.load(log_denominators + flat + tokens * HQ, mask=token_ok, other=0.0)
    delta = tl.sum(do_tile * o_tile, 1)  # becomes do_window · o_window minus the gradient of the log-denominator
    alpha = tl.zeros([C], tl.float32)
    dq_tile = tl.zeros([C, BK], tl.float32)
    u = tl.zeros([C, BV], tl.float32)
    d_weight = tl.zeros([BV], tl.float32)
    d_gain = 0.0
    d_bias = 0.0
    if states is not None:
        if (block >= FIRST_STATE) & (first < length):
            states += ((row * boundaries + tl.maximum(block - 1, 0) * PER_BLOCK) * HKV + kv_head) * 2 * K * V
            gain = tl.load(state_gain + head).to(tl.float32)
            bias = tl.load(state_bias + head).to(tl.float32)
            weight = tl.load(norm_weight + head * V + values, mask=value_ok, other=0.0).to(tl.float32)
            q_scaled = load_rows(q, tokens, token_ok, q_t, columns, column_ok).to(tl.float32) * scale
            o_state = tl.zeros([C, BV], tl.float32)
            for i in tl.range(0, 2, loop_unroll_factor=1, num_stages=1):
                state = load_rows(states + i * K * V, columns, column_ok, V, values, value_ok).to(DOT)
                query = (q_scaled * tl.load(mix + head * 2 + i).to(tl.float32)).to(DOT)
                o_state = tl.dot(query, state, acc=o_state, input_precision=PRECISION)
            alpha, delta, u, d_weight, d_gain, d_bias = _through_gate(
                o_state, do_tile, delta, log_denominator, gain, bias, weight, norm_eps, V
            )
            u_factor = u.to(DOT)
            for i in tl.range(0, 2, loop_unroll_factor=1, num_stages=1):
                state = load_rows(states + i * K * V, columns, column_ok, V, values, value_ok).to(DOT)
                d_query = tl.dot(u_factor, tl.trans(state), input_precision=PRECISION)
                tl.store(d_scalars + part_offset * 4 + i, tl.sum(tl.sum(d_query * q_scaled, 1), 0))
                dq_tile += d_query * tl.load(mix + head * 2 + i).to(tl.float32)
        store_rows(d_state_output + flat * V, tokens, written, HQ * V, values, value_ok, u)
    tl.store(deltas + flat + tokens * HQ, delta, mask=written)
    if alphas is not None:
        tl.store(alphas + flat + tokens * HQ, alpha, mask=written)
        tl.store(d_norm + part_offset * V + values, d_weight, mask=value_ok)
        tl.store(d_scalars + part_offset * 4 + 2, d_gain)
        tl.store(d_scalars + part_offset * 4 + 3, d_bias)
    if sink_logits is not None:
        sink_score = tl.load(sink_logits + head).to(tl.float32) - log_denominator
        tl.store(d_sink_logits + part_offset, -tl.sum(tl.where(token_ok, tl.exp(sink_score) * delta, 0.0), 0))

    q_tile = load_rows(q, tokens, token_ok, q_t, columns, column_ok).to(DOT)
    d_window = (do_tile * (1 - alpha)[:, None]).to(DOT)
    if S > 0:
        sink = tl.arange(0, BS)
        d_key = tl.zeros([BS, BK], tl.float32)
        d_value = tl.zeros([BS, BV], tl.float32)
        if text_start + end - 1 >= W:
            sinks_at = row * S * HKV + kv_head
            k_tile, v_tile, scores = load_scores(
                q_tile, sink_k + sinks_at * K, sink_v + sinks_at * V, sink, sink < S, HKV * K, HKV * V,
                columns, column_ok, values, value_ok, scale, softcap, DOT, PRECISION,
            )  # fmt: skip
            visible = in_sinks(sink, tokens, text_start, S, W) & token_ok[:, None]
            weights, d_scores, dq_tile = _query_step(
                scores, visible, log_denominator, d_window, delta, k_tile, v_tile, dq_tile, softcap, DOT, PRECISION
            )  # fmt: skip
            d_key = tl.dot(tl.trans(d_scores), q_tile, input_precision=PRECISION) * scale
            d_value = tl.dot(tl.trans(weights), d_window, input_precision=PRECISION)
        store_rows(d_sink_k + part_offset * S * K, sink, sink < S, K, columns, column_ok, d_key)
        store_rows(d_sink_v + part_offset * S * V, sink, sink < S, V, values, value_ok, d_value)
    for key_first in range(tl.maximum(first - W, 0), end, BN):
        keys = key_first + tl.arange(0, BN)
        k_tile, v_tile, scores = load_scores(
            q_tile, k, v, keys, keys < length, k_t, v_t, columns, column_ok, values, value_ok, scale, softcap, DOT, PRECISION
        )
        visible = in_window(keys[None, :], tokens[:, None], W) & token_ok[:, None]
        _, _, dq_tile = _query_step(
            scores, visible, log_denominator, d_window, delta, k_tile, v_tile, dq_tile, softcap, DOT, PRECISION
        )  # fmt: skip
    store_rows(dq + flat * K, tokens, written, HQ * K, columns, column_ok, dq_tile * scale)


def query_gradients(layer: WindowLayer, states: Tensor | None, o: Tensor, do: Tensor, log_denominators: Tensor) -> QueryGradients:
    """From the states at every tile boundary, the forward's results and the gradient of o."""
    inputs, sizes = layer.inputs, layer.sizes
    written = _buffers(layer, states is not None, o, log_denominators)
    _query_kernel[(layer.tiling.tiles * sizes["R"], layer.programs)](
        *layer.operands(states),
        o,
        do,
        log_denominators,
        *written,
        *strides(inputs.q, inputs.k, inputs.v),
        layer.tokens,
        layer.tiling.tiles,
        layer.boundaries(states),
        inputs.scale,
        inputs.softcap,
        inputs.norm_eps,
        **sizes,
        FIRST_STATE=layer.first_state,
        num_warps=8 if sizes["BV"] >= 128 else 4,
        num_stages=1,
    )
    return written


def _buffers(layer: WindowLayer, with_states: bool, o: Tensor, log_denominators: Tensor) -> QueryGradients:
    inputs, q = layer.inputs, layer.inputs.q

    def parts(*shape: int) -> Tensor:
        return q.new_empty(layer.batch, layer.tiling.tiles, *shape, dtype=torch.float32)

    return QueryGradients(
        dq=torch.empty(q.shape, dtype=q.dtype, device=q.device),
        d_state_output=torch.empty(o.shape, dtype=layer.state_inputs.dtype, device=o.device) if with_states else None,
        alphas=torch.empty_like(log_denominators) if layer.has_states else None,
        deltas=torch.empty_like(log_denominators),
        d_norm=parts(layer.heads, layer.sizes["V"]) if layer.has_states else None,
        # A tile that reads no states gives the mix nothing.
        d_scalars=parts(layer.heads, 4).zero_() if layer.has_states else None,
        d_sink_k=None if inputs.sink_k is None else parts(layer.heads, inputs.sink_k.shape[1], inputs.sink_k.shape[3]),
        d_sink_v=None if inputs.sink_v is None else parts(layer.heads, inputs.sink_v.shape[1], inputs.sink_v.shape[3]),
        d_sink_logits=None if inputs.sink_logits is None else parts(layer.heads),
    )
