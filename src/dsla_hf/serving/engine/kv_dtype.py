"""In which dtype keys and values lie in their blocks.

Attention reads fp8 and computes in the model's dtype; what DSLA heads remember (states, windows, sinks) stays in that. There are no scales:
e4m3 reaches 448, and `eval/kv_dtype.py` measures what the rounding costs.
"""

from __future__ import annotations

import torch

from .levels import Levels

KV_CACHE_DTYPES = ("auto", "fp8")  # as vLLM's --kv-cache-dtype names them
FIRST_WITH_FP8 = (8, 9)  # compute capability of cards that convert e4m3


def kv_dtype(name: str, levels: Levels) -> torch.dtype:
    """The dtype of this name, for a model.

    Raises:
        ValueError: where the card cannot convert it, or the model has no keys and values that would lie in it.
    """
    if name == "auto":
        return levels.dtype
    heads = levels.num_layers * levels.kv_heads
    if sum(map(len, levels.converted(levels.lowest).values())) == heads:
        raise ValueError(f"kv_cache_dtype {name!r} is of no use: all {heads} KV heads of this model are DSLA; leave it out")
    if levels.device.type == "cuda" and (found := torch.cuda.get_device_capability(levels.device)) < FIRST_WITH_FP8:
        wanted, had = (".".join(map(str, each)) for each in (FIRST_WITH_FP8, found))
        raise ValueError(f"kv_cache_dtype {name!r} needs a card of compute capability {wanted} or more, this one has {had}: leave it out")
    return torch.float8_e4m3fn
