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
    channel_columns,
    check_kernel_inputs,
    largest_tile,
    load_rows,
    make_heads,
    make_tiling,
    on_its_device,
    processors,
    row_span,
    store_rows,
    unit_stride,
)
from .decays import Decayed, decay_keys


@triton.jit
def load_middle(at_middle, tile, tile_ok, stride, gates, channel_ok):
    """exp(m) of a tile `[BK]`; 1 for a tile that is not there."""
    return tl.load(
        at_middle + tile * stride + gates, mask=channel_ok & (gates * 0 + tile_ok > 0), other=1.0
    )  # a tile as mask, for the interpreter


@triton.jit
def tile_products(states, gradients, channels, channel_ok, V: tl.constexpr, BV: tl.constexpr):
    """Sums over the values of a state times its gradient, `[BK]`, a few values at a time: what the decay of a whole tile meets."""
    total = tl.zeros([channels.shape[0]], tl.float32)
    PART: tl.constexpr = min(BV, 32)
    for start in range(0, V, PART):
        values = start + tl.arange(0, PART)
        state = load_rows(states, channels, channel_ok, V, values, values < V).to(tl.float32)
        gradient = load_rows(gradients, channels, channel_ok, V, values, values < V).to(tl.float32)
        total += tl.sum(state * gradient, 1)
    return total


