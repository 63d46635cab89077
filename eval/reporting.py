"""What the scripts of eval/ write: result files, tables, the parts of pages that are made from them, and tensors made once."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dsla_hf.core import results
from dsla_hf.core.files import write_whole
from dsla_hf.core.tables import markdown_table

RESULTS = Path(__file__).parent / "results"


def write_results(name: str, rows: list[dict[str, Any]], command: str | None = None, folder: Path = RESULTS, **extra: Any) -> Path:
    """Write `NAME.json` in a folder whole or not at all: command (with names in place of absolute paths), versions, device, rows."""
    named = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    command = command or "python " + " ".join([os.path.relpath(sys.argv[0]), *named])
    return results.write_results(folder / f"{name}.json", rows, command, **extra)


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
    write_whole(page, text)


def rows_table(rows: list[dict[str, Any]], columns: list[str]) -> str:
    """Rows as a Markdown table; floats with four significant digits."""

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    return markdown_table(columns, ([cell(row.get(column)) for column in columns] for row in rows))


def made_once(file: Path, make: Callable[[], Any]) -> Any:
    """What `make` gives, tensors or what holds them, kept in a file for the next process."""
    if not file.exists():
        content = io.BytesIO()
        torch.save(make(), content)
        write_whole(file, content.getvalue())
    return torch.load(file)
