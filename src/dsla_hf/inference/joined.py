"""Weights of linear layers that read the same x, one behind the other in memory: a product of all of them is then one.

Above the few rows that have kernels of their own, a step multiplies by cuBLAS, where every product has a beginning and an end that leave
processors idle: queries, keys and values in one, and gate and up in one, spare three of seven a layer. Modules and parameters stay what
they are: their parameters become views of one tensor. Whoever moves one away gets separate products again, for places are looked at anew.
In a state dict each has a storage of its own, over the same memory: those who write files take tensors of one storage for tied weights, and
leave all but the first out (accelerate) or refuse them (`safetensors.torch.save_model`).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.attributes import children_of
from .batching import out_of_memory
from .parts import is_plain

logger = logging.getLogger(__name__)

# Of modules by the names of their children: those that read the same x.
GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_told_apart: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # layers whose tensors are, in state dicts


@torch.no_grad()
def join_weights(model: nn.Module) -> int:
    """Lay the weights and biases of each group of a model's linear layers one behind the other, and tell how many groups that was.

    Layers that are not plain, share their memory with others, or differ in dtype, device or width of x stay as they are, and so does what
    finds no memory: beside the model there must be room for one group. What holds addresses of weights, as recordings do, must come later.
    """
    joined = 0
    for module in model.modules():
        children = children_of(module)
        for names in GROUPS:
            layers: list[Any] = [children.get(name) for name in names]
            if not (all(is_plain(layer) for layer in layers) and _alike([x.weight for x in layers])):
                continue
            for layer in layers:
                if layer not in _told_apart:
                    _told_apart.add(layer)
                    layer.register_state_dict_post_hook(_tell_apart)
            try:
                _join([x.weight for x in layers])
                if all(x.bias is not None for x in layers) and _alike([x.bias for x in layers]):
                    _join([x.bias for x in layers])
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                logger.warning("memory does not suffice to lay weights beside each other: steps of many rows have more products")
                return joined
            joined += 1
    return joined


def whole_of(tensors: Sequence[Tensor]) -> Tensor | None:
    """One tensor of the rows of all these, `[sum of N, ...]`, where they lie one behind the other; else None. It has no gradient."""
    first = tensors[0]
    if not all(map(_behind, tensors, tensors[1:])):
        return None
    rows = sum(len(x) for x in tensors)
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())


def _behind(first: Tensor, second: Tensor) -> bool:
    """Whether the second tensor begins where the first ends, and is of its kind."""
    return (
        first.is_contiguous()
        and second.is_contiguous()
        and (first.dtype, first.device, first.shape[1:]) == (second.dtype, second.device, second.shape[1:])
        and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.storage_offset() + first.numel() == second.storage_offset()
    )


def _alike(parameters: list[Any]) -> bool:
    """Whether these can lie in one tensor, and each has its memory to itself."""
    return all(
        first.dtype == second.dtype and first.device == second.device and first.shape[1:] == second.shape[1:]
        for first, second in pairwise(parameters)
    ) and all(
        not x.is_meta and not x.is_inference() and x.is_contiguous() and x.untyped_storage().nbytes() == x.numel() * x.element_size()
        for x in parameters
    )


def _tell_apart(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]) -> None:
    """A hook of state dicts: the layer's tensors, where they are parts of a storage, get one of their own that is this part."""
    for name in ("weight", "bias"):
        x = state_dict.get(prefix + name)
        if type(x) is not Tensor or x.is_meta or not x.is_contiguous() or x.untyped_storage().nbytes() == x.nbytes:
            continue
        start = x.storage_offset() * x.element_size()
        part = x.untyped_storage()[start : start + x.nbytes]
        state_dict[prefix + name] = x.new_empty(0).set_(part, 0, x.shape, x.stride())


def _join(parameters: list[Any]) -> None:
    pieces = torch.cat([x.data for x in parameters]).split([len(x) for x in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.data = piece
    if parameters[0].is_cuda:
        torch.cuda.empty_cache()  # what they had, in pieces that the next group cannot use
