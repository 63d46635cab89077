"""Draws of tokens by their noise: logits are read once for the race, and for what top_k and top_p leave a few times more."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import on_its_device
from .likeliest import least_logits, loaded

BLOCK, WARPS = 1024, 4  # logits that a program reads


@triton.jit
def _mixed(bits):
    bits ^= bits >> 16
    bits *= 0x7FEB352D
    bits ^= bits >> 15
    bits *= 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def _gumbel(tokens, first, second):
    """Of the 32 bits that a key and a token determine."""
    bits = _mixed(_mixed(tokens.to(tl.uint32) ^ first) + second)
    share = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log(1 - share): a series where the rounding of 1 - share would be felt.
    series = 0.5 + share * (0.33333334 + share * (0.25 + share * 0.2))
    return -tl.log(tl.where(share < 0.03125, share * (1 + share * series), -tl.log(1 - share)))


@triton.jit
def _race_kernel(logits, row_stride, temperatures, least, keys, winners, scores, size, blocks, BLOCK: tl.constexpr):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    place = block * BLOCK + tl.arange(0, BLOCK)
    logit = loaded(logits + row * row_stride, place, size)
    x = tl.div_rn(logit, tl.load(temperatures + row) + tl.zeros_like(logit))  # to the last bit, as PyTorch divides
    first = tl.load(keys + 2 * row).to(tl.uint32, bitcast=True)
    second = tl.load(keys + 2 * row + 1).to(tl.uint32, bitcast=True)
    noisy = tl.where(logit >= tl.load(least + row), x + _gumbel(place, first, second), float("-inf"))
    score, winner = tl.max(noisy, 0, return_indices=True)
    tl.store(scores + row * blocks + block, score)
    tl.store(winners + row * blocks + block, block * BLOCK + winner)


@on_its_device
def draw(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, log_min_p: Tensor, keys: Tensor, filtered: bool) -> Tensor:
    """A token for each row, int64 `[R]`: of those that are left that whose logit over temperature plus Gumbel noise is the greatest.

    Args:
        logits: `[R, V]`, bf16, fp16 or fp32, of unit stride in V.
        temperature: fp32 `[R]`, above 0. top_k: int64 `[R]`, 0 or V and more: all. top_p: fp32 `[R]`, of what top_k leaves, 1 and more:
            all. log_min_p: fp32 `[R]`, minus infinity: all. keys: int32 `[R, 2]`, of the noise.
        filtered: False: top_k, top_p and log_min_p leave all, and are not looked at.

    Raises:
        ValueError: for other shapes.
    """
    rows, size = logits.shape
    if any(x.shape != (rows,) for x in (temperature, top_k, top_p, log_min_p)) or keys.shape != (rows, 2) or logits.stride(1) != 1:
        raise ValueError(f"draw takes logits [R, V], settings [R] and keys [R, 2], got {list(logits.shape)} and {list(keys.shape)}")
    blocks = triton.cdiv(size, BLOCK)
    temperature, keys = temperature.contiguous(), keys.contiguous()
    scores = torch.empty(rows, blocks, device=logits.device)
    winners = torch.empty(rows, blocks, dtype=torch.int32, device=logits.device)
    if filtered and rows:
        least = least_logits(logits, temperature, top_k, top_p, log_min_p)
    else:
        least = torch.full((rows,), float("-inf"), device=logits.device)
    if rows:
        _race_kernel[(rows, blocks)](
            logits, logits.stride(0), temperature, least, keys, winners, scores, size, blocks, BLOCK=BLOCK, num_warps=WARPS
        )
    return winners.gather(1, scores.argmax(-1, keepdim=True))[:, 0].long()
