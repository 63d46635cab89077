"""Noise of draws, by counter: a function of seed, position and token id alone, the same on every device and in any company."""

from __future__ import annotations

import hashlib
import struct

import torch
from torch import Tensor

# Multipliers and shifts of a mixer of 32 bits ("lowbias32"): each bit of its input moves each of its output nearly half of the time.
MULTIPLIERS = (0x7FEB352D, 0x846CA68B)
SHIFTS = (16, 15, 16)
HIGHEST = 1 - 2**-24  # below 1 in fp32: there the noise would be without end
BITS = {0: 0xFFFFFFFF, **{shift: (1 << (32 - shift)) - 1 for shift in SHIFTS}}


def key_of(seed: int, position: int) -> tuple[int, int]:
    """Two int32, of the draws for one place of a text: they are hashed, so neighbouring seeds and positions have nothing in common.

    Args:
        seed: int64. position: number of the token in its text, from 0.
    """
    digest = hashlib.blake2b(struct.pack("<qq", seed, position), digest_size=8).digest()
    first, second = struct.unpack("<ii", digest)
    return first, second


def noise_bits(keys: Tensor, tokens: Tensor) -> Tensor:
    """32 random bits for each token, as int32 `[R, N]`.

    Args:
        keys: int32 `[R, 2]`, see `key_of`. tokens: ids, int32 `[R, N]` or `[1, N]`.
    """
    bits = _mixed(tokens ^ keys[:, :1])
    return _mixed(bits.add_(keys[:, 1:]))


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise, fp32 `[R, N]`: of logits plus this the greatest is a draw by their softmax. Arguments are those of `noise_bits`."""
    uniform = (noise_bits(keys, tokens).long() & BITS[0]).float()  # small ones stay exact: the greatest noise comes of them
    return uniform.add_(0.5).mul_(2**-32).clamp_(max=HIGHEST).neg_().log1p_().neg_().log_().neg_()


def _mixed(bits: Tensor) -> Tensor:
    """In place; int32 has no shift that brings zeros in, so sign bits are cut off."""
    for multiplier, shift in zip((*MULTIPLIERS, None), SHIFTS, strict=True):
        bits ^= (bits >> shift).bitwise_and_(BITS[shift])
        if multiplier is not None:
            bits *= multiplier - (multiplier >> 31 << 32)  # as int32
    return bits


def token_ids(vocabulary: int, device: torch.device) -> Tensor:
    """All of them, int32 `[1, V]`."""
    return torch.arange(vocabulary, dtype=torch.int32, device=device)[None]
