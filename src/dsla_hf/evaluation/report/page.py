"""What `dsla report` does: one page of quality and speed against level, HTML with its figures inside or Markdown with PNGs beside it."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ...core.files import write_whole
from ...core.plots import mark_measured, mark_plain
from . import published as paper
from .measurements import Measurement, Source, read_measurements

INTRODUCTION = (
    "Level 0 is the original model; at level L its L least harmful layers are DSLA. ± is a standard error, or the deviation over seeds "
    "where there are several. Dotted lines are the original model. ↑: more is better, ↓: less is."
)
PUBLISHED = (
    f"From the paper ({paper.SOURCE}), as printed there: other models, data and hardware, nothing of it measured here. LongBench in "
    "percent; empty where no number is at hand."
)
MOST_PANELS, COLUMNS = 12, 3
MOST_COLUMNS = 8  # of levels, and where there are more, of metrics
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; display: block; overflow-x: auto; }
th, td { border: 1px solid #ccc; padding: .25rem .6rem; text-align: left; }
td { font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
code { font-size: .85rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Heading:
    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Command:
    text: str


@dataclass(frozen=True)
class Figure:
    """A PNG, what it shows in words, and what a file of it is called after the page's own name."""

    image: bytes
    text: str
    name: str


Block = Heading | Paragraph | Table | Command | Figure


def report(
    results: Sequence[str],
    output: str,
    *,
    speed: Sequence[str] = (),
    metrics: Sequence[str] = (),
    title: str | None = None,
    published: bool = False,
) -> str:
    """Write a page of measurements by level, and return its text.

    Args:
        results: folders and files of `dsla eval`, and tables of rows, each as in `read_measurements`: a path, or NAME=PATH.
        output: file to write, .html, or .md with its figures beside it: page-quality.png and page-speed.png of page.md.
        speed: likewise, measurements of speed.
        metrics: patterns such as "needle*" of what is shown, matched with the task, the metric, and "TASK METRIC". Empty: everything.
        title: of the page.
        published: whether the numbers that the paper reports follow, in a table of their own.

    Raises:
        ValueError: for another kind of output, results that are none, two of the same name, or patterns that nothing matches.
        OSError: if a file is missing.
        ImportError: without matplotlib.
    """
    kind = Path(output).suffix
    if kind not in (".md", ".html"):
        raise ValueError(f"{output} must end in .md or .html")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'dsla-hf[plot]'") from None
    quality, sources = _read(results, metrics)
    fast, fast_sources = _read(speed, metrics)
    if not quality and not fast:
        wanted = f" and {list(metrics)} match nothing" if metrics else ""
        raise ValueError(f"nothing to show: {[*results, *speed]} hold no numbers{wanted}")
    blocks: list[Block] = [Heading(1, title or "Quality and speed by level"), Paragraph(INTRODUCTION)]
    for name, found in (("Quality", quality), ("Speed", fast)):
        blocks.append(Heading(2, name))
        blocks += _section(name, found) if found else [Paragraph("Not measured." if name == "Quality" else "Not measured (--speed FILE).")]
    if published:
        rows = [[model, *values, *[""] * (len(paper.COLUMNS) - len(values))] for model, values in paper.ROWS.items()]
        blocks += [Heading(2, "Published"), Paragraph(PUBLISHED), Table(["model", *paper.COLUMNS], rows), Paragraph(paper.SPEED)]
    blocks += _provenance([*sources, *fast_sources])
    page = Path(output)
    text = _markdown(blocks, page.stem) if kind == ".md" else _html(blocks)
    if kind == ".md":  # before the page that links them
        for figure in (block for block in blocks if isinstance(block, Figure)):
            write_whole(page.with_name(_file_of(figure, page.stem)), figure.image)
    write_whole(page, text)
    print(f"{output}: {len({m.arm for m in quality + fast})} arms, {len({(m.task, m.metric) for m in quality + fast})} metrics")
    return text


def _read(given: Sequence[str], patterns: Sequence[str]) -> tuple[list[Measurement], list[Source]]:
    found: list[Measurement] = []
    sources: list[Source] = []
    for one in given:
        measurements, its_sources = read_measurements(one)
        known = {(m.arm, m.level, m.task, m.metric) for m in found}
        if twice := next((m for m in measurements if (m.arm, m.level, m.task, m.metric) in known), None):
            raise ValueError(f"{one}: {twice.task} {twice.metric} of {twice.arm!r} is given twice: name the results apart, as NAME={one}")
        found += measurements
        sources += its_sources
    names = {m.task for m in found}
    return [m for m in found if _shown(m, names, patterns)], sources


