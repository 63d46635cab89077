"""What `dsla replay` does: send a trace to a server as it came, and say how the server kept up."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
import os
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import httpx
import numpy

from ...core.files import write_json
from ...core.plots import figure, mark_plain, save
from .trace import TracedRequest, drawn_to_mix, read_trace, scaled

LOOK_SECONDS = 1.0  # how often the level is looked up
PERCENTILES = (50, 95, 99)
MOST_REASONS = 3  # of requests that failed, the commonest
TIMES = {"latency": "s", "first_token": "s", "per_token": "s", "latency_per_token": "s"}


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay, where, and what to hold against it; see `dsla replay --help`.

    timeout: seconds after which a request that has not been answered is given up, and failed. token_times: note of every piece of an answer
    when it came, which asks the server for usage with each.
    """

    trace: str
    url: str
    out: str
    model: str | None = None
    api_key: str | None = None
    requests: int | None = None
    rate: float = 1.0
    length: float = 1.0
    mix: str = "trace"
    max_length: int | None = None
    vocab: int = 1000
    forced_lengths: bool = True
    seed: int = 0
    temperature: float = 1.0
    top_p: float | None = None
    top_k: int | None = None
    slo_first: float = 2.0
    slo_token: float = 0.1
    timeout: float | None = None
    token_times: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            raise ValueError("top_p and top_k shape draws, and temperature 0 draws none: leave them out, or give a temperature")
        if self.mix not in ("trace", "paper"):
            raise ValueError(f"mix must be 'trace' or 'paper', got {self.mix!r}")
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"timeout must be a positive number of seconds, got {self.timeout}")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {self.url!r}")


@dataclass
class Outcome:
    """What became of a request. Times are seconds: `sent` from the start of the replay, the others from there.

    tokens: generated. error: why there is no whole answer. token_times: (seconds, tokens that had come by then) of each piece, where asked
        for.
    """

    sent: float
    prompt: int
    wanted: int
    tokens: int = 0
    first_token: float | None = None
    latency: float | None = None
    error: str | None = None
    token_times: list[tuple[float, int]] | None = None

    @property
    def per_token(self) -> float | None:
        """Between two tokens, on average; None for fewer than two."""
        if self.latency is None or self.first_token is None or self.tokens < 2:
            return None
        return (self.latency - self.first_token) / (self.tokens - 1)

    @property
    def latency_per_token(self) -> float | None:
        return None if self.latency is None or not self.tokens else self.latency / self.tokens


def replay(options: ReplayOptions) -> dict[str, Any]:
    """Run it, print the table, write `replay.json` and the plots, and return what the file holds.

    Raises:
        ValueError: for a broken trace, or a server that has no model.
        OSError: if a file is missing, or the server does not answer.
    """
    trace = read_trace(options.trace, options.requests)
    if options.mix == "paper":
        trace = drawn_to_mix(trace, seed=options.seed)
    trace = scaled(trace, options.rate, options.length, options.max_length)
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    try:
        outcomes, looks = asyncio.run(_send_all(trace, options))
    except httpx.HTTPError as error:
        raise OSError(f"{options.url} does not answer as a server of this kind does: {error!r}") from None
    summary = summarize(outcomes, options.slo_first, options.slo_token)
    result = {
        "options": {name: value for name, value in asdict(options).items() if name != "api_key"},
        "summary": summary,
        "level_over_time": looks,
        "tokens_at_level": tokens_at_level(looks),
        "requests": [{**asdict(outcome), "per_token": outcome.per_token} for outcome in outcomes],
    }
    write_json(out / "replay.json", result, indent=1)
    print(table(summary))
    if importlib.util.find_spec("matplotlib") is not None:
        plot(outcomes, looks, out / "replay.png")
    print(f"written to {out}")
    return result


# --- sending ----------------------------------------------------------------------------------------------------


def server_of(url: str) -> str:
    """The address of a server, for which clients of OpenAI's interface have it with /v1."""
    return url.rstrip("/").removesuffix("/v1").rstrip("/")


