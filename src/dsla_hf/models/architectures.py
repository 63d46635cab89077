"""Base models whose attention DSLA replaces, and what is particular about each: one small entry per architecture.

An entry is needed because an attention that does something unheard of would be silently wrong, not because most need care: the
base's own forward runs, with its projections, norms, rotary embedding, scaling, score cap and sink logit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

# A sliding window up to this long already is what a DSLA layer would be: converting it gains nothing.
SHORT_WINDOW = 1024


@dataclass(frozen=True)
class Architecture:
    """fused: projections that lie in one matrix, by its name, in the order of its rows. rotary_layout: which channels of a head rotate
    together, one of `attention.ROTARY_LAYOUTS`. partial_rotary: whether `partial_rotary_factor` says how many of them rotate (the first
    ones), all if not. notes: for the table in the docs."""

    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rotary_layout: str = "halves"
    partial_rotary: bool = False
    notes: str = ""


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "mistral": Architecture(notes="all layers slide where the checkpoint says so (4,096 tokens in v0.1)"),
    "mixtral": Architecture(notes="mixture of experts"),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "qwen3_moe": Architecture(notes="mixture of experts"),
    "gemma2": Architecture(notes="score cap kept in the window; every second layer slides over 4,096 tokens"),
    "gemma3_text": Architecture(notes="local layers (512 or 1,024 tokens) are left out of the plan by default"),
    "phi3": Architecture(
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj")}, partial_rotary=True, notes="fused projection, split for training"
    ),
    "olmo2": Architecture(),
    "smollm3": Architecture(notes="layers without rotary embedding stay so"),
    "granite": Architecture(),
    "cohere2": Architecture(
        rotary_layout="interleaved", notes="local layers slide over 4,096 tokens; global ones have no rotary embedding"
    ),
    "gpt_oss": Architecture(notes="sink logits kept in the window; local layers (128 tokens) are left out of the plan by default"),
}
SUPPORTED_BASES = tuple(ARCHITECTURES)


def why_unsupported(config: Any) -> str:
    """Why DSLA cannot replace the attention of models with this config, as far as the config tells."""
    model_type = getattr(config, "model_type", None)
    supported = f"supported are {', '.join(SUPPORTED_BASES)}"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if model_type == "dsla":
        return "this model is a DSLA hybrid already; put a DSLA adapter on the original model"
    if getattr(config, "is_encoder_decoder", False):
        return f"model type {model_type!r} is an encoder-decoder, whose cross-attention has no recurrent form; {supported}"
    linear = {"linear_attention", "mamba", "conv", "recurrent"} & layer_types
    if linear or "mamba" in str(model_type) or "rwkv" in str(model_type):
        return f"model type {model_type!r} has layers that are linear already ({', '.join(sorted(linear)) or 'all'}); {supported}"
    if getattr(config, "is_decoder", None) is False:
        return f"model type {model_type!r} is an encoder: its attention looks ahead, and a state cannot; {supported}"
    return f"model type {model_type!r} is not supported by DSLA: its attention has not been tested; {supported}"


def sliding_window_of(attention: Any) -> int | None:
    """The sliding window of a base attention module in tokens, None if it sees everything."""
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


def rotary_of(config: Any, model_type: str) -> tuple[str, int]:
    """How a base with this config rotates the channels of a head: `rotary_layout` and `rotary_dim` of `DualStateAttention`."""
    architecture = ARCHITECTURES[model_type]
    rotated = head_dim_of(config)
    if architecture.partial_rotary:
        rotated = int(rotated * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return architecture.rotary_layout, rotated + rotated % 2  # a frequency rotates two channels


def head_dim_of(config: Any) -> int:
    """Channels of a head, as transformers' rotary embeddings count them."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads_of(config: Any) -> int:
    """Key-value heads of a base with this config, which names them only where they are shared."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def fused_into(attention: Any, name: str) -> tuple[str, tuple[str, ...]]:
    """The matrix that holds a projection (`q_proj`, ...), and the projections in it: itself alone for most models."""
    if hasattr(attention, name):
        return name, (name,)
    for matrix, parts in ARCHITECTURES[attention.config.model_type].fused.items():
        if name in parts:
            return matrix, parts
    raise ValueError(f"{type(attention).__name__} has no projection {name}")


def projection(attention: Any, name: str) -> tuple[nn.Linear, slice]:
    """The linear module that holds a projection, and which of its output rows are this one's."""
    matrix, parts = fused_into(attention, name)
    heads = attention.config.num_attention_heads
    kv_heads = kv_heads_of(attention.config)
    rows = {"q_proj": heads * attention.head_dim, "k_proj": kv_heads * attention.head_dim, "v_proj": kv_heads * attention.head_dim}
    if parts == (name,):
        return getattr(attention, name), slice(None)
    start = sum(rows[part] for part in parts[: parts.index(name)])
    return getattr(attention, matrix), slice(start, start + rows[name])
