"""What many replicas of the server need, on paper: arithmetic from what one was measured to do, and a hash ring counted out.

    python eval/replicas_plan.py --page     # fills docs/replicas.md
    python eval/replicas_plan.py --replicas 10

Nothing is run. Rates and times are those of one replica (eval/results/replay.json, inference.json); `--storage` and `--utilisation` are
assumed, and marked so in the table.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from bisect import bisect_right
from hashlib import blake2b
from pathlib import Path
from statistics import fmean
from typing import Any

from reporting import RESULTS, fill_page
from serving_page import best_rate
from step_costs import StepCosts

from dsla_hf.core.tables import markdown_table
from dsla_hf.inference.bench.models import PRESETS

PAGE = Path(__file__).parent.parent / "docs" / "replicas.md"
VIRTUAL_NODES = 100  # of a replica on Ray's ring, its default
SESSIONS = 100_000  # that are counted out


def owners(replicas: list[int], sessions: int) -> list[int]:
    """The replica of each session on a ring of `VIRTUAL_NODES` places for each replica."""

    def place(name: str) -> int:
        return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "little")

    ring = sorted((place(f"replica {replica}:{node}"), replica) for replica in replicas for node in range(VIRTUAL_NODES))
    places = [at for at, _ in ring]
    return [ring[bisect_right(places, place(f"session {number}")) % len(ring)][1] for number in range(sessions)]


def busiest(held: list[int], replicas: int) -> float:
    """Sessions of the replica with most of them, over the mean."""
    counts = [0] * replicas
    for replica in held:
        counts[replica] += 1
    return max(counts) / fmean(counts)


def busiest_of_two(replicas: int, requests: int, seed: int = 0) -> float:
    """The same of requests under way where each goes to the replica with fewer, of two drawn at random, as Ray routes without sessions."""
    draws, counts = random.Random(seed), [0] * replicas
    for _ in range(requests):
        one, other = draws.sample(range(replicas), 2)
        counts[min(one, other, key=counts.__getitem__)] += 1
    return max(counts) / fmean(counts)


def weight_bytes(shape: str) -> int:
    """Of the base, in bf16."""
    sizes = PRESETS[shape]
    hidden, head_dim = sizes["hidden_size"], sizes["hidden_size"] // sizes["num_attention_heads"]
    layer = hidden * (2 * hidden + 2 * sizes["num_key_value_heads"] * head_dim + 3 * sizes["intermediate_size"])
    return 2 * (sizes["num_hidden_layers"] * layer + 2 * sizes["vocab_size"] * hidden)


def plan(options: argparse.Namespace) -> list[tuple[str, str]]:
    """(what, value) of each line.

    Raises:
        ValueError: if nothing was measured of this shape and mix.
    """
    rows = json.loads(options.replay.read_text())["rows"]
    rows = [row for row in rows if (row["shape"], row["mix"]) == (options.shape, options.mix) and row["rate"] is not None]
    count, share = options.replicas, options.utilisation
    rates = {policy: best_rate(rows, policy) for policy in ("fixed", "load")}
    if None in rates.values():
        raise ValueError(f"{options.replay.name} has no rate within the objectives for {options.shape}, {options.mix}: measure it")
    best = next(row for row in rows if row["policy"] == "load" and row["rate"] == rates["load"] and row["cut"] is None)
    tokens, prompt = best["generated_tokens_per_second"], best["prompt_tokens"]
    costs = StepCosts.read(options.shape, options.inference, options.raises)
    held, grown = owners(list(range(count)), SESSIONS), owners(list(range(count + 1)), SESSIONS)
    moved = sum(before != after for before, after in zip(held, grown, strict=True)) / SESSIONS
    ring = busiest(held, count)
    weights = weight_bytes(options.shape)
    again = costs.piece(32, 0, int(prompt))
    running = rates["load"] * best["latency"]["mean"]
    now = int(count * running)
    return [
        ("one replica, highest rate within the objectives: level 0", f"{rates['fixed']:g} requests/s (measured)"),
        ("one replica, highest rate within the objectives: level by load", f"{rates['load']:g} requests/s (measured)"),
        (f"{count} replicas, if all were equally busy: level 0", f"{count * rates['fixed']:,.0f} requests/s"),
        (f"{count} replicas, if all were equally busy: level by load", f"{count * rates['load']:,.0f} requests/s"),
        (f"requests of the busiest over the mean: by session, ring of {VIRTUAL_NODES} places each", f"{ring:.2f} (counted out)"),
        ("so by session, level by load", f"{count * rates['load'] / ring:,.0f} requests/s"),
        (f"with {share:.0%} of that as a mean over a day (assumed)", f"{share * count * rates['load'] / ring:,.0f} requests/s"),
        ("GPUs for the same rate at level 0, if all were equally busy", f"{math.ceil(count * rates['load'] / ring / rates['fixed'])}"),
        ("answers under way at once (rate times latency)", f"{now:,}"),
        ("of these at the busiest, over the mean: by the shorter of two queues", f"{busiest_of_two(count, now):.2f} (counted out)"),
        ("of these at the busiest, over the mean: by session", f"{busiest(held[:now], count):.2f} (counted out)"),
        ("pieces of answers through all proxies", f"{count * tokens:,.0f} a second"),
        ("weights to be read when all start", f"{count * weights / 1e12:.2f} TB"),
        (f"time of that from storage at {options.storage:g} GB/s in all (assumed)", f"{count * weights / 1e9 / options.storage:,.0f} s"),
        ("sessions that move when a replica is added", f"{moved:.1%} (counted out)"),
        (f"time to read one of them again ({prompt:,.0f} tokens, level 32)", f"{1e3 * again:.0f} ms"),
        ("GPU time of moving, with one prefix each of as many sessions as answers under way", f"{moved * count * running * again:.1f} s"),
    ]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--replicas", type=int, default=100)
    parser.add_argument("--shape", choices=tuple(PRESETS), default="llama2-7b")
    parser.add_argument("--mix", default="paper")
    parser.add_argument("--storage", type=float, default=10.0, help="GB/s that storage gives to all together (assumed)")
    parser.add_argument("--utilisation", type=float, default=0.6, help="of the highest rate, as a mean over a day (assumed)")
    parser.add_argument("--replay", type=Path, default=RESULTS / "replay.json")
    parser.add_argument("--inference", type=Path, default=RESULTS / "inference.json")
    parser.add_argument("--raises", type=Path, default=RESULTS / "raises.json")
    parser.add_argument("--page", action="store_true", help="fill docs/replicas.md")
    options = parser.parse_args(arguments)
    if options.replicas < 2:
        parser.error(f"--replicas must be 2 or more, got {options.replicas}")
    if not (options.storage > 0 and 0 < options.utilisation <= 1):
        parser.error(f"--storage must be above 0 and --utilisation a share, got {options.storage} and {options.utilisation}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    lines: list[Any] = plan(options)
    text = markdown_table(["what", "value"], lines)
    if options.page:
        fill_page(PAGE, {"replicas": text})
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
