"""Answers that are errors, as OpenAI's interface has them."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

from ..engine.engine import Draining, ShedForMemory
from ..engine.scheduler import QueueFull

CLIENT_CLOSED = 499  # as nginx has it; nobody reads it but the log


def error_body(message: str, kind: str = "invalid_request_error", code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


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


def as_failed(error: Exception | None) -> Failed:
    """What a client is told of an error of the engine."""
    if isinstance(error, (QueueFull, Draining, ShedForMemory)):
        return Failed(503, str(error), "overloaded_error", "overloaded", retry=10 if isinstance(error, Draining) else 1)
    return Failed(500, "the server failed on this request; its log says why", "server_error", "internal_error")


def too_long(found: str, most: int) -> Failed:
    """Of a prompt that cannot fit."""
    message = f"this server's longest text is {most:,} tokens, answer included, and the prompt has {found}: send less"
    return Failed(400, message, code="context_length_exceeded", param="prompt")


def client_has_left() -> Failed:
    return Failed(CLIENT_CLOSED, "the client has closed the connection")
