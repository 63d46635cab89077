"""What the Triton kernels share: the gate, tiles of tokens and states, and sizes of launches."""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 64  # tokens a tile at most; the bound on the decay is chosen for it
LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = triton.knobs.runtime.interpret
# Arguments of kernels that another number of heads changes: heads themselves, and into how many parts their tokens are cut. Layers,
# levels and steps of training differ in them, so they are neither constants nor specialised (for 1, for multiples of 16): a kernel is
# compiled once for all of them. They multiply sizes of heads, which are constants: the compiler still knows what is aligned.
COUNTS = ("HKV", "HQ", "HELD", "segments", "per_segment", "steps", "parts", "per_part")


# --- device side ----------------------------------------------------------------------------------------------------


@triton.jit
def fast_exp2(x):
    """2^x as the hardware has it: results below fp32's normal numbers are 0."""
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def fast_log2(x):
    """log2 as the hardware has it, to an absolute error of 2^-22."""
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def inverse(x, EXACT: tl.constexpr):
    """1 / x, unless EXACT as the hardware has it."""
    if EXACT:
        return 1 / x
    else:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


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
def numbers(first, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK numbers from `first` on, and which of them are below SIZE."""
    found = first + tl.arange(0, BLOCK)
    return found, found < SIZE


@triton.jit
def channel_columns(K: tl.constexpr, G: tl.constexpr, BK: tl.constexpr):
    """Channels of a tile, which of them exist, and the numbers of their gates. With a gate for channels i and i + G these lie
    BK / 2 apart, so that sums over a pair are sums over halves."""
    columns = tl.arange(0, BK)
    if G == K:
        return columns, columns < K, columns
    elif 2 * G == BK:
        return columns, columns < K, columns % G
    else:
        gates = columns % (BK // 2)
        channels = columns // (BK // 2) * G + gates
        return channels, (gates < G) & (channels < K), gates


@triton.jit
def sum_over_pairs(x, K: tl.constexpr, G: tl.constexpr):
    """Of a tile `[C, BK]` a column for each gate."""
    if G == K:
        return x
    else:
        return tl.sum(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), 1)


@triton.jit
def load_write_gate(write_logits, offset, tokens, token_ok, stride):
    """Share of each token `[C]` that a state takes in: sigmoid of the raw write gate, 1 without one, 0 at no-ops."""
    if write_logits is None:
        return token_ok.to(tl.float32)
    else:
        logits = tl.load(write_logits + offset + tokens * stride, mask=token_ok, other=0.0).to(tl.float32)
        return tl.where(token_ok, tl.sigmoid(logits), 0.0)


@triton.jit
def number_of(numbers, row, otherwise):
    """A row's entry of int `[N]`, or `otherwise` where numbers is None."""
    if numbers is not None:
        otherwise = tl.load(numbers + row).to(tl.int32)
    return otherwise


@triton.jit
def layer_head(kv_heads, head):
    """Of a KV head its number among those in keys and values: int `[Hkv]` says it, where these are of all heads of a layer."""
    return number_of(kv_heads, head, head).to(tl.int64)


@triton.jit
def tile_tokens(tile, PER_BLOCK: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """Tokens of a tile `[C]`, and which of them lie in its block."""
    inside = tile % PER_BLOCK * C + tl.arange(0, C)
    return tile // PER_BLOCK * SIZE + inside, inside < SIZE


@triton.jit
def row_span(row, T, length, row_first, row_length):
    """Of a row: its batch entry, first token there, first token among all B * T, and number of tokens.

    Without `row_first` rows are the entries of the batch; with it they lie one behind the other in the only entry.
    """
    row = row.to(tl.int64)
    length = number_of(row_length, row, length)
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


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Strides of each `[B, T, H, D]` but for its last dimension, which is dense, as the kernels take them."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


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
    """Blocks of `size` tokens; where `programs` programs do not fill the card about twice, segments that do so three times.

    segment_blocks: blocks a segment, to overrule the choice. largest: tokens a tile at most.
    """
    tile = min(largest, max(16, triton.next_power_of_2(size)))
    per_block = -(-size // tile)
    blocks = -(-tokens // size)
    if segment_blocks is None:
        segment_blocks = blocks
        if programs < 1.5 * processors(device):  # a second pass over keys and values is worth its while
            segment_blocks = max(blocks * programs // (3 * processors(device)), 2)
    per_segment = min(segment_blocks, blocks) * per_block
    tiles = blocks * per_block
    return Tiling(size, tile, per_block, tiles, per_segment, -(-tiles // per_segment))


def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def shared_memory(device: torch.device) -> int:
    """Bytes that a program can have of a processor's shared memory."""
    if device.type != "cuda":
        return 2**30
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)


class Heads(NamedTuple):
    """Compile-time sizes of a head, as the kernels name them."""

    K: int
    V: int
    G: int  # gates of a state: K, or one for channels i and i + G
    BK: int  # channels in registers, as `channel_columns` places them
    BV: int  # values of a tile
    DOT: tl.dtype  # of the factors of matrix products
    PRECISION: str


def padded(size: int, least: int = 64) -> int:
    """Size in registers, a power of two. At least 64 by default: seen on an H200 with Triton 3.6, products of 64 rows by 32 columns or
    fewer with a factor in registers were now and then wrong in bf16."""
    return max(least, triton.next_power_of_2(size))


def make_heads(q: Tensor, v: Tensor, gate_logits: Tensor, value_tile: int) -> Heads:
    key_dim, value_dim, gates = q.shape[-1], v.shape[-1], gate_logits.shape[-1]
    return Heads(
        key_dim,
        value_dim,
        gates,
        padded(key_dim) if gates == key_dim else 2 * padded(gates, 32),
        min(padded(value_dim), value_tile),
        *dot_type(q.dtype),
    )


def dot_type(dtype: torch.dtype) -> tuple[tl.dtype, str]:
    """Factors of matrix products. fp16 has not the range of the decays: it is widened to fp32 and multiplied as tf32, which
    has fp16's mantissa and fp32's range."""
    return (tl.bfloat16, "ieee") if dtype == torch.bfloat16 else (tl.float32, "tf32" if dtype == torch.float16 else "ieee")


def unit_stride(x: Tensor) -> Tensor:
    """x itself where its last dimension is dense (any strides before it), otherwise a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    """A mask `[B, ...]` as contiguous bytes, which every backend can load; without a launch where it is bool."""
    if mask is None:
        return None
    if mask.dtype == torch.bool and not torch.compiler.is_compiling():  # Inductor of torch 2.11 has no width for bool
        return mask.contiguous().view(torch.uint8)
    return mask.to(torch.bool).to(torch.uint8).contiguous()
