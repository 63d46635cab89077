"""Segments of a row, worked through side by side: from what each adds to the states to the states on entry of each."""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ...common import COUNTS, load_rows, numbers, store_rows
from .inputs import StateInputs


@triton.jit
def load_entry(
    entering,
    place,
    channels,
    channel_ok,
    values,
    value_ok,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    ADDITIONS: tl.constexpr,
):
    """What a segment starts from `[BK, BV]`: zeros where its addition is asked for or `entering` is None; and a decay of 1 `[BK]`."""
    state = tl.zeros([BK, BV], tl.float32)
    if not ADDITIONS and entering is not None:
        state = load_rows(entering + place * K * V, channels, channel_ok, V, values, value_ok)
    return state, tl.full([BK], 1.0, tl.float32)


@triton.jit
def store_addition(
    entering, segment_decay, place, state, decay, value_tile, channels, channel_ok, values, value_ok, K: tl.constexpr, V: tl.constexpr
):
    """What a segment adds to a state, and its decay as a whole."""
    store_rows(entering + place * K * V, channels, channel_ok, V, values, value_ok, state)
    if value_tile == 0:
        tl.store(segment_decay + place * K + channels, decay, mask=channel_ok)


@triton.jit(do_not_specialize=COUNTS)
def _scan_kernel(
    additions,  # fp32 [N, segments, heads, K, V], replaced by the states on entry of each segment
    segment_decay,  # fp32 [N, segments, heads, K], factors
    initial,  # [N, heads, K, V] or None
    final,  # fp32 [N, heads, K, V] or None
    segments,
    steps,  # segments whose additions are there: all, or all but the last where the end is not asked for
    HKV,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
):
    heads = HKV * 2  # a state each
    row, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    element, ok = numbers(tl.program_id(0) * BLOCK, K * V, BLOCK)
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


def _scan(additions: Tensor, segment_decay: Tensor, initial: Tensor | None, final: Tensor | None, reverse: bool) -> None:
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
        HKV=kv_heads,
        K=key_dim,
        V=value_dim,
        BLOCK=block,
        REVERSE=reverse,
        num_warps=4,
    )


def enter_segments(
    inputs: StateInputs,
    segments: int,
    add: Callable[[Tensor, Tensor], None],
    initial: Tensor | None,
    final: Tensor | None = None,
    reverse: bool = False,
) -> Tensor | None:
    """States on entry of each segment, fp32 `[N, segments, Hkv, 2, K, V]` (None: zeros), and, in `final`, after the last one.

    add: writes into its arguments what each segment adds and its decay, fp32 `[N, segments, Hkv, 2, K, V]` and `[N, segments, Hkv, 2, K]`.
    reverse: the last segment comes first, as for gradients; `initial` then stands for the end of the rows.
    """
    if segments == 1 and final is None:
        return None if initial is None else initial.float()[:, None].contiguous()
    entering = inputs.state_buffer(inputs.rows, segments)
    segment_decay = entering.new_empty(entering.shape[:-1])
    add(entering, segment_decay)
    _scan(entering, segment_decay, initial, final, reverse)
    return entering
