"""The engine under a virtual clock: its own scheduler, level control and memory, with model calls that take the time they were measured to
take and compute nothing.

    python eval/simulation.py --trace AzureLLMInferenceTrace_conv.csv              # forecasts beside what was measured
    python eval/simulation.py --trace AzureLLMInferenceTrace_conv.csv --choose     # also which settings do best
    python eval/simulation.py --page                                               # measures nothing: fills docs/measured/simulation.md

Requests are those of `eval/serving.py`, at the same times. A forecast is made for each run in eval/results/replay.json, with the settings
that it had. `--choose` then varies one setting at a time (`SETTINGS`) and looks for the highest rate within the objectives, as
`eval/serving.py` does. What is not in it: HTTP, the host's work between steps, drafts. Rows go to eval/results/simulation.json, each as
soon as it is there; what is there is not simulated again, unless `--anew` says so.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import get_peft_model
from reporting import RESULTS, fill_page, rows_table, write_results
from serving import FIRST_TARGET, MIXES, TOKEN_TARGET, highest_rate, listed, policy_of, requests_of, within
from serving_page import mean_level
from step_costs import StepCosts, told
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_hf import DSLAConfig
from dsla_hf.core.progress import bar
from dsla_hf.inference.bench.models import PRESETS
from dsla_hf.inference.recorder import power_of_two
from dsla_hf.levels.policies import Policy
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.engine.graphs import piece_sizes
from dsla_hf.serving.engine.request import Event, Request, Sampling
from dsla_hf.serving.engine.runner import ROW, ModelRunner, Running, in_whole_rows
from dsla_hf.serving.replay.client import Outcome, summarize
from dsla_hf.serving.replay.trace import TracedRequest, read_trace, scaled

PAGE = Path(__file__).parent.parent / "docs" / "measured" / "simulation.md"
HEAD_DIM = 2  # of the small model whose blocks stand for those of the shape
IDLE_STEP = 1e-3  # seconds that pass where a step had nothing to do
SETTINGS: dict[str, Sequence[Any]] = {
    "chunk": (512, 1024, 2048, 4096),
    "prompt_share": (0.2, 0.4, 0.6, 1.0),
    "queue_depth": (2, 8, 50),
    "waiting_prompt": (1024, 8192, 16384),
    "waiting_tokens": (4096, 16384, None),
    "token_target": (0.5, 0.75, None),  # of the objective of a token
    "first_target": (0.25, 0.5, None),  # of that of the first
    "step": (4, 8, 16, 32),
    "cool_down": (0.5, 1.0, 5.0),
    "packing": ("none", "level 0", "any level"),
    "pinned": (0.1, 0.5),
}
FORECAST = ["mix", "policy", "requests/s", "requests", "latency, s", "token P95, ms", "first token P95, s", "mean level"]


@dataclass(frozen=True)
class Settings:
    """Those of a server under `load`, as eval/serving.py has them; targets are shares of the objectives, None for none. The last two
    say what the engine and its requests do."""

    chunk: int = 2048
    prompt_share: float = 0.4
    slots: int = 64
    queue_depth: int = 8
    waiting_prompt: int = 8192
    waiting_tokens: int | None = 16384
    token_target: float | None = TOKEN_TARGET
    first_target: float | None = FIRST_TARGET
    step: int = 16
    cool_down: float = 1.0
    max_level: int = 32
    packing: str = "level 0"  # at which levels a call reads pieces of several prompts
    pinned: float = 0.0  # share of the requests that keep a level of their own, drawn of those that calls are recorded for


DEFAULTS = Settings(1024, 0.4, 32, 50, 1024, None, None, None, 4, 5.0, 24)  # of `dsla serve`


@dataclass
class Clock:
    """Seconds that pass only where something costs them."""

    now: float = 0.0

    def __call__(self) -> float:
        return self.now


class CostRunner(ModelRunner):
    """Model calls that take their time, and say that token 0 comes next. `packing` as in `Settings`."""

    def __init__(self, levels: Any, memory: Any, costs: StepCosts, clock: Clock, chunk: int, packing: str):
        super().__init__(levels, memory)
        self.costs, self.clock, self.sizes, self.packing = costs, clock, piece_sizes(chunk), packing
        self.sizes_together = [size for size in self.sizes if size % ROW == 0 and size > ROW]
        self.logits = torch.zeros(memory.num_slots, levels.causal_lm.config.vocab_size)
        self.decoding = self.padding = 0.0  # seconds of all steps, and those that rows between texts took
        self.apart = 0.0  # seconds of these that steps of texts of several levels took, beyond what a call for all would
        self.read = self.packed = 0  # pieces of prompts, and those that shared a call
        self._step: list[tuple[int, int, int, int, float]] = []  # level, texts, tokens, highest slot and seconds of each call of a step

    def prefill(self, request: Request, tokens: int) -> Tensor:
        self.clock.now += self.costs.piece(request.level, request.cached, self._size(self.sizes, tokens))
        self.read += 1
        return self.logits[0]

    def room_together(self, level: int) -> int:
        packs = self.packing == "any level" or (self.packing == "level 0" and not self.levels.converted(level))
        return max(self.sizes_together, default=0) if packs else 0

    def prefill_together(self, pieces: Sequence[tuple[Request, int]]) -> Tensor:
        rows = [(request.cached, in_whole_rows(tokens)) for request, tokens in pieces]
        wanted = sum(tokens for _, tokens in rows)
        rows.append((0, self._size(self.sizes_together, wanted) - wanted))  # rows that nobody reads, as such of a text that begins
        self.clock.now += self.costs.pieces(pieces[0][0].level, rows)
        self.read += len(pieces)
        self.packed += len(pieces)
        return self.logits[: len(pieces)]

    @staticmethod
    def _size(sizes: Sequence[int], tokens: int) -> int:
        return next((size for size in sizes if size >= tokens), tokens)

    def decode(self, level: int, requests: Sequence[Running]) -> Tensor:
        span = max(request.slot for request in requests if request.slot is not None) + 1
        tokens, most = sum(request.cached + 1 for request in requests), self.memory.num_slots
        found, least = (self.costs.decode(level, min(power_of_two(rows), most), tokens) for rows in (span, len(requests)))
        self.decoding += found
        self.padding += found - least
        self.clock.now += found
        self._step.append((level, len(requests), tokens, span, found))
        return self.logits[: len(requests)]

    def step_ends(self) -> None:
        """A step of the engine is over."""
        calls, self._step = self._step, []
        if len(calls) > 1:
            rows = min(power_of_two(max(span for *_, span, _ in calls)), self.memory.num_slots)
            together = self.costs.decode_together([call[:3] for call in calls], rows)
            self.apart += max(sum(seconds for *_, seconds in calls) - together, 0.0)

    @property
    def apart_share(self) -> float:
        """Of the time of steps, what a call for each level takes beyond the least that one for all would."""
        return self.apart / self.decoding if self.decoding else 0.0

    @property
    def packed_share(self) -> float:
        """Of the pieces of prompts, those that shared a call."""
        return self.packed / self.read if self.read else 0.0

    @property
    def padding_share(self) -> float:
        """Of the time of steps, what they would not take if texts always lay in the first slots; a row of padding is taken for a text."""
        return self.padding / self.decoding if self.decoding else 0.0


def small_model(layers: int) -> Any:
    """As many layers as the shape, each with one small head: the engine's bookkeeping is that of the shape."""
    sizes = {"hidden_size": HEAD_DIM, "intermediate_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": HEAD_DIM}
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=4, max_position_embeddings=2**20)
    return get_peft_model(LlamaForCausalLM(config), DSLAConfig(task_type="CAUSAL_LM")).eval()


