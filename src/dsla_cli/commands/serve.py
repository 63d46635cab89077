"""`dsla serve`."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
from typing import Any

from .. import preflight
from ..options import DTYPES, add_command, add_gguf_file, positive

GOES_ON = False


def add_to(commands: Any, name: str) -> None:
    parser = add_command(
        commands,
        name,
        "an OpenAI-compatible server whose level follows the load",
        "Serves /v1/completions, /v1/chat/completions, /v1/models, /health and /metrics, and a live page at /, for a model, alone or with "
        "an adapter, or a hybrid. Needs the extra 'serve': pip install 'dsla-hf[serve]'.",
        "dsla serve BASE --adapter ADAPTER --max-level 50%",
        "dsla serve BASE --adapter ADAPTER --policy prompt-length --port 9000",
    )
    parser.add_argument("model", metavar="MODEL", help="original model, or a hybrid: a hub name or a folder")
    parser.add_argument("--adapter", metavar="A", help="DSLA adapter of that model")
    add_gguf_file(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="dtype of the weights")
    parser.add_argument("--name", metavar="N", help="what clients call the model (default: the last part of MODEL)")
    level = parser.add_argument_group("level")
    level.add_argument(
        "--policy",
        default="load",
        metavar="P",
        help="load, prompt-length, text-length, or a level such as 8, 50%% or kept:10%% (default: %(default)s)",
    )
    level.add_argument(
        "--max-level",
        metavar="L",
        help="the level goes no higher: a number, a share such as 50%%, or kept:10%% of KV heads (default: the plan)",
    )
    level.add_argument("--queue-depth", type=positive, metavar="N", help="load: waiting requests that raise it (default: 50)")
    level.add_argument("--waiting-tokens", type=positive, metavar="N", help="load: unread prompt tokens that raise it (default: none)")
    level.add_argument("--first-token-target", type=float, metavar="S", help="load: seconds to the first token that raise it")
    level.add_argument("--token-target", type=float, metavar="S", help="load: seconds per token that raise it")
    level.add_argument("--cool-down", type=float, metavar="S", help="load: seconds between two changes (default: 5)")
    level.add_argument("--step", metavar="N", help="load: layers or KV heads of a change, or a share such as 25%% (default: an eighth)")
    sizes = parser.add_argument_group("sizes and limits")
    sizes.add_argument("--slots", type=positive, default=32, metavar="N", help="texts that run at a time (default: %(default)s)")
    sizes.add_argument("--max-waiting", type=positive, default=256, metavar="N", help="requests that may wait (default: %(default)s)")
    sizes.add_argument("--max-tokens", type=positive, metavar="N", help="longest text, prompt included (default: the model's)")
    sizes.add_argument("--max-new-tokens", type=positive, default=4096, metavar="N", help="most to generate (default: %(default)s)")
    sizes.add_argument(
        "--chunk", type=positive, default=1024, metavar="N", help="prompt tokens read between two tokens (default: %(default)s)"
    )
    sizes.add_argument("--kv-gib", type=float, metavar="X", help="GiB for keys and values (default: what a GPU has free; 0.5 on a CPU)")
    sizes.add_argument(
        "--kv-cache-dtype",
        choices=("auto", "fp8"),
        default="auto",
        help="of keys and values of heads that are softmax attention; fp8 (e4m3) holds twice the tokens (default: auto, the model's)",
    )
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
    sizes.add_argument(
        "--batch-invariant",
        action="store_true",
        help="each text is equal to the bit in any company; every step then costs what one with all slots taken costs",
    )
    sizes.add_argument(
        "--no-prefix-reuse",
        dest="prefix_reuse",
        action="store_false",
        help="read every prompt whole, also where another text began with the same tokens",
    )
    sizes.add_argument(
        "--snapshot-gib",
        type=float,
        metavar="X",
        help="GiB for snapshots of states, from which texts above level 0 go on that begin alike; 0: none (default: an eighth of --kv-gib)",
    )
    sizes.add_argument(
        "--lower-prefixes",
        action="store_true",
        help="texts may begin with what was read at lower levels, raised as running texts are; else only with what was read at their own",
    )
    sizes.add_argument(
        "--step-timeout",
        type=float,
        default=120.0,
        metavar="S",
        help="seconds after which a step that has not ended makes /health answer 503; 0: never (default: %(default)s)",
    )
    sizes.add_argument(
        "--tensor-parallel",
        type=positive,
        metavar="N",
        help="cut the model over N processes of this machine, each with a GPU if there are any (default: one, or those of torchrun)",
    )
    drafts = parser.add_argument_group("drafts", "of texts that stay what they are, while few of them run")
    which = drafts.add_mutually_exclusive_group()
    which.add_argument(
        "--draft-level",
        metavar="L",
        help="guess tokens at this level, above that of the texts: a number or a share such as 100%% (default: none)",
    )
    which.add_argument("--draft-lookup", action="store_true", help="guess what followed the same tokens before")
    drafts.add_argument("--draft-tokens", type=positive, metavar="K", help="guesses in a call (default: as many as pay)")
    drafts.add_argument(
        "--draft-rows", type=positive, default=4, metavar="N", help="texts that may run while tokens are guessed (default: %(default)s)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="check model, memory and settings, generate a token, say what would be served, and end"
    )
    network = parser.add_argument_group("network")
    network.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine only)")
    network.add_argument("--port", type=positive, default=8000, help="(default: %(default)s)")
    network.add_argument("--api-key", metavar="KEY", help="that clients must give (default: $DSLA_API_KEY, else none)")
    network.add_argument(
        "--allow-origin",
        dest="allow_origins",
        action="append",
        default=[],
        metavar="URL",
        help="a web page that may call the server, such as https://example.org, or * for all; may be repeated",
    )
    network.add_argument(
        "--tool-format",
        choices=("auto", "none", "hermes", "llama3", "mistral"),
        default="auto",
        help="how the model writes calls of tools; auto: what its chat template speaks of, none: it may not (default: %(default)s)",
    )
    network.add_argument(
        "--drain-seconds", type=float, default=30.0, metavar="S", help="for running requests at the end (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    model = preflight.checked(args)
    check_installed("fastapi", "uvicorn", "prometheus_client")
    from dsla_hf.serving.command import ServeOptions, dry_run, serve

    # The key also from the environment: a command line can be read by every user of a machine.
    if args.api_key is None:  # an empty one is refused: who gives it wants a key
        args.api_key = os.environ.get("DSLA_API_KEY")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("dsla_hf").setLevel(logging.INFO)
    others = ("command", "host", "port", "model", "gguf_file", "dry_run")
    options = {name: value for name, value in vars(args).items() if name not in others}
    (dry_run if args.dry_run else serve)(ServeOptions(model=model, **options), args.host, args.port)


def kept(args: argparse.Namespace) -> str:
    return "the server had not started yet"


def check_installed(*packages: str) -> None:
    """Raises ImportError, with what to install, where one of these packages is missing."""
    if missing := [package for package in packages if importlib.util.find_spec(package) is None]:
        raise ImportError(f"this needs {', '.join(missing)}: pip install 'dsla-hf[serve]'")
