"""Gradients of the layer with a softmax window.

The states at block boundaries are computed again. Then, each step over all tiles side by side:

1. `query_gradients`, per query head: through gate and norm to the gradient u of the state output and the scalars of the softmax; dq;
   sums for the parameters and the sinks;
2. `state_gradients`, per KV head, from the end: the gradient D of the states;
3. `key_gradients`, per KV head: what keys, values and gates get from D; dk, dv with it and from the queries that see a key.
"""

from typing import Any

import torch
from torch import Tensor

from ..._ops import add_op_namespace_prefix, ops
from ...common import on_its_device
from ..operators import as_results, like, register_gradients, schema
from .forward import window_forward
from .inputs import WindowInputs, WindowLayer
from .key_gradients import key_gradients, state_key_gradients
from .query_gradients import query_gradients
from .state_gradients import window_state_gradients

SCHEMA = schema(WindowInputs, "Tensor[]", before="Tensor do, Tensor? d_final, Tensor o, Tensor log_denominators, ")


@torch.library.custom_op(add_op_namespace_prefix("window_backward"), mutates_args=(), schema=SCHEMA)
@on_its_device
def _window_backward(do: Tensor, d_final: Tensor | None, o: Tensor, log_denominators: Tensor, *arguments: Any) -> list[Tensor]:
    """Gradients of `WindowInputs.differentiable`; an empty tensor for an argument that is None."""
    inputs = WindowInputs(*arguments)
    layer = WindowLayer(inputs)
    decayed = layer.decayed()
    states = layer.states(decayed, every_tile=True)
    queries = query_gradients(layer, states, o, do, log_denominators)
    gradients = d_initial = None
    if queries.d_state_output is not None:
        gradients, d_initial = window_state_gradients(layer, decayed, queries.d_state_output, d_final)
    through_states = state_key_gradients(layer, decayed, states, gradients)
    dk, dv = key_gradients(layer, do, log_denominators, queries, through_states)
    d_gates, d_writes = through_states.d_gate_logits, through_states.d_write_logits
    found = (queries.dq, dk, dv, d_gates, *queries.parameters(), d_writes, *queries.sinks(layer.kv_heads), d_initial)
    return as_results(found, inputs.differentiable, do)


@_window_backward.register_fake
def _(do, d_final, o, log_denominators, *arguments):
    return like(WindowInputs(*arguments).differentiable, do)


register_gradients(window_forward, ops.window_backward, WindowInputs, kept=2)
