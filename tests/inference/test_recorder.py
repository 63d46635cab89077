"""Recording and replaying, apart from any model: rehearsals, failures, tries, keys that are dropped."""

import logging

import pytest
import torch

from dsla_hf.inference import recorder as module
from dsla_hf.inference.recorder import PlainRecording, Recorder, power_of_two, shown_tokens


class Model:
    device = torch.device("cpu")


class Steps:
    """Counts runs, and fails to record while `error` is set."""

    def __init__(self):
        self.runs, self.tried, self.error = [], [], None
        self.recorder = Recorder(Model(), self.record, for_memory="buy some")

    def record(self, step, pool):
        self.tried.append(step)
        if self.error is not None:
            raise self.error
        return PlainRecording(step)

    def run(self, key="a", times=1):
        return [self.recorder.run(key, lambda: self.runs.append(key)) for _ in range(times)]

    def prepare(self, key="a"):
        return self.recorder.prepare(key, lambda: self.runs.append(key))


@pytest.fixture
def steps(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 4)
    return Steps()


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def test_a_step_is_rehearsed_recorded_and_replayed(steps):
    assert steps.run(times=4) == [True, False, False, False]
    assert len(steps.tried) == 1 and steps.runs == ["a"] * 4  # the recording itself runs nothing
    assert (steps.recorder.replayed, steps.recorder.plain) == (3, 0) and len(steps.recorder.capture_seconds) == 1
    assert steps.run("b") == [True] and steps.recorder.reason is None


def test_prepared_steps_are_replayed_at_once(steps):
    assert steps.prepare() and steps.prepare()
    assert steps.runs == ["a"] and len(steps.tried) == 1
    assert steps.run() == [False] and steps.recorder.replayed == 1


def test_what_cannot_be_recorded_runs_as_it_is_and_other_keys_are_tried(steps, caplog):
    steps.error = RuntimeError("not permitted\nmore")
    steps.run(times=50)
    assert len(steps.tried) == 1 and steps.runs == ["a"] * 50 and steps.recorder.plain == 49
    assert caplog.text.count("cannot be recorded (not permitted): it runs as it is") == 1 and steps.recorder.reason == "not permitted"
    steps.run("b", times=3)
    assert len(steps.tried) == 2 and len(caplog.records) == 1, "the same reason is said once"
    steps.error = None
    steps.run("c", times=2)
    assert list(steps.recorder.recordings) == ["c"]
    assert not steps.prepare() and len(steps.tried) == 3
    steps.recorder.try_again()
    steps.run()
    assert set(steps.recorder.recordings) == {"a", "c"}


def test_without_memory_it_is_tried_again_later(steps, caplog):
    steps.error = NO_MEMORY
    steps.run(times=2)
    steps.run("b", times=3)
    assert len(steps.tried) == 1, "no other key is tried meanwhile"
    assert "Tried again after 4 such steps; for more memory buy some" in caplog.text
    steps.error = None
    steps.run(times=3)
    assert len(steps.tried) == 2 and "a" in steps.recorder.recordings
    steps.run("b")
    assert set(steps.recorder.recordings) == {"a", "b"} and len(caplog.records) == 1


def test_tries_without_memory_end(steps, caplog):
    steps.error = NO_MEMORY
    steps.run(times=100)
    assert len(steps.tried) == 3 and len(caplog.records) == 3 and "try 3 of 3" in caplog.text
    assert len(steps.runs) == 100
    steps.error = None
    steps.recorder.try_again()
    assert steps.prepare()


def test_a_lack_of_memory_behind_the_error_that_ends_a_capture(steps, caplog):
    try:
        try:
            raise NO_MEMORY
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")
    except RuntimeError as error:
        steps.error = error
    steps.run(times=2)
    assert "memory does not suffice" in caplog.text


def test_a_rehearsal_that_fails(steps, caplog):
    """In a step that is needed it is the caller's error; in one that was to be prepared it is not."""

    def fail():
        raise NO_MEMORY

    with pytest.raises(torch.OutOfMemoryError):
        steps.recorder.run("a", fail)
    assert steps.run(times=2) == [True, False] and "a" in steps.recorder.recordings
    assert not steps.recorder.prepare("b", fail) and steps.recorder.plain == 1
    assert "memory does not suffice" in caplog.text


def test_dropped_keys_begin_anew_and_what_failed_may_find_their_memory(steps):
    steps.prepare("a")
    steps.error = NO_MEMORY
    steps.run("b", times=2)
    steps.error = None
    steps.recorder.drop(lambda key: key == "a")
    assert steps.run("b") == [False] and list(steps.recorder.recordings) == ["b"]
    assert steps.run("a") == [True]
    steps.recorder.clear()
    assert not steps.recorder.recordings and steps.run("b") == [True]


def test_the_error_itself_is_in_the_log_of_details(steps, caplog):
    steps.error = RuntimeError("not permitted")
    with caplog.at_level(logging.DEBUG, module.__name__):
        steps.run(times=2)
    assert [record.exc_info[1] for record in caplog.records if record.levelno == logging.DEBUG] == [steps.error]


def test_rounding(monkeypatch):
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 1024, 1025)] == [1, 2, 4, 4, 8, 1024, 2048]
    assert [shown_tokens(n) for n in (0, 1, 256, 257, 1000)] == [256, 256, 256, 512, 1024]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_after_a_capture_that_failed_streams_and_random_numbers_work():
    class OnGpu:
        device = torch.device("cuda")

    recorder, x = Recorder(OnGpu(), fuse=False), torch.zeros(4, device="cuda")

    def waits():
        x.add_(1)
        x.sum().item()

    stream = torch.cuda.current_stream()
    for _ in range(3):
        recorder.run("waits", waits)
    assert recorder.reason is not None and torch.cuda.current_stream() == stream
    for _ in range(3):
        recorder.run("does not", lambda: x.add_(1))
    assert recorder.replayed == 2 and x.tolist() == [6.0] * 4
    torch.rand(4, device="cuda")
