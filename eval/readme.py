"""Figures of README.md, from the result files of the commands that measured them: `python eval/readme.py`.

| part | command |
|---|---|
| quickstart | `dsla quickstart`; its quickstart.json becomes eval/results/quickstart.json, its plot docs/images/quickstart.png |
| smollm2 | `python eval/heads.py page --name smollm2`, which says how to train and measure first |
| quality | `python eval/distillation.py` |
| speed, batches | `python eval/inference.py` |
| kernels | `python eval/benchmarks/kernels.py` |
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import mean
from typing import Any

from recipe_page import LEVELS, load, over_seeds
from reporting import fill_page

from dsla_hf.core.tables import markdown_table
from dsla_hf.levels.table import table

README = Path(__file__).resolve().parents[1] / "README.md"
# Names of the table: arms of eval/distillation.py.
QUALITY = {
    "default": "high levels",
    "default, twice as long": "twice as long",
    "control: softmax window of the same bytes, no states": "high levels, window 256, 4 sinks",
    "that control, twice as long": "twice as long, window 256, 4 sinks",
    "the paper's layer, without a window": "pure",
}
SMOLLM2_ARM = "heads-window"  # what `dsla distill` makes
LENGTHS = (2048, 32768, 131072)
ROWS = {0: "level 0: softmax attention", 16: "level 16 of 32", 32: "level 32"}
SHAPE = "llama2-7b"
BATCHES = ("batch", "largest")  # parts of inference.json


def quality(rows: list[dict[str, Any]]) -> str:
    teacher = over_seeds(rows, "default", 0, "novels")[0]
    lines = []
    for name, arm in QUALITY.items():
        novels = {level: over_seeds(rows, arm, level, "novels") for level in LEVELS}
        needles = [f"{mean(over_seeds(rows, arm, level, 'needle_1984')):.2f}" for level in (8, 12, 16)]
        star = " *" if len(novels[4]) == 1 else ""
        lines.append([name + star, f"{teacher:.2f}", *(f"{mean(values):.2f}" for values in novels.values()), " / ".join(needles)])
    return markdown_table(["recipe", *(f"level {level}" for level in (0, *LEVELS)), "needle at 8 / 12 / 16"], lines)


def _one(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    """The last row of the shape with these values: the newest."""
    return [row for row in rows if row["shape"] == SHAPE and all(row[name] == value for name, value in wanted.items())][-1]


def speed(rows: list[dict[str, Any]]) -> str:
    eager = _one(rows, part="token", engine="eager", level=0, length=LENGTHS[0])
    compiled = _one(rows, part="baseline", length=LENGTHS[0])
    unconverted = f"{1e3 * eager['seconds_per_token']:.0f} / {1e3 * compiled['seconds_per_token']:.1f}"
    lines = [["transformers, eager / compiled", unconverted, *[""] * (len(LENGTHS) - 1)]]
    for level, name in ROWS.items():
        cells = []
        for length in LENGTHS:
            row = _one(rows, part="growth", level=level, length=length, batch_size=1)
            digits = 1 if length == LENGTHS[-1] else 2
            prompt = "" if length == LENGTHS[0] else f", prefill {row['prefill_seconds']:.{digits}f} s"
            cells.append(f"{1e3 * row['seconds_per_token']:.1f}{prompt}")
        lines.append([name, *cells])
    return markdown_table(["", *(f"{length:,} tokens" for length in LENGTHS)], lines)


def batches(rows: list[dict[str, Any]]) -> str:
    half, full = (
        [_one(rows, part=part, level=level)["tokens_per_second"] / _one(rows, part=part, level=0)["tokens_per_second"] for part in BATCHES]
        for level in (16, 32)
    )
    return (
        f"Sixteen texts of 8,192 tokens are generated {half[0]:.1f} times as fast at level 16 and {full[0]:.1f} times at level 32; the\n"
        f"largest batch of them that fits generates {half[1]:.1f} times and {full[1]:.0f} times as many tokens per second."
    )


def kernels(rows: list[dict[str, Any]]) -> str:
    def ms(digits: int, form: str, **wanted: Any) -> str:
        wanted |= {"form": form, "heads": 32, "kv_heads": 32}
        found = [row for row in rows if all(row.get(name) == value for name, value in wanted.items())]
        return f"{found[-1]['ms']:.{digits}f}" if found else ""

    ours, cudnn, fla = {"form": "ours", "layer": "window"}, {"form": "SDPA, cuDNN"}, {"form": "fla twice"}
    forward, training = {"part": "forward", "tokens": 8192}, {"part": "training", "tokens": 8192}
    decode: dict[str, Any] = {"part": "decode", "batch": 16}
    return markdown_table(
        ["", "ours, with the window", "cuDNN's softmax attention", "fla's `chunk_gla`, twice"],
        [
            ["forward, 8,192 tokens", *(ms(3, **form, **forward) for form in (ours, cudnn, fla))],
            ["forward and backward, 8,192 tokens", *(ms(2, **form, **training) for form in (ours, cudnn, fla))],
            ["a token after 8,192, 16 rows", ms(3, **ours, **decode), f"{ms(3, 'SDPA', **decode)} (SDPA)", ms(3, **fla, **decode)],
        ],
    )


def kept_heads(rows: list[dict[str, Any]]) -> str:
    teacher = rows[0]
    lengths = [int(name.removeprefix("code_")) for name in teacher if name.removeprefix("code_").isdigit()]

    def line(row: dict[str, Any]) -> list[str]:
        sizes = [f"{row[f'bytes_{kilo}k'] / 1e6:,.0f} MB" for kilo in (8, 32)]
        loss = f"{100 * (row['wiki_ratio'] - 1):+.1f} %" if row["level"] else f"{row['wiki']:.2f}"
        kept = f"{row['kept']} ({100 * row['kept'] / row['of']:.0f} %)"
        return [kept, *sizes, loss, " / ".join(f"{row[f'code_{length}']:.2f}" for length in lengths)]

    codes = " / ".join(f"{length:,}" for length in lengths)
    head = ["KV heads kept", "cache at 8k tokens", "at 32k", "WikiText-2 perplexity", f"code found in {codes} tokens"]
    return markdown_table(head, map(line, rows))


def fill(page: Path = README) -> None:
    inference = load("inference")["rows"]
    parts = {
        "quickstart": f"```text\n{table(load('quickstart')['rows'])}\n```",
        "smollm2": kept_heads([row for row in load("smollm2")["rows"] if row["arm"] in ("teacher", SMOLLM2_ARM)]),
        "quality": quality(load("distillation")["rows"]),
        "speed": speed(inference),
        "batches": batches(inference),
        "kernels": kernels(load("kernels")["rows"]),
    }
    fill_page(page, parts)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    fill()
