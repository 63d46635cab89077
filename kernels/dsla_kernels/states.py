"""The state pass alone: the states at block boundaries, or only at the end of rows, in Triton.

The tokens of a row are cut into segments that run side by side. A first pass gives what each segment adds to both states and
its total decay; a small scan turns these into the states on entry of each segment; a second pass then goes through every
segment again from its entering state and writes the states at block boundaries. Where only the end is wanted (a fold), the
first pass and the scan are all; where one segment suffices, the second pass is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import (
    Heads,
    Tiling,
    as_bytes,
    check_kernel_inputs,
    largest_tile,
    load_log_decay,
    load_mask,
    load_rows,
    load_states,
    load_write_gate,
    make_heads,
    make_tiling,
    on_its_device,
    row_span,
    store_decays,
    store_states,
    unit_stride,
)


@triton.jit
def _take_in(state, v_t, k, write, log_decay, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """A state tile `[BV, BKH]` after a tile of tokens; no exponent is positive."""
    total = tl.sum(log_decay, 0)
    to_end = k * (write[:, None] * tl.exp(total[None, :] - tl.cumsum(log_decay, 0)))
    return tl.dot(v_t, to_end.to(DOT), acc=state * tl.exp(total)[None, :], input_precision=PRECISION)


@triton.jit
def _state_kernel(
    k,
    v,
    gate_logits,
    write_logits,
    mask,  # uint8 [B, T] or None
    row_first,  # [N] or None: rows are the batch's
    row_length,  # [N] or None: `length` for all
    entering,  # fp32 [N, segments, Hkv, 2, K, V]; written by ADDITIONS; None: zeros
    segment_decay,  # fp32 [N, segments, Hkv, 2, K], written by ADDITIONS
    states,  # [N, boundaries, Hkv, 2, K, V] or None
    final,  # fp32 [N, Hkv, 2, K, V] or None
    k_b,
    k_t,
    k_h,
    v_b,
    v_t,
    v_h,
    T,
    length,
    tiles,
    segments,
    boundaries,
    inverse_normalizer,
    bound,
    HKV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    KH: tl.constexpr,
    BKH: tl.constexpr,
    BV: tl.constexpr,
    SHARED: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,  # tokens of a block
    C: tl.constexpr,  # of a tile
    PER_BLOCK: tl.constexpr,  # tiles of a block
    PER_SEGMENT: tl.constexpr,
    EVERY: tl.constexpr,  # tiles from one boundary that is written to the next
    ADDITIONS: tl.constexpr,  # each segment from zero, its addition and decay written; otherwise from its entering state
):
    value_tile, segment, row_head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, head = row_head // HKV, row_head % HKV
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    G: tl.constexpr = KH if SHARED else K
    k += batch * k_b + first * k_t + head * k_h
    v += batch * v_b + first * v_t + head * v_h
    gate_logits += (flat * HKV + head) * 2 * G
    write_offset = (flat * HKV + head) * 2

    low = tl.arange(0, BKH)
    high = KH + low
    low_ok = low < KH
    high_ok = high < K
    values = value_tile * BV + tl.arange(0, BV)
    value_ok = values < V
    segment_offset = ((row.to(tl.int64) * segments + segment) * HKV + head) * 2

    s1l = tl.zeros([BV, BKH], tl.float32)
    s1h = tl.zeros([BV, BKH], tl.float32)
    s2l = tl.zeros([BV, BKH], tl.float32)
    s2h = tl.zeros([BV, BKH], tl.float32)
    d1l = tl.zeros([BKH], tl.float32)
    d1h = tl.zeros([BKH], tl.float32)
    d2l = tl.zeros([BKH], tl.float32)
    d2h = tl.zeros([BKH], tl.float32)
    if not ADDITIONS and entering is not None:
        s1l, s1h, s2l, s2h = load_states(entering + segment_offset * K * V, low, low_ok, high, high_ok, values, value_ok, K, V)

    tile_first = segment * PER_SEGMENT
    row_end = tiles
    if row_length is not None:  # boundaries behind a row's end are left as they are
        row_end = min(row_end, (length + SIZE - 1) // SIZE * PER_BLOCK)
    tile_end = min(tile_first + PER_SEGMENT, row_end)
    for tile in range(tile_first, tile_end):
        if states is not None:  # noqa: SIM102 (the first is decided at compile time)
            if tile % EVERY == 0:
                store_states(
                    states + ((row.to(tl.int64) * boundaries + tile // EVERY) * HKV + head) * 2 * K * V,
                    low,
                    low_ok,
                    high,
                    high_ok,
                    values,
                    value_ok,
                    K,
                    V,
                    s1l,
                    s1h,
                    s2l,
                    s2h,
                )
        inside = tile % PER_BLOCK * C + tl.arange(0, C)
        tokens = tile // PER_BLOCK * SIZE + inside
        token_ok = load_mask(mask, flat, tokens, (inside < SIZE) & (tokens < length))
        k_low = load_rows(k, tokens, token_ok, k_t, low, low_ok).to(tl.float32)
        k_high = load_rows(k, tokens, token_ok, k_t, high, high_ok).to(tl.float32)
        v_tile = tl.trans(load_rows(v, tokens, token_ok, v_t, values, value_ok).to(DOT))
        write1 = load_write_gate(write_logits, write_offset, tokens, token_ok, HKV * 2)
        write2 = load_write_gate(write_logits, write_offset + 1, tokens, token_ok, HKV * 2)
        g1l = load_log_decay(gate_logits, tokens, token_ok, HKV * 2 * G, low, low_ok, inverse_normalizer, bound)
        g2l = load_log_decay(gate_logits + G, tokens, token_ok, HKV * 2 * G, low, low_ok, inverse_normalizer, bound)
        g1h = g1l
        g2h = g2l
        if not SHARED:
            g1h = load_log_decay(gate_logits, tokens, token_ok, HKV * 2 * G, high, high_ok, inverse_normalizer, bound)
            g2h = load_log_decay(gate_logits + G, tokens, token_ok, HKV * 2 * G, high, high_ok, inverse_normalizer, bound)
        s1l = _take_in(s1l, v_tile, k_low, write1, g1l, DOT, PRECISION)
        s1h = _take_in(s1h, v_tile, k_high, write1, g1h, DOT, PRECISION)
        s2l = _take_in(s2l, v_tile, k_low, write2, g2l, DOT, PRECISION)
        s2h = _take_in(s2h, v_tile, k_high, write2, g2h, DOT, PRECISION)
        if ADDITIONS:
            d1l += tl.sum(g1l, 0)
            d1h += tl.sum(g1h, 0)
            d2l += tl.sum(g2l, 0)
            d2h += tl.sum(g2h, 0)

    if ADDITIONS:
        store_states(entering + segment_offset * K * V, low, low_ok, high, high_ok, values, value_ok, K, V, s1l, s1h, s2l, s2h)
        if value_tile == 0:
            store_decays(segment_decay + segment_offset * K, low, low_ok, high, high_ok, K, d1l, d1h, d2l, d2h)
    elif (tile_end == row_end) & ((tile_first < row_end) | (segment == 0)):
        if states is not None:
            store_states(
                states + ((row.to(tl.int64) * boundaries + row_end // EVERY) * HKV + head) * 2 * K * V,
                low,
                low_ok,
                high,
                high_ok,
                values,
                value_ok,
                K,
                V,
                s1l,
                s1h,
                s2l,
                s2h,
            )
        if final is not None:
            offset = (row.to(tl.int64) * HKV + head) * 2 * K * V
            store_states(final + offset, low, low_ok, high, high_ok, values, value_ok, K, V, s1l, s1h, s2l, s2h)


@triton.jit
def _scan_kernel(
    additions,  # fp32 [N, segments, heads, K, V], replaced by the states on entry of each segment
    segment_decay,  # fp32 [N, segments, heads, K]
    initial,  # [N, heads, K, V] or None
    final,  # fp32 [N, heads, K, V] or None
    segments,
    steps,  # segments whose additions are there: all, or all but the last where the end is not asked for
    heads,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = element < K * V
    end = (row.to(tl.int64) * heads + head) * K * V + element
    state = tl.zeros([BLOCK], tl.float32)
    if initial is not None:
        state = tl.load(initial + end, mask=ok, other=0.0).to(tl.float32)
    for step in range(segments):
        segment = segments - 1 - step if REVERSE else step
        wanted = ok & (element * 0 + step < steps)  # a tile, which the interpreter takes as a mask too
        offset = (row.to(tl.int64) * segments + segment) * heads + head
        added = tl.load(additions + offset * K * V + element, mask=wanted, other=0.0)
        decay = tl.load(segment_decay + offset * K + element // V, mask=wanted, other=0.0)
        tl.store(additions + offset * K * V + element, state, mask=ok)
        state = state * tl.exp(decay) + added
    if final is not None:
        tl.store(final + end, state, mask=ok)


def scan_segments(additions: Tensor, segment_decay: Tensor, initial: Tensor | None, final: Tensor | None, reverse: bool = False) -> None:
    """Replaces the segments' additions `[N, segments, Hkv, 2, K, V]` by the states on entry, in place; from the end if `reverse`."""
    rows, segments, kv_heads, _, key_dim, value_dim = additions.shape
    block = 1024
    steps = segments - (final is None)
    grid = (triton.cdiv(key_dim * value_dim, block), rows * kv_heads * 2)
    _scan_kernel[grid](
        additions,
        segment_decay,
        initial,
        final,
        segments,
        steps,
        kv_heads * 2,
        K=key_dim,
        V=value_dim,
        BLOCK=block,
        REVERSE=reverse,
        num_warps=4,
    )


