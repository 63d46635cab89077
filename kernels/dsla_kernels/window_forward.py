"""The layer with a softmax window in Triton: window, states, norm and the gate between them, from q, k, v to the output.

The state pass (`states.py`) writes the states at block boundaries; then every tile of queries of a head runs by itself: softmax
over the window and the sinks, one product with the states of two blocks before, norm, gate. No decayed product is needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._ops import add_op_namespace_prefix
from .common import (
    LOG2_E,
    Tiling,
    largest_tile,
    load_rows,
    make_heads,
    make_tiling,
    on_its_device,
    padded,
    store_rows,
)
from .decays import Decayed
from .states import StateInputs, entering_states, value_tile

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
def _window_softmax(
    q_tile,
    k,
    v,
    sink_k,
    sink_v,
    sink_logit,  # of the head, or None
    k_t,
    v_t,
    first,
    end,
    tokens,
    length,
    text_start,
    scale,
    softcap,
    columns,
    column_ok,
    values,
    value_ok,
    HKV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    S: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
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
            k_tile = load_rows(sink_k, sink, sink < S, HKV * K, columns, column_ok).to(DOT)
            v_tile = load_rows(sink_v, sink, sink < S, HKV * V, values, value_ok).to(DOT)
            scores = softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, softcap)
            visible = (sink[None, :] <= text_start + tokens[:, None] - W) & (sink[None, :] < S)
            top, denominator, o = softmax_step(scores, visible, v_tile, top, denominator, o, DOT, PRECISION)
    for key_first in range(tl.maximum(first - W, 0), end, BN):
        keys = key_first + tl.arange(0, BN)
        k_tile = load_rows(k, keys, keys < length, k_t, columns, column_ok).to(DOT)
        v_tile = load_rows(v, keys, keys < length, v_t, values, value_ok).to(DOT)
        scores = softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION), scale, softcap)
        visible = (keys[None, :] <= tokens[:, None]) & (keys[None, :] > tokens[:, None] - W)
        top, denominator, o = softmax_step(scores, visible, v_tile, top, denominator, o, DOT, PRECISION)
    # A query that lies behind its row's end sees nothing.
    denominator = tl.where(denominator > 0, denominator, 1.0)
    return o / denominator[:, None], (top + tl.log2(denominator)) * LN_2


@triton.jit
def state_gate(o_state, log_denominator, gain, bias, norm_eps, V: tl.constexpr):
    """rms of what the states give `[C]`, its logarithm, and their weight alpha, 0 for empty states."""
    rms = tl.sqrt(tl.sum(o_state * o_state, 1) / V + norm_eps)
    log_rms = tl.log(rms)
    alpha = tl.sigmoid(gain * log_rms + bias - log_denominator)
    return rms, log_rms, tl.where(tl.max(tl.abs(o_state), 1) > 0, alpha, 0.0)


@triton.jit
def _window_kernel(
    q,
    k,
    v,
    states,  # [N, boundaries, Hkv, 2, K, V] or None: all empty
    mix,
    norm_weight,
    state_gain,
    state_bias,
    sink_k,
    sink_v,
    sink_logits,  # [Hq] or None
    row_start,
    row_length,
    o,
    log_denominators,
    q_b,
    q_t,
    q_h,
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    T,
    boundaries,
    scale,
    softcap,  # or None
    norm_eps,
    HKV: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    KC: tl.constexpr,  # channels of a product with the states
    S: tl.constexpr,
    BS: tl.constexpr,
    W: tl.constexpr,
    SIZE: tl.constexpr,
    C: tl.constexpr,
    BN: tl.constexpr,
    PER_BLOCK: tl.constexpr,
    FIRST_STATE: tl.constexpr,  # first block whose states can hold something
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, row_head = tl.program_id(0) // R, tl.program_id(1)  # the heads of a group side by side: they share k, v and states
    row, kv_head = (row_head // HKV).to(tl.int64), row_head % HKV
    head = kv_head * R + tl.program_id(0) % R
    block = tile // PER_BLOCK
    inside = tile % PER_BLOCK * C + tl.arange(0, C)
    tokens = block * SIZE + inside
    first = block * SIZE + tile % PER_BLOCK * C
    length = T
    if row_length is not None:
        length = tl.load(row_length + row).to(tl.int32)
    text_start = 0
    if row_start is not None:
        text_start = tl.load(row_start + row).to(tl.int32)
    end = tl.minimum(tl.minimum(first + C, block * SIZE + SIZE), length)
    written = (inside < SIZE) & (tokens < T)
    token_ok = (inside < SIZE) & (tokens < length)

    columns = tl.arange(0, BK)
    column_ok = columns < K
    values = tl.arange(0, BV)
    value_ok = values < V
    q += row * q_b + head * q_h
    k += row * k_b + kv_head * k_h
    v += row * v_b + kv_head * v_h
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


class WindowLayer:
    """Shapes and launch parameters of one call, shared by its forward and backward."""

    def __init__(
        self, q, k, v, gate_logits, write_logits, state_mask, row_length, state_length, sink_k, window_size, gate_normalizer, lower_bound
    ):
        self.batch, self.tokens, self.heads = q.shape[:3]
        self.kv_heads = k.shape[2]
        self.size = window_size // 2
        self.row_length = row_length
        self.largest_tile = largest_tile(q, v)
        # Blocks that another whole block follows: what the states hold at the end, and all that a query reads of them.
        self.state_tokens = max(self.tokens // self.size - 1, 0) * self.size
        self.inputs = StateInputs(
            k, v, gate_logits, write_logits, state_mask, None, state_length, self.state_tokens, gate_normalizer, lower_bound
        )
        self.state_heads = make_heads(q, v, gate_logits, value_tile(k, v, k.shape[0] * k.shape[2]))
        self.value_tiles = triton.cdiv(self.state_heads.V, self.state_heads.BV)
        self.tiling = make_tiling(self.tokens, self.size, 1, q.device, None, self.largest_tile)
        sinks = 0 if sink_k is None else sink_k.shape[1]
        key_dim, value_dim = q.shape[-1], v.shape[-1]
        block_key = padded(key_dim)
        self.sizes = {
            "HKV": self.kv_heads,
            "R": self.heads // self.kv_heads,
            "K": key_dim,
            "V": value_dim,
            "BK": block_key,
            "BV": padded(value_dim),
            "KC": min(block_key, 64),
            "S": sinks,
            "BS": max(16, triton.next_power_of_2(sinks)),
            "W": window_size,
            "SIZE": self.size,
            "C": self.tiling.tile,
            "BN": min(64, max(16, triton.next_power_of_2(self.size))),
            "PER_BLOCK": self.tiling.per_block,
            "DOT": self.state_heads.DOT,
            "PRECISION": self.state_heads.PRECISION,
        }

    def state_tiling(self, segment_blocks: int, tokens: int | None = None) -> Tiling:
        """Segments of the states' tokens (or of the first `tokens` tokens), `segment_blocks` blocks each if that is not 0."""
        programs = self.batch * self.kv_heads * 2 * self.value_tiles
        return make_tiling(
            self.state_tokens if tokens is None else tokens,
            self.size,
            programs,
            self.inputs.k.device,
            segment_blocks or None,
            self.largest_tile,
        )

    def decayed(self) -> Decayed | None:
        """Keys of all tokens that the states take in; None for none."""
        return self.inputs.decayed(self.state_tiling(0)) if self.state_tokens else None

    def states(self, decayed, initial_state, final, segment_blocks: int, every_tile: bool = False) -> Tensor | None:
        """States at block (or tile) boundaries `[B, boundaries, Hkv, 2, K, V]`, None where all are empty; the last into `final`."""
        if not self.state_tokens:
            if final is not None:
                final.zero_() if initial_state is None else final.copy_(initial_state)
            return None if initial_state is None else initial_state.to(self.inputs.dtype)[:, None].contiguous()
        tiling = self.state_tiling(segment_blocks)
        entering = entering_states(self.inputs, tiling, self.state_heads, decayed, initial_state)
        every = 1 if every_tile else tiling.per_block
        states = self.inputs.state_buffer(self.batch, tiling.tiles // every + 1, dtype=self.inputs.dtype)
        if self.row_length is not None:
            states.zero_()  # what lies behind a short row's last boundary is read, and multiplied by zero
        self.inputs.launch(tiling, self.state_heads, decayed, entering, states=states, final=final, every=every)
        return states


@torch.library.custom_op(add_op_namespace_prefix("window_forward"), mutates_args=())
@on_its_device
def window_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    norm_weight: Tensor,
    state_gain: Tensor,
    state_bias: Tensor,
    write_logits: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    sink_logits: Tensor | None,
    initial_state: Tensor | None,
    state_mask: Tensor | None,
    row_length: Tensor | None,
    state_length: Tensor | None,
    row_start: Tensor | None,
    window_size: int,
    gate_normalizer: float,
    lower_bound: float,
    scale: float,
    norm_eps: float,
    softcap: float | None,
    output_final_state: bool,
    segment_blocks: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o `[B, T, Hq, V]`, log-denominators fp32 `[B, T, Hq]` and the final state (empty if not asked for)."""
    layer = WindowLayer(
        q, k, v, gate_logits, write_logits, state_mask, row_length, state_length, sink_k, window_size, gate_normalizer, lower_bound
    )
    o = q.new_empty(layer.batch, layer.tokens, layer.heads, v.shape[-1])
    log_denominators = q.new_empty(o.shape[:3], dtype=torch.float32)
    final = layer.inputs.state_buffer(layer.batch) if output_final_state else None
    states = layer.states(layer.decayed(), initial_state, final, segment_blocks)
    _window_kernel[(layer.tiling.tiles * layer.sizes["R"], layer.batch * layer.kv_heads)](
        q,
        k,
        v,
        states,
        mix,
        norm_weight,
        state_gain,
        state_bias,
        sink_k,
        sink_v,
        sink_logits,
        row_start,
        row_length,
        o,
        log_denominators,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        layer.tokens,
        1 if states is None else states.shape[1],
        scale,
        softcap,
        norm_eps,
        **layer.sizes,
        FIRST_STATE=2 if initial_state is None else 0,
        num_warps=4 if layer.sizes["BV"] <= 128 else 8,
        num_stages=1,
    )
    return o, log_denominators, o.new_empty(0, dtype=torch.float32) if final is None else final


@window_forward.register_fake
def _(q, k, v, *others):
    final = (k.shape[0], k.shape[2], 2, k.shape[3], v.shape[3]) if others[-2] else (0,)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32), q.new_empty(final, dtype=torch.float32)
