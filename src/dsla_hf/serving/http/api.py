"""HTTP: an engine behind OpenAI's interface, with its figures for people and for Prometheus."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import sys
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse

from ...inference.sampling import Sampling
from ..engine.engine import Draining, Engine, TooLong
from ..engine.request import Event, Request
from ..engine.scheduler import QueueFull
from ..engine.text import TextStream
from .errors import Failed, as_failed, error_body, too_long
from .guards import Guards
from .metrics import Metrics
from .page import PAGE
from .prompts import PromptReader
from .schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, Unsupported

logger = logging.getLogger(__name__)

LISTEN_SECONDS = 0.25  # how often it is asked whether a waiting client is still there
# So long the engine's thread waits for Python at most, while this one writes answers; as Python comes, it waits ten times as long.
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True)
class ApiOptions:
    """name: of the model, as clients call it. api_key: None for none. max_body: bytes of a request. max_new_tokens: most that a request
    may ask for. default_tokens: of completions that name none. drain_seconds: for running requests, when the server ends. allow_origins:
    of web pages that may call the server, such as "https://example.org", or "*" for all."""

    name: str
    api_key: str | None = None
    max_body: int = 4 * 2**20
    max_new_tokens: int = 4096
    default_tokens: int = 16
    drain_seconds: float = 30.0
    allow_origins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the api key is empty: give one, or leave it out")
        for name in ("max_body", "max_new_tokens", "default_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for origin in self.allow_origins:
            if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
                raise ValueError(f"an allowed origin is a scheme and a host, such as https://example.org, or *, got {origin!r}")


class Mailbox:
    """Carries events from the engine's thread to the loop's: all that come until the loop has time for them are one call there."""

    def __init__(self) -> None:
        self._events: deque[tuple[asyncio.Queue[Event], Event]] = deque()
        self._called = False

    def put(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Event], event: Event) -> None:
        """To be called from the engine's thread."""
        self._events.append((queue, event))
        if not self._called:
            self._called = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # before the first is taken: what comes from now on is called for again
        while self._events:
            queue, event = self._events.popleft()
            queue.put_nowait(event)


