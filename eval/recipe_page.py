"""Tables and plots of eval/results/recipe.md, and the tables of docs/recipe.md, from eval/results/distillation.json and
distillation-layers.json, and of KV heads as `recipe_heads.py` has them: `python eval/recipe_page.py`."""

from __future__ import annotations

import argparse
import json
import math
import re
from itertools import combinations
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import recipe_heads
from reporting import RESULTS, fill_page, rows_table

from dsla_hf.core.plots import figure, mark_plain, save

PAGE = RESULTS / "recipe.md"
SUMMARY_PAGE = Path(__file__).parent.parent / "docs" / "recipe.md"
IMAGES = SUMMARY_PAGE.parent / "images"
LEVELS = (4, 8, 12, 16)
# Of the arms, those in the plot of quality: our layers and their controls.
PLOTTED = ("default", "one state", "states beside a window of 256", "chain", "pure", "pure, k and v trained")
# The arms of docs/recipe.md, by the names that they have there.
SUMMARY = {
    "high levels": "default",
    "high levels, window 256, 4 sinks": "window of the same bytes, no states",
    "twice as long": "default, twice as long",
    "twice as long, window 256, 4 sinks": "that window, twice as long",
    "one state": "one state, levels drawn evenly",
    "pure": "the paper's layer, levels drawn evenly",
}
# What the layer's own arms are judged against, and where each layer's error is shown.
ALIGNMENT_COLUMNS = ["arm", "novels", "code", "recall"]


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def over_seeds(rows: list[dict], arm: str, level: int, key: str) -> list[float]:
    return [row[key] for row in rows if row["arm"] == arm and row["level"] == level and key in row]


def cell(values: list[float], digits: int = 2) -> str:
    """Mean, and spread where there are several seeds."""
    if not values:
        return ""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def arms_of(rows: list[dict]) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


# --- tables -----------------------------------------------------------------------------------------------------


def quality_table(rows: list[dict]) -> str:
    table = []
    for arm in arms_of(rows):
        entry: dict[str, Any] = {"arm": arm, "seeds": len({row["seed"] for row in rows if row["arm"] == arm})}
        entry |= {f"novels @{level}": cell(over_seeds(rows, arm, level, "novels")) for level in LEVELS}
        entry |= {f"code @{level}": cell(over_seeds(rows, arm, level, "code"), 3) for level in (12, 16)}
        entry |= {f"PEPs @{level}": cell(over_seeds(rows, arm, level, "peps")) for level in (12, 16)}
        table.append(entry)
    teacher = {"arm": "teacher"} | {f"novels @{level}": cell(over_seeds(rows, "default", 0, "novels")[:1]) for level in LEVELS}
    teacher |= {f"code @{level}": cell(over_seeds(rows, "default", 0, "code")[:1], 3) for level in (12, 16)}
    teacher |= {f"PEPs @{level}": cell(over_seeds(rows, "default", 0, "peps")[:1]) for level in (12, 16)}
    return rows_table([teacher, *table], list(table[0]))


def summary_table(rows: list[dict]) -> str:
    """The few arms of docs/recipe.md: perplexity, recall beyond the window's reach, and a needle in 1,984 tokens."""
    teacher = {"arm": "teacher"} | {f"level {level}": cell(over_seeds(rows, "default", 0, "novels")[:1]) for level in LEVELS}
    teacher["far bigrams at 16"] = cell(over_seeds(rows, "default", 0, "novels_far_bigrams")[:1], 3)
    teacher["needle at 8 / 12 / 16"] = cell(over_seeds(rows, "default", 0, "needle_1984")[:1])
    table = [teacher]
    for arm, name in SUMMARY.items():
        entry: dict[str, Any] = {"arm": name, "seeds": len({row["seed"] for row in rows if row["arm"] == arm})}
        entry |= {f"level {level}": cell(over_seeds(rows, arm, level, "novels")) for level in LEVELS}
        entry["far bigrams at 16"] = cell(over_seeds(rows, arm, 16, "novels_far_bigrams"), 3)
        entry["needle at 8 / 12 / 16"] = " / ".join(f"{mean(over_seeds(rows, arm, level, 'needle_1984')):.2f}" for level in (8, 12, 16))
        table.append(entry)
    return rows_table(table, list(table[1]))


