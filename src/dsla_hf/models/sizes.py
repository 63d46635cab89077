"""What the units of a model (layers, or KV heads) take of a cache, known from sizes alone. Layers that are linear already are none."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from ..core.attention import DualStateAttention
from ..levels.policies import Stats
from .architectures import convertible_layers
from .configuration import DSLAConfig


def layer_bytes(model: PreTrainedModel, heads: int | None = None) -> dict[str, int]:
    """Cache bytes per row that a DSLA layer takes, and a softmax layer per token, in the model's dtype; of `heads` KV heads, all when None.

    A softmax layer holds k and v of every token; a DSLA layer two fp32 states (or none), k and v of window and sinks, and a counter.
    """
    core = next(module for module in model.modules() if isinstance(module, DualStateAttention))
    return core_bytes(core, core.num_kv_heads if heads is None else heads, model.dtype.itemsize)


def core_bytes(core: DualStateAttention, heads: int, itemsize: int) -> dict[str, int]:
    """The same of so many KV heads as `core` has, with keys and values of `itemsize` bytes a number."""
    per_token = heads * (core.key_dim + core.value_dim) * itemsize
    states = core.num_states * heads * core.key_dim * core.value_dim * 4
    return {"softmax_bytes_per_token": per_token, "dsla_bytes": states + (core.window_size + core.sink_tokens) * per_token + 8}


def unit_sizes(model: PreTrainedModel, config: DSLAConfig) -> dict[str, Any]:
    """How many units the model has, and what they take, as `Stats` has it: layers, or KV heads where the config counts those."""
    layers = len(convertible_layers(model.config))
    if config.conversion_unit == "layer":
        return {"num_layers": layers, **layer_bytes(model)}
    return {"num_layers": layers * config.kv_heads, "unit": "head", **layer_bytes(model, heads=1)}


def text_bytes(model: PreTrainedModel, config: DSLAConfig, tokens: int, level: int) -> int:
    """Bytes that the cache of one text of `tokens` tokens takes at a level, in the model's dtype."""
    sizes = {"min_level": 0, "max_level": level, **unit_sizes(model, config)}
    return Stats(prompt_tokens=tokens, tokens=tokens, rows=1, level=level, **sizes).cache_bytes(level)
