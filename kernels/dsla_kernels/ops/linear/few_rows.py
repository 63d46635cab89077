"""Linear layers of a few rows, such as one token of each of a few texts, in Triton.

What counts are the bytes of the weights, each read once: a program has a few rows of them, and asks for tiles ahead of those that it
multiplies. One row of x is multiplied and summed as it comes, more of them by tensor cores. Several layers of one x are one launch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..._ops import add_op_namespace_prefix, ops
from ...checks import MOST_ROWS, MOST_WEIGHTS, check_gated_linear_inputs, check_linears_inputs
from ...common import on_its_device
from ...overlap import can_overlap, overlapping


@triton.jit
def _places(first, second, third, number, end1, end2, stride):
    """Where row `number` of up to three matrices, one below the other, begins; the second starts at row end1, the third at end2."""
    places = first + number * stride
    if second is not None:
        places = tl.where(number < end1, places, second + (number - end1) * stride)
    if third is not None:
        places = tl.where(number < end2, places, third + (number - end2) * stride)
    return places


@triton.jit
def _load_weights(places, columns, K: tl.constexpr, ALL: tl.constexpr):
    """A tile of weights. They are read once, and shall not take the place of what is read again. ALL: its columns all exist."""
    pointers = places[:, None] + columns[None, :]
    if ALL:
        return tl.load(pointers, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=(columns < K)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _add_product(sums, x, weights, rows, columns, K: tl.constexpr, BM: tl.constexpr, VECTOR: tl.constexpr, ALL: tl.constexpr):
    """sums, `[BN, BK / VECTOR]` of one row or `[BM, BN]`, and the product of a tile of weights `[BN, BK]` with x."""
    if BM == 1:
        some = tl.load(x + columns) if ALL else tl.load(x + columns, mask=columns < K, other=0.0)
        product = weights.to(tl.float32) * some.to(tl.float32)[None, :]
        # What a thread has loaded at once it sums at once; the sums of threads wait for the end.
        return sums + tl.sum(tl.reshape(product, (weights.shape[0], weights.shape[1] // VECTOR, VECTOR)), 2)
    else:
        row = tl.arange(0, BM)
        some = tl.load(x + row[:, None] * K + columns[None, :], mask=(row < rows)[:, None] & (columns < K)[None, :], other=0.0)
        # x on the left: of 16 rows Triton makes no warp-group products, which were seen to go wrong with few columns.
        return tl.dot(some, tl.trans(weights), acc=sums, input_precision="ieee")


@triton.jit(do_not_specialize=["rows"])
def _few_rows_kernel(
    x,  # [rows, K]
    weight1,  # [end1, K]
    weight2,  # [end2 - end1, K] or None
    weight3,  # [end - end2, K] or None
    bias1,  # [end1], and so on, or None
    bias2,
    bias3,
    o1,  # [rows, end1], and so on; the only one if GATE
    o2,
    o3,
    rows,  # not specialised: fewer variants to compile
    end1,
    end2,
    end,
    stride,  # from a row of a weight to the next
    K: tl.constexpr,
    BM: tl.constexpr,  # rows of a product, or 1
    BN: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    VECTOR: tl.constexpr,  # weights in 16 bytes
    GATE: tl.constexpr,  # the activation of the first weight's product, which then gates the second's; or None
    OVERLAP: tl.constexpr,
):
    tile = tl.program_id(0) * BN + tl.arange(0, BN)
    if GATE is None:
        number = tile
        last = end - 1
        places = _places(weight1, weight2, weight3, tl.minimum(number, last).to(tl.int64), end1, end2, stride)
    else:  # rows of both side by side
        number = tile // 2
        last = end1 - 1
        both = tl.minimum(number, last).to(tl.int64) * stride
        places = tl.where(tile % 2 == 0, weight1 + both, weight2 + both)
    columns = tl.arange(0, BK)
    if BM == 1:
        sums = tl.zeros([BN, BK // VECTOR], tl.float32)
    else:
        sums = tl.zeros([BM, BN], tl.float32)
    ALL: tl.constexpr = K % BK == 0
    if OVERLAP:
        gdc_launch_dependents()
    if OVERLAP or STAGES == 1:
        weights = _load_weights(places, columns, K, ALL)
    if OVERLAP:  # the weights are there already, x is perhaps on its way
        gdc_wait()
    if STAGES == 1:
        # A tile ahead, which the compiler then asks for as a whole: left to itself it saves registers, and waits within a tile.
        for start in tl.range(0, K, BK):
            some = start + columns
            following = _load_weights(places, some + BK, K, False)
            sums = _add_product(sums, x, weights, rows, some, K, BM, VECTOR, ALL)
            weights = following
    else:
        if OVERLAP:
            sums = _add_product(sums, x, weights, rows, columns, K, BM, VECTOR, ALL)
        for start in tl.range(BK if OVERLAP else 0, K, BK, num_stages=STAGES):
            some = start + columns
            sums = _add_product(sums, x, _load_weights(places, some, K, ALL), rows, some, K, BM, VECTOR, ALL)
    if BM == 1:
        sums = tl.sum(sums, 1)[None, :]
    row = tl.arange(0, BM)[:, None]
    if GATE is None:
        if bias1 is not None:
            bias = _places(bias1, bias2, bias3, number, end1, end2, 1)
            sums += tl.load(bias, mask=number <= last, other=0.0).to(tl.float32)[None, :]
        width = end1 + number * 0
        if o2 is not None:
            width = tl.where(number < end1, width, end2 - end1)
        if o3 is not None:
            width = tl.where(number < end2, width, end - end2)
        outputs = _places(o1, o2, o3, number, end1, end2, 1)[None, :] + row * width[None, :]
        tl.store(outputs, sums.to(o1.dtype.element_ty), mask=(row < rows) & (number <= last)[None, :])
    else:
        gate, up = tl.split(tl.reshape(sums, (BM, BN // 2, 2)))
        # Rounded wherever the separate layers are.
        gate = gate.to(o1.dtype.element_ty).to(tl.float32)
        up = up.to(o1.dtype.element_ty).to(tl.float32)
        if GATE == "gelu_tanh":
            gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
        else:
            gate = gate / (1 + tl.exp(-gate))
        gate = gate.to(o1.dtype.element_ty).to(tl.float32)
        column = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        tl.store(o1 + row * end1 + column[None, :], (gate * up).to(o1.dtype.element_ty), mask=(row < rows) & (column <= last)[None, :])


class Launch(NamedTuple):
    """How weights are read."""

    rows: int  # of the weights, a program
    columns: int  # a tile
    warps: int
    stages: int  # tiles on their way, and the one that is multiplied; with 1 they go through no shared memory


tuned: Launch | None = None  # overrules the choice, for measurements


def configuration(rows: int, n: int, k: int, element_size: int, gated: bool = False) -> Launch:
    """For `rows` rows of x and weights `[n, k]` in all, their elements of so many bytes: the best found on an H200 in bf16."""
    if rows == 1:
        wide = 8192 // element_size
        return Launch(4, wide, 8, 1) if k % wide == 0 else Launch(4, wide // 4, 4, 1)
    return Launch(32, 512 // element_size, 4, 5 if gated or n <= 4096 else 3)


@torch.library.custom_op(add_op_namespace_prefix("linears"), mutates_args=())
@on_its_device
def _linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], overlap: bool) -> list[Tensor]:
    outputs = _outputs(x, weights)
    _run(x, weights, biases, outputs, None, overlap)
    return outputs


@torch.library.custom_op(add_op_namespace_prefix("gated_linear"), mutates_args=())
@on_its_device
def _gated_linear(x: Tensor, gate_weight: Tensor, up_weight: Tensor, activation: str, overlap: bool) -> Tensor:
    outputs = _outputs(x, [gate_weight])
    _run(x, [gate_weight, up_weight], [], outputs, activation, overlap)
    return outputs[0]


def _outputs(x: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


@_linears.register_fake
def _(x, weights, biases, overlap):
    return _outputs(x, weights)


@_gated_linear.register_fake
def _(x, gate_weight, *others):
    return _outputs(x, [gate_weight])[0]


def _run(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], outputs: Sequence[Tensor], gate: str | None, overlap: bool
) -> None:
    rows, k = x.shape
    end1, end2, end = (sum(weight.shape[0] for weight in weights[:count]) for count in (1, 2, 3))
    launch = tuned or configuration(rows, end, k, x.element_size(), gate is not None)
    overlap = overlap and can_overlap(x.device)
    _few_rows_kernel[(-(-end // launch.rows),)](
        x,
        *_three(weights),
        *_three(biases),
        *_three(outputs),
        rows,
        end1,
        end2,
        end,
        weights[0].stride(0),
        K=k,
        BM=1 if rows == 1 else MOST_ROWS,
        BN=launch.rows,
        BK=launch.columns,
        STAGES=launch.stages,
        VECTOR=16 // x.element_size(),
        GATE=gate,
        OVERLAP=overlap,
        num_warps=launch.warps,
        **overlapping(overlap),
    )


def _three(tensors: Sequence[Tensor]) -> list[Tensor | None]:
    return [*tensors, *[None] * (MOST_WEIGHTS - len(tensors))]


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None, *, overlap: bool = False) -> list[Tensor]:
    """Linear layers of one x in one launch, each as `F.linear`, with sums in fp32. No gradient.

    Args:
        x: `[..., K]`, 1 to 16 rows in bf16, fp16 or fp32.
        weights: one to three `[N, K]` in x's dtype, with a dense last dimension and the same distance from row to row.
        biases: `[N]` for each weight, contiguous, in x's dtype; or None.
        overlap: from Hopper on, ask for weights while the kernel before still runs. No weight may come out of that kernel.

    Returns:
        `[..., N]` in x's dtype for each weight.

    Raises:
        ValueError: names the argument that does not fit, or that wants a gradient.
    """
    biases = [] if biases is None else biases
    check_linears_inputs(x, weights, biases)
    outputs = ops.linears(x.reshape(-1, x.shape[-1]).contiguous(), weights, biases, overlap)
    return [output.view(*x.shape[:-1], -1) for output in outputs]


def gated_linear(x: Tensor, gate_weight: Tensor, up_weight: Tensor, activation: str = "silu", *, overlap: bool = False) -> Tensor:
    """The first half of a gated MLP in one launch: arguments, result and mathematics of `reference.gated_linear`, for 1 to 16 rows in
    bf16, fp16 or fp32. No gradient. `overlap` as in `linears`.

    Raises:
        ValueError: names the argument that does not fit, or that wants a gradient.
    """
    check_gated_linear_inputs(x, gate_weight, up_weight, activation)
    check_linears_inputs(x, [gate_weight, up_weight], [])
    output = ops.gated_linear(x.reshape(-1, x.shape[-1]).contiguous(), gate_weight, up_weight, activation, overlap)
    return output.view(*x.shape[:-1], -1)
