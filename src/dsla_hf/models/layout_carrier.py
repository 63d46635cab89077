"""How a `TokenLayout` reaches converted layers where keyword arguments do not: in the mask that a decoder layer hands to its attention.

Some decoder layers give their attention no keyword arguments but those they know (Nemotron, StableLM); others give all of them to a linear
layer beside it, whose kernels do not know ours. Hooks before both take the layout out of the arguments of the layer, put it to the mask,
and take the two apart again at the attention.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from torch import nn
from torch.utils.hooks import RemovableHandle

from ..core.layout import TokenLayout
from .architectures import base_type_of, find_architecture
from .decoder import attention_name, attentions_of

LAYOUT, MASK = "dsla_layout", "attention_mask"


class MaskWithLayout(NamedTuple):
    """What stands in for a mask between a decoder layer and its attention."""

    mask: Any
    layout: TokenLayout


def carry_layouts(decoder: Any) -> list[RemovableHandle]:
    """Make the layers of `decoder` carry layouts in masks, if its type needs that; what undoes it."""
    known = find_architecture(base_type_of(decoder.config))
    if known is None or known.keywords:
        return []
    name = attention_name(decoder.config)
    hooks = [layer.register_forward_pre_hook(functools.partial(_put_together, name), with_kwargs=True) for layer in decoder.layers]
    wrapped = [attention for attention in attentions_of(decoder) if hasattr(attention, "converted_part")]
    return hooks + [attention.register_forward_pre_hook(_take_apart, with_kwargs=True) for attention in wrapped]


def _put_together(name: str, layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The hook before a decoder layer."""
    if LAYOUT not in kwargs:
        return None
    rest = {key: value for key, value in kwargs.items() if key != LAYOUT}
    if hasattr(getattr(layer, name, None), "converted_part"):
        rest[MASK] = MaskWithLayout(kwargs.get(MASK), kwargs[LAYOUT])
    return args, rest


def _take_apart(attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
    """The hook before an attention."""
    if not isinstance(mask := kwargs.get(MASK), MaskWithLayout):
        return None
    return args, {**kwargs, MASK: mask.mask, LAYOUT: mask.layout}
