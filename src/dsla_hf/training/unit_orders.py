"""Orders of KV heads to compare with, and an order balanced over tensor-parallel ranks."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .losses import kl_sums
from .ranking import base_logits, head_entropies
from .switches import switched
from .unit_batches import Batch

Unit = tuple[int, int]  # layer, KV head
Scores = dict[Unit, float]


def random_scores(units: Sequence[Unit], seed: int) -> Scores:
    """A number for each unit, the same for the same seed."""
    rng = random.Random(seed)
    return {unit: rng.random() for unit in sorted(units)}


def entropy_scores(model: Any, units: Sequence[Unit], batches: Sequence[Batch], kv_heads: int, tick: Callable[[int], Any]) -> Scores:
    """Entropy in nats of the base's softmax attention at the last token of each row, mean over the query heads of a KV head and over rows,
    as in the DSLA paper (arXiv 2506.09316), which takes the low ones first."""
    layers = sorted({layer for layer, _ in units})
    found = head_entropies(model, [batch.inputs for batch in batches], layers, tick)
    by_unit = {layer: entropies.unflatten(0, (kv_heads, -1)).mean(1).tolist() for layer, entropies in found.items()}
    return {(layer, head): by_unit[layer][head] for layer, head in units}


@torch.no_grad()
def single_scores(
    model: Any, units: Sequence[Unit], batches: Sequence[Batch], kv_heads: int, batch_tokens: int, tick: Callable[[int], Any]
) -> Scores:
    """KL to the base, in nats, with each head converted alone: a pass for every head."""
    scores = dict.fromkeys(units, 0.0)
    layers = {layer: [head for index, head in units if index == layer] for layer, _ in units}
    for batch in batches:
        teacher = base_logits(model, batch.inputs, keep=batch.keep)
        rows = len(batch.weights)
        at_once = max(1, batch_tokens // batch.inputs["input_ids"].numel())
        for layer, heads in layers.items():
            for some in torch.tensor(heads).split(at_once):
                inputs, weights = batch.repeated(len(some))
                alone = torch.eye(kv_heads, device=weights.device)[some.to(weights.device)].repeat_interleave(rows, 0)
                with switched(model, {layer: alone}):
                    logits = model(**inputs).logits
                for head, student in zip(some.tolist(), logits.split(rows), strict=True):
                    scores[layer, head] += kl_sums(student, teacher, batch.weights)[0].item()
                tick(len(some) * rows)
    return scores


def balanced_order(order: Sequence[Unit], ranks: int, kv_heads: int) -> list[Unit]:
    """The order changed as little as this takes: every beginning of it converts as many heads of each rank, or one more.

    A rank has `kv_heads / ranks` KV heads in a row of each layer. What is kept is then as even, and the fullest rank has no more than its
    share. A rank whose heads are all placed is passed over.

    Raises:
        ValueError: if ranks do not divide the KV heads, or a head is not there.
    """
    if ranks < 1 or kv_heads % ranks:
        raise ValueError(f"ranks must divide the {kv_heads} KV heads of a layer, got {ranks}")
    if wrong := [unit for unit in order if not 0 <= unit[1] < kv_heads]:
        raise ValueError(f"each layer has {kv_heads} KV heads, and the order names {wrong[:5]}")
    waiting: list[deque[int]] = [deque() for _ in range(ranks)]  # places in the order
    for place, (_, head) in enumerate(order):
        waiting[head * ranks // kv_heads].append(place)
    placed = [0] * ranks
    balanced: list[Unit] = []
    while len(balanced) < len(order):
        rank = min((rank for rank in range(ranks) if waiting[rank]), key=lambda rank: (placed[rank], waiting[rank][0]))
        balanced.append(order[waiting[rank].popleft()])
        placed[rank] += 1
    return balanced
