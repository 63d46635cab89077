"""The decoder inside a model of transformers, and its layers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .architectures import SUPPORTED_BASES, base_type_of, convertible_layers, find_architecture
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


def attention_name(config: Any) -> str:
    """What a decoder layer of a model with this config calls its softmax attention: `self_attn`, unless its type is known to call it
    otherwise."""
    known = find_architecture(base_type_of(config))
    return "self_attn" if known is None else known.attention


def attentions_of(model: nn.Module) -> list[Any]:
    """The attention of each decoder layer that can be converted, or what stands in its place; None for other layers."""
    decoder: Any = decoder_of(model)
    config = decoder.config
    name, convertible = attention_name(config), convertible_layers(config)
    found = [getattr(layer, name, None) for layer in decoder.layers]
    if convertible[: len(found)] == list(range(len(found))):  # a decoder may be cut to its first layers for a while
        return found
    return [attention if i in convertible else None for i, attention in enumerate(found)]


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
