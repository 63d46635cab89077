"""The layer without a window, forward: the states at every chunk, then all chunks side by side.

The pass over the states writes them on entry of every chunk. Then one program a chunk and query head (or two of a group) gives
the output. All exponents refer to the middle m of the chunk's cumulative log-decays b (`states.decays`): with Q = q exp(b - m),
K = k exp(m - b) and S~ = exp(m) S, which is what the pass writes, the output is Q S~ + tril(Q K^T) v, so one decayed copy of q
and of k serves all products.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._ops import add_op_namespace_prefix
from ...common import COUNTS, channel_columns, layer_head, load_rows, numbers, on_its_device, row_span, strides
from ...shapes import new_output
from ..operators import schema
from ..states.decays import decay_keys
from .inputs import ChunkInputs, ChunkLayer


@triton.jit(do_not_specialize=COUNTS)
def _chunk_kernel(
    q, v, query_factors, keys, mix, row_first, row_length,
    states,  # exp(m) S `[N, tiles, Hkv, 2, K, V]`
    kv_heads,  # [Hkv] or None: v is of these heads alone
    o,
    q_b, q_t, q_h, v_b, v_t, v_h,
    T, length, tiles, scale,
    HKV, R: tl.constexpr, K: tl.constexpr, V: tl.constexpr, G: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    # HEADS query heads of a group one below the other in one tile; those of the whole group side by side: they share keys, values,
    # factors and states.
    SPLIT: tl.constexpr = R // HEADS
    tile, value_tile, row_head = tl.program_id(0) // SPLIT, tl.program_id(1), tl.program_id(2)
    row, kv_head = row_head // HKV, row_head % HKV
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    if tile * C >= length:
        return
    row = row.to(tl.int64)
    rows = tl.arange(0, HEADS * C)
    tokens = tile * C + rows % C
    heads = kv_head * R + tl.program_id(0) % SPLIT * HEADS + rows // C
    token_ok = tokens < length
    keys_at = tile * C + tl.arange(0, C)
    channels, channel_ok, gates = channel_columns(K, G, BK)
    values, value_ok = numbers(value_tile * BV, V, BV)
    query_factors += (flat * HKV + kv_head) * 2 * G
    keys += (flat * HKV + kv_head) * 2 * K
    states += ((row * tiles + tile) * HKV + kv_head) * 2 * K * V
    places = q + batch * q_b + first * q_t + tokens.to(tl.int64) * q_t + heads * q_h
    q_tile = tl.load(places[:, None] + channels[None, :], mask=token_ok[:, None] & channel_ok[None, :], other=0.0).to(tl.float32)
    scores = tl.zeros([HEADS * C, C], tl.float32)
    output = tl.zeros([HEADS * C, BV], tl.float32)
    for i in tl.range(0, 2, loop_unroll_factor=HEADS):  # two heads have warps enough to hold both states on their way
        factors = load_rows(query_factors + i * G, tokens, token_ok, HKV * 2 * G, gates, channel_ok).to(tl.float32)
        key = load_rows(keys + i * K, keys_at, keys_at < length, HKV * 2 * K, channels, channel_ok)
        state = load_rows(states + i * K * V, channels, channel_ok, V, values, value_ok)
        share = tl.load(mix + heads * 2 + i).to(tl.float32) * scale
        query = (q_tile * (factors * share[:, None])).to(DOT)
        scores = tl.dot(query, tl.trans(key), acc=scores, input_precision=PRECISION)
        output = tl.dot(query, state, acc=output, input_precision=PRECISION)
    v += batch * v_b + first * v_t + layer_head(kv_heads, kv_head) * v_h
    v_tile = load_rows(v, keys_at, keys_at < length, v_t, values, value_ok).to(DOT)
    scores = tl.where(tokens[:, None] >= keys_at[None, :], scores, 0.0).to(DOT)
    output = tl.dot(scores, v_tile, acc=output, input_precision=PRECISION)
    places = o + (flat + tokens.to(tl.int64)) * HKV * R * V + heads * V
    tl.store(places[:, None] + values[None, :], output.to(o.dtype.element_ty), mask=token_ok[:, None] & value_ok[None, :])


@torch.library.custom_op(add_op_namespace_prefix("chunk_forward"), mutates_args=(), schema=schema(ChunkInputs, "(Tensor, Tensor)"))
@on_its_device
def chunk_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """o `[B, T, Hq, V]` and the final state (empty if not asked for), from `ChunkInputs`."""
    inputs = ChunkInputs(*arguments)
    q, v = inputs.q, inputs.v
    layer = ChunkLayer(inputs)
    o = new_output(q, v)
    final = layer.state_inputs.state_buffer(layer.state_inputs.rows) if inputs.output_final_state else None
    decayed = decay_keys(layer.state_inputs, layer.tiling)
    states = layer.states(decayed, final)
    together = 2 if layer.group % 2 == 0 and q.dtype == torch.bfloat16 else 1
    _chunk_kernel[(layer.tiling.tiles * layer.group // together, layer.value_tiles, layer.programs)](
        q,
        v,
        decayed.query_factors,
        decayed.keys,
        inputs.mix,
        inputs.row_first,
        inputs.row_length,
        states,
        inputs.kv_heads,
        o,
        *strides(q, v),
        *layer.counts,
        **layer.sizes,
        HEADS=together,
        num_warps=4 * together,
        num_stages=1,
    )
    return o, o.new_empty(0, dtype=torch.float32) if final is None else final


@chunk_forward.register_fake
def _(*arguments):
    inputs = ChunkInputs(*arguments)
    q, v, states = inputs.q, inputs.v, inputs.of_states
    final = states.state_buffer(states.rows) if inputs.output_final_state else q.new_empty(0, dtype=torch.float32)
    return new_output(q, v), final
