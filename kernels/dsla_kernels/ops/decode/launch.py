"""How a head is worked through: programs, channels and slots at a time, and the sizes that the kernels are compiled for."""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...common import dot_type, largest_tile, padded, processors
from ...overlap import can_overlap, overlapping
from .step import PureStep, WindowStep

FEW_ROWS = 4  # padding among more is left out at once; to look for it first costs a single row more than it spares
FEW_HEADS = 8  # query heads a KV head that are multiplied one by one; more go through tensor cores
LEAST_CHANNELS = 16  # a part
SLOTS_OF_PROGRAM = 128  # of a ring without states, at most


class Launch(NamedTuple):
    """How a head is worked through."""

    warps: int
    channels: int  # of both states in registers at a time, beside as many on their way
    slots: int = 64  # of the ring at a time
    registers: int | None = None  # a thread at most, so that more programs share a processor
    parts: int = 1  # programs a head; a power of two
    overlap: bool = True  # the join is launched while the parts still run, where the device can


tuned: Launch | None = None  # overrules the choice, for measurements


def round_to_power(x: float) -> int:
    """The power of two next to a positive number, by ratio."""
    return int(2 ** round(math.log2(x)))


def choose_launch(programs: int, processors: int, key_dim: int, value_dim: int, slots: int, element_size: int) -> Launch:
    """By shape: programs of one row and KV head each, padded head sizes, slots of the ring (0 without one).

    Few heads are shared by about as many programs as there are processors, with all bytes of a part on their way at once: what
    counts is the latency. With many, programs have parts of 16 or 32 KB on their way, and so few registers that several share a
    processor and one computes while the others wait. With a window a head always has programs of its own for window and states:
    on an H200 four parts were faster than one up to 64 rows of 32 heads.
    """
    registers = 128 if value_dim <= 128 and element_size == 2 else None
    parts = min(max(1, round_to_power(processors / programs)), key_dim // LEAST_CHANNELS)
    if slots:
        return Launch(4, max(16, 4096 // value_dim), 32, registers, max(parts, 4))
    if parts > 1:
        return Launch(4, max(16, 4096 // value_dim), 32, registers, parts)
    return Launch(4, 16, registers=128 if value_dim <= 128 else None)


class HeadSizes(NamedTuple):
    """Of a head and its programs, as the kernels name them."""

    HKV: int
    R: int  # query heads a KV head, and as many in registers
    BM: int
    K: int
    V: int
    BV: int
    G: int  # decays of a state
    RANK: int
    BR: int
    CHANNELS: int  # of a program: K for one that does it all
    KC: int  # of them at a time
    ROWS: int  # sums over channels that threads keep apart, see `add_products`
    PIECES: int  # of a query head, of the states
    PARTS: int  # programs for the states; of a window alone those for the ring
    STRIDE: int  # pieces of a query head in all
    FEW: bool  # query heads, which are multiplied one by one
    GATE_PRECISION: str
    OVERLAP: bool  # the join waits on the device
    SKIP: bool  # padding at once


class RingSizes(NamedTuple):
    """Of the ring and the sinks, and of the tiles in which a block leaves the ring."""

    S: int  # sinks, and as many in registers
    BS: int
    W: int  # slots of the ring
    SLOT_PARTS: int  # programs for them, beside those for the states
    SLOTS: int  # of a program
    BN: int  # of them at a time
    BK: int  # channels of a query or key in registers
    SIZE: int  # tokens of a block, and of a tile of it
    C: int
    PER_BLOCK: int  # tiles
    GC: int  # channels of the states at a time
    DOT: tl.dtype  # of the factors of matrix products
    PRECISION: str


class Plan(NamedTuple):
    """All that a step of a shape is launched with."""

    grid: tuple[int, int]
    options: dict[str, Any]  # of the kernel: sizes by name, warps, registers
    head: HeadSizes
    join: dict[str, Any]  # options of the join, where there are several parts


class Shape(NamedTuple):
    """What a plan is made by."""

    rows: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    decays: int  # 0 of a window alone
    rank: int
    dtype: torch.dtype
    device: torch.device
    skip: bool  # padding at once
    tile: int  # tokens of a tile at most


def plan_pure(step: PureStep) -> Plan:
    """Made once for a shape: a host has little time between two layers of a token."""
    return _plan_pure(_shape(step), tuned)


def plan_window(step: WindowStep) -> Plan:
    """Likewise."""
    return _plan_window(_shape(step), step.window_size, step.window_k.shape[1] - step.window_size, tuned)


def _shape(step: PureStep | WindowStep) -> Shape:
    q, v = step.q, step.v
    rows, _, heads, key_dim = q.shape
    skip = (step.real is not None or step.pages is not None) and rows > FEW_ROWS
    if step.down is None or step.bias is None:
        kv_heads, decays, rank = (step.k.shape[2] if step.kv_heads is None else step.kv_heads.shape[0]), 0, 0
    else:
        kv_heads, decays, rank = step.down.shape[0], step.bias.shape[-1], step.down.shape[-1]
    return Shape(rows, heads, kv_heads, key_dim, v.shape[-1], decays, rank, q.dtype, q.device, skip, largest_tile(q, v))


@functools.lru_cache(maxsize=1024)  # steps come one after the other, and most are alike
def _plan_pure(shape: Shape, wanted: Launch | None) -> Plan:
    launch, head = _head_sizes(shape, wanted, 0)
    gates = max(16, triton.next_power_of_2(head.G)) if launch.parts == 1 else head.CHANNELS
    return _plan(shape, launch, head, head._asdict() | {"BG": gates}, 0)


@functools.lru_cache(maxsize=1024)
def _plan_window(shape: Shape, window_size: int, sinks: int, wanted: Launch | None) -> Plan:
    size, slots = window_size // 2, max(16, triton.next_power_of_2(window_size))
    launch, head = _head_sizes(shape, wanted, slots) if shape.decays else _ring_sizes(shape, wanted, slots)
    head = head._replace(BM=max(16, head.BM))  # rows of a product of tiles
    slot_parts, least = head.STRIDE - head.PIECES, _least_columns(head.BM)
    tile = min(shape.tile, 32, max(16, triton.next_power_of_2(size)))  # seldom: rather twice than with many registers
    channels = head.G if launch.parts == 1 else head.CHANNELS
    part = slots if head.PARTS == 1 else slots // slot_parts
    dot, precision = dot_type(shape.dtype)
    ring = RingSizes(
        S=sinks,
        BS=max(least, triton.next_power_of_2(sinks)),
        W=window_size,
        SLOT_PARTS=slot_parts,
        SLOTS=window_size if head.PARTS == 1 else part,
        BN=max(least, min(launch.slots, part)),
        BK=max(16, triton.next_power_of_2(head.K)),
        SIZE=size,
        C=tile,
        PER_BLOCK=triton.cdiv(size, tile),
        GC=min(shape.tile, max(_least_columns(tile), triton.next_power_of_2(channels))),
        DOT=dot,
        PRECISION=precision,
    )
    return _plan(shape, launch, head, head._asdict() | ring._asdict(), size)


def _head_sizes(shape: Shape, wanted: Launch | None, slots: int) -> tuple[Launch, HeadSizes]:
    """slots: of the ring, a power of two, or 0 without one. What STRIDE has beyond PIECES are programs for the ring."""
    group, bytes_each = shape.heads // shape.kv_heads, shape.dtype.itemsize
    few = group <= FEW_HEADS
    block_key, block_value = max(16, triton.next_power_of_2(shape.key_dim)), padded(shape.value_dim)
    programs = shape.rows * shape.kv_heads
    launch = wanted or choose_launch(programs, processors(shape.device), block_key, block_value, slots, bytes_each)
    parts = min(launch.parts, block_key // LEAST_CHANNELS)
    launch = launch._replace(parts=parts, channels=min(launch.channels, block_key // parts))
    rows = min(launch.channels, max(1, 128 * launch.warps // block_value))  # threads load 4 values at a time
    pieces = parts * (rows if few else 1)
    slot_parts = 0
    if parts > 1 and slots:  # of about as many bytes as those of the states
        slot_parts = triton.next_power_of_2(max(1, parts * slots * bytes_each // (4 * block_value)))
        slot_parts = min(slot_parts, slots // 16)
    sizes = HeadSizes(
        HKV=shape.kv_heads,
        R=group,
        BM=triton.next_power_of_2(group) if few else max(16, triton.next_power_of_2(group)),
        K=shape.key_dim,
        V=shape.value_dim,
        BV=block_value,
        G=shape.decays,
        RANK=shape.rank,
        BR=max(16, triton.next_power_of_2(shape.rank)),
        CHANNELS=shape.key_dim if parts == 1 else block_key // parts,
        KC=launch.channels,
        ROWS=rows,
        PIECES=pieces,
        PARTS=parts,
        STRIDE=pieces + slot_parts,
        FEW=few,
        GATE_PRECISION="ieee" if shape.dtype == torch.float32 else "tf32",
        OVERLAP=parts > 1 and can_overlap(shape.device),
        SKIP=shape.skip,
    )
    return launch, sizes


def _ring_sizes(shape: Shape, wanted: Launch | None, slots: int) -> tuple[Launch, HeadSizes]:
    """Of a window alone: programs share its slots, as many as fill the card and at least one for each SLOTS_OF_PROGRAM."""
    most = (
        wanted.parts if wanted else max(round_to_power(processors(shape.device) / (shape.rows * shape.kv_heads)), slots // SLOTS_OF_PROGRAM)
    )
    parts = min(max(1, most), slots // 16)
    launch, head = _head_sizes(shape, wanted, 0)
    pieces = parts if parts > 1 else 0
    overlap = parts > 1 and can_overlap(shape.device)
    head = head._replace(CHANNELS=head.K, ROWS=1, PIECES=0, PARTS=parts, STRIDE=pieces, OVERLAP=overlap)
    return launch._replace(parts=0 if pieces else 1, slots=32), head


def _plan(shape: Shape, launch: Launch, head: HeadSizes, sizes: dict[str, Any], block: int) -> Plan:
    slot_parts = head.STRIDE - head.PIECES
    join = {
        "HQ": shape.heads,
        "V": head.V,
        "BV": head.BV,
        "PIECES": head.PIECES,
        "SLOT_PARTS": slot_parts,
        "STRIDE": head.STRIDE,
        "SIZE": block,
        "OVERLAP": head.OVERLAP,
        "num_warps": max(1, max(head.PIECES, slot_parts) * head.BV // 4096),  # one warp adds without a barrier
        **overlapping(head.OVERLAP and launch.overlap),
    }
    options = sizes | {"num_warps": launch.warps, "maxnreg": launch.registers, "num_stages": 1}
    return Plan((shape.rows * shape.kv_heads, launch.parts + slot_parts), options, head, join)


def _least_columns(rows: int) -> int:
    """Of a matrix product: with 64 rows Triton 3.6 multiplies on Hopper's tensor cores, and goes wrong with 16 columns."""
    return 32 if rows >= 64 else 16
