"""The level of a server: raises at once, lowers with hysteresis and cool-down, every change with its reason."""

import logging

import pytest

from dsla_hf import Load, Stats
from dsla_hf.serving.control import LevelControl, in_words

QUIET = {"prompt_tokens": 10, "tokens": 20, "rows": 2, "max_level": 8, "num_layers": 8}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def follow(control, asked, seconds, clock, step=0.5, rows=0):
    """Ask every half second for so long, while so many texts run; the level at the end."""
    for _ in range(round(seconds / step)):
        clock.now += step
        level, reason = control.wanted(Stats(level=control.level, **QUIET | {"rows": rows}))
        if level != control.level:
            control.change(level, reason)
    return control.level


def test_raises_come_at_once_and_lower_levels_late():
    clock, asked = Clock(), [4]
    control = LevelControl(lambda stats: asked[0], lowest=0, highest=6, hold=2.0, cool_down=5.0, clock=clock)
    assert follow(control, asked, 0.5, clock) == 4
    asked[0] = 1
    assert follow(control, asked, 4.5, clock) == 4, "cool-down"
    asked[0] = 4
    follow(control, asked, 0.5, clock)
    asked[0] = 1
    assert follow(control, asked, 2.0, clock) == 4, "not without a break"
    assert follow(control, asked, 0.5, clock) == 1
    asked[0] = 8
    assert follow(control, asked, 0.5, clock) == 6, "not above the highest"


def test_while_texts_run_a_lower_level_waits_longer():
    clock, asked = Clock(), [4]
    control = LevelControl(lambda stats: asked[0], lowest=0, highest=6, hold=2.0, busy_hold=8.0, cool_down=0.0, clock=clock)
    assert follow(control, asked, 0.5, clock, rows=2) == 4
    asked[0] = 1
    assert follow(control, asked, 8.0, clock, rows=2) == 4
    assert follow(control, asked, 0.5, clock, rows=2) == 1
    asked[0] = 4
    follow(control, asked, 0.5, clock)
    asked[0] = 1
    assert follow(control, asked, 2.5, clock, rows=2) == 4
    assert follow(control, asked, 0.5, clock, rows=0) == 1, "they have ended: nothing has to be waited for any more"


def test_changes_are_logged_with_their_reason(caplog):
    clock = Clock()
    control = LevelControl(Load(queue_depth=4), lowest=0, highest=8, clock=clock)
    with caplog.at_level(logging.INFO, logger="dsla_hf"):
        level, reason = control.wanted(Stats(level=0, queue_depth=5, seconds_to_first_token=1.5, **QUIET))
        control.change(level, reason)
    assert level == 1 and "queue_depth 5 ≥ 4" in reason and "first token 1.5 s" in reason
    assert reason in caplog.text and control.changes[-1].reason == reason


@pytest.mark.parametrize(
    "seconds, words", [(None, "unknown"), (0.00831, "8.3 ms"), (0.25, "250 ms"), (1.42, "1.4 s"), (42.0, "42 s"), (1400.0, "23 min")]
)
def test_times_are_written_for_people(seconds, words):
    assert in_words(seconds) == words


def test_large_figures_of_a_reason_are_written_out():
    control = LevelControl(Load(waiting_tokens=10_000), lowest=0, highest=8, clock=Clock())
    reason = control.wanted(Stats(level=0, waiting_tokens=2_345_678, seconds_to_first_token=1400.0, **QUIET))[1]
    assert "waiting_tokens 2,345,678 ≥ 10,000" in reason and "first token 23 min" in reason and "e+" not in reason


def test_levels_that_there_are_not_are_an_error():
    control = LevelControl(lambda stats: 9, lowest=0, highest=8, clock=Clock())
    with pytest.raises(ValueError, match="asked for level 9"):
        control.wanted(Stats(level=0, **QUIET))
    for name in ("hold", "busy_hold", "cool_down"):
        with pytest.raises(ValueError, match=f"^{name} must be 0 seconds or more, got -1"):
            LevelControl(lambda stats: 0, lowest=0, highest=8, **{name: -1}, clock=Clock())


@pytest.mark.parametrize(
    "figure, threshold",
    [
        ({"waiting_tokens": 9000}, {"waiting_tokens": 8192}),
        ({"free_share": 0.05}, {"free_share": 0.1}),
        ({"seconds_to_first_token": 2.5}, {"seconds_to_first_token": 2.0}),
        ({"seconds_per_token": 0.2}, {"seconds_per_token": 0.1}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_load_heeds_what_a_server_measures(figure, threshold):
    policy = Load(**threshold, step=2)
    loaded = Stats(level=3, **figure, **QUIET)
    assert policy(loaded) == 5 and next(iter(figure)) in policy.why(loaded)
    assert Load()(loaded) == 2, "no threshold, no raise"
    (name, limit), *_ = threshold.items()
    close = Stats(level=3, **{name: limit * (1.5 if name == "free_share" else 0.9)}, **QUIET)
    assert policy(close) == 3, "neither over the threshold nor below the release"
    assert policy(Stats(level=3, **QUIET)) == 1


def test_levels_between_those_of_a_ladder_are_rounded_down_and_said_once(caplog):
    asked = [5]
    control = LevelControl(lambda stats: asked[0], lowest=0, highest=8, ladder=[0, 4, 8], clock=lambda: 0.0)
    assert control.wanted(Stats(level=0, **QUIET))[0] == 4
    asked[0] = 7
    assert control.wanted(Stats(level=0, **QUIET))[0] == 4
    assert caplog.text.count("level 5 is not among those in use, [0, 4, 8]: 4 is taken") == 1 and "level 7" not in caplog.text
    control.change(4, "asked")
    assert control.from_here() == [4, 8]
