"""The command `dsla`. Modules that import torch are imported by the command that needs them: --help needs none."""

from __future__ import annotations

import argparse
import platform
import sys
import textwrap
import warnings
from importlib.metadata import version
from pathlib import Path

EPILOG = """\
A base checkpoint becomes a hybrid in these steps; `dsla COMMAND --help` tells more about each:

  dsla distill  --model BASE --data TEXT.txt --output_dir ADAPTER   train DSLA weights for its layers
  dsla generate --model BASE --adapter ADAPTER --level 50% --prompt "Once upon a time"
  dsla merge    --model BASE --adapter ADAPTER --level 50% --output HYBRID
  dsla generate --model HYBRID --prompt "Once upon a time"
"""
LEVEL = "how many layers are DSLA: a number, or a share of the model's layers such as 50%%"


def main(arguments: list[str] | None = None) -> int:
    """Run `dsla`; returns the exit status. Errors that a user can mend are printed as one line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # `distill` has the options of transformers' TrainingArguments, and the parser that makes them imports torch.
    distill = arguments[:1] == ["distill"]
    args = argparse.Namespace(command="distill") if distill else _parser().parse_args(arguments)
    # peft 0.21 asks transformers 5.23 by an old name.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    try:
        if distill:
            from .distill_job import distill_job, parse_options

            distill_job(*parse_options(arguments[1:], prog="dsla distill"))
        else:
            _run(args)
    except (ValueError, OSError, ImportError) as error:
        print(f"dsla {args.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _run(args: argparse.Namespace) -> None:
    if args.command == "quickstart":
        from .quickstart import run

        run(args.output, args.steps, args.seed)
    elif args.command == "env":
        print(environment())
    elif args.command == "order":
        from .commands import order

        order(
            args.model,
            args.adapter,
            args.data,
            metric=args.metric,
            sequences=args.sequences,
            length=args.length,
            dtype=args.dtype,
            dry_run=args.dry_run,
        )
    elif args.command == "merge":
        from .commands import merge

        merge(args.model, args.adapter, args.level, args.output, dtype=args.dtype)
    elif args.command == "eval":
        from .evaluate_job import evaluate

        evaluate(
            args.model,
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
    elif args.command == "report":
        from .report import report

        report(args.results, args.out, speed=args.speed, metrics=args.metrics, title=args.title)
    else:
        from .commands import generate

        generate(
            args.model,
            args.adapter,
            args.level,
            args.prompt if args.prompt_file is None else Path(args.prompt_file).read_text(encoding="utf-8"),
            max_new_tokens=args.max_new_tokens,
            do_sample=args.do_sample,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
            dtype=args.dtype,
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dsla",
        description="Turn a pretrained transformer into a fast hybrid, layer by layer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    quickstart = commands.add_parser(
        "quickstart",
        help="see it work in a few minutes on a CPU",
        description="Trains a small Llama on text that comes with Python, converts and distils it, saves it as adapter and "
        "hybrid, generates with the level raised in mid-text, and prints what each level costs and saves.",
    )
    quickstart.add_argument("--output", default="quickstart-output", help="folder for models and plot (default: %(default)s)")
    quickstart.add_argument("--steps", type=_positive, default=400, help="optimizer steps of the small model (default: %(default)s)")
    quickstart.add_argument("--seed", type=int, default=0, help="seed of everything random (default: %(default)s)")

    commands.add_parser("distill", help="train an adapter: align the layers, rank them, distil at random levels", add_help=False)

    order = _command(
        commands,
        "order",
        "rank the layers of an adapter, and store the order in it",
        "Measures what converting each layer costs: KL to the original model, in nats per token. The order, least harmful "
        "first, is stored in the adapter; its weights and its level stay. Use text that you do not evaluate on.",
        "dsla order --model BASE --adapter ADAPTER --data text.txt --dry-run",
    )
    _checkpoint(order, "original model", adapter_required=True)
    measuring = order.add_argument_group("measurement")
    measuring.add_argument("--data", nargs="+", required=True, metavar="FILE", help=".txt (documents separated by NUL), .jsonl, or .xz")
    measuring.add_argument(
        "--metric",
        choices=["kl", "greedy", "entropy"],
        default="kl",
        help="kl: harm of each layer alone; greedy: of each beside those before it, some ten times slower; entropy: of the original "
        "attention, as in the paper (default: %(default)s)",
    )
    measuring.add_argument("--sequences", type=_positive, default=16, metavar="N", help="sequences to measure on (default: %(default)s)")
    measuring.add_argument("--length", type=_positive, default=2048, metavar="L", help="tokens per sequence (default: %(default)s)")
    measuring.add_argument("--dry-run", action="store_true", help="print the order, store nothing")

    merge = _command(
        commands,
        "merge",
        "save a hybrid: the adapter merged at one level",
        "Writes a checkpoint of its own, with the tokenizer, in which the first layers of the adapter's order are DSLA and their softmax "
        "weights are gone. Its level is fixed; to change it at run time, use model and adapter.",
        "dsla merge --model BASE --adapter ADAPTER --level 50% --output HYBRID",
    )
    _checkpoint(merge, "original model", adapter_required=True)
    hybrid = merge.add_argument_group("hybrid")
    hybrid.add_argument("--level", required=True, metavar="L", help=LEVEL)
    hybrid.add_argument("--output", required=True, metavar="DIR", help="folder to save the hybrid in")

    generate = _command(
        commands,
        "generate",
        "go on from a prompt, at a level of your choice",
        "Prints the continuation of a prompt as it comes: by a hybrid, or by the original model, with or without adapter.",
        'dsla generate --model BASE --adapter ADAPTER --level 8 --prompt "Once upon a time"',
        "dsla generate --model HYBRID --prompt-file prompt.txt --do-sample --temperature 0.7",
    )
    _checkpoint(generate, "original model, or a hybrid", adapter_required=False)
    text = generate.add_argument_group("text")
    prompt = text.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="text to go on from, as it is (no chat template)")
    prompt.add_argument("--prompt-file", metavar="FILE", help="file with the text to go on from, UTF-8")
    text.add_argument("--level", metavar="L", help=LEVEL + " (default: the adapter's)")
    text.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="most tokens to generate (default: %(default)s)")
    sampling = generate.add_argument_group("sampling")
    sampling.add_argument("--do-sample", action="store_true", help="draw tokens at random (default: always the likeliest)")
    sampling.add_argument("--temperature", type=float, metavar="X", help="below 1: likelier tokens (default: the model's)")
    sampling.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest tokens of this total (default: the model's)")
    sampling.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the draws (default: %(default)s)")

    evaluation = _command(
        commands,
        "eval",
        "measure tasks at several levels, with one load of the model",
        "Runs tasks of lm-eval (an extra: pip install 'dsla-hf[eval]'), the groups dsla_paper (dsla_commonsense, dsla_longbench, "
        "dsla_summarization, dsla_perplexity) and dsla_ruler, and long-context tasks that need no download: needle, needle_several, "
        "needle_distractors, variable_tracking, associative_recall, position_perplexity, far_bigrams. Writes a file per level; a run that "
        "was interrupted goes on where it stopped.",
        "dsla eval --model BASE --adapter ADAPTER --levels 0,4,50% --tasks needle,far_bigrams --output RESULTS",
        "dsla eval --model HYBRID --tasks piqa,arc_easy --output RESULTS --limit 100",
    )
    _checkpoint(evaluation, "original model, or a hybrid", adapter_required=False)
    what = evaluation.add_argument_group("evaluation")
    what.add_argument("--levels", type=_listed, metavar="L,L", help=f"each: {LEVEL} (default: the adapter's)")
    what.add_argument("--tasks", type=_listed, required=True, metavar="T,T", help="names of lm-eval's tasks and groups, and of those above")
    what.add_argument("--output", required=True, metavar="DIR", help="folder for the result files")
    what.add_argument("--limit", type=_positive, metavar="N", help="documents per task (default: all; 40 for long-context tasks)")
    what.add_argument(
        "--batch-size",
        type=lambda text: None if text == "auto" else _positive(text),
        metavar="N",
        help="sequences at a time, halved when memory does not suffice (default: auto)",
    )
    what.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question (default: the task's)")
    what.add_argument("--include-path", metavar="DIR", help="folder with task definitions (YAML) of your own")
    what.add_argument("--data", metavar="DIR", help="folder with data sets as DIR/OWNER/NAME (default: from the hub)")
    long = evaluation.add_argument_group("long context")
    long.add_argument(
        "--lengths", type=lambda text: [_positive(part) for part in _listed(text)], metavar="N,N", help="tokens (default: 1024)"
    )
    long.add_argument("--haystack", metavar="FILE", help=".txt or .jsonl, also .xz (default: the help texts of Python)")
    long.add_argument("--seed", type=int, default=0, metavar="N", help="seed of names, numbers and places (default: %(default)s)")

    report = _command(
        commands,
        "report",
        "one page of quality and speed against level, from result files",
        "Tables and figures of what `dsla eval` measured, beside the same of other adapters, and the paper's published numbers. RESULTS "
        "are folders of `dsla eval`, or JSON files with `rows`; NAME=PATH names them.",
        "dsla report RESULTS --out page.html",
        "dsla report default=RESULTS control=OTHER --speed speed.json --out page.md",
    )
    report.add_argument("results", nargs="+", metavar="RESULTS", help="folder of `dsla eval`, or a JSON file with rows")
    report.add_argument("--out", required=True, metavar="FILE", help="page to write: .html or .md")
    report.add_argument("--speed", nargs="+", default=[], metavar="FILE", help="likewise, measurements of speed")
    report.add_argument(
        "--metrics", type=_listed, default=[], metavar="P,P", help='tasks and metrics to show, such as "needle*" (default: all)'
    )
    report.add_argument("--title", metavar="TEXT", help="title of the page")

    commands.add_parser(
        "env", help="versions, device, and which kernels run", description="What a bug report needs: versions, device, kernels."
    )
    return parser


def _command(commands: argparse._SubParsersAction, name: str, summary: str, description: str, *examples: str) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        help=summary,
        description=textwrap.fill(description, 100),
        epilog="example:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(text)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _checkpoint(parser: argparse.ArgumentParser, kind: str, adapter_required: bool) -> None:
    group = parser.add_argument_group("checkpoint")
    group.add_argument("--model", required=True, metavar="M", help=f"{kind}: a hub name or a folder")
    group.add_argument("--adapter", required=adapter_required, metavar="A", help="DSLA adapter of that model")
    group.add_argument(
        "--dtype",
        choices=("auto", "bfloat16", "float16", "float32"),
        default="auto",
        help="dtype of the weights; auto: as they were saved (default: %(default)s)",
    )


def environment() -> str:
    """Versions, device and kernel path, a line each."""
    import torch

    from dsla_kernels import kernel_path

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [("python", platform.python_version()), ("platform", platform.platform())]
    lines += [(package, version(package)) for package in ("dsla-hf", "torch", "transformers", "peft", "accelerate")]
    lines += [("device", torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads")]
    lines += [("kernels", kernel_path(device))]
    return "\n".join(f"{name:<14}{value}" for name, value in lines)
