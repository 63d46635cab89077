"""The table of the levels: which are measured, how it is written, and what it warns of."""

import itertools
import math

import pytest

from dsla_hf.levels.table import kept_text, measured_levels, table, warnings


@pytest.mark.parametrize("highest", range(130))
def test_levels_of_deep_models_are_few_evenly_spread_and_with_both_ends(highest):
    levels = measured_levels(highest)
    assert levels[0] == 0 and levels[-1] == highest and len(levels) == min(highest + 1, 9)
    steps = [b - a for a, b in itertools.pairwise(levels)]
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


ROW = {"level": 4, "perplexity": 21.0, "untrained_perplexity": 40.0, "kl": 0.02, "untrained_kl": 0.7, "answers": 0.96, "answers_kl": 0.1}
BASE = {"level": 0, "perplexity": 20.0, "kl": 0.0, "answers": 1.0, "answers_kl": 0.0}


def test_table_has_the_columns_that_were_measured():
    lines = table([BASE | {"bytes_1k": 1 << 20}, ROW | {"bytes_1k": 1 << 19}]).splitlines()
    assert [len(line) for line in lines] == [len(lines[0])] * 3
    assert " ".join(lines[0].split()) == "level perplexity untrained KL to level 0 untrained short answers KL on them cache at 1k tokens"
    assert lines[1].split() == ["0", "20.000", "0.0000", "100%", "0.0000", "1,024", "KiB"]
    assert lines[2].split() == ["4", "21.000", "40.000", "0.0200", "0.7000", "96%", "0.1000", "512", "KiB"]


def test_table_of_heads_has_their_number_their_share_and_bytes_at_three_lengths():
    sizes = {"bytes_2k": 1 << 20, "bytes_8k": 1 << 22, "bytes_32k": 1 << 24}
    lines = table([{"level": 0, "kept": 90, "kl": 0.0} | sizes, {"level": 81, "kept": 9, "kl": 0.1} | sizes]).splitlines()
    assert " ".join(lines[0].split()) == "level KV heads kept KL to level 0 cache at 2k tokens at 8k tokens at 32k tokens"
    assert lines[1].split()[:3] == ["0", "90", "(100%)"] and lines[2].split()[:3] == ["81", "9", "(10%)"]
    assert kept_text(9, 1024, of=True) == "9 of 1,024 KV heads (0.879%)"


def test_good_levels_give_no_warning():
    close = {"perplexity": 20.1, "untrained_perplexity": 20.0, "kl": 0.0094, "untrained_kl": 0.009}  # chance, on little text
    assert warnings([BASE, ROW | close, ROW | {"level": 8, "perplexity": 24.0, "answers": 0.8, "own_answer": 0.5}]) == []
    tiny = {"perplexity": 19.99, "untrained_perplexity": 20.0, "kl": 0.0004, "untrained_kl": 0.0003}  # both next to nothing
    assert warnings([BASE, ROW | tiny]) == []


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kl": 0.78}, "worse than the untrained layer"),
        ({"perplexity": 23.9, "untrained_perplexity": 23.3}, "worse than the untrained layer"),
        ({"kl": math.nan}, "worse than the untrained layer"),
        ({"before_kl": 0.01}, "worse than the adapter it began with"),
        ({"perplexity": 24.1}, "clearly worse than level 0"),
        ({"perplexity": math.nan, "untrained_perplexity": 30.0, "kl": 0.1}, "clearly worse than level 0"),
        ({"perplexity": math.inf, "untrained_perplexity": math.inf}, "clearly worse than level 0"),
        ({"answers": 0.79}, "wrong in short chats"),
        ({"own_answer": 0.4}, "wrong in short chats"),
        ({"answers": math.nan}, "wrong in short chats"),
    ],
)
def test_levels_that_are_worse_are_named(change, words):
    rows = [BASE, ROW, ROW | {"level": 8} | change, ROW | {"level": 12} | change]
    assert any(line.startswith("levels 8, 12 are ") and words in line for line in warnings(rows))
    assert any(line.startswith("level 8 is ") and words in line for line in warnings(rows[:3]))
