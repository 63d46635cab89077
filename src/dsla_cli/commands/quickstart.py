"""`dsla quickstart`."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import add_command, positive

GOES_ON = False


def add_to(commands: Any, name: str) -> None:
    parser = add_command(
        commands,
        name,
        "see it work in a few minutes on a CPU",
        "Trains a small Llama on text that comes with Python, converts and distils it, saves it as adapter and "
        "hybrid, generates with the level raised in mid-text, and prints what each level costs and saves.",
    )
    parser.add_argument("--output", default="quickstart-output", help="folder for models and plot (default: %(default)s)")
    parser.add_argument("--steps", type=positive, default=400, help="optimizer steps of the small model (default: %(default)s)")
    parser.add_argument(
        "--unit", choices=("layer", "head"), default="head", help="what levels count: layers, or KV heads (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    from dsla_hf.cli.quickstart import run

    run(args.output, args.steps, args.seed, args.unit)


def kept(args: argparse.Namespace) -> str:
    return f"what {args.output} holds is of an unfinished run, which the same command begins anew"
