"""Plots as PNG, drawn without a display; their ticks are plain numbers, at measured values, about ten at most whatever the depth of the
model."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import write_whole

MOST_TICKS = 10


def figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (4.5, 3.6), **options: Any) -> tuple[Any, list[Any]]:
    """A figure and its axes, row by row.

    Args:
        size: inches, of the whole figure.
        options: of matplotlib's `Figure.subplots`, such as `sharex`.

    Raises:
        ImportError: without matplotlib, with how to install it.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'dsla-hf[plot]'") from error
    drawn = matplotlib.figure.Figure(figsize=size, layout="constrained")
    return drawn, list(drawn.subplots(rows, columns, squeeze=False, **options).flat)


def png(drawn: Any, dpi: int = 110) -> bytes:
    """The figure as a file, the same bytes for the same figure."""
    written = io.BytesIO()
    drawn.savefig(written, format="png", dpi=dpi, metadata={"Software": None})
    return written.getvalue()


def save(drawn: Any, path: Path, dpi: int = 110) -> None:
    """Write the figure as PNG, whole or not at all."""
    write_whole(path, png(drawn, dpi))


def plain(value: float, position: int | None = None) -> str:
    """A number as one writes it: 131,072 and 0.0005, to six digits, without powers of ten. `position` is what matplotlib hands over."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 5 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{digits}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def thinned(values: Iterable[float], log: bool = False, most: int = MOST_TICKS) -> list[float]:
    """Those of the values that have room beside each other on an axis: the first, the last, and what lies far enough apart between."""
    known = sorted({value for value in values if value > 0 or not log})
    if len(known) < 3:
        return known
    place = math.log if log else float
    gap = (place(known[-1]) - place(known[0])) / (most - 1) * 0.999  # rounding must not cost a tick
    kept = [known[0]]
    for value in known[1:-1]:
        if place(value) - place(kept[-1]) >= gap and place(known[-1]) - place(value) >= gap:
            kept.append(value)
    return [*kept, known[-1]]


def mark_measured(axis: Any, values: Iterable[float]) -> None:
    """Ticks of an axis (`axes.xaxis`) at measured values, such as levels or lengths; after its scale is set."""
    shown = thinned(values, log=axis.get_scale() == "log")
    axis.set_ticks(shown, labels=[plain(value) for value in shown])
    _no_minor(axis)


def mark_plain(axis: Any) -> None:
    """Plain numbers at round values on an axis whose values can be any; after its scale is set and everything is drawn."""
    from matplotlib.ticker import FuncFormatter

    if axis.get_scale() == "log":
        shown = _round_values(*axis.get_view_interval())
        axis.set_ticks(shown, labels=[plain(value) for value in shown])
    else:
        axis.set_major_formatter(FuncFormatter(plain))
    _no_minor(axis)


def _no_minor(axis: Any) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _round_values(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high` of a logarithmic axis, three to ten where there are."""
    from matplotlib.ticker import MaxNLocator

    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1.0,), (1.0, 2.0, 5.0), tuple(map(float, range(1, 10)))):
        # 10 ** -4 is not 1e-4, to the last digit.
        found = [value for k in exponents for factor in factors if low <= (value := float(f"{factor}e{k}")) <= high]
        if len(found) >= 3:
            return thinned(found, log=True)
    return [float(value) for value in MaxNLocator(5).tick_values(low, high) if low <= value <= high]
