"""Messages and tools of a chat, as clients send them, and as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

DEEPEST = 100  # dicts and lists within each other, of what is written as JSON again; llguidance follows 128

Item = TypeVar("Item")
Long = Annotated[
    list[Item], Field(fail_fast=True)
]  # a list of any length: its first wrong item is the error, for millions take minutes and gigabytes


def _shallow(value: dict[str, Any]) -> dict[str, Any]:
    """Raises ValueError for what cannot be written as JSON again."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        inner = [within for one in level for within in (one.values() if isinstance(one, dict) else one)]
        level = [one for one in inner if isinstance(one, (dict, list))]
        if not level:
            return value
    raise ValueError(f"objects and lists are nested more than {DEEPEST} deep: send fewer levels")


Json = Annotated[dict[str, Any], AfterValidator(_shallow)]


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True)
    type: str = Field(pattern="^(text|input_text|output_text)$")
    text: str


Content = str | Long[TextPart] | None


def text_of(content: Content) -> str:
    """The text of a content, "" for none."""
    return content if isinstance(content, str) else "".join(part.text for part in content or ())


class CalledFunction(BaseModel):
    """arguments: JSON, as text."""

    model_config = ConfigDict(strict=True)
    name: str
    arguments: str

    @model_validator(mode="after")
    def _holds_an_object(self) -> CalledFunction:
        self.parsed()
        return self

    def parsed(self) -> dict[str, Any]:
        """The arguments by name."""
        try:
            arguments = json.loads(self.arguments or "{}")
        except (ValueError, RecursionError):
            arguments = None
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments of a call must be a JSON object as text, got {self.arguments[:100]!r}")
        return arguments


class ToolCall(BaseModel):
    model_config = ConfigDict(strict=True)
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(BaseModel):
    """content: may be left out where there are tool_calls. Names that are not here go nowhere."""

    model_config = ConfigDict(strict=True)
    role: str = Field(min_length=1, max_length=64)
    content: Content = None
    name: str | None = None
    tool_calls: Long[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not self.tool_calls:
            raise ValueError(f"a message of the role {self.role} needs a content")
        return self

    def for_template(self, roles: str) -> dict[str, Any]:
        """As templates take it; roles: the template's text, which tells what roles it knows. Arguments of calls are objects there."""
        role = "system" if self.role == "developer" and "developer" not in roles else self.role
        message: dict[str, Any] = {"role": role, "content": text_of(self.content)}
        for name in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": call.function.parsed()}}
                for call in self.tool_calls
            ]
        return message


def for_template(messages: Sequence[Message], roles: str) -> list[dict[str, Any]]:
    """A chat as templates take it, see `Message.for_template`. Some want to know which tool answers: the call's id says it."""
    called = {call.id: call.function.name for message in messages for call in message.tool_calls or ()}
    chat = []
    for message in messages:
        told = message.for_template(roles)
        if message.role == "tool" and message.tool_call_id in called:
            told.setdefault("name", called[message.tool_call_id])
        chat.append(told)
    return chat


class Function(BaseModel):
    """parameters: a JSON schema of the arguments."""

    model_config = ConfigDict(strict=True)
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: Function

    def for_template(self) -> dict[str, Any]:
        """As templates take it: some read what OpenAI's clients may leave out."""
        function = self.function
        parameters = {"type": "object", "properties": {}, **(function.parameters or {})}
        return {
            "type": "function",
            "function": {"name": function.name, "description": function.description or "", "parameters": parameters},
        }


class NamedFunction(BaseModel):
    model_config = ConfigDict(strict=True)
    name: str


class NamedTool(BaseModel):
    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedTool
Tools = Annotated[list[Tool], Field(max_length=128)]