class Answer:
    """A request in the engine and the text that comes of it."""

    def __init__(self, api: Api, kind: str, prompt: list[int], body: CompletionBody | ChatBody, max_tokens: int):
        self.api, self.kind, self.body = api, kind, body
        self.id, self.created = f"{'chatcmpl' if kind == 'chat' else 'cmpl'}-{uuid.uuid4().hex}", int(time.time())
        self.text = TextStream(api.tokenizer, body.stop_strings)
        self.counted = 0
        loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def listener(event: Event) -> None:
            api.mailbox.put(loop, self._events, event)

        sampling = Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=body.seed,
            ignore_eos=bool(body.ignore_eos),
        )
        self.request: Request = api.engine.submit(prompt, max_tokens, listener, sampling)

    async def next_event(self) -> Event:
        return await self._events.get()

    async def cancel_when_left(self, http: HttpRequest) -> None:
        """Cancel as soon as the client has gone."""
        while not await http.is_disconnected():
            await asyncio.sleep(LISTEN_SECONDS)
        self.api.engine.cancel(self.request)

    async def pieces(self, event: Event) -> AsyncGenerator[tuple[str, str | None], None]:
        """(piece of the text, why it ends or None), from the first event on.

        Raises:
            Failed: for an error in the engine.
        """
        while True:
            if event.error is not None or event.finish == "cancelled":
                raise as_failed(event.error if event.error is not None else Draining("the server is about to stop"))
            if event.finish is not None:
                yield self.text.end(), "stop" if self.text.stopped else event.finish
                break
            assert event.token is not None
            self.counted += 1
            piece = self.text.add(event.token)
            if self.text.stopped:
                self.api.engine.cancel(self.request)
                yield piece, "stop"
                break
            yield piece, None  # also without text: clients measure by what comes
            event = await self.next_event()
        self.api.metrics.ended(self.request)

    def usage(self) -> dict[str, int]:
        prompt = len(self.request.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": self.counted, "total_tokens": prompt + self.counted}

    def whole(self, text: str, finish: str) -> dict[str, Any]:
        """The answer in one piece."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.kind == "chat":
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        return {**self._head("chat.completion"), "choices": [choice], "usage": self.usage()}

    def chunk(self, text: str | None, finish: str | None) -> dict[str, Any]:
        """A piece of a streamed answer; None for the text opens a chat's."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": finish}
        if self.kind == "chat":
            choice["delta"] = {"role": "assistant", "content": ""} if text is None else {"content": text} if text else {}
        else:
            choice["text"] = text
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    async def stream(self, first: Event) -> AsyncGenerator[str, None]:
        """Server-sent events."""
        try:
            if self.kind == "chat":
                yield _sent(self.chunk(None, None))
            async with aclosing(self.pieces(first)) as pieces:
                async for piece, finish in pieces:
                    yield _sent(self.chunk(piece, finish))
            if self.body.stream_options is not None and self.body.stream_options.include_usage:
                yield _sent({**self._head("chat.completion.chunk"), "choices": [], "usage": self.usage()})
        except Failed as failed:  # the status has been sent: the error is the last event
            yield _sent(failed.body)
        yield "data: [DONE]\n\n"

    def _head(self, chat: str) -> dict[str, Any]:
        name = self.api.options.name
        return {"id": self.id, "object": chat if self.kind == "chat" else "text_completion", "created": self.created, "model": name}


class CancellingStream(StreamingResponse):
    """A stream whose request is cancelled when it ends early, however that comes about."""

    def __init__(self, answer: Answer, first: Event):
        self.stream, self.answer = answer.stream(first), answer
        super().__init__(self.stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.api.engine.cancel(self.answer.request)
            await self.stream.aclose()


class Api:
    """What the routes share."""

    def __init__(self, engine: Engine, tokenizer: Any, options: ApiOptions):
        self.engine, self.tokenizer, self.options = engine, tokenizer, options
        self.metrics, self.mailbox = Metrics(engine), Mailbox()
        self.prompts = PromptReader(engine, tokenizer)
        self.started = int(time.time())

    async def complete(self, body: CompletionBody, http: HttpRequest) -> Response:
        self._check_model(body.model)
        prompt = body.prompt if isinstance(body.prompt, list) else await self.prompts.completion(body.prompt, http)
        return await self._answer("text", prompt, body, body.max_tokens or self.options.default_tokens, http)

    async def chat(self, body: ChatBody, http: HttpRequest) -> Response:
        self._check_model(body.model)
        prompt = await self.prompts.chat([{"role": m.role, "content": m.text} for m in body.messages], http)
        wanted = body.max_completion_tokens or body.max_tokens
        room = min(self.engine.max_tokens - len(prompt), self.options.max_new_tokens)
        return await self._answer("chat", prompt, body, wanted or max(room, 1), http)

    async def _answer(self, kind: str, prompt: list[int], body: Any, max_tokens: int, http: HttpRequest) -> Response:
        if max_tokens > self.options.max_new_tokens:
            message = f"max_tokens {max_tokens} is more than this server's limit of {self.options.max_new_tokens}"
            raise Failed(400, message, param="max_tokens")
        try:
            answer = Answer(self, kind, prompt, body, max_tokens)
        except TooLong as error:
            raise Failed(400, str(error), code="context_length_exceeded", param="prompt" if kind == "text" else "messages") from None
        except ValueError as error:
            raise Failed(400, str(error), param="prompt" if kind == "text" else "messages") from None
        streams, watch = False, asyncio.create_task(answer.cancel_when_left(http))
        try:
            first = await answer.next_event()
            if body.stream and first.error is None and first.finish != "cancelled":
                streams = True
                return CancellingStream(answer, first)
            text, finish = "", "stop"
            async with aclosing(answer.pieces(first)) as pieces:
                async for piece, end in pieces:
                    text, finish = text + piece, end or finish
            return JSONResponse(answer.whole(text, finish))
        finally:
            watch.cancel()
            if not streams:
                self.engine.cancel(answer.request)

    async def tokenize(self, body: TokenizeBody, http: HttpRequest) -> dict[str, Any]:
        self._check_model(body.model or self.options.name)
        if body.prompt is not None:
            tokens = await self.prompts.completion(body.prompt, http, body.add_special_tokens)
        else:
            messages = [{"role": m.role, "content": m.text} for m in body.messages or ()]
            tokens = await self.prompts.chat(messages, http, body.add_generation_prompt)
        return {"count": len(tokens), "max_model_len": self.engine.max_tokens, "tokens": tokens}

    async def detokenize(self, body: DetokenizeBody) -> dict[str, Any]:
        self._check_model(body.model or self.options.name)
        if len(body.tokens) > self.engine.max_tokens:
            raise too_long(f"{len(body.tokens):,} tokens", self.engine.max_tokens)
        if not all(0 <= token < self.engine.vocab_size for token in body.tokens):
            raise Failed(400, f"tokens must be ids from 0 to {self.engine.vocab_size - 1}", param="tokens")
        return {"prompt": await self.prompts.text(body.tokens)}

    def model(self, name: str | None = None) -> dict[str, Any]:
        """What is told of the model; name: that it is asked for by."""
        self._check_model(name or self.options.name)
        about = {"id": self.options.name, "object": "model", "created": self.started, "owned_by": "dsla-hf"}
        return {**about, "max_model_len": self.engine.max_tokens}

    def _check_model(self, name: str) -> None:
        if name != self.options.name:
            message = f"there is no model {name!r} here, only {self.options.name!r}"
            raise Failed(404, message, code="model_not_found", param="model")


def build_app(engine: Engine, tokenizer: Any, options: ApiOptions) -> FastAPI:
    """The application; it starts the engine, and ends it when the running requests are served."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        before = sys.getswitchinterval()
        sys.setswitchinterval(min(before, SWITCH_SECONDS))
        engine.start()
        yield
        await asyncio.to_thread(engine.stop, timeout=options.drain_seconds)
        api.prompts.close()
        sys.setswitchinterval(before)

    app = FastAPI(title="dsla serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = engine
    api = Api(engine, tokenizer, options)
    app.add_middleware(Guards, max_body=options.max_body, api_key=options.api_key)
    if options.allow_origins:  # around the guards: a browser asks without a key whether it may ask
        app.add_middleware(CORSMiddleware, allow_origins=options.allow_origins, allow_methods=["*"], allow_headers=["*"])

    @app.exception_handler(Failed)
    async def failed(http: HttpRequest, error: Failed) -> Response:
        return error.response()

    @app.exception_handler(QueueFull)
    @app.exception_handler(Draining)
    async def overloaded(http: HttpRequest, error: Exception) -> Response:
        return as_failed(error).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, error: RequestValidationError) -> Response:
        return JSONResponse(error_body(*_told(error.errors()[0])), 400)

    @app.exception_handler(StarletteHTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail)), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(http: HttpRequest, error: Exception) -> Response:
        return as_failed(error).response()

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        return await api.complete(body, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        return await api.chat(body, http)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [api.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return api.model(name)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody, http: HttpRequest) -> dict[str, Any]:
        return await api.tokenize(body, http)

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        return await api.detokenize(body)

    @app.get("/health")
    async def health() -> Response:
        if engine.draining:
            return JSONResponse({"status": "draining"}, 503, {"Retry-After": "10"})
        return JSONResponse({"status": "ok"})

    @app.get("/status")
    async def status() -> dict[str, Any]:
        return {"model": options.name, "now": engine.clock(), **engine.snapshot()}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(api.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE)

    return app


def _told(error: dict[str, Any]) -> tuple[str, str, None, str | None]:
    """Message, kind, code and field of what is wrong with a body. Escaped: a message may quote what no encoding can carry."""
    cause = error.get("ctx", {}).get("error")
    if error["type"] == "json_invalid":
        message, field = f"the body is no JSON: {cause}", None
    else:
        where = [str(part) for part in error["loc"][1:]]
        field = cause.param if isinstance(cause, Unsupported) else where[0] if where else None
        message = f"{'.'.join(where)}: {error['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    return _escaped(message), "invalid_request_error", None, None if field is None else _escaped(field)


def _escaped(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


def _sent(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