class Simulation:
    """Engines of one shape on a device with so many blocks of keys and values."""

    def __init__(self, shape: str, costs: StepCosts, blocks: int, max_tokens: int = 17408):
        self.costs, self.blocks, self.max_tokens = costs, blocks, max_tokens
        self.model = small_model(PRESETS[shape]["num_hidden_layers"])

    def run(self, requests: list[TracedRequest], policy: Policy, settings: Settings) -> tuple[list[Outcome], Engine]:
        """What becomes of requests, as a client sees it that nothing lies between, and the engine afterwards."""
        clock = Clock()
        options = EngineOptions(
            slots=settings.slots,
            max_waiting=10**6,
            max_tokens=self.max_tokens,
            kv_bytes=self.blocks * 2 * EngineOptions.block_size * HEAD_DIM * self.model.dtype.itemsize,
            chunk=settings.chunk,
            prompt_share=settings.prompt_share,
            max_level=settings.max_level,
            prefix_reuse=False,  # random prompts share none
        )
        engine = Engine(self.model, policy, options, eos_tokens=set(), clock=clock)
        engine.runner = CostRunner(engine.levels, engine.memory, self.costs, clock, settings.chunk, settings.packing)
        self._cost_folds(engine, clock)
        draws = random.Random(0)
        waiting = scaled(requests, 1.0, max_length=self.max_tokens)[::-1]
        texts: list[tuple[TracedRequest, Request]] = []
        while waiting or engine.busy:
            while waiting and waiting[-1].at <= clock.now:
                traced = waiting.pop()
                level = draws.choice(engine.pinnable) if draws.random() < settings.pinned else None
                text = engine.submit([0] * traced.prompt, traced.generated, _nobody, Sampling(temperature=0.0), level=level)
                texts.append((traced, text))
            if engine.busy:
                before = clock.now
                engine.step()
                engine.runner.step_ends()
                if clock.now == before and engine.scheduler.waiting:
                    clock.now += IDLE_STEP
            elif waiting:
                clock.now = waiting[-1].at
        outcomes = [_outcome(traced, request) for traced, request in texts]
        gc.collect()  # an engine before this one, whose blocks take memory
        return outcomes, engine

    def _cost_folds(self, engine: Engine, clock: Clock) -> None:
        memory = engine.memory

        def fold(slots: list[int], tokens: list[int], old: int, new: int) -> None:
            clock.now += self.costs.fold(new - old, sum(tokens))
            for slot in slots:
                memory.pool.release(slot, engine.levels.rung(new))

        memory.fold = fold  # type: ignore[method-assign]


