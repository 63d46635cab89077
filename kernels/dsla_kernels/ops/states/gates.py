"""Raw gates and raw write gates from values, in one pass over the values, in Triton.

What counts are bytes: 2 V a token and head are read (in bf16), 8 G written. So the weights of a head are loaded, and cut into parts
for the tensor cores, once for several tiles of tokens.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ... import reference
from ..._ops import add_op_namespace_prefix, ops
from ...checks import KERNEL_GATES, LARGEST_HEAD, LARGEST_RANK, check_gate_inputs, check_no_gradient_of_heads
from ...common import COUNTS, layer_head, load_rows, numbers, on_its_device, processors, store_rows, strides, unit_stride
from ...shapes import contiguous

TILE = 32  # tokens; below 64, so that products may have the few columns of a rank (see `common.padded`)
GATE_TILE = 128  # gates of a program, of both states together
WHOLE = 8192  # bytes of a head's `gate_down` in v's dtype, up to which a program keeps all of it


@triton.jit
def _two_parts(x, DOT: tl.constexpr):
    """x as a sum of two: in bf16 these have 16 bits of its mantissa, in fp16 22, in fp32 the first is x."""
    upper = x.to(DOT)
    return upper, (x - upper.to(tl.float32)).to(DOT)


@triton.jit
def _load_weights(down, write_weight, values, value_ok, RANK: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr):
    """Rows `values` of what a head's values are multiplied with: `down` in two parts, and both columns of the write gate."""
    rank = tl.arange(0, BR)
    upper, lower = _two_parts(load_rows(down, values, value_ok, RANK, rank, rank < RANK).to(tl.float32), DOT)
    if write_weight is None:
        return upper, lower
    else:
        write1 = tl.load(write_weight + values * 2, mask=value_ok, other=0.0).to(tl.float32)
        write2 = tl.load(write_weight + values * 2 + 1, mask=value_ok, other=0.0).to(tl.float32)
        return upper, lower, write1, write2


