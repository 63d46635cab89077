"""eval/vllm_gpu.py without vLLM: what it says of texts, its rows, and our engine's arms."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

import vllm_gpu


@pytest.mark.parametrize("name", [name for name, (shape, *_) in vllm_gpu.COMPARED.items() if shape == "tiny"])
def test_regrets_tell_texts_that_states_wrote_from_others(name, monkeypatch):
    monkeypatch.setattr(vllm_gpu, "where", lambda: torch.device("cpu"))
    shape, overrides, plan = vllm_gpu.COMPARED[name]
    model = vllm_gpu.random_hybrid(shape, overrides, plan)
    prompt = list(range(3, 43))
    text = vllm_gpu.own_text(model, prompt)
    assert max(vllm_gpu.regrets(model, prompt, text)) < 1e-4
    other = [*text[:5], (text[5] + 1) % model.config.vocab_size, *text[6:]]
    assert vllm_gpu.regrets(model, prompt, other)[5] > 1e-3
    vllm_gpu.close_states(model)
    assert vllm_gpu.mean_regrets(model, [prompt], [text])[0] > 1e-3


def test_rows_take_the_place_of_an_arm_that_failed(tmp_path):
    row = {"part": "speed", "shape": "tiny", "arm": "vllm 0 graph", "length": None, "batch_size": None}
    rows = vllm_gpu.Rows(tmp_path)
    rows.add({**row, "error": "no such device"})
    rows.add({**row, "arm": "vllm 2 graph", "error": "no such device"})
    rows.add({**row, "length": 8, "batch_size": 1, "seconds_per_token": 1.0})
    rows.add({**row, "length": 8, "batch_size": 2, "error": "no room"})
    found = json.loads((tmp_path / "vllm.json").read_text())["rows"]
    assert [(row["arm"], row["batch_size"], "error" in row) for row in found] == [
        ("vllm 2 graph", None, True),
        ("vllm 0 graph", 1, False),
        ("vllm 0 graph", 2, True),
    ]
    assert vllm_gpu.Rows(tmp_path).rows == found


@pytest.mark.slow
def test_our_engine_is_timed(tmp_path):
    sizes = ["--shape", "tiny", "--lengths", "20", "30", "--rows", "1", "2", "--parts", "speed", "--results", str(tmp_path)]
    vllm_gpu.main([*sizes, "--arms", "ours 2 graph"])
    rows = json.loads((tmp_path / "vllm.json").read_text())["rows"]
    assert [(row["length"], row["batch_size"]) for row in rows] == [(20, 1), (30, 1), (20, 2)]
    assert all(row["seconds_per_token"] > 0 and row["prefill_seconds"] > 0 for row in rows)


def test_arms_that_there_are_not_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        vllm_gpu.main(["--shape", "tiny", "--parts", "speed", "--results", str(tmp_path), "--arms", "ours 3 graph"])
    assert "unknown arms ['ours 3 graph']" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
