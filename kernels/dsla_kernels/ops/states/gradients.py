"""What the gradients of both forms of the layer share: the pass over the gradient of the states, from the end, and the gradients of
keys and gates once that is known.

D is the gradient of the states at the end of a tile. Decayed keys K = write * k exp(m - b) of a tile with values v enter the states with
exp(m), so dK = v D~^T with D~ = exp(m) D. Gates: see `chunk.key_gradients` and `window.key_gradients`.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor

from ...common import Tiling, inverse, load_rows, load_write_gate, log_decay_slope, numbers, store_rows
from .inputs import StateInputs
from .segments import enter_segments, store_addition


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
def store_segment_gradient(
    entering, segment_decay,
    d_initial,  # fp32 [N, Hkv, 2, K, V] or None
    segment_place, start_place, segment, gradient, decay, value_tile, channels, channel_ok, values, value_ok,
    K: tl.constexpr, V: tl.constexpr, ADDITIONS: tl.constexpr,
):  # fmt: skip
    """At the start of a segment: what it adds, or the gradient of the initial state."""
    if ADDITIONS:
        store_addition(entering, segment_decay, segment_place, gradient, decay, value_tile, channels, channel_ok, values, value_ok, K, V)
    elif d_initial is not None:  # noqa: SIM102 (the first is decided at compile time)
        if segment == 0:
            store_rows(d_initial + start_place * K * V, channels, channel_ok, V, values, value_ok, gradient)


@triton.jit
def store_key_gradients(
    d_decay,  # [C, BG]: of the log-decays
    d_decayed,  # [C, BK]: of the decayed keys
    k,  # at row and head
    gate_logits, write_logits, query_factors, d_gate_logits, d_write_logits,
    dk_parts,  # [B, T, Hkv, 2, K]: by state
    place,  # of the row's first token, head and state
    tokens, token_ok, written, k_t, channels, channel_ok, gates, inverse_normalizer, bound,
    HKV, K: tl.constexpr, G: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """From log-decays to raw gates, and from decayed keys to keys and write gates, of one state."""
    gate_t = HKV * 2 * G
    gate, gate_ok = numbers(0, G, d_decay.shape[1])
    logits = load_rows(gate_logits + place * G, tokens, token_ok, gate_t, gate, gate_ok).to(tl.float32)
    d_logits = tl.where(token_ok[:, None], d_decay * log_decay_slope(logits, inverse_normalizer, bound), 0.0)
    store_rows(d_gate_logits + place * G, tokens, written, gate_t, gate, gate_ok, d_logits)
    factors = load_rows(query_factors + place * G, tokens, token_ok, gate_t, gates, channel_ok).to(tl.float32)
    d_written = tl.where(token_ok[:, None] & channel_ok[None, :], d_decayed * inverse(factors, EXACT), 0.0)
    if write_logits is None:
        d_key = d_written
    else:
        write = load_write_gate(write_logits, place, tokens, token_ok, HKV * 2)
        d_key = d_written * write[:, None]
        k_tile = load_rows(k, tokens, token_ok, k_t, channels, channel_ok)
        d_write = tl.sum(d_written * k_tile.to(tl.float32), 1) * write * (1 - write)
        pointers = d_write_logits + place + tokens * HKV * 2
        tl.store(pointers, d_write.to(d_write_logits.dtype.element_ty), mask=written)
    store_rows(dk_parts + place * K, tokens, written, HKV * 2 * K, channels, channel_ok, d_key)


def state_gradients(
    inputs: StateInputs,
    tiling: Tiling,
    launch: Callable[[Tensor | None, Tensor | None, Tensor, Tensor | None], None],
    d_final: Tensor | None,
    with_initial: bool,
) -> tuple[Tensor, Tensor | None]:
    """Of every tile `[N, tiles, Hkv, 2, K, V]`, and of the states at the start of the rows, fp32 `[N, Hkv, 2, K, V]` (None if not
    `with_initial`), by a kernel that goes through every segment from its end.

    launch: with the gradient at each segment's end, its decay, and both results: where there is a decay, it writes the first two.
    """
    gradients = inputs.state_buffer(inputs.rows, tiling.tiles, dtype=inputs.dtype)
    d_initial = inputs.state_buffer(inputs.rows) if with_initial else None

    def add(entering, segment_decay):
        launch(entering, segment_decay, gradients, d_initial)

    launch(enter_segments(inputs, tiling.segments, add, d_final, reverse=True), None, gradients, d_initial)
    return gradients, d_initial