def _shown(measurement: Measurement, tasks: set[str], patterns: Sequence[str]) -> bool:
    task, metric = measurement.task, measurement.metric
    if patterns:
        return any(fnmatchcase(name, pattern) for pattern in patterns for name in (task, metric, f"{task} {metric}"))
    return not (task.startswith("mmlu_") and "mmlu" in tasks)  # its 57 subjects


# --- tables -----------------------------------------------------------------------------------------------------


def _section(name: str, found: list[Measurement]) -> list[Block]:
    blocks: list[Block] = []
    same = _same_as_level_0(found)
    if same:
        blocks.append(Paragraph(f"Level 0 has the numbers of {', '.join(same)}, to the last digit."))
        found = [m for m in found if m.arm not in same]
    panels = _panels(found)
    if panels:
        drawn = f"{name} by level: {', '.join(title for title, _ in panels[:MOST_PANELS])}"
        blocks.append(Figure(_draw(panels[:MOST_PANELS], found), drawn, name.lower()))
    if len(panels) > MOST_PANELS:
        blocks.append(Paragraph(f"Drawn are {MOST_PANELS} of {len(panels)} metrics; --metrics chooses others."))
    arms = list(dict.fromkeys(m.arm for m in found))
    for task in dict.fromkeys(m.task for m in found):
        its = [m for m in found if m.task == task]
        blocks += [Heading(3, task), *_tables(its, arms)]
    return blocks


def _tables(its: list[Measurement], arms: list[str]) -> list[Table]:
    """The numbers of a task: a row for each metric of each arm; where there are many levels, for each level."""
    levels = sorted({m.level for m in its})
    cells = {(m.arm, m.metric, m.level): _number(m) for m in its}
    names = {m.metric: _with_arrow(m.metric, m) for m in its}
    lines = [(arm, metric) for metric in names for arm in arms if any((arm, metric, level) in cells for level in levels)]
    several = len(arms) > 1
    heads = {level: f"{level}, original" if level == 0 else str(level) for level in levels}
    if len(levels) <= MOST_COLUMNS:
        rows = [
            [names[metric], *([arm] if several else []), *(cells.get((arm, metric, level), "") for level in levels)]
            for arm, metric in lines
        ]
        return [Table(["metric", *(["arm"] if several else []), *(f"level {head}" for head in heads.values())], rows)]
    tables = []
    for begin in range(0, len(lines), MOST_COLUMNS):
        part = lines[begin : begin + MOST_COLUMNS]
        rows = [[heads[level], *(cells.get((arm, metric, level), "") for arm, metric in part)] for level in levels]
        tables.append(Table(["level", *(f"{names[metric]}, {arm}" if several else names[metric] for arm, metric in part)], rows))
    return tables


def _with_arrow(name: str, measurement: Measurement) -> str:
    """`name`, and an arrow where it is known whether up is good."""
    return name + {True: " ↑", False: " ↓", None: ""}[measurement.higher_is_better]


def _same_as_level_0(found: list[Measurement]) -> list[str]:
    """Arms measured at level 0 alone, all of whose numbers every other arm has there too: the original model without an adapter."""
    at_0: dict[tuple[str, str], dict[str, float]] = {}
    for m in found:
        if m.level == 0:
            at_0.setdefault((m.task, m.metric), {})[m.arm] = m.value
    raised = {m.arm for m in found if m.level > 0}
    alone = [arm for arm in dict.fromkeys(m.arm for m in found) if arm not in raised]
    return [
        arm
        for arm in alone
        if raised and all(set(values.values()) == {values[arm]} and raised & values.keys() for values in at_0.values() if arm in values)
    ]


def _number(measurement: Measurement) -> str:
    value = f"{measurement.value:,.0f}" if abs(measurement.value) >= 1e4 else f"{measurement.value:.4g}"
    return value if not measurement.error else f"{value} ± {measurement.error:.2g}"


def _provenance(sources: list[Source]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "How it was measured")]
    rows = []
    for source in sources:
        versions = ", ".join(f"{package} {version}" for package, version in source.versions.items() if version)
        rows.append([source.arm, source.file, source.device, versions])
    blocks.append(Table(["arm", "file", "device", "versions"], rows))
    blocks += [Command(command) for command in dict.fromkeys(source.command for source in sources if source.command)]
    return blocks


# --- figures ----------------------------------------------------------------------------------------------------

Panel = tuple[str, tuple[str, list[str]]]  # its title; a task, and those of its metrics that are drawn