def recall_table(rows: list[dict]) -> str:
    table = []
    for arm, level in [("default", 0), *((arm, level) for arm in arms_of(rows) for level in (12, 16))]:
        entry: dict[str, Any] = {"arm": "teacher" if level == 0 else arm, "level": level}
        for kind in ("novels", "code"):
            entry[f"far bigrams, {kind}"] = cell(over_seeds(rows, arm, level, f"{kind}_far_bigrams"), 3)
        for pairs in (1, 4, 16, 32):
            entry[f"{pairs} pairs"] = cell(over_seeds(rows, arm, level, f"mqar_{pairs}"))
        for length in (512, 1984, 3900):
            entry[f"needle {length:,}"] = cell(over_seeds(rows, arm, level, f"needle_{length}"))
        table.append(entry)
    return rows_table(table, list(table[0]))


def gap_table(rows: list[dict]) -> str:
    """(control - ours) / (control - teacher), of the loss of novels and code, paired by document and seed; ours is the arm that was trained
    as the control was."""
    table = []
    teacher = next(row for row in rows if row["arm"] == "default" and row["level"] == 0)
    for control in [arm for arm in arms_of(rows) if re.search(r"(^|, )window", arm)]:
        arm = control.split(", window")[0] if ", window" in control else "default"
        entry: dict[str, Any] = {"control": control}
        for kind in ("novels", "code"):
            key = f"{kind}_by_document"
            for level in LEVELS:
                numerators, denominators = [], []
                for row in rows:
                    if row["arm"] != control or row["level"] != level:
                        continue
                    ours = [r for r in rows if r["arm"] == arm and r["level"] == level and r["seed"] == row["seed"]]
                    for own in ours:
                        numerators += [c - o for c, o in zip(row[key], own[key], strict=True)]
                        denominators += [c - t for c, t in zip(row[key], teacher[key], strict=True)]
                if len(numerators) > 1 and mean(denominators) < 2 * stdev(denominators) / math.sqrt(len(denominators)):
                    entry[f"{kind} @{level}"] = "nothing lost"
                elif numerators:
                    error = stdev(numerators) / math.sqrt(len(numerators)) / mean(denominators) if len(numerators) > 1 else 0.0
                    entry[f"{kind} @{level}"] = f"{mean(numerators) / mean(denominators):+.2f} ± {abs(error):.2f}"
        table.append(entry)
    return rows_table(table, list(table[0]))


def interventions_table(runs: list[dict]) -> str:
    table = []
    for run in runs:
        for kind in ("novels", "code"):
            if f"interventions_{kind}" in run:
                table.append({"arm": run["arm"], "seed": run["seed"], "text": kind, **run[f"interventions_{kind}"]})
    return rows_table(table, list(table[0]))


def raise_table(runs: list[dict]) -> str:
    table = []
    for run in runs:
        for kind, ways in run["raise"].items():
            found = {"raised 0, 4, 8, 12": ways["raised"], "12 from the start": ways["from the start"], "never": ways["never"]}
            table.append({"arm": run["arm"], "seed": run["seed"], "text": kind, **found})
    return rows_table(table, list(table[0]))


def orders_table(runs: list[dict]) -> str:
    table = []
    for run in runs:
        order = " ".join(map(str, run["order"]))
        read = run["order_passes"] * run["order_tokens"]
        table.append({"arm": run["arm"], "seed": run["seed"], "by": run["order_metric"], "tokens read": read, "order": order})
    return rows_table(table, list(table[0]))


def correlations_table(runs: list[dict]) -> str:
    """Spearman's rank correlation between the orders of the same seed."""

    def spearman(a: list[int], b: list[int]) -> float:
        n = len(a)
        return 1 - 6 * sum((a.index(layer) - b.index(layer)) ** 2 for layer in a) / (n * (n * n - 1))

    named = [run for run in runs if run["arm"] in ("default", "pure") or run["arm"].startswith(("order", "window"))]
    chosen = [run for run in named if run["seed"] == runs[0]["seed"]]
    table = []
    for a, b in combinations(chosen, 2):
        table.append({"orders": f"{a['arm']} / {b['arm']}", "correlation": f"{spearman(a['order'], b['order']):.2f}"})
    return rows_table(table, ["orders", "correlation"])


def alignment_table(rows: list[dict]) -> str:
    return rows_table(rows, ALIGNMENT_COLUMNS)


# --- plots ------------------------------------------------------------------------------------------------------


