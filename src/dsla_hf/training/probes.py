"""Questions about a long text that attention far back answers: what heads are ranked on, beside text.

Three families, none of which shares a template or a kind of value with the tasks of `evaluation.long_context` (numbers and codes):

| family | the text says | it is asked for |
|---|---|---|
| `words` | the three words that open a gate, once | these words |
| `lockers` | what lies in each of several lockers | one of them, by its letter |
| `moved` | who moved from one town to another | where someone lives now, in other words than the text's |
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WORDS = """
apple anchor basket button candle carpet cherry copper curtain daisy dragon engine fiddle finger forest garlic ginger
hammer helmet honey island jacket kettle ladder lemon maple marble mirror needle orange paper pepper pillow pocket
rabbit ribbon saddle sponge spider stone sugar table ticket tiger tunnel vinegar violin walnut window whistle
""".split()  # noqa: SIM905 (words in a row)
NAMES = """
Alma Boris Clara Dario Edith Felix Greta Hugo Irene Jonas Karin Leon Marta Nils Olga Peter Rosa Simon Thea Viktor
""".split()  # noqa: SIM905 (words in a row)
TOWNS = """
Bergen Cadiz Dover Essen Faro Ghent Hobart Izmir Jena Kiel Lucca Mainz Nancy Odense Parma Reims Sofia Trier Udine Varna
""".split()  # noqa: SIM905 (words in a row)
LOCKERS = 6

Parts = tuple[list[str], str, str]  # what is hidden, the question, and the answer, which begins with a space


def _words(rng: random.Random) -> Parts:
    gate, three = rng.choice(NAMES), " ".join(rng.sample(WORDS, 3))
    return [f"\nWhoever wants to pass {gate}'s gate has to say: {three}.\n"], f"\nAt {gate}'s gate one has to say:", f" {three}"


def _lockers(rng: random.Random) -> Parts:
    letters, things = rng.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", LOCKERS), rng.sample(WORDS, LOCKERS)
    asked = rng.randrange(LOCKERS)
    facts = [f"\nIn locker {letter} there is the {thing}.\n" for letter, thing in zip(letters, things, strict=True)]
    return facts, f"\nSomeone opens locker {letters[asked]} and finds the", f" {things[asked]}"


def _moved(rng: random.Random) -> Parts:
    who, other = rng.sample(NAMES, 2)
    before, after, elsewhere = rng.sample(TOWNS, 3)
    facts = [f"\nLast spring {who} left {before} and settled in {after}.\n", f"\n{other} went on holiday to {elsewhere}.\n"]
    return facts, f"\nLetters to {who} are now sent to the town of", f" {after}"


FAMILIES: dict[str, Callable[[random.Random], Parts]] = {"words": _words, "lockers": _lockers, "moved": _moved}


class NoRoom(ValueError):
    """A probe is too short for what it asks."""


def make_probes(
    tokenizer: Any,
    text: Sequence[int],
    longest: int,
    count: int,
    *,
    shortest: int = 512,
    seed: int = 0,
    families: Sequence[str] | None = None,
) -> list[dict[str, Tensor]]:
    """`count` probes of all families in turn, as inputs of a model: `input_ids` `[1, T]`, and `answer_mask` `[1, T]`, True at the answer.

    Lengths T are spread evenly, by their logarithm, from `shortest` to `longest`; each is exact, and that of one probe of every family, so
    that they can be read together. Facts lie anywhere in the text.

    Args:
        tokenizer: of the model.
        text: token ids in which facts are hidden; not text that is used for evaluation.
        longest, shortest: tokens of a probe, question and answer included.
        seed: the same one gives the same probes.
        families: some of `FAMILIES`; None: all.

    Raises:
        ValueError: for an unknown family, or a text with fewer tokens than `longest`; `NoRoom` for probes too short for what they ask.
    """
    names = list(FAMILIES) if families is None else list(families)
    if unknown := sorted(set(names) - FAMILIES.keys()):
        raise ValueError(f"unknown families of probes {unknown}: choose from {list(FAMILIES)}")
    shortest = min(shortest, longest)
    if len(text) < longest:
        raise ValueError(f"the text has {len(text):,} tokens, fewer than the longest probe, {longest:,}: give a longer text")
    rng = random.Random(seed)
    probes, lengths = [], math.ceil(count / len(names))
    for number in range(count):
        share = (number // len(names)) / (lengths - 1) if lengths > 1 else 1.0
        length = round(math.exp((1 - share) * math.log(shortest) + share * math.log(longest)))
        probes.append(_probe(tokenizer, text, length, FAMILIES[names[number % len(names)]](rng), rng))
    return probes


def check_fits_context(model: str, config: Any, longest: int) -> None:
    """Raises ValueError if probes are longer than the context that a model of this config was made for."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and longest > context:
        raise ValueError(
            f"probes of {longest} tokens are longer than the context of {model}, {context} tokens: give a smaller probe length"
        )


def _probe(tokenizer: Any, text: Sequence[int], length: int, parts: Parts, rng: random.Random) -> dict[str, Tensor]:
    def encode(piece: str) -> list[int]:
        return tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]

    facts, question, answer = [encode(fact) for fact in parts[0]], encode(parts[1]), encode(parts[1] + parts[2])
    answer_tokens = len(answer) - len(question)
    room = length - sum(map(len, facts)) - len(answer)
    if room < 0:
        raise NoRoom(f"probes of {length} tokens have no room for {length - room} tokens of facts and question: give a longer `shortest`")
    start = rng.randrange(len(text) - room + 1)
    places = sorted(rng.randrange(room + 1) for _ in facts)
    rng.shuffle(facts)
    ids: list[int] = []
    for fact, begin, end in zip([*facts, []], [0, *places], [*places, room], strict=True):
        ids += [*text[start + begin : start + end], *fact]
    ids = torch.tensor([[*ids, *answer]])  # type: ignore[assignment]
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[:, length - answer_tokens :] = True
    return {"input_ids": ids, "answer_mask": mask}  # type: ignore[dict-item]
