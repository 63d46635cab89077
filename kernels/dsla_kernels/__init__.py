"""Kernels of dual-state linear attention: a plain PyTorch truth and what is fast on each device. Needs torch alone."""

from .checks import SMALLEST_LOG_DECAY, check_lower_bound
from .dispatch import (
    append,
    divergence,
    draw,
    draws_logits,
    dual_state_attention,
    final_state,
    fused_window_attention,
    gate_logits,
    gated_linear,
    kernel_path,
    linears,
    softmax_decode,
    softmax_prompt,
    takes_few_rows,
    takes_logits,
    uses_triton,
    window_attention,
)
from .moved import MOVED, Moved
from .ragged import Rows, rows_from_cu_seqlens, rows_from_mask
from .reference import block_states, count_tokens, dual_state_window_attention, join_window_and_states, log_decays

Moved(__name__, MOVED).install()

__all__ = [
    "SMALLEST_LOG_DECAY",
    "Rows",
    "append",
    "block_states",
    "check_lower_bound",
    "count_tokens",
    "divergence",
    "draw",
    "draws_logits",
    "dual_state_attention",
    "dual_state_window_attention",
    "final_state",
    "fused_window_attention",
    "gate_logits",
    "gated_linear",
    "join_window_and_states",
    "kernel_path",
    "linears",
    "log_decays",
    "rows_from_cu_seqlens",
    "rows_from_mask",
    "softmax_decode",
    "softmax_prompt",
    "takes_few_rows",
    "takes_logits",
    "uses_triton",
    "window_attention",
]
