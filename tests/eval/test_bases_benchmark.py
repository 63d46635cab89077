"""The benchmark of bases of several families runs on a CPU at small shapes by every engine; its rows outlive a run, and fill the page."""

import json
import time

import pytest
import torch
from scripts import loaded_script

from dsla_hf.core.cache import cache_bytes


@pytest.fixture
def benchmark():
    with loaded_script("benchmarks/bases.py") as module:
        yield module


def rows_in(folder):
    return json.loads((folder / "bases.json").read_text())["rows"]


def test_all_arms_of_a_shape_are_measured_and_a_later_run_goes_on(benchmark, tmp_path, monkeypatch, capsys):
    command = ["--tiny", "--device", "cpu", "--results", str(tmp_path), "--shapes", "glm4-9b", "--tokens", "40"]
    now = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    benchmark.main([*command, "--seconds", "6"])
    first = rows_in(tmp_path)
    assert 0 < len(first) < 12 and "did not suffice" in capsys.readouterr().out
    benchmark.main(command)
    rows = rows_in(tmp_path)
    assert rows[: len(first)] == first and "did not suffice" not in capsys.readouterr().out
    expected = [(arm, what, batch) for arm in benchmark.ARMS for what, batch in (("prefill", 1), ("decode", 1), ("decode", 2))]
    assert [(row["arm"], row["what"], row["batch_size"]) for row in rows] == expected
    assert not any("error" in row for row in rows)
    assert [row["level"] for row in rows[::3]] == [0, 0, 8, 16] and {row["kv_heads"] for row in rows} == {16}  # 8 layers of 2
    assert [row["engine"] for row in rows[::3]] == ["forward", "graph", "graph", "graph"]


@pytest.mark.parametrize("shape", ["gemma3-1b", "qwen3.5-4b"])
@pytest.mark.parametrize("why", [None, "of a reason"])
def test_where_no_graphs_can_run_rows_say_why(benchmark, shape, why, tmp_path, monkeypatch):
    if why is not None:
        monkeypatch.setattr(benchmark.GraphDecoder, "obstacle", lambda decoder, **options: why)
    benchmark.main(["--tiny", "--device", "cpu", "--results", str(tmp_path), "--shapes", shape, "--tokens", "40", "--layers", "6"])
    rows = rows_in(tmp_path)
    assert not any("error" in row for row in rows)
    for row in rows:
        by_graph = why is None and row["arm"] != "plain"
        assert row["engine"] == ("graph" if by_graph else "forward")
        assert row.get("no_graphs") == (None if row["arm"] == "plain" else why)
    assert {row["kv_heads"] for row in rows} == {2}  # one layer of six sees all tokens, or is no linear one


@torch.no_grad()
@pytest.mark.parametrize("shape", ["gemma3-4b", "qwen3.5-4b"])
def test_every_row_of_a_batch_goes_on_as_the_prompt_that_was_read(benchmark, shape):
    plan = benchmark.tiny_plan()
    base = benchmark.ready(benchmark.random_model(plan.shapes[shape].config(), torch.float32, torch.device("cpu")), torch.device("cpu"))
    for arm, _, _, network in benchmark.arms(base):
        engine = benchmark.Forwards(network, plan)
        _, cache = engine.prompt(40)
        of_one = cache_bytes(cache)
        seen = []
        hook = base.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.logits))
        monkeyed, engine.ids = engine.ids, lambda rows, tokens: torch.full((rows, tokens), 5)
        engine.decode(40, 3)
        hook.remove()
        engine.ids = monkeyed
        assert len(seen) == 4 + plan.steps and cache.get_seq_length() == 40 + len(seen)
        assert all(torch.allclose(logits[:1].expand_as(logits), logits, atol=1e-5) for logits in seen), arm
        assert cache_bytes(cache) >= 3 * of_one and engine.last is None


def test_the_shapes_are_those_of_the_checkpoints_cut_to_some_layers(benchmark):
    for name, shape in benchmark.SHAPES.items():
        config = shape.config()
        assert config.num_hidden_layers == shape.layers < shape.of_layers
        share = config.vocab_size / shape.values["vocab_size"]
        assert share == pytest.approx(shape.layers / shape.of_layers, rel=0.01), name
    kinds = benchmark.SHAPES["gemma3-4b"].config().layer_types
    assert kinds.count("full_attention") == 2 and len(kinds) == 12


def test_the_page(benchmark, tmp_path):
    page, plot = tmp_path / "bases.md", tmp_path / "bases.png"
    page.write_text("before\n<!-- bases -->\nold\n<!-- end -->\nafter\n")
    benchmark.make_page([], page, plot)
    assert "Nothing measured yet." in page.read_text() and not plot.exists()
    common = {"shape": "glm4-9b", "layers": 8, "of_layers": 40, "tokens": 8192, "kv_heads": 16, "device": "a card", "batch_size": 1}
    plain = {**common, "arm": "plain", "level": 0, "engine": "forward"}
    half = {**common, "arm": "half", "level": 8, "engine": "graph", "no_graphs": "of a reason"}
    rows = [
        {**plain, "what": "decode", "seconds_per_token": 0.012},
        {**half, "what": "decode", "seconds_per_token": 0.003},
        {**plain, "what": "prefill", "prefill_seconds": 0.25},
        {**half, "what": "prefill", "error": "out of memory"},
    ]
    benchmark.make_page(rows, page, plot)
    text = page.read_text()
    assert "On one a card:" in text and "images/bases.png" in text and plot.exists() and "No graphs for glm4-9b: of a reason." in text
    assert "| glm4-9b, 8 of 40 layers | transformers, SDPA | forward | 0.25 | 12 |" in text
    assert "| glm4-9b, 8 of 40 layers | level 8 of 16 KV heads | graph | out of memory | 3 |" in text


@pytest.mark.parametrize(
    "given, said",
    [
        (["--shapes", "llama"], "invalid choice"),
        (["--device", "cpu"], "--tiny runs on a CPU"),
        (["--tiny", "--tokens", "20"], "--tokens must be above"),
        (["--tiny", "--layers", "0"], "--layers of gemma3-4b must be from 1 to 34, got 0"),
    ],
)
def test_what_it_does_not_take_is_refused(benchmark, given, said, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([*given, "--results", str(tmp_path)])
    assert said in capsys.readouterr().err
