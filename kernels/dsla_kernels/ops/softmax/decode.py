"""Plain softmax attention of a token a row, or of a few, over its keys and values, for the layers of a model that stay softmax.

What counts are the bytes of the cache, each read once: the queries of a KV head share a program, those of all tokens, and where rows and
heads are few their tokens are cut into parts that run side by side (split-KV, as Flash-Decoding: Dao et al., 2023). A small second kernel
joins the parts. The cut is made on the device, of the length that a row has and not of the room in the cache: neither does the host read a
length, nor does a short text in a large cache leave processors idle. Grid and addresses stay, so a step can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..._ops import add_op_namespace_prefix, ops
from ...checks import check_softmax_decode_inputs, check_softmax_kernel_inputs
from ...common import COUNTS, LOG2_E, load_rows, on_its_device, unit_stride
from ...shapes import new_output
from ..window.softmax import softmax_scores, softmax_step
from .splits import make_plan
from .tiles import NOTHING, load_tokens


@triton.jit
def _cut(lengths, starts, row, head, room, window, sinks, whole, parts, least, T: tl.constexpr, BN: tl.constexpr):
    """Of a row and KV head: its length, the place of its first query, and the tiles of BN tokens that any of its queries sees: the first of
    the window, how many before it have sinks, how many in all, and how many a part."""
    length = tl.load(lengths + row).to(tl.int32)
    length = tl.minimum(tl.maximum(length, 0), room)
    start = length - T
    if starts is not None:
        start = tl.load(starts + row).to(tl.int32)
    first = length * 0
    before = length * 0
    if window is not None:
        first = tl.minimum(tl.maximum(start + 1 - window, 0), length) // BN
        if whole is not None:
            first = tl.where(head < whole, 0, first)
        if sinks is not None:
            before = tl.minimum(first, (sinks + BN - 1) // BN)
    tiles = (length + BN - 1) // BN - first + before
    return length, start, first, before, tiles, tl.maximum((tiles + parts - 1) // parts, least)


@triton.jit
def _parts_of(head, whole, parts, few):
    """Into how many parts a head's tokens are cut."""
    if whole is not None:
        parts = tl.where(head < whole, parts, few)
    return parts


@triton.jit
def _tile(number, first, before, sinks):
    """Where tile `number` of those that a row and head see lies."""
    if sinks is None:
        return first + number
    else:
        return tl.where(number < before, number, number + first - before)


@triton.jit
def _in_window(token, place, head, window, sinks, whole):
    """Whether a query at `place` sees a token by the window, if there is one."""
    seen = token > place - window
    if sinks is not None:
        seen = seen | (token < sinks)
    if whole is not None:
        seen = seen | (head < whole)
    return seen


@triton.jit
def _load_mask(mask, tile, length, BN: tl.constexpr):
    token = tile * BN + tl.arange(0, BN)
    return tl.load(mask + token, mask=token < length, other=0)


