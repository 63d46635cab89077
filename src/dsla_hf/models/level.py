"""The level of any model that has DSLA layers, also where transformers has put the adapter in."""

from __future__ import annotations

from torch import nn

from .adapter_layer import DSLALayer
from .configuration import DSLAConfig


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


def set_level(model: nn.Module, level: int) -> None:
    """Run the first `level` layers of the plan as DSLA. See `DSLAModel.set_level`."""
    config = active_config(model)
    config.level = config.check_level(level)


def get_level(model: nn.Module) -> int:
    """How many layers of the plan run as DSLA."""
    return active_config(model).level or 0
