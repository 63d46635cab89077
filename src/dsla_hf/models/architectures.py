"""Base models whose attention DSLA replaces, and what is particular about each: one small entry per architecture.

An entry is needed because an attention that does something unheard of would be silently wrong, not because most need care: the
base's own forward runs, with its projections, norms, rotary embedding, scaling, score cap and sink logit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from .multimodal import MULTIMODAL, attention_type, inner_text_config, text_config_of

# A sliding window up to this long already is what a DSLA layer would be: converting it gains nothing.
SHORT_WINDOW = 1024

# Kinds of layers with softmax attention, alone or ("hybrid") beside something linear, as configs name them.
SOFTMAX_LAYERS = ("full_attention", "sliding_attention", "attention", "hybrid")


@dataclass(frozen=True)
class Architecture:
    """fused: projections that lie in one matrix, by its name, in the order of its rows. rotary_layout: which channels of a head rotate
    together, one of `attention.ROTARY_LAYOUTS`. partial_rotary: whether `partial_rotary_factor` says how many of them rotate (the first
    ones), all if not. attention: what a decoder layer calls its softmax attention. names: what that calls projections, where it is not
    `q_proj` and the like. keywords: whether decoder layers hand their keyword arguments on to their attention, and to nothing that does not
    know them; `layout_carrier` has another way. ordered: whether heads may lie in another order within the attention, as nothing in it but
    projections and norms of queries tells one from another. kinds: of layers that can be converted, as configs name them. notes: for the
    table in the docs."""

    fused: dict[str, tuple[str, ...]] = field(default_factory=dict)
    rotary_layout: str = "halves"
    partial_rotary: bool = False
    attention: str = "self_attn"
    names: dict[str, str] = field(default_factory=dict)
    keywords: bool = True
    ordered: bool = True
    kinds: tuple[str, ...] = SOFTMAX_LAYERS
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
    "gemma4_text": Architecture(
        kinds=("full_attention",),
        notes="no layers that read the keys and values of another; local ones, whose heads are smaller, stay; no kernels for heads of 512",
    ),
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
    "stablelm": Architecture(
        keywords=False, partial_rotary=True, ordered=False, notes="norms of queries and keys of each head, where the checkpoint has them"
    ),
    "vaultgemma": Architecture(notes="score cap kept in the window; local layers are left out of the plan by default"),
    "falcon_h1": Architecture(keywords=False, notes="attention beside a state-space model in every layer, which stays"),
    "granitemoehybrid": Architecture(keywords=False, notes="attention layers alone are converted; Mamba-2 layers stay"),
    "lfm2_moe": Architecture(
        keywords=False,
        names={"o_proj": "out_proj"},
        notes="mixture of experts; attention layers alone are converted; convolutions stay",
    ),
    "olmo_hybrid": Architecture(keywords=False, notes="attention layers alone are converted; DeltaNet layers stay"),
    "qwen3_5_moe_text": Architecture(keywords=False, partial_rotary=True, notes="mixture of experts; as `qwen3_5_text`"),
    "lfm2": Architecture(keywords=False, names={"o_proj": "out_proj"}, notes="attention layers alone are converted; convolutions stay"),
    "nemotron": Architecture(keywords=False, partial_rotary=True, notes="MLP without a gate"),
    "nemotron_h": Architecture(
        keywords=False, attention="mixer", notes="attention layers alone are converted; Mamba-2 layers stay; no rotary embedding"
    ),
    "qwen3_5_text": Architecture(
        keywords=False,
        partial_rotary=True,
        notes="attention layers alone are converted, their output gate with q_proj; DeltaNet layers stay",
    ),
    "qwen3_next": Architecture(
        keywords=False,
        partial_rotary=True,
        notes="attention layers alone are converted, their output gate with q_proj; DeltaNet layers stay",
    ),
}
SUPPORTED_BASES = tuple(ARCHITECTURES)
# Of further types what was found when they were tried: by this process, or by that which wrote an adapter or a hybrid (see `trial`).
TRIED: dict[str, Architecture] = {}


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
# Those that mix no tokens at all.
LAYERS_WITHOUT_MIXER = ("moe", "mlp")
# Sizes that only configs of models with such layers have.
LINEAR_SIZES = ("mamba_d_state", "state_size", "linear_num_value_heads")
# Models without any softmax attention.
LINEAR_MODELS = ("mamba", "mamba2", "falcon_mamba", "rwkv", "xlstm")


def why_unsupported(config: Any) -> str:
    """Why DSLA does not replace the attention of models with this config, as far as the config tells: by its structure, so that types which
    are not known by name are told apart, too."""
    if (obstacle := why_impossible(config)) is not None:
        return obstacle
    linear = _linear_layers(config)
    beside = (
        f"has layers that are linear already ({linear}) beside its attention, which"
        if linear
        else "is not supported by DSLA: its attention"
    )
    return (
        f"model type {getattr(config, 'model_type', None)!r} {beside} has not been tested. DSLAConfig(allow_untested=True) runs the checks "
        f"on a small model of this type and, if all hold, converts; supported are {', '.join(SUPPORTED_BASES)}"
    )


def why_impossible(config: Any) -> str | None:
    """Why DSLA cannot replace the attention of models with this config, as far as the config tells; None where it may be tried."""
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
    if model_type in LINEAR_MODELS or (layer_types and layer_types <= {*LAYERS_WITHOUT_MIXER, *LINEAR_LAYERS}):
        return f"{named} has no softmax attention: all its layers are linear already; {supported}"
    if values.get("kv_lora_rank"):
        return (
            f"{named} has latent attention (MLA, kv_lora_rank), whose cache holds no keys and values that states could take in; {supported}"
        )
    if values.get("num_kv_shared_layers"):
        return f"{named} has layers that read the keys and values of another (num_kv_shared_layers), which states cannot; {supported}"
    if other := sorted(layer_types - {*SOFTMAX_LAYERS, *LAYERS_WITHOUT_MIXER, *LINEAR_LAYERS}):
        return f"{named} has layers of types that DSLA does not know: {', '.join(other)}; {supported}"
    # GPT-NeoX, no encoder, has `is_decoder=False`, too.
    if values.get("is_decoder") is False and type(config) in MODEL_FOR_MASKED_LM_MAPPING:
        return f"{named} is an encoder: its attention looks ahead, and a state cannot; {supported}"
    return None


def _linear_layers(config: Any) -> str:
    """The kinds of linear layers that a config names, in words."""
    values: dict[str, Any] = config.to_dict() if hasattr(config, "to_dict") else {}
    kinds = {str(kind) for name in ("layer_types", "layers_block_type", "block_types") for kind in values.get(name) or ()}
    found = ", ".join(sorted(kinds & set(LINEAR_LAYERS)))
    return found or ("a state-space model" if any(values.get(name) for name in LINEAR_SIZES) else "")


def base_type_of(config: Any) -> str | None:
    """The type whose attention the base with this config has, or the base of a hybrid with it. Inside a multimodal model give the config of
    its decoder."""
    return attention_type(getattr(config, "base_model_type", None) or getattr(config, "model_type", None) or "") or None


def find_architecture(model_type: str | None) -> Architecture | None:
    """The entry of a type, None where there is none."""
    return ARCHITECTURES.get(model_type or "") or TRIED.get(model_type or "")


def architecture_of(config: Any) -> Architecture:
    """The entry of the base with this config, or of the base of a hybrid with it.

    Raises:
        ValueError: if there is none.
    """
    if (found := find_architecture(base_type_of(config))) is None:
        raise ValueError(why_unsupported(config))
    return found


def convertible_layers(config: Any) -> list[int]:
    """The numbers of the decoder layers whose softmax attention can be converted: in most models all."""
    config = text_config_of(config)
    kinds, known = getattr(config, "layer_types", None), find_architecture(base_type_of(config))
    if kinds is None:
        return list(range(config.num_hidden_layers))
    return [i for i, kind in enumerate(kinds) if kind in (SOFTMAX_LAYERS if known is None else known.kinds)]


def has_linear_layers(config: Any) -> bool:
    """Whether decoder layers of a base with this config, or parts of them, are linear already: a cache then has their states, too."""
    return any(kind in LINEAR_LAYERS or kind == "hybrid" for kind in getattr(config, "layer_types", None) or ())


def check_draftable(config: Any, draft_level: Any) -> None:
    """Raises ValueError where a model with this config cannot guess at `draft_level` and take guesses back."""
    if has_linear_layers(config):
        raise ValueError(f"draft_level={draft_level!r}: this base has linear layers, which cannot take guesses back; leave draft_level out")


def sliding_window_of(attention: Any) -> int | None:
    """The sliding window of a base attention module in tokens, None if it sees everything."""
    if getattr(attention, "is_sliding", None) is False:  # EXAONE 4 writes the window of its local layers on all
        return None
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(attention.config, "sliding_window", None)


def rotary_of(config: Any, model_type: str) -> tuple[str, int]:
    """How a base with this config rotates the channels of a head: `rotary_layout` and `rotary_dim` of `DualStateAttention`."""
    architecture = find_architecture(model_type) or Architecture()
    rotated = head_dim_of(config)
    if architecture.partial_rotary:
        rotated = int(rotated * config.rope_parameters.get("partial_rotary_factor", 1.0))
    return architecture.rotary_layout, rotated + rotated % 2  # a frequency rotates two channels


def head_dim_of(config: Any) -> int:
    """Channels of a head of layers that can be converted, as transformers' rotary embeddings count them."""
    config = _of_convertible_layers(config)
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads_of(config: Any) -> int:
    """Key-value heads of such layers of a base with this config, which names them only where they are shared."""
    config = _of_convertible_layers(config)
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def heads_differ(config: Any) -> bool:
    """Whether a config has sizes of some layers that are not those of others (Gemma 4)."""
    return getattr(config, "is_heterogeneous", False)


