"""`dsla order`."""

from __future__ import annotations

import argparse
from typing import Any

from .. import preflight
from ..options import SOURCES, add_checkpoint, add_command, positive

GOES_ON = False


def add_to(commands: Any, name: str) -> None:
    parser = add_command(
        commands,
        name,
        "rank the layers of an adapter, and store the order in it",
        "Measures what converting each layer costs: KL to the original model, in nats per token. The order, least harmful "
        "first, is stored in the adapter; its weights and its level stay. Use text that you do not evaluate on.",
        "dsla order --model BASE --adapter ADAPTER --data text.txt --dry-run",
    )
    add_checkpoint(parser, "original model", adapter_required=True)
    measuring = parser.add_argument_group("measurement")
    measuring.add_argument("--data", nargs="+", required=True, metavar="SOURCE", help=f"text: {SOURCES}")
    measuring.add_argument(
        "--metric",
        choices=["kl", "greedy", "entropy"],
        default="kl",
        help="kl: harm of each layer alone; greedy: of each beside those before it, some ten times slower; entropy: of the original "
        "attention, as in the paper (default: %(default)s)",
    )
    measuring.add_argument("--sequences", type=positive, default=16, metavar="N", help="sequences to measure on (default: %(default)s)")
    measuring.add_argument("--length", type=positive, default=2048, metavar="L", help="tokens per sequence (default: %(default)s)")
    measuring.add_argument("--dry-run", action="store_true", help="print the order, store nothing")


def run(args: argparse.Namespace) -> None:
    model = preflight.checked(args, converts=True)
    from dsla_hf.cli.order import order

    order(
        model,
        args.adapter,
        args.data,
        metric=args.metric,
        sequences=args.sequences,
        length=args.length,
        dtype=args.dtype,
        dry_run=args.dry_run,
    )


def kept(args: argparse.Namespace) -> str:
    return f"{args.adapter} is as it was"
