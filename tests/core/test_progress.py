"""What is shown of long work: bars on terminals only, a training on one line."""

import io
import sys
from types import SimpleNamespace

import pytest

from dsla_hf.core import progress
from dsla_hf.core.progress import TrainingProgress, duration, summary


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal, rank, shown", [(True, "0", True), (True, "1", False), (False, "0", False)])
def test_bars_are_for_terminals_and_of_the_first_process(terminal, rank, shown, monkeypatch):
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("RANK", rank)
    assert list(progress.bar(range(3), desc="counting")) == [0, 1, 2]
    assert ("counting" in stream.getvalue()) == shown
    assert list(progress.bar(range(3), desc="silent", shown=False)) == [0, 1, 2] and "silent" not in stream.getvalue()


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (99, "99 s"), (120, "2 min"), (5940, "99 min"), (12000, "3 h 20 min")])
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text


def test_summary_names_the_worst_layer_or_the_level():
    half_lives = {"half_life/history/layer_3": 4000.0}
    layers = {"alignment/layer_0": 0.2, "alignment/layer_11": 0.6, "alignment/layer_3": 0.1}
    assert summary({"loss": 0.3, **layers, **half_lives}) == "loss 0.3 (worst: layer 11, 0.6)"
    assert summary({"loss": 0.123456, "kl": 0.123456, "level": 4.25, **half_lives}) == "KL 0.1235, level 4.25"


def steps(callback, clock, count, logging_steps=10):
    """Run the callback through so many steps of two seconds and 1000 tokens."""
    args, state = SimpleNamespace(logging_steps=logging_steps), SimpleNamespace(global_step=0, max_steps=40)
    callback.on_train_begin(args, state, None)
    for step in range(1, count + 1):
        clock[0] += 60 if step == 1 else 2  # the first step is no measure
        callback.tokens += 1000
        state.global_step = step
        callback.on_step_end(args, state, None)
        if step % logging_steps == 0:
            callback.on_log(args, state, None, logs={"loss": 0.5, "kl": 0.5, "level": 3.0, "half_life/history/layer_3": 4000.0})
    callback.on_log(args, state, None, logs={"train_runtime": 3.0})
    callback.on_train_end(args, state, None)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_lines_say_tokens_per_second_of_all_processes_and_the_time_left(clock, capsys):
    steps(TrainingProgress("logits", processes=2), clock, 20)
    assert capsys.readouterr().err.splitlines() == [
        "logits: step 3 of 40, 1,000 tokens/s, 74 s left",
        "logits: step 10 of 40, KL 0.5, level 3, 1,000 tokens/s, 60 s left",
        "logits: step 20 of 40, KL 0.5, level 3, 1,000 tokens/s, 40 s left",
    ]


def test_on_a_terminal_the_line_is_a_bar(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    steps(TrainingProgress("logits"), clock, 20)
    shown = sys.stderr.getvalue()
    assert "logits  50%" in shown and "20/40, KL 0.5, level 3, 500 tokens/s, 40 s left" in shown and "half_life" not in shown
    monkeypatch.setattr(sys, "stderr", Terminal())
    steps(TrainingProgress("logits", disable_bar=True), clock, 20)  # --disable_tqdm true
    assert "%" not in sys.stderr.getvalue() and "step 20 of 40" in sys.stderr.getvalue()
