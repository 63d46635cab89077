"""Facts planted in training rows and asked for later: lookups far back, which plain text seldom needs.

The facts are of the families of `probes`, several in a row. How far a question is from its fact is even by its logarithm, if nothing
else is said: each doubling of the distance has as many, up to the whole row, and rows that are cut to shorter pieces keep most pairs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Any

import torch

from .probes import FAMILIES

TOKENS_PER_FACT = 400  # of a row: one fact and its question for so many
NEAREST = 64  # tokens of text between a fact and its question, at least, where there are as many before the question
MOST_PLANTED = 0.5  # share of a row
ANSWER_WEIGHT = 10.0  # that `dsla distill` takes, of tokens that predict an answer


def planted(
    row: Mapping[str, Any], tokenizer: Any, rng: random.Random, answer_weight: float = 1.0, even_share: float = 0.0
) -> dict[str, Any]:
    """A training row (`input_ids` `[T]`, perhaps `loss_mask` `[T]`) of the same length in which facts are told and asked for later; its
    last tokens make room. All planted tokens count for the loss, those that predict an answer `answer_weight` times, for which
    `loss_mask` then has fractions. Distances are even by their logarithm, of an `even_share` of the facts by themselves, so that more lie
    far back. A row too short for a fact stays as it is."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    columns = {name: torch.as_tensor(x) for name, x in row.items()}
    if answer_weight != 1:
        columns["loss_mask"] = _fractions(row)
    length = len(columns["input_ids"])
    told: list[list[list[int]]] = []
    predicting: dict[int, range] = {}  # of a question, by its `id`: places whose next tokens are the answer
    room = length
    for _ in range(max(1, length // TOKENS_PER_FACT)):
        hidden, question, answer = FAMILIES[rng.choice(list(FAMILIES))](rng)
        pieces = [*map(encode, hidden), encode(f"{question}{answer}.\n")]
        predicting[id(pieces[-1])] = range(len(encode(question)) - 1, len(encode(question + answer)) - 1)
        if (left := room - sum(map(len, pieces))) >= (1 - MOST_PLANTED) * length:
            told.append(pieces)
            room = left
    placed: list[tuple[int, bool, list[int]]] = []  # tokens of text before it, whether it is a question, the piece
    for pieces in told:
        asked = rng.randint(room // 10, room)
        nearest = min(NEAREST, asked)
        for fact in pieces[:-1]:
            if even_share and rng.random() < even_share:
                distance = rng.uniform(nearest, asked)
            else:
                distance = math.exp(rng.uniform(math.log(nearest), math.log(asked))) if nearest else 0.0
            placed.append((asked - round(distance), False, fact))
        placed.append((asked, True, pieces[-1]))
    filled: dict[str, list[Any]] = {name: [] for name in columns}
    begin = 0
    for end, _, piece in [*sorted(placed, key=lambda item: item[:2]), (room, True, [])]:
        answers = predicting.get(id(piece), ())
        weights = [answer_weight if place in answers else 1 for place in range(len(piece))]
        for name, x in columns.items():
            filled[name] += x[begin:end].tolist() + (piece if name == "input_ids" else weights)
        begin = end
    return {name: torch.tensor(filled[name], dtype=x.dtype) for name, x in columns.items()}


def check_answer_weight(weight: float) -> None:
    """Raises ValueError for a weight that is none."""
    if not 0 < weight < math.inf:
        raise ValueError(f"answer_weight must be above 0, got {weight}")


def with_planted(rows: Any, tokenizer: Any, share: float, seed: int, answer_weight: float = 1.0, even_share: float = 0.0) -> Any:
    """Training rows, a `share` of them `planted`: which ones and with what is a pure function of seed and place, the same in every pass.

    rows: a dataset with a length, or one of `datasets` that streams. tokenizer: of the model. answer_weight: of a token that predicts an
    answer, in the loss; another one than 1 gives all rows a `loss_mask`. even_share: of `planted`.

    Raises:
        ValueError: for a share or a weight that is none.
    """
    if not 0 <= even_share <= 1:
        raise ValueError(f"even_share must be from 0 to 1, got {even_share}")
    if not 0 <= share <= 1:
        raise ValueError(f"the share of rows in which facts are planted must be from 0 to 1, got {share}")
    check_answer_weight(answer_weight)
    if not share:
        return rows

    def plant(row: Mapping[str, Any], place: int) -> dict[str, Any]:
        rng = random.Random(f"{seed}/{place}")
        if rng.random() < share:
            return planted(row, tokenizer, rng, answer_weight, even_share)
        return dict(row) if answer_weight == 1 else {**row, "loss_mask": _fractions(row)}

    if hasattr(rows, "__len__") and hasattr(rows, "__getitem__"):
        return _Planted(rows, plant)
    return rows.map(plant, with_indices=True)


def _fractions(row: Mapping[str, Any]) -> torch.Tensor:
    """Its `loss_mask`, in which every token counts where it has none, fp32 `[T]`."""
    return torch.as_tensor(row["loss_mask"]).float() if "loss_mask" in row else torch.ones(len(row["input_ids"]))


class _Planted(torch.utils.data.Dataset):
    def __init__(self, rows: Any, plant: Any):
        self.rows, self.plant = rows, plant

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return self.plant(self.rows[place], place)
