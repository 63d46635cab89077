"""The command `dsla`. Modules that import torch are imported by the command that needs them: --help needs none."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
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
    elif args.command == "bench":
        from .bench import bench

        bench(
            args.model,
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
    elif args.command == "report":
        from .report import report

        report(args.results, args.out, speed=args.speed, metrics=args.metrics, title=args.title)
    elif args.command == "serve":
        _serve(args)
    elif args.command == "replay":
        _check_installed("httpx")
        from .serving.replay import ReplayOptions, replay

        replay(ReplayOptions(**{name: value for name, value in vars(args).items() if name != "command"}))
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


def _check_installed(*packages: str) -> None:
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise ImportError(f"this needs {', '.join(missing)}: pip install 'dsla-hf[serve]'")


def _serve(args: argparse.Namespace) -> None:
    _check_installed("fastapi", "uvicorn", "prometheus_client")
    from .serving.command import ServeOptions, serve

    # The key also from the environment: a command line can be read by every user of a machine.
    args.api_key = args.api_key or os.environ.get("DSLA_API_KEY")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("dsla_hf").setLevel(logging.INFO)
    serve(
        ServeOptions(**{name: value for name, value in vars(args).items() if name not in ("command", "host", "port")}), args.host, args.port
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
    long.add_argument("--lengths", type=_numbers, metavar="N,N", help="tokens (default: 1024)")
    long.add_argument("--haystack", metavar="FILE", help=".txt or .jsonl, also .xz (default: the help texts of Python)")
    long.add_argument("--seed", type=int, default=0, metavar="N", help="seed of names, numbers and places (default: %(default)s)")

    benchmark = _command(
        commands,
        "bench",
        "measure time and memory of generation, beside the unconverted model",
        "Measures reading a prompt, time per token, throughput, peak memory and cache at several levels, prompt lengths and batch sizes. "
        "The unconverted model, level 0, runs in the same call. Beside each number stands the floor by bytes and operations. MODEL may "
        "also be llama2-7b, llama3-8b or qwen3-1.7b: that shape with random weights, nothing is downloaded. Without an adapter DSLA "
        "layers get fresh weights: speed does not depend on their values.",
        "dsla bench --model llama2-7b --lengths 2048,8192 --batches 1,16",
        "dsla bench --model BASE --adapter ADAPTER --levels 25%,8 --output RESULTS",
        "dsla bench --model llama3-8b --engines graph --lengths 8192 --largest-batch",
    )
    _checkpoint(benchmark, "original model, a hybrid, or the name of a shape", adapter_required=False)
    cases = benchmark.add_argument_group("measurement")
    cases.add_argument("--levels", type=_listed, metavar="L,L", help=f"beside level 0; each: {LEVEL} (default: 50%%,100%%)")
    cases.add_argument("--lengths", type=_numbers, metavar="N,N", help="tokens of the prompt (default: 2048; 128 on a CPU)")
    cases.add_argument("--batches", type=_numbers, metavar="N,N", help="rows (default: 1)")
    cases.add_argument(
        "--engines",
        type=_listed,
        metavar="E,E",
        help="eager; compiled: static cache, as transformers compiles it; graph: CUDA graphs (default: eager,graph; eager on a CPU)",
    )
    cases.add_argument("--new-tokens", type=_positive, default=64, metavar="N", help="tokens to generate (default: %(default)s)")
    cases.add_argument(
        "--prefill-tokens", type=_positive, default=16384, metavar="N", help="of all rows, read in one forward (default: %(default)s)"
    )
    cases.add_argument("--largest-batch", action="store_true", help="instead of --batches: search the largest batch that fits")
    cases.add_argument("--raises", action="store_true", help="measure also how long a raise from level 0 stalls a text")
    cases.add_argument("--output", default="bench-output", metavar="DIR", help="folder for bench.json and plot (default: %(default)s)")

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

    serve = _command(
        commands,
        "serve",
        "an OpenAI-compatible server whose level follows the load",
        "Serves /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics, and a live page at /, for a model, alone or with "
        "an adapter, or a hybrid. Needs the extra 'serve': pip install 'dsla-hf[serve]'.",
        "dsla serve BASE --adapter ADAPTER --max-level 50%",
        "dsla serve BASE --adapter ADAPTER --policy prompt-length --port 9000",
    )
    serve.add_argument("model", metavar="MODEL", help="original model, or a hybrid: a hub name or a folder")
    serve.add_argument("--adapter", metavar="A", help="DSLA adapter of that model")
    serve.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto", help="dtype of the weights")
    serve.add_argument("--name", metavar="N", help="what clients call the model (default: the last part of MODEL)")
    level = serve.add_argument_group("level")
    level.add_argument(
        "--policy",
        default="load",
        metavar="P",
        help="load, prompt-length, text-length, or a level such as 8 or 50%% (default: %(default)s)",
    )
    level.add_argument("--max-level", metavar="L", help="the level goes no higher: a number, or a share such as 50%% (default: the plan)")
    level.add_argument("--queue-depth", type=_positive, metavar="N", help="load: waiting requests that raise it (default: 50)")
    level.add_argument("--waiting-tokens", type=_positive, metavar="N", help="load: unread prompt tokens that raise it (default: none)")
    level.add_argument("--first-token-target", type=float, metavar="S", help="load: seconds to the first token that raise it")
    level.add_argument("--token-target", type=float, metavar="S", help="load: seconds per token that raise it")
    level.add_argument("--cool-down", type=float, metavar="S", help="load: seconds between two changes (default: 5)")
    level.add_argument("--step", type=_positive, metavar="N", help="load: layers of a change (default: an eighth of the model's)")
    sizes = serve.add_argument_group("sizes and limits")
    sizes.add_argument("--slots", type=_positive, default=32, metavar="N", help="texts that run at a time (default: %(default)s)")
    sizes.add_argument("--max-waiting", type=_positive, default=256, metavar="N", help="requests that may wait (default: %(default)s)")
    sizes.add_argument("--max-tokens", type=_positive, metavar="N", help="longest text, prompt included (default: the model's)")
    sizes.add_argument("--max-new-tokens", type=_positive, default=4096, metavar="N", help="most to generate (default: %(default)s)")
    sizes.add_argument(
        "--chunk", type=_positive, default=1024, metavar="N", help="prompt tokens read between two tokens (default: %(default)s)"
    )
    sizes.add_argument("--kv-gib", type=float, metavar="X", help="GiB for keys and values (default: what a GPU has free; 0.5 on a CPU)")
    sizes.add_argument(
        "--prompt-share",
        type=float,
        default=0.4,
        metavar="X",
        help="of the time, at most, that prompts may take from texts that are generated (default: %(default)s)",
    )
    sizes.add_argument(
        "--no-graphs",
        dest="graphs",
        action="store_false",
        help="on a GPU, replay no CUDA graphs: the server starts faster and runs slower",
    )
    network = serve.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    network.add_argument("--port", type=_positive, default=8000, help="(default: %(default)s)")
    network.add_argument("--api-key", metavar="KEY", help="that clients must give (default: $DSLA_API_KEY, else none)")
    network.add_argument(
        "--drain-seconds", type=float, default=30.0, metavar="S", help="for running requests at the end (default: %(default)s)"
    )

    replay = _command(
        commands,
        "replay",
        "send the requests of a trace to a server, and measure",
        "Replays a trace with the columns TIMESTAMP, ContextTokens and GeneratedTokens, as the Azure LLM inference traces have them, "
        "against any OpenAI-compatible address: latency, time to the first token and per token (mean, P50, P95, P99), share of requests "
        "within the objectives, throughput, level over time. Prompts are random token ids. Writes JSON, and plots with the extra 'plot'.",
        "dsla replay trace.csv --url http://127.0.0.1:8000 --out RESULTS",
        "dsla replay trace.csv --url http://127.0.0.1:8000 --out RESULTS --rate 2 --mix paper --requests 500",
    )
    replay.add_argument("trace", metavar="TRACE.csv", help="the trace")
    replay.add_argument("--url", required=True, help="address of the server, without /v1")
    replay.add_argument("--out", required=True, metavar="DIR", help="folder for replay.json and plots")
    replay.add_argument("--model", metavar="M", help="what the server calls its model (default: its first one)")
    replay.add_argument("--api-key", metavar="KEY", help="of the server (default: $DSLA_API_KEY, else none)")
    requests = replay.add_argument_group("requests")
    requests.add_argument("--requests", type=_positive, metavar="N", help="the first N of the trace (default: all)")
    requests.add_argument("--rate", type=float, default=1.0, metavar="X", help="speed of arrival; 2: twice as fast (default: %(default)s)")
    requests.add_argument("--length", type=float, default=1.0, metavar="X", help="factor of all lengths (default: %(default)s)")
    requests.add_argument(
        "--mix", choices=("trace", "paper"), default="trace", help="lengths as they are, or drawn to the DSLA paper's mix"
    )
    requests.add_argument("--max-length", type=_positive, metavar="N", help="cut prompts so that text and answer fit into so many tokens")
    requests.add_argument(
        "--vocab", type=_positive, default=1000, metavar="N", help="prompts are drawn from so many ids (default: %(default)s)"
    )
    requests.add_argument("--no-forced-lengths", action="store_false", dest="forced_lengths", help="let texts end before their length")
    requests.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts and mix (default: %(default)s)")
    objectives = replay.add_argument_group("objectives")
    objectives.add_argument("--slo-first", type=float, default=2.0, metavar="S", help="seconds to the first token (default: %(default)s)")
    objectives.add_argument("--slo-token", type=float, default=0.1, metavar="S", help="seconds per token (default: %(default)s)")

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


def _numbers(text: str) -> list[int]:
    return [_positive(part) for part in _listed(text)]


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
