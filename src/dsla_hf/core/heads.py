"""A layer of which some KV heads are DSLA and the others are softmax attention: which are which, and how their outputs are put together."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..compat.attributes import view_of

if TYPE_CHECKING:
    from .attention import DualStateAttention

# What the names of parameters begin with of which each KV head has its own; all others are of query heads.
PER_KV_HEAD = ("gate_", "write_")


class HeadIndices(NamedTuple):
    """int64 tensors on one device: KV heads (int32, as kernels read them) and query heads of both kinds, and `order`, which puts the query
    heads of converted and then kept KV heads back in the base's order."""

    converted: Tensor
    kept: Tensor
    converted_queries: Tensor
    kept_queries: Tensor
    order: Tensor


class HeadSplit:
    """Which KV heads of a layer are converted, with the query heads that read them. At least one is, and at least one is kept. Layers share
    it (`split_of`): it does not change.

    Args:
        order: all KV heads in the order of their conversion, which both kinds then follow; where the converted ones are not its first, and
            without it, they go by number.

    Attributes:
        converted, kept: KV heads.
        num_kv_heads, queries: KV heads of the layer, and query heads of each.

    Raises:
        ValueError: for heads that are not there, all of them, or none.
    """

    def __init__(self, converted: Iterable[int], num_kv_heads: int, queries: int, order: Sequence[int] = ()):
        self.converted, self.num_kv_heads, self.queries = tuple(sorted(set(converted))), num_kv_heads, queries
        if not self.converted or not set(self.converted) < set(range(num_kv_heads)):
            raise ValueError(f"a layer converted in part has some of its {num_kv_heads} KV heads converted, not {list(self.converted)}")
        self.kept = tuple(head for head in range(num_kv_heads) if head not in self.converted)
        count = len(self.converted)
        if set(order[:count]) == set(self.converted):
            self.converted, self.kept = tuple(order[:count]), tuple(order[count:])
        self._indices: dict[torch.device, HeadIndices] = {}
        self._channels: dict[tuple[torch.device, int], Tensor] = {}

    def on(self, device: torch.device) -> HeadIndices:
        """The heads as tensors on a device, made once for each."""
        if device not in self._indices:
            converted, kept = (self.query_heads(heads) for heads in (self.converted, self.kept))
            both = converted + kept
            order = sorted(range(len(both)), key=both.__getitem__)
            with torch.inference_mode(False):  # training may use them later
                kv_heads = [torch.tensor(heads, device=device, dtype=torch.int32) for heads in (self.converted, self.kept)]
                self._indices[device] = HeadIndices(*kv_heads, *(torch.tensor(x, device=device) for x in (converted, kept, order)))
        return self._indices[device]

    def query_heads(self, heads: Iterable[int]) -> list[int]:
        """The query heads that read these KV heads."""
        return [head * self.queries + i for head in heads for i in range(self.queries)]

    def channels(self, head_dim: int, queries: bool, device: torch.device) -> Tensor:
        """bool `[heads * head_dim]`, True where a channel of all query heads (or KV heads) is one of a converted head."""
        each = (self.queries if queries else 1) * head_dim
        if (device, each) not in self._channels:
            with torch.inference_mode(False):
                heads = torch.tensor([head in self.converted for head in range(self.num_kv_heads)])
                self._channels[device, each] = heads.repeat_interleave(each).to(device)
        return self._channels[device, each]

    def joined(self, converted: Tensor, kept: Tensor) -> Tensor:
        """Outputs `[B, T, heads, D]` of both kinds of query heads in the base's order `[B, T, Hq, D]`."""
        return torch.cat([converted, kept], 2).index_select(2, self.on(converted.device).order)


@functools.lru_cache(maxsize=4096)
def split_of(converted: tuple[int, ...], num_kv_heads: int, queries: int, order: tuple[int, ...] = ()) -> HeadSplit:
    """The `HeadSplit` of these: one for all layers and levels, so that another level in training makes no tensors anew."""
    return HeadSplit(converted, num_kv_heads, queries, order)


def of_heads(attention: DualStateAttention, heads: Iterable[int]) -> DualStateAttention:
    """These KV heads of a layer and the query heads that read them, as a layer of its own that reads the other's parameters as they are
    now: gradients flow back, later changes are not seen. The layer itself where it has no others."""
    heads = tuple(heads)
    if len(heads) == attention.num_kv_heads:
        return attention
    queries = attention.num_heads // attention.num_kv_heads
    device = next((x.device for x in attention.parameters()), None)
    kv_heads = torch.tensor(heads, device=device)
    query_heads = (kv_heads[:, None] * queries + torch.arange(queries, device=kv_heads.device)).flatten()
    parameters = {
        name: x.index_select(0, kv_heads if name.startswith(PER_KV_HEAD) else query_heads) for name, x in attention.named_parameters()
    }
    part = view_of(attention, type(attention), {}, parameters)
    part.num_heads, part.num_kv_heads = len(query_heads), len(kv_heads)
    return part


def head_map(converted: Collection[tuple[int, int]], layers: int, heads: int, others: Collection[int] = ()) -> str:
    """The KV heads of all layers as text, a line for each head and a column for each layer: `#` is kept, `.` is one of the `converted`
    (layer, KV head), `-` stands for layers without any that could be (`others`, by number)."""
    left = len(f"KV head {heads - 1}")
    lines = ["layer".ljust(left) + "  " + "".join(f"{layer:<10}" for layer in range(0, layers, 10)).rstrip()]
    there = set(converted)
    for head in range(heads):
        marks = ("." if (layer, head) in there else "-" if layer in others else "#" for layer in range(layers))
        lines.append(f"KV head {head}".ljust(left) + "  " + "".join(marks))
    return "\n".join(lines)
