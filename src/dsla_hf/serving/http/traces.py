"""OpenTelemetry traces: what became of a request, and of each of its texts in the queue, in prefill, while decoding and at which level.

OpenTelemetry is imported only where traces are asked for.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from .answers import Choice

logger = logging.getLogger(__name__)

OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
}  # of the routes that are traced
CHOICES = "dsla.choices"  # in the scope of a request that is traced
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL_EXPORTERS = {"http/protobuf": "otlp_proto_http", "grpc": "otlp_proto_grpc"}
HOW = "pip install 'dsla-hf[otel]', or set OTEL_TRACES_EXPORTER=none"


def exporter_names(environment: Mapping[str, str]) -> list[str]:
    """The exporters that the environment asks for, by their names in the entry points `opentelemetry_traces_exporter`; none unless
    `OTEL_TRACES_EXPORTER` or an endpoint of OTLP is set.

    Raises:
        ValueError: for a protocol of OTLP that there is not.
    """
    endpoint = any(environment.get(name) for name in ENDPOINTS)
    asked = environment.get("OTEL_TRACES_EXPORTER") or ("otlp" if endpoint else "none")
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    names = [name.strip() for name in asked.split(",")]
    if "otlp" in names:
        variable = next((name for name in PROTOCOLS if environment.get(name)), PROTOCOLS[-1])
        protocol = environment.get(variable) or "http/protobuf"
        if protocol not in PROTOCOL_EXPORTERS:
            raise ValueError(f"{variable} must be one of {', '.join(PROTOCOL_EXPORTERS)}, got {protocol!r}")
        names = [PROTOCOL_EXPORTERS[protocol] if name == "otlp" else name for name in names]
    return [name for name in names if name not in ("", "none")]


def provider_from_environment(environment: Mapping[str, str] = os.environ) -> Any | None:
    """What makes spans and sends them to where the `OTEL_*` variables say, None where they ask for no traces. Samplers, batches, resources,
    endpoints, headers and time limits are those of OpenTelemetry's SDK, which reads their variables from the process's environment.

    Raises:
        ValueError: if traces are asked for and a package for them is missing, or a value is none that there is.
    """
    names = exporter_names(environment)
    if not names:
        return None
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise ValueError(f"the environment asks for traces ({', '.join(names)}), and opentelemetry-sdk is missing: {HOW}") from None
    exporters = [_exporter(name) for name in names]
    named = environment.get("OTEL_SERVICE_NAME") or "service.name=" in environment.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = TracerProvider(resource=Resource.create({} if named else {"service.name": "dsla-serve"}))
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _exporter(name: str) -> Any:
    found = next(iter(entry_points(group="opentelemetry_traces_exporter", name=name)), None)
    if found is None:
        known = sorted(entry_points(group="opentelemetry_traces_exporter").names)
        raise ValueError(f"there is no exporter {name!r} of traces here, only {', '.join(known) or 'none'}: {HOW}")
    return found.load()()


def note_choices(scope: Any, choices: Sequence[Choice]) -> None:
    """Let the trace of a request, if it has one, tell of these texts."""
    scope.get(CHOICES, []).extend(choices)


class Traces:
    """ASGI middleware: a span for each request of a route that generates, child of what its `traceparent` names; in it a span for each of
    its texts, with `queue`, `prefill`, `decode` and a `level` for each level it had. Names of attributes are OpenTelemetry's for generative
    AI where there are any.

    Args:
        provider: OpenTelemetry's `TracerProvider`. model: its name. clock: of the engine, seconds.
    """

    def __init__(self, app: Any, provider: Any, model: str, clock: Callable[[], float]):
        self.app, self.model, self.clock = app, model, clock
        self.tracer = provider.get_tracer("dsla_hf.serving")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in OPERATIONS:
            await self.app(scope, receive, send)
            return
        from opentelemetry import propagate, trace

        # What is around this one goes before what the client says: it has heard the client, too.
        within = trace.get_current_span().get_span_context().is_valid
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        about = {
            "http.request.method": scope["method"],
            "http.route": scope["path"],
            "gen_ai.operation.name": OPERATIONS[scope["path"]],
            "gen_ai.request.model": self.model,
        }
        context = None if within else propagate.extract(headers)
        span = self.tracer.start_span(f"POST {scope['path']}", context, trace.SpanKind.SERVER, about)
        choices: list[Choice] = []

        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(trace.StatusCode.ERROR)
            await send(message)

        try:
            await self.app({**scope, CHOICES: choices}, receive, noting)
        finally:
            try:
                if span.is_recording():
                    for choice in choices:
                        self._tell(choice, span, OPERATIONS[scope["path"]])
            except Exception:  # an answer does not fail for what is told of it
                logger.exception("a trace could not be told")
            span.end()

    def _tell(self, choice: Choice, parent: Any, operation: str) -> None:
        """The spans of a text."""
        from opentelemetry import trace

        request, now = choice.request, self.clock()
        zero = time.time_ns() - int(1e9 * now)  # of the engine's clock

        def at(seconds: float) -> int:
            return zero + int(1e9 * seconds)

        end = now if request.finished is None else request.finished
        context = trace.set_span_in_context(parent)
        text = self.tracer.start_span(
            f"{operation} {self.model}", context, attributes=dict(_about(choice, operation, self.model)), start_time=at(request.arrived)
        )
        if choice.error is not None:
            text.set_status(trace.StatusCode.ERROR, str(choice.error))
            text.set_attribute("error.type", type(choice.error).__name__)
        within = trace.set_span_in_context(text)

        def stretch(name: str, start: float, stop: float, **attributes: Any) -> None:
            self.tracer.start_span(name, within, attributes=attributes, start_time=at(start)).end(at(max(start, stop)))

        times = list(request.level_times)
        stretch("queue", request.arrived, times[0] if times else end)
        if times:
            first = request.first_token
            stretch("prefill", times[0], end if first is None else first, **{"dsla.reused_tokens": request.reused})
            if first is not None:
                stretch("decode", first, end)
            for (tokens, level), start, stop in zip(request.levels, times, [*times[1:], end], strict=False):
                stretch("level", start, stop, **{"dsla.level": level, "dsla.tokens": tokens})
        text.end(at(end))


def _about(choice: Choice, operation: str, model: str) -> Iterator[tuple[str, Any]]:
    """What a text's span has for attributes."""
    sampling = choice.sampling
    yield "gen_ai.operation.name", operation
    yield "gen_ai.request.model", model
    yield "gen_ai.request.max_tokens", choice.wanted
    yield "gen_ai.request.temperature", sampling.temperature
    yield "gen_ai.request.top_p", sampling.top_p
    if sampling.top_k:
        yield "gen_ai.request.top_k", sampling.top_k
    if sampling.seed is not None:
        yield "gen_ai.request.seed", sampling.seed
    yield "gen_ai.usage.input_tokens", len(choice.prompt)
    yield "gen_ai.usage.output_tokens", choice.counted
    yield "gen_ai.response.finish_reasons", [choice.finish or ("cancelled" if choice.error is None else "error")]
    yield "dsla.choice", choice.index
