"""What benchmarks of models share: rows that outlive a run, the time that a run may take, caches that no prompt has to be read for, and
memory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS, write_results

from dsla_hf.core.cache import VisibleStaticLayer
from dsla_hf.inference.graph import Workspace


class Rows:
    """The rows of a result file, with new ones in place of earlier ones that are alike in `key`."""

    def __init__(self, name: str, key: tuple[str, ...], folder: Path = RESULTS):
        self.name, self.names, self.folder = name, key, folder
        path = folder / f"{name}.json"
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def has(self, place: dict[str, Any]) -> bool:
        """Whether there is such a row, and not for an error."""
        return any("error" not in row and self.key(row) == self.key(place) for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows = [*(other for other in self.rows if self.key(other) != self.key(row)), row]
        write_results(self.name, self.rows, folder=self.folder)
        print(row, flush=True)

    def key(self, row: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self.names)


class Clock:
    """How much of the time that a run may take is left."""

    def __init__(self, seconds: float):
        self.end, self.begun, self.longest = time.monotonic() + seconds, time.monotonic(), 0.0

    def allows_another(self) -> bool:
        """Whether a row as long as the longest so far would end in time; a row begins now."""
        self.begun = time.monotonic()
        return self.begun + self.longest <= self.end

    def ends_row(self) -> None:
        self.longest = max(self.longest, time.monotonic() - self.begun)


def fill(space: Workspace, tokens: int) -> None:
    """Go on as if every row had read so many tokens."""
    for layer in space.layers():
        if isinstance(layer, VisibleStaticLayer):
            for x in (layer.keys, layer.values):
                x.normal_()
            layer.cumulative_length.fill_(tokens)
    space.counts.fill_(tokens)
    space.positions.fill_(tokens)
    space.lengths.fill_(tokens + 1)
    space.read = tokens


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
