"""Which heads of a hybrid a rank of tensor parallelism has, and which part of the weights that are DSLA's own.

vLLM gives each rank as many KV heads one behind the other, with the query heads that read them. Of a layer converted by heads ranks may
convert different numbers; vLLM wants the same caches on all of them, which therefore have room for the most that any rank has.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.heads import PER_KV_HEAD, HeadIndices
from .pages import converted_heads

DSLA_WEIGHT = re.compile(r"layers\.(\d+)\.self_attn\.dsla\.(\w+)$")


class RankHeads(NamedTuple):
    """KV heads of a layer that has converted ones, on one rank.

    converted, kept: by their numbers on this rank.
    before: how many of the layer's converted heads are on earlier ranks.
    most_converted, most_kept: of all ranks, the largest numbers.
    """

    converted: tuple[int, ...]
    kept: tuple[int, ...]
    before: int
    most_converted: int
    most_kept: int


def rank_heads(converted: tuple[int, ...], kv_heads: int, ranks: int, rank: int) -> RankHeads:
    """The heads of a layer that `rank` of so many `ranks` has.

    Args:
        converted: the layer's converted KV heads, in the order that their weights have in checkpoints: by number.
        kv_heads: of the whole layer, a multiple of `ranks`.
        ranks: vLLM's `tensor_parallel_size`.
        rank: from 0.
    """
    each = kv_heads // ranks
    found = [tuple(head % each for head in converted if head // each == place) for place in range(ranks)]
    counts = [len(heads) for heads in found]
    kept = tuple(head for head in range(each) if head not in found[rank])
    return RankHeads(found[rank], kept, sum(counts[:rank]), max(counts), each - min(counts))


def heads_by_layer(config: Any, ranks: int, rank: int = 0) -> dict[int, RankHeads]:
    """Those of each layer that has converted ones, of a hybrid with this `DSLAHybridConfig`; the others as in `rank_heads`."""
    kv_heads = config.num_key_value_heads
    return {layer: rank_heads(converted, kv_heads, ranks, rank) for layer, converted in converted_heads(config).items()}


def indices(heads: RankHeads, queries: int) -> HeadIndices:
    """Which heads of a rank go where: `kept` is filled up to the most of any rank, with repeats of head 0 whose outputs `order` leaves out.

    Args:
        heads: of the rank.
        queries: query heads that read a KV head.
    """
    filled = heads.kept + (0,) * (heads.most_kept - len(heads.kept))
    converted, kept = ([head * queries + i for head in some for i in range(queries)] for some in (heads.converted, filled))
    real = converted + kept[: len(heads.kept) * queries]
    order = sorted(range(len(real)), key=real.__getitem__)
    kv_heads = (torch.tensor(some, dtype=torch.int32) for some in (heads.converted, filled))
    return HeadIndices(*kv_heads, *(torch.tensor(some) for some in (converted, kept, order)))


def own_part(name: str, weight: Tensor, heads: dict[int, RankHeads], queries: int) -> Tensor | None:
    """What a rank has of a checkpoint's weight: all of what is not DSLA's own, which vLLM cuts itself, or None of a layer of whose
    converted heads the rank has none.

    Args:
        name: in the checkpoint, e.g. "model.layers.3.self_attn.dsla.gate_down".
        weight: with heads in front if it is DSLA's own: those for KV heads `[converted, ...]`, others `[converted * queries, ...]`.
        heads: of this rank, by layer.
        queries: query heads that read a KV head.
    """
    if not (found := DSLA_WEIGHT.search(name)):
        return weight
    here = heads[int(found[1])]
    each = 1 if found[2].startswith(PER_KV_HEAD) else queries
    return weight.narrow(0, here.before * each, len(here.converted) * each) if here.converted else None
