"""What `dsla bench` does: time and memory of generation at several levels, beside the unconverted model and beside predictions.

Everything is measured through `generate`, whose stopping criteria are asked after every token: the first time is that of the prompt,
the median of the others that of a token. A first run that is not counted warms up: kernels, compilation, graphs.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

from ...core.cache import cache_bytes
from ...core.plots import figure, mark_measured, mark_plain, save
from ...core.results import write_results
from ...core.tables import markdown_table
from ...models.configuration import DSLAConfig, resolve_level
from ...models.loading import device, load_adapter, load_config, load_model, read_adapter_config
from ..graph import GraphDecoder
from .costs import Costs, copy_bandwidth, costs_of, matmul_rate, synchronize

ENGINES = ("eager", "compiled", "graph")
# Shapes of well-known models, to be filled with random weights; nothing is downloaded.
PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    },
    "qwen3-1.7b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}
LONGEST = 262144  # tokens that presets take
WARM_UP = 5  # tokens of the run that is not counted: compiled and captured steps need three
TRIED = 3  # tokens that a batch has to get through to count as one that fits
MOST_ROWS = 4096
# Prompt tokens of all rows together above which a model without softmax layers reads SHORT_PROMPT a row: its state has the same size.
MOST_PROMPT_TOKENS, SHORT_PROMPT = 2**20, 512
NUMBERS = {  # columns of the table: field, heading, scale
    "prefill_seconds": ("prefill s", 1.0),
    "predicted_prefill_seconds": ("floor", 1.0),
    "seconds_per_token": ("ms a token", 1e3),
    "predicted_seconds_per_token": ("floor", 1e3),
    "tokens_per_second": ("tokens/s", 1.0),
    "against_level_0": ("× level 0", 1.0),
    "raise_seconds": ("raise ms", 1e3),
    "capture_seconds": ("capture ms", 1e3),
    "peak_bytes": ("peak GB", 1e-9),
    "cache_bytes": ("cache MB", 1e-6),
    "predicted_cache_bytes": ("predicted", 1e-6),
}


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
        short = costs.softmax_layers == 0 and case.rows * case.length > MOST_PROMPT_TOKENS
        prompt = min(case.length, SHORT_PROMPT) if short else case.length
        start = time.perf_counter()
        # Two pieces of the prompt go through all that the others do.
        self.run(case, min(WARM_UP, case.new_tokens), min(prompt, 2 * (case.chunk or prompt)))
        warm_up = time.perf_counter() - start
        _collect()
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
        _collect()


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
        model: a checkpoint, a hybrid, or a name in `PRESETS`. adapter: of that checkpoint; without one the DSLA layers get fresh
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
        _collect()
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
        _collect()


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


# --- models -----------------------------------------------------------------------------------------------------


def networks(model: str, adapter: str | None, levels: list[str] | None, dtype: str, where: torch.device) -> Iterator[tuple[Any, int]]:
    """The models to measure with their levels, one at a time: the unconverted one, then the others."""
    preset = model in PRESETS and not Path(model).exists()
    config = preset_config(model) if preset else load_config(model)
    if not preset and config.model_type == "dsla":
        if adapter is not None or levels:
            raise ValueError(f"{model} is a hybrid of one level: leave adapter and levels out")
        base = AutoConfig.for_model(config.base_model_type, **{k: v for k, v in config.to_dict().items() if k not in _NOT_SHAPE})
        yield ready(random_model(base, config.dtype or torch.float32, where), where), 0
        hybrid = ready(load_model(model, dtype), where)
        yield hybrid, hybrid.get_level()
        return
    plan = DSLAConfig(task_type="CAUSAL_LM") if adapter is None else read_adapter_config(adapter)
    wanted = sorted({resolve_level(level, plan, config.num_hidden_layers) for level in levels or ["50%", "100%"]} - {0})
    if preset:
        kinds = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        network = random_model(config, kinds[dtype], where)
    else:
        network = load_model(model, dtype)
    network = ready(network, where)
    yield network, 0
    if not wanted:
        return
    if adapter is None:
        with where:
            network = get_peft_model(network, plan)
    else:
        del network
        _collect()
        network = load_adapter(model, adapter, dtype)
    network = ready(network, where)
    for level in wanted:
        network.set_level(level)
        yield network, level


_NOT_SHAPE = ("model_type", "architectures", "auto_map", "dsla_config", "dtype", "transformers_version")


def preset_config(name: str) -> Any:
    """The configuration of a preset."""
    values = dict(PRESETS[name])
    theta = values.pop("rope_theta", 10000.0)
    rope = {"rope_type": "default", "rope_theta": theta}
    return AutoConfig.for_model(values.pop("model_type"), **values, rope_parameters=rope, max_position_embeddings=LONGEST)


def random_model(config: Any, dtype: torch.dtype, where: torch.device) -> Any:
    """A model with random weights, made where it is to run."""
    with where:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def ready(network: Any, where: torch.device) -> Any:
    """On its device, and with texts that end only when they are long enough."""
    network = network.to(where).eval()
    network.generation_config.eos_token_id = None
    network.generation_config.pad_token_id = 0
    network.generation_config.do_sample = False
    network.generation_config.temperature = network.generation_config.top_p = network.generation_config.top_k = None
    return network


def _collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- results ----------------------------------------------------------------------------------------------------


class Results:
    """Rows as they come, in a file that `dsla report --speed` reads."""

    def __init__(self, folder: Path, bandwidth: float):
        self.folder, self.bandwidth, self.rows = folder, bandwidth, list[dict[str, Any]]()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any], rate: float) -> None:
        """Complete a row by predictions, at `rate` operations per second, and by its comparison with level 0; write all rows."""
        if "moved_bytes_per_token" in row:
            row["predicted_seconds_per_token"] = row["moved_bytes_per_token"] / self.bandwidth
            row["predicted_prefill_seconds"] = row["prefill_operations"] / rate
            row["copy_bytes_per_second"], row["matmul_operations_per_second"] = self.bandwidth, rate
            same = ("engine", "length") if row.get("largest_batch") else ("engine", "length", "batch_size")
            for other in self.rows:
                if other["level"] == 0 and "error" not in other and all(other[key] == row[key] for key in same):
                    row["against_level_0"] = row["tokens_per_second"] / other["tokens_per_second"]
        self.rows.append(row)
        write_results(self.folder / "bench.json", self.rows)

    def table(self) -> str:
        """The rows as a Markdown table."""
        used = {field: shown for field, shown in NUMBERS.items() if any(row.get(field) is not None for row in self.rows)}
        headings = ["engine", "level", "length", "batch", *(heading for heading, _ in used.values()), ""]
        lines = []
        for row in self.rows:
            cells = [str(row[field]) for field in ("engine", "level", "length", "batch_size")]
            for field, (_, scale) in used.items():
                value = row.get(field)
                cells.append("" if value is None else f"{value * scale:.4g}")
            lines.append([*cells, row.get("error", "")])
        return markdown_table(headings, lines)

    def plot(self) -> None:
        """Time per token against length and against batch, a line for every engine and level, as `bench.png`."""
        rows = [row for row in self.rows if "error" not in row]
        panels = []
        for along, other in (("length", "batch_size"), ("batch_size", "length")):
            fixed = min((row[other] for row in rows), default=0)
            places = {row[along] for row in rows if row[other] == fixed}
            if len(places) > 1:
                panels.append((along, other, fixed, places))
        if not panels:
            print("no plot: it needs two lengths or two batch sizes")
            return
        try:
            drawn, axes = figure(1, len(panels), size=(5 * len(panels), 4))
        except ImportError as error:
            print(f"no plot: {error}")
            return
        for axis, (along, other, fixed, places) in zip(axes, panels, strict=True):
            for engine, level in dict.fromkeys((row["engine"], row["level"]) for row in rows):
                line = sorted(
                    (row[along], row["seconds_per_token"] * 1e3, row["predicted_seconds_per_token"] * 1e3)
                    for row in rows
                    if (row["engine"], row["level"], row[other]) == (engine, level, fixed)
                )
                if line:
                    x, found, floor = zip(*line, strict=True)
                    (line_drawn,) = axis.plot(x, found, marker="o", label=f"{engine}, level {level}")
                    axis.plot(x, floor, linestyle=":", color=line_drawn.get_color())
            axis.set(
                xscale="log", yscale="log", xlabel=along.replace("_", " "), ylabel="ms a token", title=f"{other.replace('_', ' ')} {fixed}"
            )
            mark_measured(axis.xaxis, places)
            mark_plain(axis.yaxis)
        axes[0].legend(fontsize="small", title="dotted: floor")
        save(drawn, self.folder / "bench.png", dpi=150)
