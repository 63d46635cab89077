"""Quality of the recipes at every level: distil an adapter for a teacher, then perplexity, KL and needle accuracy.

    python eval/core.py --teacher ../shared/teacher --data ../shared/data

runs every recipe below (a few minutes each on one GPU) and writes eval/results/core.json and docs/images/core.png.
The data folder holds `distill.txt.xz` (training) and `novels_val.jsonl.xz` (held out). Interrupted runs go on.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from needle import make_needles, needle_accuracy, plant_recall
from peft import get_peft_model
from reporting import RESULTS, markdown_table, write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsla_hf import DSLAConfig, DualStateAttention, set_level
from dsla_hf.data import PackedTokens, read_texts
from dsla_hf.distillation import DSLATrainingArguments, distill
from dsla_hf.evaluation import evaluate_levels

# What each recipe changes in DSLAConfig.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "half-lives 512 and 64": {"half_lives": (512.0, 64.0)},
    "window only": {},
    "one state": {},
    "pure": {"window_size": 0},
    "pure, k and v trained": {"window_size": 0, "trained_projections": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}
LENGTH, BATCH, LEVELS = 2048, 8, (0, 4, 8, 12, 16)
STAGE_TOKENS = 5_600_000
RANKING_BLOCKS, HELD_OUT_BLOCKS = 16, 128
RECALL_SHARE = 0.1
NEEDLE_LENGTH, NEEDLES = 1984, 100
PLOT = Path(__file__).parent.parent / "docs" / "images" / "core.png"


def training_blocks(data: Path, tokenizer: Any, cache: Path) -> torch.Tensor:
    """`[N, 2048]` blocks of shuffled documents: both stages and the ranking. Tokenised once."""
    if not cache.exists():
        texts = list(read_texts(data / "distill.txt.xz"))
        random.Random(0).shuffle(texts)
        tokens = STAGE_TOKENS * 2 + (RANKING_BLOCKS + 1) * LENGTH
        blocks = PackedTokens.from_texts(texts, tokenizer, LENGTH, max_tokens=tokens).blocks
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(blocks.to(torch.uint16), cache.with_suffix(".partial"))
        cache.with_suffix(".partial").rename(cache)
    return torch.load(cache).long()


def held_out(data: Path, tokenizer: Any) -> tuple[torch.Tensor, list[int]]:
    """Blocks `[128, 2048]` from the beginnings of the held-out novels, and the rest of one novel as haystack."""
    blocks, rest = [], []
    for text in read_texts(data / "novels_val.jsonl.xz"):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        share = HELD_OUT_BLOCKS // 8 * LENGTH
        blocks.append(torch.tensor(ids[:share]).view(-1, LENGTH))
        rest += ids[share:]
    return torch.cat(blocks), rest


def close_states(core: DualStateAttention) -> None:
    """The control without states: the same layer, its state branch shut and everything that belongs to it frozen."""
    core.state_bias.data.fill_(-1e4)
    core.requires_grad_(False)


def keep_one_state(core: DualStateAttention) -> None:
    """The control with one state: the mix stays at the first."""
    core.mix_logits.data.copy_(torch.tensor([30.0, -30.0]).expand_as(core.mix_logits))
    core.mix_logits.requires_grad_(False)


CONTROLS = {"window only": close_states, "one state": keep_one_state}


def run_recipe(name: str, teacher: str, data: Path, output: Path, seed: int, learning_rate: float, changes: dict[str, Any]) -> list[dict]:
    """Distil and evaluate one recipe; rows by level."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16).to(device)
    model = get_peft_model(model, DSLAConfig(task_type="CAUSAL_LM", **changes))
    for module in model.modules():
        if isinstance(module, DualStateAttention) and name in CONTROLS:
            CONTROLS[name](module)
    blocks = plant_recall(training_blocks(data, tokenizer, output.parent / "blocks.pt"), tokenizer, RECALL_SHARE, seed)
    ranking, train = blocks[:RANKING_BLOCKS], blocks[RANKING_BLOCKS:]
    # Half of the ranking text asks for something far back.
    ranking = torch.cat([ranking[::2], plant_recall(ranking[1::2], tokenizer, 1.0, seed + 1)])
    args = DSLATrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=BATCH,
        learning_rate=learning_rate,
        warmup_steps=20,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        seed=seed,
        use_cpu=device == "cpu",
    )
    steps = STAGE_TOKENS // (BATCH * LENGTH)
    start = time.perf_counter()
    order = distill(model, PackedTokens(train), args, alignment_steps=steps, logits_steps=steps, ranking_data=list(ranking.split(4)))
    seconds = time.perf_counter() - start

    torch.set_float32_matmul_precision("highest")
    blocks, haystack = held_out(data, tokenizer)
    rows = evaluate_levels(model, list(blocks.split(8)), LEVELS)
    needles = make_needles(tokenizer, haystack, NEEDLE_LENGTH, NEEDLES, seed=0)
    model.eval()
    for row in rows:
        set_level(model, int(row["level"]))
        row["needle"] = needle_accuracy(model, needles)
    about = {"recipe": name, "seed": seed, "training_seconds": round(seconds, 1)}
    assert order is not None
    return [{**about, **row, "order": order.order} for row in rows]


