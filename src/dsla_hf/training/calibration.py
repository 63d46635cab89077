"""The start of the states' output: as large as the attention that it replaces.

A fresh layer reads its states through an RMS norm, so each channel comes out at 1, whatever the size of the model's values is. In a
checkpoint attention gives channels of very different sizes, mostly far below 1; gates that learn from there on learn from the noise first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.tensor_parallel import whole
from ..models.adapter import dsla_layers
from .sharding import cut_again, cut_like
from .switches import output_projections

SMALLEST = 1e-3  # of a channel's start, where the attention gives nothing


@torch.no_grad()
def match_outputs(model: Any, inputs: dict[str, Any], mean: Callable[..., Tensor] | None = None) -> list[int]:
    """Set `norm_weight` of fresh layers from one batch: to the root mean square of each channel of the original attention's output, and of
    layers without a window that times what brings the layer's output nearest to the original's (least squares).

    model: a PEFT model with a DSLA adapter. inputs: of its forward, `input_ids` `[B, T]` and what else it takes. Layers without states, or
    whose norm is not fresh (all 1), stay as they are. mean: over processes, of a tensor and `reduction="mean"`, where there are several.

    Returns:
        Indices of the layers that were set.
    """
    layers = {i: layer for i, layer in dsla_layers(model).items() if layer.adapter_name}
    cores = {i: layer.dsla_core[layer.adapter_name] for i, layer in layers.items()}
    fresh = {i: core for i, core in cores.items() if core.states and bool((whole(core.norm_weight) == 1).all())}
    over = mean or (lambda x, reduction: x)
    squares: dict[int, Tensor] = {}

    def keep(index: int) -> Any:
        def hook(projection: Any, args: tuple[Tensor, ...]) -> None:
            squares[index] = args[0].float().square().flatten(0, -2).mean(0)

        return hook

    _read_base(model, inputs, [output_projections(layers[i])[0].register_forward_pre_hook(keep(i)) for i in fresh])
    for i, core in fresh.items():
        size = over(squares[i], reduction="mean").view(core.norm_weight.shape).sqrt().clamp(min=SMALLEST)
        core.norm_weight.copy_(cut_like(size.to(core.norm_weight.dtype), core.norm_weight))
    products: dict[int, Tensor] = {}

    def compare(layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
        own, base = layer.dsla_attention()(*args, **kwargs)[0].float(), output[0].float()
        products[layer.layer_idx] = torch.stack([(own * base).mean(), own.square().mean()])

    pure = {i: core for i, core in fresh.items() if not core.window_size}
    _read_base(model, inputs, [layers[i].register_forward_hook(compare, with_kwargs=True) for i in pure])
    for i, core in pure.items():
        along, square = over(products[i], reduction="mean").unbind()
        core.norm_weight.mul_((along / square).clamp(min=SMALLEST))
    return list(fresh)


def _read_base(model: Any, inputs: dict[str, Any], hooks: list[Any]) -> None:
    """The original model's forward, if there are hooks for it, which are removed; FSDP then holds the weights in parts again."""
    if not hooks:
        return
    try:
        with model.disable_adapter():
            model(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    cut_again(model)
