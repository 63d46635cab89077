"""What both forms of the layer build on: raw gates, decays, and the pass over the states with its gradient."""

from .gates import gate_logits
from .rows import block_states, final_state

__all__ = ["block_states", "final_state", "gate_logits"]
