"""vLLM and our server beside each other: the same requests, on the same machine, in one run.

    python eval/against_vllm.py --trace AzureLLMInferenceTrace_conv.csv
    python eval/against_vllm.py --trace AzureLLMInferenceTrace_conv.csv --quick
    python eval/against_vllm.py --page

Servers are processes, one at a time, and have random weights: `vllm` (bf16) and `vllm-fp8` (keys and values in fp8) are
`python -m vllm.entrypoints.openai.api_server` with dummy weights, other arms are policies of `eval/random_server.py`: 0, levels in KV
heads such as kept:10%, and load, each also with keys and values in fp8: 0-fp8, kept:10%-fp8. vLLM may lie elsewhere: `--vllm-python`
names an interpreter, `--vllm-path` a folder for its PYTHONPATH.
All have prefix caching on, and no two runs of an arm send the same tokens. Measured over HTTP, by the client of `dsla replay`:

- `token`: `--batches` texts at a time behind prompts of `--lengths` tokens: time of a token while all of them are generated;
- `prefill`: one prompt of `--prefill` tokens: time to its first token, median of `--repeats`;
- `mixes`: a part of the trace, as it is or drawn to the paper's mix, greedy and sampled, at rates that rise until neither objective
  holds: P95 of the time to the first token `--slo-first`, of the time per token twice what requests alone take with `vllm`. Then the
  highest rate within both is narrowed down.

A row goes to eval/results/against_vllm.json as soon as it is measured; what is there is not measured again, so a run that ended early
(an error, or `--budget`) is gone on with by the same command. What keys and values do not fit for is a row that says so. `--quick` takes
one shape, one mix and three rates, and stops before five minutes. `--page` measures nothing: it writes docs/measured/against_vllm.md and
its plot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import torch
from against_vllm_page import ANCHOR, FP8, NARROW, PAGE, write_page
from random_server import HOST, SHAPES, config_of
from reporting import RESULTS, write_results
from server_process import NotServing, free_port, server_process
from serving import MIXES, highest_rate, listed, numbers_tokenizer, outcomes_of, requests_of, rounded, within, write_trace
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from dsla_hf.levels.reading import parse_level
from dsla_hf.serving.replay.client import ReplayOptions, replay, summarize
from dsla_hf.serving.replay.trace import TracedRequest, read_trace

PARTS = ("token", "prefill", "mixes")
SAMPLING = {"greedy": 0.0, "sampled": 1.0}  # temperature
ARMS = [ANCHOR, FP8, "0", f"0{NARROW}", "kept:50%", "kept:25%", "kept:10%", f"kept:10%{NARROW}", "load"]
# A row replaces an earlier one that is alike in these.
KEY = ("shape", "arm", "part", "batch", "length", "mix", "sampling", "rate", "setup")
ALONE = 6  # requests that are measured one at a time
LEAST_TOKENS = 8  # of each text, for a time per token
WARM_UP = (40, 2 * 2048 + 3, 8192 + 61)  # prompts: kernels are compiled for short, chunked and long ones
MEMORY_SHARE, SPARE_BYTES = 0.9, 3 * 2**30  # of a GPU for a server; what its steps need beside weights, keys and values
QUICK_SECONDS = 260.0  # what has begun ends, and servers take time to
QUICK: dict[str, Any] = {
    "shapes": ["llama3-8b"],
    "arms": [ANCHOR, "0", "kept:10%"],
    "parts": ["token", "mixes"],
    "batches": [1, 16],
    "lengths": [8192],
    "mix": ["paper"],
    "sampling": ["sampled"],
    "rates": [4.0, 8.0, 12.0],
    "requests": 40,
    "budget": QUICK_SECONDS,
}


class Spent(RuntimeError):
    """The time that may be used is over."""


class Budget:
    """Seconds from now on, None for any number; nothing is begun after them."""

    def __init__(self, seconds: float | None):
        self.end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.end

    def left(self, what: str) -> float:
        """Seconds that are left.

        Raises:
            Spent: if there are none; names what is not begun.
        """
        if (left := self.end - time.monotonic()) <= 0:
            raise Spent(f"the budget is spent before: {what}")
        return left


class Rows:
    """The rows of the result file."""

    def __init__(self, folder: Path):
        self.folder, path = folder, folder / "against_vllm.json"
        self.rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else []

    def find(self, key: dict[str, Any]) -> dict[str, Any] | None:
        return next((row for row in self.rows if all(row[name] == key[name] for name in KEY)), None)

    def add(self, row: dict[str, Any]) -> None:
        self.rows = [*(other for other in self.rows if any(other[name] != row[name] for name in KEY)), row]
        write_results("against_vllm", self.rows, folder=self.folder)


# --- what fits ------------------------------------------------------------------------------------------------------------


def policy_of(arm: str) -> str:
    """The policy of our server in this arm, or in its stead."""
    return "0" if arm in (ANCHOR, FP8) else arm.removesuffix(NARROW)


def kept_share(arm: str, config: Any) -> float:
    """Bytes of keys and values of a token, over those of all heads in bf16."""
    policy, share = policy_of(arm), 0.5 if arm.endswith(NARROW) else 1.0
    if policy == "load":  # it begins at level 0
        return share
    heads = config.num_hidden_layers * config.num_key_value_heads
    return share * (1 - parse_level(policy, heads, "head") / heads)


def token_bytes(config: Any) -> int:
    """Keys and values of a token, in bf16."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 4 * config.num_hidden_layers * config.num_key_value_heads * head_dim


