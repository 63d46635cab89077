"""What eval/against_vllm.py measured, as docs/measured/against_vllm.md has it: tables, what they say, and the plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from reporting import rows_table

from dsla_hf.core.files import write_whole
from dsla_hf.core.plots import figure, mark_measured, mark_plain, save

ANCHOR, NARROW = "vllm", "-fp8"  # the latter behind the name of an arm whose keys and values are in fp8
FP8 = f"{ANCHOR}{NARROW}"
PAGE = Path(__file__).parent.parent / "docs" / "measured" / "against_vllm.md"
IMAGE = "against_vllm.png"
HEAD = """# Beside vLLM, measured

The same requests to vLLM and to `dsla serve`, one after the other on one GPU, random weights, over HTTP, prefix caching on. `-fp8` behind a
name: keys and values in fp8; `0` is our engine with the base alone; `kept:10%` keeps a tenth of the KV heads, the others see a window of
512 tokens; `load` moves between level 0 and `--max-level` as the load asks for. In parentheses: over vLLM's.

```console
python eval/against_vllm.py --trace AzureLLMInferenceTrace_conv.csv
python eval/against_vllm.py --page
```
"""


def groups(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Rows that can be compared, in the order in which they were begun."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(json.dumps([row["shape"], row["setup"]]), []).append(row)
    return list(found.values())


def arms_of(rows: list[dict[str, Any]]) -> list[str]:
    """In the order in which they were measured, vLLM first."""
    return sorted(dict.fromkeys(row["arm"] for row in rows), key=lambda arm: (arm != ANCHOR, arm != FP8))


def beside(value: float | None, anchor: float | None, scale: float = 1.0) -> str | None:
    """A figure, and how many times vLLM's it is."""
    if value is None:
        return None
    return f"{scale * value:.4g}" + (f" ({value / anchor:.2f})" if anchor else "")


def pivot(rows: list[dict[str, Any]], part: str, places: list[str], figure_name: str, scale: float) -> str:
    """A line for each place (batch, length), a column for each arm."""
    mine = [row for row in rows if row["part"] == part]
    lines = []
    for place in sorted({tuple(row[name] for name in places) for row in mine}):
        here = {row["arm"]: row for row in mine if tuple(row[name] for name in places) == place}
        anchor = here.get(ANCHOR, {}).get(figure_name)
        cells = {arm: beside(row.get(figure_name), anchor, scale) or row["why"] for arm, row in here.items()}
        lines.append({**dict(zip(places, place, strict=True)), **cells})
    return rows_table(lines, [*places, *arms_of(mine)])


def best_rate(rows: list[dict[str, Any]]) -> float | None:
    """The highest rate within both objectives."""
    return max((row["rate"] for row in rows if row["part"] == "rate" and row["meets"]), default=None)


