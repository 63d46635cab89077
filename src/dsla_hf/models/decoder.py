"""The decoder inside a model of transformers, and its layers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .architectures import SUPPORTED_BASES
from .multimodal import inner_text_config


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers of a causal LM of transformers.

    Raises:
        ValueError: if there are none where transformers puts them.
    """
    layers = getattr(decoder_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of decoder layers; supported base models: {list(SUPPORTED_BASES)}")
    return layers


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder inside a causal LM, e.g. the `LlamaModel` of a `LlamaForCausalLM` (or the model itself if it is one); of a multimodal
    model that of its text model."""
    if not isinstance(model, PreTrainedModel):
        return model
    return model.base_model if inner_text_config(model.config) is None else model.get_decoder()


@contextmanager
def first_layers(model: nn.Module, count: int) -> Any:
    """Within it a forward of `model` runs the first `count` layers of its decoder alone.

    The others are out of sight only while the decoder runs: FSDP and DDP look through the whole model before.
    """
    decoder: Any = decoder_of(model)
    layers = decoder_layers(model)

    def shorten(*_: Any) -> None:
        decoder.layers = layers[:count]

    def restore(*_: Any) -> None:
        decoder.layers = layers

    handles = [decoder.register_forward_pre_hook(shorten), decoder.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
