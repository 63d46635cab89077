"""Two revisions beside each other: what both measured, in turns."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "eval"))

import revisions


def test_rows_are_of_what_both_measured(monkeypatch, tmp_path, capsys):
    times = iter([{"a": 1.0, "b": 2.0, "old": 1.0}, {"a": 1.1, "b": 1.0, "new": 1.0}] * 2 + [{"a": 3.0, "b": 2.0}, {"a": 1.2, "b": 1.5}])
    asked = []
    monkeypatch.setattr(revisions, "measure", lambda tree, parts, shape: (asked.append(tree.name), next(times))[1])
    monkeypatch.setattr(revisions, "show", lambda rows, docs: shown.append(rows))
    shown = []
    options = ["--rounds", "3", "--results", str(tmp_path)]
    revisions.main(["before", "after", *options])
    assert asked == ["before", "after"] * 3 and (tmp_path / "revisions.json").is_file() and len(shown) == 1
    rows = revisions.compare([({"a": 1.0}, {"a": 1.1}), ({"a": 3.0}, {"a": 1.2}), ({"a": 1.0}, {"a": 1.1})])
    assert rows == [{"what": "a", "before_ms": 1.0, "after_ms": 1.1, "ratio": pytest.approx(1.1), "spread": 2.0, "rounds": 3}]
    table = capsys.readouterr().out
    assert table.index("| a |") < table.index("| b |") and "old" not in table and "new" not in table


def test_page_and_plot_are_those_of_the_rows(tmp_path):
    page = Path(revisions.DOCS) / "measured" / "kernels.md"
    for folder in ("measured", "images"):
        (tmp_path / folder).mkdir()
    copy = tmp_path / "measured" / "kernels.md"
    copy.write_text(page.read_text())
    revisions.main(["--page", "--docs", str(tmp_path)])
    assert copy.read_text() == page.read_text(), "python eval/revisions.py --page"
    assert (tmp_path / "images" / "revisions.png").is_file()
