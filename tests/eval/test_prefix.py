"""The script of prefix reuse: its rows, and the page that they make."""

import importlib
import json
import sys
from pathlib import Path

import pytest

EVAL = Path(__file__).resolve().parents[2] / "eval"
SIZES = ["--texts", "3", "--prefix", "512", "--new", "40", "--tokens", "4", "--turns", "3", "--chunk", "128", "--rounds", "1"]


@pytest.fixture
def prefix(monkeypatch):
    monkeypatch.syspath_prepend(EVAL)
    yield importlib.import_module("prefix")
    for name in ("prefix", "reporting"):
        sys.modules.pop(name, None)


@pytest.fixture
def measured(prefix, tmp_path):
    prefix.main(["measure", *SIZES, "--levels", "0", "50%", "--results", str(tmp_path)])
    return tmp_path


def test_rows_say_what_was_read(prefix, measured, tmp_path):
    rows = json.loads((measured / "prefix.json").read_text())["rows"]
    assert {(row["level"], row["kept"]) for row in rows} == {(0, 4), (2, 2)} and len(rows) == 2 * 2 * len(prefix.CASES)
    read = {(row["level"], row["case"], row["reuse"]): row["read_tokens"] for row in rows}
    for level in (0, 2):
        assert read[level, "cold", True] == 512 + 3 * 40 and read[level, "warm", True] == 3 * 40
        assert read[level, "cold", False] == read[level, "no hits", False] == read[level, "no hits", True] == 3 * 552
    # The first turn, then what is new and the last token of the answer; at level 0 also the rest of the last whole block.
    assert read[2, "chat", True] == 3 * (128 + 40 + 2 * 41)
    assert read[2, "chat", True] < read[0, "chat", True] < read[0, "chat", False] == 3 * (168 + 212 + 256)
    assert all(set(row) >= {"ratio", "cpu_ratio", "snapshot_bytes"} for row in rows if row["reuse"])

    prefix.main(["measure", *SIZES, "--levels", "2", "--cases", "cold", "--results", str(tmp_path)])
    again = json.loads((measured / "prefix.json").read_text())["rows"]
    assert len(again) == len(rows) and sorted(map(prefix.same, again), key=str) == sorted(map(prefix.same, rows), key=str)


def test_the_page(prefix, measured, tmp_path):
    page, plot = tmp_path / "page.md", tmp_path / "plot.png"
    page.write_text("before\n<!-- tables -->\nto be replaced\n<!-- end -->\nafter\n")
    prefix.make_page(measured, page, plot)
    text = page.read_text()
    assert "to be replaced" not in text and "3 texts at once, a prefix of 512 tokens and 40 of their own" in text
    assert (
        text.count("| 2 of 4 |") == len(prefix.CASES)
        and "(aimed at: 1.02 at most)" in text
        and "0.25" not in prefix.verdict(prefix.stored(measured))
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = [{**row, **prefix.AIMED_AT} for row in prefix.stored(measured)]
    worst = max(row["ratio"] for row in rows if row["reuse"] and row["case"] in ("cold", "warm"))
    assert f"after {worst:.3f} of the time without reuse (aimed at: 0.25 at most)" in prefix.verdict(rows)
    with pytest.raises(SystemExit, match="has no rows"):
        prefix.make_page(tmp_path / "nowhere", page, plot)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--texts", "0"], "--texts must be 1 or more, got 0"),
        (["--turns", "1"], "--turns must be 2 or more for chats, got 1"),
        (["--model", "somewhere"], "--model and --adapter go together"),
    ],
)
def test_wrong_options(prefix, arguments, words, capsys):
    with pytest.raises(SystemExit):
        prefix.main(["measure", *arguments])
    assert words in capsys.readouterr().err
