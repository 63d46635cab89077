"""Training through the Triton kernels beside training through PyTorch: the same steps on the same text, and the noise of bf16.

    python eval/benchmarks/kernel_training.py --teacher ../shared/teacher --data ../shared/data/distill.txt.xz

Every layer of the teacher is converted and trained for 50 steps to give the teacher's logits: with the kernels, with PyTorch, and with
PyTorch and an fp32 base, which tells how far bf16 alone moves the losses. Writes eval/results/kernel-training.json and a plot.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[2]
# Not this folder: there is a package called `kernels`.
sys.path[:] = [str(REPOSITORY / "eval"), *(x for x in sys.path if Path(x).resolve() != Path(__file__).parent)]

from reporting import rows_table, write_results  # noqa: E402

LAYERS: dict[str, dict[str, Any]] = {"window": {}, "pure": {"window_size": 0}}
PATHS = {"Triton": ("triton", "bfloat16"), "PyTorch": ("pytorch", "bfloat16"), "PyTorch, fp32": ("pytorch", "float32")}
IMAGE = REPOSITORY / "docs" / "images" / "kernel-training.png"


def train(args: argparse.Namespace, layer: str, dtype: str) -> list[float]:
    """KL from the teacher's logits, in nats a token, of each step."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dsla_hf import DSLAConfig, set_level
    from dsla_hf.training.text import PackedTokens, read_texts

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    model: Any = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=getattr(torch, dtype)).to(args.device)
    model = get_peft_model(model, DSLAConfig(task_type="CAUSAL_LM", **LAYERS[layer]))
    tokens = args.steps * args.batch * args.length
    blocks = PackedTokens.from_texts(islice(read_texts(args.data), 4096), tokenizer, args.length, max_tokens=tokens + args.length).blocks
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for step in range(args.steps):
        ids = blocks[step * args.batch : (step + 1) * args.batch].to(args.device)
        set_level(model, 0)
        with torch.no_grad():
            target = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        set_level(model, model.config.num_hidden_layers)
        found = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)
        loss = F.kl_div(found, target, log_target=True, reduction="sum") / ids.numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def make_plot(rows: list[dict[str, Any]]) -> None:
    from dsla_hf.core.plots import figure, mark_plain, save

    drawn, axes = figure(1, len(LAYERS), size=(10, 4))
    for ax, layer in zip(axes, LAYERS, strict=True):
        for row in (row for row in rows if row["layer"] == layer):
            ax.plot(range(1, len(row["losses"]) + 1), row["losses"], label=row["path"], alpha=0.7)
        ax.set(title=layer, xlabel="step", ylabel="KL, nats a token", yscale="log")
        mark_plain(ax.yaxis)
        ax.legend()
    save(drawn, IMAGE)


def start(layer: str, path: str, given: list[str]) -> subprocess.Popen[str]:
    kernels, dtype = PATHS[path]
    command = [sys.executable, __file__, *given, "--run", layer, dtype]
    return subprocess.Popen(command, env={**os.environ, "DSLA_KERNELS": kernels}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="checkpoint to convert")
    parser.add_argument("--data", required=True, help="text to train on")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # one layer and dtype in this process
    args = parser.parse_args(arguments)
    if args.run:
        print(json.dumps(train(args, *args.run)))
        return
    given = sys.argv[1:] if arguments is None else arguments
    rows = []
    runs = [(layer, path) for layer in LAYERS for path in PATHS]
    processes = [start(layer, path, given) for layer, path in runs]  # side by side: nothing is timed
    for (layer, path), process in zip(runs, processes, strict=True):
        output, errors = process.communicate()
        if process.returncode:
            sys.exit(f"{path}, {layer}: {errors[-2000:]}")
        losses = json.loads(output.splitlines()[-1])
        rows.append({"layer": layer, "path": path, "losses": losses})
        print(layer, path, f"{losses[0]:.4f} to {losses[-1]:.4f}", flush=True)
    for row in rows:  # beside the same layer in PyTorch and bf16
        other = next(r["losses"] for r in rows if r["layer"] == row["layer"] and r["path"] == "PyTorch")
        row["mean distance"] = sum(abs(a - b) / b for a, b in zip(row["losses"], other, strict=True)) / len(other)
        row["first"], row["last"] = row["losses"][0], row["losses"][-1]
    write_results("kernel-training", rows)
    try:
        make_plot(rows)
    except ImportError as error:
        print(f"no plot: {error}")
    print(rows_table(rows, ["layer", "path", "first", "last", "mean distance"]))


if __name__ == "__main__":
    main()
