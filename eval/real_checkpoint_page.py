"""The table of docs/real_checkpoint.md, from what `make real` measured: `python eval/real_checkpoint_page.py real-checkpoint`.

The folder's table.json becomes eval/results/real-checkpoint.json, its plot docs/images/real-checkpoint.png; what was measured on a CPU
has a table of its own, and `-cpu` behind these names.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from reporting import RESULTS, fill_page

from dsla_hf.core.files import write_json, write_whole
from dsla_hf.core.tables import markdown_table

DOCS = Path(__file__).resolve().parents[1] / "docs"
NAME = "real-checkpoint"


def text_of(found: dict[str, Any], name: str) -> str:
    """Table and plot, and where they were made."""
    rows = found["rows"]
    codes = [name for name in rows[0] if name.startswith("code_")]
    sizes = [name for name in rows[0] if name.startswith("bytes_")]
    head = ["KV heads kept", "perplexity", "over the original's", *(f"code in {int(name[5:]):,}" for name in codes)]
    head += [f"cache at {name[6:]} tokens, MB" for name in sizes]
    lines = [
        [
            str(row["kept"]),
            f"{row['perplexity']:.3f}",
            f"{row['perplexity_ratio']:.4f}",
            *(f"{row[name]:.2f}" for name in codes),
            *(f"{row[name] / 1e6:.2f}" for name in sizes),
        ]
        for row in rows
    ]
    where = f"{found['device']}, torch {found['versions']['torch']}, transformers {found['versions']['transformers']}"
    what = f"`{found['command']}`: {found['trained']:,} tokens of training, {found['samples']} samples of each length, "
    what += f"{found['seconds'] / 60:.0f} minutes."
    return f"{markdown_table(head, lines)}\n\n![perplexity and codes against KV heads kept](images/{name}.png)\n\n{what} {where}."


def main(folder: Path, results: Path = RESULTS, docs: Path = DOCS) -> None:
    found = json.loads((folder / "table.json").read_text())
    on_cpu = "CPU" in found["device"]
    name = f"{NAME}-cpu" if on_cpu else NAME
    fill_page(docs / "real_checkpoint.md", {"real checkpoint, CPU" if on_cpu else "real checkpoint": text_of(found, name)})
    write_json(results / f"{name}.json", found, indent=1)
    write_whole(docs / "images" / f"{name}.png", (folder / "table.png").read_bytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="with table.json and table.png, as `make real` writes it")
    folder = parser.parse_args().folder
    if missing := [name for name in ("table.json", "table.png") if not (folder / name).is_file()]:
        parser.error(f"{folder} has no {' and no '.join(missing)}: give the folder that `make real` wrote")
    main(folder)
