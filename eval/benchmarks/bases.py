"""Bases of other families than Llama at levels in heads, beside the plain model as transformers runs it: a token, and a prompt.

    python eval/benchmarks/bases.py
    python eval/benchmarks/bases.py --shapes glm4-9b qwen3.5-4b --seconds 110
    python eval/benchmarks/bases.py --page

Shapes are those of Gemma 3 (4B and 1B, text), Qwen3.5 (4B, text, with linear layers) and GLM-4 (9B), with random weights in bf16: the
first layers of each, as many as rows say, and of the vocabulary the same share, so that embeddings weigh as in the whole model. Levels
convert none, half and all of the KV heads that can be converted, in random order. The plain model is read and decoded by its forward with
SDPA and a `DynamicCache`. DSLA runs by `GraphDecoder` where that can run, else by the same forward; rows say which.

A prompt of one text is read whole by a forward, and in pieces by `GraphDecoder`. What a forward decodes are tokens behind the prompt that
it has read, in a batch that prompt in every row; `GraphDecoder` decodes behind a cache whose keys and values are random.

Every row is written to eval/results/bases.json as soon as it is there. Rows of the same card that are there already are kept, so the same
command again goes on where `--seconds` ended the last one; `--again` measures them anew. `--page` measures nothing: it fills
docs/measured/bases.md and draws its plot.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
# Not this folder: there is a package called `kernels`.
sys.path[:] = [str(REPOSITORY / "eval"), str(REPOSITORY / "kernels"), *(x for x in sys.path if Path(x).resolve() != Path(__file__).parent)]

import torch  # noqa: E402
from peft import get_peft_model  # noqa: E402
from reporting import RESULTS, fill_page, rows_table  # noqa: E402
from timing import Clock, Rows, fill, peak, reset_peak  # noqa: E402
from transformers import AutoConfig, DynamicCache  # noqa: E402

from dsla_hf import DSLAConfig, GraphDecoder  # noqa: E402
from dsla_hf.core.cache import cache_bytes  # noqa: E402
from dsla_hf.core.plots import figure, save  # noqa: E402
from dsla_hf.inference.bench.costs import synchronize  # noqa: E402
from dsla_hf.inference.bench.measure import Case, Runner  # noqa: E402
from dsla_hf.inference.bench.models import collect, random_model, ready  # noqa: E402
from dsla_hf.inference.graph import PlainRecording  # noqa: E402
from dsla_hf.models.architectures import kv_heads_of  # noqa: E402

NAME = "bases"
PAGE = REPOSITORY / "docs" / "measured" / "bases.md"
PLOT = REPOSITORY / "docs" / "images" / "bases.png"
# A row replaces an earlier one that is alike in these.
KEY = ("shape", "layers", "tokens", "what", "arm", "batch_size", "device")
ARMS = ("plain", "level 0", "half", "all")
PIECE = 16384  # tokens of a piece of a prompt that GraphDecoder reads
READ = 256  # tokens that are really read before the rest of a cache is filled


@dataclass(frozen=True)
class Shape:
    """The text model of a checkpoint: its whole number of layers, how many of the first ones are measured, and what its config has."""

    model_type: str
    of_layers: int
    layers: int
    values: dict[str, Any]

    def config(self) -> Any:
        """The config of what is measured."""
        vocabulary = max(round(self.values["vocab_size"] * self.layers / self.of_layers / 64) * 64, 64)
        values = {**self.values, "vocab_size": vocabulary, "num_hidden_layers": self.layers, "max_position_embeddings": 131072}
        return AutoConfig.for_model(self.model_type, **values, pad_token_id=0, bos_token_id=1, eos_token_id=None)


def gemma3(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, window: int, vocabulary: int, factor: float | None) -> Shape:
    whole = {"rope_type": "default", "rope_theta": 1e6} if factor is None else {"rope_type": "linear", "rope_theta": 1e6, "factor": factor}
    values = {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 256,
        "sliding_window": window,
        "vocab_size": vocabulary,
        "query_pre_attn_scalar": 256,
        "rope_parameters": {"full_attention": whole, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
    }
    return Shape("gemma3_text", layers, 12, values)  # of which two see all tokens


SHAPES = {
    "gemma3-4b": gemma3(2560, 10240, 34, 8, 4, 1024, 262208, 8.0),
    "gemma3-1b": gemma3(1152, 6912, 26, 4, 1, 512, 262144, None),
    "qwen3.5-4b": Shape(
        "qwen3_5_text",
        32,
        8,  # of which two are softmax attention
        {
            "hidden_size": 2560,
            "intermediate_size": 9216,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 32,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "vocab_size": 248320,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        },
    ),
    "glm4-9b": Shape(
        "glm4",
        40,
        8,
        {
            "hidden_size": 4096,
            "intermediate_size": 13696,
            "num_attention_heads": 32,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "attention_bias": False,
            "vocab_size": 151552,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    shapes: by name. lengths: tokens of prompts. batches: rows of texts that are decoded. read: tokens that GraphDecoder really reads.
    steps: tokens that are decoded, as many as it takes until a block of the window went into the states. repeats: of a prompt.
    """

    shapes: dict[str, Shape]
    lengths: tuple[int, ...] = (8192, 32768)
    batches: tuple[int, ...] = (1, 16)
    read: int = READ
    steps: int = 64
    repeats: int = 3


