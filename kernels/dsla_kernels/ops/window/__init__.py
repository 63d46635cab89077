"""The layer with a softmax window: window, sinks, states, norm and the gate between them, from q, k, v to the output."""

from .attention import fused_window_attention, window_attention

__all__ = ["fused_window_attention", "window_attention"]
