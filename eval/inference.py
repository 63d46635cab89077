"""Inference at 7B: time per token, prefill and throughput at levels 0, 50 % and 100 %, beside what a user would run instead.

    python eval/inference.py
    python eval/inference.py --parts token,batch --shapes llama3-8b
    python eval/inference.py --page

Weights are random. Every row is written to eval/results/inference.json as soon as it is there, in place of an earlier one of the same
measurement, so a run that was cut short loses nothing. Parts: `token` (one row, 2k and 32k tokens), `batch` (16 rows, 8k), `prefill`
(32k and 128k), `largest` (the largest batch that fits), `growth` (time per token against length and batch), `baseline` (the
unconverted model as transformers compiles it), `others` (models that are hybrid by birth), `profile` (where the time of a token
goes). `--page` measures nothing: it fills docs/measured/inference.md and draws the plots.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import traceback
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reporting import RESULTS, fill_page, rows_table, write_results
from tqdm import tqdm
from transformers import AutoConfig

from dsla_hf.core.plots import figure, mark_measured, mark_plain, save
from dsla_hf.inference.bench.costs import copy_bandwidth, matmul_rate
from dsla_hf.inference.bench.measure import Case, Runner, measure_largest, measured
from dsla_hf.inference.bench.models import networks, random_model, ready

PARTS = ("token", "batch", "prefill", "largest", "growth", "baseline", "others", "profile")
PAGE = Path(__file__).parent.parent / "docs" / "measured" / "inference.md"
# A row replaces an earlier one that is alike in these.
KEY = ("part", "shape", "engine", "level", "length", "batch_size")
TOKENS = 32  # generated in a case; a median is taken
LENGTHS = tuple(1024 * 2**i for i in range(8))
BATCHES = (1, 2, 4, 8, 16, 32, 64)
# Hybrids of transformers with random weights, as large as 7B where they come that large.
OTHERS: dict[str, dict[str, Any]] = {
    "zamba-7b": {"model_type": "zamba"},  # its defaults are those of Zamba-7B-v1
    "qwen3-next, 12 layers": {"model_type": "qwen3_next", "num_hidden_layers": 12, "num_experts": 32},
}


@dataclass(frozen=True)
class Wanted:
    """A case of one part, and at which levels, as shares of the layers, it is measured with which engines."""

    part: str
    length: int
    rows: int
    shares: tuple[float, ...] = (0.0, 0.5, 1.0)
    engines: tuple[str, ...] = ("graph",)
    new_tokens: int = TOKENS


def wanted(parts: list[str], shape: str) -> Iterator[Wanted]:
    """The cases of the parts that run on our engines."""
    if "token" in parts:
        yield Wanted("token", 2048, 1, engines=("graph", "eager"))
        yield Wanted("token", 32768, 1, (0.0, 1.0))
    if "batch" in parts:
        yield Wanted("batch", 8192, 16)
    if "prefill" in parts:
        for length in (32768, 131072):
            yield Wanted("prefill", length, 1, (0.0, 1.0), new_tokens=4)
    if "largest" in parts:
        yield Wanted("largest", 8192, 0)
    if "growth" in parts:
        for length in LENGTHS:
            yield Wanted("growth", length, 1, new_tokens=8)
        for rows in BATCHES[1:]:
            yield Wanted("growth", 2048, rows, new_tokens=8)
    if "baseline" in parts:
        for length, rows in ((2048, 1), (8192, 16)):
            yield Wanted("baseline", length, rows, (0.0,), ("compiled",))


class Rows:
    """The rows of the result file, with new ones in place of earlier ones."""

    def __init__(self, folder: Path):
        self.folder = folder
        path = folder / "inference.json"
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def add(self, row: dict[str, Any]) -> None:
        def key(other: dict[str, Any]) -> tuple[Any, ...]:
            # The largest batch is found, not asked for.
            return tuple(other.get(name) for name in KEY if not (name == "batch_size" and other["part"] == "largest"))

        self.rows = [*(other for other in self.rows if key(other) != key(row)), row]
        write_results("inference", self.rows, folder=self.folder)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_shape(shape: str, parts: list[str], rows: Rows) -> None:
    """All cases of one shape, each level's model made once."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = list(wanted(parts, shape))
    if not cases and "profile" not in parts:
        return
    bandwidth = copy_bandwidth(where)
    for network, level, _ in networks(shape, None, ["50%", "100%"], "auto", where):
        share = level / network.config.num_hidden_layers
        rate = matmul_rate(where, network.dtype)
        runner = Runner(network)
        for want in tqdm([case for case in cases if share in case.shares], desc=f"{shape}, level {level}"):
            for engine in want.engines:
                case = Case(engine, want.length, want.rows, want.new_tokens)
                try:
                    numbers = measure_largest(runner, case) if want.part == "largest" else measured(runner, case)
                except Exception as error:  # one case that breaks must not cost the others
                    traceback.print_exc()
                    numbers = {"error": f"{type(error).__name__}: {error}"[:300]}
                row = {"part": want.part, "shape": shape, "engine": engine, "level": level, "length": want.length, "batch_size": want.rows}
                row |= numbers
                if "moved_bytes_per_token" in row:
                    row["predicted_seconds_per_token"] = row["moved_bytes_per_token"] / bandwidth
                    row["predicted_prefill_seconds"] = row["prefill_operations"] / rate
                    # The measure of a token: the time that reading the weights takes, at a copy's bandwidth.
                    row["weight_seconds"] = row["weight_bytes"] / bandwidth
                rows.add(row)
                runner.forget()
        if "profile" in parts and share == 0.5:
            rows.add({"part": "profile", "shape": shape, "engine": "graph", "level": level, **profile(runner, bandwidth)})
            runner.forget()
        del network, runner
        free()