def _nobody(event: Event) -> None:
    """Times are read from the requests: listeners are told while the next step runs."""


def _outcome(traced: TracedRequest, request: Request) -> Outcome:
    assert request.first_token is not None
    found = Outcome(traced.at, traced.prompt, traced.generated, len(request.tokens))
    found.first_token, found.latency = request.first_token - traced.at, request.last_token - traced.at
    return found


def at_rate(requests: list[TracedRequest], rate: float) -> list[TracedRequest]:
    """The requests, so fast as eval/serving.py sends them."""
    span = max(requests[-1].at * len(requests) / (len(requests) - 1), 1e-3)
    return scaled(requests, span * rate / len(requests))


def blocks_of(shape: str, gigabytes: float, slots: int) -> int:
    """Blocks of keys and values on a GPU of this size beside weights, an adapter's projections and the states of all slots."""
    sizes = PRESETS[shape]
    layers, heads = sizes["num_hidden_layers"], sizes["num_key_value_heads"]
    head_dim = sizes["hidden_size"] // sizes["num_attention_heads"]
    projections = 2 * sizes["hidden_size"] ** 2
    block = sizes["hidden_size"] * (sizes["hidden_size"] * 2 + 2 * heads * head_dim + 3 * sizes["intermediate_size"])
    weights = 2 * (layers * (block + projections) + 2 * sizes["vocab_size"] * sizes["hidden_size"])
    states = slots * layers * 2 * heads * head_dim**2 * 4
    return int((0.9 * (1e9 * gigabytes - weights) - states) / (2 * EngineOptions.block_size * heads * head_dim * 2))


# --- forecasts ------------------------------------------------------------------------------------------------------------


