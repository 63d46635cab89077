"""Levels in heads on a real checkpoint, beside levels in whole layers and beside a window alone, trained alike.

    python eval/heads.py text MODEL DATA --cache text.pt                        # once; the other parts share it
    python eval/heads.py train MODEL DATA --cache text.pt --arm heads --out runs/heads
    python eval/heads.py measure MODEL DATA --cache text.pt --adapter runs/heads --arm heads --out heads-rows.json
    python eval/heads.py page heads-rows.json heads-window-rows.json ...        # eval/results/heads.json, docs/measured/heads.md
    python eval/heads.py recipes one-way-rows.json another-way-rows.json ...    # eval/results/heads-recipes.json, for the page

Arms may run as processes at the same time. An interrupted one goes on: `train` from its last checkpoint, `measure` behind its last level.
DATA is a folder with `distill.txt.xz` (training and ranking, no document in both), `novels_val.jsonl.xz` and `wikitext2/valid.txt` (held
out). Lengths are at most the model's context, and `page --name` keeps the results of models apart. `--tiny` takes sizes for a
small model on a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measures import held_out_blocks
from peft import get_peft_model
from reporting import RESULTS, made_once, rows_table, write_results

from dsla_hf import DSLAConfig, DualStateAttention, set_level
from dsla_hf.core.files import write_json, write_whole
from dsla_hf.core.plots import figure, mark_plain, save
from dsla_hf.core.progress import bar, say
from dsla_hf.core.results import origin
from dsla_hf.core.tables import markdown_table
from dsla_hf.evaluation.long_context import BATCH_TOKENS, Haystack, Task, answers_right, prepare, read_haystack
from dsla_hf.inference.batching import halve_until_it_fits
from dsla_hf.levels.table import CACHE_LENGTHS
from dsla_hf.models.adapter import active_config
from dsla_hf.models.architectures import head_dim_of
from dsla_hf.models.loading import device, load_adapter, load_config, load_model, load_tokenizer
from dsla_hf.models.sizes import core_bytes, text_bytes
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.planting import ANSWER_WEIGHT, with_planted
from dsla_hf.training.probes import make_probes
from dsla_hf.training.recipe import distill
from dsla_hf.training.text import PackedTokens, read_texts
from dsla_hf.training.unit_ranking import PROBE_WEIGHT, UNIT_METRICS

DOCS = Path(__file__).parent.parent / "docs"
NAME = "heads"
KEPT = (45, 22, 9, 6, 3, 0)
WINDOW, TINY_WINDOW = 384, 32  # tokens, of arms with states; those without have what the states take in tokens more
PLANTED = 1 / 3  # of the training rows
LEARNING_RATE, GATE_FACTOR = 1e-3, 10.0
Z = 1.96  # of intervals of 95 %
MORE_AT_ONCE = 4  # times as many prompts as evaluations take, where they fit
TRAINING, ORDER = "training.json", "order.json"  # beside an adapter
RECIPES = "heads-recipes"
# Bounds that were set before anything was measured, by page and by KV heads kept of SmolLM2's 90: perplexity over the teacher at most, and
# codes by length, at least; beside the teacher's where negative.
WANTED: dict[str, dict[int, tuple[float, dict[int, float]]]] = {
    "heads": {
        22: (1.016, {1024: -0.03, 2048: -0.03, 4096: -0.03, 7500: -0.03}),
        9: (1.04, {1024: 0.95, 2048: 0.95, 4096: 0.92, 7500: 0.80}),
        3: (1.12, {2048: 0.85}),
    },
    "smollm2": {
        45: (1.01, {1024: -0.01, 2048: -0.01, 4096: -0.01, 7500: -0.01}),
        22: (1.015, {1024: -0.02, 2048: -0.02, 4096: -0.02, 7500: -0.02}),
        9: (1.035, {1024: -0.04, 2048: -0.04, 4096: -0.04, 7500: -0.12}),
        0: (1.15, {}),
    },
}
HOW_TRAINED = ("align_steps", "steps", "tokens_per_step", "lengths", "planted", "answer_weight", "probe_weight", "level_draws")
HOW_TRAINED += ("learning_rate", "gate_factor", "seed")
# Settings that older results do not name, and what these had. matched: whether states began as `match_outputs` sets them; state_bias: else.
NEWER = {"highest_share": 0.0, "even_share": 0.0, "state_bias": 0.0, "matched": False, "ranking": "shares", "data": "distill.txt"}


@dataclass(frozen=True)
class Arm:
    """unit: what its levels count. states: whether converted heads have them, or a window alone that takes as many bytes. one: whether the
    history state alone is read, beside a window longer by the bytes of the other; not a layer to use, which would still hold both."""

    unit: str
    states: bool = True
    one: bool = False


ARMS = {
    "heads": Arm("head"),
    "heads-window": Arm("head", False),
    "layers": Arm("layer"),
    "layers-window": Arm("layer", False),
    "heads-one": Arm("head", one=True),
}


@dataclass(frozen=True)
class Sizes:
    """Tokens, where nothing else is said."""

    lengths: tuple[int, ...] = (2048, 8192)  # of training rows, in turn
    ranking: int = 131_072  # kept apart for the ranking
    ranking_rows: int = 4  # rows of text, of the shorter length
    ranking_probes: int = 18  # probes
    shortest_probe: int = 512
    longest_probe: int = 7500
    wiki: int = 120_000
    wiki_length: int = 2048
    novels: int = 12  # texts
    novels_length: int = 8192  # its second half is measured
    code_lengths: tuple[int, ...] = (1024, 2048, 4096, 7500)
    recall_length: int = 2048
    recall_samples: int = 100  # texts

    def shorter(self, factor: float) -> Sizes:
        """All lengths so many times as long, for a model whose context is no longer."""
        one = ("shortest_probe", "longest_probe", "wiki_length", "novels_length", "recall_length")
        several = ("lengths", "code_lengths")
        given: dict[str, Any] = {name: round(getattr(self, name) * factor) for name in one}
        return dataclasses.replace(self, **given, **{name: tuple(round(x * factor) for x in getattr(self, name)) for name in several})


TINY = Sizes((512, 1024), 4096, 2, 3, 450, 600, 1600, 512, 2, 1024, (300, 400), 1200, 2)


def sizes_of(options: argparse.Namespace) -> Sizes:
    """For the model; what is longer than its context is shortened."""
    if options.tiny:
        return TINY
    sizes = Sizes()
    return sizes.shorter(min(1.0, load_config(options.model).max_position_embeddings / max(sizes.lengths)))


# --- text -------------------------------------------------------------------------------------------------------


def tokens_of(model: str, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the end-of-text token behind it."""
    tokenizer = load_tokenizer(model)
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [[*ids, *eos] for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]


