"""A step that does not end: nobody hears of it but by a look from outside, and health, log and metrics say so."""

import logging
import threading
import time

import httpx
import pytest
from engine_texts import SMALL, alone, ask, assert_empty, options, run
from server import byte_tokenizer, served

from dsla_hf.inference.recorder import PlainRecording
from dsla_hf.serving.command import ServeOptions, load
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.engine.watchdog import Watchdog
from dsla_hf.serving.http.api import ApiOptions, build_app

BODY = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 6, "temperature": 0}
LIMIT = 0.4  # seconds


@pytest.fixture
def model(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"))


class Blocked:
    """Stands before a call of the runner, and lets nobody through while it is shut."""

    def __init__(self, engine, name="decode"):
        self.call, self.open, self.entered = getattr(engine.runner, name), threading.Event(), threading.Event()
        setattr(engine.runner, name, self)

    def __call__(self, *args):
        self.entered.set()
        assert self.open.wait(60)
        return self.call(*args)


def wait_for(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.01)


def step_seconds(address):
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return {line.split()[0]: float(line.split()[1]) for line in lines if line.startswith(("dsla_step_seconds ", "dsla_healthy "))}


def test_a_step_that_hangs_is_seen_until_it_ends(model, caplog):
    engine = Engine(model, 1, EngineOptions(slots=2, block_size=8, max_tokens=128, step_timeout=LIMIT))
    blocked = Blocked(engine)
    answers = []
    with served(build_app(engine, byte_tokenizer(), ApiOptions("tiny"))) as (_, address):
        asking = threading.Thread(target=lambda: answers.append(httpx.post(f"{address}/v1/completions", json=BODY, timeout=60)))
        asking.start()
        assert blocked.entered.wait(10)
        assert httpx.get(f"{address}/health").status_code == 200, "not yet"
        wait_for(lambda: httpx.get(f"{address}/health").status_code == 503)
        reason = httpx.get(f"{address}/health").json()["reason"]
        assert "a step of the engine has not ended" in reason and "--step-timeout 0.4" in reason
        seen = step_seconds(address)
        assert seen["dsla_healthy"] == 0 and seen["dsla_step_seconds"] >= LIMIT
        assert "has not ended" in httpx.get(f"{address}/status").json()["problem"]
        wait_for(lambda: any(record.levelno == logging.ERROR for record in caplog.records))
        time.sleep(LIMIT)
        blocked.open.set()
        asking.join(10)
        assert answers[0].status_code == 200
        wait_for(lambda: httpx.get(f"{address}/health").status_code == 200)
        assert step_seconds(address)["dsla_healthy"] == 1
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and "the server hangs" in errors[0] and "in __call__" in errors[0], "said once, and where"
    assert any("has ended, after" in record.getMessage() for record in caplog.records)


def test_the_end_does_not_wait_for_a_step_that_hangs(model):
    engine = Engine(model, 1, options(step_timeout=LIMIT))
    blocked = Blocked(engine)
    ears = ask(engine, [([5, 6], 9)] * 6)  # more than there are slots
    engine.start()
    assert blocked.entered.wait(10)
    start = time.monotonic()
    engine.stop(timeout=30)
    assert LIMIT / 2 < time.monotonic() - start < 10
    assert engine.health.fatal and engine.health.over.is_set() and "has not ended" in engine.problem
    assert all("has not ended" in str(ear.error) for ear in ears), "everyone is told"
    for ear in ears:
        ear.done.clear()  # what comes of the step now, nobody reads
    blocked.open.set()


def test_recording_and_no_limit_are_not_hanging():
    now, preparing = [0.0], [False]
    for seconds, limited in ((5.0, True), (0.0, False)):
        dog = Watchdog(seconds, lambda: preparing[0], lambda: now[0])
        with dog.step():
            now[0] += 4
            assert dog.elapsed == 4 and dog.problem is None
            preparing[0] = True
            now[0] += 100
            assert dog.problem is None
            preparing[0] = False
            now[0] += 4
            assert dog.problem is None, "its time begins anew"
            now[0] += 2
            assert (dog.problem is not None) == limited
        assert dog.elapsed == 0 and dog.problem is None


def test_a_recording_is_known_while_it_is_made(model):
    seen = []

    def record(step, pool):
        seen.append(engine.runner.preparing)
        return PlainRecording(step, pool)

    engine = Engine(model, 1, SMALL, record=record)
    assert not engine.runner.preparing and not Engine(model, 1, SMALL).runner.preparing
    ears = ask(engine, [([5, 6], 9)])
    run(engine)
    assert seen and all(seen) and not engine.runner.preparing
    assert ears[0].tokens == alone(model, [5, 6], 9, 1)
    assert_empty(engine)


def test_the_limit_comes_from_the_command(saved):
    engine = load(ServeOptions(*saved, policy="1", step_timeout=7.5))[0]
    assert engine.watchdog.seconds == 7.5
    with pytest.raises(ValueError, match="step_timeout must be a number of seconds, or 0 for none, got -1"):
        EngineOptions(step_timeout=-1)
