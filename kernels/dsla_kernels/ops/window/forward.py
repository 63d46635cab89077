"""The layer with a softmax window, forward: window, states, norm and the gate between them, from q, k, v to the output.

The pass over the states writes them at block boundaries; then every tile of queries of a head runs by itself: softmax
over the window and the sinks, one product with the states of two blocks before, norm, gate. No decayed product is needed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._ops import add_op_namespace_prefix
from ...common import COUNTS, LOG2_E, layer_head, load_rows, number_of, numbers, on_its_device, store_rows, strides
from ...shapes import new_output
from ..operators import schema
from .inputs import WindowInputs, WindowLayer
from .softmax import LN_2, in_sinks, in_window, load_scores, query_program, query_tile, softmax_step, state_gate

SCHEMA = schema(WindowInputs, "(Tensor, Tensor, Tensor)")


@triton.jit
def _window_softmax(
    q_tile, k, v, sink_k, sink_v,
    sink_logit,  # of the head, or None
    k_t, v_t,
    first, end, tokens, length, text_start, scale, softcap, columns, column_ok, values, value_ok,
    HKV, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, S: tl.constexpr, BS: tl.constexpr, W: tl.constexpr,
    C: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Softmax attention of a tile of queries over window and sinks: output `[C, BV]` and log-denominator `[C]`."""
    top = tl.full([C], -1e30, tl.float32)
    denominator = tl.zeros([C], tl.float32)
    if sink_logit is not None:
        top = tl.maximum(top, sink_logit * LOG2_E)
        denominator += 1
    o = tl.zeros([C, BV], tl.float32)
    if S > 0:  # noqa: SIM102 (the first is decided at compile time)
        if text_start + end - 1 >= W:
            sink = tl.arange(0, BS)
            _, v_tile, scores = load_scores(
                q_tile, sink_k, sink_v, sink, sink < S, HKV * K, HKV * V,
                columns, column_ok, values, value_ok, scale, softcap, DOT, PRECISION,
            )  # fmt: skip
            visible = in_sinks(sink, tokens, text_start, S, W)
            top, denominator, o = softmax_step(scores, visible, v_tile, top, denominator, o, DOT, PRECISION)
    for key_first in range(tl.maximum(first - W, 0), end, BN):
        keys = key_first + tl.arange(0, BN)
        _, v_tile, scores = load_scores(
            q_tile, k, v, keys, keys < length, k_t, v_t, columns, column_ok, values, value_ok, scale, softcap, DOT, PRECISION
        )
        visible = in_window(keys[None, :], tokens[:, None], W)
        top, denominator, o = softmax_step(scores, visible, v_tile, top, denominator, o, DOT, PRECISION)
    # A query that lies behind its row's end sees nothing.
    denominator = tl.where(denominator > 0, denominator, 1.0)
    return o / denominator[:, None], (top + tl.log2(denominator)) * LN_2


