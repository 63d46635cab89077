"""`dsla distill`. Its options are in `dsla_hf.cli.distill_options`, beside those of transformers' TrainingArguments."""

from __future__ import annotations

import argparse
from typing import Any

from .. import preflight

NAME = "distill"
GOES_ON = True


def add_to(commands: Any, name: str) -> None:
    commands.add_parser(name, help="train an adapter: align the layers, rank them, distil at random levels", add_help=False)


def run(args: argparse.Namespace) -> None:
    # Before torch is imported, for those who give the model on the command line.
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in ("--model", "--adapter", "--gguf_file"):
        early.add_argument(option, *([option.replace("_", "-")] if "_" in option else []))
    try:
        seen, _ = early.parse_known_args(args.arguments)
    except argparse.ArgumentError:
        seen = argparse.Namespace(model=None)
    if seen.model is not None and not {"-h", "--help"} & set(args.arguments):
        preflight.check(preflight.with_gguf(seen.model, seen.gguf_file), seen.adapter, converts=True)
    from dsla_hf.cli.distill import distill_job
    from dsla_hf.cli.distill_options import parse_options

    options, training = parse_options(args.arguments, prog="dsla distill")
    if seen.model is None:  # from a file of options
        preflight.check(options.model, options.adapter, converts=True)
    distill_job(options, training)


def kept(args: argparse.Namespace) -> str:
    return "nothing was written yet"
