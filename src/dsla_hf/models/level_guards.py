"""What goes wrong where the level and a training step do not fit, and text of layers that were never trained: said in time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .level import active_config, dsla_layers, get_level

logger = logging.get_logger(__name__)


def check_training(model: nn.Module, training: bool) -> None:
    """Refuse a training forward in which no DSLA weight that is to be trained has a part, because all are of layers that are not DSLA now.
    PyTorch's error names no cause, and embeddings that require gradients for checkpointing, or other trained weights, hide even that."""
    if not (training and torch.is_grad_enabled()):
        return
    layers = dsla_layers(model)
    trained = {i: layer for i, layer in layers.items() if any(p.requires_grad for part in layer.adapter_parts() for p in part.parameters())}
    if not trained or any(layer.converted or layer.disable_adapters for layer in trained.values()):
        return
    raise RuntimeError(
        f"nothing of DSLA can be trained at level {get_level(model)}: the weights that require gradients are those of layers "
        f"{sorted(trained)}, which are not DSLA now (the plan is {active_config(model).conversion_order}). Call set_level(), or give "
        "DSLAConfig a level, before training; or use DSLATrainer without train_level, which draws a level for every step. A pass without "
        "gradients takes torch.no_grad(); to train other weights alone, call set_trainable_layers([])"
    )


def check_training_at_level_0(decoder: nn.Module, args: Any) -> None:
    """A forward pre-hook of the decoder: there for every loss, also for adapters that transformers' `add_adapter` put in."""
    if decoder.training and torch.is_grad_enabled() and not any(layer.converted for layer in dsla_layers(decoder).values()):
        check_training(decoder, True)


def warn_of_untrained(model: nn.Module, any_level: bool) -> bool:
    """Say so if layers that are DSLA now, or at any level, were never trained; returns whether it was said."""
    untrained = [i for i, layer in dsla_layers(model).items() if (any_level or layer.converted) and layer.untrained]
    if untrained:
        logger.warning(
            f"the DSLA weights of layers {untrained} were never trained, so what is generated tells nothing of the method: distil them "
            "(`dsla distill`, `dsla_hf.distill`), or load trained ones with PeftModel.from_pretrained(base, adapter). Level 0 is the "
            "original model"
        )
    return bool(untrained)


def guard_level(decoder: nn.Module, args: Any, output: Any) -> None:
    """Refuse a backward pass at another level than its forward: recomputed activations would belong to another model."""
    hidden = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else output)
    if not (torch.is_grad_enabled() and isinstance(hidden, Tensor) and hidden.requires_grad):
        return

    def converted() -> dict[int, Any]:
        return {index: part for index, layer in dsla_layers(decoder).items() if (part := layer.converted_part)}

    def listed(layers: dict[int, Any]) -> list[str]:
        return [str(i) if part is True else f"{i} (heads {', '.join(map(str, part))})" for i, part in layers.items()]

    before = converted()

    def check(grad: Tensor) -> None:
        if (now := converted()) != before:
            raise RuntimeError(
                f"the level changed between forward and backward: layers [{', '.join(listed(before))}] were DSLA, "
                f"now [{', '.join(listed(now))}] are. "
                "Change the level (or disable_adapter) only after backward()"
            )

    hidden.register_hook(check)
