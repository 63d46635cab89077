"""What the passes over the states read, packed once."""

from typing import NamedTuple

import torch
from torch import Tensor


class StateInputs(NamedTuple):
    """Keys, values and gates of rows, and the shape of the work on them.

    k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]` of any strides before the last dimension; gate_logits `[B, T, Hkv, 2, G]` and write_logits
    `[B, T, Hkv, 2]` contiguous; mask uint8 `[B, T]`; row_first, row_length int `[N]`: where rows lie in the only entry of a batch, and
    how many tokens of each count, `length` where there is no row_length; kv_heads int32 `[Hkv]`: where k and v are of all heads of a
    layer, which of them these are.
    """

    k: Tensor
    v: Tensor
    gate_logits: Tensor
    write_logits: Tensor | None
    mask: Tensor | None
    row_first: Tensor | None
    row_length: Tensor | None
    kv_heads: Tensor | None
    length: int
    gate_normalizer: float
    lower_bound: float

    @property
    def rows(self) -> int:
        return self.k.shape[0] if self.row_first is None else self.row_first.shape[0]

    @property
    def num_kv_heads(self) -> int:
        return self.gate_logits.shape[2]

    @property
    def programs(self) -> int:
        """Rows times KV heads."""
        return self.rows * self.num_kv_heads

    @property
    def dtype(self) -> torch.dtype:
        """Of what is not accumulated."""
        return torch.bfloat16 if self.k.dtype == torch.bfloat16 else torch.float32

    def state_buffer(self, *leading: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uninitialised `[*leading, Hkv, 2, K, V]`."""
        return self.k.new_empty(*leading, self.num_kv_heads, 2, self.k.shape[-1], self.v.shape[-1], dtype=dtype)
