"""`dsla env`."""

from __future__ import annotations

import argparse
from typing import Any

from .. import preflight
from ..options import add_command

GOES_ON = False


def add_to(commands: Any, name: str) -> None:
    parser = add_command(
        commands,
        name,
        "versions, device, and which kernels run",
        "What a bug report needs: versions, device, kernels.",
        "dsla env --model BASE",
    )
    parser.add_argument("--model", metavar="M", help="also which parts of this model run fused in captured steps: a hub name or a folder")


def run(args: argparse.Namespace) -> None:
    if args.model is not None:
        preflight.check(args.model, tokenizer=False)
    from dsla_hf.cli.env import environment

    print(environment(args.model))


def kept(args: argparse.Namespace) -> str:
    return "nothing was printed"
