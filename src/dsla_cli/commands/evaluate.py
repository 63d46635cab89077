"""`dsla eval`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .. import preflight
from ..options import LEVEL, add_checkpoint, add_command, listed, numbers, positive

GOES_ON = True


def add_to(commands: Any, name: str) -> None:
    parser = add_command(
        commands,
        name,
        "measure tasks at several levels, with one load of the model",
        "Runs tasks of lm-eval (an extra: pip install 'dsla-hf[eval]'), the groups dsla_paper (dsla_commonsense, dsla_longbench, "
        "dsla_summarization, dsla_perplexity) and dsla_ruler, and long-context tasks that need no download: needle, needle_several, "
        "needle_distractors, variable_tracking, associative_recall, position_perplexity, far_bigrams. Writes a file per level; a run that "
        "was interrupted goes on where it stopped.",
        "dsla eval --model BASE --adapter ADAPTER --levels 0,4,50% --tasks needle,far_bigrams --output RESULTS",
        "dsla eval --model HYBRID --tasks piqa,arc_easy --output RESULTS --limit 100",
    )
    add_checkpoint(parser, "original model, or a hybrid", adapter_required=False)
    what = parser.add_argument_group("evaluation")
    what.add_argument("--levels", type=listed, metavar="L,L", help=f"each: {LEVEL} (default: the adapter's)")
    what.add_argument("--tasks", type=listed, required=True, metavar="T,T", help="names of lm-eval's tasks and groups, and of those above")
    what.add_argument("--output", required=True, metavar="DIR", help="folder for the result files")
    what.add_argument("--limit", type=positive, metavar="N", help="documents per task (default: all; 40 for long-context tasks)")
    what.add_argument(
        "--batch-size",
        type=lambda text: None if text == "auto" else positive(text),
        metavar="N",
        help="sequences at a time, halved when memory does not suffice (default: auto)",
    )
    what.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    what.add_argument("--include-path", metavar="DIR", help="folder with task definitions (YAML) of your own")
    what.add_argument("--data", metavar="DIR", help="folder with data sets as DIR/OWNER/NAME (default: from the hub)")
    long = parser.add_argument_group("long context")
    long.add_argument("--lengths", type=numbers, metavar="N,N", help="tokens (default: 1024)")
    long.add_argument("--haystack", metavar="FILE", help=".txt or .jsonl, also .xz (default: the help texts of Python)")
    long.add_argument("--seed", type=int, default=0, metavar="N", help="seed of names, numbers and places (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    model = preflight.checked(args)
    from dsla_hf.evaluation.harness import evaluate

    evaluate(
        model,
        args.adapter,
        args.levels,
        args.tasks,
        args.output,
        limit=args.limit,
        batch_size=args.batch_size,
        num_fewshot=args.num_fewshot,
        include_path=args.include_path,
        data=args.data,
        dtype=args.dtype,
        lengths=args.lengths,
        haystack=args.haystack,
        seed=args.seed,
    )


def kept(args: argparse.Namespace) -> str:
    levels = sorted(file.stem.removeprefix("level-") for file in Path(args.output).glob("level-*.json"))
    finished = f"finished are the levels {', '.join(str(int(level)) for level in levels)}" if levels else "no level was finished"
    return f"{finished} in {args.output}"