async def _send_all(trace: list[TracedRequest], options: ReplayOptions) -> tuple[list[Outcome], list[dict[str, Any]]]:
    key = options.api_key or os.environ.get("DSLA_API_KEY")
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    # Requests go out when the trace says, however many are on their way.
    limits, timeout = httpx.Limits(max_connections=None), httpx.Timeout(None, connect=30)
    async with httpx.AsyncClient(base_url=server_of(options.url), headers=headers, limits=limits, timeout=timeout) as client:
        model = options.model or await _first_model(client)
        prompts = [_prompt(request, n, options) for n, request in enumerate(trace)]  # before the clock runs: drawing takes time
        start, looks = time.perf_counter(), list[dict[str, Any]]()
        looking = asyncio.create_task(_look_on(client, start, looks))
        sent = zip(range(len(trace)), trace, prompts, strict=True)
        outcomes = await asyncio.gather(*(_send(client, *one, model, start, options) for one in sent))
        looking.cancel()
        if looks and (last := await _look(client, start)) is not None:
            looks.append(last)
    return outcomes, looks


async def _first_model(client: httpx.AsyncClient) -> str:
    answer = await client.get("/v1/models")
    answer.raise_for_status()
    models = answer.json().get("data") or []
    if not models:
        raise ValueError(f"{client.base_url} lists no model: name one with --model")
    return models[0]["id"]


async def _look(client: httpx.AsyncClient, start: float) -> dict[str, Any] | None:
    """Level and queue of a server that tells them, None for others."""
    answer = await client.get("/status")
    if answer.status_code != 200:
        return None
    now = answer.json()
    names = ("level", "waiting", "running", "tokens_at_level")
    return {"at": time.perf_counter() - start, **{name: now.get(name) for name in names}}


async def _look_on(client: httpx.AsyncClient, start: float, looks: list[dict[str, Any]]) -> None:
    while (look := await _look(client, start)) is not None:
        looks.append(look)
        await asyncio.sleep(LOOK_SECONDS)


def _prompt(request: TracedRequest, number: int, options: ReplayOptions) -> list[int]:
    draws = random.Random(_seed(options, number))
    return [draws.randrange(options.vocab) for _ in range(request.prompt)]


def _seed(options: ReplayOptions, number: int) -> int:
    """Of a request's prompt and draws; one that OpenAI's interface takes."""
    return (options.seed * 1_000_003 + number) % 2**63


async def _send(
    client: httpx.AsyncClient, number: int, request: TracedRequest, prompt: list[int], model: str, start: float, options: ReplayOptions
) -> Outcome:
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": request.generated, "stream": True}
    body["temperature"] = options.temperature
    body["stream_options"] = {"include_usage": True, **({"continuous_usage_stats": True} if options.token_times else {})}
    if options.temperature:
        shaped = {"top_p": options.top_p, "top_k": options.top_k}  # top_k is an extension: other servers need not know it
        body |= {"seed": _seed(options, number), **{name: value for name, value in shaped.items() if value is not None}}
    if options.forced_lengths:
        body["ignore_eos"] = True
    await asyncio.sleep(max(start + request.at - time.perf_counter(), 0))
    sent = time.perf_counter()
    outcome = Outcome(sent - start, request.prompt, request.generated, token_times=[] if options.token_times else None)
    ended = False
    try:
        async with asyncio.timeout(options.timeout), client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                outcome.error = f"{answer.status_code}: {answer.text[:200]}"
                return outcome
            async for line in answer.aiter_lines():
                if not line.startswith("data:"):
                    continue
                data = line.removeprefix("data:").strip()
                if data == "[DONE]":
                    ended = True
                    break
                ended = _heard(outcome, json.loads(data), time.perf_counter() - sent) or ended
                if outcome.error is not None:
                    return outcome
    except TimeoutError:
        outcome.error = f"not answered within {options.timeout:g} s"
    except (httpx.HTTPError, ValueError) as error:
        outcome.error = repr(error)
    if not ended and outcome.error is None:
        outcome.error = "the stream broke off"
    if outcome.first_token is None and outcome.error is None:
        outcome.error = "no token came"
    return outcome


def _heard(outcome: Outcome, chunk: dict[str, Any], seconds: float) -> bool:
    """Take a chunk of a stream in; whether the text is at its end."""
    if "error" in chunk:
        outcome.error = str(chunk["error"].get("message") if isinstance(chunk["error"], dict) else chunk["error"])
        return True
    if counted := chunk.get("usage"):
        outcome.tokens = int(counted["completion_tokens"])
    if not chunk.get("choices"):
        return False
    finish = chunk["choices"][0].get("finish_reason")
    if finish is None or chunk["choices"][0].get("text"):
        outcome.tokens += 0 if counted else 1
        if outcome.first_token is None:
            outcome.first_token = seconds
        outcome.latency = seconds
        if outcome.token_times is not None:
            outcome.token_times.append((seconds, outcome.tokens))
    return finish is not None


# --- telling ----------------------------------------------------------------------------------------------------


