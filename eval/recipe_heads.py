"""What docs/recipe.md says of KV heads: its tables and figures from eval/results/heads.json, heads-recipes.json and smollm2.json.

`recipe_page.py` puts them into the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reporting import RESULTS

from dsla_hf.core.tables import markdown_table

Row = dict[str, Any]
KEPT = (45, 22, 9, 3, 0)
OWN_KEPT = (22, 9, 0)
DEFAULT_SEED = 42  # of the runs of `dsla distill` as it stands
STATES = {
    "heads-window": "window of {window} alone",
    "heads-one": "one state, window of {window}",
    "heads": "two states, window of {window}",
}
STATES_TRAINED = {"align_steps": 60, "steps": 300, "learning_rate": 5e-4, "gate_factor": 10.0, "matched": True}


def rows_of(name: str, results: Path = RESULTS) -> list[Row]:
    return json.loads((results / f"{name}.json").read_text())["rows"]


def only(rows: Iterable[Row], **wanted: Any) -> Row:
    """The one row that has these values.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = [row for row in rows if all(row.get(name, False if name == "matched" else None) == value for name, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} rows have {wanted}, and one must")
    return found[0]


def original(rows: Sequence[Row], probes: int | None = None) -> Row:
    """The teacher's row, of so many prompts with codes."""
    return next(row for row in rows if row["arm"] == "teacher" and (probes is None or row["probes"] == probes))


def default_table(rows: Sequence[Row]) -> str:
    """A window alone beside states, trained alike, and where that stands."""
    lines = []
    for kept in KEPT:
        window, states = (only(rows, arm=arm, kept=kept) for arm in ("heads-window", "heads"))
        ratios = [f"{row['wiki_ratio']:.4f}" for row in (window, states)]
        lines.append([str(kept), *ratios, *(f"{row['code_7500']:.3f}" for row in (window, states))])
    head = ["KV heads kept of 90", "WikiText-2, window alone", "with states", "code in 7,500 tokens, window alone", "with states"]
    where = "`eval/results/heads.json`, arms `heads-window` and `heads`: perplexity over the original's, and how often a code is found"
    return f"{markdown_table(head, lines)}\n\n{where} (original {original(rows)['code_7500']:.3f})."


def longer_text(recipes: Sequence[Row], shipped: Sequence[Row]) -> str:
    """A tenth of the heads kept, with all of the default's tokens."""
    teacher = original(recipes)["wiki"]
    long = {"arm": "heads-window", "kept": 9, "align_steps": 200, "steps": 1300, "learning_rate": 5e-4}
    one, two = (only(recipes, seed=seed, **long) for seed in (0, 1))
    tokens = (one["align_steps"] + one["steps"]) * one["tokens_per_step"]
    seeds = " and ".join(f"{row['wiki'] / teacher:.4f}" for row in (one, two))
    return (
        f"With {tokens / 1e6:.1f} M tokens at 5e-4 (`heads-window` in `eval/results/heads-recipes.json`, {one['align_steps']} and\n"
        f"{one['steps']:,} steps) a tenth of the heads kept is at {seeds} in WikiText-2 (two seeds), and at\n"
        f"{only(shipped, arm='heads-window', kept=9)['wiki_ratio']:.4f} by the default command itself."
    )


def texts_table(rows: Sequence[Row]) -> str:
    """Which text, and how much: a line for each way in which `dsla distill` was run."""
    teacher, ways = original(rows), {}
    for row in rows:
        if row["arm"] == "heads-window" and row["seed"] == DEFAULT_SEED:
            tokens = (row["align_steps"] + row["steps"]) * row["tokens_per_step"]
            ways.setdefault((-tokens, row["data"], -row["planted"]), {})[row["kept"]] = row

    def ratio(row: Row, name: str) -> str:
        return f"{row[name] / teacher[name]:.3f}"

    lines = []
    for (tokens, data, planted), way in sorted(ways.items()):
        measured = [way[kept] for kept in OWN_KEPT]
        probes = measured[0]["probes"]
        codes = [row["code_7500"] for row in (original(rows, probes), *measured)]
        lines.append(
            [
                f"{-tokens / 1e6:.0f} M",
                data,
                "a third" if planted else "none",
                *(" / ".join(ratio(row, name) for row in measured) for name in ("wiki", "novels")),
                " / ".join(f"{code:.3f}" for code in codes),
                str(probes),
            ]
        )
    head = ["tokens", "text", "rows with facts", "WikiText-2", "novels, far", "code in 7,500 tokens, original first", "prompts"]
    return markdown_table(head, lines)


def states_table(rows: Sequence[Row]) -> str:
    lines = []
    for arm, name in STATES.items():
        nine, none = (only(rows, arm=arm, kept=kept, **STATES_TRAINED) for kept in (9, 0))
        pairs = [f"{nine[text]:.2f} / {none[text]:.2f}" for text in ("wiki", "novels")]
        lines.append([name.format(window=nine["window"]), *pairs, f"{nine['code_7500']:.3f}"])
    return markdown_table(["9 / 0 KV heads kept of 90", "WikiText-2", "novels, far", "code in 7,500 tokens, 9 kept"], lines)


def paper_table(rows: Sequence[Row]) -> str:
    """The paper's layer, whole layers converted: the worst first."""
    whole = sorted((row for row in rows if row["arm"] == "layers" and row["kept"] == 0), key=lambda row: -row["wiki"])
    teacher = original(rows)
    lines = [["the original", "", "", *(f"{teacher[text]:.1f}" for text in ("wiki", "wiki", "novels"))]]
    for row in whole:
        how = {name: row[name] for name in ("align_steps", "steps", "learning_rate", "highest_share")}
        half = only(rows, arm="layers", kept=45, **how)
        loud = "" if row.get("matched") else "; states as loud as they come"
        lines.append(
            [
                f"{row['align_steps']}, {row['steps']}{loud}",
                f"{row['learning_rate']:.0e}".replace("e-0", "e-"),
                f"{row['highest_share']:.0%}".replace("%", " %"),
                f"{half['wiki']:.1f}",
                f"{row['wiki']:,.1f}" if row["wiki"] < 100 else f"{row['wiki']:,.0f}",
                f"{row['novels']:.1f}",
            ]
        )
    head = ["alignment, KL (steps)", "rate", "steps at the highest level", "half converted", "all converted", "novels, far, all converted"]
    return markdown_table(head, lines)


def parts(results: Path = RESULTS) -> dict[str, str]:
    """What the marks of docs/recipe.md hold."""
    heads, recipes, shipped = (rows_of(name, results) for name in ("heads", "heads-recipes", "smollm2"))
    return {
        "default": default_table(heads),
        "longer": longer_text(recipes, shipped),
        "texts": texts_table(recipes),
        "states": states_table(recipes),
        "paper": paper_table(recipes),
    }
