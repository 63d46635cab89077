"""Models of 7B and 8B at levels in heads, beside levels in layers whose caches are as large: a token, the largest batch, a prompt.

    python eval/benchmarks/heads_models.py
    python eval/benchmarks/heads_models.py --shapes 8B --tokens 32768 --seconds 300
    python eval/benchmarks/heads_models.py --page

Weights are random, in bf16, and so is the order of the heads. A text that is decoded has a cache of so many tokens, of which the first few
were read and the others are random: no prompt has to be read for it. The largest batch is the one whose caches fill the memory that
weights, the adapter and its buffers for layers in part leave, but SPARE bytes. Steps are replayed from CUDA graphs, and prompts read in
pieces.

Every row is written to eval/results/heads-models.json as soon as it is there. Rows of the same card that are there already are kept, so the
same command again goes on where `--seconds` ended the last one; `--again` measures them anew. The first rows are those that matter most.
`--page` measures nothing: it fills docs/measured/inference.md.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Not this folder: there is a package called `kernels`.
sys.path[:] = [str(REPOSITORY / "eval"), str(REPOSITORY / "kernels"), *(x for x in sys.path if Path(x).resolve() != Path(__file__).parent)]

import torch  # noqa: E402
from peft import get_peft_model  # noqa: E402
from reporting import fill_page, rows_table  # noqa: E402
from timing import (  # noqa: E402
    Clock,
    Rows,
    decode_behind,
    numbers_or_error,
    parser_for,
    peak,
    plan_for,
    reset_peak,
    runner_for,
    say_whether_complete,
)
from transformers import AutoConfig  # noqa: E402

from dsla_hf import DSLAConfig  # noqa: E402
from dsla_hf.core.cache import cache_bytes  # noqa: E402
from dsla_hf.inference.bench.measure import Case  # noqa: E402
from dsla_hf.inference.bench.models import collect, preset_config, random_model, ready  # noqa: E402

NAME = "heads-models"
PAGE = REPOSITORY / "docs" / "measured" / "inference.md"
WHAT = ("decode", "prefill")
# A row replaces an earlier one that is alike in these.
KEY = ("shape", "tokens", "what", "unit", "kept", "batch", "device")
SPARE = 3 * 2**30  # bytes for all that a step needs beside weights and caches
PIECE = 4096  # tokens of all rows, of the beginning that is really read


@dataclass(frozen=True)
class Plan:
    """What is measured.

    shapes: configurations of bases by name. lengths: tokens of texts. layers: how many are kept, all of them first; of heads as many as
        these have.
    read: tokens that are really read before the rest of a cache is filled. steps: tokens that are decoded.
    window_size: of the DSLA layers. memory: bytes that the largest batch may have for caches; None: what the card has left.
    """

    shapes: dict[str, Any]
    lengths: tuple[int, ...]
    layers: tuple[int, ...]
    read: int
    steps: int
    window_size: int
    memory: int | None = None


def full_plan() -> Plan:
    shapes = {"8B": preset_config("llama3-8b"), "7B": preset_config("llama2-7b")}
    return Plan(shapes, (32768, 131072), (32, 8, 3), read=256, steps=64, window_size=128)


def tiny_plan() -> Plan:
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    shapes = {name: AutoConfig.for_model("llama", **sizes, num_key_value_heads=heads) for name, heads in (("8B", 2), ("7B", 4))}
    return Plan(shapes, (40, 60), (4, 2, 1), read=24, steps=6, window_size=8, memory=3 * 2**16)


# --- models -----------------------------------------------------------------------------------------------------


def arms(base: Any, plan: Plan) -> Iterator[tuple[str, int, Any]]:
    """(unit, KV heads kept, model) of all levels; `base` is as it was at the end."""
    layers, heads = base.config.num_hidden_layers, base.config.num_key_value_heads
    yield "all", layers * heads, base
    for unit in ("layer", "head"):
        order: list[Any] = list(range(layers))
        if unit == "head":
            order = [[layer, head] for layer in order for head in range(heads)]
        random.Random(0).shuffle(order)
        config = DSLAConfig(conversion_unit=unit, conversion_order=order, level=0, window_size=plan.window_size, task_type="CAUSAL_LM")
        with base.device:
            network = get_peft_model(base, config).eval().requires_grad_(False)
        network.base_model.warned_of_untrained = True  # speed does not depend on it
        for kept in plan.layers[1:]:
            network.set_level(len(order) - kept * (heads if unit == "head" else 1))
            yield unit, kept * heads, network
        base = network.unload()
        del network
        collect()


def bytes_per_row(config: Any, plan: Plan, kept: int, itemsize: int, tokens: int) -> int:
    """Bytes of a cache of `tokens` tokens, of which `kept` KV heads hold keys and values and the others states and windows."""
    size = config.head_dim
    converted = config.num_hidden_layers * config.num_key_value_heads - kept
    token = 2 * size * itemsize
    return kept * tokens * token + converted * (2 * size * size * 4 + (plan.window_size + DSLAConfig.sink_tokens) * token)


# --- measurements -----------------------------------------------------------------------------------------------


def decode(network: Any, plan: Plan, tokens: int, rows: int) -> dict[str, Any]:
    """The numbers of steps of `rows` texts that have `tokens` tokens behind them."""
    numbers = decode_behind(network, tokens, rows, steps=plan.steps, read=plan.read, piece=PIECE)
    return {"batch_size": rows, **numbers}


def prefill(network: Any, plan: Plan, tokens: int) -> dict[str, Any]:
    """Seconds until one text is read and has its first token. Pieces of the same size were read before."""
    runner = runner_for(network)
    case = Case("graph", tokens, 1, 4)
    runner.run(case, 1, min(tokens, 2 * (case.chunk or tokens)))
    reset_peak(runner.device)
    times, cache = runner.run(case, 1)
    return {
        "batch_size": 1,
        "prefill_seconds": times[1] - times[0],
        "cache_bytes": cache_bytes(cache),
        "peak_bytes": peak(runner.device),
    }


def most_rows(network: Any, plan: Plan, kept: int, tokens: int) -> int:
    """How many texts fit, by the bytes of their caches; weights and buffers of this level are where they are."""
    collect()
    free = plan.memory if plan.memory is not None else torch.cuda.mem_get_info(network.device)[0] - SPARE
    return max(free, 0) // bytes_per_row(network.config, plan, kept, network.dtype.itemsize, tokens + plan.steps + 4)


def measured(network: Any, plan: Plan, place: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a row."""
    tokens = place["tokens"]
    if place["what"] == "prefill":
        return prefill(network, plan, tokens)
    if place["batch"] == "one":
        return decode(network, plan, tokens, 1)
    decode(network, plan, 2 * plan.read, 1)  # now this level has its buffers
    rows = max(most_rows(network, plan, place["kept"], tokens), 1)
    while rows:
        try:
            return decode(network, plan, tokens, rows)
        except torch.OutOfMemoryError:
            pass
        collect()  # out here nothing holds the memory of the failed attempt any more
        rows -= max(rows // 16, 1)
    return {"error": "no text fits", "batch_size": 0}


def measure(plan: Plan, names: list[str], what: list[str], rows: Rows, device: torch.device, clock: Clock, again: bool) -> bool:
    """All rows, the most important ones first; False if time did not suffice for all."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for name in names:
        base = None
        for tokens, kind in itertools.product(plan.lengths, what):
            batches = ("one", "largest") if kind == "decode" else ("one",)
            common = {"shape": name, "tokens": tokens, "what": kind, "device": card}
            if not again and all(rows.has(place) for place in _places(plan, name, common, batches)):
                continue
            if base is None:
                if not clock.allows_another():
                    return False
                base = ready(random_model(plan.shapes[name], dtype, device), device)
            for unit, kept, network in arms(base, plan):
                for batch in batches:
                    place = {**common, "unit": unit, "kept": kept, "batch": batch}
                    if not again and rows.has(place):
                        continue
                    if not clock.allows_another():
                        return False
                    of = {"kv_heads": base.config.num_hidden_layers * base.config.num_key_value_heads}
                    rows.add({**place, **of, **numbers_or_error(partial(measured, network, plan, place))})
                    collect()
                    clock.ends_row()
        del base
        collect()
    return True


def _places(plan: Plan, name: str, common: dict[str, Any], batches: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    heads = plan.shapes[name].num_key_value_heads
    for kept in plan.layers:
        for unit, batch in itertools.product(("all",) if kept == plan.layers[0] else ("layer", "head"), batches):
            yield {**common, "unit": unit, "kept": kept * heads, "batch": batch}


# --- page -------------------------------------------------------------------------------------------------------

COLUMNS = (
    "shape",
    "tokens",
    "kept",
    "cache GB of a text",
    "ms a token, one text",
    "prompt s",
    "largest batch",
    "ms a step of it",
    "tokens/s of it",
)


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for every level of every shape and length."""
    table = []
    for shape, tokens, kept, unit in dict.fromkeys((row["shape"], row["tokens"], row["kept"], row["unit"]) for row in sorted_rows(rows)):
        found = {
            (row["what"], row["batch"]): row
            for row in rows
            if (row["shape"], row["tokens"], row["kept"], row["unit"]) == (shape, tokens, kept, unit)
        }
        one, largest, prompt = (found.get(place, {}) for place in (("decode", "one"), ("decode", "largest"), ("prefill", "one")))
        any_row = next(iter(found.values()))
        line = {"shape": shape, "tokens": tokens, "kept": f"{kept} of {any_row['kv_heads']} heads"}
        if unit == "layer":
            line["kept"] += ", in whole layers"
        sized = next((row for row in found.values() if "cache_bytes" in row), None)
        line["cache GB of a text"] = None if sized is None else sized["cache_bytes"] / sized["batch_size"] / 1e9
        for column, row, field, scale in (
            ("ms a token, one text", one, "seconds_per_token", 1e3),
            ("prompt s", prompt, "prefill_seconds", 1.0),
            ("ms a step of it", largest, "seconds_per_token", 1e3),
            ("tokens/s of it", largest, "tokens_per_second", 1.0),
        ):
            line[column] = row[field] * scale if field in row else row.get("error")
        line["largest batch"] = largest.get("batch_size")
        table.append(line)
    return table


def sorted_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    units = ("all", "layer", "head")
    return sorted(rows, key=lambda row: (row["shape"], row["tokens"], -row["kept"], units.index(row["unit"])))


def make_page(rows: list[dict[str, Any]], page: Path = PAGE) -> None:
    if not rows:
        fill_page(page, {"heads": "Nothing measured yet."})
        return
    parts = []
    for card in sorted({row["device"] for row in rows}):
        parts += [f"On one {card}:", rows_table(summary([row for row in rows if row["device"] == card]), list(COLUMNS))]
    fill_page(page, {"heads": "\n\n".join(parts)})


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = parser_for(__doc__, NAME, ("8B", "7B"), "32768 and 131072", "fill docs/measured/inference.md")
    parser.add_argument("--what", nargs="+", default=list(WHAT), choices=WHAT)
    args = parser.parse_args(arguments)
    rows = Rows(NAME, KEY, args.results)
    if args.page:
        make_page(rows.rows)
        return
    plan = plan_for(parser, args, full_plan, tiny_plan)
    torch.manual_seed(0)
    complete = measure(plan, args.shapes, args.what, rows, torch.device(args.device), Clock(args.seconds), args.again)
    print(rows_table(summary(rows.rows), list(COLUMNS)))
    say_whether_complete(complete, args.seconds)


if __name__ == "__main__":
    main()
