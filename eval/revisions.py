"""Two revisions of this project beside each other on one GPU: times of the kernels and of a token of a 7B model.

    git worktree add ../before v0.1.0
    python eval/revisions.py ../before . --rounds 2

Each round runs the benchmarks of both trees, in processes of their own and in turns, so that a card that slows down slows both. A row is a
measurement that both have: the median of its rounds, the ratio, and how far rounds of the same tree lie apart. Writes
eval/results/revisions.json (rows of parts that did not run are kept), a plot of the ratios and the table of docs/measured/kernels.md,
both of which `--page` makes from that file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from reporting import RESULTS, fill_page, rows_table, write_results
from tqdm import tqdm

from dsla_hf.core import plots

DOCS = Path(__file__).parents[1] / "docs"
KERNEL_KEY = ("part", "what", "layer", "form", "tokens", "heads", "kv_heads", "batch", "size", "decays", "window", "sinks")
TOKEN_KEY = ("part", "shape", "engine", "level", "length", "batch_size")
COLUMNS = ["what", "before_ms", "after_ms", "ratio", "spread", "rounds"]


def measure(tree: Path, parts: list[str], shape: str) -> dict[str, float]:
    """Milliseconds by name of what the benchmarks of a tree measure."""
    tree = tree.resolve()
    path = os.pathsep.join([str(tree / "src"), str(tree / "kernels"), os.environ.get("PYTHONPATH", "")])

    def run(*command: str) -> None:
        subprocess.run([sys.executable, *command], cwd=tree, env={**os.environ, "PYTHONPATH": path}, check=True, stdout=subprocess.DEVNULL)

    found = {}
    kernel_parts = [part for part in parts if part != "token"]
    if kernel_parts:
        run("eval/benchmarks/kernels.py", "--quick", "--parts", ",".join(kernel_parts))
        for row in json.loads((tree / "eval/results/kernels.json").read_text())["rows"]:
            if row["part"] in kernel_parts and row.get("form") == "ours":
                found[" ".join(f"{name}={row[name]}" for name in KERNEL_KEY if name in row)] = row["ms"]
    if "token" in parts:
        with tempfile.TemporaryDirectory() as folder:
            run("eval/inference.py", "--parts", "token", "--shapes", shape, "--results", folder)
            for row in json.loads(Path(folder, "inference.json").read_text())["rows"]:
                if row["engine"] == "graph" and row.get("seconds_per_token") is not None:  # other steps take what the host does
                    found[" ".join(f"{name}={row[name]}" for name in TOKEN_KEY)] = 1000 * row["seconds_per_token"]
    return found


def compare(rounds: list[tuple[dict[str, float], dict[str, float]]]) -> list[dict[str, Any]]:
    """A row for each measurement of both trees, the slowest change first."""
    times: dict[str, tuple[list[float], list[float]]] = defaultdict(lambda: ([], []))
    for both in rounds:
        for name in both[0].keys() & both[1].keys():
            for one, measured in zip(times[name], both, strict=True):
                one.append(measured[name])
    rows = []
    for name, both in times.items():
        before, after = map(statistics.median, both)
        spread = max((max(one) - min(one)) / min(one) for one in both)
        rows.append(
            {"what": name, "before_ms": before, "after_ms": after, "ratio": after / before, "spread": spread, "rounds": len(both[0])}
        )
    return sorted(rows, key=lambda row: -row["ratio"])


def show(rows: list[dict[str, Any]], docs: Path) -> None:
    """The table and the plot in the pages of a folder."""
    short = ("part", "layer", "tokens", "kv_heads", "batch", "level", "length")

    def named(row: dict[str, Any]) -> dict[str, Any]:
        values = dict(pair.split("=") for pair in re.split(r" (?=\w+=)", row["what"]))
        return row | {"what": ", ".join(f"{name} {values[name]}" if name != "part" else values[name] for name in short if name in values)}

    fill_page(docs / "measured" / "kernels.md", {"revisions": rows_table([named(row) for row in rows], COLUMNS)})
    plot(rows, docs / "images" / "revisions.png")


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Every ratio over the time before."""
    figure, (axes,) = plots.figure(size=(7, 4))
    axes.scatter([row["before_ms"] for row in rows], [row["ratio"] for row in rows], s=12)
    axes.axhline(1, linewidth=0.8, color="gray")
    axes.set(xscale="log", xlabel="ms before", ylabel="time after / before")
    plots.save(figure, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, nargs="?", help="folder of the one revision")
    parser.add_argument("after", type=Path, nargs="?", help="folder of the other")
    parser.add_argument("--page", action="store_true", help="measure nothing: table and plot from the rows")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--parts", default="forward,training,decode,fold,token", help="of the kernels' benchmark, and token")
    parser.add_argument("--shape", default="llama2-7b", help="of `dsla bench`, for token")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of revisions.json")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder with measured/kernels.md and images")
    args = parser.parse_args(arguments)
    if args.page:
        return show(json.loads((args.results / "revisions.json").read_text())["rows"], args.docs)
    if args.after is None:
        parser.error("two folders are needed: BEFORE AFTER")
    parts = args.parts.split(",")
    file = args.results / "revisions.json"
    known = json.loads(file.read_text())["rows"] if file.exists() else []
    kept = [row for row in known if not any(row["what"].startswith(f"part={part} ") for part in parts)]
    rounds: list[tuple[dict[str, float], dict[str, float]]] = []
    with tqdm(total=2 * args.rounds, desc="rounds of both") as bar:
        for _ in range(args.rounds):
            both = []
            for tree in (args.before, args.after):
                both.append(measure(tree, parts, args.shape))
                bar.update()
            rounds.append((both[0], both[1]))
            rows = sorted(kept + compare(rounds), key=lambda row: -row["ratio"])
            command = f"python eval/revisions.py BEFORE AFTER --rounds {args.rounds} --parts {args.parts}"
            write_results("revisions", rows, command, folder=args.results)
    show(rows, args.docs)
    print(rows_table(rows, COLUMNS))


if __name__ == "__main__":
    main()
