"""eval/inference.py: rows that outlive a run that is cut short, and what the page says of them."""

import json
import sys
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import dsla_hf.inference.bench.measure

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

import inference


@pytest.fixture
def checkpoint(tiny_model, tmp_path, monkeypatch):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    for module in (inference, dsla_hf.inference.bench.measure):
        monkeypatch.setattr(module, "copy_bandwidth", lambda device: 1e9)
        monkeypatch.setattr(module, "matmul_rate", lambda device, dtype: 1e9)
    return str(tmp_path / "base")


def test_rows_are_replaced_and_kept(checkpoint, tmp_path, monkeypatch):
    cases = [
        inference.Wanted("token", 20, 1, engines=("eager",), new_tokens=4),
        inference.Wanted("batch", 20, 2, (0.0, 1.0), ("eager",), 4),
    ]
    monkeypatch.setattr(inference, "wanted", lambda parts, shape: iter(case for case in cases if case.part in parts))
    for parts in ("token,batch", "batch"):
        inference.main(["--shapes", checkpoint, "--parts", parts, "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "inference.json").read_text())["rows"]
    assert sorted((row["part"], row["level"]) for row in rows) == [("batch", 0), ("batch", 4), ("token", 0), ("token", 2), ("token", 4)]
    assert not any("error" in row for row in rows)
    assert all(row["weight_seconds"] == row["weight_bytes"] / 1e9 for row in rows)


def test_what_cannot_run_is_a_row_that_says_so(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(inference, "wanted", lambda parts, shape: iter([inference.Wanted("token", 20, 1, (0.0,), ("graph",), 4)]))
    inference.main(["--shapes", checkpoint, "--parts", "token", "--results", str(tmp_path)])
    (row,) = json.loads((tmp_path / "inference.json").read_text())["rows"]
    assert "CUDA" in row["error"]


def row(part, level, length, seconds, batch_size=1, **more):
    numbers = {"seconds_per_token": seconds, "tokens_per_second": batch_size / seconds, "weight_seconds": 0.5}
    place = {"part": part, "shape": "x", "engine": "graph", "level": level, "length": length, "batch_size": batch_size}
    return place | numbers | {"predicted_seconds_per_token": 0.1, "prefill_seconds": seconds} | more


def test_summary_and_break_even():
    rows = [row("token", level, 2048, 1.0 + level) for level in (0, 2, 4)]
    rows += [row("batch", level, 8192, 4.0 / (1 + level), 16) for level in (0, 2, 4)]
    rows += [row("prefill", level, 32768, 8.0 / (1 + level)) for level in (0, 4)]
    found = {line["what"]: line["measured"] for line in inference.summary(rows)}
    assert found["the same over reading the weights, level 0, 2,048 tokens"] == 2.0
    assert found["throughput of level 2 over level 0, 16 rows of 8,192 tokens"] == pytest.approx(3)
    assert found["prefill of level 0 over level 4, 32,768 tokens"] == pytest.approx(5)

    grown = [row("growth", 0, length, 1.0 + length / 8192) for length in inference.LENGTHS]
    grown += [row("growth", 4, length, 2.0) for length in inference.LENGTHS]
    assert inference.break_even(grown, "x", 4) == 8192
    assert inference.break_even(grown, "x", 2) is None


def test_the_page(tmp_path):
    page = tmp_path / "measured" / "inference.md"
    page.parent.mkdir()
    page.write_text("before\n<!-- measured -->\nold\n<!-- end -->\nafter\n")
    (tmp_path / "images").mkdir()
    inference.make_page([], page)
    assert "Nothing measured yet." in page.read_text() and "old" not in page.read_text()
    rows = [row("growth", level, length, 1.0) for level in (0, 4) for length in (1024, 2048)]
    profiled = {"part": "profile", "shape": "x", "engine": "graph", "level": 2, "length": 8192, "ms_per_token": 4.0}
    rows.append(profiled | {"ms_by_kind": {"weights": 3.0}, "ms_nothing_runs": 1.0})
    inference.make_page(rows, page)
    assert "from 1,024 tokens on" in page.read_text() and "weights 3.00, nothing runs 1.00" in page.read_text()
    assert (tmp_path / "images" / "inference.png").is_file() and page.read_text().endswith("after\n")


def test_the_profile_adds_up(checkpoint, monkeypatch):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(checkpoint), dsla_hf.DSLAConfig(task_type="CAUSAL_LM", window_size=8, level=2)
    ).eval()
    runner = dsla_hf.inference.bench.measure.Runner(inference.ready(model, model.device))
    monkeypatch.setattr(inference, "Case", lambda engine, *rest: dsla_hf.inference.bench.measure.Case("eager", *rest))
    found = inference.profile(runner, 1e9, length=20)
    assert found["ms_nothing_runs"] + sum(found["ms_by_kind"].values()) == pytest.approx(found["ms_per_token"])


@pytest.mark.parametrize(
    "kernel, kind",
    [
        ("_softmax_decode_kernel", "softmax layers"),
        ("_window_decode_kernel", "DSLA layers"),
        ("void gemv2T_kernel_val", "weights"),
        ("triton_poi_fused_silu", "norms, activations, rest"),
    ],
)
def test_kernels_are_told_apart(kernel, kind):
    assert inference.kind_of(kernel) == kind
