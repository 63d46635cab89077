"""eval/replicas_plan.py: what is counted out, and that the page holds it."""

import sys

import pytest
from scripts import EVAL, loaded_script

LOCAL = ("serving_page", "reporting", "step_costs")


@pytest.fixture(scope="module")
def script():
    before = {name: sys.modules.pop(name) for name in LOCAL if name in sys.modules}
    sys.path.insert(0, str(EVAL))
    with loaded_script("replicas_plan.py") as module:
        yield module
    sys.path.remove(str(EVAL))
    for name in LOCAL:
        sys.modules.pop(name, None)
    sys.modules.update(before)


def test_a_ring_moves_only_what_comes_to_the_new_replica(script):
    before, after = script.owners([0, 1, 2, 3], 5000), script.owners([0, 1, 2, 3, 4], 5000)
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {4} and 0.1 < len(moved) / 5000 < 0.3
    assert script.busiest([0, 0, 0, 1], 2) == 1.5 and script.busiest(before, 4) > 1
    assert script.busiest_of_two(50, 500) < script.busiest(script.owners(list(range(50)), 500), 50)


def test_weights_are_those_of_the_shapes(script):
    assert script.weight_bytes("llama2-7b") == pytest.approx(2 * 6.74e9, rel=0.01)
    assert script.weight_bytes("llama3-8b") == pytest.approx(2 * 8.03e9, rel=0.01)


def test_the_page_holds_the_plan(script, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(script.PAGE.read_text().replace("| what | value |", "| old | old |"))
    monkeypatch.setattr(script, "PAGE", page)
    script.main(["--page"])
    assert page.read_text() == (EVAL.parent / "docs" / "replicas.md").read_text(), (
        "`python eval/replicas_plan.py --page` writes another one"
    )
    script.main(["--replicas", "10"])
    assert "| 10 replicas, if all were equally busy: level 0 | 28 requests/s |" in capsys.readouterr().out


def test_wrong_options(script, tmp_path, capsys):
    for wrong in (["--replicas", "1"], ["--utilisation", "2"], ["--shape", "gpt"]):
        with pytest.raises(SystemExit):
            script.parse_arguments(wrong)
    assert "--replicas must be 2 or more" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no rate within the objectives for llama3-8b"):
        script.plan(script.parse_arguments(["--shape", "llama3-8b"]))
