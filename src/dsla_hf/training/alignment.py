"""Stage "alignment" of one layer: its DSLA beside the attention that it replaces, on the same inputs.

Three ways to compare. `all`: the whole layer's output. `subsets`: the output of the layer with some of its heads converted, others in every
step, since heads that are trained together alone make up for each other behind the output projection. `each`: every head's part of the
output by itself. Kept heads are the base's, whose pass is there already, so that a subset costs one output projection more, and no new
view of a layer. A norm over the queries of all heads (OLMo 2) goes over DSLA's rows of all of them here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.quantised import dequantised
from .losses import alignment_sums
from .switches import by_head, output_projections

WAYS = ("all", "subsets", "each")
WHOLE_SHARE = 0.3  # of the draws that convert all heads of the plan: the level that asks most


def draw_heads(seed: int, step: int, layer: int, heads: Sequence[int]) -> tuple[int, ...]:
    """Which of a layer's `heads` are converted in a training step: all in some steps, else a number that is uniform from one to all. A pure
    function of its arguments, so that it is the same on every process and after a resume."""
    rng = random.Random(f"{seed}/{step}/{layer}")
    if rng.random() < WHOLE_SHARE:
        return tuple(heads)
    return tuple(sorted(rng.sample(list(heads), rng.randint(1, len(heads)))))


def align_whole(layer: Any, args: tuple, kwargs: dict[str, Any], target: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Error and energy of a `DSLALayer`'s DSLA beside the base's output `target` `[B, T, hidden]`; mask as in `alignment_sums`."""
    return alignment_sums(layer.dsla_attention()(*args, **kwargs)[0], target, mask)


def align_subset(
    layer: Any, args: tuple, kwargs: dict[str, Any], target: Tensor, mask: Tensor | None, softmax: Tensor, converted: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of the layer with some heads converted: `converted` `[Hkv]`, 1 for these and 0 for kept ones.

    softmax: what the base's output projection took, `[B, T, Hq * D]`."""
    base_o, own_o = output_projections(layer)

    def of_converted(heads: Tensor) -> Tensor:
        # The bias belongs to no head, and is the base's below. Its gradient is zero, not missing, for DDP.
        bias = None if own_o.bias is None else own_o.bias.to(heads.dtype) * 0
        return F.linear(by_head(heads, converted), _weight(own_o).to(heads.dtype), bias)

    with torch.no_grad():
        kept = base_o(by_head(softmax, 1 - converted))
    own_o.forward = of_converted
    try:
        linear = layer.dsla_attention()(*args, **kwargs)[0]
    finally:
        del own_o.forward
    return alignment_sums(kept + linear, target, mask)


def align_each(
    layer: Any, args: tuple, kwargs: dict[str, Any], target: Tensor, mask: Tensor | None, softmax: Tensor, converted: Tensor
) -> tuple[Tensor, Tensor]:
    """As `align_subset`, but sums over the converted heads of error and energy of each one's part of the output, without bias."""
    base_o, own_o = output_projections(layer)
    taken: list[Tensor] = []
    handle = own_o.register_forward_pre_hook(lambda module, inputs: taken.append(inputs[0]))
    try:
        layer.dsla_attention()(*args, **kwargs)
    finally:
        handle.remove()
    kv_heads = len(converted)
    base_weights, own_weights = (_weight(projection).to(target.dtype).chunk(kv_heads, 1) for projection in (base_o, own_o))
    linear, parts = taken[0].chunk(kv_heads, -1), softmax.chunk(kv_heads, -1)
    error = energy = torch.zeros((), device=target.device)
    for head, switch in enumerate(converted):
        more, of_it = alignment_sums(F.linear(linear[head], own_weights[head]), F.linear(parts[head], base_weights[head]), mask)
        error, energy = error + switch * more, energy + switch * of_it
    if own_o.bias is not None:
        error = error + (own_o.bias * 0).sum()  # it belongs to no head; DDP waits for its gradient
    return error, energy


def _weight(projection: Any) -> Tensor:
    weight = dequantised(projection)
    if weight is None:
        raise ValueError(
            f"the weights of {type(projection).__name__} have a form that is not known, so its heads cannot be aligned one by one: give "
            "alignment_heads='all'"
        )
    return weight
