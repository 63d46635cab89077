"""The table of architectures says of each way to generate whether it gives the text of `generate`, or refuses the base."""

import json
import sys

import pytest
import torch
from scripts import EVAL, loaded_script


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EVAL), *sys.path])
    with loaded_script("architectures.py") as module:
        yield module


@torch.no_grad()
@pytest.mark.parametrize(
    "kind, expected",
    [("llama", (True, True, True)), ("gemma3_text", (True, True, True)), ("lfm2", ("no", True, "no")), ("falcon_h1", ("no", True, "no"))],
)
def test_what_generates(table, kind, expected):
    checks = (table.CHECKS[name] for name in ("drafts", "graphs", "server"))
    assert tuple(check(lambda: table.base_of(kind, {}), None) for check in checks) == expected


@torch.no_grad()
def test_another_text_is_seen(table, monkeypatch):
    """Each of the three is compared with what `generate` gives."""
    generated = table.checks.generated
    monkeypatch.setattr(
        table.checks, "generated", lambda *args, **options: generated(*args, **options) if options else generated(*args) + 1
    )
    for name in ("drafts", "graphs", "server"):
        assert table.CHECKS[name](lambda: table.base_of("llama", {}), None) is False


def test_of_some_checks_alone_others_stay_as_they_were_found(table, tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr(table, "write", written.append)
    monkeypatch.setattr(table, "ROWS", [("llama", {}), ("lfm2", {})])
    monkeypatch.setattr(table, "CHECKS", {"drafts": table.CHECKS["drafts"], "server": lambda *_: True, "graphs": lambda *_: 1 / 0})
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["architectures.py", "--checks", "drafts", "server"])
    before = [{"architecture": kind, "options": {}, "graphs": kind} for kind in ("llama", "lfm2")]
    (tmp_path / "architectures.json").write_text(json.dumps({"rows": before[:1]}))
    with pytest.raises(SystemExit):
        table.main()
    assert "add graphs to --checks" in capsys.readouterr().err
    (tmp_path / "architectures.json").write_text(json.dumps({"rows": before}))
    table.main()
    (rows,) = written
    assert [(row["drafts"], row["server"], row["graphs"]) for row in rows] == [(True, True, "llama"), ("no", True, "lfm2")]


def test_there_is_a_column_for_every_check(table, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text("<!-- table -->\n<!-- end -->\n")
    monkeypatch.setattr(table, "PAGE", page)
    monkeypatch.setattr(table, "write_results", lambda *args: None)
    row = {"architecture": "llama", "options": {}, "rotary": "halves", "tp_plan": True, "notes": "", **dict.fromkeys(table.CHECKS, "no")}
    table.write([row])
    assert page.read_text().splitlines()[1] == f"| `model_type` | rotary | {' | '.join(table.CHECKS)} | TP plan | notes |"