class Work:
    """What is simulated with: requests by mix and number, objectives by mix; and the rows that it leaves."""

    def __init__(self, options: argparse.Namespace, simulation: Simulation, measured: list[dict[str, Any]]):
        self.options, self.simulation, self.measured = options, simulation, measured
        path, inputs = options.results / "simulation.json", [options.inference, options.raises]
        self.about = {
            "shape": options.shape,
            "files": [file.name for file in inputs],
            "gigabytes": options.gigabytes,
            "seed": options.seed,
            "costs": told(simulation.costs),
        }
        before = json.loads(path.read_text()) if path.exists() and not options.anew else {}
        same = all(before.get(name) == value for name, value in self.about.items())
        self.rows: list[dict[str, Any]] = before["rows"] if before and same else []
        self.trace = read_trace(options.trace)

    def row(self, key: dict[str, Any], simulate: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The row with this key, simulated now if it is not there."""
        for row in self.rows:
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = {**key, **simulate()}
        self.rows.append(row)
        write_results("simulation", self.rows, folder=self.options.results, **self.about)
        return row

    def objective(self, mix: str) -> float:
        """Seconds per token that were allowed when it was measured."""
        return float(next(row["token_target"] for row in self.measured if row["mix"] == mix and row["rate"] is not None))

    def simulated(self, mix: str, policy: str, rate: float, count: int, settings: Settings) -> dict[str, Any]:
        objective = self.objective(mix)
        targets = {"first_target": settings.first_target, "token_target": settings.token_target}
        chosen = policy_of(policy, settings, self.options.slo_first, objective, **targets)
        if policy == "fixed":
            settings = replace(settings, max_level=0)
        requests = requests_of(self.trace, mix, count, self.options.seed)
        outcomes, engine = self.simulation.run(at_rate(requests, rate), chosen, settings)
        summary = summarize(outcomes, self.options.slo_first, objective)
        tokens = {str(level): number for level, number in enumerate(engine.tokens_at_level) if number}
        return {
            **{name: summary[name] for name in ("latency", "first_token", "per_token", "seconds", "slo")},
            "meets": within(summary, self.options.slo_first, objective),
            "mean_level": mean_level(tokens),
            "changes": engine.control.count,
            **{name: getattr(engine.runner, name) for name in ("padding_share", "apart_share", "packed_share")},
        }


def forecast(work: Work) -> None:
    """A row for each run that was measured to its end."""
    for row in bar([row for row in work.measured if row["rate"] is not None and row["cut"] is None], desc="forecasts", unit="run"):
        setup = row["setup"]
        settings = Settings(chunk=setup["chunk"], prompt_share=setup["prompt_share"], slots=setup["slots"], max_level=setup["max_level"])
        measured = {name: row[name] for name in ("latency", "first_token", "per_token", "meets")}
        measured["mean_level"] = mean_level(row["tokens_at_level"])
        case = {"part": "forecast", "mix": row["mix"], "policy": row["policy"], "rate": row["rate"], "requests": setup["requests"]}
        case |= {"max_level": setup["max_level"], "measured": measured}

        def simulate(row: dict[str, Any] = row, settings: Settings = settings) -> dict[str, Any]:
            return {"forecast": work.simulated(row["mix"], row["policy"], row["rate"], row["setup"]["requests"], settings)}

        work.row(case, simulate)


def cases() -> list[tuple[str, Any, str, Settings]]:
    """(setting, value, policy, settings) of `--choose`."""
    found = [("as measured", None, "load", Settings()), ("level 0", None, "fixed", Settings()), ("defaults", None, "load", DEFAULTS)]
    more: dict[str, Any] = {"cool_down": 1.0, "token_target": 0.75, "chunk": 512, "slots": 64}
    found += [(f"defaults but {name}", value, "load", replace(DEFAULTS, **{name: value})) for name, value in more.items()]
    for name, values in SETTINGS.items():
        changed = [(name, value, "load", replace(Settings(), **{name: value})) for value in values]
        found += [case for case in changed if case[3] != Settings()]
    return found


def choose(work: Work) -> None:
    """For each setting and value the highest rate within the objectives, and how requests fare at one rate."""
    options = work.options
    every = [(mix, *case) for mix in options.mix for case in cases()]
    for mix, name, value, policy, settings in bar(every, desc="settings", unit="value"):

        def simulate(mix: str = mix, policy: str = policy, settings: Settings = settings) -> dict[str, Any]:
            found: dict[float, dict[str, Any]] = {}

            def meets(rate: float) -> bool:
                found[rate] = work.simulated(mix, policy, rate, options.requests, settings)
                return bool(found[rate]["meets"])

            best = highest_rate(meets, options.compared_rate, tolerance=options.tolerance, most=8, grow=1.5)
            beside = found[options.compared_rate]
            return {
                "highest_rate": best,
                **{
                    part: beside[part]
                    for part in ("latency", "first_token", "per_token", "mean_level", "changes", "packed_share", "apart_share")
                },
            }

        key = {"part": "choose", "mix": mix, "setting": name, "value": value, "requests": options.requests, "at": options.compared_rate}
        work.row({**key, "tolerance": options.tolerance}, simulate)


# --- the page ----------------------------------------------------------------------------------------------------------------


def pair(forecast: float | None, measured: float | None, scale: float = 1.0) -> str:
    return f"{scale * (forecast or 0):.3g} / {scale * (measured or 0):.3g}"


def forecast_table(rows: list[dict[str, Any]]) -> str:
    """Forecast / measured."""
    lines = []
    for row in sorted(rows, key=lambda row: (row["mix"], row["requests"], row["max_level"], row["rate"], row["policy"])):
        ours, theirs = row["forecast"], row["measured"]
        lines.append(
            {
                "mix": row["mix"],
                "policy": row["policy"] + (f", up to {row['max_level']}" if row["policy"] == "load" else ""),
                "requests/s": row["rate"],
                "requests": row["requests"],
                "latency, s": pair(ours["latency"]["mean"], theirs["latency"]["mean"]),
                "token P95, ms": pair(ours["per_token"]["p95"], theirs["per_token"]["p95"], 1e3),
                "first token P95, s": pair(ours["first_token"]["p95"], theirs["first_token"]["p95"]),
                "mean level": pair(ours["mean_level"], theirs["mean_level"]) if row["policy"] == "load" else None,
            }
        )
    return rows_table(lines, FORECAST)


def errors(rows: list[dict[str, Any]]) -> str:
    """How far forecasts are off, in a sentence."""

    def off(name: str, part: str) -> list[float]:
        return [row["forecast"][name][part] / row["measured"][name][part] - 1 for row in rows]

    parts = []
    for what, name, part in (
        ("mean latency", "latency", "mean"),
        ("token P95", "per_token", "p95"),
        ("first token P95", "first_token", "p95"),
    ):
        found = off(name, part)
        parts.append(f"{what} {median(found):+.0%} ({min(found):+.0%} to {max(found):+.0%})")
    agree = sum(row["forecast"]["meets"] == row["measured"]["meets"] for row in rows)
    return (
        f"Forecast over measured, median and range of {len(rows)} runs: {'; '.join(parts)}. "
        f"Whether a run is within both objectives is told rightly for {agree} of {len(rows)}."
    )


def padding(rows: list[dict[str, Any]]) -> str:
    """What rows between texts cost, in a sentence."""
    parts = []
    for policy, name in (("fixed", "at a fixed level"), ("load", "under `load`")):
        if shares := [row["forecast"]["padding_share"] for row in rows if row["policy"] == policy]:
            parts.append(f"{median(shares):.1%} of the time of steps ({min(shares):.1%} to {max(shares):.1%}) {name}")
    return f"Padding between texts, a row of it taken for a text, costs (median and range) {' and '.join(parts)}."


def calls(rows: list[dict[str, Any]]) -> str:
    """How often prompts shared a call, and what calls for several levels cost, in two sentences."""
    shared = [row["forecast"]["packed_share"] for row in rows if row["policy"] == "fixed"]
    apart = [row["forecast"]["apart_share"] for row in rows if row["policy"] == "load"]
    sentences = []
    if shared:
        sentences.append(
            f"At level 0 {median(shared):.0%} of the pieces of prompts shared a call ({min(shared):.0%} to {max(shared):.0%})."
        )
    if apart:
        sentences.append(
            f"Under `load` calls of a second level in a step took {median(apart):.1%} of the time of steps "
            f"({min(apart):.1%} to {max(apart):.1%}) beyond the least that one call for both would take."
        )
    return " ".join(sentences)


def told_of(rows: list[dict[str, Any]]) -> str:
    return " ".join((errors(rows), padding(rows), calls(rows)))


def choose_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        {
            "mix": row["mix"],
            "setting": row["setting"],
            "value": "none" if row["value"] is None and row["setting"] in SETTINGS else row["value"],
            "highest rate within": row["highest_rate"] or "none",
            f"at {row['at']:g}/s: latency, s": row["latency"]["mean"],
            "token P95, ms": 1e3 * row["per_token"]["p95"],
            "first token P95, s": row["first_token"]["p95"],
            "mean level": row["mean_level"],
            "changes": row["changes"],
            "pieces that shared a call": f"{row['packed_share']:.0%}",
            "second calls": f"{row['apart_share']:.1%}",
        }
        for row in rows
    ]
    return rows_table(lines, list(lines[0]))


def page_parts(found: dict[str, Any]) -> dict[str, str]:
    """What the marks of the page hold."""
    rows = found["rows"]
    forecasts, chosen = ([row for row in rows if row["part"] == part] for part in ("forecast", "choose"))
    costs = rows_table(found["costs"], list(found["costs"][0]))
    about = f"{found['shape']}, times of {', '.join(found['files'])}; `{found['command']}`"
    parts = {"costs": f"{about}\n\n{costs}", "forecast": f"{told_of(forecasts)}\n\n{forecast_table(forecasts)}"}
    return {**parts, "settings": choose_table(chosen)} if chosen else parts


# --- command line -------------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", help="CSV with the columns of the Azure LLM inference traces")
    parser.add_argument("--shape", default="llama2-7b", choices=tuple(PRESETS))
    parser.add_argument("--inference", type=Path, default=RESULTS / "inference.json", help="measured steps and prompts")
    parser.add_argument("--raises", type=Path, default=RESULTS / "raises.json", help="measured raises")
    parser.add_argument("--replay", type=Path, default=RESULTS / "replay.json", help="measured runs, for objectives and to compare with")
    parser.add_argument("--gigabytes", type=float, default=141.0, help="of the GPU")
    parser.add_argument("--choose", action="store_true", help="vary settings, too")
    parser.add_argument("--mix", type=listed(str, MIXES), default=list(MIXES), help="of --choose")
    parser.add_argument("--anew", action="store_true", help="simulate again what is stored")
    parser.add_argument("--requests", type=int, default=160, help="of a run of --choose")
    parser.add_argument("--compared-rate", type=float, default=4.0, help="at which --choose compares times, and with which searches begin")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the highest rate")
    parser.add_argument("--slo-first", type=float, default=2.0, help="seconds to the first token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of simulation.json")
    parser.add_argument("--page", action="store_true", help="simulate nothing; fill the page from the rows")
    options = parser.parse_args(arguments)
    if options.trace is None and not options.page:
        parser.error("--trace is needed, unless --page is given")
    for name in ("gigabytes", "requests", "compared_rate", "tolerance", "slo_first"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a positive number, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.page:
        fill_page(PAGE, page_parts(json.loads((options.results / "simulation.json").read_text())))
        return 0
    costs = StepCosts.read(options.shape, options.inference, options.raises)
    measured = [row for row in json.loads(options.replay.read_text())["rows"] if row["shape"] == options.shape]
    if not measured:
        raise ValueError(f"{options.replay.name} has no runs of {options.shape}: measure some with eval/serving.py, for the objectives")
    slots = max(row["setup"]["slots"] for row in measured)
    simulation = Simulation(options.shape, costs, blocks_of(options.shape, options.gigabytes, slots))
    work = Work(options, simulation, measured)
    forecast(work)
    if options.choose:
        choose(work)
    print(errors([row for row in work.rows if row["part"] == "forecast"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
