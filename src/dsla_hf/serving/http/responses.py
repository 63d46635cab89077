"""/v1/responses, OpenAI's newer interface, for text: a chat whose answer is a list of items, or events."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from .answers import Answers
from .errors import Failed
from .formats import as_json, gather, levels_told, sent
from .messages import Json, Long, TextPart
from .schema import ChatBody, Closed, Real


class InputMessage(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["message"] = "message"
    role: str = Field(min_length=1, max_length=64)
    content: str | Long[TextPart]


class TextFormat(BaseModel):
    """As `response_format` of chats, but with the schema's fields beside the type."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    json_schema: Json | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _has_its_schema(self) -> TextFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError('give schema with the type "json_schema"')
        return self


class TextOptions(BaseModel):
    """verbosity: what says nothing of it."""

    model_config = ConfigDict(strict=True, extra="forbid")
    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None


class ResponsesBody(Closed):
    """Of /v1/responses. `seed` and `level` are extensions."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {
        "previous_response_id": (),
        "conversation": (),
        "background": (False,),
        "include": ([],),
        "max_tool_calls": (),
        "n": (1,),
        "prompt": (),
        "reasoning": ({},),
        "stop": (),
        "stream_options": ({}, {"include_obfuscation": False}),
        "tool_choice": ("auto", "none"),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }
    model: str
    input: str | Annotated[Long[InputMessage], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: Real | None = Field(None, ge=0, le=2)
    top_p: Real | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    level: int | None = Field(None, ge=0)
    text: TextOptions | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    stream: bool | None = None

    def as_chat(self) -> ChatBody:
        """The same request of /v1/chat/completions."""
        messages: list[dict[str, Any]] = [] if self.instructions is None else [{"role": "system", "content": self.instructions}]
        if isinstance(self.input, str):
            messages.append({"role": "user", "content": self.input})
        else:
            messages += [message.model_dump(include={"role", "content"}) for message in self.input]
        chat: dict[str, Any] = {name: getattr(self, name) for name in ("model", "temperature", "top_p", "seed", "level", "stream")}
        form = None if self.text is None else self.text.format
        if form is not None and form.type != "text":
            chat["response_format"] = {"type": form.type}
            if form.type == "json_schema":
                chat["response_format"]["json_schema"] = {"schema": form.json_schema or {}}
        return ChatBody.model_validate({**chat, "messages": messages, "max_completion_tokens": self.max_output_tokens})


class Responses:
    """What a request of /v1/responses gets."""

    prompt, limit, schema = "input", "max_output_tokens", "text"  # the fields that have them

    def __init__(self, model: str, body: ResponsesBody):
        self.body, self.model, self.created = body, model, int(time.time())
        self.id, self.item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._number = -1

    async def whole(self, answers: Answers) -> bytes:
        """The answer in one piece."""
        (one,) = await gather(answers)
        return as_json(self._ended(one.text, one.finish, answers))

    async def stream(self, answers: Answers) -> AsyncGenerator[str, None]:
        """Events, each with its number."""
        where = {"item_id": self.item, "output_index": 0, "content_index": 0}
        text, finish = "", "stop"
        try:
            for kind in ("response.created", "response.in_progress"):
                yield self._event(kind, response=self._about("in_progress"))
            yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress"))
            yield self._event("response.content_part.added", **where, part=self._part(""))
            async with aclosing(answers.pieces()) as pieces:
                async for piece in pieces:
                    text, finish = text + piece.text, piece.finish or finish
                    if piece.text:
                        yield self._event("response.output_text.delta", **where, delta=piece.text, logprobs=[])
            yield self._event("response.output_text.done", **where, text=text, logprobs=[])
            yield self._event("response.content_part.done", **where, part=self._part(text))
            ended = self._ended(text, finish, answers)
            yield self._event("response.output_item.done", output_index=0, item=ended["output"][0])
            yield self._event(f"response.{ended['status']}", response=ended)
        except Failed as failed:  # the status has been sent: the error is the last event
            error = failed.body["error"]
            about = {"code": error["code"] or error["type"], "message": error["message"]}
            yield self._event("response.failed", response={**self._about("failed"), "error": about})

    def _event(self, kind: str, **content: Any) -> str:
        self._number += 1
        return sent({"type": kind, "sequence_number": self._number, **content}, kind)

    def _ended(self, text: str, finish: str, answers: Answers) -> dict[str, Any]:
        status = "incomplete" if finish == "length" else "completed"
        found = answers.usage()
        usage = {
            "input_tokens": found["prompt_tokens"],
            "input_tokens_details": found["prompt_tokens_details"],
            "output_tokens": found["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": found["total_tokens"],
        }
        about = {**self._about(status), "output": [self._message(status, text)], "usage": usage, **levels_told(answers.choices[0])}
        return {**about, "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None}

    def _message(self, status: str, text: str | None = None) -> dict[str, Any]:
        content = [] if text is None else [self._part(text)]
        return {"id": self.item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _about(self, status: str) -> dict[str, Any]:
        body = self.body
        form = None if body.text is None else body.text.format
        told = {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": told},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": None,
        }
