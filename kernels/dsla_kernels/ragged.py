"""Rows of unequal length: padded batches and packed sequences brought to one form, a padded suffix per row."""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Where the tokens of each sequence lie. One row a sequence, its tokens first and in order.

    source: int64 `[N, L]`, position of each token among the `B * T` flattened tokens (0 where not valid).
    valid: bool `[N, L]`, True at real tokens, a prefix of each row.
    """

    source: Tensor
    valid: Tensor

    def gather(self, x: Tensor) -> Tensor:
        """`[B, T, ...]` to `[N, L, ...]`; what lies behind a row's end is some other token, to be masked."""
        return x.flatten(0, 1)[self.source]

    def scatter(self, x: Tensor, batch_shape: tuple[int, int]) -> Tensor:
        """`[N, L, ...]` back to `[B, T, ...]`; tokens that are in no row become zero."""
        tokens = batch_shape[0] * batch_shape[1]
        # Entries behind a row's end all go to one slot past the last token, which is dropped.
        target = torch.where(self.valid, self.source, tokens).flatten()
        out = x.new_zeros(tokens + 1, *x.shape[2:]).index_copy(0, target, x.flatten(0, 1))
        return out[:-1].unflatten(0, batch_shape)


def rows_from_mask(mask: Tensor) -> Rows:
    """Rows of a padded batch, padding anywhere: mask `[B, T]`, True at real tokens."""
    mask = mask.bool()
    order = torch.argsort(~mask, dim=1, stable=True)
    first = torch.arange(mask.shape[0], device=mask.device)[:, None] * mask.shape[1]
    return Rows(first + order, mask.gather(1, order))


def rows_from_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> Rows:
    """Rows of sequences packed into one batch row of `tokens` tokens: `cu_seqlens` int `[N + 1]`, from 0 to `tokens`.

    Raises:
        ValueError: if the boundaries do not rise from 0 to `tokens`.
    """
    lengths = cu_seqlens.diff()
    longest = int(lengths.max()) if lengths.numel() else 0
    if longest == 0 or int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != tokens or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to the number of tokens {tokens}, got {cu_seqlens.tolist()}")
    offset = torch.arange(longest, device=cu_seqlens.device)
    valid = offset < lengths[:, None]
    return Rows(torch.where(valid, cu_seqlens[:-1, None].long() + offset, 0), valid)
