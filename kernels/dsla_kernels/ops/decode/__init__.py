"""One token in one kernel: gates, states, window, norm and the gate between them, in place and at fixed addresses.

One program a row and KV head; what counts are the bytes of its states and ring, and how many of them are on their way at a time.
Where that leaves processors idle, several programs share a head: some take channels of both states, with all their values, others
take slots of the ring. Every sum over channels or slots then lies in pieces, and a small second kernel joins them. Channels, not
values: a part needs the gates of its own channels alone, and what it reads lies in one stretch a state.

Nothing is read back by the host and no buffer moves, so a step can be captured in a CUDA graph. With a window the states are only
read, but for the one step in W / 2 that fills a block: that step takes the block before the last one from the ring into the states.
"""

from . import pure, window  # noqa: F401 (register the operators)
from .step import GateWeights, pure_decode, ring_decode, window_decode

__all__ = ["GateWeights", "pure_decode", "ring_decode", "window_decode"]