def _panels(found: list[Measurement]) -> list[Panel]:
    """The first metric of every task before the second of any. Of a metric that is there at several lengths one for each length: the
    whole, or the last of its parts, such as the farthest distance. What was measured at one level is in the tables alone."""
    by_task: list[list[Panel]] = []
    for task in dict.fromkeys(m.task for m in found):
        families: dict[str, dict[str, str]] = {}
        levels: dict[str, set[int]] = {}
        for m in found:
            if m.task == task:
                levels.setdefault(m.metric, set()).add(m.level)
        for metric in (metric for metric, its in levels.items() if len(its) > 1):
            base, length, part = _parsed(metric)
            chosen = families.setdefault(base, {})
            if not part or length not in chosen or _parsed(chosen[length])[2]:
                chosen[length] = metric
        by_task.append([(f"{task}: {base}", (task, list(chosen.values()))) for base, chosen in families.items()])
    most = max(map(len, by_task), default=0)
    return [panels[i] for i in range(most) for panels in by_task if i < len(panels)]


def _parsed(metric: str) -> tuple[str, str, str]:
    """perplexity@512[64-127] -> perplexity, 512, 64-127."""
    match = re.fullmatch(r"([^@\[]*)(?:@([^\[]*))?(?:\[(.*)\])?", metric)
    return (match[1], match[2] or "", match[3] or "") if match else (metric, "", "")


def _draw(panels: list[Panel], found: list[Measurement]) -> bytes:
    from matplotlib.figure import Figure as Canvas

    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    canvas = Canvas(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    axes = list(canvas.subplots(rows, columns, squeeze=False).flat)
    arms = list(dict.fromkeys(m.arm for m in found if m.level > 0)) or list(dict.fromkeys(m.arm for m in found))
    for axis, (title, (task, metrics)) in zip(axes, panels, strict=False):
        if len(arms) > 1 and len(metrics) > 1:  # one line an arm: the greatest length
            metrics = [max(metrics, key=lambda metric: float(re.sub(r"\D", "", _parsed(metric)[1]) or 0))]
        its = [m for m in found if m.task == task and m.metric in metrics]
        _draw_panel(axis, its, metrics, arms)
        axis.set_title(_with_arrow(title if len(metrics) > 1 else f"{task}: {metrics[0]}", its[0]), fontsize=9)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    written = io.BytesIO()
    canvas.savefig(written, format="png", dpi=110, metadata={"Software": None})
    return written.getvalue()


def _draw_panel(axis: Any, its: list[Measurement], metrics: list[str], arms: list[str]) -> None:
    """A line for each arm, or for each of several metrics of the one arm; dotted the original model."""
    several = len(metrics) > 1
    for j, metric in enumerate(metrics):
        for original in {m.value for m in its if m.metric == metric and m.level == 0}:
            axis.axhline(original, linestyle=":", linewidth=1, color=f"C{j % 10}" if several else "0.4")
        for i, arm in enumerate(arms):
            points = sorted((m.level, m.value, m.error or 0.0) for m in its if m.arm == arm and m.metric == metric)
            if points:
                label = (_parsed(metric)[1] or metric) if several else arm
                color = f"C{(j if several else i) % 10}"
                axis.errorbar(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.2, color=color, label=label)
    mark_measured(axis.xaxis, {m.level for m in its})
    mark_plain(axis.yaxis)
    axis.set_xlabel("level", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if several or len(arms) > 1:
        axis.legend(fontsize=7)


# --- pages ------------------------------------------------------------------------------------------------------


def _file_of(figure: Figure, page: str) -> str:
    return f"{page}-{figure.name}.png"


def _markdown(blocks: Sequence[Block], page: str) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    parts = []
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"{'#' * block.level} {block.text}")
            case Paragraph():
                parts.append(block.text)
            case Table():
                parts.append("\n".join([row(block.head), "|" + "---|" * len(block.head), *map(row, block.rows)]))
            case Command():
                parts.append(f"```console\n{block.text}\n```")
            case Figure():
                parts.append(f"![{block.text}]({quote(_file_of(block, page))})")
    return "\n\n".join(parts) + "\n"


def _html(blocks: Sequence[Block]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    parts = []
    for block in blocks:
        match block:
            case Heading():
                parts.append(f"<h{block.level}>{html.escape(block.text)}</h{block.level}>")
            case Paragraph():
                parts.append(f"<p>{html.escape(block.text)}</p>")
            case Table():
                rows = "\n".join(row(cells, "td") for cells in block.rows)
                parts.append(f"<table>\n<thead>{row(block.head, 'th')}</thead>\n<tbody>\n{rows}\n</tbody>\n</table>")
            case Command():
                parts.append(f"<p><code>{html.escape(block.text)}</code></p>")
            case Figure():
                source = f"data:image/png;base64,{base64.b64encode(block.image).decode()}"
                parts.append(f'<p><img src="{source}" alt="{html.escape(block.text)}"></p>')
    title = next((block.text for block in blocks if isinstance(block, Heading)), "")
    head = f'<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>'
    return "\n".join(['<!doctype html>\n<html lang="en">', f"<head>\n{head}\n</head>\n<body>", *parts, "</body>\n</html>\n"])
