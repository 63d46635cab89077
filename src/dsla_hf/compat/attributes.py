"""Attributes of other packages' objects that are not public: each read and written here alone. `touches` lists them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# --- configs and models of transformers -------------------------------------------------------------------------


def attention_implementation(config: Any) -> str | None:
    """Which attention a model with this config runs: "sdpa", "eager", ..."""
    return config._attn_implementation


def set_attention_implementation(config: Any, name: str | None) -> None:
    """Choose it."""
    config._attn_implementation = name


def copy_implementations(source: Any, target: Any) -> None:
    """Let a config choose the attention and the experts that another one does, and each config in it likewise."""
    target._attn_implementation = source._attn_implementation
    target._experts_implementation = getattr(source, "_experts_implementation", None)
    for name in source.sub_configs:  # behind the whole, which hands its own choice on to them
        if getattr(source, name, None) is not None:
            copy_implementations(getattr(source, name), getattr(target, name))


def forget_conversions(model: Any) -> None:
    """Let `save_pretrained` name weights as the class of the model does now, and not as the checkpoint did that it was loaded from: what
    undoes the conversions is found by the class when it is loaded again."""
    model.__dict__.pop("_weight_conversions", None)


def carries_adapter(model: Any) -> bool:
    """Whether transformers has put an adapter into this model, by its `load_adapter` or `add_adapter`."""
    return getattr(model, "_hf_peft_config_loaded", False)


def padding_token(settings: Any) -> Tensor:
    """What `generate` writes behind the end of a text, from the settings that it hands to a decoding loop."""
    return settings._pad_token_tensor


def is_loaded(parameter: Tensor) -> bool:
    """Whether transformers has loaded this parameter from a checkpoint."""
    return getattr(parameter, "_is_hf_initialized", False)


# --- modules and tensors of torch -------------------------------------------------------------------------------


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children of a module by name: its own dict."""
    return module._modules


def has_hooks(module: nn.Module, before_only: bool = False) -> bool:
    """Whether functions are registered that run around the forward of a module (or before it)."""
    return bool(module._forward_pre_hooks or (module._forward_hooks and not before_only))


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a module itself by name: its own dict, in which they can be exchanged without a check."""
    return module._parameters


def with_parameters(module: nn.Module, parameters: dict[str, Any]) -> Any:
    """A shallow copy of a module with these for its own parameters, which may be plain tensors."""
    copied = copy.copy(module)
    copied._parameters = parameters
    return copied


def with_children(module: nn.Module, children: dict[str, nn.Module]) -> Any:
    """A shallow copy of a module, without the hooks around its call, with some children exchanged."""
    copied = object.__new__(type(module))
    copied.__dict__ = {**module.__dict__, "_modules": {**module._modules, **children}}
    return copied


def view_of(
    module: nn.Module, cls: type[nn.Module], children: dict[str, nn.Module | None], parameters: dict[str, Any] | None = None
) -> Any:
    """A module of `cls` that has the attributes, parameters (or these tensors for them) and buffers of `module`, the very same, and
    `children` for its own.

    It runs the forward of its class: those that accelerate's hooks have put into `module` stay there."""
    view = cls.__new__(cls)
    nn.Module.__init__(view)
    own = {*view.__dict__, "forward", "_old_forward", "_hf_hook"}
    view.__dict__.update({name: value for name, value in module.__dict__.items() if name not in own})
    view._modules, view._buffers = dict(children), module._buffers
    view._parameters = module._parameters if parameters is None else parameters
    return view


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate has put a hook into this module, which brings its weights in."""
    return hasattr(module, "_hf_hook")


def versions_of(tensors: Iterable[Tensor]) -> tuple[tuple[int, int], ...]:
    """Where tensors lie and how often they were written: what is computed from them stays right while this does not change."""
    return tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors)


def keep_address(tensor: Tensor) -> None:
    """Promise that a tensor is written in place, so that compiled code reads it where it lies."""
    torch._dynamo.mark_static_address(tensor)
