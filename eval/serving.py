"""Load-aware levels against level 0: highest rate within the objectives, and latency below, at and above it, on a trace.

    python eval/serving.py --trace AzureLLMInferenceTrace_conv.csv
    python eval/serving.py --trace AzureLLMInferenceTrace_conv.csv --mix paper --requests 720 --rates 11,9
    python eval/serving.py --trace AzureLLMInferenceTrace_conv.csv --mix paper --requests 720 --rates 9 --temperature 1,0
    python eval/serving.py --page

One model with random weights and a fresh adapter, one engine. The server of `dsla serve` runs in a thread on a free port of this machine,
the client of `dsla replay` in a process of its own, so that it takes no time from the engine; with `--direct` requests go to the engine
without HTTP. Policies take turns on the engine: `fixed` is level 0, `load` follows the load up to `--max-level`. For every mix:

1. requests one at a time at level 0: twice their time per token is the objective of a token;
2. the highest rate at which level 0 meets the objectives (P95), by doubling and bisection; a run that cannot meet them any more is cut;
3. both policies at `--shares` of that rate;
4. the highest rate of `load`, and `fixed` at that rate.

A run sends `--requests` requests of the trace, one after another, whose mean lengths are those of the whole, sped up or slowed down to the
rate; `paper` draws their prompts to the paper's mix. All runs of a mix send the same ones. Tokens are drawn at `--temperature`; with more
than one, all of this is measured at each. A row is written to eval/results/replay.json as soon as it is measured; what is there already is
not measured again. `--page` measures nothing: it draws the plot and fills docs/measured/serving.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import multiprocessing
import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import uvicorn
from peft import get_peft_model
from reporting import RESULTS, write_results
from serving_page import POLICIES, page_part, stored_rows, with_shares, write_page
from tokenizers import Tokenizer, models
from tqdm import tqdm
from transformers import AutoConfig, PreTrainedTokenizerFast

from dsla_hf import DSLAConfig
from dsla_hf.inference.bench.models import preset_config, random_model
from dsla_hf.inference.fusion import LONG_PROMPT
from dsla_hf.inference.graph import CudaRecording
from dsla_hf.levels.policies import FixedLevel, Load, Policy
from dsla_hf.models.configuration import resolve_level
from dsla_hf.serving.control import LevelControl
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.engine.graphs import GraphRunner
from dsla_hf.serving.engine.request import Event, Sampling
from dsla_hf.serving.engine.scheduler import QueueFull
from dsla_hf.serving.http.api import ApiOptions, build_app
from dsla_hf.serving.replay.client import Outcome, ReplayOptions, replay, summarize, tokens_at_level
from dsla_hf.serving.replay.trace import COLUMNS, TracedRequest, drawn_to_mix, read_trace, scaled

SHAPES = ("llama2-7b", "llama3-8b", "tiny")
TINY = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "vocab_size": 97}
MIXES = ("plain", "paper")
ALONE = 6  # requests that are measured one at a time
FIRST_TARGET, TOKEN_TARGET = 0.5, 0.75  # shares of the objectives at which `load` rises
YARDSTICK_LAYERS = 16
LOOK_SECONDS = 0.1
SILENT = "import os, sys; sys.stdout = open(os.devnull, 'w')"  # what the client runs first: rows are told here
# A row replaces an earlier one that is alike in these.
KEY = ("shape", "mix", "policy", "rate", "control", "setup")


# --- which requests ---------------------------------------------------------------------------------------------------


def typical_part(trace: list[TracedRequest], count: int) -> list[TracedRequest]:
    """`count` requests of the trace, one after another, whose mean lengths are nearest to those of the whole."""
    count = min(count, len(trace))
    sums = [list(accumulate(getattr(request, name) for request in trace)) for name in ("prompt", "generated")]
    averages = [column[-1] / len(trace) for column in sums]

    def distance(start: int) -> float:
        before = [column[start - 1] if start else 0 for column in sums]
        found = [(column[start + count - 1] - first) / count for column, first in zip(sums, before, strict=True)]
        return sum(abs(value / average - 1) for value, average in zip(found, averages, strict=True))

    start = min(range(len(trace) - count + 1), key=distance)
    return [replace(request, at=request.at - trace[start].at) for request in trace[start : start + count]]


def requests_of(trace: list[TracedRequest], mix: str, count: int, seed: int) -> list[TracedRequest]:
    """The requests of a run, `paper` ones with redrawn lengths."""
    part = typical_part(trace, count)
    return drawn_to_mix(part, seed=seed) if mix == "paper" else part


def write_trace(requests: list[TracedRequest], path: Path) -> None:
    """In the format that `dsla replay` reads."""
    start = datetime(2023, 11, 16)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for request in requests:
            writer.writerow([(start + timedelta(seconds=request.at)).isoformat(" ", "microseconds"), request.prompt, request.generated])


# --- which rates --------------------------------------------------------------------------------------------------------


def rounded(rate: float) -> float:
    """To three digits: rates are keys of rows."""
    return float(f"{rate:.3g}")


def bracket(found: Mapping[float, bool]) -> tuple[float | None, float | None]:
    """The highest rate that met the objectives, and the lowest above it that did not."""
    low = max((rate for rate, met in found.items() if met), default=None)
    high = min((rate for rate, met in found.items() if not met and (low is None or rate > low)), default=None)
    return low, high


def highest_rate(
    meets: Callable[[float], bool],
    first: float,
    *,
    tolerance: float = 0.1,
    most: int = 6,
    grow: float = 2.0,
    known: Mapping[float, bool] | None = None,
) -> float | None:
    """The highest rate that `meets`, within `tolerance`, asked `most` times; None if no rate that was tried does.

    first: the rate to begin with, where nothing is `known`. grow: from a rate that meets to the next.
    """
    found = dict(known or {})
    for _ in range(most):
        low, high = bracket(found)
        if low is None:
            rate = first if high is None else high / grow
        elif high is None:
            rate = low * grow
        elif high <= low * (1 + tolerance):
            break
        else:
            rate = math.sqrt(low * high)
        rate = rounded(rate)
        if rate in found:
            break
        found[rate] = meets(rate)
    return bracket(found)[0]


# --- quality ------------------------------------------------------------------------------------------------------------


def yardstick(path: Path) -> list[tuple[float, float]]:
    """(share of layers that are DSLA, increase of perplexity) of the default recipe, from level 0 on, means over seeds."""
    rows = [row for row in json.loads(path.read_text())["rows"] if row["arm"] == "default"]
    levels = sorted({row["level"] for row in rows})
    perplexity = {level: mean(row["novels"] for row in rows if row["level"] == level) for level in levels}
    return [(level / YARDSTICK_LAYERS, perplexity[level] / perplexity[0] - 1) for level in levels]


def quality_cost(tokens: Mapping[str, int], layers: int, table: list[tuple[float, float]]) -> float | None:
    """Increase of the yardstick's perplexity at the same shares of layers, weighted by the tokens at each level."""

    def increase(share: float) -> float:
        for (low, at_low), (high, at_high) in pairwise(table):
            if share <= high:
                return at_low + (at_high - at_low) * (share - low) / (high - low)
        return table[-1][1]

    count = sum(tokens.values())
    return sum(number * increase(int(level) / layers) for level, number in tokens.items()) / count if count else None


