"""OpenTelemetry traces: what the spans of a request say, when there are none, and that nobody waits for them."""

import logging
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import entry_points

import httpx
import pytest
from server import byte_tokenizer, served

from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.http.api import ApiOptions, build_app
from dsla_hf.serving.http.traces import exporter_names, provider_from_environment

sdk = pytest.importorskip("opentelemetry.sdk.trace", reason="needs opentelemetry-sdk (pip install 'dsla-hf[otel]')")
HAS_OTLP = "otlp_proto_http" in entry_points(group="opentelemetry_traces_exporter").names
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Told:
    """Spans that have ended, and a server that tells them."""

    def __init__(self):
        from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

        self.exporter, self.provider = InMemorySpanExporter(), sdk.TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self.exporter))

    def request(self):
        """The span of the next request that ends, and the others by what they are in."""
        deadline = time.monotonic() + 20
        while not any(span.kind.name == "SERVER" for span in self.exporter.get_finished_spans()):
            assert time.monotonic() < deadline, "no request has ended"
            time.sleep(0.01)
        spans = self.exporter.get_finished_spans()
        self.exporter.clear()
        (request,) = [span for span in spans if span.kind.name == "SERVER"]
        within = {}
        for span in spans:
            if span is not request:
                within.setdefault(span.parent.span_id, []).append(span)
                assert span.context.trace_id == request.context.trace_id
        return request, within


@pytest.fixture
def told():
    return Told()


@pytest.fixture
def start(tiny_model, adapter_model, told):
    def make(policy=2, **changes):
        engine = Engine(adapter_model(tiny_model("llama")), policy, EngineOptions(slots=2, block_size=8, max_tokens=256, **changes))
        return served(build_app(engine, byte_tokenizer(), ApiOptions("tiny"), told.provider))

    return make


def ask(address, **changes):
    body = {"model": "tiny", "prompt": "Hello, layer", "max_tokens": 6, "temperature": 0, "ignore_eos": True, **changes}
    return httpx.post(f"{address}/v1/completions", json=body, headers={"traceparent": PARENT})


def test_a_request_has_its_texts_and_each_its_times(start, told):
    with start() as (_, address):
        before = time.time_ns()
        answer = ask(address, n=2, seed=5).json()
        request, within = told.request()
        after = time.time_ns()
    assert request.name == "POST /v1/completions" and request.attributes["http.response.status_code"] == 200
    assert f"{request.context.trace_id:032x}-{request.parent.span_id:016x}" == "-".join(PARENT.split("-")[1:3])
    texts = sorted(within[request.context.span_id], key=lambda span: span.attributes["dsla.choice"])
    assert [text.name for text in texts] == ["text_completion tiny"] * 2
    for number, text in enumerate(texts):
        about = text.attributes
        assert about["gen_ai.usage.input_tokens"] == answer["usage"]["prompt_tokens"] and about["gen_ai.usage.output_tokens"] == 6
        assert about["gen_ai.response.finish_reasons"] == ("length",) and about["gen_ai.request.seed"] == 5 + number
        queue, prefill, decode, level = sorted(
            within[text.context.span_id], key=lambda span: ["queue", "prefill", "decode", "level"].index(span.name)
        )
        assert before < text.start_time == queue.start_time <= queue.end_time == prefill.start_time < prefill.end_time
        assert prefill.end_time == decode.start_time < decode.end_time == text.end_time < after
        assert (level.start_time, level.end_time) == (prefill.start_time, text.end_time)
        assert (level.attributes["dsla.level"], level.attributes["dsla.tokens"]) == (2, len("Hello, layer"))


def test_levels_and_cancelled_texts(start, told):
    """The level rises once the text has begun, and then its client leaves."""
    rise = threading.Event()
    waits = {"hold": 0.0, "busy_hold": 0.0, "cool_down": 0.0}
    with start(lambda stats: 3 if rise.is_set() else 1, **waits) as (server, address):
        body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 230, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as stream:
            lines = stream.iter_lines()
            while '"content": ""' in (line := next(lines)) or not line.startswith("data"):
                pass
            rise.set()
            while server.engine.control.level != 3:
                next(lines)
        request, within = told.request()
    (text,) = within[request.context.span_id]
    assert text.name == "chat tiny" and text.attributes["gen_ai.response.finish_reasons"] == ("cancelled",)
    assert 0 < text.attributes["gen_ai.usage.output_tokens"] < 230 and request.parent is None
    first, second = (span for span in within[text.context.span_id] if span.name == "level")
    assert [span.attributes["dsla.level"] for span in (first, second)] == [1, 3] and first.end_time == second.start_time
    assert first.attributes["dsla.tokens"] < second.attributes["dsla.tokens"]


def test_what_fails_and_what_is_refused(start, told, monkeypatch):
    with start() as (server, address):
        assert ask(address, max_tokens=-1).status_code == 400
        request, within = told.request()
        assert request.attributes["http.response.status_code"] == 400 and not within and request.status.is_unset
        monkeypatch.setattr(server.engine.runner, "prefill", lambda *args: 1 / 0)
        assert ask(address).status_code == 500
        request, within = told.request()
        (text,) = within[request.context.span_id]
        assert not request.status.is_ok and not request.status.is_unset and text.attributes["error.type"] == "ZeroDivisionError"
        assert text.attributes["gen_ai.response.finish_reasons"] == ("error",) and "division by zero" in text.status.description
        for path in ("health", "metrics", "v1/models"):
            httpx.get(f"{address}/{path}")
        monkeypatch.undo()
        assert ask(address).status_code == 200
        assert told.request()[0].name == "POST /v1/completions"  # those before it have none


