"""Traces of requests: read, shortened, sped up, and drawn to another mix of lengths."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
# The DSLA paper's mix (arXiv 2506.09316): prompts from, below, share of requests.
PAPER_MIX = ((1, 2048, 0.6468), (2048, 4096, 0.1616), (4096, 8192, 0.1603), (8192, 16384, 0.0313))


@dataclass(frozen=True)
class TracedRequest:
    """A request `at` seconds after the first, of `prompt` tokens, to generate `generated`."""

    at: float
    prompt: int
    generated: int


def read_trace(path: str | Path, limit: int | None = None) -> list[TracedRequest]:
    """The first requests of a CSV file with the columns of the Azure LLM inference traces, in order of time.

    Raises:
        ValueError: if columns are missing, or a line cannot be read.
        OSError: if there is no such file.
    """
    found: list[tuple[datetime, int, int]] = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [name for name in COLUMNS if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"{path} has no column {missing}: a trace has {list(COLUMNS)}")
        for line, row in enumerate(reader, 2):
            try:
                # Seven digits of a second are one more than Python reads.
                when = datetime.fromisoformat(row["TIMESTAMP"].strip()[:26])
                prompt, generated = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{path}, line {line}: {error}") from None
            if prompt < 0 or generated < 0:
                raise ValueError(f"{path}, line {line}: numbers of tokens must be 0 or more, got {prompt} and {generated}")
            found.append((when, max(prompt, 1), max(generated, 1)))
            if limit is not None and len(found) == limit:
                break
    if not found:
        raise ValueError(f"{path} holds no requests")
    found.sort(key=lambda entry: entry[0])
    return [TracedRequest((when - found[0][0]).total_seconds(), prompt, generated) for when, prompt, generated in found]


def drawn_to_mix(trace: list[TracedRequest], mix: tuple[tuple[int, int, float], ...] = PAPER_MIX, seed: int = 0) -> list[TracedRequest]:
    """The trace with prompt lengths redrawn, bucket by bucket: arrival times stay, shares of buckets are those of `mix`.

    A request of a bucket is one of the trace in it (prompt and answer together). Where the trace has none, its prompt is drawn
    log-uniformly from the bucket, its answer from the whole trace.

    Raises:
        ValueError: if the shares do not add up to 1.
    """
    total = sum(share for *_, share in mix)
    if abs(total - 1) > 1e-3:
        raise ValueError(f"the shares of the mix must add up to 1, got {total}")
    numbers = random.Random(seed)
    buckets = _counted(len(trace), [share / total for *_, share in mix])
    numbers.shuffle(buckets)
    donors = [[request for request in trace if low <= request.prompt < high] for low, high, _ in mix]
    redrawn = []
    for request, bucket in zip(trace, buckets, strict=True):
        if donors[bucket]:
            donor = numbers.choice(donors[bucket])
            redrawn.append(replace(donor, at=request.at))
        else:
            low, high, _ = mix[bucket]
            prompt = min(int(low * (high / low) ** numbers.random()), high - 1)
            redrawn.append(TracedRequest(request.at, prompt, numbers.choice(trace).generated))
    return redrawn


def scaled(trace: list[TracedRequest], rate: float = 1.0, length: float = 1.0, max_length: int | None = None) -> list[TracedRequest]:
    """The trace `rate` times as fast, lengths times `length`, prompts cut so that prompt and answer fit into `max_length` tokens.

    Raises:
        ValueError: if a factor is not positive.
    """
    for name, factor in (("rate", rate), ("length", length)):
        if not 0 < factor < float("inf"):
            raise ValueError(f"{name} must be a positive number, got {factor}")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be 2 or more tokens, got {max_length}")
    changed = []
    for request in trace:
        prompt, generated = (max(round(tokens * length), 1) for tokens in (request.prompt, request.generated))
        if max_length is not None:
            generated = min(generated, max_length - 1)
            prompt = min(prompt, max_length - generated)
        changed.append(TracedRequest(request.at / rate, prompt, generated))
    return changed


def _counted(count: int, shares: list[float]) -> list[int]:
    """`count` bucket numbers in these shares, by largest remainder."""
    exact = [count * share for share in shares]
    counts = [int(number) for number in exact]
    rest = sorted(range(len(shares)), key=lambda i: counts[i] - exact[i])
    for i in rest[: count - sum(counts)]:
        counts[i] += 1
    return [i for i, number in enumerate(counts) for _ in range(number)]