@triton.jit
def _state_kernel(
    v,
    keys,
    at_middle,
    row_first,  # [N] or None: rows are the batch's
    row_length,  # [N] or None: `length` for all
    entering,  # fp32 [N, segments, Hkv, 2, K, V]; written by ADDITIONS; None: zeros
    segment_decay,  # fp32 [N, segments, Hkv, 2, K]: factors, written by ADDITIONS
    states,  # [N, boundaries, Hkv, 2, K, V] or None
    final,  # fp32 [N, Hkv, 2, K, V] or None
    v_b,
    v_t,
    v_h,
    T,
    length,
    tiles,
    segments,
    per_segment,  # tiles
    boundaries,
    HKV: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    G: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZE: tl.constexpr,  # tokens of a block
    C: tl.constexpr,  # of a tile
    PER_BLOCK: tl.constexpr,  # tiles of a block
    EVERY: tl.constexpr,  # tiles from one boundary that is written to the next
    AT_MIDDLE: tl.constexpr,  # states are written at every tile, times exp(m): as its queries read them
    ADDITIONS: tl.constexpr,  # each segment from zero, its addition and decay written; otherwise from its entering state
):
    # One of the two states: programs that wait for different memory fill a processor better than one with both.
    value_tile, segment, row_head = tl.program_id(0) // 2, tl.program_id(1), tl.program_id(2)
    row, head_state = row_head // HKV, row_head % HKV * 2 + tl.program_id(0) % 2
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    row = row.to(tl.int64)
    gate_t: tl.constexpr = HKV * 2 * G
    v += batch * v_b + first * v_t + head_state // 2 * v_h
    keys += (flat * HKV * 2 + head_state) * K
    at_middle += (row * tiles * HKV * 2 + head_state) * G

    channels, channel_ok, gates = channel_columns(K, G, BK)
    values = value_tile * BV + tl.arange(0, BV)
    value_ok = values < V
    segment_place = (row * segments + segment) * HKV * 2 + head_state
    state = tl.zeros([BK, BV], tl.float32)
    decay = tl.full([BK], 1.0, tl.float32)
    if not ADDITIONS and entering is not None:
        state = load_rows(entering + segment_place * K * V, channels, channel_ok, V, values, value_ok)

    tile_first = segment * per_segment
    row_end = tiles
    if row_length is not None:  # boundaries behind a row's end are left as they are
        row_end = min(row_end, (length + SIZE - 1) // SIZE * PER_BLOCK)
    tile_end = min(tile_first + per_segment, row_end)
    middle = load_middle(at_middle, tile_first, tile_first < tile_end, gate_t, gates, channel_ok)
    for tile in range(tile_first, tile_end):
        next_middle = load_middle(at_middle, tile + 1, tile + 1 < tile_end, gate_t, gates, channel_ok)  # ahead of its use
        if states is not None and not AT_MIDDLE:  # noqa: SIM102 (the first is decided at compile time)
            if tile % EVERY == 0:
                boundary = (row * boundaries + tile // EVERY) * HKV * 2 + head_state
                store_rows(states + boundary * K * V, channels, channel_ok, V, values, value_ok, state)
        inside = tile % PER_BLOCK * C + tl.arange(0, C)
        tokens = tile // PER_BLOCK * SIZE + inside
        token_ok = (inside < SIZE) & (tokens < length)
        v_tile = load_rows(v, tokens, token_ok, v_t, values, value_ok).to(DOT)
        key = load_rows(keys, tokens, token_ok, HKV * 2 * K, channels, channel_ok)
        state *= middle[:, None]
        if AT_MIDDLE:
            boundary = (row * boundaries + tile) * HKV * 2 + head_state
            store_rows(states + boundary * K * V, channels, channel_ok, V, values, value_ok, state)
        state = tl.dot(tl.trans(key), v_tile, acc=state, input_precision=PRECISION) * middle[:, None]
        if ADDITIONS:
            decay *= middle * middle
        middle = next_middle

    if ADDITIONS:
        store_rows(entering + segment_place * K * V, channels, channel_ok, V, values, value_ok, state)
        if value_tile == 0:
            tl.store(segment_decay + segment_place * K + channels, decay, mask=channel_ok)
    elif (tile_end == row_end) & ((tile_first < row_end) | (segment == 0)):
        if states is not None and not AT_MIDDLE:  # nobody reads the states behind the last tile
            boundary = (row * boundaries + row_end // EVERY) * HKV * 2 + head_state
            store_rows(states + boundary * K * V, channels, channel_ok, V, values, value_ok, state)
        if final is not None:
            store_rows(final + (row * HKV * 2 + head_state) * K * V, channels, channel_ok, V, values, value_ok, state)


@triton.jit
def _scan_kernel(
    additions,  # fp32 [N, segments, heads, K, V], replaced by the states on entry of each segment
    segment_decay,  # fp32 [N, segments, heads, K], factors
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
    ahead = (row.to(tl.int64) * segments + (segments - 1 if REVERSE else 0)) * heads + head
    step_offset = -heads if REVERSE else heads
    added = tl.load(additions + ahead * K * V + element, mask=ok & (element * 0 < steps), other=0.0)
    decay = tl.load(segment_decay + ahead * K + element // V, mask=ok & (element * 0 < steps), other=0.0)
    for step in range(segments):
        offset = ahead
        ahead += step_offset
        wanted = ok & (element * 0 + step + 1 < steps)  # a tile, which the interpreter takes as a mask too
        next_added = tl.load(additions + ahead * K * V + element, mask=wanted, other=0.0)  # before the store, which might alias
        next_decay = tl.load(segment_decay + ahead * K + element // V, mask=wanted, other=0.0)
        tl.store(additions + offset * K * V + element, state, mask=ok)
        state = state * decay + added
        added, decay = next_added, next_decay
    if final is not None:
        tl.store(final + end, state, mask=ok)


def scan_segments(additions: Tensor, segment_decay: Tensor, initial: Tensor | None, final: Tensor | None, reverse: bool = False) -> None:
    """Replaces the segments' additions `[N, segments, Hkv, 2, K, V]` by the states on entry, in place; from the end if `reverse`."""
    rows, segments, kv_heads, _, key_dim, value_dim = additions.shape
    block = 512
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
        self.gate_normalizer, self.lower_bound = gate_normalizer, lower_bound
        self.rows = k.shape[0] if row_first is None else row_first.shape[0]
        self.kv_heads = k.shape[2]
        self.dtype = torch.bfloat16 if k.dtype == torch.bfloat16 else torch.float32  # of what is not accumulated

    def state_buffer(self, *leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised `[*leading, Hkv, 2, K, V]`."""
        return self.k.new_empty(*leading, self.kv_heads, 2, self.k.shape[-1], self.v.shape[-1], dtype=dtype)

    def decayed(self, tiling: Tiling) -> Decayed:
        """Keys and query factors of all tiles."""
        return decay_keys(
            self.k,
            self.gate_logits,
            self.write_logits,
            tiling,
            self.dtype,
            self.mask,
            self.row_first,
            self.row_length,
            self.length,
            self.gate_normalizer,
            self.lower_bound,
        )

    def launch(
        self,
        tiling: Tiling,
        heads: Heads,
        decayed: Decayed,
        entering=None,
        segment_decay=None,
        states=None,
        final=None,
        every=1,
        at_middle=False,
        additions=False,
    ):
        # Where the end is not asked for, nobody reads what the last segment adds.
        segments = tiling.segments - (additions and final is None)
        grid = (2 * triton.cdiv(heads.V, heads.BV), segments, self.rows * self.kv_heads)
        _state_kernel[grid](
            self.v,
            decayed.keys,
            decayed.at_middle,
            self.row_first,
            self.row_length,
            entering,
            segment_decay,
            states,
            final,
            *self.v.stride()[:3],
            self.k.shape[1],
            self.length,
            tiling.tiles,
            tiling.segments,
            tiling.per_segment,
            0 if states is None else states.shape[1],
            HKV=self.kv_heads,
            **heads._asdict(),
            SIZE=tiling.size,
            C=tiling.tile,
            PER_BLOCK=tiling.per_block,
            EVERY=every,
            AT_MIDDLE=at_middle,
            ADDITIONS=additions,
            num_warps=4 if heads.BK * heads.BV <= 32 * 64 else 8,
            num_stages=3,
        )


def entering_states(
    inputs: StateInputs, tiling: Tiling, heads: Heads, decayed: Decayed, initial: Tensor | None, final: Tensor | None = None
) -> Tensor | None:
    """States on entry of each segment, fp32 `[N, segments, Hkv, 2, K, V]` (None: zeros), and, in `final`, after the last one."""
    if tiling.segments == 1 and final is None:
        return None if initial is None else initial.float()[:, None].contiguous()
    entering = inputs.state_buffer(inputs.rows, tiling.segments)
    segment_decay = entering.new_empty(entering.shape[:-1])
    inputs.launch(tiling, heads, decayed, entering, segment_decay, final=final, additions=True)
    scan_segments(entering, segment_decay, initial, final)
    return entering


def value_tile(k: Tensor, v: Tensor, programs: int) -> int:
    """Values a program of the state pass, one for each of two states of `programs` rows and heads: few where they then fill the card
    without segments, which cost a second pass; otherwise as many as registers allow."""
    most = 64 if v.shape[-1] > 32 and k.shape[-1] * k.element_size() <= 256 else 32
    for tile in (64, 32):
        if tile <= most and 2 * programs * triton.cdiv(v.shape[-1], tile) >= 1.5 * processors(k.device):
            return tile
    return 32


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
    decayed = inputs.decayed(tiling)
    entering = entering_states(inputs, tiling, heads, decayed, initial_state)
    inputs.launch(tiling, heads, decayed, entering, states=states, every=tiling.per_block)
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
    decayed = inputs.decayed(tiling)
    if tiling.segments == 1:
        inputs.launch(tiling, heads, decayed, entering_states(inputs, tiling, heads, decayed, initial_state), final=final)
    else:
        entering_states(inputs, tiling, heads, decayed, initial_state, final)
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
    heads = make_heads(k, v, gate_logits, value_tile(k, v, k.shape[0] * k.shape[2]))
    programs = inputs.rows * inputs.kv_heads * 2 * triton.cdiv(heads.V, heads.BV)
    return inputs, make_tiling(k.shape[1], size, programs, k.device, segment_blocks, largest_tile(k, v)), heads
