"""Health that is true: what fails again and again, what nothing helps against but a new process, and how clients and supervisors see it."""

import socket
import threading
import time

import httpx
import pytest
import torch
from engine_texts import SMALL, ask, assert_empty, run
from server import byte_tokenizer, served

from dsla_hf.serving import command
from dsla_hf.serving.engine.engine import Draining, Engine, EngineOptions
from dsla_hf.serving.engine.health import FAILURES, STICKY, Health, is_sticky
from dsla_hf.serving.engine.runner import ModelRunner
from dsla_hf.serving.http.api import ApiOptions, build_app

ASSERT = "CUDA error: device-side assert triggered\nCUDA kernel errors might be asynchronously reported"
BODY = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0}


@pytest.fixture
def model(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"))


@pytest.fixture
def server(model):
    engine = Engine(model, 1, EngineOptions(slots=2, block_size=8, max_tokens=128))
    with served(build_app(engine, byte_tokenizer(), ApiOptions("tiny"))) as (server, address):
        yield server, address


def fails(error):
    def call(*args):
        raise error

    return call


def value(address, metric):
    lines = [line for line in httpx.get(f"{address}/metrics").text.splitlines() if line.startswith(metric + " ")]
    return float(lines[0].split()[-1])


# --- errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", STICKY)
def test_sticky_errors_are_known_whoever_tells_them(words):
    assert is_sticky(torch.AcceleratorError(f"CUDA error: {words}\nCompile with `TORCH_USE_CUDA_DSA`"))
    assert is_sticky(RuntimeError(f"Triton Error [CUDA]: {words}")) and is_sticky(RuntimeError(f"HIP error: {words.upper()}"))
    outer = ValueError("a step failed")
    outer.__cause__ = RuntimeError(f"CUDA error: {words}")
    assert is_sticky(outer)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("broken"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: invalid configuration argument"),
        ValueError("the prompt says: device-side assert triggered"),
    ],
)
def test_other_errors_are_not_sticky(error):
    assert not is_sticky(error)


def test_health_goes_by_what_failed_in_a_row():
    health = Health()
    for _ in range(FAILURES - 1):
        health.failed("decode", RuntimeError("broken\nin detail"))
    assert health.problem is None
    health.succeeded("prefill")  # says nothing of decode
    health.failed("decode", RuntimeError("broken\nin detail"))
    assert health.problem == f"decode failed {FAILURES} times in a row: RuntimeError: broken"
    health.succeeded("decode")
    assert health.problem is None and health.failed_steps == FAILURES and not health.fatal
    health.failed("prefill", RuntimeError(ASSERT))
    assert health.fatal and "device-side assert" in health.problem
    health.succeeded("prefill")
    assert health.problem is not None, "nothing helps against it"


# --- the engine -------------------------------------------------------------------------------------------------


def test_an_engine_whose_steps_fail_is_unhealthy_until_one_succeeds(model, monkeypatch):
    engine = Engine(model, 1, SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "decode", fails(RuntimeError("broken")))
        for _ in range(FAILURES):
            assert engine.problem is None
            ask(engine, [([5, 6], 4)])
            run(engine)
        assert "decode failed 3 times in a row: RuntimeError: broken" in engine.problem
    ask(engine, [([5, 6], 4)])
    run(engine)
    snapshot = engine.snapshot()
    assert snapshot["problem"] is None and snapshot["failed_steps"] == FAILURES
    assert_empty(engine)


@pytest.mark.parametrize("where", ["decode", "prefill", "_admit"])
def test_after_a_sticky_error_everyone_is_told_and_nobody_let_in(model, monkeypatch, where):
    engine = Engine(model, 1, SMALL)
    ears = ask(engine, [([5, 6], 9)] * 6)  # more than there are slots
    monkeypatch.setattr(engine if where == "_admit" else engine.runner, where, fails(RuntimeError(ASSERT)))
    monkeypatch.setattr(engine.memory, "release", fails(RuntimeError(ASSERT)))  # the device may not be touched again
    engine.start()
    for ear in ears:
        assert ear.done.wait(10) and ear.error is not None
    assert engine.health.over.wait(10) and not engine.busy and engine.finished["error"] == 6
    with pytest.raises(Draining):
        engine.submit([5, 6], 3, lambda event: None)
    assert "device-side assert" in engine.problem
    engine.stop(timeout=5)


def test_a_thread_that_dies_leaves_nobody_waiting(model, monkeypatch):
    engine = Engine(model, 1, SMALL)
    monkeypatch.setattr(engine, "step", fails(SystemExit("gone")))
    (ear,) = ask(engine, [([5, 6], 9)])
    engine.start()
    assert ear.done.wait(10) and "SystemExit: gone" in str(ear.error) and "SystemExit: gone" in engine.problem
    engine.stop(timeout=5)


def test_a_text_that_is_stopped_counts_as_such(model):
    engine = Engine(model, 1, SMALL)
    stopped, left, both = ask(engine, [([5, 6], 50), ([7, 8], 50), ([9], 50)])
    engine.step()
    engine.cancel(stopped.request, stopped=True)
    engine.cancel(stopped.request)  # as the server does when an answer is over
    engine.cancel(left.request)
    engine.cancel(both.request)
    engine.cancel(both.request, stopped=True)  # too late: nobody reads it
    run(engine)
    assert engine.finished == {"stop": 1, "length": 0, "cancelled": 2, "error": 0}
    assert (stopped.finish, left.finish, both.finish) == ("stop", "cancelled", "cancelled")


