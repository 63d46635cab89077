"""The start of the states: as large as the attention that they replace, and no more open than helps.

A fresh layer reads its states through an RMS norm, so each channel comes out at 1, whatever the size of the model's values is. In a
checkpoint attention gives channels of very different sizes, mostly far below 1; and where its scores are low, so that the window's
denominator is small, the states start wide open beside it. Gates that learn from there on learn from the noise first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.tensor_parallel import whole
from ..models.adapter import dsla_layers
from .sharding import cut_again, cut_like
from .switches import output_projections

SMALLEST = 1e-3  # of a channel's start, where the attention gives nothing
BIASES = tuple(float(-bias) for bias in range(0, 17, 2))  # that a head's `state_bias` is taken from
SLACK = 0.02  # of a head's least error: the widest start within it is taken, since states that are shut learn nothing


@torch.no_grad()
def match_outputs(model: Any, inputs: dict[str, Any] | Sequence[dict[str, Any]], mean: Callable[..., Tensor] | None = None) -> list[int]:
    """Set `norm_weight` of fresh layers, and what is fresh beside it, from the batches of one step.

    `norm_weight` becomes the root mean square of each channel of the original attention's output. Behind a window `state_bias` of each
    query head becomes the highest of BIASES with which its output is as near to the original's as with any of them, but for SLACK. Without
    a window `norm_weight` is then multiplied, layer by layer, by what brings the layer's output nearest (least squares).

    model: a PEFT model with a DSLA adapter. inputs: of its forward, `input_ids` `[B, T]` and what else it takes; tokens that a 2-D
    `attention_mask` hides count for nothing. Of several batches, whose gradients are accumulated, each token counts alike. Layers without
    states, or whose norm is not fresh (all 1), stay as they are, and all do where the original's attention is not finite. mean: over
    processes, of a tensor and `reduction="mean"`, where there are several.

    Returns:
        Indices of the layers that were set.
    """
    layers = {i: layer for i, layer in dsla_layers(model).items() if layer.adapter_name}
    cores = {i: layer.dsla_core[layer.adapter_name] for i, layer in layers.items()}
    fresh = {i: core for i, core in cores.items() if core.states and bool((whole(core.norm_weight) == 1).all())}
    over = mean or (lambda x, reduction: x)
    taken: dict[int, Tensor] = {}  # by the original's output projections
    found: dict[int, Tensor] = {}
    batches = [inputs] if isinstance(inputs, dict) else inputs
    real: Tensor | None = None  # of the batch that is read, `[B, T]`

    def over_batches(hooks: Callable[[], list[Any]], result: dict[int, Tensor]) -> dict[int, Tensor]:
        """What hooks leave in `result`, on average over all tokens."""
        nonlocal real
        averages, left, count = dict[int, Tensor](), dict[int, Tensor](), 0
        for batch in batches:  # all of them, whatever they hold: processes read together
            mask = batch.get("attention_mask")
            real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
            here = batch["input_ids"].numel() if real is None else int(real.sum())
            count += here
            _read_base(model, batch, hooks())
            left = dict(result)
            result.clear()
            for index, value in left.items() if here else ():
                averages[index] = value if index not in averages else averages[index] + (value - averages[index]) * (here / count)
        return averages or left

    def tokens(x: Tensor) -> Tensor:
        """`[real tokens, channels]` of `[B, T, channels]`."""
        return (x.flatten(0, 1) if real is None else x[real.to(x.device)]).float()

    def keep(index: int, reduce: Callable[[Tensor], Tensor]) -> Any:
        return output_projections(layers[index])[0].register_forward_pre_hook(lambda module, args: taken.update({index: reduce(args[0])}))

    squares = over_batches(lambda: [keep(i, lambda x: tokens(x).square().mean(0)) for i in fresh], taken)
    squares = {i: over(squares[i], reduction="mean") for i in fresh}
    if not all(square.isfinite().all() for square in squares.values()):
        return []  # the step says what is wrong
    for i, core in fresh.items():
        _put(core.norm_weight, squares[i].view(core.norm_weight.shape).sqrt().clamp(min=SMALLEST))

    def compare_heads(layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
        """Errors by bias and query head."""
        index = layer.layer_idx
        base, core, errors = taken.pop(index), fresh[index], []
        before = core.state_bias.clone()
        own: list[Tensor] = []
        hook = output_projections(layer)[1].register_forward_pre_hook(lambda module, args: own.append(args[0]))
        for bias in BIASES:
            core.state_bias.fill_(bias)
            layer.dsla_attention()(*args, **kwargs)
            errors.append((tokens(own.pop()) - base).square().unflatten(-1, (len(before), -1)).mean((0, 2)))
        hook.remove()
        taken.pop(index, None)  # where both have one projection
        core.state_bias.copy_(before)
        found[index] = torch.stack(errors)

    def compare(layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
        own, base = tokens(layer.dsla_attention()(*args, **kwargs)[0]), tokens(output[0])
        found[layer.layer_idx] = torch.stack([(own * base).mean(), own.square().mean()])

    windowed = [i for i, core in fresh.items() if core.window_size]
    pure = [i for i in fresh if i not in windowed]

    def comparing() -> list[Any]:
        hooks = [keep(i, tokens) for i in windowed]
        return hooks + [layers[i].register_forward_hook(compare_heads if i in windowed else compare, with_kwargs=True) for i in fresh]

    found = over_batches(comparing, found)
    biases = torch.tensor(BIASES)
    for i in windowed:
        errors = over(found[i], reduction="mean").cpu()
        near = errors <= (1 + SLACK) * errors.min(0).values
        _put(fresh[i].state_bias, biases[near.float().argmax(0)])  # the first of them
    for i in pure:
        along, square = over(found[i], reduction="mean").unbind()
        _put(fresh[i].norm_weight, whole(fresh[i].norm_weight) * (along / square).clamp(min=SMALLEST))
    return list(fresh)


def _put(weight: Tensor, value: Tensor) -> None:
    weight.copy_(cut_like(value.to(weight.device, weight.dtype), weight))


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
