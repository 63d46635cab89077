"""eval/batch_invariance.py on a CPU: equal to the bit with the option, not without, and told when not."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

from scripts import loaded_script


@pytest.fixture(scope="module")
def script():
    with loaded_script("batch_invariance.py") as module:
        yield module


@pytest.mark.slow
def test_texts_are_equal_to_the_bit_with_the_option_alone(script, tmp_path, capsys):
    options = ["--texts", "5", "--tokens", "24", "--rounds", "1", "--slots", "5", "--results", str(tmp_path)]
    assert script.main(options) == 0
    result = json.loads((tmp_path / "batch-invariance.json").read_text())
    for invariant in (False, True):
        rows = [row for row in result["rows"] if row["invariant"] is invariant]
        assert [row["level"] for row in rows] == ["0", "2", "4", "0 -> 4"]
        assert all(row["compared"] >= 4 for row in rows)
        assert (sum(row["other_bits"] for row in rows) == 0) == invariant, "without it, other bits show that they are looked at"
    assert all(row["ms_one"] > 0 and row["ms_full"] > 0 for row in result["rows"] if "->" not in row["level"])
    page = script.page_part(result)
    assert "5 slots" in page and all(page.count(f"\n| {invariant} | ") == 4 for invariant in (False, True))


def test_other_tokens_and_bits_are_counted(script):
    one = script.Heard(tokens=[1, 2, 3], logprobs=[-1.0, -2.0, -3.0])
    other = script.Heard(tokens=[1, 2, 4], logprobs=[-1.0, -2.0000000001, -9.0])
    found = script.Compared()
    found.add(one, one)
    assert vars(found) == {"compared": 1, "parted": 0, "other_bits": 0, "largest_difference": 0.0}
    found.add(one, other)
    assert (found.compared, found.parted, found.other_bits) == (2, 1, 1) and 0 < found.largest_difference < 1e-9


def test_models_have_adapters(script):
    with pytest.raises(SystemExit):
        script.main(["--model", "base"])