def make_plots(rows: list[dict], runs: list[dict]) -> None:
    teacher = over_seeds(rows, "default", 0, "novels")[0]
    drawn, axes = figure(1, 2, size=(12, 4.5))
    for i, arm in enumerate(arm for arm in arms_of(rows) if arm in PLOTTED or arm.startswith("window")):
        style = {"marker": "osD^vPX*"[i % 8], "linestyle": ("-", "--", ":", "-.")[i % 4], "label": arm, "alpha": 0.8}
        axes[0].plot(LEVELS, [100 * (mean(over_seeds(rows, arm, level, "novels")) / teacher - 1) for level in LEVELS], **style)
        at_16 = [row["novels_by_position"] for row in rows if row["arm"] == arm and row["level"] == 16]
        base = next(row["novels_by_position"] for row in rows if row["arm"] == "default" and row["level"] == 0)
        places = list(base)
        axes[1].plot([int(p) for p in places], [100 * (mean(r[p] for r in at_16) / base[p] - 1) for p in places], **style)
    axes[0].set(xlabel="level (layers converted of 16)", ylabel="perplexity of novels above the teacher's, %", yscale="log", xticks=LEVELS)
    axes[1].set(xlabel="position in the text, up to", ylabel="the same by position, level 16, %", xscale="log")
    axes[1].set_yscale("symlog", linthresh=1)
    axes[0].legend(fontsize=7)
    _save(drawn, axes, "recipe-quality.png")

    run = next(run for run in runs if run["arm"] == "default")
    layers = sorted(map(int, run["half_lives"]))
    drawn, axes = figure(1, 2, size=(12, 4))
    for i, (name, start) in enumerate((("history", (64, 4096)), ("recency", (8, 256)))):
        axes[0].plot(layers, [run["half_lives"][str(layer)][i] for layer in layers], "o-", label=f"{name}, after", color=f"C{i}")
        axes[0].axhline(math.sqrt(start[0] * start[1]), linestyle=":", color=f"C{i}", label=f"{name}, before")
    axes[0].set(xlabel="layer", ylabel="half-life, tokens (geometric mean)", yscale="log")
    axes[0].legend(fontsize=8)
    for head in range(len(run["mix"][str(layers[0])])):
        axes[1].plot(layers, [run["mix"][str(layer)][head] for layer in layers], "o", color=f"C{head}", alpha=0.8)
    axes[1].axhline(0.5, linestyle=":", color="grey")
    axes[1].set(xlabel="layer", ylabel="weight of history, a dot per head", ylim=(0, 1))
    _save(drawn, axes, "recipe-states.png")

    shown = [run for run in runs if run.get("state_reads") and run["arm"] in ("default", "one state", "pure")]
    drawn, axes = figure(1, len(shown), size=(4.5 * len(shown), 4))
    for axis, run in zip(axes, shown, strict=True):
        reads = list(run["state_reads"].values())
        bins = len(reads[0][0])
        for i, name in enumerate(("history", "recency")):
            if run["arm"] == "one state" and name == "recency":
                continue  # shut
            shares = [mean(layer[i][b] for layer in reads) for b in range(bins)]
            axis.plot([-(bins - b - 0.5) * 2048 / bins for b in range(bins)], shares, label=name)
        axis.set(title=run["arm"], xlabel="token, relative to the one that reads", ylabel="share of what is read", yscale="log")
        axis.legend(fontsize=8)
    _save(drawn, axes, "recipe-reads.png")


def _save(drawn: Any, axes: list[Any], name: str) -> None:
    for axis in axes:
        mark_plain(axis.xaxis)
        mark_plain(axis.yaxis)
        axis.grid(alpha=0.3)
    save(drawn, IMAGES / name)


def fill_pages(page: Path = PAGE, summary_page: Path = SUMMARY_PAGE) -> None:
    """Put the tables between their marks in eval/results/recipe.md and in docs/recipe.md."""
    results = load("distillation")
    rows, runs = results["rows"], results["runs"]
    tables = {
        "quality": quality_table(rows),
        "recall": recall_table(rows),
        "gap": gap_table(rows),
        "interventions": interventions_table(runs),
        "raise": raise_table(runs),
        "orders": orders_table(runs),
        "correlations": correlations_table(runs),
        "alignment": alignment_table(load("distillation-layers")["rows"]),
    }
    fill_page(page, tables)
    fill_page(summary_page, {**recipe_heads.parts(), "summary": summary_table(rows)})


def make_page() -> None:
    """Fill both pages, and draw the plots."""
    fill_pages()
    results = load("distillation")
    make_plots(results["rows"], results["runs"])


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    make_page()
