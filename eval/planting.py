"""Training text with facts in it that are asked for later, and needles to measure with: those of `dsla_hf.evaluation.long_context`."""

from __future__ import annotations

import random
from typing import Any

import torch

from dsla_hf.evaluation.long_context import FACT, NAMES, QUESTION, Prompt, Writer, needle_prompt


def make_needles(tokenizer: Any, haystack: list[int], length: int, count: int, seed: int) -> list[Prompt]:
    """`count` needles of `length` tokens each, depths spread evenly over the text; deterministic by seed."""
    writer, rng = Writer(tokenizer), random.Random(seed)
    return [needle_prompt(writer, haystack, length, (i + rng.random()) / count, rng) for i in range(count)]


def plant_recall(blocks: torch.Tensor, tokenizer: Any, share: float, seed: int) -> torch.Tensor:
    """Blocks `[N, T]` of which a share carries a fact and, at the end, the question with its answer."""
    blocks, writer, rng = blocks.clone(), Writer(tokenizer), random.Random(seed)
    for row in rng.sample(range(len(blocks)), int(share * len(blocks))):
        needle = needle_prompt(writer, blocks[row].tolist(), blocks.shape[1] - 8, rng.random(), rng)
        tokens = [*needle.input_ids, *writer.encode(f" {needle.answer}")]
        blocks[row, : len(tokens)] = torch.tensor(tokens, dtype=blocks.dtype)
    return blocks


def plant_facts(blocks: torch.Tensor, tokenizer: Any, share: float, seed: int, facts: int = 8) -> torch.Tensor:
    """Blocks `[N, T]` of which a share carries several facts, and each of them asked for and answered at some place after it."""
    blocks, writer, rng = blocks.clone(), Writer(tokenizer), random.Random(seed)
    for row in rng.sample(range(len(blocks)), int(share * len(blocks))):
        inserted = []
        for name in rng.sample(NAMES, facts):
            number = str(rng.randint(10000, 99999))
            fact, question = sorted(rng.random() for _ in range(2))
            inserted.append((fact, writer.encode(FACT.format(name=name, number=number))))
            inserted.append((question, writer.encode(QUESTION.format(name=name) + f" {number}\n\n")))
        room = blocks.shape[1] - sum(len(tokens) for _, tokens in inserted)
        text, parts, begin = blocks[row].tolist(), [], 0
        for place, tokens in sorted(inserted):
            parts += [*text[begin : int(place * room)], *tokens]
            begin = int(place * room)
        blocks[row] = torch.tensor([*parts, *text[begin:room]], dtype=blocks.dtype)
    return blocks
