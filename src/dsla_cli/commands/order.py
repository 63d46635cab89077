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
        "rank the layers or KV heads of an adapter, and store the order in it",
        "Measures what converting each layer costs: KL to the original model, in nats per token; or what each KV head adds to it, on text "
        "and in questions about long texts. The order, least harmful first, is stored in the adapter; its weights and its level stay. Use "
        "text that you do not evaluate on.",
        "dsla order --model BASE --adapter ADAPTER --data text.txt --dry-run",
    )
    add_checkpoint(parser, "original model", adapter_required=True)
    measuring = parser.add_argument_group("measurement")
    measuring.add_argument("--data", nargs="+", required=True, metavar="SOURCE", help=f"text: {SOURCES}")
    measuring.add_argument(
        "--unit",
        choices=["layer", "head"],
        help="what is ranked; head: an adapter that counts layers counts KV heads from then on (default: what the adapter counts)",
    )
    measuring.add_argument(
        "--metric",
        choices=["kl", "greedy", "entropy", "shares", "single", "random"],
        help="of layers: kl, harm of each alone (the default); greedy, of each beside those before it, some ten times slower. Of heads: "
        "shares of the harm of all together, in rounds (the default); single, harm of each alone, a pass for each; random. Of both: "
        "entropy of the original attention, as in the paper",
    )
    measuring.add_argument("--sequences", type=positive, default=16, metavar="N", help="sequences to measure on (default: %(default)s)")
    measuring.add_argument("--length", type=positive, default=2048, metavar="L", help="tokens per sequence (default: %(default)s)")
    measuring.add_argument(
        "--probes", type=positive, default=24, metavar="N", help="of heads: questions about long texts beside these (default: %(default)s)"
    )
    measuring.add_argument(
        "--probe-length", type=positive, metavar="L", help="tokens of the longest of these, as long as your prompts (default: --length)"
    )
    measuring.add_argument(
        "--probe-weight", type=float, metavar="X", help="of heads: what harm to answers counts beside harm to text (default: 0.3)"
    )
    measuring.add_argument(
        "--ranks", type=positive, default=1, metavar="N", help="of heads: an order that is even over so many ranks of tensor parallel"
    )
    measuring.add_argument("--dry-run", action="store_true", help="print the order, store nothing")


def run(args: argparse.Namespace) -> None:
    model = preflight.checked(args, converts=True)
    from dsla_hf.cli.order import order

    order(
        model,
        args.adapter,
        args.data,
        unit=args.unit,
        metric=args.metric,
        sequences=args.sequences,
        length=args.length,
        probes=args.probes,
        probe_length=args.probe_length,
        probe_weight=args.probe_weight,
        ranks=args.ranks,
        dtype=args.dtype,
        dry_run=args.dry_run,
    )


def kept(args: argparse.Namespace) -> str:
    return f"{args.adapter} is as it was"
