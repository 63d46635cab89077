"""What `dsla report` does: one page of quality and speed against level, HTML with its figures inside or Markdown with PNGs beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from ...core.plots import png
from ...levels.table import kept_text
from ...models.configuration import resolve_level
from ...models.loading import read_adapter_config
from ..in_window import fits_window, text_in_window
from . import published as paper
from .blocks import Block, Command, Figure, Heading, Paragraph, Table, write_page
from .figures import draw, panels_of, with_arrow
from .heads import draw_heads
from .measurements import Measurement, Source, read_measurements

INTRODUCTION = (
    "Level 0 is the original model; at level L its L least harmful {units} are DSLA. ± is a standard error, or the deviation over seeds "
    "where there are several. Dotted lines are the original model. ↑: more is better, ↓: less is."
)
HEADS = "KV heads, with the query heads that read them,"
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
    adapter: str | None = None,
    level: int | str | None = None,
    title: str | None = None,
    published: bool = False,
) -> str:
    """Write a page of measurements by level, and return its text.

    Args:
        results: folders and files of `dsla eval`, and tables of rows, each as in `read_measurements`: a path, or NAME=PATH.
        output: file to write, .html, or .md with its figures beside it: page-quality.png and page-speed.png of page.md.
        speed: likewise, measurements of speed.
        metrics: patterns such as "needle*" of what is shown, matched with the task, the metric, and "TASK METRIC". Empty: everything.
        adapter: a folder (or a name on the hub) of an adapter whose plan is drawn: layers by KV heads, page-heads.png of page.md.
        level: of that picture; None: the adapter's own.
        title: of the page.
        published: whether the numbers that the paper reports follow, in a table of their own.

    Raises:
        ValueError: for another kind of output, results that are none, two of the same name, patterns that nothing matches, or a level that
            the adapter does not have.
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
    if level is not None and adapter is None:
        raise ValueError(f"level {level!r} is that of a picture of an adapter's heads: name the --adapter")
    plan = [] if adapter is None else _heads_by_layer(adapter, level)
    if not quality and not fast and (results or speed or not plan):
        wanted = f" and {list(metrics)} match nothing" if metrics else ""
        raise ValueError(f"nothing to show: {[*results, *speed]} hold no numbers{wanted}")
    introduction = INTRODUCTION.format(units=_units(quality + fast))
    blocks: list[Block] = [Heading(1, title or "Quality and speed by level"), Paragraph(introduction), *plan]
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
    groups = _by_unit(found)
    for group in groups:
        by_heads = group[0].kept is not None
        if len(groups) > 1:
            blocks.append(Paragraph("By KV heads kept:" if by_heads else "By layers converted:"))
        blocks += _group(name, f"{name.lower()}-heads" if by_heads and len(groups) > 1 else name.lower(), group)
    return blocks


def _group(name: str, file: str, found: list[Measurement]) -> list[Block]:
    blocks: list[Block] = []
    panels = panels_of(found)
    if panels:
        by = "level" if found[0].kept is None else "KV heads kept"
        drawn = f"{name} by {by}: {', '.join(title for title, _ in panels[:MOST_PANELS])}"
        blocks.append(Figure(draw(panels[:MOST_PANELS], found), drawn, file))
    if len(panels) > MOST_PANELS:
        blocks.append(Paragraph(f"Drawn are {MOST_PANELS} of {len(panels)} metrics; --metrics chooses others."))
    arms = list(dict.fromkeys(m.arm for m in found))
    names = _names(found)
    for task in dict.fromkeys(m.task for m in found):
        its = [m for m in found if m.task == task]
        blocks += [Heading(3, task), *_in_window(its), *_tables(its, arms, names)]
    return blocks


def _in_window(its: list[Measurement]) -> list[Block]:
    """That the window of every arm and level holds the task's texts, if it does."""
    raised = [m for m in its if m.level > 0]
    if not raised or not all(fits_window(m.longest_text, m.window) for m in raised):
        return []
    return [Paragraph(text_in_window(max(m.longest_text or 0 for m in raised), min(m.window or 0 for m in raised)))]


