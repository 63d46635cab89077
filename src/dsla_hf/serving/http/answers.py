"""The texts that a request gets: its choices in the engine, and what comes of them, a piece at a time."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import Request as HttpRequest

from ...inference.sampling import Constraint, Sampling
from ..engine.engine import Draining, Engine
from ..engine.request import Event, Request
from ..engine.text import TextStream
from .errors import as_failed
from .logprobs import Entry
from .metrics import Metrics

LISTEN_SECONDS = 0.25  # how often it is asked whether a waiting client is still there


class Mailbox:
    """Carries events from the engine's thread to the loop's: all that come until the loop has time for them are one call there."""

    def __init__(self) -> None:
        self._events: deque[tuple[asyncio.Queue[Any], Any]] = deque()
        self._called = False

    def put(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], item: Any) -> None:
        """To be called from the engine's thread."""
        self._events.append((queue, item))
        if not self._called:
            self._called = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before the first is taken: what comes from now on is called for again
        while self._events:
            queue, item = self._events.popleft()
            queue.put_nowait(item)


@dataclass(frozen=True)
class Piece:
    """What has come of a choice: text, log-probabilities of its tokens where they were asked for, and why it ends or None."""

    choice: Choice
    text: str
    entries: list[Entry]
    finish: str | None


@dataclass(eq=False)
class Choice:
    """One text: what is asked of the engine, and what has come.

    index: among the choices of its request. wanted: most tokens, 0 for none. constraint: of `Engine.submit`. echo: text that the answer
    begins with. offsets: where in it the prompt's tokens begin, empty where their log-probabilities were not asked for.
    counted: tokens that have come. error: of the engine, that ended it.
    """

    index: int
    prompt: list[int]
    wanted: int
    sampling: Sampling
    text: TextStream
    constraint: Constraint | None = None
    level: int | None = None
    echo: str = ""
    offsets: Sequence[int] = ()
    request: Request = field(init=False)
    counted: int = 0
    finish: str | None = None
    error: Exception | None = None
    _held: deque[Entry] = field(default_factory=deque)  # of tokens whose text has not come
    _length: int = 0  # of the text that has come, in characters
    _begun: bool = False

    def submit(self, engine: Engine, listener: Callable[[Event], None]) -> None:
        """Raises what `Engine.submit` raises."""
        sampling = self.sampling
        if self.wanted == 0 or (self.wanted == 1 and self.offsets):
            # The last token decides nothing here, but clients of log-probabilities count on there being one.
            sampling = replace(sampling, ignore_eos=True)
        more = {"constraint": self.constraint, "level": self.level, "stop_strings": bool(self.text.stop) or None}
        given: dict[str, Any] = {name: value for name, value in more.items() if value is not None}
        self.request = engine.submit(self.prompt, max(self.wanted, 1), listener, sampling, **given)

    def take(self, event: Event, engine: Engine) -> Piece:
        """What an event says.

        Raises:
            Failed: for an error in the engine.
        """
        if event.error is not None or event.finish == "cancelled":
            self.error = event.error if event.error is not None else Draining("the server is about to stop")
            raise as_failed(self.error)
        text, entries = self._opening(event)
        if event.finish is not None:
            text += self._noted(self.text.end())
            self.finish = "stop" if self.text.stopped or self._ended_by_token(engine) else event.finish
            engine.cancel(self.request, stopped=self.text.stopped)  # it has ended: now it is known how
        elif self.wanted > 0:
            assert event.token is not None
            self.counted += 1
            if event.logprob is not None and self.sampling.logprobs is not None:
                self._held.append(Entry(event.token, event.logprob, self._length + len(self.text.held)))
            text += self._noted(self.text.add(event.token))
            if self.text.stopped:
                engine.cancel(self.request, stopped=True)
                self.finish = "stop"
        if self.wanted == 0 and self.finish is not None:
            self.finish = "length"
        return Piece(self, text, entries + self._released(), self.finish)

    def _opening(self, event: Event) -> tuple[str, list[Entry]]:
        """With the first event: the prompt, where it is to be heard again."""
        if self._begun:
            return "", []
        self._begun, self._length = True, len(self.echo)
        if not self.offsets:
            return self.echo, []
        told = (None, *(event.prompt_logprobs or (None,) * (len(self.prompt) - 1)))
        return self.echo, [Entry(*entry) for entry in zip(self.prompt, told, self.offsets, strict=True)]

    def _noted(self, text: str) -> str:
        self._length += len(text)
        return text

    def _released(self) -> list[Entry]:
        """Entries of tokens whose text has come; at the end all, but for those of a stop string."""
        out = []
        while self._held and (self._held[0].offset < self._length or (self.finish is not None and not self.text.stopped)):
            out.append(self._held.popleft())
        return out

    def _ended_by_token(self, engine: Engine) -> bool:
        """Whether the last token ends a text, where it came as any other."""
        return not self.sampling.ignore_eos and bool(self.request.tokens) and self.request.tokens[-1] in engine.eos_tokens


class Answers:
    """The choices of a request while they are generated.

    Raises (at the beginning):
        What `Engine.submit` raises; choices that had been taken are cancelled then.
    """

    def __init__(self, engine: Engine, mailbox: Mailbox, metrics: Metrics, choices: Iterable[Choice]):
        self.engine, self.metrics = engine, metrics
        self.choices: list[Choice] = []
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[tuple[Choice, Event]]()

        def listener(choice: Choice) -> Callable[[Event], None]:
            return lambda event: mailbox.put(loop, self._events, (choice, event))

        try:
            for choice in choices:
                choice.submit(engine, listener(choice))
                self.choices.append(choice)
        except BaseException:
            self.cancel()
            raise
        self._first: tuple[Choice, Event] | None = None

    async def begin(self) -> bool:
        """Wait for the first event; whether it is no error."""
        self._first = await self._events.get()
        return self._first[1].error is None and self._first[1].finish != "cancelled"

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """What comes, of all choices, until each has ended.

        Raises:
            Failed: for an error in the engine.
        """
        running = len(self.choices)
        while running:
            choice, event = await self._events.get() if self._first is None else self._first
            self._first = None
            if choice.finish is not None:  # it was cancelled at a stop string
                continue
            piece = choice.take(event, self.engine)
            if piece.finish is not None:
                running -= 1
                self.metrics.ended(choice.request)
            yield piece  # also without text: clients measure by what comes

    def usage(self) -> dict[str, Any]:
        """Tokens so far; a prompt counts once, however many choices it has."""
        prompts = {id(choice.prompt): len(choice.prompt) for choice in self.choices}
        prompt, completion = sum(prompts.values()), sum(choice.counted for choice in self.choices)
        # Of the first choice of each prompt: the others find what it has left.
        reused = {id(choice.prompt): choice.request.reused for choice in reversed(self.choices)}
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(reused.values())},
        }

    def cancel(self) -> None:
        for choice in self.choices:
            self.engine.cancel(choice.request)

    async def cancel_when_left(self, http: HttpRequest) -> None:
        """Cancel as soon as the client has gone."""
        while not await http.is_disconnected():
            await asyncio.sleep(LISTEN_SECONDS)
        self.cancel()