@triton.jit(do_not_specialize=COUNTS)
def _softmax_decode_kernel(
    q,  # [B, T, Hq, K]
    keys,  # [B, Hkv, T, K], or with a block table [blocks, BLOCK, Hkv, K]
    values,
    lengths,  # [B]
    starts,  # [B] or None
    mask,  # uint8 [B, T] or None
    block_table,  # [B, most blocks] or None; with places [tables, B, most blocks]
    places,  # [Hkv, 2] or None; without a table [Hkv] or None
    sink_logits,  # [Hq] or None
    o,  # [B, T, Hq, V]
    pieces,  # fp32 [B * T * Hq, parts, V], for the join; None with one part
    softmax,  # fp32 [B * T * Hq, 2, parts]: their tops and denominators
    k_block,  # strides: of a block or, without a table, a row; of a head; of a token
    k_head,
    k_token,
    v_block,
    v_head,
    v_token,
    mask_row,
    table_row,
    table_next,
    room,  # tokens of a row at most
    least,  # tiles a part
    window,  # or None
    sinks,  # or None
    whole,  # or None
    parts,  # of a head that sees all tokens
    few,  # of one that sees the window, where some see all; else not read
    scale,
    softcap,  # or None
    B,
    HKV,
    T: tl.constexpr,
    R: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens; 0 without a table
    DOT: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """A part of a row's tokens, for the queries of a KV head (BM of them at most); the first parts of all rows and heads first."""
    if OVERLAP:
        gdc_launch_dependents()
    GROUPS: tl.constexpr = (T * R + BM - 1) // BM
    number, heads = tl.program_id(0), HKV
    first_head = number * 0
    if whole is not None:  # the programs of heads that see all come first
        of_whole = B * whole * GROUPS * parts
        windowed = number >= of_whole
        number = tl.where(windowed, number - of_whole, number)
        heads = tl.where(windowed, HKV - whole, whole)
        first_head = tl.where(windowed, whole, 0)
    part, number = number // (B * heads * GROUPS), number % (B * heads * GROUPS)
    row, head = (number // (heads * GROUPS)).to(tl.int64), number // GROUPS % heads + first_head
    mine = _parts_of(head, whole, parts, few)
    length, start, first, before, tiles, share = _cut(lengths, starts, row, head, room, window, sinks, whole, mine, least, T, BN)
    begin = part * share
    end = tl.minimum(begin + share, tiles)
    if (part > 0) & (begin >= end):  # the first part is there for rows without tokens too
        return

    query = number % GROUPS * BM + tl.arange(0, BM)  # of a KV head: token by token its query heads
    query_ok = query < T * R
    rows = (row * T + query // R) * HKV * R + head * R + query % R
    place = start + query // R
    place = tl.where(place < length, place, -1)  # behind the row's tokens a query sees nothing
    columns = tl.arange(0, BK)
    column_ok = columns < K
    channels = tl.arange(0, BV)
    channel_ok = channels < V
    column = head
    if places is not None and block_table is None:
        column = tl.load(places + head)
    elif places is not None:
        block_table += tl.load(places + head * 2).to(tl.int64) * table_next
        column = tl.load(places + head * 2 + 1)
    keys += column.to(tl.int64) * k_head
    values += column.to(tl.int64) * v_head
    q_tile = load_rows(q, rows, query_ok, K, columns, column_ok)
    top = tl.full([BM], NOTHING, tl.float32)
    denominator = tl.zeros([BM], tl.float32)
    if sink_logits is not None and pieces is None:  # with several parts the join counts it
        logit = tl.load(sink_logits + head * R + query % R, mask=query_ok, other=0.0).to(tl.float32) * LOG2_E
        top = tl.maximum(top, logit)
        denominator = tl.exp2(logit - top)
    result = tl.zeros([BM, BV], tl.float32)
    if mask is not None:
        # A tile ahead: nothing waits for it, and the compiler, which looks for the narrowest load behind a product within a turn
        # of the loop, does not take the products for ones of bytes.
        mask += row * mask_row
        shown = _load_mask(mask, _tile(begin, first, before, sinks), length, BN)
    for number in range(begin, end):
        tile = _tile(number, first, before, sinks)
        token = tile * BN + tl.arange(0, BN)
        there = token < length
        if window is not None:
            there = there & _in_window(token, start, head, window, sinks, whole)
        if mask is not None:
            there = there & (shown != 0)
            shown = _load_mask(mask, _tile(number + 1, first, before, sinks), length, BN)
        if block_table is None:
            block, inside = row, token
        elif BLOCK % BN == 0:  # a tile lies in one block
            block, inside = tl.load(block_table + row * table_row + tile * BN // BLOCK).to(tl.int64), token % BLOCK
        else:
            block = tl.load(block_table + row * table_row + token // BLOCK, mask=there, other=0).to(tl.int64)
            inside = token % BLOCK
        k_tile = load_tokens(keys, block, inside, there, k_block, k_token, columns, column_ok, q.dtype.element_ty)
        v_tile = load_tokens(values, block, inside, there, v_block, v_token, channels, channel_ok, q.dtype.element_ty)
        if T == 1 and starts is None:  # the last token of its row sees all of them
            visible = there[None, :]
        else:
            visible = there[None, :] & (token[None, :] <= place[:, None])
            if window is not None:
                visible = visible & _in_window(token[None, :], place[:, None], head, window, sinks, whole)
        scores = softmax_scores(tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee"), scale, softcap)
        top, denominator, result = softmax_step(scores, visible, v_tile, top, denominator, result, DOT, "ieee")
    store_ok = query_ok[:, None] & channel_ok[None, :]
    if pieces is None:
        result /= tl.where(denominator > 0, denominator, 1.0)[:, None]
        tl.store(o + rows[:, None] * V + channels[None, :], result.to(o.dtype.element_ty), mask=store_ok)
    else:
        tl.store(pieces + (rows * parts + part)[:, None] * V + channels[None, :], result, mask=store_ok)
        tl.store(softmax + rows * 2 * parts + part, top, mask=query_ok)
        tl.store(softmax + (rows * 2 + 1) * parts + part, denominator, mask=query_ok)


@triton.jit(do_not_specialize=COUNTS)
def _join_kernel(
    pieces,
    softmax,
    lengths,
    starts,
    sink_logits,
    o,
    parts,
    few,
    room,
    least,
    window,
    sinks,
    whole,
    HQ,
    R: tl.constexpr,
    T: tl.constexpr,
    V: tl.constexpr,
    BV: tl.constexpr,
    BN: tl.constexpr,
    BP: tl.constexpr,  # parts at a time
    OVERLAP: tl.constexpr,
):
    """Joins the parts of one query, those that had tokens: the others have written nothing."""
    number = tl.program_id(0).to(tl.int64)
    row, head = number // (T * HQ), number % HQ
    channels = tl.arange(0, BV)
    channel_ok = channels < V
    mine = _parts_of(head // R, whole, parts, few)
    length, start, first, before, tiles, share = _cut(lengths, starts, row, head // R, room, window, sinks, whole, mine, least, T, BN)
    written = tl.maximum((tiles + share - 1) // share, 1)
    top = tl.full([1], NOTHING, tl.float32)
    denominator = tl.zeros([1], tl.float32)
    if sink_logits is not None:
        logit = tl.load(sink_logits + head).to(tl.float32) * LOG2_E
        top = tl.maximum(top, logit)
        denominator = tl.exp2(logit - top)
    if OVERLAP:  # what stands above was there before the parts
        gdc_wait()
    result = tl.zeros([BV], tl.float32)
    for start in range(0, written, BP):
        part = start + tl.arange(0, BP)
        part_ok = part < written
        tops = tl.load(softmax + number * 2 * parts + part, mask=part_ok, other=NOTHING)
        denominators = tl.load(softmax + (number * 2 + 1) * parts + part, mask=part_ok, other=0.0)
        some = load_rows(pieces + number * parts * V, part, part_ok, V, channels, channel_ok)
        new_top = tl.maximum(top, tl.max(tops, 0))
        weights = tl.exp2(tops - new_top)
        rescale = tl.exp2(top - new_top)
        denominator = denominator * rescale + tl.sum(weights * denominators, 0)
        result = result * rescale + tl.sum(weights[:, None] * some, 0)
        top = new_top
    result /= tl.where(denominator > 0, denominator, 1.0)
    tl.store(o + number * V + channels, result.to(o.dtype.element_ty), mask=channel_ok)


@torch.library.custom_op(add_op_namespace_prefix("softmax_decode"), mutates_args=())
@on_its_device
def _softmax_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    mask: Tensor | None,
    block_table: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    splits: int,
    places: Tensor | None,
    starts: Tensor | None,
    sinks: int | None,
    whole: int | None,
) -> Tensor:
    plan = make_plan(q, keys, values, block_table, window, splits, places, sinks, whole)
    order = (0, 1, 2) if block_table is None else (0, 2, 1)  # a row or block, a head, a token
    rows, parts = q.shape[:3].numel(), plan.parts
    o = new_output(q, values)
    pieces = softmax = None
    if parts > 1:
        pieces = torch.empty(rows, parts, values.shape[-1], device=q.device)
        softmax = torch.empty(rows, 2, parts, device=q.device)
    _softmax_decode_kernel[plan.grid](
        q,
        keys,
        values,
        lengths,
        starts,
        None if mask is None else mask.view(torch.uint8),  # which every backend can load
        block_table,
        places,
        sink_logits,
        o,
        pieces,
        softmax,
        *[keys.stride(dim) for dim in order],
        *[values.stride(dim) for dim in order],
        0 if mask is None else mask.stride(0),
        0 if block_table is None else block_table.stride(-2),
        0 if places is None or block_table is None else block_table.stride(0),
        plan.room,
        plan.least,
        window,
        sinks,
        whole,
        parts,
        plan.few,
        scale,
        softcap,
        q.shape[0],
        **plan.options,
    )
    if pieces is not None:
        seen = window, sinks, whole
        _join_kernel[(rows,)](pieces, softmax, lengths, starts, sink_logits, o, parts, plan.few, plan.room, plan.least, *seen, **plan.join)
    return o


@_softmax_decode.register_fake
def _(q, keys, values, *others):
    return new_output(q, values)


def softmax_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    window: int | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    heads: Tensor | None = None,
    starts: Tensor | None = None,
    sink_tokens: int = 0,
    whole_heads: int = 0,
    splits: int = 0,
) -> Tensor:
    """Softmax attention of a token a row, or of a few, over its keys and values, which include theirs. No gradient.

    Arguments, result and errors as `reference.softmax_decode`, in bf16, fp32 or fp16, with heads of up to 256, and

        keys, values: of any strides, but for a dense last dimension; read where they are, fp8 converted in registers.
        splits: parts that a row's tokens are cut into; 0 chooses by shape.
    """
    seen = window, block_table, mask, heads, starts, sink_tokens, whole_heads
    check_softmax_decode_inputs(q, keys, values, lengths, softcap, sink_logits, *seen)
    check_softmax_kernel_inputs(q, keys, values)
    if splits < 0:
        raise ValueError(f"splits must be 0 (chosen by shape) or a number of parts, got {splits}")
    return ops.softmax_decode(
        q.contiguous(),
        keys,
        values,
        lengths.contiguous(),
        None if mask is None else unit_stride(mask),
        None if block_table is None else unit_stride(block_table),
        None if sink_logits is None else sink_logits.contiguous(),
        q.shape[-1] ** -0.5 if scale is None else scale,
        softcap,
        window,
        splits,
        None if heads is None else heads.contiguous(),
        None if starts is None else starts.contiguous(),
        sink_tokens or None,
        whole_heads or None,
    )
