"""eval/serving_load.py: a short load whose every answer is right, what it finds when one is not, and the page."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

import load_clients
from scripts import loaded_script


@pytest.fixture(scope="module")
def script():
    with loaded_script("serving_load.py") as module:
        yield module


@pytest.mark.slow
def test_a_short_load(script, tmp_path, capsys):
    assert script.main(["--seconds", "10", "--clients", "6", "--pause", "0.5", "--slots", "4", "--results", str(tmp_path)]) == 0, (
        capsys.readouterr().out
    )
    result = json.loads((tmp_path / "serving-load.json").read_text())
    rows = {row["kind"]: row for row in result["rows"]}
    assert set(rows) == set(load_clients.KINDS) and result["faults"] == [] and set(result["statuses"]) == {"200"}
    total = sum(row["requests"] for row in rows.values())
    assert total >= 30 and rows["greedy"]["equal"] >= 5 and rows["sampled"]["equal"] >= 3 and rows["constrained"]["valid"] >= 3
    assert sum(row["left"] for row in rows.values()) >= 1 and result["level_changes"] >= 3
    assert sum(result["finished"].values()) == total and result["free_blocks"] == result["blocks"]
    part = script.page_part(result)
    assert f"{total:,} requests" in part and "Nothing is wrong" in part


@pytest.mark.slow
def test_a_short_load_with_drafts_and_prompts_that_begin_alike(script, tmp_path, capsys):
    given = ["--draft-level", "4", "--draft-tokens", "3", "--shared-words", "30"]
    sizes = ["--seconds", "8", "--clients", "4", "--pause", "0.5", "--slots", "4", "--results", str(tmp_path)]
    assert script.main([*sizes, *given]) == 0, capsys.readouterr().out
    result = json.loads((tmp_path / "serving-load-drafts.json").read_text())
    assert result["drafts"]["accepted"] > 0 and result["prefixes"]["hits"] > 0 and result["faults"] == []
    part = script.page_part(result)
    assert f"{result['drafts']['drafted']:,} in {result['drafts']['rounds']:,} calls" in part and "guessed at level 4" in part


def test_the_page_holds_what_the_results_say(script):
    for name in (script.PLAIN, script.DRAFTED):
        result = json.loads((script.RESULTS / f"{name}.json").read_text())
        assert script.page_part(result) in script.PAGE.read_text(), "`python eval/serving_load.py --page` would write something else"


def outcome(kind="greedy", **changes):
    body = {"prompt": "abc", "max_tokens": 8, "temperature": 0}
    return load_clients.Outcome(
        **{"number": 1, "kind": kind, "body": body, "status": 200, "finish": "length", "levels": [[3, 2]], **changes}
    )


@pytest.fixture(scope="module")
def checked(script):
    """A checker, and the text that `outcome()` should have."""
    tokenizer = script.ascii_tokenizer()
    checker = script.Checker(script.small_model(tokenizer), tokenizer, {})
    ids = checker._reference(tokenizer("abc")["input_ids"], 8, [(3, 2)], outcome())
    return checker, tokenizer.decode(ids, skip_special_tokens=True), "stop" if tokenizer.eos_token_id in ids else "length"


def test_a_wrong_answer_is_found(script, checked):
    checker, text, finish = checked
    right = outcome(text=text, finish=finish)
    wrong = [
        outcome(text=text[:-1] + ("a" if text[-1] != "a" else "b"), finish=finish),
        outcome(text=text, finish=finish, levels=[[3, 0]]),  # another level has another text
        outcome(text=text, finish=None),
        outcome(text=text, finish=finish, status=500),
        outcome(text=text, finish=finish, error="broken"),
        outcome("constrained", text='{"size": "huge"}'),
        outcome("constrained", text='{"size": '),
        outcome("tools", finish="length"),
        outcome("tools", finish="tool_calls", calls={0: "{}"}),
        outcome("logprobs", text=text, finish=finish, logprobs={"tokens": ["a"], "token_logprobs": [-1.0], "top_logprobs": [{"b": -0.1}]}),
    ]
    checker.add(right)
    assert checker.rows["greedy"].equal == 1 and checker.faults == []
    for one in wrong:
        before = len(checker.faults)
        checker.add(one)
        assert len(checker.faults) == before + 1, one


def test_what_is_left_behind_is_found(script):
    good = {
        "stuck": 0,
        "blocks": 9,
        "free_blocks": 9,
        "health": 200,
        "failed_steps": 0,
        "memory_mib": [100, 120],
        "open_files": [9, 13],
        "level_changes": 5,
        "drafts": {"rounds": 2, "drafted": 6, "accepted": 1},
        "prefixes": {"queries": 9, "hits": 4},
    }
    assert script.faults_of(good, 64, True) == script.faults_of({**good, "drafts": None, "prefixes": {"hits": 0}}, 64) == []
    for change in (
        {"stuck": 1},
        {"free_blocks": 8},
        {"health": 503},
        {"failed_steps": 2},
        {"memory_mib": [100, 170]},
        {"open_files": [9, 14]},
        {"level_changes": 0},
        {"drafts": {"rounds": 2, "drafted": 6, "accepted": 0}},
        {"prefixes": {"queries": 9, "hits": 0}},
    ):
        assert len(script.faults_of({**good, **change}, 64, True)) == 1, change
