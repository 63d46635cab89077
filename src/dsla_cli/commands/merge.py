"""`dsla merge`."""

from __future__ import annotations

import argparse
from typing import Any

from .. import preflight
from ..options import LEVEL, add_checkpoint, add_command

GOES_ON = False


def add_to(commands: Any, name: str) -> None:
    parser = add_command(
        commands,
        name,
        "save a hybrid: the adapter merged at one level",
        "Writes a checkpoint of its own, with the tokenizer, in which the first layers of the adapter's order are DSLA and their softmax "
        "weights are gone. Its level is fixed; to change it at run time, use model and adapter.",
        "dsla merge --model BASE --adapter ADAPTER --level 50% --output HYBRID",
    )
    add_checkpoint(parser, "original model", adapter_required=True)
    hybrid = parser.add_argument_group("hybrid")
    hybrid.add_argument("--level", required=True, metavar="L", help=LEVEL)
    hybrid.add_argument("--output", required=True, metavar="DIR", help="folder to save the hybrid in")


def run(args: argparse.Namespace) -> None:
    model = preflight.checked(args, converts=True)
    from dsla_hf.cli.merge import merge

    merge(model, args.adapter, args.level, args.output, dtype=args.dtype)


def kept(args: argparse.Namespace) -> str:
    return f"nothing was written to {args.output}"
