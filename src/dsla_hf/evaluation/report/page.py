"""What `dsla report` does: one page of quality and speed against level, HTML with its figures inside or Markdown with PNGs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from . import published as paper
from .blocks import Block, Command, Figure, Heading, Paragraph, Table, write_page
from .figures import draw, panels_of, with_arrow
from .measurements import Measurement, Source, read_measurements

INTRODUCTION = (
    "Level 0 is the original model; at level L its L least harmful layers are DSLA. ± is a standard error, or the deviation over seeds "
    "where there are several. Dotted lines are the original model. ↑: more is better, ↓: less is."
)
PUBLISHED = (
    f"From the paper ({paper.SOURCE}), as printed there: other models, data and hardware, nothing of it measured here. LongBench in "
    "percent; empty where no number is at hand."
)
MOST_PANELS = 12
MOST_COLUMNS = 8  # of levels, and where there are more, of metrics


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
    text = write_page(blocks, Path(output))
    numbers = {"arm": len({m.arm for m in quality + fast}), "metric": len({(m.task, m.metric) for m in quality + fast})}
    print(f"{output}: " + ", ".join(f"{number} {name}{'s' * (number != 1)}" for name, number in numbers.items()))
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
    panels = panels_of(found)
    if panels:
        drawn = f"{name} by level: {', '.join(title for title, _ in panels[:MOST_PANELS])}"
        blocks.append(Figure(draw(panels[:MOST_PANELS], found), drawn, name.lower()))
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
    names = {m.metric: with_arrow(m.metric, m) for m in its}
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
