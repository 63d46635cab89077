"""Needle in a haystack: a five-digit number hidden in a long text, asked for at its end, answered by `generate`."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from tqdm.auto import tqdm

FACT = "\n\nThe special number for {name} is {number}. Remember it.\n\n"
QUESTION = "\n\nWhat is the special number for {name}? The special number for {name} is"
FIRST = ("silver", "golden", "quiet", "amber", "crimson", "hollow", "northern", "velvet", "broken", "distant")
SECOND = ("winter", "river", "garden", "castle", "lantern", "harbour", "meadow", "compass", "feather", "bridge")


@dataclass(frozen=True)
class Needle:
    """input_ids: haystack with the fact and the question, exactly as long as asked for. answer: ids of the number."""

    input_ids: list[int]
    answer: list[int]
    depth: float


def make_needles(tokenizer: Any, haystack: list[int], length: int, count: int, seed: int) -> list[Needle]:
    """`count` needles of `length` tokens each, depths spread evenly over the text; deterministic by seed."""
    rng = random.Random(seed)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    needles = []
    for i in range(count):
        name, number = f"{rng.choice(FIRST)}-{rng.choice(SECOND)}", str(rng.randint(10000, 99999))
        fact, question = encode(FACT.format(name=name, number=number)), encode(QUESTION.format(name=name))
        answer = encode(QUESTION.format(name=name) + f" {number}")[len(question) :]
        room = length - len(fact) - len(question)
        start = rng.randrange(len(haystack) - room)
        text = haystack[start : start + room]
        depth = (i + rng.random()) / count
        cut = int(depth * room)
        needles.append(Needle([*text[:cut], *fact, *text[cut:], *question], answer, depth))
    return needles


@torch.no_grad()
def needle_accuracy(model: Any, needles: list[Needle], batch_size: int = 25) -> float:
    """Share of needles whose number `generate` gives exactly, greedily and through the cache."""
    right = 0
    for first in tqdm(range(0, len(needles), batch_size), desc="needle"):
        batch = needles[first : first + batch_size]
        ids = torch.tensor([needle.input_ids for needle in batch], device=model.device)
        new = max(len(needle.answer) for needle in batch)
        mask = torch.ones_like(ids)
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)[:, ids.shape[1] :]
        right += sum(row[: len(needle.answer)] == needle.answer for row, needle in zip(out.tolist(), batch, strict=True))
    return right / len(needles)


def plant_recall(blocks: torch.Tensor, tokenizer: Any, share: float, seed: int) -> torch.Tensor:
    """Blocks `[N, T]` of which a share carries a fact and, at the end, the question with its answer."""
    blocks, rng = blocks.clone(), random.Random(seed)
    for row in rng.sample(range(len(blocks)), int(share * len(blocks))):
        needle = make_needles(tokenizer, blocks[row].tolist(), blocks.shape[1] - 8, 1, rng.randrange(2**32))[0]
        tokens = [*needle.input_ids, *needle.answer]
        blocks[row, : len(tokens)] = torch.tensor(tokens, dtype=blocks.dtype)
    return blocks


def plant_facts(blocks: torch.Tensor, tokenizer: Any, share: float, seed: int, facts: int = 8) -> torch.Tensor:
    """Blocks `[N, T]` of which a share carries several facts, and each of them asked for and answered at some place after it."""
    blocks, rng = blocks.clone(), random.Random(seed)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for row in rng.sample(range(len(blocks)), int(share * len(blocks))):
        inserted = []
        for name in rng.sample([f"{first}-{second}" for first in FIRST for second in SECOND], facts):
            number = str(rng.randint(10000, 99999))
            fact, question = sorted(rng.random() for _ in range(2))
            inserted.append((fact, encode(FACT.format(name=name, number=number))))
            inserted.append((question, encode(QUESTION.format(name=name) + f" {number}\n\n")))
        room = blocks.shape[1] - sum(len(tokens) for _, tokens in inserted)
        text, parts, begin = blocks[row].tolist(), [], 0
        for place, tokens in sorted(inserted):
            parts += [*text[begin : int(place * room)], *tokens]
            begin = int(place * room)
        blocks[row] = torch.tensor([*parts, *text[begin:room]], dtype=blocks.dtype)
    return blocks
