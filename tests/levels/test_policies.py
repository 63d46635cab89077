"""Policies: pure functions from what is known to a level."""

import dataclasses

import pytest

from dsla_hf import CacheMemory, FixedLevel, LatencyTarget, Load, PromptLength, Saving, Stats
from dsla_hf.levels.policies import as_policy

STATS = Stats(prompt_tokens=100, tokens=120, rows=2, level=4, max_level=12, num_layers=16, softmax_bytes_per_token=512, dsla_bytes=100_000)


def stats(**changes):
    return dataclasses.replace(STATS, **changes)


def test_stats_and_policies_cannot_be_changed():
    for record, name in (
        (STATS, "level"),
        (FixedLevel(3), "level"),
        (PromptLength(), "grow"),
        (CacheMemory(1), "budget"),
        (Load(), "cool_down"),
        (Saving(), "level"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(record, name, 1)


def test_cache_bytes_by_hand():
    assert STATS.cache_bytes(0) == 2 * 16 * 120 * 512
    assert STATS.cache_bytes(5, tokens=1000) == 2 * (11 * 1000 * 512 + 5 * 100_000)


@pytest.mark.parametrize("level, expected", [(5, 5), ("50%", 8), ("100%", 12), (99, 12)])
def test_a_level_from_the_token_on_at_which_it_saves_memory(level, expected):
    assert 195 * 512 < STATS.dsla_bytes < 196 * 512
    assert [Saving(level)(stats(tokens=tokens)) for tokens in (1, 195, 196, 5000)] == [0, 0, expected, expected]
    assert [Saving(level)(stats(tokens=tokens, ladder=(2, 4, 8, 12))) for tokens in (1, 196)] == [
        2,
        max(x for x in (2, 4, 8, 12) if x <= expected),
    ]


@pytest.mark.parametrize("level, expected", [(0, 0), (7, 7), ("25%", 4), ("50%", 8), ("100%", 12), (99, 12)])
def test_fixed_level_is_a_number_or_a_share_and_never_above_the_plan(level, expected):
    assert FixedLevel(level)(STATS) == expected


@pytest.mark.parametrize("prompt, expected", [(1, 2), (2047, 2), (2048, 4), (4095, 4), (4096, 6), (8191, 6), (8192, 8), (10**6, 8)])
def test_prompt_length_by_the_table_of_the_paper(prompt, expected):
    assert PromptLength()(stats(prompt_tokens=prompt, tokens=10**7)) == expected
    assert PromptLength(grow=True)(stats(prompt_tokens=1, tokens=prompt)) == expected


def test_prompt_length_with_a_table_of_ones_own():
    policy = PromptLength(((10, 3), (20, 15)))
    assert [policy(stats(prompt_tokens=n)) for n in (9, 10, 19, 20)] == [0, 3, 3, 12]


@pytest.mark.parametrize("table", [(), ((5, 1), (5, 2)), ((5, 1), (2, 2))])
def test_tables_that_do_not_rise_are_refused(table):
    with pytest.raises(ValueError, match="table must hold"):
        PromptLength(table)


def test_cache_memory_takes_the_lowest_level_that_fits():
    for tokens in (1, 500, 4000, 20_000):
        record = stats(tokens=tokens)
        for budget in (10**6, 5 * 10**6, 5 * 10**7, 10**9):
            level = CacheMemory(budget, headroom=64)(record)
            fits = [record.cache_bytes(other, tokens + 64) <= budget for other in range(13)]
            assert level == (fits.index(True) if any(fits) else 12)
    assert CacheMemory(5 * 10**7)(stats(tokens=4000)) not in (0, 12), "no budget between was tried"


def test_headroom_is_kept_free():
    budget = STATS.cache_bytes(3, tokens=1000)  # above 200 tokens a softmax layer is the larger one
    assert CacheMemory(budget, headroom=0)(stats(tokens=1000)) == 3
    assert CacheMemory(budget, headroom=500)(stats(tokens=1000)) > 3


@pytest.mark.parametrize("policy, field", [(lambda: CacheMemory(0), "budget"), (lambda: LatencyTarget(0.0), "seconds_per_token")])
def test_budgets_and_targets_must_be_positive(policy, field):
    with pytest.raises(ValueError, match=field):
        policy()


def test_latency_target_rises_while_it_is_missed_and_after_it_has_settled():
    policy = LatencyTarget(0.01, settle=8)
    assert policy(stats(seconds_per_token=0.02, tokens_since_change=8)) == 5
    assert policy(stats(seconds_per_token=0.02, tokens_since_change=7)) == 4
    assert policy(stats(seconds_per_token=0.009, tokens_since_change=99)) == 4
    assert policy(stats(seconds_per_token=None, tokens_since_change=99)) == 4
    assert LatencyTarget(0.01, step=3)(stats(seconds_per_token=1.0, tokens_since_change=9, level=11)) == 12


def test_load_has_thresholds_hysteresis_and_a_cool_down():
    policy = Load()
    assert policy(stats(queue_depth=50)) == 5
    assert policy(stats(longest_waiting_prompt=1024)) == 5
    assert policy(stats(queue_depth=49, longest_waiting_prompt=1023)) == 4, "between the thresholds nothing changes"
    assert policy(stats(queue_depth=25)) == 4 and policy(stats(longest_waiting_prompt=820)) == 4
    assert policy(stats(queue_depth=24, longest_waiting_prompt=819)) == 3
    assert policy(stats(level=0)) == 0
    for busy in ({"queue_depth": 500}, {}):
        assert policy(stats(seconds_since_change=59.9, **busy)) == 4
    assert policy(stats(level=12, queue_depth=500)) == 12 and policy(stats(level=11, queue_depth=500)) == 12


def test_load_goes_to_its_own_limit_and_takes_nothing_back_for_being_above_it():
    assert Load(max_level="25%")(stats(level=4, queue_depth=99)) == 4
    assert Load(max_level="25%")(stats(level=9, queue_depth=99)) == 9


def test_a_burst_of_load_and_its_end():
    level, trace = 0, []
    for minute in range(12):
        level = Load()(stats(level=level, seconds_since_change=61.0, queue_depth=80 if minute < 5 else 0))
        trace.append(level)
    assert trace == [1, 2, 3, 4, 5, 4, 3, 2, 1, 0, 0, 0]


LADDER = (0, 64, 128, 256, 512)


@pytest.fixture
def of_heads():
    """Of a server's levels: 1,024 KV heads, of which few levels can be had."""
    return lambda **changes: stats(**{"num_layers": 1024, "max_level": 1024, "unit": "head", "ladder": LADDER, "level": 128, **changes})


@pytest.mark.parametrize("level, expected", [(0, 0), (63, 0), (64, 64), ("25%", 256), ("30%", 256), ("kept:50%", 512), ("kept:0", 512)])
def test_named_levels_convert_no_more_than_they_say(of_heads, level, expected):
    assert FixedLevel(level)(of_heads()) == expected
    assert PromptLength(((0, level),))(of_heads()) == expected


def test_a_budget_takes_a_level_at_which_the_cache_fits(of_heads):
    record = of_heads(tokens=4000, softmax_bytes_per_token=512, dsla_bytes=100_000)
    fitting = record.cache_bytes(129, 4128)
    assert CacheMemory(fitting)(record) == 256
    assert CacheMemory(1)(record) == 512, "the highest that can be had"


def test_steps_on_a_ladder_move_by_levels_that_can_be_had(of_heads):
    for step, up, down in ((1, 256, 64), ("12.5%", 256, 64), ("25%", 512, 0), (512, 512, 0)):
        assert Load(step=step, max_level="100%")(of_heads(queue_depth=99)) == up
        assert Load(step=step)(of_heads()) == down
    assert Load(max_level="40%")(of_heads(level=256, queue_depth=99)) == 256
    assert LatencyTarget(0.01)(of_heads(seconds_per_token=1.0, tokens_since_change=9)) == 256
    assert LatencyTarget(0.01)(of_heads(seconds_per_token=1.0, tokens_since_change=9, level=512)) == 512
    assert Load(step="25%")(stats(queue_depth=99)) == 8, "where all can be had it is a share of all layers"


@pytest.mark.parametrize("step", [0, -1, "0%", "kept:3", 1.5, "many"])
def test_steps_that_are_none_are_refused(step):
    with pytest.raises(ValueError, match="step must be"):
        Load(step=step)


def test_policies_by_name_level_and_function():
    assert as_policy("prompt-length") == PromptLength() and as_policy("text-length") == PromptLength(grow=True)
    assert as_policy("load") == Load() and as_policy("saving") == Saving()
    assert (
        as_policy("saving:50%") == Saving("50%")
        and as_policy("saving:kept:10%") == Saving("kept:10%")
        and as_policy("saving:3")(stats()) == 0
    )
    assert as_policy(8) == FixedLevel(8) and as_policy("50%") == FixedLevel("50%") and as_policy("3") == FixedLevel("3")
    own = lambda stats: 1  # noqa: E731
    assert as_policy(own) is own and as_policy(PromptLength()) == PromptLength()


@pytest.mark.parametrize("wrong", ["prompt_length", "", "-1", -1, 2.5, None, "101%", "saving:", "saving:much"])
def test_what_is_no_policy_is_refused(wrong):
    with pytest.raises(ValueError, match=r"level_policy must be one of \['prompt-length', 'text-length', 'saving', 'load'\]"):
        as_policy(wrong)
