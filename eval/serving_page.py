"""What eval/serving.py measured, as docs/measured/serving.md has it: the rows compared, its tables, sentences and plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reporting import fill_page, rows_table

from dsla_hf.core.plots import figure, mark_measured, mark_plain, save

PAGE = Path(__file__).parent.parent / "docs" / "measured" / "serving.md"
POLICIES = ("fixed", "load")
PAPER_GAIN = 2.29  # times lower latency, the paper's claim
ALLOWED_LOSS = 0.03  # of latency at low load


def stored_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "replay.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that can be compared, in the order in which they were begun."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(json.dumps([row["shape"], row["mix"], row["setup"]]), []).append(row)
    return list(found.values())


def best_rate(rows: list[dict[str, Any]], policy: str) -> float | None:
    """The highest rate at which a policy met the objectives."""
    return max((row["rate"] for row in rows if row["policy"] == policy and row.get("meets")), default=None)


def with_shares(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `share`, of the highest rate that a search for level 0 found, if need be one with other requests of the same mix;
    without a search, that it met."""
    for group in groups(rows):
        kin = [row for row in rows if _kin(row) == _kin(group[0])]
        searches = [[row for row in found if row["part"] == "search"] for found in (group, kin)]
        base = next((rate for rate in (best_rate(found, "fixed") for found in (*searches, group)) if rate is not None), None)
        for row in group:
            row["share"] = None if base is None or row["rate"] is None else row["rate"] / base
    return rows


def _kin(row: dict[str, Any]) -> str:
    """What rows have in common whose rates at level 0 can be compared."""
    setup = {name: value for name, value in row["setup"].items() if name not in ("requests", "max_level", "temperature")}
    return json.dumps([row["shape"], row["mix"], setup])


def finished_runs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those at some rate that were measured to the end, in order of rates."""
    return sorted((row for row in rows if row["rate"] is not None and row["cut"] is None), key=lambda row: row["rate"])


def compared(rows: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(fixed, load) at the same rates, where both were measured to the end, in order of rates."""
    whole = {(row["policy"], row["rate"]): row for row in finished_runs(rows)}
    rates = sorted({rate for _, rate in whole})
    return [(whole["fixed", rate], whole["load", rate]) for rate in rates if {("fixed", rate), ("load", rate)} <= whole.keys()]


def gain(fixed: dict[str, Any], load: dict[str, Any], name: str = "latency") -> float:
    """How many times lower the mean is with `load`."""
    return fixed[name]["mean"] / load[name]["mean"]


def rates_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    searched = [group for group in groups(rows) if any(row["part"] == "search" for row in group)]
    for group in searched or groups(rows):
        alone = next((row for row in group if row["rate"] is None), None)
        for policy in POLICIES:
            if any(row["policy"] == policy and row["rate"] is not None for row in group):
                lines.append(
                    {
                        "shape": group[0]["shape"],
                        "mix": group[0]["mix"],
                        "policy": policy,
                        "temperature": group[0]["setup"].get("temperature", 0.0),
                        "alone, ms a token": None if alone is None else 1e3 * alone["per_token"]["p50"],
                        "highest rate, requests/s": best_rate(group, policy) or "none of those tried",
                    }
                )
    return rows_table(lines, list(lines[0]))


def runs_table(group: list[dict[str, Any]]) -> str:
    """The runs of one mix, by rate."""
    lines = []
    for row in sorted((row for row in group if row["rate"] is not None), key=lambda row: (row["rate"], POLICIES.index(row["policy"]))):
        line: dict[str, Any] = {"requests/s": row["rate"], "share": None if row["share"] is None else f"{row['share']:.2f}"}
        line |= {"policy": row["policy"], "requests": row["requests"]}
        if row["cut"] is None:
            increase = row["yardstick_perplexity_increase"]
            line |= {
                "latency, s: mean, P95": f"{row['latency']['mean']:.3g}, {row['latency']['p95']:.3g}",
                "ms / token": 1e3 * row["latency_per_token"]["mean"],
                "first token P95, s": row["first_token"]["p95"],
                "token P95, ms": 1e3 * row["per_token"]["p95"] if "per_token" in row else None,
                "within both": f"{row['slo']['both']:.0%}",
                "tokens/s": row["generated_tokens_per_second"],
                "mean level": mean_level(row["tokens_at_level"]),
                "yardstick perplexity": None if increase is None else f"{increase:+.2%}",
            }
        else:
            line["latency, s: mean, P95"] = f"cut: {row['cut']}"
        lines.append(line)
    return rows_table(lines, max((list(line) for line in lines), key=len))


def mean_level(tokens: Mapping[str, int]) -> float | None:
    count = sum(tokens.values())
    return sum(int(level) * number for level, number in tokens.items()) / count if count else None


