"""The layer with a softmax window in Triton, for callers: arguments are checked and made dense, then `window_forward` runs, whose gradients
are in `window_backward`."""

from typing import Any

from torch import Tensor

from ..._ops import ops
from ...checks import (
    FUSED_WINDOW,
    KERNEL_WINDOW_ALONE,
    SMALLEST_LOG_DECAY,
    check_kernel_heads,
    check_kernel_inputs,
    check_no_gradient_of_heads,
    check_window_inputs,
)
from ...common import as_bytes, unit_stride
from ...reference import count_tokens
from ...shapes import contiguous
from . import backward  # noqa: F401 (registers the gradients)


def fused_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    norm_weight: Tensor,
    state_gain: Tensor,
    state_bias: Tensor,
    window_size: int,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    scale: float | None = None,
    norm_eps: float = 1e-6,
    padding_mask: Tensor | None = None,
    state_mask: Tensor | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,
    row_start: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    row_counts: tuple[Tensor, Tensor] | None = None,
    kv_heads: Tensor | None = None,
    segment_blocks: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """The layer with a softmax window: arguments, results and mathematics of `reference.fused_window_attention`.

    q, k, v (and the sinks) are bf16, fp32 or fp16 of any strides with a dense last dimension (anything else is copied); what
    else is floating-point may be fp32, bf16 or fp16. Differentiable in every floating-point argument, unless there are kv_heads.

    segment_blocks: blocks of W / 2 tokens that one program of the state pass goes through, 0 for a choice by shape.

    Raises:
        ValueError: names the argument that does not fit, before anything is launched.
    """
    check_kernel_inputs(q, k, v, gate_logits, mix, gate_normalizer, lower_bound, padding_mask, None, initial_state, write_logits, kv_heads)
    check_window_inputs(
        q,
        k,
        v,
        window_size,
        sinks,
        softcap,
        tables=FUSED_WINDOW,
        kv_heads=kv_heads,
        row_start=row_start,
        state_mask=state_mask,
        norm_weight=norm_weight,
        state_gain=state_gain,
        state_bias=state_bias,
        sink_logits=sink_logits,
    )
    sink_k, sink_v = sinks or (None, None)
    learned = (gate_logits, mix, norm_weight, state_gain, state_bias, write_logits, sink_k, sink_v, sink_logits, initial_state)
    check_no_gradient_of_heads(kv_heads, q, k, v, *learned)
    o, _, final = ops.window_forward(
        *map(unit_stride, (q, k, v)),
        *contiguous(*learned),
        as_bytes(state_mask),
        *_counts(padding_mask, window_size, row_counts),
        row_start,
        kv_heads,
        window_size,
        gate_normalizer,
        lower_bound,
        q.shape[-1] ** -0.5 if scale is None else scale,
        norm_eps,
        softcap,
        output_final_state,
        segment_blocks,
    )
    return o, final if output_final_state else None


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    *,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,
    row_start: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    row_counts: tuple[Tensor, Tensor] | None = None,
    kv_heads: Tensor | None = None,
) -> Tensor:
    """The window alone: arguments, results and mathematics of `reference.window_attention`, dtypes and errors as above.

    Differentiable in q, k, v, the sinks and their logits, unless there are kv_heads.
    """
    check_window_inputs(
        q, k, v, window_size, sinks, softcap, tables=KERNEL_WINDOW_ALONE, kv_heads=kv_heads, row_start=row_start, padding_mask=padding_mask,
        sink_logits=sink_logits,
    )  # fmt: skip
    check_kernel_heads(k, v)
    sink_k, sink_v = sinks or (None, None)
    check_no_gradient_of_heads(kv_heads, q, k, v, sink_k, sink_v, sink_logits)
    row_length, state_length = _counts(padding_mask, window_size, row_counts)
    options: Any = (
        *map(unit_stride, (q, k, v)),
        *(None,) * 6,  # gates, what mixes and joins states
        *contiguous(sink_k, sink_v, sink_logits),
        None,  # states before these tokens
        None,  # and which of these they take in
        row_length,
        state_length,
        row_start,
        kv_heads,
        window_size,
        1.0,
        SMALLEST_LOG_DECAY,
        q.shape[-1] ** -0.5 if scale is None else scale,
        0.0,
        softcap,
        False,
        0,
    )
    return ops.window_forward(*options)[0]


def _counts(padding_mask: Tensor | None, window_size: int, given: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None]:
    """`count_tokens`, by who has them already; None and None where every token is real."""
    if padding_mask is None:
        return None, None
    return count_tokens(padding_mask, window_size) if given is None else given