# --- the server -----------------------------------------------------------------------------------------------------------


def make_model(shape: str, where: torch.device) -> Any:
    """Random weights and a fresh adapter for all layers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **TINY, max_position_embeddings=2048) if shape == "tiny" else preset_config(shape)
    base = random_model(config, torch.bfloat16 if where.type == "cuda" else torch.float32, where)
    with where:
        return get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM")).to(where).eval()


def numbers_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Every token is a word, its number: what the server decodes has the length of text."""
    words = {f"w{number}": number for number in range(size)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0")


def policy_of(
    name: str,
    settings: Any,
    first: float,
    per_token: float | None,
    *,
    first_target: float | None = FIRST_TARGET,
    token_target: float | None = TOKEN_TARGET,
) -> Policy:
    """`fixed`, or `load`, which rises before objectives are missed: at the targets, shares of them; None: of none.

    settings: with `queue_depth`, `waiting_prompt`, `waiting_tokens`, `cool_down` and `step`. first, per_token: objectives in seconds, of
    the first token and of each.
    """
    if name == "fixed":
        return FixedLevel(0)
    return Load(
        queue_depth=settings.queue_depth,
        waiting_prompt=settings.waiting_prompt,
        waiting_tokens=settings.waiting_tokens,
        free_share=0.1,
        seconds_to_first_token=None if first_target is None else first_target * first,
        seconds_per_token=None if token_target is None or per_token is None else token_target * per_token,
        cool_down=settings.cool_down,
        step=settings.step,
        max_level="100%",  # the engine's limit holds
    )


def begin_anew(engine: Engine, policy: Policy, highest: int) -> None:
    """Level, measured times and size of chunks as a new engine has them; it becomes idle first."""
    while engine.busy:
        time.sleep(0.01)
    options = engine.options
    waits = {name: getattr(options, name) for name in ("hold", "busy_hold", "cool_down")}
    engine.control = LevelControl(policy, lowest=0, highest=highest, **waits, clock=engine.clock)
    for times in (engine.first_tokens, engine.token_times):
        times.clear()
    engine.chunk = options.chunk


def warm_up(engine: Engine, highest: int, step: int, temperatures: Sequence[float] = (1.0,)) -> None:
    """Compile and record what runs will need: prompts, folds, draws, and steps at every level that the policy can reach with any number of
    rows. To be called before the engine has its thread."""

    def read(level: int, then: int, temperature: float) -> None:
        begin_anew(engine, FixedLevel(level), level)
        for length in (40, 2 * engine.chunk + 3, LONG_PROMPT + 61):
            prompt = [1] * min(length, engine.max_tokens - 8)
            engine.submit(prompt, 8, lambda event: None, Sampling(temperature=temperature, ignore_eos=True))
        for _ in range(5):
            engine.step()
        engine.control.policy, engine.control.highest = FixedLevel(then), max(level, then)
        while engine.busy:
            engine.step()

    for level, then in ((0, 0), (highest, highest), (0, highest)):
        read(level, then, temperatures[0])
    for temperature in temperatures[1:]:
        read(0, 0, temperature)
    engine.prepare(sorted({*range(0, highest, step), highest}))


@contextmanager
def served(app: Any) -> Iterator[str]:
    """The app in a thread, on a free port of this machine: its address."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server does not start: its log says why")
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Watch:
    """Looks on while a replay runs, and says when it is hopeless.

    late: requests that may get their first token later than `slo_first`; None: any number. deadline: seconds from the start.
    """

    def __init__(self, engine: Engine, slo_first: float, late: int | None, deadline: float):
        self.engine, self.slo_first, self.late, self.deadline = engine, slo_first, late, deadline
        self.start = engine.clock()
        self.late_ones: set[int] = set()
        self.most_waiting = self.most_running = 0

    def hopeless(self) -> str | None:
        """Why the run need not go on, None if it may."""
        now, scheduler = self.engine.clock(), self.engine.scheduler
        waiting, running = list(scheduler.waiting), scheduler.running
        self.most_waiting, self.most_running = max(self.most_waiting, len(waiting)), max(self.most_running, len(running))
        here = [*waiting, *running]
        self.late_ones |= {request.number for request in here if request.first_token is None and now - request.arrived > self.slo_first}
        if self.late is not None and len(self.late_ones) > self.late:
            return f"{len(self.late_ones)} requests without a first token after {self.slo_first:g} s"
        if now - self.start > self.deadline:
            return f"{len(here)} requests not answered after {now - self.start:.0f} s"
        return None


def cut(engine: Engine, until: Future[Any]) -> None:
    """Refuse and forget all requests until the replay has ended."""
    before, engine.scheduler.max_waiting = engine.scheduler.max_waiting, 0
    while not until.done():
        for request in [*engine.scheduler.waiting, *engine.scheduler.running]:
            engine.cancel(request)
        time.sleep(LOOK_SECONDS)
    engine.scheduler.max_waiting = before


def send_directly(engine: Engine, requests: list[TracedRequest], seed: int, temperature: float) -> dict[str, Any]:
    """The part of what `dsla replay` says that is needed here, of requests that are handed to the engine at their times."""
    outcomes, events = [Outcome(x.at, x.prompt, x.generated) for x in requests], queue.SimpleQueue[tuple[int, float, Event]]()
    draws = random.Random(seed)
    prompts = [[draws.randrange(engine.vocab_size) for _ in range(x.prompt)] for x in requests]
    before, start, left = list(engine.tokens_at_level), time.perf_counter(), len(requests)
    for number, (request, outcome, prompt) in enumerate(zip(requests, outcomes, prompts, strict=True)):
        time.sleep(max(start + request.at - time.perf_counter(), 0))
        outcome.sent = time.perf_counter() - start

        def listener(event: Event, number: int = number) -> None:
            events.put((number, time.perf_counter() - start, event))

        try:
            sampling = Sampling(temperature=temperature, seed=seed + number, ignore_eos=True)
            engine.submit(prompt, request.generated, listener, sampling)
        except (ValueError, QueueFull) as error:
            outcome.error, left = repr(error), left - 1
    while left:
        number, now, event = events.get()
        outcome = outcomes[number]
        if event.token is None:
            left -= 1
            outcome.error = None if event.finish == "length" else repr(event.error or event.finish)
            continue
        outcome.tokens, outcome.latency = outcome.tokens + 1, now - outcome.sent
        outcome.first_token = outcome.latency if outcome.first_token is None else outcome.first_token
    looks = [{"tokens_at_level": before}, {"tokens_at_level": list(engine.tokens_at_level)}]
    return {"requests": [asdict(outcome) for outcome in outcomes], "level_over_time": looks}


# --- runs -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One measurement: `part` is what it is for, "alone", "search" or "shares"."""

    mix: str
    policy: str
    rate: float | None
    part: str


class Measurement:
    """Runs at one temperature, and the rows that they leave. A row that is stored already is not measured again."""

    def __init__(
        self,
        options: argparse.Namespace,
        temperature: float,
        engine: Engine,
        highest: int,
        url: str | None,
        client: Executor,
        folder: Path,
    ):
        self.options, self.temperature, self.engine, self.highest = options, temperature, engine, highest
        self.url, self.client, self.folder = url, client, folder
        self.trace = read_trace(options.trace)
        self.table = yardstick(options.quality)
        self.rows = stored_rows(options.results)
        sizes = ("slots", "chunk", "prompt_share", "max_tokens", "kv_bytes")
        self.setup = {
            "trace": Path(options.trace).name,
            "requests": options.requests,
            "temperature": temperature,
            "seed": options.seed,
            "max_level": highest,
            **{name: getattr(engine.options, name) for name in sizes},
            "direct": options.direct,
            "graphs": isinstance(engine.runner, GraphRunner),
            "device": torch.cuda.get_device_name() if engine.levels.device.type == "cuda" else "CPU",
        }
        self.bar = tqdm(unit="run", disable=None)

    def evaluate(self, mix: str) -> None:
        """All runs of a mix."""
        options, base = self.options, None
        self.row(Run(mix, "fixed", None, "alone"))
        rates = list(options.rates or ())
        if not rates:
            base = highest_rate(
                lambda rate: self.row(Run(mix, "fixed", rate, "search"))["meets"],
                options.first_rate,
                tolerance=options.tolerance,
                most=options.most_runs,
            )
            if base is None:
                self.bar.write(f"{mix}: level 0 meets the objectives at no rate that was tried")
                return
            rates = sorted({rounded(base * share) for share in options.shares})
        for rate in rates:
            for policy in options.policies:
                self.row(Run(mix, policy, rate, "shares"))
        if base is None or "load" not in options.policies:
            return
        best = highest_rate(
            lambda rate: self.row(Run(mix, "load", rate, "search"))["meets"],
            base,
            tolerance=options.tolerance,
            most=max(options.most_runs // 2, 1),  # the shares have narrowed it down
            grow=1.5,
            known={row["rate"]: row["meets"] for row in self.of(mix) if row["policy"] == "load" and row["part"] == "shares"},
        )
        if best is not None and best > max(rates):
            for policy in options.policies:
                self.row(Run(mix, policy, best, "shares"))

    def of(self, mix: str) -> list[dict[str, Any]]:
        """The rows of a mix that were measured as this is."""
        return [row for row in self.rows if (row["shape"], row["mix"], row["setup"]) == (self.options.shape, mix, self.setup)]

    def row(self, run: Run) -> dict[str, Any]:
        """The row of a run, measured now if it is not there. One that was cut in a search serves the search only."""
        per_token = None if run.part == "alone" else self.token_target(run.mix)
        policy = repr(policy_of(run.policy, self.options, self.options.slo_first, per_token))
        for row in self.of(run.mix):
            same = (row["policy"], row["rate"], row["control"]) == (run.policy, run.rate, policy)
            if same and (row["cut"] is None or row["part"] == run.part):
                return row
        pace = "one at a time" if run.rate is None else f"{run.rate:g} requests/s"
        what = f"temperature {self.temperature:g}, {run.mix}, {run.policy}, {pace}"
        self.bar.set_description(what)
        found = self.alone(run) if run.rate is None else self.measure(run, run.rate)
        row = {"shape": self.options.shape, **asdict(run), "control": policy, **found, "setup": self.setup}
        others = [other for other in self.rows if any(other[name] != row[name] for name in KEY)]
        self.rows = with_shares([*others, row])
        write_results("replay", self.rows, folder=self.options.results)
        self.bar.update()
        self.bar.write(f"{what}: {told(row)}")
        return row

    def token_target(self, mix: str) -> float:
        """Seconds per token that are allowed: twice what requests take alone."""
        alone = self.row(Run(mix, "fixed", None, "alone"))
        return 2 * alone["per_token"]["p50"]

    def alone(self, run: Run) -> dict[str, Any]:
        """Requests one at a time."""
        outcomes: list[Outcome] = []
        begin_anew(self.engine, FixedLevel(0), 0)
        for request in requests_of(self.trace, run.mix, ALONE, self.options.seed):
            # At least some tokens after the first, whose time is asked for.
            request = TracedRequest(0.0, request.prompt, max(request.generated, 16))
            result, _ = self.replayed([request], 1.0, None)
            outcomes += outcomes_of(result)
        summary = summarize(outcomes, self.options.slo_first, math.inf)
        if summary["errors"]:
            raise RuntimeError(f"requests that were alone failed: {[outcome.error for outcome in outcomes]}")
        return {**summary, "cut": None}

    def measure(self, run: Run, rate: float) -> dict[str, Any]:
        """Requests of a part of the trace at a rate."""
        options, engine = self.options, self.engine
        target = self.token_target(run.mix)
        requests = requests_of(self.trace, run.mix, options.requests, options.seed)
        span = max(requests[-1].at * len(requests) / (len(requests) - 1), 1e-3)
        begin_anew(engine, policy_of(run.policy, options, options.slo_first, target), 0 if run.policy == "fixed" else self.highest)
        # So many may be late without moving the percentile above the objective.
        late = math.floor(0.05 * (len(requests) - 1)) + 1 if run.part == "search" else None
        watch = Watch(engine, options.slo_first, late, len(requests) / rate + options.patience)
        result, why = self.replayed(requests, span * rate / len(requests), watch)
        outcomes = outcomes_of(result)
        summary = summarize(outcomes, options.slo_first, target)
        tokens = tokens_at_level(result["level_over_time"]) or {}
        if run.policy == "fixed" and set(tokens) - {"0"}:
            raise RuntimeError(f"level 0 was to be held, and tokens were generated at {tokens}")
        return {
            **summary,
            "cut": why,
            "meets": why is None and within(summary, options.slo_first, target),
            "token_target": target,
            "prompt_tokens": mean(outcome.prompt for outcome in outcomes),
            "wanted_tokens": mean(outcome.wanted for outcome in outcomes),
            "most_waiting": watch.most_waiting,
            "most_running": watch.most_running,
            "level_over_time": [[0.0, 0], *([round(c.seconds - watch.start, 2), c.new] for c in engine.control.changes)],
            "reasons": [change.reason.split(" (")[0] for change in list(engine.control.changes)[:20]],
            "tokens_at_level": tokens,
            "yardstick_perplexity_increase": quality_cost(tokens, engine.levels.num_layers, self.table),
        }

    def replayed(self, requests: list[TracedRequest], speed: float, watch: Watch | None) -> tuple[dict[str, Any], str | None]:
        """What `dsla replay` says of these requests, and why they were cut short, if they were."""
        if self.url is None:
            timed = scaled(requests, speed, max_length=self.engine.max_tokens)
            future = self.client.submit(send_directly, self.engine, timed, self.options.seed, self.temperature)
        else:
            path = self.folder / "trace.csv"
            write_trace(requests, path)
            options = ReplayOptions(
                trace=str(path),
                url=self.url,
                out=str(self.folder),
                model=self.options.shape,
                rate=speed,
                max_length=self.engine.max_tokens,
                vocab=self.engine.vocab_size,
                seed=self.options.seed,
                temperature=self.temperature,
            )
            future = self.client.submit(replay, options)
        why = None
        while watch is not None and not future.done():
            if (why := watch.hopeless()) is not None:
                cut(self.engine, future)
                break
            self.bar.set_postfix(level=self.engine.control.level, waiting=watch.most_waiting, running=watch.most_running)
            time.sleep(LOOK_SECONDS)
        return future.result(), why


def outcomes_of(result: dict[str, Any]) -> list[Outcome]:
    return [Outcome(**{name: value for name, value in request.items() if name != "per_token"}) for request in result["requests"]]


def within(summary: dict[str, Any], slo_first: float, token_target: float) -> bool:
    """Whether all was answered, and P95 meets both objectives."""
    if summary["errors"] or summary["first_token"]["p95"] > slo_first:
        return False
    return "per_token" not in summary or summary["per_token"]["p95"] <= token_target


def told(row: dict[str, Any]) -> str:
    """A row for a terminal."""
    if row["rate"] is None:
        return f"{1e3 * row['per_token']['p50']:.2f} ms a token, first token after {1e3 * row['first_token']['p50']:.0f} ms"
    if row["cut"] is not None:
        return f"cut: {row['cut']}"
    times = f"latency {row['latency']['mean']:.2f} s, first token P95 {row['first_token']['p95']:.2f} s"
    times += f", token P95 {1e3 * row['per_token']['p95']:.1f} ms" if "per_token" in row else ""
    return f"{times}, {'within' if row['meets'] else 'not within'} the objectives"


# --- command line -------------------------------------------------------------------------------------------------------------


def listed(kind: Callable[[str], Any], allowed: tuple[str, ...] | None = None, *, zero: bool = False) -> Callable[[str], list[Any]]:
    """A parser of comma-separated values; numbers must be positive, or with `zero` not negative."""

    def parse(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",") if part]
        if wrong := [value for value in values if allowed is not None and value not in allowed]:
            raise argparse.ArgumentTypeError(f"no {wrong}; there are {', '.join(allowed or ())}")
        numbers = [value for value in values if isinstance(value, float)]
        if not values or any(not 0 <= value < math.inf or (value == 0 and not zero) for value in numbers):
            raise argparse.ArgumentTypeError(f"values must be {'numbers of 0 or more' if zero else 'positive numbers'}, got {text!r}")
        return values

    return parse


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", help="CSV with the columns of the Azure LLM inference traces")
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--mix", type=listed(str, MIXES), default=list(MIXES), help="lengths as in the trace, or drawn to the paper's mix")
    parser.add_argument("--policies", type=listed(str, POLICIES), default=list(POLICIES))
    parser.add_argument("--requests", type=int, default=80, help="of a run")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds after the last one until a run counts as hopeless")
    parser.add_argument("--rates", type=listed(float), help="requests per second, instead of a search and shares")
    parser.add_argument("--shares", type=listed(float), default=[0.5, 0.8, 1.0, 1.1, 1.2], help="of level 0's highest rate")
    parser.add_argument("--first-rate", type=float, default=2.0, help="with which the search begins")
    parser.add_argument("--tolerance", type=float, default=0.2, help="of the highest rate")
    parser.add_argument("--most-runs", type=int, default=6, help="of the search for level 0; half as many for load")
    parser.add_argument("--slo-first", type=float, default=2.0, help="seconds to the first token")
    parser.add_argument("--max-level", default="100%")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens read in a step")
    parser.add_argument("--prompt-share", type=float, default=0.4, help="of the time that prompts may take from texts that are generated")
    parser.add_argument("--max-tokens", type=int, default=17408, help="longest text; longer prompts are cut")
    parser.add_argument("--kv-gib", type=float, help="GiB for keys and values; else what is free")
    parser.add_argument("--direct", action="store_true", help="requests go to the engine without HTTP")
    parser.add_argument("--no-graphs", dest="graphs", action="store_false", help="steps run as they are, also on a GPU")
    parser.add_argument("--queue-depth", type=int, default=8, help="load: requests that wait")
    parser.add_argument("--waiting-prompt", type=int, default=8192, help="load: tokens of the longest of them")
    parser.add_argument("--waiting-tokens", type=int, default=16384, help="load: prompt tokens that are not read yet")
    parser.add_argument("--cool-down", type=float, default=1.0, help="load: seconds between two changes")
    parser.add_argument("--step", type=int, default=16, help="load: layers of a change")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--temperature", type=listed(float, zero=True), default=[1.0], help="of the draws, one or several; 0: the likeliest tokens"
    )
    parser.add_argument("--quality", type=Path, default=RESULTS / "distillation.json", help="the yardstick's perplexity at every level")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of replay.json")
    parser.add_argument("--page", action="store_true", help="measure nothing; plot and docs/measured/serving.md from the rows")
    options = parser.parse_args(arguments)
    if options.trace is None and not options.page:
        parser.error("--trace is needed, unless --page is given")
    if options.requests < 2:
        parser.error(f"--requests must be 2 or more, got {options.requests}")
    for name in ("patience", "first_rate", "tolerance", "slo_first"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a positive number, got {getattr(options, name)}")
    return options


@contextmanager
def reached(engine: Engine, client: Executor, options: argparse.Namespace) -> Iterator[tuple[str | None, Executor]]:
    """The engine at work: where the client finds it (None: in this process), and what runs the client."""
    if options.direct:
        engine.start()
        with ThreadPoolExecutor(1) as own:
            yield None, own
        engine.stop(drain=False)
        return
    app = build_app(engine, numbers_tokenizer(engine.vocab_size), ApiOptions(options.shape, max_new_tokens=engine.max_tokens))
    with served(app) as url:
        yield url, client


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.page:
        write_page(stored_rows(options.results))
        return
    # The client is started first: it imports while the model is made.
    with (
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), exec, (SILENT,)) as client,
        tempfile.TemporaryDirectory() as folder,
    ):
        if not options.direct:
            client.submit(summarize, [], 1.0, 1.0)
        where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = make_model(options.shape, where)
        layers = model.config.num_hidden_layers
        highest = resolve_level(options.max_level, DSLAConfig(task_type="CAUSAL_LM"), layers)
        engine_options = EngineOptions(
            slots=options.slots,
            max_waiting=10**6,
            max_tokens=min(options.max_tokens, model.config.max_position_embeddings),
            kv_bytes=None if options.kv_gib is None else int(options.kv_gib * 2**30),
            chunk=options.chunk,
            prompt_share=options.prompt_share,
            max_level=highest,
        )
        record = CudaRecording if where.type == "cuda" and options.graphs else None
        engine = Engine(model, policy_of("load", options, options.slo_first, None), engine_options, eos_tokens=set(), record=record)
        begin = time.perf_counter()
        warm_up(engine, highest, options.step, options.temperature)
        print(f"warm-up: {time.perf_counter() - begin:.0f} s", flush=True)
        with reached(engine, client, options) as (url, sender):
            for temperature in options.temperature:
                measurement = Measurement(options, temperature, engine, highest, url, sender, Path(folder))
                for mix in options.mix:
                    measurement.evaluate(mix)
                measurement.bar.close()
    print(page_part(stored_rows(options.results)))


if __name__ == "__main__":
    main()
