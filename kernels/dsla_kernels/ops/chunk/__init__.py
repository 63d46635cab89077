"""The layer without a window: both states, from q, k, v and raw gates to the output."""

from .attention import dual_state_attention

__all__ = ["dual_state_attention"]
