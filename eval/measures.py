"""What the recipes are judged by: loss by token, position and document, loss on far bigrams, associative recall, interventions on
the states. All deterministic; every text is held out."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from dsla_hf.data import read_texts

# Sixteen stacked windows of 64 tokens reach 16 * 63 + 1 tokens back: nothing farther can come through windows alone.
WINDOW_REACH = 1009


def held_out_blocks(path: Path, tokenizer: Any, length: int, count: int) -> tuple[Tensor, list[int]]:
    """Up to `count` blocks `[N, length]`, none of them across two documents, taken evenly from the documents that are long
    enough; and the number of the document of each."""
    documents = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in read_texts(path)]
    long = [(i, ids) for i, ids in enumerate(documents) if len(ids) >= length]
    blocks, numbers = [], []
    for part in range(max((len(ids) // length for _, ids in long), default=0)):
        for i, ids in long:
            if len(blocks) < count and len(ids) >= (part + 1) * length:
                blocks.append(ids[part * length : (part + 1) * length])
                numbers.append(i)
    if not blocks:
        raise ValueError(f"{path} holds no document of {length} tokens")
    return torch.tensor(blocks), numbers


@torch.no_grad()
def token_losses(model: Any, blocks: Tensor, batch_size: int = 16) -> Tensor:
    """Cross-entropy in nats of tokens 1 to T - 1 of each block, `[N, T - 1]`, on the CPU."""
    losses = []
    for batch in blocks.split(batch_size):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1]
        losses += [F.cross_entropy(x.float(), y, reduction="none").cpu() for x, y in zip(logits, batch[:, 1:], strict=True)]
    return torch.stack(losses)


def far_bigrams(blocks: Tensor, farther_than: int = WINDOW_REACH) -> Tensor:
    """Where the pair (token before, token) was last seen more than `farther_than` tokens back: bool `[N, T - 1]`, in the
    places of `token_losses`. The text has said it, and no window can know."""
    far = torch.zeros(blocks.shape[0], blocks.shape[1] - 1, dtype=torch.bool)
    for n, row in enumerate(blocks.tolist()):
        last: dict[tuple[int, int], int] = {}
        for t in range(1, len(row)):
            bigram = (row[t - 1], row[t])
            far[n, t - 1] = t - last.get(bigram, t) > farther_than
            last[bigram] = t
    return far


def associative_recall(words: list[int], filler: Tensor, pairs: int, count: int, seed: int, queries: int = 32) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (Zoology, arXiv 2312.04927) with real text between pairs and questions.

    Each row: `pairs` pairs of a key and a value token, the filler, then some of the keys again, each with its value.

    Args:
        words: ids of tokens to draw keys and values from.
        filler: `[M, F]` text; one row each, in turn.
        pairs, count, queries: how many pairs, rows, and questions per row (at most `pairs`).

    Returns:
        ids `[count, 2 * pairs + F + 2 * queries]`, and bool `[count, T - 1]`, where `token_losses` has the answers.
    """
    rng, rows = random.Random(seed), []
    queries = min(queries, pairs)
    for n in range(count):
        chosen = rng.sample(words, 2 * pairs)
        table = list(zip(chosen[:pairs], chosen[pairs:], strict=True))
        asked = rng.sample(table, queries)
        rows.append([*sum(table, ()), *filler[n % len(filler)].tolist(), *sum(asked, ())])
    ids = torch.tensor(rows)
    answers = torch.zeros(count, ids.shape[1] - 1, dtype=torch.bool)
    answers[:, -2 * queries :: 2] = True
    return ids, answers


@torch.no_grad()
def accuracy(model: Any, ids: Tensor, where: Tensor, batch_size: int = 16) -> float:
    """Share of the marked tokens that the model puts first, given all before them."""
    right = 0
    for batch, mask in zip(ids.split(batch_size), where.split(batch_size), strict=True):
        batch = batch.to(model.device)
        best = model(input_ids=batch, use_cache=False).logits[:, :-1].argmax(-1)
        right += int((best == batch[:, 1:])[mask.to(model.device)].sum())
    return right / int(where.sum())


INTERVENTIONS = ("none", "no history", "no recency", "no states", "another document's states")


@torch.no_grad()
def intervened_losses(model: Any, blocks: Tensor, scored: int, intervention: str, batch_size: int = 16) -> Tensor:
    """Losses `[N, scored - 1]` of the end of each block, read after the states of all DSLA layers were changed."""
    losses = []
    for batch in blocks.split(batch_size):
        batch = batch.to(model.device)
        cache = DynamicCache(config=model.config)
        model(input_ids=batch[:, :-scored], past_key_values=cache, logits_to_keep=1)
        for layer in cache.layers:
            state = getattr(layer, "state", None)
            if state is None:
                continue
            if intervention == "another document's states":
                state.recurrent.copy_(state.recurrent.roll(1, 0))
            elif intervention != "none":
                state.recurrent[:, :, {"no history": slice(0, 1), "no recency": slice(1, 2), "no states": slice(0, 2)}[intervention]] = 0
        logits = model(input_ids=batch[:, -scored:], past_key_values=cache).logits[:, :-1]
        losses += [F.cross_entropy(x.float(), y, reduction="none").cpu() for x, y in zip(logits, batch[:, 1 - scored :], strict=True)]
    return torch.stack(losses)
