"""A call without the host's time: captured once, and replayed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def in_graph(call: Callable[[], Any], calls: int = 1) -> Callable[[], None]:
    """So many calls as one CUDA graph, after one that compiles what it needs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay
