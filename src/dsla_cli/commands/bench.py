"""`dsla bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import preflight
from ..options import LEVEL, add_checkpoint, add_command, listed, numbers, positive

GOES_ON = False
LEVELS = f"beside level 0; each: {LEVEL} (default: 50%%,100%%; of a plan of heads kept:50%%,kept:25%%,kept:10%%,kept:3%%,kept:0)"
SHAPES = ("llama2-7b", "llama3-8b", "qwen3-1.7b")


def add_to(commands: Any, name: str) -> None:
    parser = add_command(
        commands,
        name,
        "measure time and memory of generation, beside the unconverted model",
        "Measures reading a prompt, time per token, throughput, peak memory and cache at several levels, prompt lengths and batch sizes. "
        "The unconverted model, level 0, runs in the same call. Beside each number stands the floor by bytes and operations. MODEL may "
        f"also be {', '.join(SHAPES[:-1])} or {SHAPES[-1]}: that shape with random weights, nothing is downloaded. Without an adapter DSLA "
        "layers get fresh weights: speed does not depend on their values.",
        "dsla bench --model llama2-7b --lengths 2048,8192 --batches 1,16",
        "dsla bench --model BASE --adapter ADAPTER --levels 25%,8 --output RESULTS",
        "dsla bench --model llama3-8b --engines graph --lengths 8192 --largest-batch",
    )
    add_checkpoint(parser, "original model, a hybrid, or the name of a shape", adapter_required=False)
    cases = parser.add_argument_group("measurement")
    cases.add_argument("--levels", type=listed, metavar="L,L", help=LEVELS)
    cases.add_argument("--lengths", type=numbers, metavar="N,N", help="tokens of the prompt (default: 2048; 128 on a CPU)")
    cases.add_argument("--batches", type=numbers, metavar="N,N", help="rows (default: 1)")
    cases.add_argument(
        "--engines",
        type=listed,
        metavar="E,E",
        help="eager; compiled: static cache, as transformers compiles it; graph: CUDA graphs (default: eager,graph; eager on a CPU)",
    )
    cases.add_argument("--new-tokens", type=positive, default=64, metavar="N", help="tokens to generate (default: %(default)s)")
    cases.add_argument(
        "--prefill-tokens", type=positive, default=16384, metavar="N", help="of all rows, read in one forward (default: %(default)s)"
    )
    cases.add_argument("--largest-batch", action="store_true", help="instead of --batches: search the largest batch that fits")
    cases.add_argument("--raises", action="store_true", help="measure also how long a raise from level 0 stalls a text")
    cases.add_argument("--output", default="bench-output", metavar="DIR", help="folder for bench.json and plot (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    model = preflight.with_gguf(args.model, args.gguf_file)
    if model not in SHAPES:
        preflight.check(model, args.adapter, tokenizer=False)
    from dsla_hf.inference.bench.measure import bench

    bench(
        model,
        args.adapter,
        levels=args.levels,
        lengths=args.lengths,
        batches=args.batches,
        engines=args.engines,
        new_tokens=args.new_tokens,
        prefill_tokens=args.prefill_tokens,
        largest_batch=args.largest_batch,
        raises=args.raises,
        output=args.output,
        dtype=args.dtype,
    )


def kept(args: argparse.Namespace) -> str:
    file = Path(args.output) / "bench.json"
    return f"{file} holds what was measured so far" if file.is_file() else "nothing was measured yet"
