"""The attention layer of the DSLA paper's released code (arXiv 2506.09316), as a control: what its students are made of.

Found by reading that code: RoPE is built and never applied, nothing normalises the output, both gates start at a half-life of 16 tokens
everywhere and have full rank, there is no window and no write gate, and the teacher's projections are not copied. Its gates read
the hidden state; here they read the value, as everywhere in this library. The projections start at random, and all four are trained.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsla_hf import DualStateAttention
from dsla_kernels import dual_state_attention

RELEASED_LAYER: dict[str, Any] = {
    "window_size": 0,
    "gate_rank": 64,
    "half_lives": (16.0, 16.0),
    "write_gate": False,
    "trained_projections": ["q_proj", "k_proj", "v_proj", "o_proj"],
}
INITIALIZER_RANGE = 0.02


class ReleasedLayer(DualStateAttention):
    """q and k come rotated from the base's attention: the rotation is taken back. `rope_theta` is that of the base."""

    rope_theta: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        positions = self._positions(k, options.get("padding_mask"), options.get("state"))
        return super().forward(self._unrotated(q, positions), self._unrotated(k, positions), v, **options)

    def fold(self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None, state: Any = None) -> Any:
        return super().fold(self._unrotated(k, self._positions(k, padding_mask, state)), v, padding_mask, state)

    def _pure(self, q, k, v, padding_mask, cu_seqlens, state, output_state):
        o, recurrent = dual_state_attention(
            q,
            k,
            v,
            self.gate_logits(v)[0],
            self.mix(),
            scale=self.scale,
            padding_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            initial_state=None if state is None else state.recurrent,
            output_final_state=output_state,
        )
        return o.to(q.dtype), self._state_without_window(recurrent, k, v, padding_mask, state) if output_state else None

    def _decodes_in_kernel(self, *tensors: Tensor | None) -> bool:
        return False  # that kernel normalises

    def _positions(self, k: Tensor, padding_mask: Tensor | None, state: Any) -> Tensor:
        real = torch.ones_like(k[:, :, 0, 0], dtype=torch.long) if padding_mask is None else padding_mask.long()
        return real.cumsum(1) - 1 + (0 if state is None else state.lengths[:, None])

    def _unrotated(self, x: Tensor, positions: Tensor) -> Tensor:
        pairs = x.shape[-1] // 2
        frequencies = self.rope_theta ** (-torch.arange(pairs, device=x.device) / pairs)
        angles = (positions[..., None] * frequencies)[:, :, None]
        first, second = x.float().chunk(2, -1)
        plain = (first * angles.cos() + second * angles.sin(), second * angles.cos() - first * angles.sin())
        return torch.cat(plain, -1).to(x.dtype)


def become_released_layer(layer: Any) -> None:
    """Make the DSLA attention of a `DSLALayer`, made from RELEASED_LAYER, this one."""
    core = layer.dsla_core["default"]
    core.__class__ = ReleasedLayer
    core.rope_theta = layer.config.rope_parameters["rope_theta"]
    core.norm_weight.requires_grad_(False)
    for name in RELEASED_LAYER["trained_projections"]:
        nn.init.normal_(getattr(layer, f"dsla_{name}")["default"].weight, std=INITIALIZER_RANGE)
