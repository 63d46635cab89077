"""What forward and backward of the layer with a softmax window take, and what both make of it."""

from typing import Any, NamedTuple

import triton
from torch import Tensor

from ...common import Heads, Tiling, dot_type, largest_tile, make_tiling, padded
from ..states.decays import Decayed, decay_keys
from ..states.inputs import StateInputs
from ..states.state_pass import state_heads, state_pass, state_tiling


class WindowInputs(NamedTuple):
    """The operators' arguments, in their order; those up to `initial_state` have a gradient.

    Shapes are those of `reference.fused_window_attention`; state_mask uint8 `[B, T]`; row_length, state_length int64 `[B]`: the real
    tokens of each row and those that the states take in; segment_blocks: blocks a segment, 0 for a choice by shape. With kv_heads there is
    no gradient. A window alone has no gates and nothing else of the states.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    gate_logits: Tensor | None
    mix: Tensor | None
    norm_weight: Tensor | None
    state_gain: Tensor | None
    state_bias: Tensor | None
    write_logits: Tensor | None
    sink_k: Tensor | None
    sink_v: Tensor | None
    sink_logits: Tensor | None
    initial_state: Tensor | None
    state_mask: Tensor | None
    row_length: Tensor | None
    state_length: Tensor | None
    row_start: Tensor | None
    kv_heads: Tensor | None
    window_size: int
    gate_normalizer: float
    lower_bound: float
    scale: float
    norm_eps: float
    softcap: float | None
    output_final_state: bool
    segment_blocks: int

    @property
    def differentiable(self) -> tuple[Tensor | None, ...]:
        return self[:13]

    @property
    def num_kv_heads(self) -> int:
        return self.k.shape[2] if self.kv_heads is None else self.kv_heads.shape[0]

    def of_states(self, length: int) -> StateInputs:
        """What the passes over the states read of it, in the first `length` tokens."""
        assert self.gate_logits is not None
        return StateInputs(
            self.k,
            self.v,
            self.gate_logits,
            self.write_logits,
            self.state_mask,
            None,
            self.state_length,
            self.kv_heads,
            length,
            self.gate_normalizer,
            self.lower_bound,
        )


class WindowLayer:
    """Shapes and launch parameters of one call."""

    state_inputs: StateInputs  # these two for a layer that has states
    state_heads: Heads

    def __init__(self, inputs: WindowInputs):
        q, v = inputs.q, inputs.v
        self.inputs = inputs
        self.batch, self.tokens, self.heads = q.shape[:3]
        self.kv_heads = inputs.num_kv_heads
        self.size = inputs.window_size // 2
        # Blocks that another whole block follows: what the states hold at the end, and all that a query reads of them.
        self.has_states = inputs.gate_logits is not None
        self.state_tokens = max(self.tokens // self.size - 1, 0) * self.size if self.has_states else 0
        if self.has_states:
            self.state_inputs = inputs.of_states(self.state_tokens)
            self.state_heads = state_heads(self.state_inputs)
        self.programs = self.batch * self.kv_heads
        self.tiling = make_tiling(self.tokens, self.size, 1, q.device, largest=largest_tile(q, v))
        self.state_tiles = self.state_tokens // self.size * self.tiling.per_block  # those that decay the states
        self.first_state = 2 if inputs.initial_state is None else 0  # first block whose states can hold something
        self.sizes = self._sizes()

    def _sizes(self) -> dict[str, Any]:
        """As the kernels name them; all but HKV are constants there."""
        inputs, key_dim, value_dim = self.inputs, self.inputs.q.shape[-1], self.inputs.v.shape[-1]
        sinks = 0 if inputs.sink_k is None else inputs.sink_k.shape[1]
        block_key, (dot, precision) = padded(key_dim), dot_type(inputs.q.dtype)
        return {
            "HKV": self.kv_heads,
            "R": self.heads // self.kv_heads,
            "K": key_dim,
            "V": value_dim,
            "BK": block_key,
            "BV": padded(value_dim),
            "KC": min(block_key, 64),
            "S": sinks,
            "BS": max(16, triton.next_power_of_2(sinks)),
            "W": inputs.window_size,
            **self.tile_sizes,
            "BN": min(64, max(16, triton.next_power_of_2(self.size))),
            "DOT": dot,
            "PRECISION": precision,
        }

    @property
    def tile_sizes(self) -> dict[str, int]:
        return {"SIZE": self.size, "C": self.tiling.tile, "PER_BLOCK": self.tiling.per_block}

    def operands(self, states: Tensor | None) -> tuple[Tensor | None, ...]:
        """What kernels of queries read first: all that makes the output."""
        x = self.inputs
        parameters = (x.mix, x.norm_weight, x.state_gain, x.state_bias, x.sink_k, x.sink_v, x.sink_logits)
        return x.q, x.k, x.v, states, *parameters, x.row_start, x.row_length

    def boundaries(self, states: Tensor | None) -> int:
        """States of each row."""
        return 1 if states is None else states.shape[1]

    def state_tiling(self, tokens: int) -> Tiling:
        """Segments of the first `tokens` tokens, `segment_blocks` blocks each if that is not 0."""
        return state_tiling(self.state_inputs, self.state_heads, tokens, self.size, self.inputs.segment_blocks)

    def decayed(self) -> Decayed | None:
        """Keys of all tokens that the states take in; None for none."""
        return decay_keys(self.state_inputs, self.state_tiling(self.state_tokens)) if self.state_tokens else None

    def states(self, decayed: Decayed | None, final: Tensor | None = None, every_tile: bool = False) -> Tensor | None:
        """States at block (or tile) boundaries `[B, boundaries, Hkv, 2, K, V]`, None where all are empty; the last into `final`."""
        initial = self.inputs.initial_state
        if decayed is None:
            if final is not None:
                final.zero_() if initial is None else final.copy_(initial)
            return None if initial is None else initial.to(self.state_inputs.dtype)[:, None].contiguous()
        inputs, tiling = self.state_inputs, self.state_tiling(self.state_tokens)
        every = 1 if every_tile else tiling.per_block
        states = inputs.state_buffer(self.batch, tiling.tiles // every + 1, dtype=inputs.dtype)
        if self.inputs.row_length is not None:
            states.zero_()  # what lies behind a short row's last boundary is read, and multiplied by zero
        state_pass(inputs, tiling, self.state_heads, decayed, initial, states, final, every)
        return states
