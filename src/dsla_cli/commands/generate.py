"""`dsla generate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import preflight
from ..options import LEVEL, add_checkpoint, add_command, positive

GOES_ON = False


def add_to(commands: Any, name: str) -> None:
    parser = add_command(
        commands,
        name,
        "go on from a prompt, at a level of your choice",
        "Prints the continuation of a prompt as it comes: by a hybrid, or by the original model, with or without adapter. With --chat it "
        "answers, in the model's chat template.",
        'dsla generate --model BASE --adapter ADAPTER --level 8 --prompt "Once upon a time"',
        "dsla generate --model BASE --adapter ADAPTER --level 50% --chat",
        "dsla generate --model HYBRID --prompt-file prompt.txt --do-sample --temperature 0.7",
    )
    parser.set_defaults(usage_error=parser.error)
    add_checkpoint(parser, "original model, or a hybrid", adapter_required=False)
    text = parser.add_argument_group("text")
    prompt = text.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", metavar="TEXT", help="text to go on from, as it is; with --chat what a user says")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to go on from, UTF-8")
    text.add_argument("--chat", action="store_true", help="apply the chat template; without a prompt: a conversation, a line a turn")
    text.add_argument("--system", metavar="TEXT", help="with --chat: the system's message")
    text.add_argument("--level", metavar="L", help=LEVEL + " (default: the adapter's)")
    text.add_argument("--max-new-tokens", type=positive, default=128, metavar="N", help="most tokens to generate (default: %(default)s)")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--do-sample", action="store_true", help="draw tokens at random (default: always the likeliest)")
    sampling.add_argument("--temperature", type=float, metavar="X", help="below 1: likelier tokens (default: the model's)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest tokens of this total (default: the model's)")
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    if args.prompt is None and args.prompt_file is None and not args.chat:
        args.usage_error("one of the arguments --prompt --prompt-file --chat is required")
    prompt = args.prompt if args.prompt_file is None else _read(Path(args.prompt_file))
    model = preflight.checked(args)
    from dsla_hf.cli.generate import generate

    generate(
        model,
        args.adapter,
        args.level,
        prompt,
        chat=args.chat,
        system=args.system,
        max_new_tokens=args.max_new_tokens,
        do_sample=args.do_sample,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        dtype=args.dtype,
    )


def _read(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"no such file: {file}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no UTF-8 text (byte {error.start:,}): convert it, or give another --prompt-file") from None


def kept(args: argparse.Namespace) -> str:
    return "nothing is kept"