@triton.jit(do_not_specialize=COUNTS)
def _window_kernel(
    q, k, v,
    states,  # [N, boundaries, Hkv, 2, K, V] or None: all empty
    mix, norm_weight, state_gain, state_bias, sink_k, sink_v,
    sink_logits,  # [Hq] or None
    row_start, row_length,
    kv_heads,  # [Hkv] or None: k and v are of these heads alone
    o, log_denominators,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    T, boundaries, scale,
    softcap,  # or None
    norm_eps,
    HKV, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    KC: tl.constexpr,  # channels of a product with the states
    S: tl.constexpr, BS: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    FIRST_STATE: tl.constexpr,  # first block whose states can hold something
    DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, row, kv_head, head = query_program(HKV, R)
    block = tile // PER_BLOCK
    tokens, written, token_ok, first, tile_end, length = query_tile(tile, row, T, row_length, PER_BLOCK, SIZE, C)
    end = tl.minimum(tile_end, length)
    text_start = number_of(row_start, row, 0)

    columns, column_ok = numbers(0, K, BK)
    values, value_ok = numbers(0, V, BV)
    q += row * q_b + head * q_h
    k += row * k_b + layer_head(kv_heads, kv_head) * k_h
    v += row * v_b + layer_head(kv_heads, kv_head) * v_h
    if S > 0:
        sink_k += (row * S * HKV + kv_head) * K
        sink_v += (row * S * HKV + kv_head) * V
    q_tile = load_rows(q, tokens, token_ok, q_t, columns, column_ok).to(DOT)
    sink_logit = None
    if sink_logits is not None:
        sink_logit = tl.load(sink_logits + head).to(tl.float32)
    o_window, log_denominator = _window_softmax(
        q_tile, k, v, sink_k, sink_v, sink_logit, k_t, v_t, first, end, tokens, length, text_start, scale, softcap,
        columns, column_ok, values, value_ok, HKV, K, V, BV, S, BS, W, C, BN, DOT, PRECISION,
    )  # fmt: skip

    result = o_window
    if states is not None:  # noqa: SIM102 (the first is decided at compile time)
        if (block >= FIRST_STATE) & (first < length):
            states += ((row * boundaries + tl.maximum(block - 1, 0)) * HKV + kv_head) * 2 * K * V
            mix1 = tl.load(mix + head * 2).to(tl.float32) * scale
            mix2 = tl.load(mix + head * 2 + 1).to(tl.float32) * scale
            o_state = tl.zeros([C, BV], tl.float32)
            for start in range(0, K, KC):
                part = start + tl.arange(0, KC)
                q_part = load_rows(q, tokens, token_ok, q_t, part, part < K).to(tl.float32)
                state1 = load_rows(states, part, part < K, V, values, value_ok).to(DOT)
                state2 = load_rows(states + K * V, part, part < K, V, values, value_ok).to(DOT)
                o_state = tl.dot((q_part * mix1).to(DOT), state1, acc=o_state, input_precision=PRECISION)
                o_state = tl.dot((q_part * mix2).to(DOT), state2, acc=o_state, input_precision=PRECISION)
            gain = tl.load(state_gain + head).to(tl.float32)
            bias = tl.load(state_bias + head).to(tl.float32)
            rms, log_rms, alpha = state_gate(o_state, log_denominator, gain, bias, norm_eps, V)
            weight = tl.load(norm_weight + head * V + values, mask=value_ok, other=0.0).to(tl.float32)
            result = o_window + alpha[:, None] * (o_state * (weight[None, :] / rms[:, None]) - o_window)

    result = tl.where(token_ok[:, None], result, 0.0)
    store_rows(o + (row * T * HKV * R + head) * V, tokens, written, HKV * R * V, values, value_ok, result)
    if log_denominators is not None:
        tl.store(log_denominators + (row * T * HKV * R + head) + tokens * HKV * R, log_denominator, mask=written)


@torch.library.custom_op(add_op_namespace_prefix("window_forward"), mutates_args=(), schema=SCHEMA)
@on_its_device
def window_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """o `[B, T, Hq, V]`, log-denominators fp32 `[B, T, Hq]` and the final state (empty if not asked for), from `WindowInputs`."""
    inputs = WindowInputs(*arguments)
    layer = WindowLayer(inputs)
    o, log_denominators, final = _results(inputs)
    states = layer.states(layer.decayed(), final if inputs.output_final_state else None)
    _window_kernel[(layer.tiling.tiles * layer.sizes["R"], layer.programs)](
        *layer.operands(states),
        inputs.kv_heads,
        o,
        log_denominators,
        *strides(inputs.q, inputs.k, inputs.v),
        layer.tokens,
        layer.boundaries(states),
        inputs.scale,
        inputs.softcap,
        inputs.norm_eps,
        **layer.sizes,
        FIRST_STATE=layer.first_state,
        num_warps=4 if layer.sizes["BV"] <= 128 else 8,
        num_stages=1,
    )
    return o, log_denominators, final


def _results(inputs: WindowInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Uninitialised."""
    q, k, v = inputs[:3]
    final = (k.shape[0], inputs.num_kv_heads, 2, k.shape[3], v.shape[3]) if inputs.output_final_state else (0,)
    return (
        new_output(q, v),
        q.new_empty(q.shape[:3], dtype=torch.float32),
        q.new_empty(final, dtype=torch.float32),
    )


@window_forward.register_fake
def _(*arguments):
    return _results(WindowInputs(*arguments))