def tiny_plan() -> Plan:
    """The same with sizes that a CPU reads at once."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    of_types = {
        "gemma3_text": {"sliding_window": 12, "query_pre_attn_scalar": 8},
        "qwen3_5_text": dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), 8)
        | dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    }
    shapes = {}
    for name, shape in SHAPES.items():
        few = {**shape.values, **sizes, **of_types.get(shape.model_type, {}), "vocab_size": 640}
        shapes[name] = replace(shape, values=few)
    return Plan(shapes, (40, 60), (1, 2), read=24, steps=3, repeats=1)


# --- models -----------------------------------------------------------------------------------------------------


def heads_to_convert(base: Any) -> list[tuple[int, int]]:
    """The KV heads that a plan has by default, in random order."""
    network = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM"))
    layers = network.peft_config["default"].conversion_order
    network.unload()
    order = [(layer, head) for layer in layers for head in range(kv_heads_of(base.config))]
    random.Random(0).shuffle(order)
    return order


def arms(base: Any) -> Iterator[tuple[str, int, int, Any]]:
    """(arm, level, KV heads that can be converted, model) of all of `ARMS`; `base` is as it was at the end."""
    with base.device:
        order = heads_to_convert(base)
    yield "plain", 0, len(order), base
    with base.device:
        network = get_peft_model(base, DSLAConfig(conversion_unit="head", conversion_order=order, level=0, task_type="CAUSAL_LM"))
    network = network.eval().requires_grad_(False)
    network.base_model.warned_of_untrained = True  # speed does not depend on it
    for arm, level in zip(ARMS[1:], (0, len(order) // 2, len(order)), strict=True):
        network.set_level(level)
        yield arm, level, len(order), network
    network.unload()
    del network
    collect()


# --- measurements -----------------------------------------------------------------------------------------------


class Forwards:
    """A model that is run by its forward with a `DynamicCache`. It keeps the last prompt that it has read."""

    engine = "forward"

    def __init__(self, network: Any, plan: Plan):
        self.network, self.plan, self.device = network, plan, network.device
        self.last: tuple[int, Any] | None = None

    def config(self) -> Any:
        return self.network.get_base_model().config if hasattr(self.network, "get_base_model") else self.network.config

    def ids(self, rows: int, tokens: int) -> torch.Tensor:
        return torch.randint(0, self.config().vocab_size, (rows, tokens), device=self.device)

    def prompt(self, tokens: int) -> tuple[float, Any]:
        """Seconds to read one text, and its cache."""
        self.last = None
        collect()
        cache, ids = DynamicCache(config=self.config()), self.ids(1, tokens)
        synchronize(self.device)
        start = time.perf_counter()
        self.network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        synchronize(self.device)
        seconds = time.perf_counter() - start
        self.last = tokens, cache
        return seconds, cache

    def prefill(self, tokens: int) -> dict[str, Any]:
        """Seconds until one text is read; the first time, which is not counted, compiles kernels."""
        self.prompt(tokens)
        reset_peak(self.device)
        times = [self.prompt(tokens)[0] for _ in range(self.plan.repeats)]
        return {"prefill_seconds": statistics.median(times), "cache_bytes": cache_bytes(self.last[1]), "peak_bytes": peak(self.device)}

    def decode(self, tokens: int, rows: int) -> dict[str, Any]:
        """Seconds of a step of `rows` texts behind a prompt of `tokens`. The cache is used up."""
        cache = self.last[1] if self.last is not None and self.last[0] == tokens else self.prompt(tokens)[1]
        self.last = None
        if rows > 1:
            cache.reorder_cache(torch.zeros(rows, dtype=torch.long, device=self.device))  # which layers of all kinds know
        reset_peak(self.device)
        times, ids = [], self.ids(rows, 1)
        for _ in range(4 + self.plan.steps):  # the first ones compile kernels
            synchronize(self.device)
            start = time.perf_counter()
            ids = self.network(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return _of_steps(times[4:], rows, cache, self.device)


class Graphs:
    """A model that is run by `GraphDecoder`."""

    engine = "graph"

    def __init__(self, network: Any, plan: Plan):
        self.network, self.plan, self.device = network, plan, network.device

    def runner(self) -> Runner:
        runner = Runner(self.network)
        if self.device.type != "cuda":
            runner.decoder = GraphDecoder(self.network, record=PlainRecording)  # to see that it runs
        return runner

    def prefill(self, tokens: int) -> dict[str, Any]:
        runner, times = self.runner(), []
        case = Case("graph", tokens, 1, 4, prefill_tokens=PIECE)
        runner.run(case, 1)
        reset_peak(self.device)
        for _ in range(self.plan.repeats):
            stamps, cache = runner.run(case, 1)
            times.append(stamps[1] - stamps[0])
        return {"prefill_seconds": statistics.median(times), "cache_bytes": cache_bytes(cache), "peak_bytes": peak(self.device)}

    def decode(self, tokens: int, rows: int) -> dict[str, Any]:
        runner = self.runner()
        case = Case("graph", tokens, rows, self.plan.steps + 4, prefill_tokens=PIECE)
        runner.run(case, 1, self.plan.read)
        decoder = runner.decoder
        assert decoder is not None and decoder.workspace is not None
        fill(decoder.workspace, tokens - 1)
        reset_peak(self.device)
        times, cache = runner.run(case, case.new_tokens, past_key_values=decoder.workspace.cache)
        if (why := decoder.recorder.reason) is not None:
            raise (torch.OutOfMemoryError if "memory" in why else RuntimeError)(f"steps were not recorded: {why}")
        steps = [after - before for before, after in itertools.pairwise(times[1:])][-self.plan.steps :]  # the first ones record
        return _of_steps(steps, rows, cache, self.device)


def _of_steps(steps: list[float], rows: int, cache: Any, device: torch.device) -> dict[str, Any]:
    per_token = statistics.fmean(steps)
    return {
        "seconds_per_token": per_token,
        "median_seconds_per_token": statistics.median(steps),
        "tokens_per_second": rows / per_token,
        "cache_bytes": cache_bytes(cache),
        "peak_bytes": peak(device),
    }


def engine_for(arm: str, network: Any, plan: Plan) -> tuple[Any, str | None]:
    """What runs an arm, and why it is not `GraphDecoder` where that is asked."""
    if arm == "plain":
        return Forwards(network, plan), None
    record = {} if network.device.type == "cuda" else {"record": PlainRecording}
    if (why := GraphDecoder(network, **record).obstacle()) is not None:
        return Forwards(network, plan), why
    return Graphs(network, plan), None


def measured(engine: Any, place: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a row, or the error that it ended with."""
    try:
        if place["what"] == "prefill":
            return engine.prefill(place["tokens"])
        return engine.decode(place["tokens"], place["batch_size"])
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # one row that breaks must not cost the others
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:300]}