@triton.jit(do_not_specialize=COUNTS)
def _gate_kernel(
    v,
    down,  # [Hkv, V, RANK]
    up,  # [Hkv, RANK, GATES]
    bias,  # [Hkv, GATES]
    write_weight,  # [Hkv, V, 2] or None
    write_bias,  # [Hkv, 2] or None
    kv_heads,  # [Hkv] or None: v is of these heads alone
    gate_logits,  # fp32 [B, T, Hkv, GATES]
    write_logits,  # fp32 [B, T, Hkv, 2]
    v_b, v_t, v_h,
    T,
    parts,  # programs a row, head and tile of gates
    per_part,  # tiles of C tokens
    norm_eps,
    HKV, V: tl.constexpr, RANK: tl.constexpr,
    GATES: tl.constexpr,  # of both states
    BV: tl.constexpr,  # values at a time
    BR: tl.constexpr, BG: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    DOT: tl.constexpr = v.dtype.element_ty
    EXACT: tl.constexpr = v.dtype.element_ty == tl.float32
    GATE_TILES: tl.constexpr = (GATES + BG - 1) // BG
    number = tl.program_id(0)  # tiles of gates and heads side by side: they share values, or lie side by side in memory
    gate_tile, head = number % GATE_TILES, number // GATE_TILES % HKV
    part, row = number // (GATE_TILES * HKV) % parts, (number // (GATE_TILES * HKV) // parts).to(tl.int64)
    down += head * V * RANK
    if write_weight is not None:
        write_weight += head * V * 2
        write_shift1 = tl.load(write_bias + head * 2).to(tl.float32)
        write_shift2 = tl.load(write_bias + head * 2 + 1).to(tl.float32)
    rank = tl.arange(0, BR)
    gates, gate_ok = numbers(gate_tile * BG, GATES, BG)
    up_tile = load_rows(up + head * RANK * GATES, rank, rank < RANK, GATES, gates, gate_ok).to(tl.float32)
    up_upper, up_lower = _two_parts(up_tile, DOT)
    shift = tl.load(bias + head * GATES + gates, mask=gate_ok, other=0.0).to(tl.float32)
    values = tl.arange(0, BV)
    if BV >= V:
        weights = _load_weights(down, write_weight, values, values < V, RANK, BR, DOT)
    v += row * v_b + layer_head(kv_heads, head) * v_h
    first = row * T * HKV + head
    for tile in range(part * per_part, tl.minimum(part * per_part + per_part, (T + C - 1) // C)):
        tokens = tile * C + tl.arange(0, C)
        token_ok = tokens < T
        squares = tl.zeros([C], tl.float32)
        write1 = tl.zeros([C], tl.float32)
        write2 = tl.zeros([C], tl.float32)
        hidden = tl.zeros([C, BR], tl.float32)
        for start in range(0, V, BV):
            some = start + values
            if BV < V:
                weights = _load_weights(down, write_weight, some, some < V, RANK, BR, DOT)
            # Into the product as they are: normalised values would have to be rounded.
            x = load_rows(v, tokens, token_ok, v_t, some, some < V)
            if EXACT:
                hidden = tl.dot(x, weights[0], acc=hidden, input_precision="tf32x3")
            else:
                hidden = tl.dot(x, weights[0], acc=tl.dot(x, weights[1], acc=hidden))
            x = x.to(tl.float32)
            squares += tl.sum(x * x, 1)
            if write_weight is not None:  # two columns are too few for a product of tiles
                write1 += tl.sum(x * weights[2][None, :], 1)
                write2 += tl.sum(x * weights[3][None, :], 1)
        inverse_rms = tl.rsqrt(squares / V + norm_eps)
        hidden *= inverse_rms[:, None]
        if EXACT:
            logits = tl.dot(hidden, up_tile, input_precision="tf32x3")
        else:
            upper, lower = _two_parts(hidden, DOT)
            logits = tl.dot(upper, up_upper, acc=tl.dot(lower, up_upper, acc=tl.dot(upper, up_lower)))
        store_rows(gate_logits + first * GATES, tokens, token_ok, HKV * GATES, gates, gate_ok, logits + shift[None, :])
        if write_weight is not None:  # noqa: SIM102 (known at compile time, the other is not)
            if gate_tile == 0:
                places = write_logits + first * 2 + tokens.to(tl.int64) * (HKV * 2)
                tl.store(places, write1 * inverse_rms + write_shift1, mask=token_ok)
                tl.store(places + 1, write2 * inverse_rms + write_shift2, mask=token_ok)


@torch.library.custom_op(add_op_namespace_prefix("gate_logits"), mutates_args=())
@on_its_device
def _gate_logits(
    v: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor,
    write_weight: Tensor | None,
    write_bias: Tensor | None,
    kv_heads: Tensor | None,
    norm_eps: float,
) -> tuple[Tensor, Tensor]:
    """Raw gates and raw write gates (empty without a write gate)."""
    batch, tokens, _, value_dim = v.shape
    num_kv_heads = gate_bias.shape[0]
    rank, gates = gate_up.shape[1:]
    block_value, block_rank = (max(16, triton.next_power_of_2(size)) for size in (value_dim, rank))
    if block_value * block_rank * v.element_size() > WHOLE:
        block_value = min(64, 2048 // block_rank)
    gate_logits, write_logits = _outputs(v, gate_bias, write_weight)
    gate_tile = min(GATE_TILE, max(16, triton.next_power_of_2(gates)))
    columns = num_kv_heads * triton.cdiv(gates, gate_tile)
    tiles = triton.cdiv(tokens, TILE)
    # As many tiles a program as leave work for three times what the card holds at once.
    per_part = max(1, min(batch * columns * tiles // (12 * processors(v.device)), 16, tiles))
    parts = triton.cdiv(tiles, per_part)
    _gate_kernel[(batch * columns * parts,)](
        v,
        gate_down,
        gate_up,
        gate_bias,
        write_weight,
        write_bias,
        kv_heads,
        gate_logits,
        write_logits,
        *strides(v),
        tokens,
        parts,
        per_part,
        norm_eps,
        HKV=num_kv_heads,
        V=value_dim,
        RANK=rank,
        GATES=gates,
        BV=block_value,
        BR=block_rank,
        BG=gate_tile,
        C=TILE,
        num_warps=4,
        num_stages=3,
    )
    return gate_logits, write_logits


def _outputs(v: Tensor, gate_bias: Tensor, write_weight: Tensor | None) -> tuple[Tensor, Tensor]:
    tokens = *v.shape[:2], gate_bias.shape[0]
    writes = (0,) if write_weight is None else (*tokens, 2)
    return v.new_empty(*tokens, *gate_bias.shape[1:], dtype=torch.float32), v.new_empty(writes, dtype=torch.float32)


@_gate_logits.register_fake
def _(v, gate_down, gate_up, gate_bias, write_weight, *others):
    return _outputs(v, gate_bias, write_weight)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:6])
    ctx.norm_eps = inputs[7]


def _backward(ctx, *d_outputs):
    """Through the reference, which is computed again: nothing but the inputs is kept for it."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs: list[Any] = [None if x is None else x.view_as(x) for x in ctx.saved_tensors]
        outputs = reference.gate_logits(*inputs, norm_eps=ctx.norm_eps)
    pairs = [(x, d) for x, d in zip(outputs, d_outputs, strict=True) if x is not None and x.requires_grad]
    needed = [x for x in inputs if x is not None and x.requires_grad]
    gradients = iter(torch.autograd.grad([x for x, _ in pairs], needed, [d for _, d in pairs], create_graph=create_graph))
    return *(next(gradients) if x is not None and x.requires_grad else None for x in inputs), None, None


_gate_logits.register_autograd(_backward, setup_context=_save)


def gate_logits(
    v: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor,
    write_weight: Tensor | None = None,
    write_bias: Tensor | None = None,
    *,
    norm_eps: float,
    kv_heads: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Raw gates and raw write gates from values: arguments, results and mathematics of `reference.gate_logits`.

    v is bf16, fp32 or fp16 with any strides but a dense last dimension (anything else is copied) and heads of up to 256, the rank is
    64 at most; the weights may be fp32, bf16 or fp16 and, beside values in fp16, lie within its range. They are not rounded to v's
    dtype: tensor cores multiply them in parts. Differentiable in all of them, unless there
    are kv_heads; what is needed for that is computed again.

    Raises:
        ValueError: names the argument that does not fit, before anything is launched.
    """
    weights = (gate_down, gate_up, gate_bias, write_weight, write_bias)
    check_gate_inputs(v, *weights, kv_heads, tables=KERNEL_GATES)
    check_no_gradient_of_heads(kv_heads, v, *weights)
    if v.shape[-1] > LARGEST_HEAD:
        raise ValueError(f"the kernel takes heads of up to {LARGEST_HEAD} channels, got V = {v.shape[-1]} for v")
    if gate_down.shape[-1] > LARGEST_RANK:
        raise ValueError(f"the kernel takes a rank of up to {LARGEST_RANK}, got {gate_down.shape[-1]} for gate_down")
    gates, writes = ops.gate_logits(unit_stride(v), *contiguous(*weights), kv_heads, norm_eps)
    return gates, None if write_weight is None else writes
