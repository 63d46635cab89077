"""The figures of a page: which metrics get a panel, and what is drawn in it."""

from __future__ import annotations

import re
from typing import Any

from ...core.plots import figure, mark_measured, mark_plain, png
from .measurements import Measurement

COLUMNS = 3

Panel = tuple[str, tuple[str, list[str]]]  # its title; a task, and those of its metrics that are drawn


def with_arrow(name: str, measurement: Measurement) -> str:
    """`name`, and an arrow where it is known whether up is good."""
    return name + {True: " ↑", False: " ↓", None: ""}[measurement.higher_is_better]


def panels_of(found: list[Measurement]) -> list[Panel]:
    """The first metric of every task before the second of any. Of a metric that is there at several lengths one for each length: the
    whole, or the last of its parts, such as the farthest distance. What was measured at one level is in the tables alone."""
    by_task: list[list[Panel]] = []
    for task in dict.fromkeys(m.task for m in found):
        families: dict[str, dict[str, str]] = {}
        levels: dict[str, set[int]] = {}
        for m in found:
            if m.task == task:
                levels.setdefault(m.metric, set()).add(m.place)
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


def draw(panels: list[Panel], found: list[Measurement]) -> bytes:
    """The panels as PNG. Either all of `found` know the KV heads that their levels keep, or none of them does."""
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    drawn, axes = figure(rows, columns, size=(4.2 * columns, 3.2 * rows))
    arms = list(dict.fromkeys(m.arm for m in found if m.level > 0)) or list(dict.fromkeys(m.arm for m in found))
    for axis, (title, (task, metrics)) in zip(axes, panels, strict=False):
        if len(arms) > 1 and len(metrics) > 1:  # one line an arm: the greatest length
            metrics = [max(metrics, key=lambda metric: float(re.sub(r"\D", "", _parsed(metric)[1]) or 0))]
        its = [m for m in found if m.task == task and m.metric in metrics]
        _draw_panel(axis, its, metrics, arms)
        axis.set_title(with_arrow(title if len(metrics) > 1 else f"{task}: {metrics[0]}", its[0]), fontsize=9)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    return png(drawn)


def _draw_panel(axis: Any, its: list[Measurement], metrics: list[str], arms: list[str]) -> None:
    """A line for each arm, or for each of several metrics of the one arm; dotted the original model."""
    several = len(metrics) > 1
    for j, metric in enumerate(metrics):
        for original in {m.value for m in its if m.metric == metric and m.level == 0}:
            axis.axhline(original, linestyle=":", linewidth=1, color=f"C{j % 10}" if several else "0.4")
        for i, arm in enumerate(arms):
            points = sorted((m.place, m.value, m.error or 0.0) for m in its if m.arm == arm and m.metric == metric)
            if points:
                label = (_parsed(metric)[1] or metric) if several else arm
                color = f"C{(j if several else i) % 10}"
                axis.errorbar(*zip(*points, strict=True), marker="o", markersize=3.5, linewidth=1.2, color=color, label=label)
    mark_measured(axis.xaxis, {m.place for m in its})
    mark_plain(axis.yaxis)
    by_heads = its[0].kept is not None
    if by_heads:  # the original model on the left, as with levels
        axis.invert_xaxis()
    axis.set_xlabel("KV heads kept" if by_heads else "level", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if several or len(arms) > 1:
        axis.legend(fontsize=7)