def summarize(outcomes: list[Outcome], slo_first: float, slo_token: float) -> dict[str, Any]:
    """Means and percentiles of requests that were answered; objectives and throughput of all."""
    answered = [outcome for outcome in outcomes if outcome.error is None]
    seconds = max((outcome.sent + (outcome.latency or 0) for outcome in outcomes), default=0.0)
    summary: dict[str, Any] = {"requests": len(outcomes), "errors": len(outcomes) - len(answered), "seconds": seconds}
    summary["reasons"] = dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None).most_common(MOST_REASONS))
    for name in TIMES:
        values = [value for outcome in answered if (value := getattr(outcome, name)) is not None]
        if values:
            shares = numpy.percentile(values, PERCENTILES).tolist()  # linear interpolation
            summary[name] = {"mean": fmean(values), **{f"p{p}": value for p, value in zip(PERCENTILES, shares, strict=True)}}
    first = sum(outcome.first_token is not None and outcome.first_token <= slo_first for outcome in answered)
    token = sum((outcome.per_token or 0) <= slo_token for outcome in answered)
    both = sum(
        outcome.first_token is not None and outcome.first_token <= slo_first and (outcome.per_token or 0) <= slo_token
        for outcome in answered
    )
    count = max(len(outcomes), 1)
    summary["slo"] = {"first_token": first / count, "per_token": token / count, "both": both / count}
    if seconds:
        summary["requests_per_second"] = len(answered) / seconds
        summary["prompt_tokens_per_second"] = sum(outcome.prompt for outcome in answered) / seconds
        summary["generated_tokens_per_second"] = sum(outcome.tokens for outcome in answered) / seconds
    return summary


def tokens_at_level(looks: list[dict[str, Any]]) -> dict[str, int] | None:
    """Tokens generated during the replay, by level; None where the server does not tell."""
    counts = [look["tokens_at_level"] for look in looks if look["tokens_at_level"] is not None]
    if not counts:
        return None
    return {str(level): last - first for level, (first, last) in enumerate(zip(counts[0], counts[-1], strict=True)) if last > first}


def table(summary: dict[str, Any]) -> str:
    """The summary for a terminal."""
    lines = [f"{'':<22}{'mean':>10}" + "".join(f"{f'P{p}':>10}" for p in PERCENTILES)]
    names = {"latency": "latency", "first_token": "to first token", "per_token": "per token", "latency_per_token": "latency / tokens"}
    for name, what in names.items():
        if name in summary:
            lines.append(f"{what + ', ms':<22}" + "".join(f"{1000 * value:>10.1f}" for value in summary[name].values()))
    lines.append(f"{summary['requests']} requests in {summary['seconds']:.1f} s, {summary['errors']} errors")
    lines += [f"  {count} of them: {reason}" for reason, count in summary["reasons"].items()]
    slo = summary["slo"]
    lines.append(f"within objectives: first token {slo['first_token']:.1%}, per token {slo['per_token']:.1%}, both {slo['both']:.1%}")
    if "requests_per_second" in summary:
        lines.append(
            f"{summary['requests_per_second']:.2f} requests, {summary['prompt_tokens_per_second']:.0f} prompt tokens and "
            f"{summary['generated_tokens_per_second']:.0f} generated tokens a second"
        )
    return "\n".join(lines)


def plot(outcomes: list[Outcome], looks: list[dict[str, Any]], path: Path) -> None:
    """Times and level over the replay."""
    from matplotlib.ticker import MaxNLocator

    drawn, (times, each, level) = figure(3, 1, size=(8, 7), sharex=True)
    answered = [outcome for outcome in outcomes if outcome.error is None]
    times.plot([o.sent for o in answered], [o.first_token for o in answered], ".", ms=4)
    times.set(ylabel="to first token, s", ylim=(0, None))
    several = [(o.sent, 1000 * o.per_token) for o in answered if o.per_token is not None]
    each.plot([at for at, _ in several], [value for _, value in several], ".", ms=4)
    each.set(ylabel="per token, ms", ylim=(0, None))
    for name in ("level", "waiting", "running"):
        known = [(look["at"], look[name]) for look in looks if look[name] is not None]
        level.step([at for at, _ in known], [value for _, value in known], where="post", label=name)
    level.set(ylabel="layers, requests", xlabel="seconds", ylim=(0, None))
    if looks:
        level.legend()
    level.yaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (times, each, level):
        mark_plain(axes.yaxis)
        axes.grid(alpha=0.3)
    mark_plain(level.xaxis)
    save(drawn, path, dpi=120)