def of(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def highest_table(rows: list[dict[str, Any]]) -> str:
    """The highest rate within both objectives, by mix and draws."""
    runs, lines = of(rows, part="rate"), []
    for mix, sampling in dict.fromkeys((row["mix"], row["sampling"]) for row in runs):
        mine = of(runs, mix=mix, sampling=sampling)
        anchor = best_rate(of(mine, arm=ANCHOR))
        cells = {arm: beside(best_rate(of(mine, arm=arm)), anchor) or "none" for arm in arms_of(mine)}
        lines.append({"mix": mix, "draws": sampling, "token objective, ms": 1e3 * mine[0]["token_target"], **cells})
    return rows_table(lines, ["mix", "draws", "token objective, ms", *arms_of(runs)])


def runs_table(rows: list[dict[str, Any]]) -> str:
    """Every run at a rate."""
    order, lines = arms_of(rows), []
    for row in sorted(of(rows, part="rate"), key=lambda row: (row["mix"], row["sampling"], row["rate"], order.index(row["arm"]))):
        line = {"mix": row["mix"], "draws": row["sampling"], "requests/s": row["rate"], "arm": row["arm"], "failed": row["errors"] or None}
        if "per_token" in row:
            line |= {
                "latency, s: mean, P95": f"{row['latency']['mean']:.3g}, {row['latency']['p95']:.3g}",
                "first token P95, s": row["first_token"]["p95"],
                "token P95, ms": 1e3 * row["per_token"]["p95"],
                "tokens/s": row["generated_tokens_per_second"],
            }
        lines.append({**line, "within both": f"{row['slo']['both']:.0%}"})
    return rows_table(lines, list(dict.fromkeys(name for line in lines for name in line)))


def about(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """On what a group was measured, in a line."""
    setup, versions = row["setup"], sorted({found["version"] for found in rows if found["version"]})
    text = f"**{row['shape']}**: {setup['device']}, {setup['slots']} slots, "
    text += "our level 0 in vLLM's place, a trial" if setup["stand_in"] else f"vLLM {', '.join(versions) or 'not measured'}"
    requests = f", {setup['requests']} requests a run, first token within {setup['slo_first']:g} s" if of(rows, part="rate") else ""
    return f"{text}{requests}."


def page(rows: list[dict[str, Any]]) -> str:
    """The whole page.

    Raises:
        ValueError: if nothing has been measured.
    """
    if not rows:
        raise ValueError("against_vllm.json has no rows: measure first, without --page")
    parts = [HEAD]
    for group in groups(rows):
        parts.append(about(group[0], group))
        if of(group, part="token"):
            parts += [
                "Milliseconds a token, of texts that are generated at the same time:",
                pivot(group, "token", ["batch", "length"], "seconds_per_token", 1e3),
            ]
        if of(group, part="prefill"):
            parts += ["Milliseconds to the first token of a prompt alone:", pivot(group, "prefill", ["length"], "seconds", 1e3)]
        if of(group, part="rate"):
            parts += ["Highest rate within both objectives, requests a second:", highest_table(group), runs_table(group)]
    parts.append(f"![time of a token, prefill, times against the rate](../images/{IMAGE})")
    return "\n\n".join(part.strip() for part in parts) + "\n"


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A line of plots for each group: time of a token against the batch at the longest prompt that several arms have, prefill against
    the length, and of each mix the time of a token and the time to the first against the rate."""
    found = groups(rows)
    mixes = max((len({(row["mix"], row["sampling"]) for row in of(group, part="rate")}) for group in found), default=0)
    drawn, axes = figure(len(found), 2 + 2 * mixes, size=(4.4 * (2 + 2 * mixes), 3.6 * len(found)))
    width = 2 + 2 * mixes
    for number, group in enumerate(found):
        (token, prefill, *rest), arms = axes[number * width : (number + 1) * width], arms_of(group)
        colors = {arm: f"C{place % 10}" for place, arm in enumerate(arms)}
        timed = [row for row in of(group, part="token") if "seconds_per_token" in row]
        length = max(
            (row["length"] for row in timed),
            default=None,
            key=lambda length: (len({row["arm"] for row in of(timed, length=length)}), length),
        )
        for arm in arms:
            mine = sorted(of(timed, arm=arm, length=length), key=lambda row: row["batch"])
            token.plot([row["batch"] for row in mine], [1e3 * row["seconds_per_token"] for row in mine], "o-", color=colors[arm], label=arm)
            mine = sorted((row for row in of(group, part="prefill", arm=arm) if "seconds" in row), key=lambda row: row["length"])
            prefill.plot([row["length"] for row in mine], [1e3 * row["seconds"] for row in mine], "o-", color=colors[arm], label=arm)
        token.set(xlabel="texts at a time", ylabel="ms a token", ylim=(0, None), title=f"{group[0]['shape']}, prompts of {length}")
        prefill.set(xlabel="tokens of the prompt", ylabel="ms to the first token", title=group[0]["shape"])
        if any(line.get_xdata().size for line in prefill.lines):
            prefill.set(xscale="log", yscale="log")
        mark_measured(token.xaxis, {row["batch"] for row in timed})
        mark_measured(prefill.xaxis, {row["length"] for row in of(group, part="prefill")})
        cases = list(dict.fromkeys((row["mix"], row["sampling"]) for row in of(group, part="rate")))
        for (mix, sampling), each, first in zip(cases, rest[::2], rest[1::2], strict=False):
            runs = [row for row in of(group, part="rate", mix=mix, sampling=sampling) if "per_token" in row]
            for arm in arms:
                mine = sorted(of(runs, arm=arm), key=lambda row: row["rate"])
                rates = [row["rate"] for row in mine]
                each.plot(rates, [1e3 * row["per_token"]["p95"] for row in mine], "o-", color=colors[arm], label=arm)
                first.plot(rates, [row["first_token"]["p95"] for row in mine], "o-", color=colors[arm], label=arm)
            if runs:
                each.axhline(1e3 * runs[0]["token_target"], color="gray", ls=":")
                first.axhline(group[0]["setup"]["slo_first"], color="gray", ls=":")
            each.set(xlabel="requests per second", ylabel="token P95, ms", ylim=(0, None), title=f"{mix}, {sampling}")
            first.set(xlabel="requests per second", ylabel="first token P95, s", yscale="log", title=f"{mix}, {sampling}")
            for axis in (each, first):
                mark_measured(axis.xaxis, {row["rate"] for row in runs})
        for axis in (token, prefill, *rest):
            mark_plain(axis.yaxis)
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=7)
    save(drawn, path)


def write_page(rows: list[dict[str, Any]], path: Path = PAGE) -> None:
    """The page and its plot. ValueError as `page`."""
    text = page(rows)
    draw(rows, path.parent.parent / "images" / IMAGE)
    write_whole(path, text)