# --- one token --------------------------------------------------------------------------------------------------

# What a kernel does, by a part of its name; the first that fits.
KINDS = {
    "softmax layers": ("softmax_decode", "flash", "fmha", "sdpa", "_join_kernel"),
    "DSLA layers": ("window_decode", "pure_decode", "_state_kernel", "_decay_kernel"),
    "weights": ("few_rows", "gemv", "gemm", "cutlass", "splitK", "nvjet", "ampere", "sm90"),
    "caches": ("_append_kernel", "index", "copy", "scatter"),
}


def kind_of(kernel: str) -> str:
    return next(
        (kind for kind, names in KINDS.items() if any(name.lower() in kernel.lower() for name in names)), "norms, activations, rest"
    )


def profile(runner: Runner, bandwidth: float, length: int = 8192) -> dict[str, Any]:
    """Milliseconds of the GPU per token by what they are for, and those in which nothing runs (one row, replayed steps)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    case = Case("graph", length, 1, TOKENS)
    runner.run(case, TOKENS)  # captures
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with record(activities=activities) as profiler:
        times, _ = runner.run(case, TOKENS)
    # The prompt is one call of other kernels: of kernels that also run in it, what the tokens after it take is their share by count.
    spent: dict[str, float] = defaultdict(float)
    events = sorted((e for e in profiler.events() if str(e.device_type).endswith("CUDA")), key=lambda e: e.time_range.start)
    steps = TOKENS - 1
    if events:
        begin = events[-1].time_range.end - (times[-1] - times[1]) * 1e6
        for event in events:
            if event.time_range.start >= begin:
                spent[kind_of(event.name)] += (event.time_range.end - event.time_range.start) / 1e3 / steps
    per_token = (times[-1] - times[1]) / steps * 1e3
    numbers = {"length": length, "batch_size": 1, "ms_per_token": per_token, "ms_by_kind": dict(spent)}
    numbers["ms_nothing_runs"] = per_token - sum(spent.values())
    return numbers | {"bandwidth": bandwidth}


# --- others -----------------------------------------------------------------------------------------------------


def measure_others(rows: Rows, length: int = 2048) -> None:
    """Time per token of models that are hybrid by birth, as transformers runs them."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name, values in OTHERS.items():
        row = {"part": "others", "shape": name, "engine": "eager", "level": None, "length": length, "batch_size": 1}
        try:
            config = AutoConfig.for_model(**values)
            runner = Runner(ready(random_model(config, torch.bfloat16, where), where))
            times, _ = runner.run(Case("eager", length, 1, TOKENS), TOKENS)
            steps = [after - before for before, after in itertools.pairwise(times[1:])]
            row |= {"prefill_seconds": times[1] - times[0], "seconds_per_token": statistics.median(steps)}
            row["weight_bytes"] = sum(p.numel() * p.element_size() for p in runner.model.parameters())
            row["fast_kernels"] = _has_mamba_kernels()
            del runner
        except Exception as error:  # one model that does not run must not cost the others
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        rows.add(row)
        free()


