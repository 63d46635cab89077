"""From the text of a request to token ids, by work that is bounded before it is done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import cached_property, partial
from typing import Any, TypeVar

from fastapi import Request as HttpRequest

from ..engine.engine import Engine
from ..engine.scheduler import QueueFull
from .errors import Failed, client_has_left, too_long

PIECE = 16_384  # characters between two looks at whether anybody waits for the answer, and at how many tokens there are
SLACK = 16  # tokens that a cut between two pieces may add

Result = TypeVar("Result")


class PromptReader:
    """Tokenises in a thread of its own, a piece of a text at a time, so that a long text holds nobody up: pieces of several texts take
    turns. What cannot fit is refused before it is read, or as soon as its tokens are too many. Who waits here waits for the engine, too.

    Raises (in its methods):
        Failed: for a text that is too long, cannot be tokenised or rendered, and when its client has left.
        QueueFull: if too many wait.
    """

    def __init__(self, engine: Engine, tokenizer: Any):
        self.engine, self.tokenizer = engine, tokenizer
        self.waiting = 0
        self._thread = ThreadPoolExecutor(1, "tokenize")  # one: tokenizers may not be shared between threads

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    @cached_property
    def most_characters(self) -> int:
        """That the longest text has: each of its tokens the longest of the vocabulary."""
        return self.engine.max_tokens * max(map(len, self.tokenizer.get_vocab()))

    async def completion(self, prompt: str, http: HttpRequest, special: bool = True) -> list[int]:
        """Of a text; special: with the tokens that the tokenizer puts around it."""
        async with self._place():
            return await self._ids(prompt, http, special)

    async def text(self, tokens: list[int]) -> str:
        """Of tokens, special ones included."""
        return await self._run(partial(self.tokenizer.decode, tokens))

    async def chat(self, messages: Sequence[dict[str, Any]], http: HttpRequest, answer: bool = True) -> list[int]:
        """Of a chat, as the model's template renders it; answer: with the beginning of one."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise Failed(400, "this model has no chat template: use /v1/completions")
        self._check_length(sum(len(message["content"] or "") for message in messages))
        async with self._place():
            try:
                render = partial(self.tokenizer.apply_chat_template, add_generation_prompt=answer, tokenize=False)
                text = await self._run(partial(render, list(messages)))
            except Exception as error:  # templates raise what they like for roles and orders they do not know
                raise Failed(400, f"the chat template refuses these messages: {error!r}", param="messages") from None
            return await self._ids(text, http, special=False)

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        scheduler = self.engine.scheduler
        if self.waiting + len(scheduler.waiting) >= scheduler.max_waiting:
            raise QueueFull(f"{scheduler.max_waiting} requests wait already: try again later")
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    def _check_length(self, characters: int) -> None:
        if characters > self.most_characters:
            raise too_long(f"{characters:,} characters", self.engine.max_tokens)

    async def _ids(self, text: str, http: HttpRequest, special: bool) -> list[int]:
        self._check_length(len(text))
        most, tokens = self.engine.max_tokens, 0
        if len(text) > PIECE:
            for number, begin in enumerate(range(0, len(text), PIECE)):
                if await http.is_disconnected():
                    raise client_has_left()
                piece = text[begin : begin + PIECE]
                tokens += len(await self._run(partial(self._encode, piece, special=False)))
                if tokens - number * SLACK > most:
                    raise too_long(f"more than {most:,} tokens", most)
        return await self._run(partial(self._encode, text, special))

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        except (TypeError, ValueError) as error:
            raise Failed(400, f"the prompt cannot be tokenized: {error!r}", param="prompt") from None

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
