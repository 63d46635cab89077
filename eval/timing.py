"""What benchmarks of models share: their arguments, rows that outlive a run, the time that a run may take, steps behind caches that no
prompt has to be read for, and memory."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS, write_results

from dsla_hf import GraphDecoder
from dsla_hf.core.cache import VisibleStaticLayer, cache_bytes
from dsla_hf.inference.bench.measure import Case, Runner
from dsla_hf.inference.graph import PlainRecording, Workspace


def parser_for(description: str | None, name: str, shapes: Iterable[str], lengths: str, page: str) -> argparse.ArgumentParser:
    """The arguments that all such benchmarks take: `lengths` of texts they have by default, and what `--page` does."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(shapes), choices=list(shapes))
    parser.add_argument("--tokens", nargs="+", type=int, help=f"lengths of texts ({lengths})")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row that would probably end later")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that all of it runs")
    parser.add_argument("--page", action="store_true", help=f"measure nothing; {page}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder of {name}.json")
    return parser


def plan_for(parser: argparse.ArgumentParser, args: argparse.Namespace, full: Callable[[], Any], tiny: Callable[[], Any]) -> Any:
    """The plan that is asked for, with `lengths` and `read`: of texts, and how many tokens of each are really read."""
    if torch.device(args.device).type != "cuda" and not args.tiny:
        parser.error("times are those of a CUDA device; --tiny runs on a CPU, too")
    plan = tiny() if args.tiny else full()
    if not args.tokens:
        return plan
    if (shortest := min(args.tokens)) <= plan.read:
        parser.error(f"--tokens must be above {plan.read}, of which every text is really read, got {shortest}")
    return replace(plan, lengths=tuple(args.tokens))


def say_whether_complete(complete: bool, seconds: float) -> None:
    """The last line of a run."""
    if not complete:
        print(f"{seconds:g} seconds did not suffice: rows are missing, and the same command again goes on with them")


def numbers_or_error(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a measurement gives a row, or the error that it ended with: one row that breaks must not cost the others."""
    try:
        return measure()
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}


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


def runner_for(network: Any) -> Runner:
    """What runs a model by `GraphDecoder`; elsewhere than on a GPU with steps as they are, to see that it runs."""
    runner = Runner(network)
    if runner.device.type != "cuda":
        runner.decoder = GraphDecoder(network, record=PlainRecording)
    return runner


def decode_behind(network: Any, tokens: int, rows: int, *, steps: int, read: int, piece: int) -> dict[str, Any]:
    """Seconds of a step by `GraphDecoder` of `rows` texts that have `tokens` tokens behind them, of which `read` were read, at most
    `piece` at a time: the mean of as many steps as it takes until a block of the window went into the states, and the median."""
    runner = runner_for(network)
    case = Case("graph", tokens, rows, steps + 4, prefill_tokens=piece)
    runner.run(case, 1, read)
    decoder = runner.decoder
    assert decoder is not None and decoder.workspace is not None
    fill(decoder.workspace, tokens - 1)
    reset_peak(runner.device)
    times, cache = runner.run(case, case.new_tokens, past_key_values=decoder.workspace.cache)
    if (why := decoder.recorder.reason) is not None:
        raise (torch.OutOfMemoryError if "memory" in why else RuntimeError)(f"steps were not recorded: {why}")
    of_steps = [after - before for before, after in itertools.pairwise(times[1:])][-steps:]  # the first ones record
    return numbers_of_steps(of_steps, rows, cache, runner.device)


def numbers_of_steps(seconds: list[float], rows: int, cache: Any, device: torch.device) -> dict[str, Any]:
    """What a row says of the steps of `rows` texts that took so long, each."""
    per_token = statistics.fmean(seconds)
    return {
        "seconds_per_token": per_token,
        "median_seconds_per_token": statistics.median(seconds),
        "tokens_per_second": rows / per_token,
        "cache_bytes": cache_bytes(cache),
        "peak_bytes": peak(device),
    }


@torch.no_grad()
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