def _has_mamba_kernels() -> bool:
    try:
        import causal_conv1d  # noqa: F401
        import mamba_ssm  # noqa: F401
    except ImportError:
        return False
    return True


# --- page -------------------------------------------------------------------------------------------------------


def pick(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row.get(name) == value for name, value in values.items()) and "error" not in row]


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The table of docs/measured/inference.md: what was asked, what was measured."""
    table: list[dict[str, Any]] = []
    for shape in dict.fromkeys(row["shape"] for row in rows if row["part"] not in ("others",)):

        def one(part: str, level: int, length: int, shape: str = shape, engine: str = "graph") -> dict[str, Any] | None:
            found = pick(rows, part=part, shape=shape, level=level, length=length, engine=engine)
            return found[0] if found else None

        levels = sorted({row["level"] for row in rows if row["shape"] == shape})
        top, half = levels[-1], levels[len(levels) // 2]
        for level, length in ((0, 2048), (half, 2048), (top, 2048), (0, 32768), (top, 32768)):
            if row := one("token", level, length):
                share = row["seconds_per_token"] / row["weight_seconds"]
                table.append(_line(shape, f"ms a token, level {level}, {length:,} tokens", row["seconds_per_token"] * 1e3))
                table.append(_line(shape, f"the same over reading the weights, level {level}, {length:,} tokens", share))
        for part, engine in (("baseline", "compiled"), ("token", "eager")):
            if row := one(part, 0, 2048, engine=engine):
                table.append(_line(shape, f"ms a token, level 0, 2,048 tokens, transformers {engine}", row["seconds_per_token"] * 1e3))
        if row := one("baseline", 0, 8192, engine="compiled"):
            table.append(_line(shape, "ms a step, level 0, 16 rows of 8,192, transformers compiled", row["seconds_per_token"] * 1e3))
        if row := one("batch", 0, 8192):
            table.append(_line(shape, "ms a step, level 0, 16 rows of 8,192", row["seconds_per_token"] * 1e3))
        for part, length, what in (("batch", 8192, "16 rows of 8,192 tokens"), ("largest", 8192, "largest batch, 8,192 tokens")):
            if base := one(part, 0, length):
                for level in (half, top):
                    if row := one(part, level, length):
                        gain = row["tokens_per_second"] / base["tokens_per_second"]
                        table.append(_line(shape, f"throughput of level {level} over level 0, {what}", gain))
        for length in (32768, 131072):
            if (base := one("prefill", 0, length)) and (row := one("prefill", top, length)):
                gain = base["prefill_seconds"] / row["prefill_seconds"]
                table.append(_line(shape, f"prefill of level 0 over level {top}, {length:,} tokens", gain))
    return table


def _line(shape: str, what: str, value: float) -> dict[str, Any]:
    return {"shape": shape, "what": what, "measured": value}


def break_even(rows: list[dict[str, Any]], shape: str, level: int) -> int | None:
    """The shortest measured length from which on a token at `level` takes no longer than one at level 0, in one row."""
    at = {length: pick(rows, part="growth", shape=shape, length=length, batch_size=1) for length in LENGTHS}
    pays = []
    for length, found in at.items():
        times = {row["level"]: row["seconds_per_token"] for row in found}
        if level in times and 0 in times:
            pays.append((length, times[level] <= times[0]))
    last_loss = max((i for i, (_, pay) in enumerate(pays) if not pay), default=-1)
    return pays[last_loss + 1][0] if last_loss + 1 < len(pays) else None


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    shapes = list(dict.fromkeys(row["shape"] for row in pick(rows, part="growth")))
    drawn, axes = figure(len(shapes), 2, size=(11, 4 * len(shapes)))
    for by_length, by_batch, shape in zip(axes[::2], axes[1::2], shapes, strict=True):
        for axis, along, fixed in ((by_length, "length", {"batch_size": 1}), (by_batch, "batch_size", {"length": 2048})):
            found = pick(rows, part="growth", shape=shape, **fixed)
            for level in sorted({row["level"] for row in found}):
                points = sorted(
                    (row[along], row["seconds_per_token"], row["predicted_seconds_per_token"]) for row in pick(found, level=level)
                )
                x, y, floor = zip(*points, strict=True)
                (line,) = axis.plot(x, [1e3 * value for value in y], "o-", label=f"level {level}")
                axis.plot(x, [1e3 * value for value in floor], ":", color=line.get_color())
            axis.set(xscale="log", yscale="log", xlabel=along.replace("_", " "), ylabel="ms a step", title=shape)
            mark_measured(axis.xaxis, {row[along] for row in found})
            mark_plain(axis.yaxis)
            axis.grid(alpha=0.3)
            axis.legend(fontsize="small", title="dotted: floor by bytes")
    save(drawn, path)


def make_page(rows: list[dict[str, Any]], page: Path = PAGE) -> None:
    if not rows:
        fill_page(page, {"measured": "Nothing measured yet."})
        return
    text = rows_table(summary(rows), ["shape", "what", "measured"])
    if pick(rows, part="growth"):
        draw(rows, page.parent.parent / "images" / "inference.png")
        text += "\n\n![time per token against length and batch](../images/inference.png)"
        for shape in dict.fromkeys(row["shape"] for row in pick(rows, part="growth")):
            for level in sorted({row["level"] for row in pick(rows, part="growth", shape=shape)} - {0}):
                length = break_even(rows, shape, level)
                found = f"from {length:,} tokens on" if length else "at no measured length"
                text += f"\n\n{shape}, one row: a token at level {level} takes no longer than at level 0 {found}."
    for row in pick(rows, part="profile"):
        spent = {**row["ms_by_kind"], "nothing runs": row["ms_nothing_runs"]}
        parts = ", ".join(f"{kind} {value:.2f}" for kind, value in sorted(spent.items(), key=lambda item: -item[1]))
        text += f"\n\nOne token of {row['shape']} at level {row['level']}, {row['length']:,} tokens, {row['ms_per_token']:.2f} ms: {parts}."
    if others := [row for row in rows if row["part"] == "others"]:
        text += "\n\n" + rows_table(others, ["shape", "length", "prefill_seconds", "seconds_per_token", "fast_kernels", "error"])
    fill_page(page, {"measured": text})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=lambda text: text.split(","), default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--shapes", nargs="+", default=["llama2-7b", "llama3-8b"], help="shapes of `dsla bench`, or checkpoints")
    parser.add_argument("--page", action="store_true", help="measure nothing; docs/measured/inference.md and plots from the rows")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of inference.json")
    options = parser.parse_args(arguments)
    if unknown := [part for part in options.parts if part not in PARTS]:
        parser.error(f"unknown parts {', '.join(unknown)}; there are {', '.join(PARTS)}")
    rows = Rows(options.results)
    if not options.page:
        for shape in options.shapes:
            measure_shape(shape, options.parts, rows)
        if "others" in options.parts:
            measure_others(rows)
        print(rows_table(summary(rows.rows), ["shape", "what", "measured"]))
    if options.page:
        make_page(rows.rows)


if __name__ == "__main__":
    main()
