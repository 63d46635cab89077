"""The least logit that top_k, top_p and min_p leave, found by halving: no logit is sorted, and none is written."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 8192, 32  # logits that a program reads at a time
# A search cuts a range of values into four at each reading: at first by their size, which logits of models are even in, then by their
# bits, of which there are 32, so that it ends however they lie.
BY_SIZE = tl.constexpr(4)


@triton.jit
def loaded(logits, place, size):
    """Logits, fp32; minus infinity outside."""
    return tl.load(logits + place, mask=place < size, other=float("-inf")).to(tl.float32) + 0.0  # -0 becomes 0


@triton.jit
def _order(value):
    """A number of 32 bits, as int64, that grows with fp32."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(order):
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, top, per_temperature, MASS: tl.constexpr):
    if MASS:
        return tl.exp((x - top) * per_temperature)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def _largest_with(logits, size, per_temperature, low, top, target, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest value of which what is no less weighs `target` or more: a one each, or with MASS its part of the softmax, that of `top`
    being one. What is no less than `low` does, and no value is above `top`."""
    high = _order(top) + 1  # what is looked for lies below
    number = 0
    searching = low < top
    while searching & (number < 64):
        number += 1
        low_order, at_most = _order(low), _value(high - 1)
        width = high - low_order
        by_size = number <= BY_SIZE
        p1 = tl.where(by_size, low + (at_most - low) * 0.25, _value(low_order + width // 4))
        p2 = tl.where(by_size, low + (at_most - low) * 0.5, _value(low_order + width // 2))
        p3 = tl.where(by_size, low + (at_most - low) * 0.75, _value(low_order + width // 2 + width // 4))
        w1, w2, w3 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        least, most = tl.full([BLOCK], float("inf"), tl.float32), tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, size, BLOCK):
            x = loaded(logits, start + tl.arange(0, BLOCK), size)
            weight = _weight(x, top, per_temperature, MASS)
            w1 += tl.where(x >= p1, weight, 0.0)
            w2 += tl.where(x >= p2, weight, 0.0)
            w3 += tl.where(x >= p3, weight, 0.0)
            inside = (x >= low) & (x <= at_most)
            least = tl.where(inside, tl.minimum(least, x), least)
            most = tl.where(inside, tl.maximum(most, x), most)
        enough1, enough2, enough3 = tl.sum(w1, 0) >= target, tl.sum(w2, 0) >= target, tl.sum(w3, 0) >= target
        first, last = tl.min(least, 0), tl.max(most, 0)
        searching = first < last  # else one value is left, of one logit or several
        high = tl.where(enough3, high, tl.where(enough2, _order(p3), tl.where(enough1, _order(p2), _order(p1))))
        high = tl.minimum(high, _order(last) + 1)
        low = tl.where(enough3, p3, tl.where(enough2, p2, tl.where(enough1, p1, low)))
        low = tl.where(first <= last, tl.where(searching, tl.maximum(low, first), first), low)  # rounding may leave none
    return low


@triton.jit
def _likeliest_kernel(logits, row_stride, temperatures, top_k, top_p, log_min_p, least, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    temperature = tl.load(temperatures + row)
    per_temperature = 1 / temperature
    k, p = tl.load(top_k + row), tl.load(top_p + row)
    tops, lows = tl.full([BLOCK], float("-inf"), tl.float32), tl.full([BLOCK], float("inf"), tl.float32)
    finite = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        x = loaded(logits, start + tl.arange(0, BLOCK), size)
        tops = tl.maximum(tops, x)
        lows = tl.where(x > float("-inf"), tl.minimum(lows, x), lows)
        finite += (x > float("-inf")).to(tl.int32)
    top, low = tl.max(tops, 0), tl.min(lows, 0)
    kept = tl.full((), float("-inf"), tl.float32)
    if (k > 0) & (k < tl.sum(finite, 0)):
        kept = _largest_with(logits, size, per_temperature, low, top, k.to(tl.float32), False, BLOCK)
    if p < 1:
        masses = tl.zeros([BLOCK], tl.float32)
        for start in range(0, size, BLOCK):
            x = loaded(logits, start + tl.arange(0, BLOCK), size)
            masses += tl.where(x >= kept, _weight(x, top, per_temperature, True), 0.0)
        # Far below the likeliest nothing weighs anything.
        start_at = tl.maximum(tl.maximum(low, kept), top - 64.0 * temperature)
        kept = tl.maximum(kept, _largest_with(logits, size, per_temperature, start_at, top, p * tl.sum(masses, 0), True, BLOCK))
    tl.store(least + row, tl.maximum(kept, top + temperature * tl.load(log_min_p + row)))


def least_logits(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor) -> Tensor:
    """Of each row the least logit that is left, fp32 `[R]`; arguments are those of `race.draw`."""
    least = torch.empty(len(logits), device=logits.device)
    _likeliest_kernel[(len(logits),)](
        logits,
        logits.stride(0),
        *(x.contiguous() for x in (temperature, top_k, top_p, log_min_p)),
        least,
        logits.shape[1],
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    return least
