"""What every request passes before a route sees it: the key, the kind of its body and its size."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from starlette.responses import JSONResponse

from .errors import error_body

BODY_SECONDS = 60.0  # in which a body must have come
WITH_KEY = ("/v1", "/tokenize", "/detokenize")  # beginnings of paths
WITH_BODY = ("POST", "PUT", "PATCH")


class Guards:
    """ASGI middleware.

    Args:
        max_body: bytes. api_key: that requests of the model must carry as bearer, None for none.
    """

    def __init__(self, app: Any, max_body: int, api_key: str | None):
        self.app, self.max_body = app, max_body
        self.api_key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if scope["method"] == "HEAD":  # the server itself leaves the body out
            scope = {**scope, "method": "GET"}
        if self.api_key is not None and scope["path"].startswith(WITH_KEY) and not self._knows_key(headers.get(b"authorization", b"")):
            refusal = error_body("give the server's key: Authorization: Bearer KEY", "authentication_error", "invalid_api_key")
            await JSONResponse(refusal, 401, {"WWW-Authenticate": "Bearer"})(scope, receive, send)
            return
        if scope["method"] in WITH_BODY and (reason := _refused(headers)):
            await JSONResponse(error_body(reason), 415, {"Connection": "close"})(scope, receive, send)
            return
        length = headers.get(b"content-length", b"0")
        too_large = length.isdigit() and int(length) > self.max_body
        body = bytearray()  # may come a byte at a time
        try:
            async with asyncio.timeout(BODY_SECONDS):
                more = scope["method"] in WITH_BODY and not too_large
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    body += message.get("body", b"")
                    too_large = len(body) > self.max_body
                    more = message.get("more_body", False) and not too_large
        except TimeoutError:
            refusal = error_body(f"the body did not come within {BODY_SECONDS:.0f} s")
            await JSONResponse(refusal, 408, {"Connection": "close"})(scope, receive, send)
            return
        if too_large:
            refusal = error_body(f"the body is larger than {self.max_body} bytes: send less")
            await JSONResponse(refusal, 413, {"Connection": "close"})(scope, receive, send)
            return
        waiting: list[Any] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Any:
            return waiting.pop() if waiting else await receive()

        await self.app(scope, replay, send)

    def _knows_key(self, header: bytes) -> bool:
        kind, _, key = header.partition(b" ")
        return hmac.compare_digest(key.strip(), self.api_key or b"") and kind.lower() == b"bearer"


def _refused(headers: dict[bytes, bytes]) -> str | None:
    """Why a body of this kind is not taken, None where it is: JSON, as it is."""
    kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
    packed = headers.get(b"content-encoding", b"identity").strip().lower().decode("latin-1")
    if not kind:
        return "a body without a type is not taken: send Content-Type: application/json"
    if kind != "application/json":
        return f"a body of the type {kind} is not taken: send Content-Type: application/json"
    if packed not in ("", "identity"):
        return f"a body in Content-Encoding {packed} is not taken: send it as it is"
    return None
