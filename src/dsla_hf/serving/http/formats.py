"""From choices to the body of an answer, whole or as server-sent events: what all routes share."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from starlette.responses import StreamingResponse

from .answers import Answers, Choice, Piece
from .errors import Failed
from .logprobs import Entry
from .schema import Options
from .token_bytes import TokenBytes

MANY = 1000  # log-probabilities
Result = TypeVar("Result")


def sent(content: dict[str, Any], event: str | None = None) -> str:
    """A server-sent event."""
    return ("" if event is None else f"event: {event}\n") + f"data: {json.dumps(content)}\n\n"


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}"


def as_json(content: dict[str, Any]) -> bytes:
    """A body. Half of a surrogate pair, which a model may write in the JSON of a call, has no encoding: it is escaped, as JSON can."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


async def aside(work: Callable[[], Result], entries: int) -> Result:
    """Do it, where there is much to write in a thread: log-probabilities of a long prompt would hold everybody up."""
    return await asyncio.to_thread(work) if entries > MANY else work()


@dataclass
class Gathered:
    """A choice that has ended."""

    choice: Choice
    text: str = ""
    entries: list[Entry] = field(default_factory=list)
    finish: str = "stop"


async def gather(answers: Answers) -> list[Gathered]:
    """All choices, when they have ended.

    Raises:
        Failed: for an error in the engine.
    """
    found = [Gathered(choice) for choice in answers.choices]
    async with aclosing(answers.pieces()) as pieces:
        async for piece in pieces:
            one = found[piece.choice.index]
            one.text += piece.text
            one.entries += piece.entries
            one.finish = piece.finish or one.finish
    return found


def levels_of(choice: Choice) -> list[list[int]]:
    """The history of a text's levels: (tokens of the text, level) at the start and after each change."""
    return [[tokens, level] for tokens, level in choice.request.levels]


def levels_told(choice: Choice) -> dict[str, list[list[int]]]:
    """What an answer tells of a text's levels: `levels`, and where its prompt was read at several `read_levels`, (token, level): from which
    token on it was read at which. With both the text is determined."""
    request = choice.request
    told = {"levels": levels_of(choice)}
    if any(0 < token < len(request.prompt) for token, _ in request.history):
        told["read_levels"] = [[token, level] for token, level in request.history]
    return told


class Format:
    """Of a route whose answers have choices."""

    kind, whole_object, chunk_object = "", "", ""
    prompt, limit, schema = "prompt", "max_tokens", "response_format"  # the fields that have them

    def __init__(self, model: str, body: Options, tokens: TokenBytes):
        self.body, self.tokens = body, tokens
        self.head = {"id": new_id(self.kind), "created": int(time.time()), "model": model}

    def openings(self, choice: Choice) -> Iterator[dict[str, Any]]:
        """What a streamed choice begins with."""
        yield from ()

    def choice(self, gathered: Gathered) -> dict[str, Any]:
        """A choice in one piece."""
        raise NotImplementedError

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """A piece of a streamed choice."""
        raise NotImplementedError

    async def whole(self, answers: Answers) -> bytes:
        """The answer in one piece."""
        found = await gather(answers)

        def written() -> bytes:
            choices = []
            for one in found:
                about = {"index": one.choice.index, "finish_reason": one.finish, **levels_told(one.choice)}
                choices.append({**about, **self.choice(one)})
            return as_json({**self.head, "object": self.whole_object, "choices": choices, "usage": answers.usage()})

        return await aside(written, sum(len(one.entries) for one in found))

    async def stream(self, answers: Answers) -> AsyncGenerator[str, None]:
        """Server-sent events."""
        options = self.body.stream_options
        told = options is not None and options.include_usage
        always = told and options is not None and options.continuous_usage_stats

        def chunk(choices: list[dict[str, Any]], usage: bool = always) -> str:
            about = {**self.head, "object": self.chunk_object, "choices": choices}
            return sent({**about, "usage": answers.usage() if usage else None} if told else about)

        try:
            for choice in answers.choices:
                for opening in self.openings(choice):
                    yield chunk([{"index": choice.index, "finish_reason": None, **opening}])
            async with aclosing(answers.pieces()) as pieces:
                async for piece in pieces:
                    about: dict[str, Any] = {"index": piece.choice.index, "finish_reason": piece.finish}
                    if piece.finish is not None:
                        about |= levels_told(piece.choice)
                    written = partial(self._written, chunk, piece, about)
                    for event in await aside(written, len(piece.entries)):
                        yield event
            if told:
                yield chunk([], True)
        except Failed as failed:  # the status has been sent: the error is the last event
            yield sent(failed.body)
        yield "data: [DONE]\n\n"

    def _written(self, chunk: Callable[[list[dict[str, Any]]], str], piece: Piece, about: dict[str, Any]) -> list[str]:
        return [chunk([{**about, **content}]) for content in self.chunks(piece)]


class CancellingStream(StreamingResponse):
    """A stream whose choices are cancelled when it ends early, however that comes about."""

    def __init__(self, answers: Answers, stream: AsyncGenerator[str, None]):
        self.answers, self.stream = answers, stream
        super().__init__(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answers.cancel()
            await self.stream.aclose()
