"""Quality of whole recipes at every level, with their controls: distil, then measure on held-out text.

    python eval/distillation.py --teacher ../shared/teacher --data ../shared/data --seeds 0 1 2

runs every arm for every seed (about a minute each on one GPU) and writes them into eval/results/distillation.json, beside runs that are
there already; `eval/recipe_page.py` makes the tables and plots of eval/results/recipe.md. The data folder holds `distill.txt.xz` (training)
and `novels_val.jsonl.xz`, `code_val.jsonl.xz`, `peps_val.jsonl.xz` (held out). Interrupted runs go on. `--tables` makes tables and
plots again from the result file.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from measures import INTERVENTIONS, WINDOW_REACH, held_out_blocks, intervened_losses, raised_losses, state_reads
from peft import get_peft_model
from planting import make_needles, plant_facts, plant_recall
from released_layer import RELEASED_LAYER, become_released_layer
from reporting import RESULTS, made_once, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsla_hf import DSLAConfig, DualStateAttention, set_level
from dsla_hf.evaluation.long_context import Writer, answers_right, associative_recall, last_seen, recalled, token_losses
from dsla_hf.models.adapter import DSLALayer, dsla_layers
from dsla_hf.training import losses
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.recipe import distill
from dsla_hf.training.text import PackedTokens, read_texts
from dsla_kernels import kernel_path

LENGTH, BATCH, LEVELS = 2048, 8, (4, 8, 12, 16)
STAGE_TOKENS = 5_600_000
RANKING_BLOCKS = 16
RECALL_SHARE = 0.1
NEEDLE_LENGTHS, NEEDLES = (512, 1984, 3900), 200
PAIRS, PAIRS_LENGTH, ROWS = (1, 4, 16, 32), 3072, 64
ROWS_AT_ONCE = 16  # of a forward
RAISE = ((0, 1024), (4, 2048), (8, 3072), (12, 4096))  # level until token
POSITIONS = (64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True)
class Arm:
    """A recipe. layer: what it changes in DSLAConfig. control: what is done to each layer before training. training: what it changes
    in DSLATrainingArguments, beside levels that are drawn evenly; distill: in the arguments of `distill`."""

    layer: dict[str, Any] = field(default_factory=dict)
    control: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    distill: dict[str, Any] = field(default_factory=dict)
    recall: float = RECALL_SHARE  # share of the training text with a planted fact that is asked for later
    facts: bool = False  # a quarter of the text carries eight such facts instead
    logits_passes: int = 1  # stage 2 in units of its usual tokens; three make 22.4 M tokens with stage 1, some of them read twice


ARMS: dict[str, Arm] = {
    "default": Arm(),
    # controls without states; 256 has the bytes of window and states together
    "window 128, 4 sinks": Arm({"window_size": 128}, "no states"),
    "window 192": Arm({"window_size": 192, "sink_tokens": 0}, "no states"),
    "window 192, 4 sinks": Arm({"window_size": 192}, "no states"),
    "window 256, 4 sinks": Arm({"window_size": 256}, "no states"),
    # twice the window, and its control of equal bytes
    "states beside a window of 256": Arm({"window_size": 256}),
    "window 384, 4 sinks": Arm({"window_size": 384}, "no states"),
    # what the states are made of
    "one state": Arm({"half_lives": ((8.0, 4096.0),) * 2}, "one state"),
    "equal half-lives": Arm({"half_lives": ((8.0, 4096.0),) * 2}),
    "no write gate": Arm({"write_gate": False}),
    "no sinks": Arm({"sink_tokens": 0}),
    "gates learn slowly": Arm(training={"gate_learning_rate_factor": 1.0}),
    # the paper's layer: no window
    "pure": Arm({"window_size": 0}),
    "pure, no write gate": Arm({"window_size": 0, "write_gate": False}),
    "pure, k and v trained": Arm({"window_size": 0, "trained_projections": ["q_proj", "k_proj", "v_proj", "o_proj"]}),
    "released code's layer": Arm(RELEASED_LAYER, "released"),
    # the way it is trained
    "high levels": Arm(training={"level_draws": 2}),
    "high levels, window 192, 4 sinks": Arm({"window_size": 192}, "no states", {"level_draws": 2}),
    "high levels, window 256, 4 sinks": Arm({"window_size": 256}, "no states", {"level_draws": 2}),
    "higher levels": Arm(training={"level_draws": 4}),
    "twice as long": Arm(training={"level_draws": 2}, logits_passes=3),
    "twice as long, window 192, 4 sinks": Arm({"window_size": 192}, "no states", {"level_draws": 2}, logits_passes=3),
    "twice as long, window 256, 4 sinks": Arm({"window_size": 256}, "no states", {"level_draws": 2}, logits_passes=3),
    "no recall planted": Arm(recall=0.0),
    "more recall": Arm(facts=True),
    "more recall, high levels": Arm(training={"level_draws": 2}, facts=True),
    "more recall, window 192, 4 sinks": Arm({"window_size": 192}, "no states", facts=True),
    "chain": Arm(distill={"method": "chain"}),
    "order: greedy": Arm(distill={"ranking_metric": "greedy"}),
    "order: entropy": Arm(distill={"ranking_metric": "entropy"}),
}


def close_states(layer: DSLALayer) -> None:
    """The control without states: the same layer, its state branch shut and everything that belongs to it frozen."""
    core: Any = layer.dsla_core["default"]
    core.state_bias.data.fill_(-1e4)
    core.requires_grad_(False)


def keep_one_state(layer: DSLALayer) -> None:
    """The control with one state: the mix stays at the first."""
    core: Any = layer.dsla_core["default"]
    core.mix_logits.data.copy_(torch.tensor([30.0, -30.0]).expand_as(core.mix_logits))
    core.mix_logits.requires_grad_(False)


CONTROLS = {"no states": close_states, "one state": keep_one_state, "released": become_released_layer}


def training_blocks(data: Path, tokenizer: Any, cache: Path) -> torch.Tensor:
    """`[N, 2048]` blocks of shuffled documents: both stages and the ranking. Tokenised once."""

    def make() -> torch.Tensor:
        texts = list(read_texts(data / "distill.txt.xz"))
        random.Random(0).shuffle(texts)
        tokens = STAGE_TOKENS * 2 + (RANKING_BLOCKS + 1) * LENGTH
        return PackedTokens.from_texts(texts, tokenizer, LENGTH, max_tokens=tokens).blocks.to(torch.uint16)

    return made_once(cache, make).long()


def run_arm(name: str, teacher: str, data: Path, output: Path, seed: int) -> dict[str, Any]:
    """Distil and evaluate one arm: rows by level, and what is measured once."""
    arm = ARMS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16).to(device)
    model = get_peft_model(model, DSLAConfig(task_type="CAUSAL_LM", **arm.layer))
    if arm.control:
        for layer in dsla_layers(model).values():
            CONTROLS[arm.control](layer)
    blocks = training_blocks(data, tokenizer, output.parent / "blocks.pt")
    blocks = plant_facts(blocks, tokenizer, 0.25, seed) if arm.facts else plant_recall(blocks, tokenizer, arm.recall, seed)
    ranking, train = blocks[:RANKING_BLOCKS], blocks[RANKING_BLOCKS:]
    # Half of the ranking text asks for something far back.
    ranking = torch.cat([ranking[::2], plant_recall(ranking[1::2], tokenizer, 1.0, seed + 1)])
    args = DSLATrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=BATCH,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=device == "cpu",
        **{"learning_rate": 1e-3, "level_draws": 1, **arm.training},
    )
    steps = STAGE_TOKENS // (BATCH * LENGTH)
    plain = DualStateAttention._window, DualStateAttention._pure, losses._weighted_kl
    # The same mathematics in fewer launches, where no kernel does it. Not for chains, whose links each train another layer: they would
    # compile anew each time.
    if device == "cuda" and not kernel_path(device).startswith("Triton") and not arm.distill.get("method"):
        DualStateAttention._window, DualStateAttention._pure, losses._weighted_kl = (torch.compile(f, dynamic=False) for f in plain)
    start = time.perf_counter()
    order = distill(
        model,
        PackedTokens(train),
        args,
        alignment_steps=steps,
        logits_steps=arm.logits_passes * steps,
        ranking_data=list(ranking.split(4)),
        **arm.distill,
    )
    seconds = time.perf_counter() - start
    DualStateAttention._window, DualStateAttention._pure, losses._weighted_kl = plain
    torch.set_float32_matmul_precision("highest")
    assert order is not None
    about = {"arm": name, "seed": seed, "training_seconds": round(seconds, 1)}
    rows, once = evaluate(model.eval(), tokenizer, data, name, arm)
    once["layer"] = kernel_path(device)
    ranked = {"order": order.order, "order_metric": order.metric, "order_passes": order.passes, "order_tokens": order.tokens}
    return {"rows": [{**about, **row} for row in rows], "once": {**about, **ranked, **once}}


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, data: Path, name: str, arm: Arm) -> tuple[list[dict], dict]:
    """Every measure at every level (level 0, the teacher, with the default arm), and what is measured once."""
    texts = {}
    for kind, count in (("novels", 128), ("peps", 32), ("code", 64)):
        texts[kind] = held_out_blocks(data / f"{kind}_val.jsonl.xz", tokenizer, LENGTH, count)
    long = {
        kind: held_out_blocks(data / f"{kind}_val.jsonl.xz", tokenizer, 2 * LENGTH, count)[0]
        for kind, count in (("novels", 48), ("code", 24))
    }
    far = {kind: last_seen(blocks) > WINDOW_REACH for kind, blocks in long.items()}
    haystack = [
        token
        for text in list(read_texts(data / "novels_val.jsonl.xz"))[:2]
        for token in tokenizer(text[-400_000:], verbose=False)["input_ids"]
    ]
    writer = Writer(tokenizer)
    recall = {pairs: associative_recall(writer, haystack, PAIRS_LENGTH, ROWS, random.Random(pairs), pairs) for pairs in PAIRS}
    needles = {length: make_needles(tokenizer, haystack, length, NEEDLES, seed=0) for length in NEEDLE_LENGTHS}
    rows = []
    for level in (0, *LEVELS) if name == "default" else LEVELS:
        set_level(model, level)
        row: dict[str, Any] = {"level": level}
        for kind, (blocks, documents) in texts.items():
            loss = token_losses(model, blocks, ROWS_AT_ONCE).mean(1)
            row[kind] = math.exp(loss.mean())
            row[f"{kind}_by_document"] = [loss[[d == n for d in documents]].mean().item() for n in sorted(set(documents))]
        for kind, blocks in long.items():
            loss = token_losses(model, blocks, ROWS_AT_ONCE)
            row[f"{kind}_far_bigrams"] = loss[far[kind]].mean().item()
            bounds = (0, *POSITIONS)
            row[f"{kind}_by_position"] = {
                str(b): math.exp(loss[:, max(a - 1, 0) : b - 1].mean()) for a, b in zip(bounds, POSITIONS, strict=False)
            }
        row["far_bigram_count"] = sum(int(x.sum()) for x in far.values())
        for pairs, (ids, answers) in recall.items():
            row[f"mqar_{pairs}"] = recalled(model, ids, answers, ROWS_AT_ONCE)
        for length, samples in needles.items():
            row[f"needle_{length}"] = fmean(answers_right(model, tokenizer, samples, batch_size=100))
        rows.append(row)
    once: dict[str, Any] = {}
    cores = {i: layer.dsla_core["default"] for i, layer in dsla_layers(model).items()}
    once["half_lives"] = {str(i): core.bias_half_lives().log().mean((0, 2)).exp().tolist() for i, core in cores.items()}
    once["mix"] = {str(i): core.mix()[:, 0].tolist() for i, core in cores.items()}
    if arm.control != "no states":
        set_level(model, 16)
        for kind in ("novels", "code"):
            blocks = texts[kind][0][:64]
            once[f"interventions_{kind}"] = {way: math.exp(intervened_losses(model, blocks, 256, way).mean()) for way in INTERVENTIONS}
        if arm.control != "released":  # it takes the rotation back first
            once["state_reads"] = state_reads(model, cores, texts["novels"][0][:32])
    once["raise"] = {}
    for kind, blocks in long.items():
        ways = {"raised": RAISE, "from the start": ((12, 4096),), "never": ((0, 4096),)}
        once["raise"][kind] = {way: math.exp(raised_losses(model, blocks, plan, set_level)[:, 3072:].mean()) for way, plan in ways.items()}
    return rows, once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", help="checkpoint to convert (16 layers)")
    parser.add_argument("--data", type=Path, help="folder with the texts")
    parser.add_argument("--output", type=Path, default=Path("runs/distillation"), help="adapters and measurements of each run")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--parallel", type=int, default=1, help="runs at the same time on the device")
    parser.add_argument(
        "--keep", type=Path, help="folder that also gets every result, and the adapter of the default, as soon as it is there"
    )
    parser.add_argument("--tables", action="store_true", help="only make tables and plots from eval/results/distillation.json")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # one arm and seed in this process
    args = parser.parse_args()
    if args.tables:
        from recipe_page import make_page

        make_page()
        return
    if not args.teacher or not args.data:
        parser.error("--teacher and --data are needed")

    def folder(arm: str, seed: int) -> Path:
        return args.output / f"{arm.replace(': ', '-').replace(', ', '-').replace(' ', '-')}-{seed}"

    if args.run:
        arm, seed = args.run[0], int(args.run[1])
        result = run_arm(arm, args.teacher, args.data, folder(arm, seed), seed)
        (folder(arm, seed) / "result.json").write_text(json.dumps(result))
        if args.keep:
            target = args.keep / folder(arm, seed).name
            target.mkdir(parents=True, exist_ok=True)
            for file in ("result.json", *(("adapter_config.json", "adapter_model.safetensors") if arm == "default" else ())):
                shutil.copy(folder(arm, seed) / file, target / file)
        last = result["rows"]
        print(f"{arm} {seed}:", *(f"{row['level']} {row['novels']:.2f}" for row in last), result["once"]["training_seconds"], flush=True)
        return

    training_blocks(args.data, AutoTokenizer.from_pretrained(args.teacher), args.output / "blocks.pt")
    runs = [(arm, seed) for seed in args.seeds for arm in args.arms]
    waiting, running = [run for run in runs if not (folder(*run) / "result.json").exists()], []
    while waiting or running:
        while waiting and len(running) < args.parallel:
            arm, seed = waiting.pop(0)
            running.append(subprocess.Popen([sys.executable, *sys.argv, "--run", arm, str(seed)]))
        while all(process.poll() is None for process in running):
            time.sleep(0.2)
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            if process.returncode:
                raise SystemExit("a run failed; its error is above. Run the same command again to go on")
    results = [json.loads((folder(*run) / "result.json").read_text()) for run in runs if (folder(*run) / "result.json").exists()]
    save(results)


def save(results: list[dict[str, Any]]) -> None:
    """Write the result file; runs that it holds and that were not made now stay in it."""
    path = RESULTS / "distillation.json"
    before = json.loads(path.read_text()) if path.exists() else {"runs": [], "rows": []}
    made = {(result["once"]["arm"], result["once"]["seed"]) for result in results}

    def kept(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [entry for entry in entries if (entry["arm"], entry["seed"]) not in made]

    rows = kept(before["rows"]) + [row for result in results for row in result["rows"]]
    runs = kept(before["runs"]) + [result["once"] for result in results]
    names = list(dict.fromkeys([*ARMS, *(run["arm"] for run in runs)]))  # arms that are gone keep their results

    def place(entry: dict[str, Any]) -> tuple[int, int]:
        return names.index(entry["arm"]), entry["seed"]

    write_results("distillation", sorted(rows, key=place), runs=sorted(runs, key=place))


if __name__ == "__main__":
    main()
