"""The decays of every tile of tokens, worked into keys and kept as factors for queries, in Triton.

With b the cumulative log-decays of a tile and m half of its last one, everything that is read or written inside a tile needs
q exp(b - m), k exp(m - b) and the states times exp(m); none of these exponents is beyond 40. This kernel goes once over k, the
raw gates, the write gates and the mask, at about the speed of memory; no later pass, forward or backward, needs any of them to
find the states: no-ops have a key and a query factor of zero.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import (
    COUNTS,
    LOG2_E,
    Tiling,
    bounded_log_decay,
    fast_exp2,
    fast_log2,
    layer_head,
    load_mask,
    load_rows,
    load_write_gate,
    numbers,
    padded,
    row_span,
    store_rows,
    strides,
    tile_tokens,
)
from .inputs import StateInputs


class Decayed(NamedTuple):
    """query_factors `[B, T, Hkv, 2, G]`: exp(b - m); keys `[B, T, Hkv, 2, K]`: write * k exp(m - b), both in the type of matrix
    factors; at_middle fp32 `[N, tiles, Hkv, 2, G]`: exp(m)."""

    query_factors: Tensor
    keys: Tensor
    at_middle: Tensor


@triton.jit
def load_middle(at_middle, tile, tile_ok, stride, gates, channel_ok):
    """exp(m) of a tile `[BK]`; 1 for a tile that is not there."""
    return tl.load(
        at_middle + tile * stride + gates, mask=channel_ok & (gates * 0 + tile_ok > 0), other=1.0
    )  # a tile as mask, for the interpreter


@triton.jit
def cumulative(x, EXACT: tl.constexpr):
    """Sums of the rows up to each row, `[C, columns]`; unless EXACT by tensor cores, with x in two bf16 parts. Not with fewer than 64
    columns: in the gradients of gates that product was wrong or read out of range (Triton 3.6 on an H200)."""
    if EXACT or x.shape[1] < 64:
        return tl.cumsum(x, 0)
    else:
        C: tl.constexpr = x.shape[0]
        causal = (tl.arange(0, C)[:, None] >= tl.arange(0, C)[None, :]).to(tl.bfloat16)
        upper = x.to(tl.bfloat16)
        lower = (x - upper.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(causal, upper, acc=tl.dot(causal, lower))


@triton.jit(do_not_specialize=COUNTS)
def _decay_kernel(
    k, gate_logits, write_logits,
    mask,  # uint8 [B, T] or None
    row_first,  # [N] or None: rows are the batch's
    row_length,  # [N] or None: `length` for all
    kv_heads,  # [Hkv] or None: k is of these heads alone
    query_factors, keys, at_middle,
    k_b, k_t, k_h,
    T, length, tiles, inverse_normalizer, bound,
    HKV, K: tl.constexpr, G: tl.constexpr, BG: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr,
    PER_BLOCK: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    GATE_TILES: tl.constexpr = tl.cdiv(G, BG)
    head_state, tile, row = tl.program_id(0) // GATE_TILES, tl.program_id(1), tl.program_id(2)  # states side by side: they share k
    batch, first, flat, length = row_span(row, T, length, row_first, row_length)
    tokens, in_block = tile_tokens(tile, PER_BLOCK, SIZE, C)
    in_row = in_block & (tokens < length)
    token_ok = load_mask(mask, flat, tokens, in_row)
    gates, gate_ok = numbers(tl.program_id(0) % GATE_TILES * BG, G, BG)
    offset = flat * HKV * 2 + head_state
    # Outside, gates so open that nothing decays. Without EXACT, exponents of base 2; what overflows ends at the bound.
    pointers = gate_logits + offset * G + (tokens.to(tl.int64) * (HKV * 2 * G))[:, None] + gates[None, :]
    logits = tl.load(pointers, mask=token_ok[:, None] & gate_ok[None, :], other=1e4).to(tl.float32)
    if EXACT:
        log_decay = bounded_log_decay(logits, inverse_normalizer, bound) * LOG2_E
    else:
        log_decay = tl.maximum(fast_log2(1 + fast_exp2(logits * -LOG2_E)) * -inverse_normalizer, bound * LOG2_E)
    middle = tl.sum(log_decay, 0) * 0.5
    from_middle = cumulative(log_decay, EXACT) - middle[None, :]
    if EXACT:
        factors = tl.exp2(from_middle)
        scale = tl.exp2(-from_middle)
    else:
        factors = fast_exp2(from_middle)
        scale = fast_exp2(-from_middle)
    if mask is not None:
        factors = tl.where(token_ok[:, None], factors, 0.0)
    if write_logits is not None:
        scale *= load_write_gate(write_logits, offset, tokens, token_ok, HKV * 2)[:, None]
    store_rows(query_factors + offset * G, tokens, in_row, HKV * 2 * G, gates, gate_ok, factors)
    tl.store(at_middle + ((row.to(tl.int64) * tiles + tile) * HKV * 2 + head_state) * G + gates, tl.exp2(middle), mask=gate_ok)
    k += batch * k_b + first * k_t + layer_head(kv_heads, head_state // 2) * k_h
    for start in tl.static_range(0, K, G):  # once or, with a gate for channels i and i + G, twice
        channels = start + gates
        channel_ok = gate_ok & (channels < K)
        key = load_rows(k, tokens, token_ok, k_t, channels, channel_ok).to(tl.float32) * scale
        store_rows(keys + offset * K, tokens, in_row, HKV * 2 * K, channels, channel_ok, key)


def decay_keys(inputs: StateInputs, tiling: Tiling) -> Decayed:
    """Of the tokens of each row, in `inputs.dtype`. What lies behind a row's end is not written."""
    k, gate_logits = inputs.k, inputs.gate_logits
    gates = gate_logits.shape[-1]
    query_factors = torch.empty(gate_logits.shape, dtype=inputs.dtype, device=k.device)
    keys = torch.empty(*gate_logits.shape[:-1], k.shape[-1], dtype=inputs.dtype, device=k.device)
    at_middle = torch.empty(inputs.rows, tiling.tiles, inputs.num_kv_heads, 2, gates, dtype=torch.float32, device=k.device)
    block = min(64, padded(gates, 32))
    _decay_kernel[(inputs.num_kv_heads * 2 * triton.cdiv(gates, block), tiling.tiles, inputs.rows)](
        k,
        gate_logits,
        inputs.write_logits,
        inputs.mask,
        inputs.row_first,
        inputs.row_length,
        inputs.kv_heads,
        query_factors,
        keys,
        at_middle,
        *strides(k),
        k.shape[1],
        inputs.length,
        tiling.tiles,
        1.0 / inputs.gate_normalizer,
        inputs.lower_bound,
        HKV=inputs.num_kv_heads,
        K=k.shape[-1],
        G=gates,
        BG=block,
        SIZE=tiling.size,
        C=tiling.tile,
        PER_BLOCK=tiling.per_block,
        EXACT=inputs.dtype == torch.float32,
        num_warps=4,
    )
    return Decayed(query_factors, keys, at_middle)
