"""Gradients of the layer without a window.

The states S on entry of the chunks are computed again, and from the end the gradient D of the states at the end of every chunk,
both in segments side by side. Then every chunk of a KV head runs by itself: queries, values and keys each in a kernel of their own.
In the notation of `forward`, with D~ = exp(m) D and dA = tril(do v^T), per state:

    dQ = do S~^T + dA K        dK = dA^T Q + v D~^T        dv = tril(Q K^T)^T do + K D~
"""

from typing import Any

import torch
from torch import Tensor

from ..._ops import add_op_namespace_prefix, ops
from ...common import on_its_device
from ..operators import as_results, like, register_gradients, schema
from ..states.decays import decay_keys
from .forward import chunk_forward
from .inputs import ChunkInputs, ChunkLayer
from .key_gradients import key_gradients
from .query_gradients import query_gradients
from .state_gradients import chunk_state_gradients
from .value_gradients import value_gradients

SCHEMA = schema(ChunkInputs, "Tensor[]", before="Tensor do, Tensor? d_final, ")


@torch.library.custom_op(add_op_namespace_prefix("chunk_backward"), mutates_args=(), schema=SCHEMA)
@on_its_device
def _chunk_backward(do: Tensor, d_final: Tensor | None, *arguments: Any) -> list[Tensor]:
    """Gradients of `ChunkInputs.differentiable`; an empty tensor for an argument that is None."""
    inputs = ChunkInputs(*arguments)
    layer = ChunkLayer(inputs)
    decayed = decay_keys(layer.state_inputs, layer.tiling)
    states = layer.states(decayed)
    gradients, d_initial = chunk_state_gradients(layer, decayed, do, d_final)
    dq, d_mix, crossings = query_gradients(layer, decayed, states, do)
    dv = value_gradients(layer, decayed, gradients, do)
    dk, d_gate_logits, d_write_logits = key_gradients(layer, decayed, states, gradients, crossings, do)
    return as_results((dq, dk, dv, d_gate_logits, d_mix, d_write_logits, d_initial), inputs.differentiable, do)


@_chunk_backward.register_fake
def _(do, d_final, *arguments):
    return like(ChunkInputs(*arguments).differentiable, do)


register_gradients(chunk_forward, ops.chunk_backward, ChunkInputs)