class StateInputs:
    """What the state pass reads, in the kernels' argument order, and the shape of its work.

    k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]` of any strides before the last dimension; gate_logits, write_logits contiguous; mask
    uint8 `[B, T]`; row_first, row_length int `[N]`.
    """

    def __init__(self, k, v, gate_logits, write_logits, mask, row_first, row_length, length, gate_normalizer, lower_bound):
        self.k, self.v, self.gate_logits, self.write_logits, self.mask = k, v, gate_logits, write_logits, mask
        self.row_first, self.row_length, self.length = row_first, row_length, length
        self.inverse_normalizer, self.bound = 1.0 / gate_normalizer, lower_bound
        self.rows = k.shape[0] if row_first is None else row_first.shape[0]
        self.kv_heads = k.shape[2]

    def state_buffer(self, *leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised `[*leading, Hkv, 2, K, V]`."""
        return self.k.new_empty(*leading, self.kv_heads, 2, self.k.shape[-1], self.v.shape[-1], dtype=dtype)

    def launch(self, tiling: Tiling, heads: Heads, entering=None, segment_decay=None, states=None, final=None, every=1, additions=False):
        # Where the end is not asked for, nobody reads what the last segment adds.
        segments = tiling.segments - (additions and final is None)
        grid = (triton.cdiv(heads.V, heads.BV), segments, self.rows * self.kv_heads)
        _state_kernel[grid](
            self.k,
            self.v,
            self.gate_logits,
            self.write_logits,
            self.mask,
            self.row_first,
            self.row_length,
            entering,
            segment_decay,
            states,
            final,
            *self.k.stride()[:3],
            *self.v.stride()[:3],
            self.k.shape[1],
            self.length,
            tiling.tiles,
            tiling.segments,
            0 if states is None else states.shape[1],
            self.inverse_normalizer,
            self.bound,
            HKV=self.kv_heads,
            **heads._asdict(),
            SIZE=tiling.size,
            C=tiling.tile,
            PER_BLOCK=tiling.per_block,
            PER_SEGMENT=tiling.per_segment,
            EVERY=every,
            ADDITIONS=additions,
            num_warps=4 if heads.BKH * heads.BV <= 32 * 64 else 8,
            num_stages=2,
        )


def entering_states(
    inputs: StateInputs, tiling: Tiling, heads: Heads, initial: Tensor | None, final: Tensor | None = None
) -> Tensor | None:
    """States on entry of each segment, fp32 `[N, segments, Hkv, 2, K, V]` (None: zeros), and, in `final`, after the last one."""
    if tiling.segments == 1 and final is None:
        return None if initial is None else initial.float()[:, None].contiguous()
    entering = inputs.state_buffer(inputs.rows, tiling.segments)
    segment_decay = entering.new_empty(entering.shape[:-1])
    inputs.launch(tiling, heads, entering, segment_decay, final=final, additions=True)
    scan_segments(entering, segment_decay, initial, final)
    return entering


def value_tile(k: Tensor, v: Tensor) -> int:
    """Values a program. The gates' work is done again for each tile of values, so all of them where registers allow."""
    if k.dtype == torch.bfloat16 and k.shape[-1] <= 128:
        return 128
    return 64 if v.shape[-1] > 32 else 32


@on_its_device
def block_states(
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    block_size: int,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_blocks: int | None = None,
) -> Tensor:
    """The states at every block boundary, `[B, ceil(T / block_size) + 1, Hkv, 2, K, V]` fp32: `reference.block_states` in Triton.

    Not differentiable. segment_blocks: blocks a segment, to overrule the choice.

    Raises:
        ValueError: names the argument that does not fit, before anything is launched.
    """
    inputs, tiling, heads = _prepare(
        k, v, gate_logits, block_size, write_logits, gate_normalizer, lower_bound, padding_mask, initial_state, segment_blocks
    )
    boundaries = tiling.tiles // tiling.per_block + 1
    states = inputs.state_buffer(inputs.rows, boundaries)
    entering = entering_states(inputs, tiling, heads, initial_state)
    inputs.launch(tiling, heads, entering, states=states, every=tiling.per_block)
    return states


@on_its_device
def final_state(
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    segment_blocks: int | None = None,
) -> Tensor:
    """The states after the rows, `[B, Hkv, 2, K, V]` fp32, at the cost of one pass over k, v and gates: what a fold needs.

    Arguments and errors as `block_states`; the last entry of its result.
    """
    inputs, tiling, heads = _prepare(
        k, v, gate_logits, 64, write_logits, gate_normalizer, lower_bound, padding_mask, initial_state, segment_blocks
    )
    final = inputs.state_buffer(inputs.rows)
    if tiling.segments == 1:
        inputs.launch(tiling, heads, entering_states(inputs, tiling, heads, initial_state), final=final)
    else:
        entering_states(inputs, tiling, heads, initial_state, final)
    return final


def _prepare(k, v, gate_logits, size, write_logits, gate_normalizer, lower_bound, padding_mask, initial_state, segment_blocks):
    if size < 1:
        raise ValueError(f"block_size must be at least 1, got {size}")
    mix = gate_logits.new_empty(k.shape[2], 2, dtype=torch.float32) if k.ndim == 4 else gate_logits
    check_kernel_inputs(k, k, v, gate_logits, mix, gate_normalizer, lower_bound, padding_mask, None, initial_state, write_logits)
    tensors = (k, v, gate_logits, write_logits, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError("the state pass alone has no gradient: call it under torch.no_grad(), or use the reference")
    k, v, gate_logits = unit_stride(k), unit_stride(v), gate_logits.contiguous()
    write_logits = None if write_logits is None else write_logits.contiguous()
    inputs = StateInputs(k, v, gate_logits, write_logits, as_bytes(padding_mask), None, None, k.shape[1], gate_normalizer, lower_bound)
    heads = make_heads(k, v, gate_logits, value_tile(k, v))
    programs = inputs.rows * inputs.kv_heads * triton.cdiv(heads.V, heads.BV)
    return inputs, make_tiling(k.shape[1], size, programs, k.device, segment_blocks, largest_tile(k, v)), heads
