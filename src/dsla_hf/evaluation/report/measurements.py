"""Results of measurements, read from files: those of `dsla eval`, and tables of rows as JSON.

A table is `{"command", "versions", "device", "rows": [...]}`. Each row has a `level`, and whatever numbers were measured there, by name.
A row of a level that counts KV heads has `kept`, the number of those that stay softmax attention.
A row may also have `arm`, the name of the model or recipe; `task`, the heading under which its numbers stand; `seed`, over which numbers
are averaged; `length` and `batch_size`, which become a part of the names. Other fields that are no numbers are passed over.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev
from typing import Any

NO_METRICS = ("arm", "level", "kept", "task", "seed", "length", "batch_size")
# Patterns of names, in lower case and without lengths; of others nothing is known unless the file tells, as those of lm-eval do.
HIGHER_IS_BETTER: tuple[str, ...] = ("acc", "acc_norm", "accuracy", "recall", "found", "exact_match", "f1", "rouge*")
HIGHER_IS_BETTER += ("*tokens_per_second", "*requests_per_second")
LOWER_IS_BETTER: tuple[str, ...] = ("perplexity", "*_perplexity", "ppl", "kl", "loss", "latency*", "ms", "*_ms", "ms_*", "seconds")
LOWER_IS_BETTER += ("*_seconds", "seconds_per_*", "bytes", "*_bytes", "bytes_*")


@dataclass(frozen=True)
class Measurement:
    """One number: the mean over seeds, where there are several, and then its standard deviation; else its standard error, if known."""

    arm: str
    level: int
    task: str
    metric: str
    value: float
    error: float | None = None
    higher_is_better: bool | None = None  # None: not known
    kept: int | None = None  # KV heads that the level keeps; None where levels count layers
    longest_text: int | None = None  # tokens of the task's longest text, where it is scored by likelihood
    window: int | None = None  # tokens of the window of what is converted

    @property
    def place(self) -> int:
        """Where it stands among those of other levels: at the KV heads kept if they are known, which compares plans of layers with plans of
        heads, else at the level."""
        return self.level if self.kept is None else self.kept


@dataclass(frozen=True)
class Source:
    """Where numbers come from."""

    arm: str
    file: str
    command: str
    device: str
    versions: dict[str, str]


def read_measurements(given: str) -> tuple[list[Measurement], list[Source]]:
    """The numbers in a folder that `dsla eval` wrote, in one of its files, or in a table of rows.

    Args:
        given: a path, or NAME=PATH; without a name that of the folder or file. Rows with an `arm` have that name instead.

    Raises:
        ValueError: if there are no results, or a row has no level, or something else than a number of heads as `kept`.
        FileNotFoundError: if there is no such file.
    """
    name, path = _named(given)
    if path.is_dir():
        files = sorted(path.glob("level-*.json"))
        if not files:
            raise ValueError(f"{path} holds no level-*.json: give a folder that `dsla eval` wrote, or a file")
    else:
        files = [path]
    found: dict[tuple[str, int, str, str, int | None], list[tuple[float, float | None]]] = {}
    told: dict[str, dict[str, bool]] = {}
    texts: dict[tuple[str, int, str], tuple[int | None, int | None]] = {}
    sources = []
    for file in files:
        content = _content(file)
        whose = name or (path.name if path.is_dir() else file.parent.name if "tasks" in content else file.stem)
        sources.append(_source(whose, file, content))
        if "tasks" in content:
            told |= content.get("higher_is_better") or {}
            for task, metrics in content["tasks"].items():
                texts[whose, content["level"], task] = (content.get("longest_text") or {}).get(task), content.get("window")
                for metric, value in metrics.items():
                    if "_stderr" not in metric:
                        error = metrics.get(f"{metric}_stderr")
                        key = (whose, content["level"], task, metric, content.get("kept"))
                        found.setdefault(key, []).append((value, error))
        else:
            for row, number, key in _rows(content["rows"], whose, file):
                found.setdefault(key, []).append((number, None if row.get("seed") is not None else row.get(f"{key[3]}_stderr")))
    measurements = []
    for (arm, level, task, metric, kept), values in found.items():
        better = told.get(task, {}).get(metric)
        measurements.append(
            Measurement(
                arm,
                level,
                task,
                metric,
                *_joined(values),
                _higher_is_better(metric) if better is None else better,
                kept,
                *texts.get((arm, level, task), (None, None)),
            )
        )
    return measurements, sources


def _higher_is_better(metric: str) -> bool | None:
    name = re.split(r"[@\[ ]", metric)[0].lower()
    for patterns, answer in ((HIGHER_IS_BETTER, True), (LOWER_IS_BETTER, False)):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return answer
    return None


def _named(given: str) -> tuple[str | None, Path]:
    name, equals, path = given.partition("=")
    if not equals or Path(given).exists():
        name, path = "", given
    if not Path(path).exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    return name or None, Path(path)


def _content(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON ({error})") from None
    if isinstance(content, dict) and ({"tasks", "level"} <= content.keys() or isinstance(content.get("rows"), list)):
        return content
    raise ValueError(f"{file} holds no results: neither `tasks` and `level`, as of `dsla eval`, nor `rows`")


def _source(arm: str, file: Path, content: dict[str, Any]) -> Source:
    device = str(content.get("device") or "")
    return Source(arm, file.name, str(content.get("command") or ""), device, dict(content.get("versions") or {}))


def _rows(rows: list[dict[str, Any]], whose: str, file: Path) -> Any:
    """(row, number, (arm, level, task, metric, kept)) for each number of each row."""
    for place, row in enumerate(rows, 1):
        if not isinstance(row.get("level"), int):
            raise ValueError(f"{file}, row {place}: no whole number as `level`, but {row.get('level')!r}")
        kept = row.get("kept")
        if kept is not None and (not isinstance(kept, int) or kept < 0):
            raise ValueError(f"{file}, row {place}: `kept` is no number of KV heads, but {kept!r}")
        suffix = f"@{row['length']}" if "length" in row else ""
        suffix += f" batch {row['batch_size']}" if "batch_size" in row else ""
        for metric, value in row.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if number and metric not in NO_METRICS and not metric.endswith("_stderr"):
                arm, task = str(row.get("arm") or whose), str(row.get("task") or file.stem)
                yield row, value, (arm, row["level"], task, f"{metric}{suffix}", kept)


def _joined(values: list[tuple[float, float | None]]) -> tuple[float, float | None]:
    numbers = [float(value) for value, _ in values]
    return mean(numbers), stdev(numbers) if len(numbers) > 1 else values[0][1]