def places_of(name: str, shape: Shape, plan: Plan, card: str, arm: str) -> list[dict[str, Any]]:
    """The rows of an arm; a prompt first, behind which the same engine can decode."""
    common = {
        "shape": name,
        "model_type": shape.model_type,
        "layers": shape.layers,
        "of_layers": shape.of_layers,
        "arm": arm,
        "device": card,
    }
    return [
        {**common, "tokens": tokens, "what": what, "batch_size": rows}
        for tokens in plan.lengths
        for what, rows in (("prefill", 1), *(("decode", rows) for rows in plan.batches))
    ]


def measure(plan: Plan, names: list[str], rows: Rows, device: torch.device, clock: Clock, again: bool) -> bool:
    """All rows, shape by shape; False if time did not suffice for all."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    for name in names:
        shape = plan.shapes[name]
        missing = {arm: [place for place in places_of(name, shape, plan, card, arm) if again or not rows.has(place)] for arm in ARMS}
        if not any(missing.values()):
            continue
        if not clock.allows_another():
            return False
        base = ready(random_model(shape.config(), dtype, device), device)
        base.set_attn_implementation("sdpa")
        for arm, level, heads, network in arms(base):
            engine, why = engine_for(arm, network, plan)
            for place in missing[arm]:
                if not clock.allows_another():
                    return False
                told = {"engine": engine.engine, **({} if why is None else {"no_graphs": why})}
                rows.add({**place, "level": level, "kv_heads": heads, **told, **measured(engine, place)})
                clock.ends_row()
            del engine
            collect()
        del base, network
        collect()
    return True


# --- page -------------------------------------------------------------------------------------------------------


def measured_at(rows: list[dict[str, Any]]) -> tuple[list[int], list[int]]:
    """Lengths of prompts, and rows of texts decoded."""
    return sorted({row["tokens"] for row in rows}), sorted({row["batch_size"] for row in rows if row["what"] == "decode"})


def columns(rows: list[dict[str, Any]]) -> dict[str, tuple[str, int, int]]:
    """What is measured of each row of the table, by the title of its column: (what, tokens, rows)."""
    lengths, batches = measured_at(rows)
    found = {}
    for tokens in lengths:
        found[f"prompt of {tokens:,}, s"] = ("prefill", tokens, 1)
        for batch in batches:
            found[f"ms a step, {batch} × {tokens:,}"] = ("decode", tokens, batch)
    return found


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for every arm of every shape."""
    table = []
    for shape, arm in itertools.product(dict.fromkeys(row["shape"] for row in rows), ARMS):
        of_arm = [row for row in rows if (row["shape"], row["arm"]) == (shape, arm)]
        if not of_arm:
            continue
        first = of_arm[0]
        line: dict[str, Any] = {"shape": f"{shape}, {first['layers']} of {first['of_layers']} layers"}
        line["model"] = "transformers, SDPA" if arm == "plain" else f"level {first['level']} of {first['kv_heads']} KV heads"
        line["runs by"] = first["engine"]
        for title, place in columns(rows).items():
            row = next((row for row in of_arm if (row["what"], row["tokens"], row["batch_size"]) == place), {})
            seconds = row.get("prefill_seconds", row.get("seconds_per_token"))
            line[title] = row.get("error") if seconds is None else seconds if place[0] == "prefill" else 1e3 * seconds
        table.append(line)
    return table


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """How often the time of the plain model each level takes, by shape: a panel for each column of the table."""
    titles, shapes = columns(rows), list(dict.fromkeys(row["shape"] for row in rows))
    across = len(titles) // len(measured_at(rows)[0])
    drawn, axes = figure(len(titles) // across, across, size=(4.2 * across, 3.2 * (len(titles) // across)))
    for axis, (title, place) in zip(axes, titles.items(), strict=True):
        of_place = {(row["shape"], row["arm"]): row for row in rows if (row["what"], row["tokens"], row["batch_size"]) == place}
        for number, arm in enumerate(ARMS[1:]):
            points = [
                (at + 0.27 * (number - 1), _seconds(of_place[shape, arm]) / _seconds(of_place[shape, "plain"]))
                for at, shape in enumerate(shapes)
                if all("error" not in of_place.get((shape, which), {"error": ""}) for which in (arm, "plain"))
            ]
            axis.bar([x for x, _ in points], [y for _, y in points], 0.25, label=arm if arm == "level 0" else f"{arm} of the heads")
        axis.axhline(1, color="0.4", linewidth=0.8)
        axis.set_title(title.replace(", s", "").replace("ms a step, ", "a step, "), fontsize="medium")
        axis.set_xticks(range(len(shapes)), shapes, rotation=20)
        axis.set_ylabel("time over the plain model's")
    axes[0].legend(fontsize="small")
    save(drawn, path)


def _seconds(row: dict[str, Any]) -> float:
    return row.get("prefill_seconds", row.get("seconds_per_token"))


def make_page(rows: list[dict[str, Any]], page: Path = PAGE, plot: Path = PLOT) -> None:
    if not rows:
        fill_page(page, {"bases": "Nothing measured yet."})
        return
    parts = []
    for number, card in enumerate(sorted({row["device"] for row in rows})):
        of_card = [row for row in rows if row["device"] == card]
        parts += [f"On one {card}:", rows_table(summary(of_card), ["shape", "model", "runs by", *columns(of_card)])]
        name = plot if number == 0 else plot.with_stem(f"{plot.stem}-{number + 1}")
        draw(of_card, name)
        parts.append(f"![time of prompts and steps over the plain model's](../images/{name.name})")
        reasons = {row["shape"]: row["no_graphs"] for row in of_card if "no_graphs" in row}
        parts += [f"No graphs for {shape}: {why}." for shape, why in reasons.items()]
    fill_page(page, {"bases": "\n\n".join(parts)})


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, help="lengths of prompts (8192 and 32768)")
    parser.add_argument("--layers", type=int, help="of each shape, instead of 12 of Gemma 3 and 8 of others")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row that would probably end later")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already, too")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to see that all of it runs")
    parser.add_argument("--page", action="store_true", help="measure nothing; fill docs/measured/bases.md and draw its plot")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"folder of {NAME}.json")
    args = parser.parse_args(arguments)
    rows = Rows(NAME, KEY, args.results)
    if args.page:
        make_page(rows.rows)
        return
    device, clock = torch.device(args.device), Clock(args.seconds)
    if device.type != "cuda" and not args.tiny:
        parser.error("times are those of a CUDA device; --tiny runs on a CPU, too")
    plan = tiny_plan() if args.tiny else Plan(SHAPES)
    if args.tokens:
        if (shortest := min(args.tokens)) <= plan.read:
            parser.error(f"--tokens must be above {plan.read}, of which every text is really read, got {shortest}")
        plan = replace(plan, lengths=tuple(args.tokens))
    if args.layers is not None:
        for name in args.shapes:
            if not 1 <= args.layers <= plan.shapes[name].of_layers:
                parser.error(f"--layers of {name} must be from 1 to {plan.shapes[name].of_layers}, got {args.layers}")
        plan = replace(
            plan, shapes={name: replace(shape, layers=args.layers) for name, shape in plan.shapes.items() if name in args.shapes}
        )
    torch.manual_seed(0)
    complete = measure(plan, args.shapes, rows, device, clock, args.again)
    for card in dict.fromkeys(row["device"] for row in rows.rows):
        of_card = [row for row in rows.rows if row["device"] == card]
        print(rows_table(summary(of_card), ["shape", "model", "runs by", *columns(of_card)]))
    if not complete:
        print(f"{args.seconds:g} seconds did not suffice: rows are missing, and the same command again goes on with them")


if __name__ == "__main__":
    main()
