"""Weights held in another form than numbers of their own: which ones are, and what they stand for."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..compat import dequantize_module_weight


def is_quantised(weight: Tensor) -> bool:
    """Whether a parameter holds packed or scaled numbers: bitsandbytes' and other integers, fp8, the tensors of torchao."""
    if hasattr(weight, "to_local"):  # a part of a `DTensor`
        weight = weight.to_local()
    return not weight.is_floating_point() or weight.dtype.itemsize == 1 or hasattr(weight, "__tensor_flatten__")


def quantised_weight(model: nn.Module, part: str = "") -> str | None:
    """The name of the first quantised parameter of a model whose name contains `part`; None if there is none."""
    return next((name for name, parameter in model.named_parameters() if part in name and is_quantised(parameter)), None)


def dequantised(module: Any) -> Tensor | None:
    """The weight `[out, in]` of a linear module in floating point, None where its form is not known here."""
    try:
        weight = dequantize_module_weight(module)
    except (AttributeError, TypeError, ValueError):  # no weight
        return None
    return None if is_quantised(weight) else weight
