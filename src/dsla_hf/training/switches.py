"""Switches between the softmax attention and the DSLA of KV heads, and the output projections at which they sit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..models.architectures import fused_into
from ..models.level import active_config, dsla_layers


def output_projections(layer: Any) -> tuple[Any, Any]:
    """Of a `DSLALayer` the base's output projection and that of its DSLA; one and the same where the adapter trains none."""
    name = fused_into(layer.base_layer, "o_proj")[0]
    return getattr(layer.base_layer, name), getattr(layer.dsla_attention(), name)


def by_head(heads: Tensor, weights: Tensor) -> Tensor:
    """Outputs of all query heads `[B, T, Hq * D]`, those of each KV head times its weight, `[Hkv]` or `[B, Hkv]`."""
    kv_heads = weights.shape[-1]
    return (heads.unflatten(-1, (kv_heads, -1)) * weights.to(heads.dtype).view(-1, 1, kv_heads, 1)).flatten(-2)


@contextmanager
def weighed(projection: nn.Module, weights: Tensor) -> Iterator[None]:
    """Within it an output projection takes the output of each KV head's queries times its weight, `[Hkv]` or `[B, Hkv]`."""
    handle = projection.register_forward_pre_hook(lambda module, args: (by_head(args[0], weights), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def switched(model: Any, values: dict[int, Tensor], gradients: bool = True) -> Iterator[dict[int, Tensor]]:
    """Within it each layer of `values` adds up the outputs of its softmax attention and of its DSLA, each KV head by its switch, `[Hkv]` or
    for each row of a batch `[B, Hkv]`: 0 is the base's, 1 the DSLA head. Other layers are the base's. Yields the switches, of which
    gradients can be taken; without `gradients` the values themselves, which may be written over from step to step."""
    layers = dsla_layers(model)
    switches = {index: value.detach().clone().requires_grad_() for index, value in values.items()} if gradients else values
    config = active_config(model)
    order, level = config.conversion_order, config.level
    heads = [(index, head) for index in sorted(values) for head in range(values[index].shape[-1])]
    try:
        # Whole layers are DSLA beside their softmax attention, whatever the plan: there are weights for all their heads.
        config.conversion_order = heads if config.conversion_unit == "head" else sorted(values)
        config.level = len(config.conversion_order)
        for index, switch in switches.items():
            layer: Any = layers[index]
            layer.forward = _switched_forward(layer, switch)
        yield switches
    finally:
        config.conversion_order, config.level = order, level
        for index in switches:
            layers[index].__dict__.pop("forward", None)


def _switched_forward(layer: Any, switch: Tensor) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        base_o, own_o = output_projections(layer)
        with weighed(base_o, 1 - switch):
            softmax, *rest = layer.base_layer(*args, **{key: value for key, value in kwargs.items() if key != "dsla_layout"})
        with weighed(own_o, switch):
            linear = layer.dsla_attention()(*args, **kwargs)[0]
        if own_o.bias is not None:  # it is there once
            linear = linear - own_o.bias.to(linear.dtype)
        return (softmax + linear, *rest)

    return forward