def verdict(group: list[dict[str, Any]]) -> list[str]:
    """What the runs of one mix say, in sentences."""
    pairs, said = compared(group), []
    fixed, load = best_rate(group, "fixed"), best_rate(group, "load")
    if fixed is not None and load is not None:
        said.append(f"Highest rate within the objectives: {load:g} requests/s with `load`, {fixed:g} at level 0 ({load / fixed:.2f} ×).")
    if not pairs:
        return said
    for name, words in (("latency", "Mean latency"), ("latency_per_token", "Mean latency per token")):
        times, best = max(((gain(*pair, name), pair) for pair in pairs), key=lambda found: found[0])
        rate = best[0]["rate"]
        of = "" if best[0]["share"] is None else f" ({best[0]['share']:.2f} of level 0's highest)"
        reached = "reached" if times >= PAPER_GAIN else "not reached"
        shown = f"{1e3 * best[0][name]['mean']:.4g} -> {1e3 * best[1][name]['mean']:.4g} ms"
        said.append(f"{words}: at most {times:.2f} × lower, at {rate:g} requests/s{of}, {shown}; the paper's {PAPER_GAIN} × is {reached}.")
    low = pairs[0]
    if low[0]["share"] is None or low[0]["share"] < 1:
        change = 1 / gain(*low) - 1
        kept = "within" if change <= ALLOWED_LOSS else "not within"
        said.append(
            f"At the lowest rate, {low[0]['rate']:g} requests/s, latency changes by {change:+.1%}: {kept} the {ALLOWED_LOSS:.0%} allowed."
        )
    lost = [f"{pair[0]['rate']:g}" for pair in pairs if gain(*pair) < 1]
    if lost:
        said.append(f"`load` does not pay at {', '.join(lost)} requests/s: mean latency is higher than at level 0.")
    if cuts := [f"{row['policy']} at {row['rate']:g}" for row in group if row["cut"] is not None and row["part"] == "shares"]:
        said.append(f"Cut, because the queue grew without end: {', '.join(cuts)}.")
    return said


def page_part(rows: list[dict[str, Any]]) -> str:
    """What docs/measured/serving.md says of the rows."""
    if not any(row["rate"] is not None for row in rows):
        return "Nothing measured yet."
    parts = [rates_table(rows)]
    for group in groups(rows):
        first = group[0]
        setup, runs = first["setup"], [row for row in group if row["rate"] is not None]
        if not runs:
            continue
        facts = [
            f"**{first['shape']}, {first['mix']}**: {setup['device']}",
            f"{setup['slots']} slots",
            f"chunks of {setup['chunk']} tokens",
            f"prompts take at most {setup['prompt_share']:.0%} of the time",
            *([] if setup["kv_bytes"] is None else [f"{setup['kv_bytes'] / 2**30:g} GiB for keys and values"]),
            "without HTTP" if setup["direct"] else "over HTTP",
            f"temperature {setup['temperature']:g}" if setup.get("temperature") else "the likeliest tokens",
            f"levels up to {setup['max_level']}",
            f"{setup['requests']} requests a run",
            f"prompts of {runs[-1]['prompt_tokens']:.0f} tokens and answers of {runs[-1]['wanted_tokens']:.0f} on average.",
        ]
        parts.append(", ".join(facts))
        parts.append(runs_table(group))
        parts.append("\n".join(f"- {sentence}" for sentence in verdict(group)) or "Too few runs to compare.")
    return "\n\n".join(parts)


def draw(rows: list[dict[str, Any]], path: Path) -> bool:
    """Latency and time to the first token against the rate, and the level over time where it changed most and at the highest rate: a line
    of plots for all runs of a mix at several rates. Whether there are any."""
    shown = [group for group in groups(rows) if len({row["rate"] for row in finished_runs(group)}) > 1]
    if not shown:
        return False
    drawn, axes = figure(len(shown), 3, size=(14, 3.6 * len(shown)))
    for latency, first, level, group in zip(axes[::3], axes[1::3], axes[2::3], shown, strict=True):
        setup, whole = group[0]["setup"], finished_runs(group)
        for color, policy in zip(("C0", "C1"), POLICIES, strict=True):
            mine = [row for row in whole if row["policy"] == policy]
            rates = [row["rate"] for row in mine]
            for axis, name in ((latency, "latency"), (first, "first_token")):
                axis.plot(rates, [row[name]["mean"] for row in mine], "o-", color=color, label=f"{policy}, mean")
                axis.plot(rates, [row[name]["p95"] for row in mine], "s:", color=color, label=f"{policy}, P95")
        if loaded := [row for row in whole if row["policy"] == "load"]:
            swinging = max(loaded, key=lambda row: len(row["level_over_time"]))
            for row in (swinging, loaded[-1]) if swinging is not loaded[-1] else (swinging,):
                over_time = [*row["level_over_time"], [row["seconds"], row["level_over_time"][-1][1]]]
                level.step(*zip(*over_time, strict=True), where="post", label=f"load, {row['rate']:g} requests/s")
        latency.set(xlabel="requests per second", ylabel="latency, s", ylim=(0, None))
        drawn_at = f", temperature {setup['temperature']:g}" if setup.get("temperature") else ""
        title = f"{group[0]['shape']}, {group[0]['mix']}: {setup['requests']} requests, levels up to {setup['max_level']}{drawn_at}"
        latency.set_title(title, fontsize=9)
        first.set(xlabel="requests per second", ylabel="to the first token, s", yscale="log")
        level.set(xlabel="seconds", ylabel="level", ylim=(0, 1.05 * max(setup["max_level"], 1)))
        for axis in (latency, first):
            mark_measured(axis.xaxis, {row["rate"] for row in whole})
        for axis in (latency, first, level):
            mark_plain(axis.yaxis)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
    save(drawn, path)
    return True


def write_page(rows: list[dict[str, Any]], page: Path = PAGE) -> None:
    """Fill the marked place of docs/measured/serving.md, and draw its plot if there is something to draw."""
    part = page_part(rows)
    if draw(rows, page.parent.parent / "images" / "replay.png"):
        part += "\n\n![latency and time to the first token against the rate, level over time](../images/replay.png)"
    fill_page(page, {"replay": part})