def _by_unit(found: list[Measurement]) -> list[list[Measurement]]:
    """Those of levels that count layers, and those whose KV heads are known. An original model beside them is with each."""
    if all(m.kept is None for m in found):
        return [found]
    raised = {m.arm for m in found if m.level > 0 and m.kept is None}
    alone = {m.arm for m in found} - {m.arm for m in found if m.level > 0}
    all_heads = _all_heads(found)
    layers = [m for m in found if m.kept is None and (m.arm in raised or (raised and m.arm in alone))]
    heads = [m if m.kept is not None else replace(m, kept=all_heads) for m in found if m.kept is not None or m.arm not in raised]
    return [group for group in (layers, heads) if group]


def _all_heads(found: list[Measurement]) -> int:
    """KV heads of the model. A level that counts layers has fewer layers than heads converted."""
    return max(m.level + m.kept for m in found if m.kept is not None)


def _units(found: list[Measurement]) -> str:
    """What levels count here."""
    known = [m for m in found if m.kept is not None]
    heads = any(m.level and m.level + (m.kept or 0) == _all_heads(known) for m in known)
    layers = any(m.level and (m.kept is None or m.level + m.kept < _all_heads(known)) for m in found) or not heads
    return f"layers, or {HEADS}" if layers and heads else HEADS if heads else "layers"


def _names(found: list[Measurement]) -> dict[int, str]:
    """The places (see `Measurement`) in words, from the original model on."""
    if found[0].kept is None:
        return {level: f"{level}, original" if level == 0 else str(level) for level in sorted({m.level for m in found})}
    names, all_heads = {}, _all_heads(found)
    for kept in sorted({m.place for m in found}, reverse=True):
        levels = {m.level for m in found if m.place == kept}
        more = ", original" if levels == {0} else f", level {min(levels)}" if len(levels) == 1 else ""
        names[kept] = kept_text(kept, all_heads) + more
    return names


def _tables(its: list[Measurement], arms: list[str], names: dict[int, str]) -> list[Table]:
    """The numbers of a task: a row for each metric of each arm; where there are many levels, for each level. `names`: of their places."""
    there = {m.place for m in its}
    places = [place for place in names if place in there]
    cells = {(m.arm, m.metric, m.place): _number(m) for m in its}
    metrics = {m.metric: with_arrow(m.metric, m) for m in its}
    lines = [(arm, metric) for metric in metrics for arm in arms if any((arm, metric, place) in cells for place in places)]
    several = len(arms) > 1
    what, between = ("level", " ") if its[0].kept is None else ("KV heads kept", ": ")
    if len(places) <= MOST_COLUMNS:
        rows = [
            [metrics[metric], *([arm] if several else []), *(cells.get((arm, metric, place), "") for place in places)]
            for arm, metric in lines
        ]
        return [Table(["metric", *(["arm"] if several else []), *(f"{what}{between}{names[place]}" for place in places)], rows)]
    tables = []
    for begin in range(0, len(lines), MOST_COLUMNS):
        part = lines[begin : begin + MOST_COLUMNS]
        rows = [[names[place], *(cells.get((arm, metric, place), "") for arm, metric in part)] for place in places]
        tables.append(Table([what, *(f"{metrics[metric]}, {arm}" if several else metrics[metric] for arm, metric in part)], rows))
    return tables


def _heads_by_layer(adapter: str, level: int | str | None) -> list[Block]:
    """The picture of an adapter's plan at a level."""
    config = read_adapter_config(adapter)
    if level is not None:
        config.level = config.check_level(resolve_level(level, config, (config.base_dimensions or {}).get("num_hidden_layers", 0)))
    what = "layers" if config.conversion_unit == "layer" else "KV heads"
    said = f"{adapter} at level {config.level}. Numbers, where there is room, are places in the order in which {what} are converted."
    drawn = png(draw_heads(config))
    return [Heading(2, "Heads by layer"), Paragraph(said), Figure(drawn, "layers by KV heads, kept and converted", "heads")]


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
