"""`dsla report`."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import add_command, listed

GOES_ON = False


def add_to(commands: Any, name: str) -> None:
    parser = add_command(
        commands,
        name,
        "one page of quality and speed against level, from result files",
        "Tables and figures of what `dsla eval` measured, beside the same of other adapters. RESULTS are folders of `dsla eval`, or JSON "
        "files with `rows`; NAME=PATH names them.",
        "dsla report RESULTS --out page.html",
        "dsla report default=RESULTS control=OTHER --speed speed.json --out page.md",
        "dsla report ADAPTER/levels.json --adapter ADAPTER --level kept:10% --out page.md",
    )
    parser.add_argument("results", nargs="*", metavar="RESULTS", help="folder of `dsla eval`, or a JSON file with rows")
    parser.add_argument("--out", required=True, metavar="FILE", help="page to write: .html or .md")
    parser.add_argument("--speed", nargs="+", default=[], metavar="FILE", help="likewise, measurements of speed")
    parser.add_argument(
        "--metrics", type=listed, default=[], metavar="P,P", help='tasks and metrics to show, such as "needle*" (default: all)'
    )
    parser.add_argument("--adapter", metavar="A", help="draw the plan of this adapter: layers by KV heads, kept and converted")
    parser.add_argument("--level", metavar="L", help="level of that picture: 8, 50%%, of a plan of heads also kept:10%% (default: its own)")
    parser.add_argument("--published", action="store_true", help="show the numbers that the DSLA paper published, too")
    parser.add_argument("--title", metavar="TEXT", help="title of the page")


def run(args: argparse.Namespace) -> None:
    from dsla_hf.evaluation.report.page import report

    options = {name: getattr(args, name) for name in ("speed", "metrics", "adapter", "level", "title", "published")}
    report(args.results, args.out, **options)


def kept(args: argparse.Namespace) -> str:
    return f"{args.out} was not written"
