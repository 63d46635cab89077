"""Small random models of a type, with what is particular about a config: only sizes change."""

from __future__ import annotations

from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

from ...compat.attributes import attention_implementation, set_attention_implementation
from ..architectures import SOFTMAX_LAYERS, kv_heads_of

SOFTMAX = 4  # layers with softmax attention in a small model, as the checks have it
HEADS, HEAD_DIM = 4, 8
VOCABULARY = 97
WINDOW = 12
EXPERTS = 4

SIZES = {
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 48,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "sliding_window": WINDOW,
    "initializer_range": 0.2,  # a wrong attention cannot hide behind a small output
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
COUNTS_OF_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "top_k_experts", "moe_topk")
# What belongs to files and to a run, not to the type.
NOT_SHAPE = ("architectures", "auto_map", "dtype", "model_type", "quantization_config", "transformers_version", "_name_or_path")


def small_config(config: Any) -> PreTrainedConfig:
    """A config of the same type for a model of a few thousand weights: four layers with softmax attention, of each kind of layer at least
    one, and everything else that is no size as it is."""
    values = {name: value for name, value in config.to_dict().items() if name not in NOT_SHAPE}
    layers = _layers(config)
    depth = config.num_hidden_layers
    for name, value in values.items():
        if isinstance(value, list) and len(value) == depth:
            values[name] = [value[i] for i in layers]
        elif name in SIZES and value is not None:
            values[name] = SIZES[name]
        elif name in COUNTS_OF_EXPERTS and value:
            values[name] = EXPERTS
        elif name in EXPERTS_OF_A_TOKEN and value:
            values[name] = min(2, value)
        elif name.endswith("intermediate_size") and isinstance(value, int):
            values[name] = SIZES["intermediate_size"]
        elif name == "rope_parameters" and isinstance(value, dict):
            values[name] = _without_lengths(value)
    values["num_hidden_layers"] = len(layers)
    if "num_key_value_heads" in values:
        shared = kv_heads_of(config) < config.num_attention_heads
        values["num_key_value_heads"] = HEADS // 2 if shared else HEADS
    values["num_attention_heads"] = HEADS
    return type(config)(**values)


def small_model(model: PreTrainedModel, config: PreTrainedConfig, uneven: bool) -> PreTrainedModel:
    """A random causal LM in fp32 on the CPU, for a config of `small_config`.

    uneven: norms and biases, which start at 0 or 1, are moved, so that one that is left out or of the wrong head is seen.
    """
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    implementation = attention_implementation(model.config)
    set_attention_implementation(config, implementation if implementation in ("eager", "sdpa") else "eager")  # what a CPU has
    with torch.device("cpu"):
        small = model_class(config).float().eval().requires_grad_(False)
    return make_uneven(small) if uneven else small


@torch.no_grad()
def make_uneven(model: Any) -> Any:
    """Move norms, biases and what heads have one each of away from where they start."""
    for parameter in model.parameters():
        if parameter.ndim == 1 or parameter.shape[0] in (2, 4):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def _layers(config: Any) -> list[int]:
    """Numbers of the layers that a small model has the kinds of: the first of each kind without softmax attention, and four with it."""
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    others = list({kind: i for i, kind in reversed(list(enumerate(kinds))) if kind not in SOFTMAX_LAYERS}.values())
    firsts = list({kind: i for i, kind in reversed(list(enumerate(kinds))) if kind in SOFTMAX_LAYERS}.values())
    return sorted(others) + (sorted(firsts) * SOFTMAX)[:SOFTMAX]


def _without_lengths(rope: dict[str, Any]) -> dict[str, Any]:
    """Rotary parameters without the lists that have an entry for each channel (longrope), which no other number of channels takes."""
    if any(isinstance(value, dict) for value in rope.values()):  # by kind of layer
        return {kind: _without_lengths(value) if isinstance(value, dict) else value for kind, value in rope.items()}
    if not any(isinstance(value, list) for value in rope.values()):
        return rope
    return {"rope_type": "default"} | {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
