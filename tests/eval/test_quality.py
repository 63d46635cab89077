"""`eval/quality.py`: all of its parts on a tiny base and adapter, and that it goes on where it stopped."""

import json
import sys
from pathlib import Path

import pytest
from saved import save_base_and_adapter

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'dsla-hf[eval]'")
EVAL = Path(__file__).resolve().parents[2] / "eval"
TEXT = " ".join(f"{number} green bottles hang on the wall, and if one of them should fall" for number in range(100, 0, -1))
WIKITEXT = (
    f" \n = Wall = \n \n A wall , with @-@ bottles . \n \n = = Bottles = = \n \n {TEXT[:300]} \n \n = Song = \n \n {TEXT[300:500]} \n"
)


@pytest.fixture(scope="module")
def quality():
    sys.path.insert(0, str(EVAL))
    try:
        import quality
    finally:
        sys.path.remove(str(EVAL))
    return quality


@pytest.fixture
def arguments(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True, raising=False)
    save_base_and_adapter(tmp_path, TEXT)
    zero_shot = tmp_path / "zero_shot"
    zero_shot.mkdir()
    asked = [{"query": "Question: what falls?\n", "choices": ["a wall", "bottles"], "gold": i % 2} for i in range(3)]
    (zero_shot / "piqa.jsonl").write_text("\n".join(map(json.dumps, asked)))
    options = [{"context_options": ["The wall", "The bottle"], "continuation": "should fall.", "gold": i % 2} for i in range(3)]
    (zero_shot / "winogrande.jsonl").write_text("\n".join(map(json.dumps, options)))
    (tmp_path / "valid.txt").write_text(WIKITEXT)
    (tmp_path / "hay.txt").write_text(TEXT)
    given = {"model": "base", "adapter": f"mine={tmp_path / 'adapter'}", "zero-shot": "zero_shot", "wikitext": "valid.txt"}
    given |= {"haystack": "hay.txt", "work": "work", "output": "out/quality.json", "page": "out/quality.html"}
    paths = [[f"--{name}", value if name == "adapter" else str(tmp_path / value)] for name, value in given.items()]
    return [*(item for pair in paths for item in pair), "--levels", "0,2", "--lengths", "900", "--samples", "2", "--limit", "2"]


def test_all_parts_and_going_on(quality, arguments, tmp_path, monkeypatch):
    evaluate, calls = quality.evaluate, []

    def stopped(model, adapter, levels, tasks, *args, **kwargs):
        calls.append(tasks)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return evaluate(model, adapter, levels, tasks, *args, **kwargs)

    monkeypatch.setattr(quality, "evaluate", stopped)
    with pytest.raises(KeyboardInterrupt):
        quality.main(arguments)
    first = json.loads((tmp_path / "out/quality.json").read_text())
    assert {row["task"] for row in first["rows"]} >= {"needle", "zero_shot_piqa"} and not (tmp_path / "out/quality.html").exists()

    monkeypatch.setattr(quality, "evaluate", evaluate)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "work").rglob("level-*.json")}
    quality.main(arguments)
    assert all(file.stat().st_mtime_ns == time for file, time in times.items())
    found = json.loads((tmp_path / "out/quality.json").read_text())
    assert found["level_0_is_the_base"] == {"mine": True} and {"command", "versions", "device"} <= found.keys()
    tasks = {"needle", "far_bigrams", "associative_recall", "zero_shot_piqa", "zero_shot_winogrande", "wikitext2_validation"}
    for arm, levels in ((quality.BASE, {0}), ("mine", {0, 2})):
        rows = [row for row in found["rows"] if row["arm"] == arm]
        assert {row["level"] for row in rows} == levels and tasks <= {row["task"] for row in rows}
    page = (tmp_path / "out/quality.html").read_text()
    assert "Level 0 has the numbers of base without adapter, to the last digit." in page and "zero_shot_winogrande" in page


def test_wikitext_is_cut_into_articles(quality, tmp_path):
    (tmp_path / "valid.txt").write_text(WIKITEXT)
    quality.write_wikitext_task(tmp_path, tmp_path / "valid.txt")
    pages = [json.loads(line)["page"] for line in (tmp_path / "wikitext.jsonl").read_text().splitlines()]
    assert [page.split("\n")[0] for page in pages] == [" = Wall = ", " = Song = "] and "".join(pages) in WIKITEXT


@pytest.mark.parametrize(
    "more, words",
    [
        (["--parts", "own,other"], "unknown part 'other'"),
        (["--parts", "wikitext"], "the part wikitext needs --wikitext"),
        (["--parts", "own", "--output", "quality"], "must end in .json"),
    ],
)
def test_what_does_not_fit(quality, more, words, capsys):
    with pytest.raises(SystemExit):
        quality.parse(["--model", "base", "--adapter", "adapter", *more])
    assert words in capsys.readouterr().err


def test_adapters_need_names_and_choices_their_fields(quality, tmp_path):
    with pytest.raises(ValueError, match="names of their own"):
        quality.main(["--model", "base", "--adapter", "a/x", "--adapter", "b/x", "--parts", "own"])
    (tmp_path / "a.jsonl").write_text('{"question": "?"}')
    with pytest.raises(ValueError, match="found \\['question'\\]"):
        quality.write_choice_tasks(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"holds no \.jsonl files"):
        quality.write_choice_tasks(tmp_path, tmp_path / "none")
