"""HTTP: an engine behind OpenAI's interface, with its figures for people and for Prometheus."""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, JSONResponse, Response

from ...inference.sampling import Constraint
from ..engine.engine import Draining, Engine, TooLong
from ..engine.scheduler import QueueFull
from ..engine.text import TextStream
from .answers import Answers, Choice, Mailbox
from .chats import Chats
from .completions import Completions
from .errors import Failed, as_failed, error_body, invalid, too_long, unreadable
from .forced_calls import grammar_beside_tools
from .formats import CancellingStream, Format
from .grammar import Grammar, Grammars, asked_for
from .guards import Guards
from .messages import for_template
from .metrics import Metrics
from .page import PAGE
from .prompts import PromptReader
from .responses import Responses, ResponsesBody
from .schema import ChatBody, CompletionBody, DetokenizeBody, Options, TokenizeBody
from .token_bytes import TokenBytes
from .tools import FORMATS, ToolFormat, format_of
from .traces import Traces, note_choices

logger = logging.getLogger(__name__)

# So long the engine's thread waits for Python at most, while this one writes answers; as Python comes, it waits ten times as long.
SWITCH_SECONDS = 0.0005


@dataclass(frozen=True)
class ApiOptions:
    """name: of the model, as clients call it. api_key: None for none. max_body: bytes of a request. max_new_tokens: most that a request
    may ask for. default_tokens: of completions that name none. drain_seconds: for running requests, when the server ends. allow_origins:
    of web pages that may call the server, such as "https://example.org", or "*" for all. tool_format: how the model writes calls of tools,
    "hermes", "llama3" or "mistral"; "auto": what its chat template says, "none": it may not."""

    name: str
    api_key: str | None = None
    max_body: int = 4 * 2**20
    max_new_tokens: int = 4096
    default_tokens: int = 16
    drain_seconds: float = 30.0
    allow_origins: tuple[str, ...] = ()
    tool_format: str = "auto"

    def __post_init__(self) -> None:
        if self.api_key is not None and not self.api_key.strip():
            raise ValueError("the api key is empty: give one, or leave it out")
        for name in ("max_body", "max_new_tokens", "default_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.tool_format not in ("auto", "none", *FORMATS):
            raise ValueError(f"tool_format must be one of auto, none, {', '.join(FORMATS)}, got {self.tool_format!r}")
        for origin in self.allow_origins:
            if not re.fullmatch(r"\*|https?://[^/\s]+", origin):
                raise ValueError(f"an allowed origin is a scheme and a host, such as https://example.org, or *, got {origin!r}")


class Api:
    """What the routes share."""

    def __init__(self, engine: Engine, tokenizer: Any, options: ApiOptions):
        self.engine, self.tokenizer, self.options = engine, tokenizer, options
        self.metrics, self.mailbox = Metrics(engine, options.name), Mailbox()
        self.prompts, self.tokens = PromptReader(engine, tokenizer), TokenBytes(tokenizer)
        self.grammars = Grammars(tokenizer, engine.vocab_size, engine.eos_tokens)
        self.tools = FORMATS.get(options.tool_format) if options.tool_format != "auto" else format_of(self.prompts.template)
        self.started = int(time.time())

    def close(self) -> None:
        self.prompts.close()
        self.grammars.close()

    async def complete(self, body: CompletionBody, http: HttpRequest) -> Response:
        self._check(body)
        prompts = body.prompts
        self._check_count(len(prompts), body)
        read: list[list[int]] = []
        for prompt in prompts:
            read.append(prompt if isinstance(prompt, list) else await self.prompts.completion(prompt, http, body.add_special_tokens))
        wanted = [self._wanted(prompt, body.max_tokens, "prompt", self.options.default_tokens) for prompt in read]
        constraints = iter(await self._constraints(asked_for(body), len(read) * body.choices, body))
        echoes = [await self._echo(prompt, tokens) if body.echo else "" for prompt, tokens in zip(prompts, read, strict=True)]
        logprobs: dict[str, Any] = {"logprobs": body.logprobs, "prompt_logprobs": body.logprobs if body.echo else None}

        def choices() -> Iterator[Choice]:
            for number, tokens in enumerate(read):
                heard = body.echo and body.logprobs is not None
                offsets = self.tokens.offsets(tokens, echoes[number]) if heard and self._are_ids(tokens) else ()
                for copy in range(body.choices):
                    yield Choice(
                        number * body.choices + copy,
                        tokens,
                        wanted[number],
                        body.sampling(copy, **logprobs),
                        TextStream(self.tokenizer, body.stop_strings),
                        next(constraints),
                        body.level,
                        echoes[number],
                        offsets,
                    )

        return await self._answer(Completions(self.options.name, body, self.tokens), choices(), body, http)

    async def chat(self, body: ChatBody, http: HttpRequest) -> Response:
        tools = self._tools(body)
        return await self._chat(body, http, Chats(self.options.name, body, self.tokens, tools), tools)

    async def respond(self, body: ResponsesBody, http: HttpRequest) -> Response:
        return await self._chat(body.as_chat(), http, Responses(self.options.name, body), None)

    async def _chat(self, body: ChatBody, http: HttpRequest, form: Chats | Responses, tools: ToolFormat | None) -> Response:
        self._check(body)
        self._check_count(1, body)
        grammar = asked_for(body, form.schema)
        if tools is not None:
            grammar = grammar_beside_tools(body, tools, grammar, self.tokens)
        prompt = await self.prompts.chat(
            for_template(body.messages, self.prompts.template),
            http,
            not body.continue_final_message if body.add_generation_prompt is None else body.add_generation_prompt,
            bool(body.continue_final_message),
            None if tools is None else [tool.for_template() for tool in body.tools or ()],
            body.chat_template_kwargs,
            form.prompt,
        )
        wanted = self._wanted(prompt, body.limit, form.prompt, self.options.max_new_tokens, form.limit)
        constraints = await self._constraints(grammar, body.choices, body)
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        decode = None if tools is None else self.tokens.decoder(tools.shown)
        choices = (
            Choice(
                number,
                prompt,
                wanted,
                body.sampling(number, logprobs=logprobs),
                TextStream(self.tokenizer, body.stop_strings, decode),
                constraints[number],
                body.level,
            )
            for number in range(body.choices)
        )
        return await self._answer(form, choices, body, http)

    async def _answer(self, form: Format | Responses, choices: Iterable[Choice], body: Options, http: HttpRequest) -> Response:
        try:
            answers = Answers(self.engine, self.mailbox, self.metrics, choices)
        except TooLong as error:
            told = str(error).replace("max_tokens", form.limit)
            raise Failed(400, told, code="context_length_exceeded", param=form.prompt) from None
        except ValueError as error:
            first = str(error).split(maxsplit=1)[0]  # the engine names what is wrong first
            raise Failed(400, str(error), param=first if first in type(body).model_fields else form.prompt) from None
        note_choices(http.scope, answers.choices)
        streams, watch = False, asyncio.create_task(answers.cancel_when_left(http))
        try:
            begun = await answers.begin()
            if body.stream and begun:
                streams = True
                return CancellingStream(answers, form.stream(answers))
            return Response(await form.whole(answers), media_type="application/json")
        finally:
            watch.cancel()
            if not streams:
                answers.cancel()

    def _wanted(self, prompt: list[int], asked: int | None, param: str, default: int, name: str = "max_tokens") -> int:
        """How many tokens a text is to have; name: of the field that asks."""
        most = self.options.max_new_tokens
        if asked is not None and asked > most:
            raise Failed(400, f"{name} {asked} is more than this server's limit of {most}", param=name)
        room = self.engine.max_tokens - len(prompt)
        if room < 1:
            raise too_long(f"{len(prompt):,} tokens", self.engine.max_tokens, param)
        return min(default, room, most) if asked is None else asked

    async def _constraints(self, grammar: Grammar | None, count: int, body: Options) -> Sequence[Constraint | None]:
        if grammar is None:
            return [None] * count
        if body.min_tokens:
            raise Failed(400, f"min_tokens cannot be kept beside {grammar.param}: leave it out", param="min_tokens")
        return await self.grammars.constraints(grammar, count)

    def _tools(self, body: ChatBody) -> ToolFormat | None:
        """How calls are written, None where there are none to be made."""
        if not body.tools or body.tool_choice == "none":
            return None
        if self.tools is None:
            raise Failed(400, "this model's chat template knows no tools, or writes calls in a format that is not read here", param="tools")
        return self.tools

    def _are_ids(self, tokens: list[int]) -> bool:
        return all(0 <= token < self.engine.vocab_size for token in tokens)

    async def _echo(self, prompt: str | list[int], tokens: list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        return await self.prompts.text(tokens, special=False) if self._are_ids(tokens) else ""

    def _check(self, body: Options) -> None:
        self._check_model(body.model)
        for name, tokens in body.tokens_named.items():
            if not self._are_ids(tokens):
                wrong = next(token for token in tokens if not self._are_ids([token]))
                raise Failed(400, f"{name} has the token {wrong}, ids go from 0 to {self.engine.vocab_size - 1}", param=name)
        if body.min_tokens and body.limit is not None and body.min_tokens > body.limit:
            raise Failed(400, f"min_tokens {body.min_tokens} is more than the {body.limit} tokens asked for", param="min_tokens")

    def _check_count(self, prompts: int, body: Options) -> None:
        most, count = self.engine.scheduler.max_waiting, prompts * body.choices
        if count > most:
            message = f"{prompts} prompts with n {body.choices} are {count} texts, more than the {most} that may wait here"
            raise Failed(400, message, param="prompt" if prompts > 1 else "n")

    async def tokenize(self, body: TokenizeBody, http: HttpRequest) -> dict[str, Any]:
        self._check_model(body.model or self.options.name)
        if body.prompt is not None:
            tokens = await self.prompts.completion(body.prompt, http, body.add_special_tokens)
        else:
            messages = for_template(body.messages or (), self.prompts.template)
            tools = [tool.for_template() for tool in body.tools or ()]
            tokens = await self.prompts.chat(messages, http, body.add_generation_prompt, False, tools, body.chat_template_kwargs)
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


def build_app(engine: Engine, tokenizer: Any, options: ApiOptions, tracer_provider: Any | None = None) -> FastAPI:
    """The application; it starts the engine, and ends it when the running requests are served.

    tracer_provider: OpenTelemetry's, for spans of requests, see `Traces`; it is shut down with the application.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        before = sys.getswitchinterval()
        sys.setswitchinterval(min(before, SWITCH_SECONDS))
        engine.start()
        yield
        await asyncio.to_thread(engine.stop, timeout=options.drain_seconds)
        api.close()
        if tracer_provider is not None:
            await asyncio.to_thread(tracer_provider.shutdown)  # sends what has not been sent
        sys.setswitchinterval(before)

    app = FastAPI(title="dsla serve", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.engine = engine
    api = Api(engine, tokenizer, options)
    app.add_middleware(Guards, max_body=options.max_body, api_key=options.api_key)
    if tracer_provider is not None:
        app.add_middleware(Traces, provider=tracer_provider, model=options.name, clock=engine.clock)
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
    async def invalid_body(http: HttpRequest, error: RequestValidationError) -> Response:
        return JSONResponse(invalid(error.errors()), 400)

    @app.exception_handler(StarletteHTTPException)
    async def refused(http: HttpRequest, error: HTTPException) -> Response:
        told = unreadable(error.__cause__) if error.status_code == 400 and error.__cause__ is not None else str(error.detail)
        return JSONResponse(error_body(told), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def broken(http: HttpRequest, error: Exception) -> Response:
        return as_failed(error).response()

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, http: HttpRequest) -> Response:
        return await api.complete(body, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatBody, http: HttpRequest) -> Response:
        return await api.chat(body, http)

    @app.post("/v1/responses")
    async def responses(body: ResponsesBody, http: HttpRequest) -> Response:
        return await api.respond(body, http)

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
        if (reason := engine.problem) is not None:
            return JSONResponse({"status": "unhealthy", "reason": reason}, 503)
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
