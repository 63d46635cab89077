"""The output projections of a layer, where each KV head's part of its output can be taken, weighed, or left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..models.architectures import fused_into


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

