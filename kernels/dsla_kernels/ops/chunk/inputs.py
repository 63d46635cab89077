"""What forward and backward of the layer without a window take, and what both make of it."""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ...common import largest_tile, make_heads, padded
from ..states.decays import Decayed
from ..states.inputs import StateInputs
from ..states.state_pass import state_heads, state_pass, state_tiling


class ChunkInputs(NamedTuple):
    """The operators' arguments, in their order; those up to `initial_state` have a gradient.

    Shapes are those of `reference.dual_state_attention`; mask uint8 `[B, T]`; row_first, row_length int `[N]` and longest: packed
    rows, see `StateInputs`; segment_blocks: chunks a segment, 0 for a choice by shape. With kv_heads there is no gradient.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate_logits: Tensor
    mix: Tensor
    write_logits: Tensor | None
    initial_state: Tensor | None
    mask: Tensor | None
    row_first: Tensor | None
    row_length: Tensor | None
    kv_heads: Tensor | None
    longest: int
    gate_normalizer: float
    lower_bound: float
    scale: float
    output_final_state: bool
    segment_blocks: int

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return self[:7]

    @property
    def of_states(self) -> StateInputs:
        """What the passes over the states read of it."""
        return StateInputs(
            self.k,
            self.v,
            self.gate_logits,
            self.write_logits,
            self.mask,
            self.row_first,
            self.row_length,
            self.kv_heads,
            self.longest,
            self.gate_normalizer,
            self.lower_bound,
        )


class ChunkLayer:
    """Shapes and launch parameters of one call."""

    def __init__(self, inputs: ChunkInputs):
        q, v, gate_logits = inputs.q, inputs.v, inputs.gate_logits
        self.inputs, self.state_inputs = inputs, inputs.of_states
        self.programs = self.state_inputs.programs
        self.state_heads = state_heads(self.state_inputs)
        heads = make_heads(q, v, gate_logits, 128 if q.dtype == torch.bfloat16 else 64)
        self.value_tiles = triton.cdiv(heads.V, heads.BV)
        self.tiling = state_tiling(self.state_inputs, self.state_heads, inputs.longest, largest_tile(q, v), inputs.segment_blocks)
        kv_heads = gate_logits.shape[2]
        self.group = q.shape[2] // kv_heads
        # As the kernels name them: numbers, then KV heads and sizes at compile time, by default and with all values of a head in one tile.
        self.counts = (q.shape[1], inputs.longest, self.tiling.tiles, inputs.scale)
        self.sizes = {"HKV": kv_heads, "R": self.group, **heads._asdict(), "C": self.tiling.tile}
        self.whole_sizes = self.sizes | {"BV": padded(heads.V)}

    def states(self, decayed: Decayed, final: Tensor | None = None) -> Tensor:
        """exp(m) S on entry of every chunk `[N, tiles, Hkv, 2, K, V]`, and the last ones in `final`."""
        inputs = self.state_inputs
        states = inputs.state_buffer(inputs.rows, self.tiling.tiles, dtype=inputs.dtype)
        state_pass(inputs, self.tiling, self.state_heads, decayed, self.inputs.initial_state, states, final, at_middle=True)
        return states
