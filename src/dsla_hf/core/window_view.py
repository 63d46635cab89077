"""Keys and values of a softmax layer, read as if some of its heads, or all, were converted to a window alone.

Where a draft converts such heads, it needs no window of its own: what the window would hold lies in the cache of the level that checks, and
guesses lie behind it until the check writes over them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsla_kernels import softmax_decode

from .attention import DualStateAttention
from .cache import VisibleStaticLayer
from .heads import HeadSplit


class WindowView(VisibleStaticLayer):
    """A layer of a cache over the memory of another, whose converted heads see their window and sinks.

    Args:
        memory: keys and values of all heads, in the base's order, which both layers write to; its count is that of both.
        attention: of the converted heads, a window alone.
        split: which heads are converted; None: all.
        ordered: whether queries come, and outputs go, in the order of `split`, kept ones first.
        lengths: int64 `[B]`, tokens in the memory with the new one when `attend` is called.
    """

    def __init__(
        self, memory: VisibleStaticLayer, attention: DualStateAttention, split: HeadSplit | None, ordered: bool, lengths: Tensor
    ) -> None:
        self.__dict__.update(vars(memory))  # keys, values and their count
        self.attention, self.split, self.ordered, self.lengths = attention, split, ordered, lengths
        self.heads: Tensor | None = None
        self.queries: Tensor | None = None  # kept ones first, as `heads` are
        if split is not None:
            index = split.on(memory.keys.device)
            self.heads = torch.cat([index.kept, index.converted])
            self.queries = torch.cat([index.kept_queries, index.converted_queries])

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, **kwargs: Any) -> Tensor:
        """o `[B, 1, Hq, V]` of queries `[B, Hq, 1, K]`, over what `update` returned. kwargs: as of attention functions in transformers."""
        split, sinks = self.split, kwargs.get("s_aux")
        if self.queries is not None:
            query = query if self.ordered else query.index_select(1, self.queries)
            sinks = None if sinks is None else sinks[self.queries]
        o = softmax_decode(
            query.transpose(1, 2),
            keys,
            values,
            self.lengths,
            scale=self.attention.scale,
            softcap=kwargs.get("softcap"),
            sink_logits=sinks,
            window=self.attention.window_size,
            sink_tokens=self.attention.sink_tokens,
            whole_heads=0 if split is None else len(split.kept),
            heads=self.heads,
        )
        if split is None or self.ordered:
            return o
        kept, converted = o.split([len(split.kept) * split.queries, len(split.converted) * split.queries], 2)
        return split.joined(converted, kept)


def window_view(cache: Any, layer_idx: int) -> WindowView | None:
    """The layer of a cache if it is such a view."""
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    return layer if isinstance(layer, WindowView) else None
