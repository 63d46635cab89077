"""One text being generated: what was asked, how far it is, and how its tokens reach whoever asked."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from ...inference.sampling import Constraint, Sampling
from .prefixes import History

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Logprob:
    """Of a token: its log-probability, and (token, log-probability) of the likeliest ones in its place."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """What a request's listener is told: a token, or the end. The last event has a `finish` ("stop", "length", "cancelled") or an
    `error`. logprob: of the token, where asked for. prompt_logprobs: with the first event, of the prompt's tokens but the first."""

    token: int | None = None
    finish: str | None = None
    error: Exception | None = None
    logprob: Logprob | None = None
    prompt_logprobs: tuple[Logprob, ...] | None = None


@dataclass(eq=False)
class Request:
    """A text in the engine; made by `Engine.submit`, changed by the engine alone.

    prompt: token ids. listener: called with each `Event`, from the engine's thread. constraint: what its tokens must follow.
    pinned: the level that it keeps, None: that of the engine. seed: of its draws.
    stop_strings: whether its listener looks for such, and so may find that the text ended with one.
    tokens: generated so far. cached: tokens in the cache. slot, level: of a running text. levels: (tokens of the text, level) at the
        start and after each change: with the same history `generate`, or `GraphDecoder` with the same seed, gives the same text.
        level_times: when it got each of them; the first one is when it came into its slot.
    scored: of the prompt, where its log-probabilities are asked for: of each piece that was read its end and what `tokens.scored` gave.
    prompt_logprobs: until they have been told. keys: hashes of the text's whole blocks, see `extend_keys`. history: the levels its cached
        tokens were read at. given: of these the first ones, that another text had read; reused: as many of the prompt.
        published: whole blocks that others may find. reads_alone: in calls that read no other prompt, for one that did has
        failed. Times are of the engine's clock.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling
    listener: Callable[[Event], None]
    arrived: float
    constraint: Constraint | None = None
    pinned: int | None = None
    stop_strings: bool = False
    number: int = field(default_factory=lambda: next(_numbers))
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    slot: int | None = None
    stopped: bool = False  # cancelled because its text is whole
    level: int = 0
    levels: list[tuple[int, int]] = field(default_factory=list)
    level_times: list[float] = field(default_factory=list)
    first_token: float | None = None
    last_token: float = 0.0
    finished: float | None = None
    cancelled: bool = False
    scored: list[tuple[int, Tensor]] = field(default_factory=list)
    prompt_logprobs: tuple[Logprob, ...] | None = None
    keys: list[bytes] = field(default_factory=list)
    history: History = ((0, 0),)
    given: int = 0
    reused: int = 0
    published: int = 0
    reads_alone: bool = False
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        seed = self.sampling.seed
        self.seed = secrets.randbits(64) - 2**63 if seed is None else seed

    @property
    def scores_prompt(self) -> bool:
        """Whether what is read now is to be scored."""
        return self.sampling.prompt_logprobs is not None and not self.tokens

    @property
    def text(self) -> list[int]:
        """All tokens, prompt first; not to be changed."""
        return self.prompt + self.tokens if self.tokens else self.prompt

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

    def reads_at(self, level: int) -> None:
        """From the next token on; what is cached was read as it was."""
        self.level = level
        self.history = (*self.history, (self.cached, level)) if self.cached else ((0, level),)

    def note_level(self, now: float) -> None:
        """From here on it has the level that it has now."""
        self.level_times.append(now)  # first: who looks on from another thread finds a time for each level
        self.levels.append((self.length, self.level))

    @property
    def decoding(self) -> bool:
        return bool(self.tokens) and len(self.prompt) + len(self.tokens) - self.cached == 1
