"""The benchmark of models at levels in heads runs on a CPU at small shapes; its rows outlive a run, and say what they are read for."""

import gc
import json
import time
import weakref

import pytest
import torch
from scripts import loaded_script

from dsla_hf.core.cache import VisibleStaticLayer


@pytest.fixture
def benchmark():
    with loaded_script("benchmarks/heads_models.py") as module:
        yield module


@pytest.fixture
def base(benchmark):
    plan = benchmark.tiny_plan()
    return benchmark.ready(benchmark.random_model(plan.shapes["8B"], torch.float32, torch.device("cpu")), torch.device("cpu"))


def rows_in(folder):
    return json.loads((folder / "heads-models.json").read_text())["rows"]


def test_rows_come_in_order_and_a_later_run_goes_on(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "PIECE", 16)  # beginnings are read in pieces
    command = ["--tiny", "--device", "cpu", "--results", str(tmp_path), "--shapes", "8B", "--tokens", "40"]
    now = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    benchmark.main([*command, "--seconds", "12"])
    first = rows_in(tmp_path)
    assert 0 < len(first) < 15 and "did not suffice" in capsys.readouterr().out

    made = []
    measured = benchmark.measured
    monkeypatch.setattr(benchmark, "measured", lambda network, plan, place: made.append(place) or measured(network, plan, place))
    benchmark.main(command)
    rows = rows_in(tmp_path)
    assert rows[: len(first)] == first and len(made) == 15 - len(first) and "did not suffice" not in capsys.readouterr().out
    levels = [("all", 8), ("layer", 4), ("layer", 2), ("head", 4), ("head", 2)]
    decoded = [("decode", *level, batch) for level in levels for batch in ("one", "largest")]
    assert [(row["what"], row["unit"], row["kept"], row["batch"]) for row in rows] == decoded + [
        ("prefill", *level, "one") for level in levels
    ]
    assert not any("error" in row for row in rows)
    assert all(row.get("seconds_per_token", row.get("prefill_seconds")) > 0 for row in rows)

    # Levels that keep as many heads have caches as large, and as many texts fit as the memory is multiples of them.
    plan, config = benchmark.tiny_plan(), benchmark.tiny_plan().shapes["8B"]
    for row in rows[:10]:
        room = benchmark.bytes_per_row(config, plan, row["kept"], 4, -(-(40 + plan.steps + 4) // 8) * 8)
        counters = 8 * 4 * row["batch_size"]
        assert 0 <= row["cache_bytes"] - room * row["batch_size"] <= counters
        if row["batch"] == "largest":
            assert row["batch_size"] == plan.memory // benchmark.bytes_per_row(config, plan, row["kept"], 4, 40 + plan.steps + 4) > 1


def test_a_filled_cache_is_decoded_to_its_end(benchmark, base, monkeypatch):
    """Whatever the cache was filled with: a step adds one token to all counts, and sees as many as were claimed."""
    spaces = []
    timing = benchmark.decode_behind.__globals__
    fill = timing["fill"]
    monkeypatch.setitem(timing, "fill", lambda space, tokens: spaces.append(space) or fill(space, tokens))
    plan = benchmark.tiny_plan()
    for unit, _, network in benchmark.arms(base, plan):
        benchmark.decode(network, plan, 40, 2)
        space = spaces.pop()
        end = 40 + plan.steps + 3
        assert space.read == end and space.lengths.tolist() == [end + 1] * 2 and space.positions.flatten().tolist() == [end] * 2
        for layer in space.layers():
            assert int(layer.get_seq_length()) == end, unit
            if isinstance(layer, VisibleStaticLayer):
                assert layer.keys[:, :, :end].any(-1).all()
            else:
                assert layer.state.lengths.tolist() == [end] * 2


def test_the_base_is_as_it_was_and_adapters_are_gone(benchmark, base):
    def kinds():
        return [type(module) for module in base.modules()]

    before, adapted = kinds(), []
    for unit, _, network in benchmark.arms(base, benchmark.tiny_plan()):
        if unit != "all":
            adapted.append(weakref.ref(network.get_base_model().model.layers[0].self_attn))
    del network
    gc.collect()
    assert kinds() == before and len(adapted) == 4 and all(layer() is None for layer in adapted)


def test_fewer_texts_where_memory_does_not_suffice(benchmark, base, monkeypatch):
    tried = []

    def decode(network, plan, tokens, rows):
        if tokens == 40:
            tried.append(rows)
            if rows > 4:
                raise torch.OutOfMemoryError("")
        return {"batch_size": rows}

    monkeypatch.setattr(benchmark, "decode", decode)
    place = {"what": "decode", "batch": "largest", "tokens": 40, "kept": 8}
    assert benchmark.measured(base, benchmark.tiny_plan(), place) == {"batch_size": 4}
    assert tried[-1] == 4 and len(tried) > 1
    place["tokens"] = 41
    monkeypatch.setattr(benchmark, "most_rows", lambda *rest: 0)
    assert benchmark.measured(base, benchmark.tiny_plan(), place) == {"batch_size": 1}  # at least that is tried


def test_the_page(benchmark, tmp_path):
    page = tmp_path / "inference.md"
    page.write_text("before\n<!-- heads -->\nold\n<!-- end -->\nafter\n")
    benchmark.make_page([], page)
    assert "Nothing measured yet." in page.read_text() and "old" not in page.read_text()

    place = {"shape": "8B", "tokens": 32768, "device": "a card", "kv_heads": 256}
    rows = [
        {**place, "what": "decode", "unit": "head", "kept": 64, "batch": "largest", "batch_size": 8, "seconds_per_token": 0.02}
        | {"tokens_per_second": 400.0, "cache_bytes": 8 * 10**9},
        {**place, "what": "prefill", "unit": "layer", "kept": 64, "batch": "one", "error": "out of memory"},
    ]
    benchmark.make_page(rows, page)
    text = page.read_text()
    assert "On one a card:" in text and text.endswith("after\n")
    assert "| 8B | 32768 | 64 of 256 heads | 1 |  |  | 8 | 20 | 400 |" in text
    assert "| 8B | 32768 | 64 of 256 heads, in whole layers |  |  | out of memory |" in text


@pytest.mark.parametrize("given", [["--what", "training"], ["--shapes", "70B"], ["--device", "cpu"], ["--tiny", "--tokens", "20"]])
def test_what_it_does_not_take_is_refused(benchmark, given, tmp_path, capsys):
    with pytest.raises(SystemExit):
        benchmark.main([*given, "--results", str(tmp_path)])
    said = {"--device": "--tiny runs on a CPU", "--tiny": "--tokens must be above"}.get(given[0], "invalid choice")
    assert said in capsys.readouterr().err
