"""Plain softmax attention of a piece of a text over its keys and values in blocks, for prompts that are read piece by piece.

FlashAttention's forward pass (Dao, 2023) over a block table: keys and values are read where they lie, and lengths on the device. Neither
does a copy of the cache come first, nor does the host read a length, so that one CUDA graph serves pieces at any place of any text.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..._ops import add_op_namespace_prefix, ops
from ...checks import check_softmax_kernel_inputs, check_softmax_prompt_inputs
from ...common import COUNTS, on_its_device, shared_memory, unit_stride
from ...shapes import new_output
from ..window.softmax import softmax_scores, softmax_step
from .tiles import DOT_TYPES, NOTHING, Launch, head_tiles, load_tokens


@triton.jit
def _load_tile(
    cache, table, tile, length, block_stride, token_stride, columns, column_ok, DTYPE: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr
):
    """A tile of keys or values of one head, zero behind the length."""
    token = tile * BN + tl.arange(0, BN)
    inside = token < length
    if BLOCK % BN == 0:  # a tile lies in one block
        block = tl.load(table + tile * BN // BLOCK).to(tl.int64)
    else:
        block = tl.load(table + token // BLOCK, mask=inside, other=0).to(tl.int64)
    return load_tokens(cache, block, token % BLOCK, inside, block_stride, token_stride, columns, column_ok, DTYPE)


@triton.jit(do_not_specialize=COUNTS)
def _softmax_prompt_kernel(
    q,  # [B, T, Hq, K], of any strides but a dense last dimension
    keys,  # [blocks, BLOCK, Hkv, K], likewise
    values,
    starts,  # [B]
    lengths,
    block_table,  # [B, most blocks]; with places [tables, B, most blocks]
    places,  # [Hkv, 2] or None
    o,  # [B, T, Hq, V]
    q_row,
    q_token,
    q_head,
    k_block,
    k_token,
    k_head,
    v_block,
    v_token,
    v_head,
    table_row,
    table_next,
    room,  # tokens of a row at most
    T,
    window,  # or None
    scale,
    HQ,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,
    DOT: tl.constexpr,
):
    """Some queries of one row and head. Those that see most come first: the short ones then fill the gaps at the end."""
    first = (tl.num_programs(2) - 1 - tl.program_id(2)) * BM
    head, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, length = tl.load(starts + row).to(tl.int32), tl.minimum(tl.load(lengths + row).to(tl.int32), room)
    query = first + tl.arange(0, BM)
    columns, channels = tl.arange(0, BK), tl.arange(0, BV)
    column_ok, channel_ok = columns < K, channels < V
    column, table = head // R, block_table + row * table_row
    if places is not None:
        table += tl.load(places + column * 2).to(tl.int64) * table_next
        column = tl.load(places + column * 2 + 1)
    keys += column.to(tl.int64) * k_head
    values += column.to(tl.int64) * v_head
    q_places = row * q_row + query.to(tl.int64) * q_token + head * q_head
    q_tile = tl.load(q + q_places[:, None] + columns[None, :], mask=(query < T)[:, None] & column_ok[None, :], other=0.0)
    top = tl.full([BM], NOTHING, tl.float32)
    denominator = tl.zeros([BM], tl.float32)
    result = tl.zeros([BM, BV], tl.float32)

    # Tiles that all of these queries see whole need no mask; those at the edges follow.
    end = tl.minimum(start + first + BM, length)
    end = tl.where(start + first < length, (end + BN - 1) // BN, 0)
    begin = end * 0
    whole = tl.minimum((tl.minimum(start + first + 1, length)) // BN, end)
    if window is not None:
        begin = tl.minimum(tl.maximum(start + first + 1 - window, 0) // BN, end)
        whole = begin
    for tile in range(begin, whole):
        k_tile = _load_tile(keys, table, tile, length, k_block, k_token, columns, column_ok, q.dtype.element_ty, BN, BLOCK)
        v_tile = _load_tile(values, table, tile, length, v_block, v_token, channels, channel_ok, q.dtype.element_ty, BN, BLOCK)
        scores = softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), scale, None)
        everything = tl.full([BM, BN], True, tl.int1)
        top, denominator, result = softmax_step(scores, everything, v_tile, top, denominator, result, DOT, "ieee")
    for tile in range(whole, end):
        k_tile = _load_tile(keys, table, tile, length, k_block, k_token, columns, column_ok, q.dtype.element_ty, BN, BLOCK)
        v_tile = _load_tile(values, table, tile, length, v_block, v_token, channels, channel_ok, q.dtype.element_ty, BN, BLOCK)
        token = tile * BN + tl.arange(0, BN)
        visible = (token[None, :] <= start + query[:, None]) & (token < length)[None, :]
        if window is not None:
            visible = visible & (token[None, :] > start + query[:, None] - window)
        scores = softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), scale, None)
        top, denominator, result = softmax_step(scores, visible, v_tile, top, denominator, result, DOT, "ieee")

    result = tl.where((start + query < length)[:, None], result / tl.where(denominator > 0, denominator, 1.0)[:, None], 0.0)
    o_places = ((row * T + query) * HQ + head) * V
    tl.store(o + o_places[:, None] + channels[None, :], result.to(o.dtype.element_ty), mask=(query < T)[:, None] & channel_ok[None, :])


def choose_launch(row_bytes: int, memory: int) -> tuple[int, Launch]:
    """Queries of a program and how it works through tokens, by the bytes of a key or value and of shared memory, into which the queries and
    all tiles on their way have to fit. For 256 bytes the best found on an H200."""
    if row_bytes <= 256:
        return 128, Launch(128, 8, 3) if memory >= 7 * 128 * 256 else Launch(64, 8, 2)
    return (64, Launch(32, 4, 2)) if row_bytes <= 512 else (32, Launch(16, 4, 2))


tuned: Launch | None = None  # overrules the choice, for measurements


@torch.library.custom_op(add_op_namespace_prefix("softmax_prompt"), mutates_args=())
@on_its_device
def _softmax_prompt(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    scale: float,
    window: int | None,
    places: Tensor | None,
) -> Tensor:
    batch, tokens, heads, key_dim = q.shape
    block_size, kv_heads, value_dim = values.shape[1:]
    kv_heads = kv_heads if places is None else places.shape[0]
    block_key, block_value = head_tiles(key_dim, value_dim)
    row_bytes = max(block_key, block_value) * q.element_size()
    queries, launch = choose_launch(row_bytes, shared_memory(q.device))
    queries, launch = max(16, min(queries, triton.next_power_of_2(tokens))), tuned or launch
    o = new_output(q, values)
    _softmax_prompt_kernel[(heads, batch, triton.cdiv(tokens, queries))](
        q,
        keys,
        values,
        starts,
        lengths,
        block_table,
        places,
        o,
        *q.stride()[:3],
        *keys.stride()[:3],
        *values.stride()[:3],
        block_table.stride(-2),
        block_table.stride(0),
        block_size * block_table.shape[-1],
        tokens,
        window,
        scale,
        HQ=heads,
        R=heads // kv_heads,
        K=key_dim,
        V=value_dim,
        BK=block_key,
        BV=block_value,
        BM=queries,
        BN=launch.tokens,
        BLOCK=block_size,
        DOT=DOT_TYPES[q.dtype],
        num_warps=launch.warps if queries > 64 else 4,
        num_stages=launch.stages,
    )
    return o


@_softmax_prompt.register_fake
def _(q, keys, values, *others):
    return new_output(q, values)


def softmax_prompt(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    heads: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a piece of a text a row over its keys and values in blocks. No gradient.

    Arguments, result and errors as `reference.softmax_prompt`, in bf16, fp32 or fp16, with heads of up to 256; q, keys and values of any
    strides, but for a dense last dimension, fp8 converted in registers.
    """
    check_softmax_prompt_inputs(q, keys, values, starts, lengths, block_table, window, heads)
    check_softmax_kernel_inputs(q, keys, values)
    return ops.softmax_prompt(
        unit_stride(q),
        keys,
        values,
        starts.contiguous(),
        lengths.contiguous(),
        unit_stride(block_table),
        q.shape[-1] ** -0.5 if scale is None else scale,
        window,
        None if heads is None else heads.contiguous(),
    )