def _of_convertible_layers(config: Any) -> Any:
    return config.per_layer_config[convertible_layers(config)[0]] if heads_differ(config) else config


def fused_into(attention: Any, name: str) -> tuple[str, tuple[str, ...]]:
    """The matrix that holds a projection (`q_proj`, ...), and the projections in it: itself alone for most models."""
    if hasattr(attention, name):
        return name, (name,)
    architecture = architecture_of(attention.config)
    if name in architecture.names:
        return architecture.names[name], (name,)
    for matrix, parts in architecture.fused.items():
        if name in parts:
            return matrix, parts
    raise ValueError(f"{type(attention).__name__} has no projection {name}")


def projection(attention: Any, name: str) -> tuple[nn.Linear, slice]:
    """The linear module that holds a projection, and which of its output rows are this one's."""
    matrix, parts = fused_into(attention, name)
    if parts == (name,):
        if (linear := getattr(attention, matrix)) is None:
            raise ValueError(
                f"{type(attention).__name__} of layer {attention.layer_idx} has no {name}: leave it out of trained_projections"
            )
        return linear, slice(None)
    heads = attention.config.num_attention_heads
    kv_heads = kv_heads_of(attention.config)
    rows = {"q_proj": heads * attention.head_dim, "k_proj": kv_heads * attention.head_dim, "v_proj": kv_heads * attention.head_dim}
    start = sum(rows[part] for part in parts[: parts.index(name)])
    return getattr(attention, matrix), slice(start, start + rows[name])


def query_rows(attention: Any) -> int:
    """Rows of the query projection that belong to one head: twice its channels where a gate of the head's output lies behind its query."""
    linear, rows = projection(attention, "q_proj")
    count = len(range(*rows.indices(linear.out_features)))
    return attention.head_dim * count // projection(attention, "o_proj")[0].in_features
