"""A layer converted in part where nothing is trained: one buffer of query rows and one of output columns for all levels.

A buffer holds the base's heads and then DSLA's own, both in the order in which the layer's heads are converted. With the first j of H
converted, the heads in use are those from j to j + H: kept ones first, converted ones last. So a level is a view, at an address that stays:
no memory of its own, no copy at a raise, and a recorded step keeps where it reads. A layer that has been run in part takes the memory of
two more `q_proj` and `o_proj`, whatever levels follow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..compat.attributes import versions_of, view_of
from ..core.attention import DualStateAttention
from ..core.heads import PER_KV_HEAD
from .architectures import architecture_of, kv_heads_of, projection, query_rows
from .mixed_projections import is_readable


class HeadsInUse(NamedTuple):
    """What a layer reads at a level, kept heads first: views of buffers.

    q_weight: `[Hq * R, hidden]`, R the rows of a head (see `query_rows`). q_bias: `[Hq * R]` or None. o_weight: `[hidden, Hq * D]`.
    q_norm: `[Hq * D]`, of a norm over the queries of all heads, or None.
    core: what is DSLA's own of the converted heads.
    """

    q_weight: Tensor
    q_bias: Tensor | None
    o_weight: Tensor
    q_norm: Tensor | None
    core: DualStateAttention


def cannot_be_ordered(base: Any, own: dict[str, Any]) -> str | None:
    """Why the projections of a base attention, of which `own` are replaced in converted heads, cannot lie in such buffers, in words; None
    where they can."""
    if not architecture_of(base.config).ordered:
        return f"{type(base).__name__} tells heads apart by their places, beside its projections"
    for name in ("k_proj", "v_proj"):
        if name in own:
            return f"{name} is trained, too (trained_projections)"
    for name in ("q_proj", "o_proj"):
        linear, _ = projection(base, name)
        if not is_readable(linear, [linear, *([own[name]] if name in own else [])]):
            return f"the weights of {name} cannot be read as they are (quantised, offloaded, or with hooks)"
    norm = _norm_of_all_heads(base)
    if norm is not None and norm.weight.shape != (base.config.num_attention_heads * base.head_dim,):
        return f"its norm of queries has a weight of shape {list(norm.weight.shape)}"
    return None


class OrderedHeads:
    """The buffers of one layer.

    base: the base attention. own: DSLA's projections among "q_proj" and "o_proj". core: of all heads. order: all KV heads in the order in
    which they are converted.
    """

    def __init__(self, base: Any, own: dict[str, Any], core: DualStateAttention, order: tuple[int, ...]):
        self._base, self._own, self._core = base, own, core
        self._queries = base.config.num_attention_heads // kv_heads_of(base.config)
        with torch.inference_mode(False):
            self._order = torch.tensor(order, device=projection(base, "q_proj")[0].weight.device)
        self._versions: Any = None
        self._memory: dict[str, Tensor] = {}

    @property
    def trained(self) -> bool:
        """Whether a gradient is to reach a weight."""
        return torch.is_grad_enabled() and any(x.requires_grad for x in self._sources())

    def refresh(self) -> None:
        """Write the buffers anew, where they lie, if a weight was changed in place or exchanged (a change through `.data` is not seen)."""
        versions = versions_of(self._sources())
        if versions == self._versions:
            return
        with torch.inference_mode(False), torch.no_grad():  # a pass with gradients may read them later
            values = self._values()
            for name, value in values.items():
                if name in self._memory:
                    self._memory[name].copy_(value)
                else:
                    self._memory[name] = value
        self._versions = versions

    def at(self, converted: int) -> HeadsInUse:
        """With so many heads converted; what is returned follows every `refresh`."""
        channels, rows = (
            slice(converted * self._queries * each, (converted + len(self._order)) * self._queries * each)
            for each in (self._base.head_dim, query_rows(self._base))
        )
        buffers, core, queries = self._memory, self._core, converted * self._queries
        parameters = {
            name: buffers[f"dsla.{name}"][: converted if name.startswith(PER_KV_HEAD) else queries] for name, _ in core.named_parameters()
        }
        core_part = view_of(core, type(core), {}, parameters)
        core_part.num_heads, core_part.num_kv_heads = queries, converted
        q_bias, q_norm = (
            None if buffers.get(name) is None else buffers[name][part] for name, part in (("q_bias", rows), ("q_norm", channels))
        )
        return HeadsInUse(buffers["q_weight"][rows], q_bias, buffers["o_weight"][:, channels], q_norm, core_part)

    def _sources(self) -> list[Tensor]:
        norm = _norm_of_all_heads(self._base)
        linears = [projection(self._base, name)[0] for name in ("q_proj", "o_proj")]
        modules = [*linears, *self._own.values(), self._core, *([] if norm is None else [norm])]
        return [x for module in modules for x in module.parameters(recurse=False)]

    def _values(self) -> dict[str, Tensor]:
        order = self._order
        queries = (order[:, None] * self._queries + torch.arange(self._queries, device=order.device)).flatten()

        def places(each: int) -> Tensor:
            return (queries[:, None] * each + torch.arange(each, device=order.device)).flatten()

        channels, q_rows = places(self._base.head_dim), places(query_rows(self._base))

        def ordered(base: Tensor, own: Tensor, dim: int = 0, index: Tensor = channels) -> Tensor:
            return torch.cat([x.to(base.dtype).index_select(dim, index) for x in (base, own)], dim)

        (q, rows), (o, _) = (projection(self._base, name) for name in ("q_proj", "o_proj"))
        own_q, own_o = self._own.get("q_proj"), self._own.get("o_proj", o)
        q_weight = q.weight[rows]
        values = {
            "q_weight": ordered(q_weight, q_weight if own_q is None else own_q.weight, index=q_rows),
            "o_weight": ordered(o.weight, own_o.weight, 1),
        }
        if q.bias is not None:
            values["q_bias"] = ordered(q.bias[rows], q.bias[rows] if own_q is None else own_q.bias, index=q_rows)
        if (norm := _norm_of_all_heads(self._base)) is not None:
            values["q_norm"] = ordered(norm.weight, norm.weight)
        for name, x in self._core.named_parameters():
            values[f"dsla.{name}"] = x.index_select(0, order if name.startswith(PER_KV_HEAD) else queries)
        return values


def _norm_of_all_heads(base: Any) -> Any:
    """The norm of an attention that goes over the queries of all heads (OLMo 2), None if there is none."""
    norm = getattr(base, "q_norm", None)
    weight = getattr(norm, "weight", None)
    return None if weight is None or weight.numel() == base.head_dim else norm
