"""Result files: one JSON per experiment, written by the script that measured it."""

from __future__ import annotations

import json
import os
import platform
import re
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, rows: list[dict[str, Any]], command: str | None = None, folder: Path = RESULTS, **extra: Any) -> Path:
    """Write `NAME.json` in a folder whole or not at all: command, versions, device, rows."""
    content = {
        "command": command or "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "peft", "accelerate")},
        },
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine() + " CPU",
        **extra,
        "rows": rows,
    }
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)
    return path


def fill_page(page: Path, parts: dict[str, str]) -> None:
    """Put each part between its marks in a Markdown page, `<!-- NAME -->` and `<!-- end -->`; all of them or none.

    Raises:
        ValueError: if the page does not have a mark exactly once.
    """
    text = page.read_text()
    for name, content in parts.items():
        mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if len(mark.findall(text)) != 1:
            raise ValueError(f"{page} must hold one place for {name!r}: <!-- {name} --> and <!-- end -->")
        text = mark.sub(lambda found, content=content: f"{found[1]}{content}\n{found[2]}", text)  # type: ignore[misc]
    partial = page.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, page)


def markdown_table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as a Markdown table; floats with four significant digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines)
