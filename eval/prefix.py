"""What prefix reuse of the server's engine saves where texts begin alike, and costs where they do not, by level.

    python eval/prefix.py measure                      # a small random model on a CPU
    python eval/prefix.py measure --shape llama3-8b    # random weights of that shape, on a GPU
    python eval/prefix.py measure --model MODEL --adapter ADAPTER --name smollm2 --texts 4 --prefix 2048
    python eval/prefix.py page                         # docs/prefixes.md and its plot

An engine with and one without reuse serve, at each of `--levels`, `--texts` requests that come at once: a prefix that all share and `--new`
prompt tokens of their own. Arms take turns, `--rounds` times, each round with another prefix, behind one round that does not count. Rows of
eval/results/prefix.json, with medians over rounds; those of the same name, level and sizes are written anew:

- `cold`: nobody has read the prefix before; `warm`: another text has. Mean and largest time to the first token.
- `no hits`: prompts of the same length that share nothing. Seconds until all have ended, and seconds of the processor.
- `chat`: as many chats, whose first prompts are a quarter as long and share nothing; `--turns` turns, each `--new` tokens longer than the
  last one and its answer, all chats at once. The time to the first token is that of turns behind the first; `read_tokens` of all.

`ratio` is the time with reuse over that without: of `no hits` the median over rounds of the seconds of each, elsewhere of the mean time to
the first token. `cpu_ratio` is that of the processor's time of the whole run, which other processes of the machine do not lengthen.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from peft import get_peft_model
from reporting import RESULTS, fill_page, rows_table, write_results
from tqdm import tqdm
from transformers import AutoConfig

from dsla_hf import DSLAConfig
from dsla_hf.core.plots import figure, save
from dsla_hf.inference.bench.models import collect, preset_config, random_model
from dsla_hf.inference.recorder import CudaRecording
from dsla_hf.models.adapter import active_config
from dsla_hf.models.configuration import resolve_level
from dsla_hf.models.loading import load_adapter
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.engine.request import Request, Sampling

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 997}
SHAPES = ("tiny", "llama2-7b", "llama3-8b")
CASES = ("cold", "warm", "no hits", "chat")
COLUMNS = ["level", "kept", "case", "reuse", "first_mean", "first_largest", "seconds", "cpu_seconds", "read_tokens", "ratio", "cpu_ratio"]
SIZES = ("texts", "prefix", "new", "tokens", "turns", "chunk", "rounds", "seed")
SAME = ("name", "device", "level", "case", "reuse", "texts", "prefix", "new", "chunk")  # rows that a new measurement takes the place of
PAGE = Path(__file__).parent.parent / "docs" / "prefixes.md"
PLOT = PAGE.parent / "images" / "prefixes.png"
AIMED_AT = {"texts": 16, "prefix": 4096, "new": 256}  # what these are goals for
GOAL, ALLOWED = 0.25, 1.02


def make_engine(model: Any, level: int, reuse: bool, options: argparse.Namespace) -> Engine:
    longest = max(options.prefix + options.new, options.prefix // 4 + options.turns * (options.new + options.tokens)) + options.tokens
    sizes = EngineOptions(
        slots=options.texts,
        max_tokens=longest,
        chunk=options.chunk,
        kv_bytes=options.kv_bytes,
        prefix_reuse=reuse,
        snapshot_bytes=options.snapshot_bytes if reuse and level else None,
    )
    engine = Engine(model, level, sizes, eos_tokens=set(), record=CudaRecording if model.device.type == "cuda" else None)
    engine.prepare()
    return engine


def serve(engine: Engine, prompts: list[list[int]], tokens: int) -> list[Request]:
    """All prompts at once, to their ends."""
    asked = [engine.submit(prompt, tokens, lambda event: None, Sampling(temperature=0.0)) for prompt in prompts]
    while engine.busy:
        engine.step()
    engine.runner.wait()
    return asked


def timed(engine: Engine, texts: list[list[int]], case: str, options: argparse.Namespace, tails: list[list[list[int]]]) -> dict[str, float]:
    """Serve the texts of a case; times in seconds. tails: what chats say in later turns, turn by turn."""
    read, begin, cpu = engine.read_tokens, time.perf_counter(), time.process_time()
    asked = serve(engine, texts, options.tokens)
    counted = asked if case != "chat" else []
    for turn in tails if case == "chat" else ():
        asked = serve(engine, [request.text + new for request, new in zip(asked, turn, strict=True)], options.tokens)
        counted += asked
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    first = []
    for request in counted:
        if request.first_token is None:
            raise RuntimeError(f"request {request.number} got no token")
        first.append(request.first_token - request.arrived)
    return {
        "first_mean": mean(first),
        "first_largest": max(first),
        "seconds": seconds,
        "cpu_seconds": cpu,
        "read_tokens": engine.read_tokens - read,
        "reused_tokens": sum(request.reused for request in counted),
    }


def measure_level(model: Any, level: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two rows for each case."""
    engines = {reuse: make_engine(model, level, reuse, options) for reuse in (False, True)}
    draws, size = random.Random(options.seed), engines[True].vocab_size

    def text(tokens: int) -> list[int]:
        return [draws.randrange(size) for _ in range(tokens)]

    found: dict[tuple[str, bool], list[dict[str, float]]] = {(case, reuse): [] for case in options.cases for reuse in (False, True)}
    for number in tqdm(range(options.rounds + 1), desc=f"level {level}, rounds", disable=None):  # the first is a rehearsal
        for case in options.cases:
            prefix = text(options.prefix)
            lengths = {"no hits": options.prefix, "chat": max(options.prefix // 4, 1)}
            begins = [prefix if case in ("cold", "warm") else text(lengths[case]) for _ in range(options.texts)]
            texts = [begin + text(options.new) for begin in begins]
            tails = [[text(options.new) for _ in range(options.texts)] for _ in range(options.turns - 1)]
            another = prefix + text(options.new)
            for reuse in (False, True) if number % 2 else (True, False):
                if case == "warm":
                    serve(engines[reuse], [another], 1)
                times = timed(engines[reuse], texts, case, options, tails)
                if number:
                    found[case, reuse].append(times)
    engine, rows = engines[True], []
    for (case, reuse), rounds in found.items():
        row: dict[str, Any] = {"level": level, "kept": engine.levels.num_units - level, "units": engine.levels.num_units}
        row |= {"case": case, "reuse": reuse, **{name: median(times[name] for times in rounds) for name in rounds[0]}}
        if reuse:
            row |= {"snapshot_bytes": engine.memory.snapshot_bytes(level) if level else 0, "snapshot_budget": engine.reuse.snapshots.budget}
            name = "seconds" if case == "no hits" else "first_mean"
            ratios = [with_it[name] / without[name] for with_it, without in zip(rounds, found[case, False], strict=True)]
            row |= {"ratio": median(ratios), "ratios": ratios}
            of_cpu = [with_it["cpu_seconds"] / without["cpu_seconds"] for with_it, without in zip(rounds, found[case, False], strict=True)]
            row |= {"cpu_ratio": median(of_cpu), "cpu_ratios": of_cpu}
        rows.append(row)
    return rows


def load(options: argparse.Namespace, where: torch.device) -> Any:
    """The model with levels that count KV heads: an adapter's, or an untrained conversion of random weights, which takes as long."""
    if options.model is not None:
        model = load_adapter(options.model, options.adapter, options.dtype)
    else:
        longest = 2 * (options.prefix + options.turns * (options.new + options.tokens))
        tiny = options.shape == "tiny"
        config = AutoConfig.for_model("llama", **TINY, max_position_embeddings=longest) if tiny else preset_config(options.shape)
        base = random_model(config, torch.bfloat16 if where.type == "cuda" else torch.float32, where)
        model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", conversion_unit="head"))
    return model.to(where).eval().requires_grad_(False)


def measure(options: argparse.Namespace) -> None:
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = load(options, where)
    longest = options.prefix + options.new + options.tokens
    if longest > model.config.max_position_embeddings:
        sys.exit(f"{longest} tokens are more than the model's {model.config.max_position_embeddings}: give less --prefix or --new")
    config = active_config(model.base_model.model)
    levels = [resolve_level(level, config, model.config.num_hidden_layers) for level in options.levels]
    if options.kv_bytes is None and where.type == "cuda":
        options.kv_bytes = torch.cuda.mem_get_info(where)[0] // 3
    name = options.name or (options.shape if options.model is None else Path(options.model).name)
    device = torch.cuda.get_device_name() if where.type == "cuda" else "CPU"
    sizes = {size: getattr(options, size) for size in SIZES}
    said = "python eval/prefix.py " + " ".join(Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:])
    for level in levels:
        collect()  # what the engines of another level held
        rows = [
            {"name": name, "device": device, "dtype": str(model.dtype).removeprefix("torch."), **sizes, **row, "command": said}
            for row in measure_level(model, level, options)
        ]
        print(rows_table(rows, COLUMNS))
        new = {same(row) for row in rows}
        write_results("prefix", [row for row in stored(options.results) if same(row) not in new] + rows, folder=options.results)


def stored(folder: Path) -> list[dict[str, Any]]:
    """Rows of earlier measurements."""
    path = folder / "prefix.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def same(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in SAME)


# --- the page ---------------------------------------------------------------------------------------------------------


def groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows of one model and one set of sizes, in the order in which they were measured."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["name"], row["device"], *(row[size] for size in SIZES[:6])), []).append(row)
    return list(found.values())


def pairs(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(without, with) of each level and case."""
    by = {(row["level"], row["case"], row["reuse"]): row for row in rows}
    return [(by[level, case, False], by[level, case, True]) for level, case, reuse in by if reuse]


def table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for without, reuses in pairs(rows):
        lines.append(
            {
                "KV heads kept": f"{reuses['kept']} of {reuses['units']}",
                "case": reuses["case"],
                "first token, s, without": without["first_mean"],
                "with": reuses["first_mean"],
                "ratio": f"{reuses['first_mean'] / without['first_mean']:.3f}",
                "prompt tokens read, without": f"{without['read_tokens']:,.0f}",
                "with ": f"{reuses['read_tokens']:,.0f}",
                "seconds of all, ratio": f"{reuses['seconds'] / without['seconds']:.3f}",
                "processor time, ratio": f"{reuses['cpu_ratio']:.3f}",
            }
        )
    return rows_table(lines, list(lines[0]))


def verdict(rows: list[dict[str, Any]]) -> str:
    """What came out at worst of all levels, beside what was aimed at for requests of `AIMED_AT`."""
    with_it = [reuses for _, reuses in pairs(rows)]
    aimed = all(rows[0][name] == value for name, value in AIMED_AT.items())
    # What works is the GPU, if there is one; the processor then waits for it as long in either case.
    by, said = ("cpu_ratio", "the processor's time is") if rows[0]["device"] == "CPU" else ("ratio", "all texts end after")
    parts = []
    for cases, name, goal, what in (
        (("cold", "warm"), "ratio", GOAL, "with a shared prefix the first token comes after {:.3f} of the time without reuse"),
        (("no hits",), by, ALLOWED, f"without hits {said} {{:.3f}} of that without reuse"),
    ):
        if (worst := max((row[name] for row in with_it if row["case"] in cases), default=None)) is not None:
            parts.append(what.format(worst) + (f" (aimed at: {goal} at most)" if aimed or goal == ALLOWED else ""))
    return f"At worst, of all levels: {'; '.join(parts)}." if parts else ""


def sentence(rows: list[dict[str, Any]]) -> str:
    row, rounds = rows[0], sorted({row["rounds"] for row in rows})
    many = f"medians of {rounds[0]} to {rounds[-1]} rounds" if rounds[-1] > 1 else "one round"
    size = max((row.get("snapshot_bytes", 0) for row in rows), default=0)
    return (
        f"{row['name']}, {row['dtype']}, {row['device']}: {row['texts']} texts at once, a prefix of {row['prefix']:,} tokens and "
        f"{row['new']:,} of their own, {row['tokens']} generated; chats of {row['turns']} turns; chunks of {row['chunk']:,}; {many}."
        + (f" The largest snapshot takes {size / 2**20:.2f} MiB." if size else "")
    )


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Time to the first token with reuse over that without, by case and level, a panel for each group of several cases (or of one, if there
    is no other)."""
    parts = [group for group in groups(rows) if len({row["case"] for row in group}) > 1] or groups(rows)
    drawn, axes = figure(1, len(parts), size=(0.6 + 4.2 * len(parts), 3.4), sharey=True)
    for axis, group in zip(axes, parts, strict=True):
        levels = sorted({row["level"] for row in group})
        cases = [case for case in CASES if any(row["case"] == case for row in group)]
        for number, level in enumerate(levels):
            found = {
                reuses["case"]: reuses["first_mean"] / without["first_mean"] for without, reuses in pairs(group) if reuses["level"] == level
            }
            kept = next(row["kept"] for row in group if row["level"] == level)
            width = 0.8 / len(levels)
            places = [place + (number - (len(levels) - 1) / 2) * width for place in range(len(cases))]
            axis.bar(places, [found.get(case, 0.0) for case in cases], width, label=f"{kept} of {group[0]['units']} KV heads kept")
        axis.axhline(1.0, color="grey", linewidth=0.8)
        axis.axhline(GOAL, color="grey", linewidth=0.8, linestyle=":")
        axis.set_xticks(range(len(cases)), cases)
        axis.set_title(f"{group[0]['name']}: {group[0]['texts']} texts, prefix {group[0]['prefix']:,}", fontsize=9)
        axis.legend(fontsize=7)
    axes[0].set_ylabel("time to the first token,\nwith reuse / without")
    save(drawn, path)


def make_page(folder: Path, page: Path = PAGE, plot: Path = PLOT) -> None:
    """Fill the page in from the rows, and draw its plot."""
    rows = stored(folder)
    if not rows:
        sys.exit(f"{folder / 'prefix.json'} has no rows: python eval/prefix.py measure")
    parts = [f"{sentence(group)}\n\n{table(group)}\n\n{verdict(group)}" for group in groups(rows)]
    draw(rows, plot)
    fill_page(page, {"tables": "\n\n".join(parts)})


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="do", required=True)
    made = commands.add_parser("page", help="write the page from what was measured")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder of prefix.json")
    one = commands.add_parser("measure", help="time an engine with and one without reuse")
    one.add_argument("--shape", choices=SHAPES, default="tiny", help="random weights of this shape")
    one.add_argument("--model", help="a checkpoint, in place of a shape")
    one.add_argument("--adapter", help="of this checkpoint")
    one.add_argument("--dtype", default="auto", help="of the checkpoint")
    one.add_argument("--name", help="in the rows")
    one.add_argument("--levels", nargs="+", default=["0", "50%", "100%"], help="numbers of KV heads that are DSLA, or shares")
    one.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    one.add_argument("--texts", type=int, default=16, help="that come at once")
    one.add_argument("--prefix", type=int, default=4096, help="tokens that all share")
    one.add_argument("--new", type=int, default=256, help="prompt tokens of each, and of each turn of a chat")
    one.add_argument("--tokens", type=int, default=16, help="generated in each")
    one.add_argument("--turns", type=int, default=4, help="of a chat")
    one.add_argument("--chunk", type=int, default=1024, help="prompt tokens read in a step")
    one.add_argument("--kv-bytes", type=int, help="of keys and values of each engine; on a GPU a third of what is free")
    one.add_argument("--snapshot-bytes", type=int, help="of snapshots; an eighth of those of keys and values")
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--results", type=Path, default=RESULTS, help="folder of prefix.json")
    options = parser.parse_args(arguments)
    if options.do == "page":
        return options
    for name in ("texts", "prefix", "new", "tokens", "turns", "rounds"):
        if getattr(options, name) < 1:
            one.error(f"--{name} must be 1 or more, got {getattr(options, name)}")
    if options.turns < 2 and "chat" in options.cases:
        one.error(f"--turns must be 2 or more for chats, got {options.turns}")
    if (options.model is None) != (options.adapter is None):
        one.error("--model and --adapter go together")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.do == "page":
        make_page(options.results)
    else:
        measure(options)


if __name__ == "__main__":
    main()
