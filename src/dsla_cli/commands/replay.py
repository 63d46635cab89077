"""`dsla replay`."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import add_command, positive
from .serve import check_installed

GOES_ON = False


def add_to(commands: Any, name: str) -> None:
    parser = add_command(
        commands,
        name,
        "send the requests of a trace to a server, and measure",
        "Replays a trace with the columns TIMESTAMP, ContextTokens and GeneratedTokens, as the Azure LLM inference traces have them, "
        "against any OpenAI-compatible address: latency, time to the first token and per token (mean, P50, P95, P99), share of requests "
        "within the objectives, throughput, level over time. Prompts are random token ids. Writes JSON, and plots with the extra 'plot'.",
        "dsla replay trace.csv --url http://127.0.0.1:8000 --out RESULTS",
        "dsla replay trace.csv --url http://127.0.0.1:8000 --out RESULTS --rate 2 --mix paper --requests 500",
    )
    parser.add_argument("trace", metavar="TRACE.csv", help="the trace")
    parser.add_argument("--url", required=True, help="address of the server, with or without /v1")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for replay.json and plots")
    parser.add_argument("--model", metavar="M", help="what the server calls its model (default: its first one)")
    parser.add_argument("--api-key", metavar="KEY", help="of the server (default: $DSLA_API_KEY, else none)")
    requests = parser.add_argument_group("requests")
    requests.add_argument("--requests", type=positive, metavar="N", help="the first N of the trace (default: all)")
    requests.add_argument("--rate", type=float, default=1.0, metavar="X", help="speed of arrival; 2: twice as fast (default: %(default)s)")
    requests.add_argument("--length", type=float, default=1.0, metavar="X", help="factor of all lengths (default: %(default)s)")
    requests.add_argument(
        "--mix", choices=("trace", "paper"), default="trace", help="lengths as they are, or drawn to the DSLA paper's mix"
    )
    requests.add_argument("--max-length", type=positive, metavar="N", help="cut prompts so that text and answer fit into so many tokens")
    requests.add_argument(
        "--vocab", type=positive, default=1000, metavar="N", help="prompts are drawn from so many ids (default: %(default)s)"
    )
    requests.add_argument("--no-forced-lengths", action="store_false", dest="forced_lengths", help="let texts end before their length")
    requests.add_argument("--seed", type=int, default=0, metavar="N", help="of prompts, mix and draws (default: %(default)s)")
    requests.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="tokens are drawn at this; 0: the likeliest (default: %(default)s)"
    )
    requests.add_argument("--top-p", type=float, metavar="P", help="draw among the likeliest tokens of this total (default: all)")
    requests.add_argument("--top-k", type=positive, metavar="N", help="draw among so many of the likeliest tokens (default: all)")
    objectives = parser.add_argument_group("objectives")
    objectives.add_argument("--slo-first", type=float, default=2.0, metavar="S", help="seconds to the first token (default: %(default)s)")
    objectives.add_argument("--slo-token", type=float, default=0.1, metavar="S", help="seconds per token (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    check_installed("httpx")
    from dsla_hf.serving.replay.client import ReplayOptions, replay

    replay(ReplayOptions(**{name: value for name, value in vars(args).items() if name != "command"}))


def kept(args: argparse.Namespace) -> str:
    return "the figures of a replay are of all its requests, so none were written"