def test_answers_do_not_fail_for_their_traces(start, told, monkeypatch, caplog):
    monkeypatch.setattr("dsla_hf.serving.http.traces._about", lambda *args: 1 / 0)
    with start() as (_, address), caplog.at_level(logging.ERROR):
        assert ask(address).status_code == 200
        request, within = told.request()
    assert not within and "a trace could not be told" in caplog.text


def test_spans_that_are_not_sampled_are_not_made(tiny_model, adapter_model, told, monkeypatch):
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    monkeypatch.setattr("dsla_hf.serving.http.traces._about", lambda *args: 1 / 0)
    engine = Engine(adapter_model(tiny_model("llama")), 2, EngineOptions(slots=2, block_size=8, max_tokens=256))
    with served(build_app(engine, byte_tokenizer(), ApiOptions("tiny"), sdk.TracerProvider(sampler=ALWAYS_OFF))) as (_, address):
        assert ask(address).status_code == 200


def test_without_a_word_of_the_environment_nothing_is_imported():
    """opentelemetry's API comes with FastAPI; its SDK and exporters come with traces."""
    code = """
import sys
from dsla_hf.serving.http.traces import provider_from_environment
import dsla_hf.serving.command
assert provider_from_environment({}) is None
assert provider_from_environment({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}) is None
print([name for name in sys.modules if name.startswith(("opentelemetry.sdk", "opentelemetry.exporter"))])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({}, []),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, ["otlp_proto_http"]),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://c:4318/v1/traces"}, ["otlp_proto_http"]),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4317", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}, ["otlp_proto_grpc"]),
        ({"OTEL_TRACES_EXPORTER": "console, otlp"}, ["console", "otlp_proto_http"]),
        ({"OTEL_TRACES_EXPORTER": "console", "OTEL_SDK_DISABLED": "true"}, []),
        ({"OTEL_SERVICE_NAME": "mine"}, []),
    ],
)
def test_the_environment_says_which_exporters(environment, names):
    assert exporter_names(environment) == names


def test_what_cannot_be_had_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="OTEL_EXPORTER_OTLP_PROTOCOL must be one of http/protobuf, grpc, got 'carrier pigeon'"):
        provider_from_environment({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier pigeon"})
    with pytest.raises(ValueError, match=r"no exporter 'zipkin' of traces here, only .*console.*pip install 'dsla-hf\[otel\]'"):
        provider_from_environment({"OTEL_TRACES_EXPORTER": "zipkin"})
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ValueError, match="opentelemetry-sdk is missing: pip install"):
        provider_from_environment({"OTEL_TRACES_EXPORTER": "console"})


def test_a_service_has_a_name(monkeypatch):
    for changes, name in (
        ({}, "dsla-serve"),
        ({"OTEL_SERVICE_NAME": "mine"}, "mine"),
        ({"OTEL_RESOURCE_ATTRIBUTES": "service.name=ours,a=b"}, "ours"),
    ):
        environment = {"OTEL_TRACES_EXPORTER": "console", **changes}
        with monkeypatch.context() as patch:
            for variable, value in environment.items():
                patch.setenv(variable, value)
            provider = provider_from_environment(environment)
        assert provider.resource.attributes["service.name"] == name
        provider.shutdown()


@pytest.mark.skipif(not HAS_OTLP, reason="needs opentelemetry-exporter-otlp-proto-http (pip install 'dsla-hf[otel]')")
def test_a_collector_hears_of_requests_and_one_that_is_away_holds_nobody_up(tiny_model, adapter_model, monkeypatch):
    heard = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            heard.append((self.path, self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *args):
            pass

    collector = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=collector.serve_forever, daemon=True).start()
    for port in (collector.server_address[1], 9):
        address = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{port}", "OTEL_EXPORTER_OTLP_TIMEOUT": "2"}
        for variable, value in address.items():
            monkeypatch.setenv(variable, value)
        engine = Engine(adapter_model(tiny_model("llama")), 2, EngineOptions(slots=2, block_size=8, max_tokens=256))
        with served(build_app(engine, byte_tokenizer(), ApiOptions("tiny"), provider_from_environment(address))) as (_, url):
            start = time.monotonic()
            assert ask(url).status_code == 200 and time.monotonic() - start < 10
    collector.shutdown()
    assert [path for path, _ in heard] == ["/v1/traces"] and b"text_completion tiny" in heard[0][1] and b"dsla-serve" in heard[0][1]


def test_dry_runs_say_where_traces_go(saved, monkeypatch, capsys):
    from dsla_cli import main

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["serve", saved[0], "--adapter", saved[1], "--dry-run", "--port", str(port)]
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    assert main(words) in (0, None)
    assert "traces           by console" in capsys.readouterr().out
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "smoke")
    assert main(words) not in (0, None)
    assert "there is no exporter 'smoke'" in capsys.readouterr().err
