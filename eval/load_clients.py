"""The clients of eval/serving_load.py, in a process of their own: requests of every kind, and what came of each."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import httpx

# Shares of the requests. "pinned" are long prompts that keep a level.
KINDS = {"greedy": 0.3, "sampled": 0.2, "constrained": 0.2, "tools": 0.1, "logprobs": 0.1, "pinned": 0.1}
CANCELLED = 0.1  # of all kinds
CANCELLED_MARK = "~"  # with which prompts of requests begin that are cancelled
GREEDY = ("greedy", "pinned", "logprobs")
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["size", "count", "tags"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},  # else a random model writes space without end
}
TOOL = {"type": "function", "function": {"name": "order", "parameters": SCHEMA}}
WORDS = ["state", "layer", "window", "head", "level", "token", "text", "cache", "block", "fold", "gate", "mixer"]


@dataclass
class Outcome:
    """A request, and what came of it.

    left: the client went away in mid-stream. status: of HTTP; None where no answer came. error: what else went wrong.
    """

    number: int
    kind: str
    body: dict[str, Any]
    left: bool = False
    status: int | None = None
    error: str | None = None
    text: str = ""
    finish: str | None = None
    levels: list[list[int]] = field(default_factory=list)
    calls: dict[int, str] = field(default_factory=dict)  # arguments of calls of tools
    logprobs: dict[str, list[Any]] | None = None
    tokens: int | None = None
    seconds: float = 0.0


def shared_words(count: int, seed: int) -> str:
    """That prompts begin with in common."""
    return "".join(f"{word} " for word in random.Random(f"{seed} shared").choices(WORDS, k=count))


def request_of(
    number: int, draws: random.Random, levels: list[int], long_prompt: int, shared: str
) -> tuple[str, str, dict[str, Any], bool]:
    """Kind, route and body of a request, and whether it is cancelled."""
    (kind,) = draws.choices(list(KINDS), list(KINDS.values()))
    cancelled = draws.random() < CANCELLED
    prompt = f"{CANCELLED_MARK if cancelled else ''}{shared}{number} {' '.join(draws.choices(WORDS, k=2))}"
    body: dict[str, Any] = {"max_tokens": draws.randint(4, 40), "stream": cancelled or draws.random() < 0.5}
    if kind in GREEDY:
        body["temperature"] = 0
    else:
        body |= {"temperature": draws.choice([0.7, 1.0, 1.3]), "seed": draws.randrange(-(2**63), 2**63)}
        body |= draws.choice([{}, {"top_p": 0.9}, {"top_k": 20}])
    if kind == "pinned":
        prompt += " " + " ".join(draws.choices(WORDS, k=draws.randint(long_prompt // 8, long_prompt // 4)))
        body["level"] = draws.choice(levels)
    if kind == "logprobs":
        body["logprobs"] = 2
    if cancelled:
        body |= {"max_tokens": 200, "ignore_eos": True}
    if kind not in ("constrained", "tools"):
        return kind, "completions", {**body, "prompt": prompt}, cancelled
    body |= {"messages": [{"role": "user", "content": prompt}], "max_tokens": 120}
    if kind == "constrained":
        body["response_format"] = {"type": "json_schema", "json_schema": {"name": "order", "schema": SCHEMA}}
    else:
        body |= {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    return kind, "chat/completions", body, cancelled


def take(outcome: Outcome, answer: dict[str, Any]) -> None:
    """Add an answer, or a piece of it."""
    if "error" in answer:
        outcome.error = str(answer["error"].get("message"))
    for choice in answer.get("choices", ()):
        said = choice.get("message") or choice.get("delta") or {}
        outcome.text += choice.get("text") or said.get("content") or ""
        for number, call in enumerate(said.get("tool_calls") or ()):
            at = call.get("index", number)
            outcome.calls[at] = outcome.calls.get(at, "") + (call["function"].get("arguments") or "")
        if choice.get("logprobs"):
            whole = outcome.logprobs = outcome.logprobs or {"tokens": [], "token_logprobs": [], "top_logprobs": []}
            for name, column in whole.items():
                column += choice["logprobs"][name]
        outcome.finish = choice.get("finish_reason") or outcome.finish
        outcome.levels = choice.get("levels") or outcome.levels
    if answer.get("usage"):
        outcome.tokens = answer["usage"]["completion_tokens"]


async def ask(client: httpx.AsyncClient, route: str, outcome: Outcome, pieces: int) -> None:
    """Send a request, and hear its answer; pieces: after which a client leaves that does."""
    if not outcome.body["stream"]:
        answer = await client.post(route, json=outcome.body)
        outcome.status = answer.status_code
        take(outcome, answer.json())
        return
    async with client.stream("POST", route, json=outcome.body) as stream:
        outcome.status = stream.status_code
        if stream.status_code != 200:
            take(outcome, json.loads(await stream.aread()))
            return
        async for line in stream.aiter_lines():
            if line.startswith("data: {"):
                take(outcome, json.loads(line.removeprefix("data: ")))
                pieces -= 1
                if outcome.left and pieces <= 0:
                    return
        outcome.left = False  # its text was over before


async def _one_client(
    which: int, url: str, seconds: float, pause: float, seed: int, levels: list[int], long_prompt: int, shared: int
) -> list[Outcome]:
    draws, outcomes, end = random.Random(f"{seed} {which}"), list[Outcome](), time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=f"{url}/v1/", timeout=120) as client:
        while time.monotonic() < end:
            number = 100_000 * (which + 1) + len(outcomes)
            kind, route, body, left = request_of(number, draws, levels, long_prompt, shared_words(shared, seed))
            outcome = Outcome(number, kind, {"model": "load", **body}, left)
            outcomes.append(outcome)
            start = time.monotonic()
            try:
                await ask(client, route, outcome, draws.randint(2, 30))
            except (httpx.HTTPError, ValueError) as error:
                outcome.error = repr(error)
            outcome.seconds = time.monotonic() - start
            await asyncio.sleep(draws.expovariate(1 / pause) if pause else 0)
    return outcomes


def run_clients(
    url: str, clients: int, seconds: float, pause: float, seed: int, levels: list[int], long_prompt: int, shared: int
) -> list[dict[str, Any]]:
    """So many clients for so long, each with a pause of `pause` seconds on average between two requests: `Outcome`s as dicts.

    levels: that requests may be pinned to. long_prompt: characters of long prompts, about. shared: words that all prompts begin with.
    """

    async def run() -> list[list[Outcome]]:
        given = seconds, pause, seed, levels, long_prompt, shared
        return await asyncio.gather(*(_one_client(which, url, *given) for which in range(clients)))

    return [asdict(outcome) for one in asyncio.run(run()) for outcome in one]
