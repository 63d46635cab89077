"""From the text of a request to token ids, by work that is bounded before it is done."""

from __future__ import annotations

import asyncio
import inspect
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

    async def text(self, tokens: list[int], special: bool = True) -> str:
        """Of tokens; special: with special ones."""
        return await self._run(partial(self.tokenizer.decode, tokens, skip_special_tokens=not special))

    async def chat(
        self,
        messages: Sequence[dict[str, Any]],
        http: HttpRequest,
        answer: bool = True,
        continued: bool = False,
        tools: Sequence[dict[str, Any]] | None = None,
        variables: dict[str, Any] | None = None,
        param: str = "messages",
    ) -> list[int]:
        """Of a chat, as the model's template renders it; answer: with the beginning of one; continued: the last message is one that goes
        on. variables: of the template, beside its own. param: the field that errors name."""
        if not self.template:
            raise Failed(400, "this model has no chat template: use /v1/completions")
        for name in variables or ():
            if name in self._taken:
                raise Failed(400, f"chat_template_kwargs cannot set {name}: leave it out", param="chat_template_kwargs")
        self._check_length(sum(len(message["content"] or "") for message in messages), param)
        async with self._place():
            options: dict[str, Any] = {"add_generation_prompt": answer, "tokenize": False, **(variables or {})}
            if continued:
                options["continue_final_message"] = True
            if tools:
                options["tools"] = list(tools)
            try:
                text = await self._run(partial(self.tokenizer.apply_chat_template, list(messages), **options))
            except Exception as error:  # templates raise what they like for roles and orders they do not know
                raise Failed(400, f"the chat template refuses these messages: {error!r}", param=param) from None
            return await self._ids(text, http, special=False, param=param)

    @property
    def template(self) -> str:
        """The text of the model's chat template, of all where it has several; empty where it has none."""
        found = getattr(self.tokenizer, "chat_template", None)
        return "\n".join(found.values()) if isinstance(found, dict) else found or ""

    @cached_property
    def _taken(self) -> set[str]:
        """Names that are no variables of a template: of what renders it, and of what it is given."""
        return {"self", "messages", *inspect.signature(self.tokenizer.apply_chat_template).parameters}

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

    def _check_length(self, characters: int, param: str) -> None:
        if characters > self.most_characters:
            raise too_long(f"{characters:,} characters", self.engine.max_tokens, param)

    async def _ids(self, text: str, http: HttpRequest, special: bool, param: str = "prompt") -> list[int]:
        self._check_length(len(text), param)
        _check_characters(text, param)
        most, tokens = self.engine.max_tokens, 0
        if len(text) > PIECE:
            for number, begin in enumerate(range(0, len(text), PIECE)):
                if await http.is_disconnected():
                    raise client_has_left()
                piece = text[begin : begin + PIECE]
                tokens += len(await self._run(partial(self._encode, piece, False, param)))
                if tokens - number * SLACK > most:
                    raise too_long(f"more than {most:,} tokens", most, param)
        return await self._run(partial(self._encode, text, special, param))

    def _encode(self, text: str, special: bool, param: str) -> list[int]:
        try:
            return list(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        except (TypeError, ValueError) as error:
            raise Failed(400, f"the prompt cannot be tokenized: {error!r}", param=param) from None

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _check_characters(text: str, param: str) -> None:
    """Raises Failed for halves of surrogate pairs, which JSON can carry and no tokenizer reads."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start].encode("utf-8", "backslashreplace").decode()
        message = f"{param}: {half} is half of a surrogate pair, and no character: send whole ones"
        raise Failed(400, message, param=param) from None
