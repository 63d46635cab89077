"""The layer without a window, for callers: arguments are checked and made dense, then `forward` runs, whose gradients are in `backward`."""

from torch import Tensor

from ..._ops import ops
from ...checks import check_kernel_inputs, check_no_gradient_of_heads
from ...common import as_bytes, unit_stride
from ...ragged import rows_from_cu_seqlens
from ...shapes import contiguous
from . import backward  # noqa: F401 (registers the gradients)


def dual_state_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    kv_heads: Tensor | None = None,
    segment_blocks: int = 0,
) -> tuple[Tensor, Tensor | None]:
    """Dual-state linear attention: arguments, results and mathematics of `reference.dual_state_attention`.

    q, k, v are bf16, fp32 or fp16 of any strides with a dense last dimension (anything else is copied); what else is
    floating-point may be fp32, bf16 or fp16. Differentiable in every floating-point argument, unless there are kv_heads.

    segment_blocks: chunks of 64 tokens that one program goes through, 0 for a choice by shape.

    Raises:
        ValueError: names the argument that does not fit, before anything is launched.
    """
    check_kernel_inputs(
        q, k, v, gate_logits, mix, gate_normalizer, lower_bound, padding_mask, cu_seqlens, initial_state, write_logits, kv_heads
    )
    check_no_gradient_of_heads(kv_heads, q, k, v, gate_logits, mix, write_logits, initial_state)
    row_first, row_length, longest = None, None, q.shape[1]
    if cu_seqlens is not None:
        longest = rows_from_cu_seqlens(cu_seqlens, q.shape[1]).valid.shape[1]
        row_first, row_length = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    o, final = ops.chunk_forward(
        unit_stride(q),
        unit_stride(k),
        unit_stride(v),
        *contiguous(gate_logits, mix, write_logits, initial_state),
        as_bytes(padding_mask),
        row_first,
        row_length,
        kv_heads,
        longest,
        gate_normalizer,
        lower_bound,
        q.shape[-1] ** -0.5 if scale is None else scale,
        output_final_state,
        segment_blocks,
    )
    return o, final if output_final_state else None
