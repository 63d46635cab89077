"""One text being generated: what was asked, how far it is, and how its tokens reach whoever asked."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: 0 takes the likeliest token. top_p: draw among the likeliest tokens of this total. seed: of the draws, None for any.
    ignore_eos: go on to `max_tokens`, whatever comes.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


@dataclass(frozen=True)
class Event:
    """What a request's listener is told: a token, or the end. The last event has a `finish` ("stop", "length", "cancelled") or an
    `error`."""

    token: int | None = None
    finish: str | None = None
    error: Exception | None = None


@dataclass(eq=False)
class Request:
    """A text in the engine; made by `Engine.submit`, changed by the engine alone.

    prompt: token ids. listener: called with each `Event`, from the engine's thread.
    tokens: generated so far. cached: tokens in the cache. slot, level: of a running text. levels: (tokens of the text, level) at the
        start and after each change. Times are of the engine's clock.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    listener: Callable[[Event], None]
    arrived: float
    number: int = field(default_factory=lambda: next(_numbers))
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    slot: int | None = None
    level: int = 0
    levels: list[tuple[int, int]] = field(default_factory=list)
    first_token: float | None = None
    last_token: float = 0.0
    finished: float | None = None
    cancelled: bool = False
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.sampling.temperature > 0:
            self.generator = torch.Generator()
            if self.sampling.seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(self.sampling.seed)

    @property
    def text(self) -> list[int]:
        """All tokens, prompt first."""
        return self.prompt + self.tokens

    @property
    def length(self) -> int:
        """Tokens of the text so far."""
        return len(self.prompt) + len(self.tokens)

    @property
    def most_tokens(self) -> int:
        """Tokens that may come to be cached: the last one generated never is."""
        return len(self.prompt) + self.max_tokens - 1

    @property
    def unread(self) -> int:
        """Tokens to read before the next one can be generated; 1 while decoding."""
        return self.length - self.cached

    @property
    def decoding(self) -> bool:
        return bool(self.tokens) and len(self.prompt) + len(self.tokens) - self.cached == 1


def draw(logits: Tensor, request: Request) -> int:
    """The next token of a request from its logits `[V]`."""
    sampling = request.sampling
    if request.generator is None:
        return int(logits.argmax())
    # On the CPU, so that a seed means the same on every device and in any company.
    probabilities = (logits.float().cpu() / max(sampling.temperature, 1e-5)).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        beyond[0] = False  # the likeliest stays, however small top_p
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered.masked_fill(beyond, 0))
    return int(torch.multinomial(probabilities, 1, generator=request.generator))
