"""Answers that are errors, as OpenAI's interface has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from starlette.responses import JSONResponse

from ..engine.engine import Draining, ShedForMemory
from ..engine.scheduler import QueueFull
from .schema import MAX_STOPS, Unsupported, sendable

# What fields are whose kinds are several: pydantic would say what the first of them is.
GIVE = {
    "prompt": "a text, a list of token ids, or a list of one of these",
    "stop": f"a text of 1 to 200 characters, or a list of at most {MAX_STOPS} of them",
    "tool_choice": '"none", "auto", "required" or {"type": "function", "function": {"name": ...}}',
    "input": "a text, or a list of messages with role and content (text)",
    "content": "a text, or a list of parts of the type text",
    "guided_json": "a JSON schema",
}

CLIENT_CLOSED = 499  # as nginx has it; nobody reads it but the log


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": sendable(message), "type": kind, "param": None if param is None else sendable(param), "code": code}}


class Failed(Exception):
    """An answer that is an error: its status, its body. retry: seconds after which it may be tried again."""

    def __init__(
        self,
        status: int,
        message: str,
        kind: str = "invalid_request_error",
        code: str | None = None,
        retry: int | None = None,
        param: str | None = None,
    ):
        super().__init__(message)
        self.status, self.body = status, error_body(message, kind, code, param)
        self.headers = {} if retry is None else {"Retry-After": str(retry)}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


class CannotFollow(RuntimeError):
    """A grammar became too complex while a text followed it."""


def as_failed(error: Exception | None) -> Failed:
    """What a client is told of an error of the engine."""
    if isinstance(error, (QueueFull, Draining, ShedForMemory)):
        return Failed(503, str(error), "overloaded_error", "overloaded", retry=10 if isinstance(error, Draining) else 1)
    if isinstance(error, CannotFollow):
        return Failed(400, str(error))
    return Failed(500, "the server failed on this request; its log says why", "server_error", "internal_error")


def too_long(found: str, most: int, param: str = "prompt") -> Failed:
    """Of a prompt that cannot fit; param: the field that has it."""
    message = f"this server's longest text is {most:,} tokens, answer included, and the prompt has {found}: send less"
    return Failed(400, message, code="context_length_exceeded", param=param)


def invalid(errors: Sequence[Any]) -> dict[str, Any]:
    """What a client is told of a body that is not what the route takes; errors: pydantic's."""
    error = errors[0]
    cause = error.get("ctx", {}).get("error")
    if error["type"] == "json_invalid":
        return error_body(f"the body is no JSON: {cause}")
    where = [str(part) for part in error["loc"][1:]]
    if not where and cause is None:
        return error_body("the body is empty: send JSON" if error["type"] == "missing" else "the body must be a JSON object")
    field = cause.param if isinstance(cause, Unsupported) else where[0] if where else None
    several = next((number for number, name in enumerate(where) if name in GIVE), None)
    got = _shown(error.get("input"))
    if isinstance(cause, Unsupported):
        message = str(cause)
    elif several is not None and cause is None and error["type"] != "missing":
        message = f"{'.'.join(where[: several + 1])}: give {GIVE[where[several]]}{got}"
    else:
        said = str(cause) if cause is not None else error["msg"] + ("" if error["type"] == "missing" else got)
        message = f"{'.'.join(where)}: {said}".removeprefix(": ")
    return error_body(message, param=field)


def unreadable(error: BaseException | None) -> str:
    """Of a body that no JSON can be read from, for another reason than its syntax."""
    if isinstance(error, UnicodeDecodeError):
        return f"the body is no {error.encoding.upper()} (byte {error.start}): send JSON in UTF-8"
    if isinstance(error, RecursionError):
        return "the body cannot be read: its objects and lists are nested too deep, send fewer levels"
    return f"the body cannot be read: {str(error).partition(':')[0]}"  # what follows is advice for programs


def _shown(value: Any) -> str:
    """What came, if it is short."""
    return f", got {str(value)[:80]!r}" if isinstance(value, str) else f", got {value}" if isinstance(value, (int, float)) else ""


def client_has_left() -> Failed:
    return Failed(CLIENT_CLOSED, "the client has closed the connection")
