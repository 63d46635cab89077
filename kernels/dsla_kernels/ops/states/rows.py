"""The states alone, for callers: at block boundaries, or at the end of rows."""

import torch
from torch import Tensor

from ...checks import KERNEL_STATES, check_kernel_sizes, check_state_inputs
from ...common import as_bytes, on_its_device, unit_stride
from ...shapes import contiguous
from .decays import decay_keys
from .inputs import StateInputs
from .state_pass import state_heads, state_pass, state_tiling


@on_its_device
def block_states(
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    block_size: int,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    kv_heads: Tensor | None = None,
    segment_blocks: int | None = None,
) -> Tensor:
    """The states at every block boundary, `[B, ceil(T / block_size) + 1, Hkv, 2, K, V]` fp32: `reference.block_states` in Triton.

    Not differentiable. segment_blocks: blocks a segment, to overrule the choice.

    Raises:
        ValueError: names the argument that does not fit, before anything is launched.
    """
    inputs, tiling, heads = _prepare(
        k, v, gate_logits, block_size, write_logits, gate_normalizer, lower_bound, padding_mask, initial_state, kv_heads, segment_blocks
    )
    states = inputs.state_buffer(inputs.rows, tiling.tiles // tiling.per_block + 1)
    state_pass(inputs, tiling, heads, decay_keys(inputs, tiling), initial_state, states, every=tiling.per_block)
    return states


@on_its_device
def final_state(
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    kv_heads: Tensor | None = None,
    segment_blocks: int | None = None,
) -> Tensor:
    """The states after the rows, `[B, Hkv, 2, K, V]` fp32, at the cost of one pass over k, v and gates: what a fold needs.

    Arguments and errors as `block_states`; the last entry of its result.
    """
    inputs, tiling, heads = _prepare(
        k, v, gate_logits, 64, write_logits, gate_normalizer, lower_bound, padding_mask, initial_state, kv_heads, segment_blocks
    )
    final = inputs.state_buffer(inputs.rows)
    state_pass(inputs, tiling, heads, decay_keys(inputs, tiling), initial_state, final=final)
    return final


def _prepare(k, v, gate_logits, size, write_logits, gate_normalizer, lower_bound, padding_mask, initial_state, kv_heads, segment_blocks):
    check_state_inputs(k, v, gate_logits, size, lower_bound, padding_mask, initial_state, write_logits, kv_heads, tables=KERNEL_STATES)
    check_kernel_sizes(k, v, gate_normalizer)
    tensors = (k, v, gate_logits, write_logits, initial_state)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise ValueError("the state pass alone has no gradient: call it under torch.no_grad(), or use the reference")
    gates, (writes,) = gate_logits.contiguous(), contiguous(write_logits)
    rows = (as_bytes(padding_mask), None, None, kv_heads, k.shape[1])
    inputs = StateInputs(unit_stride(k), unit_stride(v), gates, writes, *rows, gate_normalizer, lower_bound)
    heads = state_heads(inputs)
    return inputs, state_tiling(inputs, heads, k.shape[1], size, segment_blocks), heads
