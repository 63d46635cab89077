"""The rows of `dsla bench`: completed by predictions, written as they come, as a table and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...core.plots import figure, mark_measured, mark_plain, save
from ...core.results import write_results
from ...core.tables import markdown_table

NUMBERS = {  # columns of the table: field, heading, scale
    "kept_heads": ("KV heads kept", 1.0),
    "prefill_seconds": ("prefill s", 1.0),
    "predicted_prefill_seconds": ("floor", 1.0),
    "seconds_per_token": ("ms a token", 1e3),
    "predicted_seconds_per_token": ("floor", 1e3),
    "tokens_per_second": ("tokens/s", 1.0),
    "against_level_0": ("× level 0", 1.0),
    "raise_seconds": ("raise ms", 1e3),
    "capture_seconds": ("capture ms", 1e3),
    "peak_bytes": ("peak GB", 1e-9),
    "cache_bytes": ("cache MB", 1e-6),
    "predicted_cache_bytes": ("predicted", 1e-6),
}


class Results:
    """Rows as they come, in a file that `dsla report --speed` reads."""

    def __init__(self, folder: Path, bandwidth: float):
        self.folder, self.bandwidth, self.rows = folder, bandwidth, list[dict[str, Any]]()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any], rate: float) -> None:
        """Complete a row by predictions, at `rate` operations per second, and by its comparison with level 0; write all rows."""
        if "moved_bytes_per_token" in row:
            row["predicted_seconds_per_token"] = row["moved_bytes_per_token"] / self.bandwidth
            row["predicted_prefill_seconds"] = row["prefill_operations"] / rate
            row["copy_bytes_per_second"], row["matmul_operations_per_second"] = self.bandwidth, rate
            same = ("engine", "length") if row.get("largest_batch") else ("engine", "length", "batch_size")
            for other in self.rows:
                if other["level"] == 0 and "error" not in other and all(other[key] == row[key] for key in same):
                    row["against_level_0"] = row["tokens_per_second"] / other["tokens_per_second"]
        self.rows.append(row)
        write_results(self.folder / "bench.json", self.rows)

    def table(self) -> str:
        """The rows as a Markdown table."""
        used = {field: shown for field, shown in NUMBERS.items() if any(row.get(field) is not None for row in self.rows)}
        headings = ["engine", "level", "length", "batch", *(heading for heading, _ in used.values()), ""]
        lines = []
        for row in self.rows:
            cells = [str(row[field]) for field in ("engine", "level", "length", "batch_size")]
            for field, (_, scale) in used.items():
                value = row.get(field)
                cells.append("" if value is None else f"{value * scale:.4g}")
            lines.append([*cells, row.get("error", "")])
        return markdown_table(headings, lines)

    def plot(self) -> None:
        """Time per token against length and against batch, a line for every engine and level, as `bench.png`."""
        rows = [row for row in self.rows if "error" not in row]
        panels = []
        for along, other in (("length", "batch_size"), ("batch_size", "length")):
            fixed = min((row[other] for row in rows), default=0)
            places = {row[along] for row in rows if row[other] == fixed}
            if len(places) > 1:
                panels.append((along, other, fixed, places))
        if not panels:
            print("no plot: it needs two lengths or two batch sizes")
            return
        try:
            drawn, axes = figure(1, len(panels), size=(5 * len(panels), 4))
        except ImportError as error:
            print(f"no plot: {error}")
            return
        for axis, (along, other, fixed, places) in zip(axes, panels, strict=True):
            for engine, level in dict.fromkeys((row["engine"], row["level"]) for row in rows):
                line = sorted(
                    (row[along], row["seconds_per_token"] * 1e3, row["predicted_seconds_per_token"] * 1e3)
                    for row in rows
                    if (row["engine"], row["level"], row[other]) == (engine, level, fixed)
                )
                if line:
                    x, found, floor = zip(*line, strict=True)
                    (line_drawn,) = axis.plot(x, found, marker="o", label=f"{engine}, level {level}")
                    axis.plot(x, floor, linestyle=":", color=line_drawn.get_color())
            axis.set(
                xscale="log", yscale="log", xlabel=along.replace("_", " "), ylabel="ms a token", title=f"{other.replace('_', ' ')} {fixed}"
            )
            mark_measured(axis.xaxis, places)
            mark_plain(axis.yaxis)
        axes[0].legend(fontsize="small", title="dotted: floor")
        save(drawn, self.folder / "bench.png", dpi=150)
