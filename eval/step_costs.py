"""What steps of the engine cost, from measured times: a step of decoding, a piece of a prompt, a raise; at any level, batch and length.

Read from result files of `eval/inference.py` (parts growth and batch) and `dsla bench --raises`. Between measured batches, lengths and
levels it is linear.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

LENGTH = 2048  # tokens of the texts behind which batches were measured
Points = list[tuple[float, float]]  # rising


def between(points: Points, at: float) -> float:
    """The line through the points, straight on beyond the last, the first before the first."""
    if at <= points[0][0] or len(points) == 1:
        return points[0][1]
    place = min(max(bisect_right([x for x, _ in points], at), 1), len(points) - 1)
    (low, at_low), (high, at_high) = points[place - 1], points[place]
    return at_low + (at_high - at_low) * (at - low) / (high - low)


@dataclass(frozen=True)
class StepCosts:
    """Seconds by measured level.

    steps: of a step of so many rows, without what their cached tokens cost. per_token: of each of these. reading: of a prompt up to so many
    tokens. raised: (of a layer that goes over, of each of its tokens).
    """

    steps: dict[int, Points]
    per_token: dict[int, float]
    reading: dict[int, Points]
    raised: tuple[float, float]

    @classmethod
    def read(cls, shape: str, inference: Path, raises: Path) -> StepCosts:
        """From result files.

        Raises:
            ValueError: if a file lacks what is needed for a shape.
        """
        rows = [row for row in json.loads(inference.read_text())["rows"] if row["shape"] == shape and row["engine"] == "graph"]
        growth = [row for row in rows if row["part"] == "growth"]
        steps, per_token, reading = {}, {}, {}
        for level in sorted({row["level"] for row in growth}):
            mine = [row for row in growth if row["level"] == level]
            alone = sorted((row["length"], row["seconds_per_token"]) for row in mine if row["batch_size"] == 1)
            by_batch = sorted((row["batch_size"], row["seconds_per_token"]) for row in mine if row["length"] == LENGTH)
            many = max((row for row in mine if row["length"] == LENGTH), key=lambda row: row["batch_size"])
            if len(alone) < 2 or len(by_batch) < 2:
                raise ValueError(f"{inference.name} has too few rows of the part growth for {shape} at level {level}: measure it")
            per_token[level] = (alone[-1][1] - by_batch[0][1]) / (alone[-1][0] - LENGTH)
            steps[level] = [(float(batch), seconds - per_token[level] * batch * LENGTH) for batch, seconds in by_batch]
            # Of many prompts one after the other each takes what the device needs; alone, short ones wait for the host, which records them.
            long = [(float(row["length"]), row["prefill_seconds"]) for row in mine if row["batch_size"] == 1 and row["length"] > LENGTH]
            reading[level] = [(0.0, 0.0), (float(LENGTH), many["prefill_seconds"] / many["batch_size"]), *sorted(long)]
        if not steps:
            raise ValueError(f"{inference.name} has no rows of the part growth for {shape}: measure it with eval/inference.py")
        return cls(steps, per_token, reading, _of_raises(shape, raises))

    def decode(self, level: int, rows: int, tokens: int) -> float:
        """A step of so many rows that have so many tokens in all."""
        return self._between({known: between(points, rows) + self.per_token[known] * tokens for known, points in self.steps.items()}, level)

    def piece(self, level: int, start: int, tokens: int) -> float:
        """So many tokens of a prompt behind `start` others; at least what a step of one row takes, which reads all weights."""
        return self.pieces(level, [(start, tokens)])

    def pieces(self, level: int, pieces: Sequence[tuple[int, int]]) -> float:
        """Pieces of several prompts in a call, (tokens before it, its tokens) of each: together what a prompt is longer in by each, and
        weights are read once."""
        shares = {
            known: sum(between(x, start + tokens) - between(x, start) for start, tokens in pieces) for known, x in self.reading.items()
        }
        return self._between({known: max(share, self.steps[known][0][1]) for known, share in shares.items()}, level)

    def decode_together(self, levels: Sequence[tuple[int, int, int]], rows: int) -> float:
        """The least that one step of texts of several levels would take, (level, texts, cached tokens) of each: linear layers have all
        `rows` at once, attention is that of each level's texts. Launches that attention of two kinds needs more are not in it."""
        texts = sum(count for _, count, _ in levels)
        return sum((self.decode(level, rows, 0) * count / texts + self.cached(level, tokens)) for level, count, tokens in levels)

    def cached(self, level: int, tokens: int) -> float:
        """What so many cached tokens add to a step."""
        return self._between({known: seconds * tokens for known, seconds in self.per_token.items()}, level)

    def fold(self, layers: int, tokens: int) -> float:
        """That so many layers go over, of texts that have so many tokens in all."""
        return layers * (self.raised[0] + self.raised[1] * tokens)

    def _between(self, cost: dict[int, float], level: int) -> float:
        return between(sorted((float(known), seconds) for known, seconds in cost.items()), level)


def _of_raises(shape: str, path: Path) -> tuple[float, float]:
    rows = [row for row in json.loads(path.read_text())["rows"] if row["arm"].startswith(shape) and row.get("raise_seconds")]
    by_length: dict[int, list[float]] = {}
    for row in rows:
        by_length.setdefault(row["length"], []).append(row["raise_seconds"] / row["level"])
    if len(by_length) < 2:
        raise ValueError(f"{path.name} needs raises of {shape} at two lengths: measure them with `dsla bench --raises`")
    (short, at_short), *_, (long, at_long) = sorted((length, fmean(seconds)) for length, seconds in by_length.items())
    slope = (at_long - at_short) / (long - short)
    return at_short - slope * short, slope


def told(costs: StepCosts) -> list[dict[str, Any]]:
    """Some of them as rows, in milliseconds."""
    return [
        {
            "level": level,
            **{f"{rows} rows of 2048": 1e3 * costs.decode(level, rows, rows * LENGTH) for rows in (1, 16, 64)},
            "2048 tokens": 1e3 * costs.piece(level, 0, LENGTH),
            "2048 behind 14336": 1e3 * costs.piece(level, 14336, LENGTH),
        }
        for level in costs.steps
    ]
