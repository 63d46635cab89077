"""What prefix reuse of the server's engine saves where texts begin alike, and costs where they do not.

    python eval/prefix.py
    python eval/prefix.py --shape llama3-8b

An engine with and one without reuse serve, at level 0, `--texts` requests that come at once: a prefix that all share and `--new` prompt
tokens of their own. Arms take turns, `--rounds` times, each round with another prefix. Rows of eval/results/prefix.json, with medians over
rounds:

- `cold`: nobody has read the prefix before; `warm`: another text has. Mean and largest time to the first token.
- `no hits`: prompts of the same length that share nothing. Seconds until all have ended, and seconds of the processor.

`ratio` is the time with reuse over that without: of `no hits` the median over rounds of the seconds of each, elsewhere of the mean time to
the first token. `cpu_ratio` is that of the processor's time of the whole run, which other processes of the machine do not lengthen. The
model has random weights; `tiny` runs on a CPU.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from reporting import RESULTS, rows_table, write_results
from tqdm import tqdm
from transformers import AutoConfig

from dsla_hf.inference.bench.models import preset_config, random_model
from dsla_hf.inference.recorder import CudaRecording
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.engine.request import Request, Sampling

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 997}
SHAPES = ("tiny", "llama2-7b", "llama3-8b")
CASES = ("cold", "warm", "no hits")
COLUMNS = ["case", "reuse", "first_mean", "first_largest", "seconds", "cpu_seconds", "reused_tokens", "ratio", "cpu_ratio"]


def make_engine(model: Any, reuse: bool, options: argparse.Namespace) -> Engine:
    longest = options.prefix + options.new + options.tokens
    sizes = EngineOptions(slots=options.texts, max_tokens=longest, chunk=options.chunk, kv_bytes=options.kv_bytes, prefix_reuse=reuse)
    engine = Engine(model, 0, sizes, eos_tokens=set(), record=CudaRecording if model.device.type == "cuda" else None)
    engine.prepare()
    return engine


def serve(engine: Engine, prompts: list[list[int]], tokens: int) -> dict[str, float]:
    """All prompts at once; times in seconds."""
    begin, cpu = time.perf_counter(), time.process_time()
    asked: list[Request] = [engine.submit(prompt, tokens, lambda event: None, Sampling(temperature=0.0)) for prompt in prompts]
    while engine.busy:
        engine.step()
    engine.runner.wait()
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    first = []
    for request in asked:
        if request.first_token is None:
            raise RuntimeError(f"request {request.number} got no token")
        first.append(request.first_token - request.arrived)
    return {
        "first_mean": mean(first),
        "first_largest": max(first),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "reused_tokens": sum(request.reused for request in asked),
    }


def measure(engines: dict[bool, Engine], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two rows for each case."""
    draws, size = random.Random(options.seed), engines[True].vocab_size

    def text(tokens: int) -> list[int]:
        return [draws.randrange(size) for _ in range(tokens)]

    found: dict[tuple[str, bool], list[dict[str, float]]] = {(case, reuse): [] for case in CASES for reuse in (False, True)}
    for number in tqdm(range(options.rounds + 1), desc="rounds", disable=None):  # the first is a rehearsal
        for case in CASES:
            prefix = text(options.prefix)
            prompts = [(text(options.prefix) if case == "no hits" else prefix) + text(options.new) for _ in range(options.texts)]
            for reuse in (False, True) if number % 2 else (True, False):
                if case == "warm":
                    serve(engines[reuse], [prefix + text(options.new)], 1)
                times = serve(engines[reuse], prompts, options.tokens)
                if number:
                    found[case, reuse].append(times)
    rows = []
    for (case, reuse), rounds in found.items():
        row: dict[str, Any] = {"case": case, "reuse": reuse, **{name: median(times[name] for times in rounds) for name in rounds[0]}}
        if reuse:
            name = "seconds" if case == "no hits" else "first_mean"
            ratios = [with_it[name] / without[name] for with_it, without in zip(rounds, found[case, False], strict=True)]
            row |= {"ratio": median(ratios), "ratios": ratios}
            row["cpu_ratio"] = median(
                with_it["cpu_seconds"] / without["cpu_seconds"] for with_it, without in zip(rounds, found[case, False], strict=True)
            )
        rows.append(row)
    return rows


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="random weights of this shape")
    parser.add_argument("--texts", type=int, default=16, help="that come at once")
    parser.add_argument("--prefix", type=int, default=4096, help="tokens that all share")
    parser.add_argument("--new", type=int, default=256, help="prompt tokens of each")
    parser.add_argument("--tokens", type=int, default=16, help="generated in each")
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens read in a step")
    parser.add_argument("--kv-bytes", type=int, help="of keys and values of each engine; on a GPU a third of what is free")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of prefix.json")
    options = parser.parse_args(arguments)
    for name in ("texts", "prefix", "new", "tokens", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(options, name)}")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    longest = options.prefix + options.new + options.tokens
    tiny = options.shape == "tiny"
    config = AutoConfig.for_model("llama", **TINY, max_position_embeddings=longest) if tiny else preset_config(options.shape)
    if longest > config.max_position_embeddings:
        sys.exit(f"{longest} tokens are more than the {config.max_position_embeddings} of {options.shape}: give less --prefix or --new")
    model = random_model(config, torch.bfloat16 if where.type == "cuda" else torch.float32, where).eval()
    if options.kv_bytes is None and where.type == "cuda":
        options.kv_bytes = torch.cuda.mem_get_info(where)[0] // 3
    rows = measure({reuse: make_engine(model, reuse, options) for reuse in (False, True)}, options)
    setup = {name: getattr(options, name) for name in ("shape", "texts", "prefix", "new", "tokens", "chunk", "rounds", "seed")}
    write_results("prefix", rows, folder=options.results, dtype=str(model.dtype), **setup)
    print(rows_table(rows, COLUMNS))


if __name__ == "__main__":
    main()
