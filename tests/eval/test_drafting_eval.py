"""`eval/drafting.py`: rows of a tiny model, with an adapter and without, going on where it stopped, and the page that they make."""

import importlib
import json
import lzma
import sys
from pathlib import Path

import pytest
import torch
from saved import save_base_and_adapter

EVAL = Path(__file__).resolve().parents[2] / "eval"
TEXT = " ".join(f"{number} green bottles hang on the wall, and if one of them should fall" for number in range(1000, 0, -1))
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:"


@pytest.fixture
def drafting(monkeypatch):
    monkeypatch.syspath_prepend(EVAL)
    yield importlib.import_module("drafting")
    for name in ("drafting", "measures", "reporting"):
        sys.modules.pop(name, None)


@pytest.fixture
def folder(tmp_path):
    """A model with a chat template, an adapter of layers for it, and texts."""
    save_base_and_adapter(tmp_path, TEXT, TEMPLATE)
    for kind in ("novels", "code"):
        with lzma.open(tmp_path / f"{kind}_val.jsonl.xz", "wt") as file:
            file.writelines(json.dumps({"text": TEXT + str(i)}) + "\n" for i in range(6))
    return tmp_path


@pytest.mark.parametrize(
    "wrong, words",
    [
        ("measure m d --name n --new 1", "--new must be 2 or more, got 1"),
        ("measure m d --name n --draft 0", "--draft must be 1 or more, got 0"),
        ("measure m d --name n --kept 0.5 1.5", "--kept must be shares from 0 to 1, got 1.5"),
        ("measure m d --name n --dtype bf16", "--dtype"),
        ("time --shape m --prompt-tokens 8 0", "--prompt-tokens must be 1 or more, got 0"),
        ("time --shape m --prompt-tokens 8 --draft -1", "--draft must be 0 or more, got -1"),
        ("time --shape m --prompt-tokens 8 --acceptance -0.1", "--acceptance must be shares from 0 to 1"),
        ("time --shape llama2-7b --prompt-tokens 8", "needs a CUDA device"),
    ],
)
def test_wrong_arguments_end_before_anything_is_loaded(drafting, tmp_path, monkeypatch, capsys, wrong, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("load_model", "random_model"):
        monkeypatch.setattr(drafting, name, None)
    with pytest.raises(SystemExit):
        drafting.main([*wrong.split(), "--out", str(tmp_path / "out.json")])
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def measured(drafting, folder, out, *more):
    sizes = ["--prompt-tokens", "100", "--prompts", "2", "--new", "10", "--draft", "3", "--dtype", "float32"]
    drafting.main(["measure", str(folder / "base"), str(folder), "--out", str(folder / out), *sizes, *more])
    return json.loads((folder / out).read_text())["rows"]


def timed(drafting, folder, *more):
    sizes = ["--shape", str(folder / "base"), "--prompt-tokens", "40", "--new", "20", "--dtype", "float32", "--window", "16"]
    drafting.main(["time", *sizes, "--out", str(folder / "c.json"), *more])
    return json.loads((folder / "c.json").read_text())["rows"]


def test_times_go_on_behind_known_rows(drafting, folder, monkeypatch):
    rows = timed(drafting, folder, "--kept", "0.5", "--draft", "3", "0", "--acceptance", "0.9", "0.2")
    assert [(row["draft_tokens"], row["acceptance"]) for row in rows] == [(3, 0.9), (3, 0.2), (0, 0.9), (0, 0.2)]
    more = timed(drafting, folder, "--kept", "0.5", "--draft", "3", "2", "--acceptance", "0.9")
    assert more[:4] == rows and [row["draft_tokens"] for row in more[4:]] == [2]
    monkeypatch.setattr(drafting, "Timer", None)  # nothing is left to be timed
    assert timed(drafting, folder, "--kept", "0.5", "--draft", "3", "0") == more
    monkeypatch.setattr(drafting, "origin", lambda command: {"device": "another one"})
    with pytest.raises(SystemExit, match="give another --out"):
        timed(drafting, folder)


def test_rows_and_their_page(drafting, folder, monkeypatch):
    with_adapter = ["--name", "mine", "--adapter", str(folder / "adapter"), "--kept", "0.5", "0"]
    rows = measured(drafting, folder, "a.json", *with_adapter)
    assert [(row["kind"], row["kept"], row["temperature"]) for row in rows] == [
        (kind, kept, temperature) for kind in ("novels", "code", "chat") for kept in (1, 0) for temperature in (0.0, 0.7)
    ]
    for row in rows:
        assert row["acceptance"] == row["accepted"] / row["compared"] and row["accepted"] <= row["compared"] <= row["drafted"]
        assert row["tokens_per_check"] == 2 * 9 / row["checks"]
    assert measured(drafting, folder, "a.json", *with_adapter, "0.5") == rows, "known rows are measured again"
    with pytest.raises(SystemExit, match="give another --out"):
        measured(drafting, folder, "a.json", *with_adapter, "--new", "11")

    alone = measured(drafting, folder, "b.json", "--name", "its base", "--kept", "0.5", "--window", "16")
    assert {(row["trained"], row["unit"], row["units"], row["kept"]) for row in alone} == {(False, "head", 4, 2)}
    times = timed(drafting, folder, "--kept", "0.5", "0")
    assert [row["kept"] for row in times] == [2, 0] and all(row["drafted_tokens_per_second"] > 0 for row in times)

    page, parts = folder / "page.md", [str(folder / name) for name in ("a.json", "b.json", "c.json")]
    drafting.main(["page", *parts, "--results", str(folder), "--page", str(page)])
    result = json.loads((folder / "drafting.json").read_text())
    assert result["rows"][:-2] == rows + alone and result["rows"][-1]["device"] and result["settings"]["new_tokens"] == 10
    text = page.read_text()
    assert "## mine" in text and "An **untrained** conversion" in text
    cell = f"{rows[0]['acceptance']:.2f} ({rows[0]['tokens_per_check']:.2f})"
    assert f"| 1 of 2 | {cell} |" in text and f"{times[0]['ratio']:.4g} |" in text
    with pytest.raises(SystemExit, match="counts of acceptance are needed"):
        drafting.main(["page", parts[2], "--results", str(folder), "--page", str(page)])


def test_an_imposed_acceptance_is_that_share(drafting):
    rule, logits = drafting.Imposed(0.8), torch.eye(5)[:1]
    guess, _ = rule.guess(None, logits)
    hits = sum(int(rule.choose(None, logits, guess) == guess) for _ in range(1000))
    assert guess == 0 and 750 < hits < 850
