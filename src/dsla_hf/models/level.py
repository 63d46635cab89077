"""The level of any model that has DSLA layers, also where transformers has put the adapter in."""

from __future__ import annotations

from typing import Any

from torch import nn

from .adapter_layer import DSLALayer
from .base_attention import DSLAAttentionMixin
from .configuration import DSLAConfig, resolve_level
from .decoder import attentions_of, decoder_of


def dsla_layers(model: nn.Module) -> dict[int, DSLALayer]:
    """The wrapped layers of a model by layer number."""
    return {module.layer_idx: module for module in model.modules() if isinstance(module, DSLALayer)}


def active_config(model: nn.Module) -> DSLAConfig:
    """The config of the active DSLA adapter, also of one that transformers' `load_adapter` put in.

    Raises:
        ValueError: if the model has none.
    """
    for layer in model.modules():  # up to the first that tells: policies ask after every token, and all modules take milliseconds
        if isinstance(layer, DSLALayer) and layer.adapter_name is not None:
            return layer.configs[layer.adapter_name]
    raise ValueError(f"{type(model).__name__} has no active DSLA adapter: make one with get_peft_model(model, DSLAConfig(...))")


def set_level(model: nn.Module, level: int | str) -> None:
    """Run the first `level` units of the plan as DSLA. See `DSLAModel.set_level`."""
    config = active_config(model)
    if isinstance(level, str):
        level = resolve_level(level, config, (config.base_dimensions or {}).get("num_hidden_layers", len(config.conversion_order or ())))
    config.level = config.check_level(level)


def get_level(model: nn.Module) -> int:
    """How many units of the plan run as DSLA: layers, or KV heads where the plan counts those."""
    return active_config(model).level or 0


def counts_heads(model: nn.Module) -> bool:
    """Whether levels of this causal LM (or decoder) count KV heads, or it is a hybrid with layers converted in part: what knows whole
    layers alone asks."""
    decoder: Any = decoder_of(model)
    for attention in attentions_of(decoder) if hasattr(decoder, "layers") else ():
        if isinstance(attention, DSLALayer) and attention.adapter_name is not None:
            return attention.configs[attention.adapter_name].conversion_unit == "head"
        if isinstance(attention, DSLAAttentionMixin) and attention.split is not None:
            return True
    return False