def weight_bytes(arm: str, config: Any) -> int:
    """In bf16; with an adapter it has q_proj and o_proj once more."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    has_own = policy_of(arm) != "0"
    own = sum(x.numel() for name, x in model.named_parameters() if has_own and ("q_proj" in name or "o_proj" in name))
    return 2 * (model.num_parameters() + own)


def tokens_wanted(batch: int, length: int, chunk: int, tokens: int) -> int:
    """To generate in each text, so that about `tokens` are left when the last prompt has been read between those of the first."""
    return tokens + 2 * math.ceil(batch * length / chunk)


# --- what is measured -------------------------------------------------------------------------------------------------------


def together(requests: list[dict[str, Any]]) -> tuple[float, int] | None:
    """Seconds per token of each text while all of them are generated (the median text's), and how many tokens of a text that were at least;
    None if there were too few."""
    if any(request["error"] is not None for request in requests):
        return None
    times = [[(request["sent"] + at, tokens) for at, tokens in request["token_times"]] for request in requests]
    begin, end = max(stamps[0][0] for stamps in times), min(stamps[-1][0] for stamps in times)
    seconds, counts = [], []
    for stamps in times:
        inside = [(at, tokens) for at, tokens in stamps if begin <= at <= end]
        if len(inside) < 2 or inside[-1][1] - inside[0][1] < LEAST_TOKENS:
            return None
        counts.append(inside[-1][1] - inside[0][1])
        seconds.append((inside[-1][0] - inside[0][0]) / counts[-1])
    return statistics.median(seconds), min(counts)


def seed_of(*what: Any) -> int:
    """Of a run's prompts and draws: the same for all arms, another one for each run, so that no prefix is known."""
    return zlib.crc32(repr(what).encode())


class Server:
    """An arm's server; it is started when something is first asked of it."""

    def __init__(
        self, options: argparse.Namespace, shape: str, arm: str, longest: int, target: float | None, budget: Budget, stack: ExitStack
    ):
        self.options, self.shape, self.arm, self.longest, self.target = options, shape, arm, longest, target
        self.budget, self.stack = budget, stack
        self.url: str | None = None
        self.version: str | None = None

    def started(self) -> str:
        """Where it serves.

        Raises:
            NotServing: if it does not come up. Spent: if there is no time for it.
        """
        if self.url is None:
            port = free_port()
            url, folder = f"http://{HOST}:{port}", self.stack.enter_context(tempfile.TemporaryDirectory())
            vllm = self.arm in (ANCHOR, FP8) and not self.options.stand_in
            command = self.vllm_command(port, Path(folder)) if vllm else self.own_command(port)
            environment = {"PYTHONPATH": str(self.options.vllm_path)} if vllm and self.options.vllm_path else {}
            seconds = min(self.options.start_seconds, self.budget.left(f"{self.shape}, start of {self.arm}"))
            log = self.options.logs / f"{self.shape}-{self.arm.replace(':', '-').replace('%', '')}.log"
            self.stack.enter_context(server_process(command, url, log, seconds, environment))
            self.url = url
            self.version = httpx.get(f"{url}/version").json()["version"] if vllm else None
            for number, length in enumerate(WARM_UP):
                if length + 16 <= self.longest:
                    for temperature in SAMPLING.values():
                        self.replayed([TracedRequest(0.0, length, 8)], seed_of("warm-up", number, temperature), temperature)
        return self.url

    def own_command(self, port: int) -> list[str]:
        options = self.options
        policy = policy_of(self.arm)
        command = [sys.executable, str(Path(__file__).with_name("random_server.py")), "--shape", self.shape, "--policy", policy]
        sizes = {"port": port, "slots": options.slots, "chunk": options.chunk, "max-tokens": self.longest, "kv-gib": options.kv_gib}
        if self.arm.endswith(NARROW):
            sizes["kv-cache-dtype"] = "fp8"
        if policy == "load":  # before the objectives are missed
            target = None if self.target is None else 0.75 * self.target
            sizes |= {"max-level": options.max_level, "first-token-target": options.slo_first / 2, "token-target": target}
        return [*command, *(f"--{name}={value}" for name, value in sizes.items() if value is not None)]

    def vllm_command(self, port: int, folder: Path) -> list[str]:
        config = config_of(self.shape)
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(folder)
        numbers_tokenizer(config.vocab_size).save_pretrained(folder)
        own: dict[str, Any] = {
            "model": folder,
            "served-model-name": self.shape,
            "host": HOST,
            "port": port,
            "load-format": "dummy",
            "dtype": "bfloat16",
            "max-model-len": self.longest,
            "max-num-seqs": self.options.slots,
            "generation-config": "vllm",
        }
        if self.arm == FP8:
            own["kv-cache-dtype"] = "fp8"
        if torch.cuda.is_available():
            own["gpu-memory-utilization"] = MEMORY_SHARE
        command = [self.options.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--enable-prefix-caching"]
        return [*command, *(f"--{name}={value}" for name, value in own.items()), *self.options.vllm_args.split()]

    def replayed(
        self, requests: list[TracedRequest], seed: int, temperature: float, speed: float = 1.0, times: bool = False
    ) -> dict[str, Any]:
        """What `dsla replay` says of these requests."""
        url = self.started()
        with tempfile.TemporaryDirectory() as folder:
            write_trace(requests, Path(folder) / "trace.csv")
            options = ReplayOptions(
                trace=f"{folder}/trace.csv",
                url=url,
                out=folder,
                model=self.shape,
                rate=speed,
                max_length=self.longest,
                vocab=config_of(self.shape).vocab_size,
                seed=seed,
                temperature=temperature,
                timeout=self.options.patience,
                token_times=times,
            )
            with open(self.options.logs / "replays.log", "a") as log, contextlib.redirect_stdout(log):
                return replay(options)


class Measurement:
    """All rows of one shape and arm."""

    def __init__(self, options: argparse.Namespace, shape: str, arm: str, rows: Rows, budget: Budget, bar: Any):
        self.options, self.shape, self.arm, self.rows, self.budget, self.bar = options, shape, arm, rows, budget, bar
        self.config = config_of(shape)
        self.setup = {
            "trace": None if options.trace is None else Path(options.trace).name,
            "slots": options.slots,
            "chunk": options.chunk,
            "requests": options.requests,
            "max_tokens": options.max_tokens,
            "slo_first": options.slo_first,
            "seed": options.seed,
            "stand_in": options.stand_in,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        }
        self.room = math.inf
        if torch.cuda.is_available():
            total = torch.cuda.get_device_properties(0).total_memory
            self.room = MEMORY_SHARE * total - weight_bytes(arm, self.config) - SPARE_BYTES

    def run(self) -> None:
        """Raises Spent and NotServing as `Server.started`, and OSError where a server ended in between."""
        options = self.options
        with ExitStack() as stack:
            self.server = Server(options, self.shape, self.arm, self.longest(), self.known_target(), self.budget, stack)
            if "token" in options.parts:
                for length in options.lengths:
                    for batch in options.batches:
                        self.row(self.key("token", batch=batch, length=length), self.token)
            if "prefill" in options.parts:
                for length in options.prefill:
                    self.row(self.key("prefill", length=length), self.prefill)
            if "mixes" in options.parts:
                for mix in options.mix:
                    self.row(self.key("alone", mix=mix), self.alone)
                    for sampling in options.sampling:
                        self.rates(mix, sampling)

    def key(self, part: str, **what: Any) -> dict[str, Any]:
        return {**dict.fromkeys(KEY), "shape": self.shape, "arm": self.arm, "part": part, "setup": self.setup, **what}

    def row(self, key: dict[str, Any], measure: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
        """The row with this key, measured now if it is not there."""
        if (found := self.rows.find(key)) is not None:
            return found
        named = ", ".join(str(key[name]) for name in KEY[:-1] if key[name] is not None)
        self.budget.left(named)
        self.bar.set_description(named)
        row = {**key, **measure(key), "version": self.server.version}
        self.rows.add(row)
        self.bar.update()
        self.bar.write(f"{named}: {told(row)}")
        return row

    # --- sizes --------------------------------------------------------------------------------------------------------

    def does_not_fit(self, batch: int, length: int) -> str | None:
        """Why so many texts of this length do not run together, None if they do."""
        if length > self.config.max_position_embeddings:
            return f"{length} tokens are more than the {self.config.max_position_embeddings} positions of the model"
        if batch > self.options.slots:
            return f"{batch} texts are more than the {self.options.slots} slots"
        needed = batch * length * token_bytes(self.config) * kept_share(self.arm, self.config)
        if needed <= self.room:
            return None
        return f"needs {needed / 1e9:.0f} GB for keys and values, there are {max(self.room, 0) / 1e9:.0f}"

    def longest(self) -> int:
        """Tokens of the longest text that is asked for and fits."""
        options, wanted = self.options, [64]
        if "token" in options.parts:
            for batch in options.batches:
                for length in options.lengths:
                    tokens = tokens_wanted(batch, length, options.chunk, options.tokens)
                    wanted += [length + n * tokens for n in (1, 2) if self.does_not_fit(batch, length + n * tokens) is None]
        if "prefill" in options.parts:
            wanted += [length + 16 for length in options.prefill if self.does_not_fit(1, length + 16) is None]
        if "mixes" in options.parts:
            wanted.append(min(options.max_tokens, self.config.max_position_embeddings))
        return max(wanted)

    # --- rows -----------------------------------------------------------------------------------------------------------

    def token(self, key: dict[str, Any]) -> dict[str, Any]:
        batch, length = key["batch"], key["length"]
        tokens = tokens_wanted(batch, length, self.options.chunk, self.options.tokens)
        for attempt in (1, 2):  # how many tokens the first texts get while prompts are read is the server's choice
            if (why := self.does_not_fit(batch, length + tokens)) is not None:
                return {"why": why}
            seed = seed_of(self.options.seed, "token", batch, length, attempt)
            result = self.server.replayed([TracedRequest(0.0, length, tokens)] * batch, seed, 0.0, times=True)
            if (found := together(result["requests"])) is not None:
                return {"seconds_per_token": found[0], "tokens": found[1], "tokens_per_second": batch / found[0]}
            tokens *= 2
        errors = result["summary"]["reasons"]
        return {"why": f"failed: {next(iter(errors))}" if errors else "the texts did not all run at the same time"}

    def prefill(self, key: dict[str, Any]) -> dict[str, Any]:
        length = key["length"]
        if (why := self.does_not_fit(1, length + 16)) is not None:
            return {"why": why}
        seconds = []
        for number in range(self.options.repeats):
            seed = seed_of(self.options.seed, "prefill", length, number)
            (request,) = self.server.replayed([TracedRequest(0.0, length, 1)], seed, 0.0)["requests"]
            if request["error"] is not None:
                return {"why": f"failed: {request['error']}"}
            seconds.append(request["first_token"])
        return {"seconds": statistics.median(seconds), "all_seconds": seconds}

    def alone(self, key: dict[str, Any]) -> dict[str, Any]:
        outcomes = []
        for number, request in enumerate(self.requests(key["mix"])[:ALONE]):
            one = [TracedRequest(0.0, request.prompt, max(request.generated, 2 * LEAST_TOKENS))]
            outcomes += outcomes_of(self.server.replayed(one, seed_of(self.options.seed, "alone", key["mix"], number), 0.0))
        summary = summarize(outcomes, self.options.slo_first, math.inf)
        if summary["errors"]:
            raise NotServing(f"requests that were alone failed: {summary['reasons']}")
        return summary

    def rates(self, mix: str, sampling: str) -> None:
        """Rows at rising rates, then between the highest that meets the objectives and the next."""
        options = self.options

        def at(rate: float) -> dict[str, Any]:
            return self.row(self.key("rate", mix=mix, sampling=sampling, rate=rate), self.at_rate)

        if options.rates:
            for rate in options.rates:
                at(rate)
            return
        rate, known = options.first_rate, dict[float, bool]()
        for _ in range(options.most_rates):
            row = at(rounded(rate))
            known[row["rate"]] = row["meets"]
            if not (row["first_holds"] or row["token_holds"]):
                break
            rate *= options.grow
        if any(known.values()) and not all(known.values()):
            highest_rate(
                lambda rate: at(rate)["meets"], options.first_rate, tolerance=options.tolerance, most=options.most_between, known=known
            )

    def at_rate(self, key: dict[str, Any]) -> dict[str, Any]:
        requests, rate, target = self.requests(key["mix"]), key["rate"], self.token_target(key["mix"])
        span = max(requests[-1].at * len(requests) / (len(requests) - 1), 1e-3)
        seed = seed_of(self.options.seed, key["mix"], key["sampling"], rate)
        result = self.server.replayed(requests, seed, SAMPLING[key["sampling"]], span * rate / len(requests))
        summary = summarize(outcomes_of(result), self.options.slo_first, target)
        first = within({**summary, "per_token": {"p95": 0.0}}, self.options.slo_first, target)
        token = not summary["errors"] and summary["per_token"]["p95"] <= target
        return {
            **summary,
            "token_target": target,
            "first_holds": first,
            "token_holds": token,
            "meets": first and token,
            "tokens_at_level": result["tokens_at_level"],
        }

    def requests(self, mix: str) -> list[TracedRequest]:
        return requests_of(read_trace(self.options.trace), mix, self.options.requests, self.options.seed)

    def known_target(self) -> float | None:
        """The lowest of what was asked for or can be told already."""
        targets = [self.options.token_target] if self.options.token_target else []
        for mix in self.options.mix:
            if not targets and (row := self.rows.find(self.key("alone", mix=mix, arm=ANCHOR))) is not None:
                targets.append(2 * row["per_token"]["p50"])
        return min(targets, default=None)

    def token_target(self, mix: str) -> float:
        """Seconds per token that are allowed: twice what vLLM takes for requests alone."""
        if self.options.token_target is not None:
            return float(self.options.token_target)
        row = self.rows.find(self.key("alone", mix=mix, arm=ANCHOR))
        if row is None:
            raise ValueError(
                f"the objective of a token is twice the time that {ANCHOR} takes: measure this arm, too, or give --token-target"
            )
        return float(2 * row["per_token"]["p50"])


def told(row: dict[str, Any]) -> str:
    """A row for a terminal."""
    if row.get("why") is not None:
        return str(row["why"])
    if row["part"] == "token":
        return f"{1e3 * row['seconds_per_token']:.2f} ms a token"
    if row["part"] == "prefill":
        return f"first token after {1e3 * row['seconds']:.0f} ms"
    if row["part"] == "alone" or "per_token" not in row:
        return f"{1e3 * row['per_token']['p50']:.2f} ms a token" if "per_token" in row else f"{row['errors']} failed: {row['reasons']}"
    held = "both objectives hold" if row["meets"] else f"first token {'holds' if row['first_holds'] else 'fails'}, token "
    held += "" if row["meets"] else "holds" if row["token_holds"] else "fails"
    return f"first token P95 {row['first_token']['p95']:.2f} s, token P95 {1e3 * row['per_token']['p95']:.1f} ms: {held}"


# --- command line -------------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one shape, one mix, three rates: less than five minutes")
    parser.add_argument("--trace", help="CSV with the columns of the Azure LLM inference traces")
    parser.add_argument("--shapes", type=listed(str, SHAPES), default=["llama2-7b", "llama3-8b"])
    parser.add_argument(
        "--arms", type=listed(str), default=ARMS, help=f"{ANCHOR}, {FP8}, 0, levels such as kept:10%%, load; these with {NARROW}"
    )
    parser.add_argument("--parts", type=listed(str, PARTS), default=list(PARTS))
    parser.add_argument("--batches", type=listed(int), default=[1, 16, 64])
    parser.add_argument("--lengths", type=listed(int), default=[2048, 8192, 32768], help="prompts of the part token")
    parser.add_argument("--prefill", type=listed(int), default=[2048, 8192, 32768, 131072])
    parser.add_argument("--tokens", type=int, default=128, help="generated beside each other, about")
    parser.add_argument("--repeats", type=int, default=3, help="of a prompt")
    parser.add_argument("--mix", type=listed(str, MIXES), default=list(MIXES), help="lengths as in the trace, or drawn to the paper's mix")
    parser.add_argument("--sampling", type=listed(str, tuple(SAMPLING)), default=list(SAMPLING))
    parser.add_argument("--requests", type=int, default=160, help="of a run")
    parser.add_argument("--rates", type=listed(float), help="requests per second, instead of rising ones")
    parser.add_argument("--first-rate", type=float, default=2.0, help="the lowest")
    parser.add_argument("--grow", type=float, default=1.4, help="from a rate to the next")
    parser.add_argument("--most-rates", type=int, default=10)
    parser.add_argument("--most-between", type=int, default=3, help="runs that narrow the highest rate down")
    parser.add_argument("--tolerance", type=float, default=0.05, help="of the highest rate")
    parser.add_argument("--slo-first", type=float, default=2.0, help="seconds to the first token")
    parser.add_argument("--token-target", type=float, help="seconds per token; else twice what vLLM takes for requests alone")
    parser.add_argument("--max-level", default="kept:10%", help="of the arm load")
    parser.add_argument("--slots", type=int, default=64, help="texts that run at a time")
    parser.add_argument("--chunk", type=int, default=2048, help="prompt tokens that our server reads in a step")
    parser.add_argument("--max-tokens", type=int, default=17408, help="longest text of a mix; longer prompts are cut")
    parser.add_argument("--kv-gib", type=float, help="GiB for keys and values of our server; else what is free")
    parser.add_argument("--patience", type=float, default=120.0, help="seconds for an answer")
    parser.add_argument("--start-seconds", type=float, default=420.0, help="for a server to come up")
    parser.add_argument("--budget", type=float, help="seconds; nothing is begun after them")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm-python", default=sys.executable, help="interpreter that has vLLM")
    parser.add_argument("--vllm-path", type=Path, help="folder with vLLM's packages, for its PYTHONPATH")
    parser.add_argument("--vllm-args", default="", help="more arguments of vLLM's server")
    parser.add_argument("--stand-in", action="store_true", help="our level 0 in vLLM's place, where there is none: a trial of this script")
    parser.add_argument("--logs", type=Path, default=Path("against_vllm_logs"), help="folder of what servers say")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of against_vllm.json")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the page and its plot from the rows")
    given = parser.parse_args(arguments)
    if given.quick:
        parser.set_defaults(**QUICK)
    options = parser.parse_args(arguments)
    if "mixes" in options.parts and options.trace is None and not options.page:
        parser.error("--trace is needed for the part mixes")
    if options.requests < 2:
        parser.error(f"--requests must be 2 or more, got {options.requests}")
    for name in ("first_rate", "tolerance", "slo_first", "patience", "start_seconds", "tokens", "repeats", "slots", "chunk", "max_tokens"):
        if not 0 < getattr(options, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} must be a positive number, got {getattr(options, name)}")
    if not options.grow > 1:
        parser.error(f"--grow must be above 1, got {options.grow}")
    for arm in options.arms:
        try:
            for shape in options.shapes:
                kept_share(arm, config_of(shape))
        except ValueError as error:
            parser.error(f"--arms: {error}; or give {ANCHOR}, {FP8} or load")
    return options


def measurements(options: argparse.Namespace, rows: Rows, budget: Budget, bar: Any) -> Iterator[Measurement]:
    """In the order in which they are made: vLLM first, whose times the others are held against."""
    for shape in options.shapes:
        for arm in sorted(options.arms, key=lambda arm: arm != ANCHOR):
            yield Measurement(options, shape, arm, rows, budget, bar)


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    rows = Rows(options.results)
    if options.page:
        write_page(rows.rows)
        return 0
    if "mixes" in options.parts:
        read_trace(options.trace)  # before a server starts for minutes
    options.logs.mkdir(parents=True, exist_ok=True)
    budget, failed = Budget(options.budget), 0
    with tqdm(unit="row", disable=None) as bar:
        for measurement in measurements(options, rows, budget, bar):
            try:
                measurement.run()
            except Spent as error:
                bar.write(f"{error}; the same command goes on from here")
                return 0
            except (NotServing, OSError) as error:  # others can be measured all the same
                bar.write(f"{measurement.shape}, {measurement.arm}: {error}")
                if budget.over:
                    return 0
                failed += 1
    print(f"{len(rows.rows)} rows; `python eval/against_vllm.py --page` writes {PAGE.name}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
