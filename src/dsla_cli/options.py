"""What the options of several commands have in common."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any

LEVEL = "how many layers are DSLA: a number, or a share of the model's layers such as 50%%; of a plan of heads, also kept:10%%"
# As `dsla_hf.corpus.SOURCES` has it, which imports more.
SOURCES = (
    "files (.txt with documents separated by NUL, .jsonl, either also as .xz; .json, .parquet, .csv) or names of hub datasets, "
    "'name:configuration'"
)
DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_command(commands: Any, name: str, summary: str, description: str, *examples: str) -> argparse.ArgumentParser:
    """A command with its help."""
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 100),
        epilog="example:\n" + "\n".join(f"  {example}" for example in examples) if examples else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_checkpoint(parser: argparse.ArgumentParser, kind: str, adapter_required: bool) -> None:
    """--model, --adapter, --gguf-file and --dtype."""
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--model", required=True, metavar="M", help=f"{kind}: a hub name, a folder, or a GGUF file")
    group.add_argument("--adapter", required=adapter_required, metavar="A", help="DSLA adapter of that model")
    add_gguf_file(group)
    group.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="dtype of the weights; auto: as they were saved (default: %(default)s)"
    )


def add_gguf_file(group: Any) -> None:
    """--gguf-file."""
    text = "GGUF file in that folder or repository; its weights are dequantised"
    group.add_argument("--gguf-file", "--gguf_file", metavar="F", help=text)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(text)


def listed(text: str) -> list[str]:
    """Parts between commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def numbers(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [positive(part) for part in listed(text)]