def all_tokens(model: str, texts: list[str], processes: int) -> list[list[int]]:
    """`tokens_of` all texts, by several processes."""
    if processes == 1:
        return tokens_of(model, texts)
    parts = [texts[begin : begin + 16] for begin in range(0, len(texts), 16)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        done = bar(pool.imap(partial(tokens_of, model), parts), total=len(parts), desc="tokenizing", unit=" parts")
        return [ids for part in done for ids in part]


def make_text(model: str, data: Path, sizes: Sizes, processes: int) -> dict[str, Any]:
    """`train` `[N, longest]`, `ranking` `[tokens]` of other documents, `wiki` and `novels` `[N, T]`, held out, `haystack` (a tensor
    for each document); what they were made with.

    Raises:
        ValueError: if there is too little text.
    """
    texts = list(read_texts(data / "distill.txt.xz"))
    random.Random(0).shuffle(texts)
    documents = all_tokens(model, texts, processes)
    ranking: list[int] = []
    while len(ranking) < sizes.ranking and documents:
        ranking += documents.pop(0)
    train = torch.tensor([token for ids in documents for token in ids], dtype=torch.int32)
    longest = max(sizes.lengths)
    if len(train) < longest:
        raise ValueError(f"{data}/distill.txt.xz leaves {len(train):,} tokens to train on, fewer than a row of {longest:,}: give more text")
    tokenizer = load_tokenizer(model)
    wiki = tokenizer((data / "wikitext2" / "valid.txt").read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return {
        "made_with": made_with(model, sizes),
        "train": train[: len(train) // longest * longest].view(-1, longest),
        "ranking": torch.tensor(ranking, dtype=torch.int32),
        "wiki": torch.tensor(wiki[: min(sizes.wiki, len(wiki)) // sizes.wiki_length * sizes.wiki_length]).view(-1, sizes.wiki_length),
        "novels": held_out_blocks(data / "novels_val.jsonl.xz", tokenizer, sizes.novels_length, sizes.novels)[0],
        "haystack": [torch.tensor(ids, dtype=torch.int32) for ids in read_haystack(tokenizer, data / "novels_val.jsonl.xz").documents],
    }


def made_with(model: str, sizes: Sizes) -> dict[str, Any]:
    return {"model": Path(model).name, "sizes": json.loads(json.dumps(dataclasses.asdict(sizes)))}


def read_text(options: argparse.Namespace, sizes: Sizes) -> dict[str, Any]:
    """The text out of the cache, made if it is not there.

    Raises:
        ValueError: if the cache was made for another model or other sizes.
    """
    make = partial(make_text, options.model, options.data, sizes, options.processes)
    text = make() if options.cache is None else made_once(options.cache, make)
    if text["made_with"] != made_with(options.model, sizes) or "haystack" not in text:
        raise ValueError(f"{options.cache} was made with {text['made_with']}: name another --cache")
    return text


# --- training ---------------------------------------------------------------------------------------------------


def read_order(file: Path, unit: str, layers: int, kv_heads: int) -> list[Any]:
    """A stored order of KV heads; of layers the order that it implies, a layer's place being that of its most valuable head.

    Raises:
        ValueError: if it does not hold every KV head of the model once.
    """
    order = [tuple(entry) for entry in json.loads(file.read_text())]
    every = [(layer, head) for layer in range(layers) for head in range(kv_heads)]
    if sorted(order) != every:
        raise ValueError(f"{file} must hold each of the {len(every)} KV heads [layer, head] of the model once")
    if unit == "head":
        return order
    place = {layer: place for place, (layer, _) in enumerate(order)}  # the last one counts
    return sorted(place, key=place.__getitem__)


def ranking_rows(text: dict[str, Any], sizes: Sizes) -> list[torch.Tensor]:
    """Batches of text that units are ranked on."""
    short = min(sizes.lengths)
    return list(text["ranking"].long()[: sizes.ranking_rows * short].view(-1, short).split(2))


def ranking_probes(tokenizer: Any, text: dict[str, Any], sizes: Sizes) -> list[dict[str, torch.Tensor]]:
    """Probes that heads are ranked on beside it."""
    return make_probes(tokenizer, text["ranking"].tolist(), sizes.longest_probe, sizes.ranking_probes, shortest=sizes.shortest_probe)


def window_of(arm: Arm, window: int, base_config: Any, itemsize: int) -> int:
    """The window of an arm, so that all take the same bytes: `window` tokens with states, and without them what these take in tokens more.
    itemsize: bytes of a number in keys and values."""
    if arm.states and not arm.one:
        return window
    head_dim = head_dim_of(base_config)
    sizes = [core_bytes(DualStateAttention(1, 1, head_dim, states=states), 1, itemsize) for states in (True, False)]
    more = (sizes[0]["dsla_bytes"] - sizes[1]["dsla_bytes"]) // sizes[0]["softmax_bytes_per_token"]
    return window + more // (4 if arm.one else 2) * 2


def read_one_state(model: Any) -> None:
    """Let the history state alone be read, for good."""
    for name, weight in model.named_parameters():
        if "mix_logits" in name:
            with torch.no_grad():
                weight.copy_(torch.tensor([30.0, -30.0]).expand_as(weight))
            weight.requires_grad_(False)


def train(options: argparse.Namespace, sizes: Sizes) -> None:
    """Distil one arm into `options.out`: adapter, order of units, and how it was trained."""
    arm, text = ARMS[options.arm], read_text(options, sizes)
    base_config, tokenizer = load_config(options.model), load_tokenizer(options.model)
    on_gpu = device() == "cuda"
    window = options.window
    if window is None:
        window = TINY_WINDOW if options.tiny else WINDOW
    given: dict[str, Any] = {"window_size": window_of(arm, window, base_config, 2 if on_gpu else 4), "states": arm.states}
    if options.order is not None:
        layers, heads = base_config.num_hidden_layers, base_config.num_key_value_heads
        given |= {"conversion_order": read_order(options.order, arm.unit, layers, heads), "level": 0}
    lengths = options.lengths or list(sizes.lengths)
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    base = load_model(options.model, "bfloat16" if on_gpu else "float32").to(device())
    model = get_peft_model(base, DSLAConfig(conversion_unit=arm.unit, task_type="CAUSAL_LM", **given))
    if arm.one:
        read_one_state(model)
    args = DSLATrainingArguments(
        output_dir=str(options.out),
        per_device_train_batch_size=options.batch,
        sequence_lengths=lengths,
        level_draws=options.level_draws,
        highest_share=options.highest_share,
        learning_rate=options.learning_rate,
        gate_learning_rate_factor=options.gate_factor,
        logging_steps=20,
        save_steps=100,
        save_total_limit=1,
        dataloader_num_workers=2 if on_gpu else 0,  # planting tokenises
        report_to=[],
        seed=options.seed,
        use_cpu=not on_gpu,
    )
    ranking: dict[str, Any] = {}
    if options.order is None:
        ranking["ranking_data"] = ranking_rows(text, sizes)
        if arm.unit == "head":
            ranking["ranking_metric"] = options.ranking
            ranking["ranking_probes"] = ranking_probes(tokenizer, text, sizes)
    start = time.perf_counter()
    distill(
        model,
        with_planted(PackedTokens(text["train"]), tokenizer, options.planted, options.seed, options.answer_weight, options.even_share),
        args,
        alignment_steps=options.align_steps,
        logits_steps=options.steps,
        probe_weight=options.probe_weight,
        **ranking,
    )
    config = active_config(model)
    write_json(options.out / ORDER, config.conversion_order)
    how = {
        "arm": options.arm,
        "window": config.window_size,
        "states": config.states,
        "align_steps": options.align_steps,
        "steps": options.steps,
        "tokens_per_step": options.batch * max(sizes.lengths),
        "lengths": lengths,
        "planted": options.planted,
        "answer_weight": options.answer_weight,
        "probe_weight": options.probe_weight,
        "level_draws": options.level_draws,
        "highest_share": options.highest_share,
        "even_share": options.even_share,
        "state_bias": 0.0,
        "matched": True,
        "ranking": options.ranking,
        "learning_rate": options.learning_rate,
        "gate_factor": options.gate_factor,
        "seed": options.seed,
        "order": "ranked after alignment" if options.order is None else "given",
        "seconds": round(time.perf_counter() - start, 1),  # of this call
    }
    if not (options.out / TRAINING).exists():  # else it was finished before
        write_json(options.out / TRAINING, {**how, **origin(command_of(options))})
    say(f"{options.arm}: trained in {how['seconds']:.0f} s")


# --- measuring --------------------------------------------------------------------------------------------------


def way_of(training: dict[str, Any]) -> dict[str, Any]:
    """How an arm was trained: what makes ways of training differ."""
    return {name: training[name] for name in HOW_TRAINED} | {name: training.get(name, old) for name, old in NEWER.items()}


def wilson(right: int, count: int) -> tuple[float, float]:
    """Interval of 95 % of a share (Wilson's), which holds at shares near 0 and 1 too."""
    share, spread = right / count, Z * Z / count
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / (4 * count)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def plan_of_levels(kept: Sequence[int], unit: str, layers: int, kv_heads: int) -> dict[int, int]:
    """Levels by the KV heads that they keep; of layers those that keep no more heads than that.

    Raises:
        ValueError: for a number of heads that the model does not have.
    """
    total = layers * kv_heads
    if wrong := [number for number in kept if not 0 <= number < total]:
        raise ValueError(f"--kept must be numbers of KV heads from 0 to below {total}, got {wrong}")
    if unit == "head":
        return {number: total - number for number in kept}
    return {number // kv_heads * kv_heads: layers - number // kv_heads for number in kept}


def cache_bytes(model: Any, level: int) -> dict[str, int]:
    """What the cache of one text takes, by its tokens."""
    base, config = model.get_base_model(), active_config(model)
    return {f"bytes_{tokens // 1024}k": text_bytes(base, config, tokens, level) for tokens in CACHE_LENGTHS}


def make_tasks(tokenizer: Any, text: dict[str, Any], sizes: Sizes, probes: int, seed: int) -> dict[str, Task]:
    """What each level is asked, the same at all of them and in all arms."""
    hay = Haystack([document.tolist() for document in text["haystack"]])
    codes = prepare(tokenizer, ["needle"], sizes.code_lengths, probes, seed, hay)
    recall = prepare(tokenizer, ["associative_recall", "variable_tracking"], [sizes.recall_length], sizes.recall_samples, seed, hay)
    texts = {"wiki": (sizes.wiki_length, text["wiki"]), "novels": (sizes.novels_length, text["novels"])}
    return (
        {name: Task("position_perplexity", length, blocks.long(), tokenizer) for name, (length, blocks) in texts.items()}
        | {f"code_{task.length}": task for task in codes}
        | {task.name: task for task in recall}
    )


def measured(model: Any, tasks: dict[str, Task]) -> dict[str, Any]:
    """One level: perplexities, and shares that were found; of codes also the interval and, for pairs, which were found (`1`, in order)."""
    row: dict[str, Any] = {}
    for name, task in tasks.items():
        if name.startswith("code_"):
            found = codes_found(model, task)
            row[name] = sum(found) / len(found)
            row[f"{name}_interval"] = wilson(sum(found), len(found))
            row[f"{name}_found"] = "".join("01"[right] for right in found)
            continue
        values = task.run(model)
        ends = {"wiki": "", "novels": f"[{task.length // 2}-{task.length - 1}]"}
        row[name] = values[f"perplexity@{task.length}{ends[name]}" if name in ends else f"accuracy@{task.length}"]
    return row


def codes_found(model: Any, task: Task) -> list[bool]:
    # Few tokens follow each prompt, so a step costs as much for many as for one.
    at_once = max(1, MORE_AT_ONCE * BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]) // task.length)
    return halve_until_it_fits(
        lambda size: answers_right(model, task.tokenizer, task.data, size), at_once, f"codes in {task.length} tokens"
    )


def measure(options: argparse.Namespace, sizes: Sizes) -> None:
    """The teacher and the levels of an arm, a row each, written after each; rows that are there stay.

    Raises:
        ValueError: if the adapter is of another arm, or the file has rows that were measured otherwise.
    """
    arm, tokenizer = ARMS[options.arm], load_tokenizer(options.model)
    how = json.loads((options.adapter / TRAINING).read_text())
    if how["arm"] != options.arm:
        raise ValueError(f"{options.adapter} holds the arm {how['arm']!r}: give --arm {how['arm']}, or another --adapter")
    about = {"arm": options.arm, "model": Path(options.model).name, "probes": options.probes, "seed": options.seed, "training": how}
    rows: list[dict[str, Any]] = []
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if changed := [name for name, value in about.items() if before.get(name) != value]:
            raise ValueError(f"{options.out} was measured with another {', '.join(changed)}: name another --out")
        rows = before["rows"]
    on_gpu = device() == "cuda"
    model = load_adapter(options.model, str(options.adapter), "bfloat16" if on_gpu else "float32").to(device()).eval()
    config, layers = active_config(model), model.config.num_hidden_layers
    levels = plan_of_levels(options.kept, arm.unit, layers, config.kv_heads)
    if options.teacher:
        levels = {layers * config.kv_heads: 0} | levels
    there = {row["kept"] for row in rows}
    left = {kept: level for kept, level in levels.items() if kept not in there}
    if not left:
        say(f"{options.out} has all levels")
        return
    tasks = make_tasks(tokenizer, read_text(options, sizes), sizes, options.probes, options.seed)
    for kept, level in left.items():
        set_level(model, level)
        start = time.perf_counter()
        row = {"arm": options.arm, "kept": kept, "of": layers * config.kv_heads, "level": level, "window": config.window_size}
        row["device"] = origin()["device"]
        row |= {**measured(model, tasks), **({} if arm.one else cache_bytes(model, level))}
        rows.append(row)
        write_results(options.out.stem, rows, command_of(options), folder=options.out.parent, **about)
        codes = " ".join(f"{row[f'code_{length}']:.3f}" for length in sizes.code_lengths)
        seconds = time.perf_counter() - start
        say(f"{options.arm}, {kept} kept: wiki {row['wiki']:.3f}, novels {row['novels']:.3f}, code {codes} ({seconds:.0f} s)")


# --- page -------------------------------------------------------------------------------------------------------


def join(files: Sequence[Path]) -> dict[str, Any]:
    """Rows of all files with their ratios to the teacher, and what each arm was trained and measured with.

    Raises:
        ValueError: if arms come twice, were measured on other prompts or with other versions, or none has the teacher.
    """
    parts = [json.loads(file.read_text()) for file in files]
    arms = [part["arm"] for part in parts]
    if len(set(arms)) < len(arms):
        raise ValueError(f"each arm needs one file, got {arms}")
    for name in ("model", "versions", "probes", "seed"):
        if len({json.dumps(part[name], sort_keys=True) for part in parts}) > 1:
            raise ValueError(f"files differ in {name}, so they do not compare: {[part[name] for part in parts]}")
    teachers = [row for part in parts for row in part["rows"] if row["level"] == 0]
    if not teachers:
        raise ValueError("no file has the teacher: measure one of them without --no-teacher")
    teacher = teachers[0]
    rows = [{**teacher, "arm": "teacher", "window": None}]
    rows += [row for arm in ARMS for part in parts if part["arm"] == arm for row in part["rows"] if row["level"] > 0]
    for row in rows:
        row |= {f"{name}_ratio": row[name] / teacher[name] for name in ("wiki", "novels")}
        for length in code_lengths(row):
            pairs = list(zip(teacher[f"code_{length}_found"], row[f"code_{length}_found"], strict=True))
            row[f"code_{length}_lost"], row[f"code_{length}_gained"] = pairs.count(("1", "0")), pairs.count(("0", "1"))
    shared = {name: parts[0][name] for name in ("model", "versions", "probes", "seed")}
    shared["device"] = ", ".join(sorted({row["device"] for row in rows}))
    training = {part["arm"]: part["training"] for part in parts}
    return {**shared, "training": training, "commands": {part["arm"]: part["command"] for part in parts}, "rows": rows}


def code_lengths(row: dict[str, Any]) -> list[int]:
    return [int(name.removeprefix("code_")) for name in row if name.startswith("code_") and name.count("_") == 1]


def quality_table(rows: list[dict[str, Any]]) -> str:
    lengths = code_lengths(rows[0])
    head = ["arm", "kept", "WikiText-2", "novels", *(f"code, {length:,}" for length in lengths), "MQAR", "chains"]

    def cells(row: dict[str, Any]) -> list[str]:
        codes = [f"{row[f'code_{n}']:.3f} ({row[f'code_{n}_interval'][0]:.2f} to {row[f'code_{n}_interval'][1]:.2f})" for n in lengths]
        ratios = [f"{row['wiki_ratio']:.3f}", f"{row['novels_ratio']:.3f}"]
        if row["level"] == 0:
            ratios = [f"{row['wiki']:.2f}", f"{row['novels']:.2f}"]
        return [row["arm"], str(row["kept"]), *ratios, *codes, f"{row['associative_recall']:.2f}", f"{row['variable_tracking']:.2f}"]

    return markdown_table(head, map(cells, rows))


def pairs_table(rows: list[dict[str, Any]]) -> str:
    lengths = code_lengths(rows[0])
    head = ["arm", "kept", *(f"code, {length:,}" for length in lengths)]

    def cells(row: dict[str, Any]) -> list[str]:
        return [row["arm"], str(row["kept"]), *(f"{row[f'code_{n}_lost']} / {row[f'code_{n}_gained']}" for n in lengths)]

    return markdown_table(head, (cells(row) for row in rows if row["level"]))


def bytes_table(rows: list[dict[str, Any]]) -> str:
    names = [f"bytes_{tokens // 1024}k" for tokens in CACHE_LENGTHS]
    head = ["arm", "kept", *(f"{tokens:,} tokens" for tokens in CACHE_LENGTHS)]
    return markdown_table(head, ([row["arm"], str(row["kept"]), *(f"{row[name] / 1e6:.2f}" for name in names)] for row in rows))


def how_trained(training: dict[str, dict[str, Any]]) -> str:
    """A sentence for each way of training, and whether it was one."""
    ways: dict[str, list[str]] = {}
    for arm, how in training.items():
        ways.setdefault(json.dumps(way_of(how)), []).append(arm)
    lines = []
    for way, arms in ways.items():
        how = json.loads(way)
        lengths = " and ".join(f"{length:,}" for length in how["lengths"])
        lines.append(
            f"{', '.join(arms)}: {how['align_steps']:,} steps of alignment and {how['steps']:,} of KL at random levels (the highest of "
            f"{how['level_draws']} drawn), {how['tokens_per_step']:,} tokens each, in rows of {lengths} tokens in turn; facts planted in "
            f"{how['planted']:.0%} of the rows, whose answers count {how['answer_weight']:g} times; heads ranked with a weight of "
            f"{how['probe_weight']:g} for answers; learning rate {how['learning_rate']:g}, of gates {how['gate_factor']:g} times that; "
            f"seed {how['seed']}."
        )
    if len(ways) > 1:
        lines.append("These arms were not trained alike, so differences between them are not of their kind alone.")
    for name, what in (("order", "Orders"), ("window", "Windows in tokens")):
        lines.append(f"{what}: " + ", ".join(f"{arm} {how[name]}" for arm, how in training.items()) + ".")
    return "\n".join(lines)


def commands_text(joined: dict[str, Any]) -> str:
    """How each arm was trained and measured last."""
    lines = [command for arm, how in joined["training"].items() for command in (how.get("command"), joined["commands"][arm]) if command]
    return "\n".join(dict.fromkeys(lines))


def page_text(joined: dict[str, Any], name: str, more: str) -> str:
    rows, model = joined["rows"], joined["model"]
    return f"""# Heads, measured on {model}

Made by `python eval/heads.py`, whose result is `eval/results/{name}.json`: {model}, {joined["device"]},
torch {joined["versions"]["torch"]}, transformers {joined["versions"]["transformers"]}.
What levels in heads are: [levels](../levels.md#heads). The commands, on texts of your own (`--help` says which):

```console
{commands_text(joined)}
```

Arms: `heads` and `layers` convert KV heads and whole layers, which then have two states beside their window; `-window` are their controls
without states, whose windows are longer by what states take, so that a converted head has the same bytes. How they were trained:

{how_trained(joined["training"])}

![perplexity and codes found against KV heads kept](../images/{name}-quality.png)

Perplexity of the teacher, and of each level as a multiple of it: WikiText-2 (validation), and held-out novels in the second half of their
context. Codes: the share of {joined["probes"]} prompts of each length whose number `generate` gives, with an interval of 95 % (Wilson), the
same prompts at every level. MQAR: four of eight numbers from the beginning of a text. Chains: the value that a chain of assignments gives.

{quality_table(rows)}

Codes of the same prompts that the teacher alone found / that the level alone found:

{pairs_table(rows)}

Cache of one text in MB (10^6 bytes):

{bytes_table(rows)}
{missing_text(rows)}{more}"""


def missing_text(rows: list[dict[str, Any]]) -> str:
    """Which levels of an arm were not measured that others of its unit were."""
    kept = {arm: {row["kept"] for row in rows if row["arm"] == arm} for arm in ARMS if any(row["arm"] == arm for row in rows)}
    lines = []
    for arm, there in kept.items():
        others = set().union(*(found for other, found in kept.items() if ARMS[other].unit == ARMS[arm].unit))
        if left := sorted(others - there, reverse=True):
            lines.append(f"{arm} with {', '.join(map(str, left))} kept")
    return f"\nNot measured: {'; '.join(lines)}.\n" if lines else ""


def recipes(options: argparse.Namespace) -> None:
    """Join files of `measure` of arms that were trained in several ways, and rows of an earlier result, into heads-recipes.json."""
    rows = []
    for file in options.files:
        part = json.loads(file.read_text())
        if "training" not in part:
            rows += part["rows"]
            continue
        way = {**way_of(part["training"]), "window": part["training"]["window"]}
        for row in part["rows"]:
            trained = dict.fromkeys(way) if row["level"] == 0 else way
            rows.append({"arm": "teacher" if row["level"] == 0 else part["arm"], "probes": part["probes"], **row_numbers(row), **trained})
    rows = list({json.dumps(row, sort_keys=True): row for row in rows}.values())  # the teacher comes with more than one run
    names = (*HOW_TRAINED, *NEWER)
    rows.sort(key=lambda row: (-row["kept"], row["arm"], row["probes"], [row[name] for name in names if row.get(name) is not None]))
    write_results(RECIPES, rows, command_of(options), folder=options.results)


def row_numbers(row: dict[str, Any]) -> dict[str, Any]:
    """A measured row without what is of each prompt."""
    return {name: value for name, value in row.items() if not name.endswith(("_found", "_interval")) and name != "arm"}


def recipes_text(results: Path) -> str:
    """The ways of training that `recipes` joined, nothing where it has not."""
    file = results / f"{RECIPES}.json"
    if not file.exists():
        return ""
    rows = json.loads(file.read_text())["rows"]
    codes = [f"code_{length}" for length in code_lengths(rows[0])]
    trained = [row for row in rows if row["arm"] != "teacher"]

    arms = ", ".join(sorted({row["arm"] for row in trained}))
    for row in rows:  # older ones lack some
        row |= {"window": None} if row["arm"] == "teacher" else {name: row.get(name, old) for name, old in NEWER.items()}
    names = [name for name in (*HOW_TRAINED, *NEWER, "window") if any(name in row for row in trained)]
    differ = [name for name in names if len({json.dumps(row.get(name)) for row in trained}) > 1]
    same = {name: trained[0].get(name) for name in names if name not in differ}
    alike = ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in same.items())
    return f"""
## Recipes

{arms}, trained in several ways.
Alike in all: {alike}.
Perplexities, shares of codes found, and by how many prompts of each length; few prompts
tell only large differences (with 100 the interval of 95 % is up to 0.1 to both sides).

{rows_table(rows, ["arm", "kept", *differ, "wiki", "novels", *codes, "associative_recall", "probes"])}
"""


def wanted_text(rows: list[dict[str, Any]], bounds: dict[int, tuple[float, dict[int, float]]]) -> str:
    """What was wanted before anything was measured, and how far each arm of heads is above it."""
    teacher, lines, said = rows[0], [], []
    for kept, (ratio, codes) in bounds.items():
        parts = [f"{least:g} at {length:,}" for length, least in codes.items()]
        said.append(f"{kept} heads kept: {ratio:g}" + (f", codes {', '.join(parts)}" if parts else ""))
    for row in rows:
        if row["kept"] not in bounds or row["level"] == 0 or ARMS[row["arm"]].unit != "head":
            continue
        ratio, codes = bounds[row["kept"]]
        wanted = {length: least if least > 0 else teacher[f"code_{length}"] + least for length, least in codes.items()}
        above = [f"{row[f'code_{length}'] - wanted[length]:+.3f}" if length in wanted else "" for length in code_lengths(row)]
        lines.append([row["arm"], str(row["kept"]), f"{ratio:.3f}", f"{row['wiki_ratio']:.3f}", *above])
    head = ["arm", "kept", "WikiText-2, at most", "found", *(f"code, {length:,}" for length in code_lengths(teacher))]
    return f"""
## Wanted

Bounds that were set before: perplexity over the teacher's at most, and shares of codes at least (negative: beside the teacher's). Of codes
the table has by how much each arm is above its bound (below: minus).

{chr(10).join(f"- {line}" for line in said)}

{markdown_table(head, lines)}
"""


def orders_text(results: Path) -> str:
    """The orders that `eval/head_orders.py` has measured, nothing where it has not."""
    file = results / "head-orders.json"
    if not file.exists():
        return ""
    found = json.loads(file.read_text())
    codes = [f"code_{length}" for length in code_lengths(found["rows"][0])]
    table = rows_table(found["rows"], ["order", "kept", "wiki", "novels", *codes, "passes", "seconds"])
    return f"""
## Orders

`python eval/head_orders.py`: one adapter after its alignment, trained at no level, with its heads in several orders. `shares`: by gradients
of switches, in rounds, with such a weight of answers beside text; `single`: harm of each head alone; `entropy`: as in the DSLA paper.
Perplexities, shares of {found["probes"]} codes found, how often text and probes were read for the order, and how long that took.

{table}
"""


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Perplexity ratio and codes found against KV heads kept, a line an arm."""
    teacher, lengths = rows[0], code_lengths(rows[0])
    panels = [("wiki_ratio", "WikiText-2, perplexity / teacher's"), ("novels_ratio", "novels, perplexity / teacher's")]
    panels += [(f"code_{length}", f"code found in {length:,} tokens") for length in lengths]
    columns = math.ceil(len(panels) / 2)
    drawn, axes = figure(2, columns, size=(4 * columns, 6.4))
    marked = [row for row in rows[1:] if ARMS[row["arm"]].unit == "head"] or rows[1:]  # whole layers keep nearly as many
    kept = sorted({row["kept"] for row in marked})
    for axis, (name, title) in zip(axes, panels, strict=False):
        axis.axhline(teacher[name], color="grey", linewidth=0.8, linestyle=":", label="teacher")
        for arm, color in zip(ARMS, ("C0", "C0", "C1", "C1", "C2"), strict=True):
            own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["kept"])
            if not own:
                continue
            x, y = [row["kept"] for row in own], [row[name] for row in own]
            style = "--" if arm.endswith("window") else "-"
            axis.plot(x, y, style, color=color, marker="o", markersize=3, label=arm)
            if name.startswith("code"):
                low, high = zip(*(row[f"{name}_interval"] for row in own), strict=True)
                axis.fill_between(x, low, high, color=color, alpha=0.12, linewidth=0)
        axis.set_xscale("symlog", linthresh=3)  # 0 is a value
        axis.set_xticks(kept, labels=[str(number) for number in kept])
        axis.minorticks_off()
        axis.set(title=title, xlabel="KV heads kept")
        mark_plain(axis.yaxis)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    axes[0].legend()
    save(drawn, path)


def page(options: argparse.Namespace) -> None:
    """Join files of `measure` into results, a page of the docs, and its plot."""
    joined = join(options.files)
    rest = {name: value for name, value in joined.items() if name != "rows"}
    file = write_results(options.name, joined["rows"], command_of(options), folder=options.results, **rest)
    plot, written = options.docs / "images" / f"{options.name}-quality.png", options.docs / "measured" / f"{options.name}.md"
    draw(joined["rows"], plot)
    more = ""
    if bounds := WANTED.get(options.name):
        more = wanted_text(joined["rows"], bounds)
    if options.name == NAME:
        more += recipes_text(options.results) + orders_text(options.results)
    write_whole(written, page_text(joined, options.name, more))
    say(f"written: {file}, {written}, {plot}")


# --- command ----------------------------------------------------------------------------------------------------


def command_of(options: argparse.Namespace, script: str = "heads") -> str:
    """The call, with names of files in place of their paths."""
    return " ".join([f"python eval/{script}.py", *(Path(word).name if os.sep in word else word for word in options.words)])


def common_arguments() -> argparse.ArgumentParser:
    """What all parts take, as a parent of their parsers."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("model", help="folder of the checkpoint and its tokenizer")
    common.add_argument("data", type=Path, help="folder with the texts")
    common.add_argument("--cache", type=Path, help="file with the tokenised text, made if it is not there")
    common.add_argument("--processes", type=int, default=min(16, os.cpu_count() or 1), help="that tokenise")
    common.add_argument("--tiny", action="store_true", help="small sizes, for a random model on a CPU")
    common.add_argument("--seed", type=int, default=0)
    return common


def parse(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    common = common_arguments()
    parts.add_parser("text", parents=[common], help="tokenise")
    training = parts.add_parser("train", parents=[common], help="distil an arm")
    training.add_argument("--arm", choices=list(ARMS), required=True)
    training.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    training.add_argument("--align-steps", type=int, default=200)
    training.add_argument("--steps", type=int, default=700, help="of KL at random levels")
    training.add_argument("--batch", type=int, default=2, help="rows of the longest length in a step")
    training.add_argument("--window", type=int, help=f"tokens, of arms with states (default: {WINDOW})")
    training.add_argument("--probe-weight", type=float, default=PROBE_WEIGHT, help="of answers, when heads are ranked")
    training.add_argument("--answer-weight", type=float, default=ANSWER_WEIGHT, help="of answers to what was planted, in the loss")
    training.add_argument("--level-draws", type=int, default=1, help="levels drawn for a step of KL, of which the highest is trained")
    training.add_argument("--planted", type=float, default=PLANTED, help="share of the rows with facts that are asked for later")
    training.add_argument("--lengths", type=lambda text: [int(part) for part in text.split(",")], help="of the rows of the steps, in turn")
    training.add_argument("--learning-rate", type=float, default=LEARNING_RATE, help="of projections")
    training.add_argument("--gate-factor", type=float, default=GATE_FACTOR, help="times it, of gates, mix and norm")
    training.add_argument("--highest-share", type=float, default=0.0, help="of the steps of KL, at the highest level")
    training.add_argument("--even-share", type=float, default=0.0, help="of the planted facts, whose distance to their question is even")
    training.add_argument("--ranking", choices=UNIT_METRICS, default=UNIT_METRICS[0], help="what heads are ranked by")
    training.add_argument("--order", type=Path, help="JSON list of all [layer, head], least harmful first, in place of a ranking")
    measuring = parts.add_parser("measure", parents=[common], help="measure the levels of an arm")
    measuring.add_argument("--arm", choices=list(ARMS), required=True)
    measuring.add_argument("--adapter", type=Path, required=True)
    measuring.add_argument("--out", type=Path, required=True, help=".json")
    measuring.add_argument("--kept", type=lambda text: [int(part) for part in text.split(",")], default=list(KEPT), help="KV heads")
    measuring.add_argument("--probes", type=int, default=500, help="prompts with a code, of each length")
    measuring.add_argument("--no-teacher", dest="teacher", action="store_false", help="another arm's file has it")
    making = parts.add_parser("page", help="join files of `measure`")
    making.add_argument("files", type=Path, nargs="+")
    making.add_argument("--results", type=Path, default=RESULTS)
    making.add_argument("--docs", type=Path, default=DOCS)
    making.add_argument("--name", default=NAME, help="of the result and the page (default: %(default)s)")
    ways = parts.add_parser("recipes", help="join files of `measure` of arms trained in several ways, and an earlier heads-recipes.json")
    ways.add_argument("files", type=Path, nargs="+")
    ways.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(words)
    if options.part == "measure" and options.out.suffix != ".json":
        parser.error(f"--out {options.out} must end in .json")
    if options.part == "text" and options.cache is None:
        parser.error("text needs --cache: the file to make")
    return options


def main(words: list[str] | None = None) -> None:
    options = parse(words)
    options.words = list(sys.argv[1:] if words is None else words)
    if options.part in ("page", "recipes"):
        {"page": page, "recipes": recipes}[options.part](options)
        return
    sizes = sizes_of(options)
    if options.part == "text":
        text = read_text(options, sizes)
        counts = {name: text[name].numel() for name in ("train", "ranking", "wiki", "novels")}
        say(f"{options.cache}: " + ", ".join(f"{name} {count:,}" for name, count in counts.items()) + " tokens")
    else:
        {"train": train, "measure": measure}[options.part](options, sizes)


if __name__ == "__main__":
    main()
