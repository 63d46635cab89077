"""Which tokens of a layer's call are none, and where its texts begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dsla_kernels import rows_from_cu_seqlens, rows_from_mask


class Padding(NamedTuple):
    """mask: `[B, T]`, True at real tokens; None if all are.
    cu_seqlens: int `[N + 1]`, boundaries of packed texts; None where each row is one text.
    at_end: padding lies behind all real tokens of each row, which then need not be moved.
    shared: for what follows from a mask with padding at the end, once for all layers that are given it. Not in compiled code."""

    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    at_end: bool = False
    shared: dict[Any, Any] | None = None

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives, or has given to another layer that shares with this one."""
        if self.shared is None or torch.compiler.is_compiling():
            return make()
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def behind(self, before: Tensor | None, places: int, tokens: int) -> Tensor | None:
        """The mask `[B, places + T]` of rows that begin with `places` before these `tokens` T. before: bool `[B, places]`, which of them
        hold a token; None if all do."""
        if before is None:
            return F.pad(self.mask.bool(), (places, 0), value=True) if places and self.mask is not None else self.mask
        new = before.new_ones(before.shape[0], tokens) if self.mask is None else self.mask.bool()
        return torch.cat([before, new], 1)


def to_rows(
    mask: Tensor | None, cu_seqlens: Tensor | None, k: Tensor, v: Tensor, at_end: bool = False, unread: bool = False
) -> tuple[Any, Tensor, Tensor, Tensor | None]:
    """k and v `[B, T, Hkv, D]` with padding moved to the end of each row, unless it is `at_end`, and zeroed, unless it stays there
    `unread`: rows, k, v, valid (rows None if nothing is moved, valid None without padding)."""
    if mask is None and cu_seqlens is None:
        return None, k, v, None
    if at_end and mask is not None:
        rows, valid = None, mask.bool()
    else:
        rows = rows_from_mask(mask) if cu_seqlens is None else rows_from_cu_seqlens(cu_seqlens, k.shape[1])  # type: ignore[arg-type]
        k, v, valid = rows.gather(k), rows.gather(v), rows.valid
    if rows is None and unread:
        return None, k, v, valid
    pad = ~valid[..., None, None]
    return rows, k.masked_fill(pad, 0), v.masked_fill(pad, 0), valid
