"""Projections of a layer converted in part: the base's for heads that it keeps, DSLA's own for converted ones.

Where `ordered_heads` does not hold: the two are composed into one matrix, which is kept until a weight changes in place or is exchanged
(a change through `.data` is not seen); a trained one is composed in every forward, so that gradients reach the rows and columns in use
alone. A base whose weights cannot be read as they are (quantised, offloaded, hooked) computes by itself, and outputs are selected.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat import align_module_device
from ..compat.attributes import has_hooks, is_offloaded, versions_of
from ..core.heads import HeadSplit
from .quantised import is_quantised


def is_readable(base: Any, sources: list[Any]) -> bool:
    """Whether the weights of a base's linear layer can be read as they are, and all of `sources` are at hand."""
    plain = type(base) is nn.Linear and type(base.weight) is nn.Parameter and not is_quantised(base.weight) and not has_hooks(base)
    return plain and not any(module.weight.is_meta or is_offloaded(module) for module in sources)


class MixedProjection(nn.Module):
    """What both kinds share: how the composed matrix is made and kept."""

    base: nn.Linear

    def __init__(self) -> None:
        super().__init__()
        self._kept: tuple[Any, tuple[Tensor, Tensor | None]] | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self._readable():
            return self.selected(input)
        return F.linear(input, *self.weights())

    def weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of one linear layer that does the same."""
        sources = [x for module in self.sources() for x in (module.weight, module.bias) if x is not None]
        if torch.compiler.is_compiling() or any(x.requires_grad for x in sources):
            return self.composed()
        key = versions_of(sources)
        if self._kept is None or self._kept[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may be read by a pass with gradients later
                self._kept = key, self.composed()
        return self._kept[1]

    def merged(self) -> nn.Linear:
        """One linear layer that does the same, with weights of its own."""
        plain: Any = nn.Linear(self.base.in_features, self.base.out_features, bias=self.base.bias is not None, device="meta")
        with torch.no_grad(), ExitStack() as weights_at_hand:
            for module in self.sources():
                weights_at_hand.enter_context(align_module_device(module))
            weight, bias = self.composed()
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        return plain

    def linears_read(self) -> list[Any]:
        """Linear layers whose weights are as many as a forward reads where nothing is trained: the composed matrix has the base's size."""
        return [self.base] if self._readable() else self.sources()

    def sources(self) -> list[Any]:
        """The linear layers that are mixed."""
        raise NotImplementedError

    def composed(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias, made anew."""
        raise NotImplementedError

    def selected(self, input: Tensor) -> Tensor:
        """The output, each layer computing by itself."""
        raise NotImplementedError

    def _readable(self) -> bool:
        return is_readable(self.base, self.sources())


class MixedRows(MixedProjection):
    """A projection to queries, keys or values, or a base's fused one.

    base: the base's, whose rows are those of `parts`, as many of each as `sizes` says. own: DSLA's own of some of them.
    split: the heads whose rows are DSLA's own. head_dim: rows of each key or value head. query_rows: of each query head.
    """

    def __init__(
        self,
        base: nn.Linear,
        parts: tuple[str, ...],
        sizes: list[int],
        own: dict[str, Any],
        split: HeadSplit,
        head_dim: int,
        query_rows: int,
    ):
        super().__init__()
        self.base, self.parts, self.sizes, self.own, self.split = base, parts, sizes, nn.ModuleDict(own), split
        self.head_dim, self.query_rows = head_dim, query_rows

    def sources(self) -> list[Any]:
        return [self.base, *self.own.values()]

    def composed(self) -> tuple[Tensor, Tensor | None]:
        weights, biases = ({part: getattr(own, name) for part, own in self.own.items()} for name in ("weight", "bias"))
        bias = None if self.base.bias is None else self._mixed(self.base.bias, biases, 0)
        return self._mixed(self.base.weight, weights, 0), bias

    def selected(self, input: Tensor) -> Tensor:
        return self._mixed(self.base(input), {part: own(input) for part, own in self.own.items()}, -1)

    def _mixed(self, base: Tensor, own: dict[str, Any], dim: int) -> Tensor:
        """Of base and own, whose `dim` (0 or -1) goes over rows, the rows in use."""
        pieces = []
        for part, piece in zip(self.parts, base.split(self.sizes, dim), strict=True):
            if part in own:
                queries = part == "q_proj"
                mask = self.split.channels(self.query_rows if queries else self.head_dim, queries, piece.device)
                piece = torch.where(mask[:, None] if dim == 0 and piece.ndim == 2 else mask, own[part].to(piece.dtype), piece)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


class MixedColumns(MixedProjection):
    """The output projection. Its bias is the base's as long as a head is kept: it belongs to no head.

    split, head_dim: as in `MixedRows`, of columns.
    """

    def __init__(self, base: nn.Linear, own: Any, split: HeadSplit, head_dim: int):
        super().__init__()
        self.base, self.own, self.split, self.head_dim = base, own, split, head_dim

    def sources(self) -> list[Any]:
        return [self.base, self.own]

    def composed(self) -> tuple[Tensor, Tensor | None]:
        base = self.base.weight
        return torch.where(self._converted(base.device), self.own.weight.to(base.dtype), base), self.base.bias

    def selected(self, input: Tensor) -> Tensor:
        mask = self._converted(input.device)
        kept, converted = input.masked_fill(mask, 0), input.masked_fill(~mask, 0)
        with align_module_device(self.own):  # its bias takes no part, so its forward is not called
            return self.base(kept) + F.linear(converted, self.own.weight.to(input.dtype))

    def _converted(self, device: torch.device) -> Tensor:
        return self.split.channels(self.head_dim, True, device)