def plot(rows: list[dict], path: Path) -> None:
    """Rise in perplexity and needle accuracy against the level, a line per recipe."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (quality, recall) = plt.subplots(1, 2, figsize=(11, 4))
    for i, recipe in enumerate(dict.fromkeys(row["recipe"] for row in rows)):
        own = [row for row in rows if row["recipe"] == recipe]
        base = next(row["perplexity"] for row in own if row["level"] == 0)
        levels = [row["level"] for row in own]
        style = {"marker": "osD^vP"[i % 6], "linestyle": ("-", "--", ":", "-.")[i % 4], "label": recipe, "alpha": 0.8}
        quality.plot(levels[1:], [100 * (row["perplexity"] / base - 1) for row in own][1:], **style)
        recall.plot(levels, [row["needle"] for row in own], **style)
    quality.set(xlabel="level (layers converted of 16)", ylabel="perplexity above the teacher's, %", yscale="log")
    recall.set(xlabel="level (layers converted of 16)", ylabel=f"needle accuracy, {NEEDLE_LENGTH} tokens", ylim=(-0.05, 1.05))
    quality.legend(fontsize=8)
    for axis in (quality, recall):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot-only", action="store_true", help="draw the plot again from eval/results/core.json")
    parser.add_argument("--teacher", help="checkpoint to convert (16 layers)")
    parser.add_argument("--data", type=Path, help="folder with distill.txt.xz and novels_val.jsonl.xz")
    parser.add_argument("--output", type=Path, default=Path("runs/core"), help="adapters and rows of each recipe")
    parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--parallel", type=int, default=1, help="recipes to run at the same time on the device")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)  # one recipe in this process
    args = parser.parse_args()
    if args.plot_only:
        plot(json.loads((RESULTS / "core.json").read_text())["rows"], PLOT)
        return
    if not args.teacher or not args.data:
        parser.error("--teacher and --data are needed")

    def rows_file(recipe: str) -> Path:
        return args.output / recipe.replace(", ", "-").replace(" ", "-") / "rows.json"

    if args.recipe:
        file = rows_file(args.recipe)
        rows = run_recipe(args.recipe, args.teacher, args.data, file.parent, args.seed, args.learning_rate, RECIPES[args.recipe])
        file.write_text(json.dumps(rows))
        return

    training_blocks(args.data, AutoTokenizer.from_pretrained(args.teacher), args.output / "blocks.pt")
    waiting, running = [r for r in args.recipes if not rows_file(r).exists()], []
    while waiting or running:
        while waiting and len(running) < args.parallel:
            running.append(subprocess.Popen([sys.executable, *sys.argv, "--recipe", waiting.pop(0)]))
        if running.pop(0).wait():
            raise SystemExit("a recipe failed; its error is above. Run the same command again to go on")
    rows = [row for recipe in args.recipes for row in json.loads(rows_file(recipe).read_text())]
    command = (
        f"python eval/core.py --teacher {Path(args.teacher).name} --data {args.data.name} --seed {args.seed} --parallel {args.parallel}"
    )
    if args.recipes != list(RECIPES):
        command += " --recipes " + " ".join(f"'{recipe}'" for recipe in args.recipes)
    write_results("core", rows, command)
    plot(rows, PLOT)
    print(markdown_table(rows, ["recipe", "level", "perplexity", "kl", "needle", "training_seconds"]))


if __name__ == "__main__":
    main()
