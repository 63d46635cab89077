"""What the Triton kernels share: the gate, tiles of tokens and their launch-time checks.

Head channels are cut in two halves, tiles of their own: channel i and i + KH with KH = K / 2, a rotary pair. With one decay
per pair its logsigmoid and exponentials are computed once for both. States lie transposed in registers, `[V tile, KH]`: their
products then have the value size as the long side, which tensor cores want at 64 or more.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_inputs

TILE = 64  # tokens a tile at most; the bound on the decay is chosen for it
LARGEST_HEAD = 256
INTERPRETED = triton.knobs.runtime.interpret


# --- device side ----------------------------------------------------------------------------------------------------


@triton.jit
def log1p_exp_neg(x):
    """log(1 + exp(-x)) for x >= 0 to fp32's relative precision, which log(1 + small) alone has not: the rounding of nearly
    open gates would add up over a long text. As 2 artanh(r) with r = small / (2 + small) <= 1 / 3, a short series."""
    small = tl.exp(-x)
    ratio = small / (2 + small)
    square = ratio * ratio
    series = 0.2 + square * (0.14285714 + square * (0.11111111 + square * (0.09090909 + square * 0.07692308)))
    return 2 * ratio * (1 + square * (0.33333334 + square * series))


@triton.jit
def bounded_log_decay(logits, inverse_normalizer, bound):
    """max(logsigmoid(logits) / normalizer, bound)."""
    return tl.maximum((tl.minimum(logits, 0.0) - log1p_exp_neg(tl.abs(logits))) * inverse_normalizer, bound)


@triton.jit
def log_decay_slope(logits, inverse_normalizer, bound):
    """Derivative of `bounded_log_decay`: zero where the bound clamps."""
    free = (tl.minimum(logits, 0.0) - log1p_exp_neg(tl.abs(logits))) * inverse_normalizer >= bound
    return tl.where(free, inverse_normalizer / (1 + tl.exp(logits)), 0.0)


@triton.jit
def load_rows(base, rows, row_ok, stride, columns, column_ok):
    """The tile `base[rows, columns]` of unit column stride, zero outside."""
    pointers = base + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    return tl.load(pointers, mask=row_ok[:, None] & column_ok[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, row_ok, stride, columns, column_ok, x):
    pointers = base + (rows.to(tl.int64) * stride)[:, None] + columns[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=row_ok[:, None] & column_ok[None, :])


@triton.jit
def _load_state(base, columns, column_ok, values, value_ok, V: tl.constexpr):
    mask = value_ok[:, None] & column_ok[None, :]
    return tl.load(base + columns[None, :] * V + values[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_state(base, columns, column_ok, values, value_ok, V: tl.constexpr, x):
    mask = value_ok[:, None] & column_ok[None, :]
    tl.store(base + columns[None, :] * V + values[:, None], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_states(base, low, low_ok, high, high_ok, values, value_ok, K: tl.constexpr, V: tl.constexpr):
    """Both states `[2, K, V]` as transposed tiles `[values, half of the channels]`: first low, first high, second low, second high."""
    first_low = _load_state(base, low, low_ok, values, value_ok, V)
    first_high = _load_state(base, high, high_ok, values, value_ok, V)
    second_low = _load_state(base + K * V, low, low_ok, values, value_ok, V)
    second_high = _load_state(base + K * V, high, high_ok, values, value_ok, V)
    return first_low, first_high, second_low, second_high


@triton.jit
def store_states(base, low, low_ok, high, high_ok, values, value_ok, K: tl.constexpr, V: tl.constexpr, s1l, s1h, s2l, s2h):
    """The inverse of `load_states`."""
    _store_state(base, low, low_ok, values, value_ok, V, s1l)
    _store_state(base, high, high_ok, values, value_ok, V, s1h)
    _store_state(base + K * V, low, low_ok, values, value_ok, V, s2l)
    _store_state(base + K * V, high, high_ok, values, value_ok, V, s2h)


@triton.jit
def store_decays(base, low, low_ok, high, high_ok, K: tl.constexpr, d1l, d1h, d2l, d2h):
    """Log-decays `[2, K]` of both states from their halves."""
    tl.store(base + low, d1l, mask=low_ok)
    tl.store(base + high, d1h, mask=high_ok)
    tl.store(base + K + low, d2l, mask=low_ok)
    tl.store(base + K + high, d2h, mask=high_ok)


@triton.jit
def load_log_decay(base, tokens, token_ok, stride, columns, column_ok, inverse_normalizer, bound):
    """Log-decays of a tile `[C, KH]` from raw logits, zero (no decay) outside."""
    logits = load_rows(base, tokens, token_ok, stride, columns, column_ok).to(tl.float32)
    return tl.where(token_ok[:, None] & column_ok[None, :], bounded_log_decay(logits, inverse_normalizer, bound), 0.0)


@triton.jit
def load_write_gate(write_logits, offset, tokens, token_ok, stride):
    """Share of each token `[C]` that a state takes in: sigmoid of the raw write gate, 1 without one, 0 at no-ops."""
    if write_logits is None:
        return token_ok.to(tl.float32)
    else:
        logits = tl.load(write_logits + offset + tokens * stride, mask=token_ok, other=0.0).to(tl.float32)
        return tl.where(token_ok, tl.sigmoid(logits), 0.0)


@triton.jit
def row_span(row, T, length, row_first, row_length):
    """Of a row: its batch entry, first token there, first token among all B * T, and number of tokens.

    Without `row_first` rows are the entries of the batch; with it they lie one behind the other in the only entry.
    """
    row = row.to(tl.int64)
    if row_length is not None:
        length = tl.load(row_length + row).to(tl.int32)
    if row_first is not None:
        first = tl.load(row_first + row).to(tl.int64)
        batch = row * 0
        flat = first
    else:
        first = row * 0
        batch = row
        flat = row * T
    return batch, first, flat, length


@triton.jit
def load_mask(mask, flat, tokens, token_ok):
    """token_ok without the tokens that a mask `[B, T]` leaves out."""
    if mask is not None:
        token_ok = token_ok & (tl.load(mask + flat + tokens, mask=token_ok, other=0) != 0)
    return token_ok


# --- host side ------------------------------------------------------------------------------------------------------


class Tiling(NamedTuple):
    """How the tokens of a row are cut: blocks of `size` tokens, each in `per_block` tiles of at most `tile`; `per_segment`
    tiles (whole blocks) a segment, `segments` of them."""

    size: int
    tile: int
    per_block: int
    tiles: int
    per_segment: int
    segments: int


def on_its_device(function):
    """Runs a function of tensors with the device of the first one as the current one, on which Triton launches."""

    @functools.wraps(function)
    def run(*arguments, **options):
        with torch.cuda.device_of(arguments[0] if arguments else next(iter(options.values()))):
            return function(*arguments, **options)

    return run


def largest_tile(q: Tensor, v: Tensor) -> int:
    """Tokens a tile: fewer where fp32 factors or large heads would not fit into registers and shared memory."""
    wide = max(q.shape[-1], v.shape[-1]) * (1 if q.dtype == torch.bfloat16 else 4)
    return TILE if wide <= 128 or INTERPRETED else TILE // 2 if wide <= 256 else TILE // 4


def make_tiling(
    tokens: int, size: int, programs: int, device: torch.device, segment_blocks: int | None = None, largest: int = TILE
) -> Tiling:
    """Blocks of `size` tokens; segments such that `programs` programs for each of them fill the card about twice.

    segment_blocks: blocks a segment, a power of two, to overrule the choice. largest: tokens a tile at most.
    """
    tile = min(largest, max(16, triton.next_power_of_2(size)))
    per_block = -(-size // tile)
    blocks = -(-tokens // size)
    if segment_blocks is None:
        wanted = -(-2 * processors(device) // programs)
        segment_blocks = max(blocks // wanted, 2)
        segment_blocks = 1 << (segment_blocks.bit_length() - 1) if wanted > 1 else blocks
    per_segment = min(segment_blocks, blocks) * per_block
    tiles = blocks * per_block
    return Tiling(size, tile, per_block, tiles, per_segment, -(-tiles // per_segment))


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


class Heads(NamedTuple):
    """Compile-time sizes of a head, as the kernels name them."""

    K: int
    V: int
    KH: int  # channels of the first half
    BKH: int  # of a half in registers
    BV: int  # values of a tile
    SHARED: bool  # one decay for both halves
    DOT: tl.dtype  # of the factors of matrix products
    PRECISION: str


def make_heads(q: Tensor, v: Tensor, gate_logits: Tensor, value_tile: int) -> Heads:
    key_dim, value_dim = q.shape[-1], v.shape[-1]
    half = -(-key_dim // 2)
    return Heads(
        key_dim,
        value_dim,
        half,
        max(16, triton.next_power_of_2(half)),
        min(max(16, triton.next_power_of_2(value_dim)), value_tile),
        gate_logits.shape[-1] != key_dim,
        *dot_type(q.dtype),
    )


def dot_type(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """Factors of matrix products. fp16 has not the range of the decays: it is widened to fp32 and multiplied as tf32, which
    has fp16's mantissa and fp32's range."""
    return (tl.bfloat16, "ieee") if dtype == torch.bfloat16 else (tl.float32, "tf32" if dtype == torch.float16 else "ieee")


def check_kernel_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    gate_normalizer: float,
    lower_bound: float,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    write_logits: Tensor | None = None,
) -> None:
    """Raises ValueError for what breaks the contract (`checks.check_inputs`) or what the kernels do not take."""
    check_inputs(q, k, v, gate_logits, mix, lower_bound, padding_mask, cu_seqlens, initial_state, write_logits)
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the kernels take fp32, bf16 and fp16 (computed with fp32's range), got {q.dtype}")
    for name, x in (("gate_logits", gate_logits), ("mix", mix), ("write_logits", write_logits), ("initial_state", initial_state)):
        if x is not None and (not x.is_floating_point() or x.dtype == torch.float64):
            raise ValueError(f"{name} must be fp32, bf16 or fp16, got {x.dtype}")
    if max(q.shape[-1], v.shape[-1]) > LARGEST_HEAD:
        raise ValueError(f"the kernels take heads of up to {LARGEST_HEAD} channels, got K = {q.shape[-1]}, V = {v.shape[-1]}")
    if gate_normalizer <= 0:
        raise ValueError(f"gate_normalizer must be positive, got {gate_normalizer}")
    for name, x in (("padding_mask", padding_mask), ("cu_seqlens", cu_seqlens), ("initial_state", initial_state)):
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} must be on {q.device}, got {x.device}")


def unit_stride(x: Tensor) -> Tensor:
    """x itself where its last dimension is dense (any strides before it), otherwise a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask `[B, T]` as contiguous bytes, which every backend can load."""
    return None if mask is None else mask.to(torch.bool).contiguous().view(torch.uint8)
