"""What `dsla bench` does: time and memory of generation at several levels, beside the unconverted model and beside predictions.

Everything is measured through `generate`, whose stopping criteria are asked after every token: the first time is that of the prompt,
the median of the others that of a token. A first run that is not counted warms up: kernels, compilation, graphs.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from ...core.cache import cache_bytes
from ...models.loading import device
from ..graph import GraphDecoder
from .costs import Costs, copy_bandwidth, costs_of, matmul_rate, synchronize
from .models import collect, networks
from .results import Results

ENGINES = ("eager", "compiled", "graph")
WARM_UP = 5  # tokens of the run that is not counted: compiled and captured steps need three
TRIED = 3  # tokens that a batch has to get through to count as one that fits
MOST_ROWS = 4096
# Prompt tokens of all rows together above which a model without softmax layers reads SHORT_PROMPT a row: its state has the same size.
MOST_PROMPT_TOKENS, SHORT_PROMPT = 2**20, 512


@dataclass(frozen=True)
class Case:
    """One measurement: which engine, prompts of `length` tokens in `rows` rows, and how many tokens then."""

    engine: str
    length: int
    rows: int
    new_tokens: int
    prefill_tokens: int = 16384  # at most, of all rows together, in one forward

    @property
    def chunk(self) -> int | None:
        """Tokens a row of one forward; None: the whole prompt."""
        return None if self.rows * self.length <= self.prefill_tokens else max(self.prefill_tokens // self.rows, 1)


class Clock(StoppingCriteria):
    """Notes the time after every token, and stops after `most` of them."""

    def __init__(self, most: int, where: torch.device):
        self.most, self.where, self.times = most, where, [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        synchronize(self.where)
        self.times.append(time.perf_counter())
        return torch.full((input_ids.shape[0],), len(self.times) > self.most, dtype=torch.bool, device=input_ids.device)


class Runner:
    """Runs cases on one model at one level."""

    def __init__(self, model: Any):
        self.model = model
        self.device: torch.device = model.device
        self.decoder: GraphDecoder | None = None

    def run(self, case: Case, tokens: int, prompt: int | None = None, **more: Any) -> tuple[list[float], Any]:
        """Generate `tokens` tokens: the time at the start and after each, and the cache.

        prompt: read a shorter prompt, though with room for the whole text. more: further options of `generate`.

        Raises:
            ValueError: if the engine cannot run here.
        """
        prompt = case.length if prompt is None else prompt
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, self.model.config.vocab_size, (case.rows, prompt), generator=generator).to(self.device)
        options: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "max_new_tokens": case.length + case.new_tokens - prompt,
            "do_sample": False,
            "return_dict_in_generate": True,
            "prefill_chunk_size": None if case.chunk is None or case.chunk >= prompt else case.chunk,
            **more,
        }
        generate = self.model.generate
        if case.engine == "compiled":
            if self.device.type != "cuda":
                raise ValueError(f"transformers compiles decoding steps on accelerators only, and this model is on {self.device.type}")
            options["cache_implementation"] = "static"
        elif case.engine == "graph":
            self.decoder = self.decoder or GraphDecoder(self.model)
            if (why := self.decoder.obstacle(**options)) is not None:
                raise ValueError(f"no graphs: {why}")
            generate = self.decoder.generate
        clock = Clock(tokens, self.device)
        with torch.no_grad():
            cache = generate(**options, stopping_criteria=StoppingCriteriaList([clock])).past_key_values
        return clock.times, cache

    def measure(self, case: Case) -> dict[str, Any]:
        """Numbers of one case, by name. `prompt_tokens` says how much of the prompt was read; if not all of it, prefill is None."""
        costs = costs_of(self.model)
        short = costs.kept_heads == 0 and case.rows * case.length > MOST_PROMPT_TOKENS
        prompt = min(case.length, SHORT_PROMPT) if short else case.length
        start = time.perf_counter()
        # Two pieces of the prompt go through all that the others do.
        self.run(case, min(WARM_UP, case.new_tokens), min(prompt, 2 * (case.chunk or prompt)))
        warm_up = time.perf_counter() - start
        collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        times, cache = self.run(case, case.new_tokens, prompt)
        per_token = statistics.median(after - before for before, after in itertools.pairwise(times[1:]))
        held = prompt + case.new_tokens - 1 if case.engine == "eager" else int(cache.get_max_length())
        return {
            "prompt_tokens": prompt,
            "prefill_seconds": None if short else times[1] - times[0],
            "seconds_per_token": per_token,
            "tokens_per_second": case.rows / per_token,
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
            "cache_bytes": cache_bytes(cache),
            "predicted_cache_bytes": costs.cache_bytes(case.rows, held),
            "kept_heads": costs.kept_heads,
            "warm_up_seconds": warm_up,
            "capture_seconds": max(self.decoder.capture_seconds, default=None) if case.engine == "graph" and self.decoder else None,
            **_operations(costs, case),
        }

    def raise_seconds(self, case: Case) -> float | None:
        """How much longer than others the step takes at which a text goes from level 0 to the level that the model has now; with
        graphs, of levels that were prepared. None for a model of one level."""
        level = self.model.get_level() if hasattr(self.model, "get_level") else 0
        if level == 0 or self.model.level_sizes()["min_level"]:
            return None
        at = case.length + case.new_tokens // 2
        if case.engine == "graph" and self.decoder is not None:
            self.decoder.prepare([0, level], max_length=case.length + case.new_tokens, rows=case.rows, tokens=at)
        for _ in range(2):  # the first one warms up
            times, _cache = self.run(case, case.new_tokens, level_policy=lambda stats: level if stats.tokens >= at else 0)
        steps = [after - before for before, after in itertools.pairwise(times[1:])]
        return max(steps) - statistics.median(steps)

    def fits(self, case: Case) -> bool:
        """Whether memory suffices for the case. Caches of fixed size are there as a whole after the first chunk of the prompt."""
        prompt = case.length if case.engine == "eager" else min(case.chunk or case.length, case.length)
        try:
            self.run(case, TRIED, prompt)
        except torch.OutOfMemoryError:
            return False
        finally:
            self.forget()
        return True

    def forget(self) -> None:
        """Free caches and graphs."""
        self.decoder = None
        collect()


def _operations(costs: Costs, case: Case) -> dict[str, float]:
    return {
        "moved_bytes_per_token": costs.token_bytes(case.rows, case.length + case.new_tokens // 2),
        "weight_bytes": costs.weight_bytes,
        "prefill_operations": costs.prompt_operations(case.rows, case.length),
    }


def bench(
    model: str,
    adapter: str | None = None,
    *,
    levels: list[str] | None = None,
    lengths: list[int] | None = None,
    batches: list[int] | None = None,
    engines: list[str] | None = None,
    new_tokens: int = 64,
    prefill_tokens: int = 16384,
    largest_batch: bool = False,
    raises: bool = False,
    output: str = "bench-output",
    dtype: str = "auto",
) -> list[dict[str, Any]]:
    """Measure, print a table, and write `bench.json` and `bench.png` into `output`; returns the rows.

    Each row is written when it is there. A case that memory does not suffice for, or that an engine cannot run, is a row with `error`.

    Args:
        model: a checkpoint, a hybrid, or a name in `models.PRESETS`. adapter: of that checkpoint; without one the DSLA layers get fresh
            weights, as speed does not depend on their values.
        levels: as in `dsla generate`; level 0, the unconverted model, is always measured. Of a hybrid, whose softmax weights are
            gone, it is a model of the same shape with random weights.
        lengths, batches: tokens and rows of prompts. engines: of `ENGINES`.
        prefill_tokens: of all rows, in one forward at most. largest_batch: search it, instead of `batches`.
        raises: measure also how long a raise from level 0 stalls a text (`raise_seconds`).

    Raises:
        ValueError: if an option is not one, or the levels are not this model's.
        OSError: if a file is missing.
    """
    where = torch.device(device())
    engines = engines or (["eager", "graph"] if where.type == "cuda" else ["eager"])
    lengths, batches = lengths or [2048 if where.type == "cuda" else 128], batches or [1]
    if wrong := [engine for engine in engines if engine not in ENGINES]:
        raise ValueError(f"no engine {wrong}; there are {', '.join(ENGINES)}")
    if new_tokens < 3:
        raise ValueError(f"new_tokens must be 3 or more for a time per token, got {new_tokens}")
    if largest_batch and where.type != "cuda":
        raise ValueError("the largest batch is one that fills a GPU's memory, and there is no CUDA device here: leave --largest-batch out")
    bandwidth, rates = copy_bandwidth(where), dict[torch.dtype, float]()
    name = Path(model).name
    results = Results(Path(output), bandwidth)
    for network, level in networks(model, adapter, levels, dtype, where):
        if (rate := rates.get(network.dtype)) is None:
            rate = rates[network.dtype] = matmul_rate(where, network.dtype)
        runner = Runner(network)
        for engine in engines:
            for length in lengths:
                for rows in [0] if largest_batch else batches:
                    case = Case(engine, length, rows, new_tokens, prefill_tokens)
                    row: dict[str, Any] = {"arm": f"{name}, {engine}", "engine": engine, "level": level, "length": length}
                    if largest_batch:
                        row["largest_batch"] = True
                    numbers = measure_largest(runner, case) if largest_batch else measured(runner, case, raises)
                    results.add({**row, "batch_size": rows, **numbers}, rate)
                    runner.forget()
        del network, runner
        collect()
    print(results.table())
    results.plot()
    print(f"written to {results.folder}")
    return results.rows


def measured(runner: Runner, case: Case, raises: bool = False) -> dict[str, Any]:
    """The numbers of a case, or the error that it ended with."""
    try:
        numbers = runner.measure(case)
        return {**numbers, "raise_seconds": runner.raise_seconds(case)} if raises else numbers
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except ValueError as error:
        return {"error": " ".join(str(error).split())}
    finally:
        collect()


def measure_largest(runner: Runner, case: Case) -> dict[str, Any]:
    """The numbers of the largest batch that fits, whose size is `batch_size`; found within a sixteenth."""

    def of(rows: int) -> Case:
        return Case(case.engine, case.length, rows, case.new_tokens, case.prefill_tokens)

    try:
        rows = largest(lambda rows: runner.fits(of(rows)))
    except ValueError as error:
        return {"error": " ".join(str(error).split()), "batch_size": 1}
    while rows:
        numbers = measured(runner, of(rows))
        if numbers.get("error") != "out of memory":
            return {**numbers, "batch_size": rows}
        runner.forget()
        rows -= max(rows // 16, 1)  # the whole prompt needs a little more than its first chunk
    return {"error": "out of memory", "batch_size": 1}


def largest(fits: Callable[[int], bool], most: int = MOST_ROWS) -> int:
    """The largest number up to `most` that fits, 0 if none does; above 16 it may be too small by a sixteenth."""
    low, high = 0, 1
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > max(low // 16, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, most)
