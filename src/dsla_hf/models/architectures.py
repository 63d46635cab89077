"""Base models whose attention DSLA replaces, and what is particular about each: one small entry per architecture.

An entry is needed because an attention that does something unheard of would be silently wrong, not because most need care: the
base's own forward runs, with its projections, norms, rotary embedding, scaling, score cap and sink logit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from .multimodal import MULTIMODAL, attention_type, inner_text_config

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
    "apertus": Architecture(notes="MLP without a gate"),
    "arcee": Architecture(notes="MLP without a gate"),
    "cohere": Architecture(rotary_layout="interleaved", notes="norms of queries and keys with weights of each head, where it has them"),
    "cwm": Architecture(notes="local layers slide over 8,192 tokens"),
    "dots1": Architecture(notes="mixture of experts"),
    "ernie4_5": Architecture(rotary_layout="interleaved"),
    "ernie4_5_moe": Architecture(rotary_layout="interleaved", notes="mixture of experts"),
    "exaone4": Architecture(notes="local layers slide over 4,096 tokens; global ones have no rotary embedding"),
    "exaone_moe": Architecture(notes="mixture of experts; local layers slide over 4,096 tokens, global ones have no rotary embedding"),
    "flex_olmo": Architecture(notes="mixture of experts"),
    "gemma": Architecture(),
    "glm": Architecture(rotary_layout="interleaved", partial_rotary=True),
    "glm4": Architecture(rotary_layout="interleaved", partial_rotary=True),
    "glm4_moe": Architecture(partial_rotary=True, notes="mixture of experts"),
    "granite_swa": Architecture(notes="sink logits kept in the window; local layers (128 tokens) are left out of the plan by default"),
    "granitemoe": Architecture(notes="mixture of experts"),
    "helium": Architecture(rotary_layout="interleaved"),
    "hunyuan_v1_dense": Architecture(notes="norms of queries and keys behind the rotary embedding"),
    "minimax_m2": Architecture(partial_rotary=True, notes="mixture of experts"),
    "ministral": Architecture(notes="local layers slide where the checkpoint says so"),
    "ministral3": Architecture(notes="queries grow with their position, as in Llama 4"),
    "nanochat": Architecture(notes="norms of queries and keys behind the rotary embedding"),
    "olmo": Architecture(notes="queries, keys and values are clipped where the checkpoint says so"),
    "olmo3": Architecture(notes="local layers slide over 4,096 tokens"),
    "olmoe": Architecture(notes="mixture of experts"),
    "phimoe": Architecture(notes="mixture of experts"),
    "qwen2_moe": Architecture(notes="mixture of experts"),
    "seed_oss": Architecture(),
    "starcoder2": Architecture(notes="MLP without a gate; all layers slide where the checkpoint says so (4,096 tokens)"),
    "vaultgemma": Architecture(notes="score cap kept in the window; local layers are left out of the plan by default"),
}
SUPPORTED_BASES = tuple(ARCHITECTURES)


def text_base_of(config: Any) -> str | None:
    """The supported type whose attention a model with this config has, of a multimodal one that of its text model; None if there is
    none."""
    text = inner_text_config(config)
    if text is not None and getattr(config, "model_type", None) not in MULTIMODAL:
        return None
    kind = attention_type(getattr(config if text is None else text, "model_type", None) or "")
    return kind if kind in ARCHITECTURES else None


# What types of layers have in place of softmax attention over all earlier tokens, or over the last of them, as configs name it.
LINEAR_LAYERS = ("linear_attention", "mamba", "conv", "recurrent")
KNOWN_LAYERS = ("full_attention", "sliding_attention")
# Sizes that only configs of models with such layers have.
LINEAR_SIZES = ("mamba_d_state", "state_size", "linear_num_value_heads")
# Models whose decoder layers call their attention without the keyword arguments that they are given, by which DSLA hands down which tokens
# are padding and where texts begin.
WITHOUT_KEYWORDS = ("nemotron", "stablelm")
# Models without any softmax attention.
LINEAR_MODELS = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")


def why_unsupported(config: Any) -> str:
    """Why DSLA cannot replace the attention of models with this config, as far as the config tells: by its structure, so that types which
    are not known by name are told apart, too."""
    model_type = getattr(config, "model_type", None)
    values: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}  # a config may differ by layer, and raise if asked
    supported = f"supported are {', '.join(SUPPORTED_BASES)}"
    if model_type == "dsla":
        return "this model is a DSLA hybrid already; put a DSLA adapter on the original model"
    named = f"model type {model_type!r}"
    if values.get("is_encoder_decoder"):
        return f"{named} is an encoder-decoder, whose cross-attention has no recurrent form; {supported}"
    if (text := inner_text_config(config)) is not None:
        inner = f"{named} holds a text model of type {text.model_type!r} beside what reads images or sound"
        if attention_type(text.model_type) not in SUPPORTED_BASES:
            return f"{inner}, and DSLA converts text models of other types: {why_unsupported(text)}"
        if model_type in MULTIMODAL:
            return f"{inner}, and what is asked for takes text models alone: text_model(model) gives it, as docs/multimodal.md says"
        return (
            f"{inner}, and of such models {', '.join(MULTIMODAL)} are tested: convert the text model alone, which text_model(model) gives, "
            "as docs/multimodal.md says"
        )
    layer_types = {str(kind) for name in ("layer_types", "layers_block_type", "block_types") for kind in values.get(name) or ()}
    linear = sorted(layer_types & set(LINEAR_LAYERS))
    if model_type in LINEAR_MODELS:
        return f"{named} has no softmax attention: all its layers are linear already; {supported}"
    if linear or any(values.get(name) for name in LINEAR_SIZES):
        return (
            f"{named} has layers that are linear already ({', '.join(linear) or 'a state-space model'}) beside its attention; {supported}"
        )
    if values.get("kv_lora_rank"):
        return (
            f"{named} has latent attention (MLA, kv_lora_rank), whose cache holds no keys and values that states could take in; {supported}"
        )
    if values.get("num_kv_shared_layers"):
        return f"{named} has layers that read the keys and values of another (num_kv_shared_layers), which states cannot; {supported}"
    if other := sorted(layer_types - {*KNOWN_LAYERS, "moe", "mlp", "attention"}):
        return f"{named} has layers of types that DSLA does not know: {', '.join(other)}; {supported}"
    # GPT-NeoX, no encoder, has `is_decoder=False`, too.
    if values.get("is_decoder") is False and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return f"{named} is an encoder: its attention looks ahead, and a state cannot; {supported}"
    if model_type in WITHOUT_KEYWORDS:
        return f"{named} hands no keyword arguments on to its attention, by which DSLA says where texts and padding are; {supported}"
    return f"{named} is not supported by DSLA: its attention has not been tested; {supported}"


def sliding_window_of(attention: Any) -> int | None:
    """The sliding window of a base attention module in tokens, None if it sees everything."""
    if getattr(attention, "is_sliding", None) is False:  # EXAONE 4 writes the window of its local layers on all
        return None
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