# --- over HTTP --------------------------------------------------------------------------------------------------


def test_health_and_metrics_say_what_fails_and_when_it_works_again(server, monkeypatch):
    running, address = server
    assert httpx.get(f"{address}/health").status_code == 200 and value(address, "dsla_healthy") == 1
    with monkeypatch.context() as patch:
        patch.setattr(running.engine.runner, "prefill", fails(RuntimeError("broken")))
        for _ in range(FAILURES):
            assert httpx.post(f"{address}/v1/completions", json=BODY).status_code == 500
        health = httpx.get(f"{address}/health")
        assert health.status_code == 503 and health.json()["reason"] == "prefill failed 3 times in a row: RuntimeError: broken"
        assert value(address, "dsla_healthy") == 0 and value(address, "dsla_failed_steps_total") == FAILURES
        assert httpx.get(f"{address}/status").json()["problem"] == health.json()["reason"]
    assert httpx.post(f"{address}/v1/completions", json=BODY).status_code == 200
    assert httpx.get(f"{address}/health").json() == {"status": "ok"} and value(address, "dsla_healthy") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_answers_that_end_at_a_stop_string_are_stops(server, stream):
    running, address = server
    text = httpx.post(f"{address}/v1/completions", json={**BODY, "max_tokens": 20}).json()["choices"][0]["text"]
    body = {**BODY, "max_tokens": 100, "stop": text[5:8], "stream": stream}
    assert '"stop"' in httpx.post(f"{address}/v1/completions", json=body).text
    deadline = time.monotonic() + 10
    while running.engine.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running.engine.finished == {"stop": 1, "length": 1, "cancelled": 0, "error": 0}
    assert value(address, 'vllm:request_success_total{finished_reason="stop",model_name="tiny"}') == 1
    assert value(address, 'vllm:request_success_total{finished_reason="abort",model_name="tiny"}') == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_in_the_last_token_is_a_stop(server, stream):
    running, address = server
    text = httpx.post(f"{address}/v1/completions", json={**BODY, "max_tokens": 20}).json()["choices"][0]["text"]
    stop = text[6:8]
    tokens = text.index(stop) + len(stop)  # each is a character
    for asked, finish in ((tokens, "stop"), (tokens - 1, "length")):
        before = dict(running.engine.finished)
        body = {**BODY, "max_tokens": asked, "stop": stop, "stream": stream}
        assert f'"{finish}"' in httpx.post(f"{address}/v1/completions", json=body).text
        assert {name: count - before[name] for name, count in running.engine.finished.items() if count > before[name]} == {finish: 1}
    assert not running.engine.busy and not running.engine._unsettled


def test_a_server_ends_with_its_engine(model, monkeypatch):
    engine = Engine(model, 1, EngineOptions(slots=2, block_size=8, max_tokens=128))
    monkeypatch.setattr(engine.runner, "decode", fails(RuntimeError(ASSERT)))
    with served(build_app(engine, byte_tokenizer(), ApiOptions("tiny"))) as (server, address):
        assert httpx.post(f"{address}/v1/completions", json=BODY).status_code == 500
        deadline = time.monotonic() + 10
        while not server.should_exit and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.should_exit and engine.health.fatal


def test_the_process_ends_with_a_code_that_a_supervisor_sees(tmp_path, tiny_model, adapter_model, monkeypatch):
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "tiny")
    byte_tokenizer().save_pretrained(tmp_path / "tiny")
    adapter_model(base).save_pretrained(tmp_path / "adapter")
    codes = []
    monkeypatch.setattr(command.os, "_exit", codes.append)
    monkeypatch.setattr(ModelRunner, "decode", fails(RuntimeError("CUDA error: an illegal memory access was encountered")))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = command.ServeOptions(str(tmp_path / "tiny"), str(tmp_path / "adapter"), policy="1")
    serving = threading.Thread(target=command.serve, args=(options,), kwargs={"port": port}, daemon=True)
    serving.start()
    deadline = time.monotonic() + 60
    while True:
        try:
            assert httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=BODY, timeout=30).status_code == 500
            break
        except httpx.TransportError:
            assert time.monotonic() < deadline and serving.is_alive()
            time.sleep(0.05)
    serving.join(30)
    assert not serving.is_alive() and codes == [command.EXIT_CODE]


# --- metrics ----------------------------------------------------------------------------------------------------


def test_figures_under_vllms_names(server):
    _, address = server
    assert httpx.post(f"{address}/v1/completions", json=BODY).status_code == 200
    model = '{model_name="tiny"}'
    for name, expected in (
        ("vllm:num_requests_running", 0),
        ("vllm:num_requests_waiting", 0),
        ("vllm:kv_cache_usage_perc", 0),
        ("vllm:prompt_tokens_total", 3),
        ("vllm:generation_tokens_total", 6),
        ("vllm:time_to_first_token_seconds_count", 1),
        ("vllm:inter_token_latency_seconds_count", 5),
        ("vllm:request_time_per_output_token_seconds_count", 1),
        ("vllm:e2e_request_latency_seconds_count", 1),
    ):
        assert value(address, name + model) == expected, name
    assert value(address, 'vllm:request_success_total{finished_reason="length",model_name="tiny"}') == 1
    assert value(address, 'vllm:inter_token_latency_seconds_bucket{le="+Inf",model_name="tiny"}') == 5
    assert 0 < value(address, f"vllm:inter_token_latency_seconds_sum{model}") < 10
