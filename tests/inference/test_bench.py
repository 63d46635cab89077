"""`dsla bench`: what it measures, what it predicts, and what it does where something does not run."""

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch
from head_layers import ORDER, text
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import dsla_hf.inference.bench.measure
from dsla_cli import main
from dsla_hf import DSLAConfig, cache_bytes
from dsla_hf.evaluation.report.measurements import read_measurements
from dsla_hf.inference.bench.costs import costs_of
from dsla_hf.inference.bench.measure import TRIED, Case, Runner, bench, largest, measure_largest
from dsla_hf.inference.bench.models import PRESETS, networks, preset_config
from dsla_hf.inference.bench.results import Results
from dsla_hf.inference.graph import GraphDecoder, PlainRecording
from dsla_hf.models.sizes import text_bytes


@pytest.fixture
def checkpoint(tiny_model, tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture(autouse=True)
def no_waiting_for_the_machine(monkeypatch):
    monkeypatch.setattr(dsla_hf.inference.bench.measure, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(dsla_hf.inference.bench.measure, "matmul_rate", lambda device, dtype: 1e9)


@pytest.fixture
def graphs_without_a_gpu(monkeypatch):
    monkeypatch.setattr(dsla_hf.inference.bench.measure, "GraphDecoder", lambda model: GraphDecoder(model, record=PlainRecording))


def test_a_base_with_and_without_adapter_and_a_hybrid(adapter_model, checkpoint, tmp_path, graphs_without_a_gpu, monkeypatch, capsys):
    said = []
    monkeypatch.setattr(dsla_hf.models.level_guards.logger, "warning", said.append)
    adapter = adapter_model(AutoModelForCausalLM.from_pretrained(checkpoint), level=1)
    adapter.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    command = ["bench", "--model", checkpoint, "--adapter", str(tmp_path / "adapter"), "--levels", "100%", "--lengths", "20,30"]
    command += ["--batches", "2", "--engines", "eager,graph", "--new-tokens", "6", "--output", str(out)]
    assert main(command) == 0
    content = json.loads((out / "bench.json").read_text())
    assert {"command", "versions", "device", "rows"} <= content.keys()
    rows = content["rows"]
    assert [row["level"] for row in rows] == [0] * 4 + [4] * 4
    for row in rows:
        assert "error" not in row
        assert row["prefill_seconds"] > 0 and row["seconds_per_token"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["batch_size"] / row["seconds_per_token"])
        assert row["cache_bytes"] == row["predicted_cache_bytes"]
        assert row["predicted_seconds_per_token"] == row["moved_bytes_per_token"] / 1e9
        assert ("against_level_0" in row) == (row["level"] > 0)
    assert (out / "bench.png").is_file()
    assert "| graph | 4 | 30 | 2 |" in capsys.readouterr().out
    found, _ = read_measurements(str(out / "bench.json"))
    assert {(m.arm, m.metric) for m in found} >= {("base, graph", "seconds_per_token@30 batch 2")}

    adapter.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    rows = bench(str(tmp_path / "hybrid"), lengths=[20], new_tokens=4, output=str(out))
    assert [row["level"] for row in rows] == [0, 1] and not any("error" in row for row in rows)
    with pytest.raises(ValueError, match="hybrid of one level"):
        bench(str(tmp_path / "hybrid"), levels=["2"], output=str(out))

    rows = bench(checkpoint, lengths=[20], new_tokens=4, output=str(out))
    assert [row["level"] for row in rows] == [0, 2, 4]
    assert not said, "speed does not depend on training"


def test_the_stall_of_a_raise(checkpoint, tmp_path, graphs_without_a_gpu):
    options = {"levels": ["4"], "lengths": [20], "new_tokens": 8, "output": str(tmp_path)}
    rows = bench(checkpoint, engines=["eager", "graph"], raises=True, **options)
    assert [row["raise_seconds"] is None for row in rows] == [True, True, False, False]
    assert not any("error" in row for row in rows)
    assert rows[3]["capture_seconds"] > 0


def test_what_does_not_run_is_a_row_with_its_error(checkpoint, tmp_path, monkeypatch):
    rows = bench(checkpoint, engines=["compiled", "graph"], levels=["1"], lengths=[20], new_tokens=4, output=str(tmp_path / "out"))
    assert len(rows) == 4
    assert "accelerators only" in rows[0]["error"] and "need a CUDA device" in rows[1]["error"]
    assert not (tmp_path / "out/bench.png").exists(), "there is nothing to draw"

    written = []
    run = Runner.run

    def full(self, case, tokens, prompt=None, **more):
        file = tmp_path / "out/bench.json"
        written.append(len(json.loads(file.read_text())["rows"]))
        if case.rows == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, case, tokens, prompt)

    (tmp_path / "out/bench.json").write_text('{"rows": []}')
    monkeypatch.setattr(Runner, "run", full)
    rows = bench(checkpoint, levels=["1"], lengths=[20], batches=[1, 2, 3], new_tokens=4, output=str(tmp_path / "out"))
    assert [row.get("error") for row in rows] == [None, "out of memory", None] * 2
    assert written == [0, 0, 1, 2, 2, 3, 3, 4, 5, 5], "every row is in the file when the next one begins"


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 16, 100, 999, 5000])
def test_the_largest_batch_is_found_within_a_sixteenth(limit):
    tried = []

    def fits(rows):
        tried.append(rows)
        return rows <= limit

    found = largest(fits)
    most = min(limit, 4096)
    assert found <= most and most - found <= most / 16
    assert len(tried) < 20


def test_the_largest_batch_is_measured(tiny_model, monkeypatch):
    runner = Runner(tiny_model("llama"))
    run = Runner.run

    def up_to(self, case, tokens, prompt=None, **more):
        if case.rows > (8 if tokens == TRIED else 7):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, case, tokens, prompt)

    monkeypatch.setattr(Runner, "run", up_to)
    numbers = measure_largest(runner, Case("eager", 20, 0, 4))
    assert numbers["batch_size"] == 7 and numbers["seconds_per_token"] > 0
    assert "accelerators only" in measure_largest(runner, Case("compiled", 20, 0, 4))["error"]


def test_large_batches_of_states_alone_read_a_short_prompt_and_say_so(tiny_model, adapter_model, monkeypatch):
    monkeypatch.setattr("dsla_hf.inference.bench.measure.MOST_PROMPT_TOKENS", 50)
    monkeypatch.setattr("dsla_hf.inference.bench.measure.SHORT_PROMPT", 24)
    model = adapter_model(tiny_model("llama"))
    read = {}
    for level, rows in ((4, 2), (4, 1), (3, 2)):
        model.set_level(level)
        numbers = Runner(model).measure(Case("eager", 40, rows, 4))
        read[level, rows] = numbers["prompt_tokens"]
        assert (numbers["prefill_seconds"] is None) == (numbers["prompt_tokens"] == 24)
        assert numbers["seconds_per_token"] > 0
        if level == 4:
            assert numbers["cache_bytes"] == numbers["predicted_cache_bytes"]
    assert read == {(4, 2): 24, (4, 1): 40, (3, 2): 40}


@pytest.mark.parametrize(
    "options, words",
    [
        ({"engines": ["fast"]}, r"no engine \['fast'\]; there are eager, compiled, graph"),
        ({"new_tokens": 2}, "must be 3 or more"),
        ({"levels": ["9"]}, "above the plan"),
        ({"largest_batch": True}, "leave --largest-batch out"),
    ],
)
def test_options_that_cannot_be(checkpoint, tmp_path, options, words):
    with pytest.raises(ValueError, match=words):
        bench(checkpoint, output=str(tmp_path / "out"), **options)


def test_a_long_prompt_is_read_in_forwards_of_bounded_size(tiny_model):
    model = tiny_model("llama")
    seen = []
    model.register_forward_hook(lambda module, args, kwargs, output: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True)
    Runner(model).run(Case("eager", 40, 2, 4, prefill_tokens=32), 4)
    assert seen == [(2, 16), (2, 16), (2, 8)] + [(2, 1)] * 3


def test_presets_are_the_shapes_that_their_names_say():
    sizes = {"llama2-7b": 6_738_415_616, "llama3-8b": 8_030_261_248, "qwen3-1.7b": 1_720_574_976}
    assert sizes.keys() == PRESETS.keys()
    for name, size in sizes.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(preset_config(name), dtype=torch.bfloat16)
        assert sum(p.numel() for p in model.parameters()) == size


@pytest.mark.parametrize("window_size", [0, 8])
def test_costs_follow_the_level(tiny_model, window_size):
    base = tiny_model("llama")
    plain = costs_of(base)
    embedding = base.get_input_embeddings().weight  # tied: it is the output matrix too
    assert plain.weight_bytes == sum(p.numel() * 4 for p in base.parameters())
    assert plain.head_weights == embedding.numel()
    assert plain.token_bytes(2, 10) == plain.weight_bytes + 2 * 8 * 11 * plain.bytes_per_token  # four layers of two KV heads
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", window_size=window_size))
    model.set_level(0)
    assert costs_of(model) == plain
    for level in (1, 4):
        model.set_level(level)
        costs = costs_of(model)
        own = sum(p.numel() for p in model.get_base_model().model.layers[0].self_attn.dsla_core.parameters())
        assert costs.weight_bytes == plain.weight_bytes + level * own * 4
        with torch.no_grad():
            cache = model(torch.randint(3, 97, (2, 30)), use_cache=True).past_key_values
        assert costs.cache_bytes(2, 30) == cache_bytes(cache)
        core = costs.cores[0]
        state = 2 * core.num_kv_heads * core.key_dim * core.value_dim * 4
        read = 2 * state if window_size == 0 else state * 1.5 + (8 + 4 + 1) * 2 * costs.bytes_per_token
        moved = costs.token_bytes(2, 30) - costs.weight_bytes - 2 * 2 * (4 - level) * 31 * costs.bytes_per_token
        assert moved == pytest.approx(2 * level * read)
        assert costs.prompt_operations(2, 30) == 2 * costs.prompt_operations(1, 30)
    assert costs.prompt_operations(1, 10**6) < plain.prompt_operations(1, 10**6) / 10


def test_costs_of_windows_alone(tiny_model, adapter_model):
    order = [[layer, head] for layer in (2, 0, 3, 1) for head in (1, 0)]
    model = adapter_model(tiny_model("llama"), conversion_unit="head", conversion_order=order, level=0, window_size=8, states=False)
    model.eval().requires_grad_(False)
    found = []
    for level in range(9):
        model.set_level(level)
        with torch.no_grad():
            cache = model(torch.randint(3, 97, (2, 30)), use_cache=True).past_key_values
        found.append(costs_of(model))
        assert found[-1].cache_bytes(2, 30) == cache_bytes(cache)
        assert found[-1].weight_bytes == found[0].weight_bytes, "there are no parameters beside the projections"
    moved = [costs.token_bytes(2, 5000) for costs in found]
    assert moved == sorted(moved, reverse=True) and len(set(moved)) == 9


@pytest.mark.parametrize("window_size", [0, 8])
@pytest.mark.parametrize("kind", ["llama", "phi3"])  # apart and fused projections
def test_costs_of_heads_end_where_those_of_layers_do(tiny_model, adapter_model, kind, window_size):
    layers = adapter_model(tiny_model(kind), conversion_order=[2, 0, 3, 1], window_size=window_size)
    heads = adapter_model(tiny_model(kind), conversion_order=ORDER, conversion_unit="head", window_size=window_size)
    for level in (0, 4):
        layers.set_level(level)
        heads.set_level(2 * level)
        of_layers, of_heads = costs_of(layers), costs_of(heads)
        assert replace(of_heads, cores=()) == replace(of_layers, cores=())
        for reckoned in ("cache_bytes", "token_bytes", "prompt_operations"):
            assert getattr(of_heads, reckoned)(3, 5000) == getattr(of_layers, reckoned)(3, 5000)


@pytest.mark.parametrize("hybrid", [False, True])
@pytest.mark.parametrize("window_size", [0, 8])
def test_costs_of_a_layer_are_the_sum_over_its_heads(tiny_model, adapter_model, window_size, hybrid):
    plan = {"conversion_order": ORDER, "conversion_unit": "head", "window_size": window_size}
    heads, long = adapter_model(tiny_model("llama"), level=0, **plan), 100_000
    plain, config = costs_of(heads), heads.peft_config["default"]
    own = sum(p.numel() for p in heads.get_base_model().model.layers[0].self_attn.dsla_core.parameters()) / 2
    found = []
    for level in range(9):
        heads.set_level(level)
        model = copy.deepcopy(heads).merge_and_unload() if hybrid and level else heads
        costs = costs_of(model)
        converted = {layer: len(planned) for layer in range(4) if (planned := config.heads_of(layer))}
        assert [core.num_kv_heads for core in costs.cores] == list(converted.values())
        assert costs.kept_heads == 8 - level == 8 - sum(converted.values())
        assert costs.weight_bytes == plain.weight_bytes + level * own * 4, "projections once, and of converted heads what is DSLA's own"
        with torch.no_grad():
            cache = model(text(2, 30), use_cache=True).past_key_values
        assert costs.cache_bytes(2, 30) == cache_bytes(cache)
        counters = 8 * (level - len(converted))  # a layer's heads share one; levels reckon as if each had its own
        for tokens in (1, 30, 4096, long):
            assert costs.cache_bytes(1, tokens) == text_bytes(heads.get_base_model(), config, tokens, level) - counters
        found.append([costs.cache_bytes(1, long), costs.token_bytes(1, long), costs.prompt_operations(1, long)])
    for numbers in zip(*found, strict=True):
        assert all(after < before for before, after in itertools.pairwise(numbers))
    steps = [after[1] - before[1] for before, after in itertools.pairwise(found)]
    assert steps == pytest.approx([steps[0]] * 8), "every head saves as much"


def test_costs_do_not_depend_on_how_weights_of_a_split_layer_are_held(tiny_model, adapter_model):
    """In one buffer in order of conversion; composed, where keys or values are trained, too; both matrices of queries, where a hook
    forbids that."""
    options = {"conversion_order": ORDER, "conversion_unit": "head", "level": 1}
    buffers = adapter_model(tiny_model("llama"), **options)
    composed = adapter_model(tiny_model("llama"), **options, trained_projections=["q_proj", "k_proj", "o_proj"])
    expected = costs_of(buffers)
    assert costs_of(composed).weight_bytes == expected.weight_bytes
    attention = buffers.get_base_model().model.layers[2].self_attn
    with torch.no_grad():
        runs = attention.running_attention()
        buffers(text(1, 5))
    assert costs_of(buffers).weight_bytes == expected.weight_bytes
    with torch.no_grad():
        assert attention.running_attention() is runs, "recorded steps read its weights where they are"

    handle = attention.base_layer.q_proj.register_forward_hook(lambda *_: None)
    found = costs_of(buffers)
    handle.remove()
    assert found.weight_bytes - expected.weight_bytes == attention.dsla_q_proj["default"].weight.numel() * 4


def test_bench_of_heads_says_how_many_are_kept(adapter_model, checkpoint, tmp_path, graphs_without_a_gpu, capsys):
    adapter = adapter_model(AutoModelForCausalLM.from_pretrained(checkpoint), conversion_order=ORDER, conversion_unit="head", level=3)
    adapter.save_pretrained(tmp_path / "adapter")
    out = tmp_path / "out"
    command = ["bench", "--model", checkpoint, "--adapter", str(tmp_path / "adapter"), "--levels", "kept:50%,1", "--lengths", "20"]
    command += ["--engines", "eager,graph", "--new-tokens", "6", "--raises", "--output", str(out)]
    assert main(command) == 0
    rows = json.loads((out / "bench.json").read_text())["rows"]
    assert [(row["level"], row["kept"]) for row in rows] == [(0, 8)] * 2 + [(1, 7)] * 2 + [(4, 4)] * 2
    for row in rows:
        assert "error" not in row
        assert row["cache_bytes"] == row["predicted_cache_bytes"]
        assert (row["raise_seconds"] is None) == (row["level"] == 0)
    printed = capsys.readouterr().out
    assert "| engine | level | KV heads kept | length | batch |" in printed and "| graph | 4 | 4 (50%) | 20 | 1 |" in printed
    found, _ = read_measurements(str(out / "bench.json"))
    assert {m.kept for m in found} == {8, 7, 4}

    adapter.merge_and_unload().save_pretrained(tmp_path / "hybrid")
    rows = bench(str(tmp_path / "hybrid"), lengths=[20], new_tokens=4, output=str(out))
    assert [(row["level"], row["kept"], "error" in row) for row in rows] == [(0, 8, False), (3, 5, False)]


def test_levels_of_a_plan_of_heads_that_nobody_names(adapter_model, checkpoint, tmp_path):
    adapter = adapter_model(AutoModelForCausalLM.from_pretrained(checkpoint), conversion_order=ORDER[:5], conversion_unit="head", level=3)
    adapter.save_pretrained(tmp_path / "adapter")
    found = networks(checkpoint, str(tmp_path / "adapter"), None, "auto", torch.device("cpu"))
    assert [(level, kept) for _, level, kept in found] == [(0, 8), (4, 4), (5, 3)], "half of the heads, and all that the plan holds"
    with pytest.raises(ValueError, match=r"kept:10%, 7 of 8 heads, is above the plan"):
        list(networks(checkpoint, str(tmp_path / "adapter"), ["kept:10%"], "auto", torch.device("cpu")))


def plotted(folder, lengths, batches):
    results = Results(folder, 1e9)
    for length in lengths:
        for batch in batches:
            row = {"engine": "eager", "level": 0, "length": length, "batch_size": batch}
            results.rows.append(row | {"seconds_per_token": 1e-6 * length + batch, "predicted_seconds_per_token": 0.5})
    results.plot()


@pytest.mark.parametrize(
    "lengths, batches, titles", [([512, 4096], [1], ["batch size 1"]), ([512], [1, 8], ["length 512"]), ([512], [1], [])]
)
def test_a_plot_has_no_panel_of_one_point_and_plain_ticks(lengths, batches, titles, tmp_path, monkeypatch, capsys):
    from matplotlib.figure import Figure

    drawn, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: (drawn.append(figure), save(figure, *args, **options)))
    plotted(tmp_path, lengths, batches)
    assert [axes.get_title() for figure in drawn for axes in figure.axes] == titles
    if titles:
        ticks = [label.get_text() for label in drawn[0].axes[0].get_xticklabels()]
        assert ticks == [f"{value:,}" for value in (lengths if len(lengths) > 1 else batches)]
    else:
        assert "no plot: it needs two lengths or two batch sizes" in capsys.readouterr().out


def test_lines_of_heads_are_named_by_those_kept(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: drawn.append(figure))
    results = Results(tmp_path, 1e9)
    for length in (512, 4096):
        row = {"engine": "graph", "level": 81, "kept": 9, "length": length, "batch_size": 1}
        results.rows.append(row | {"seconds_per_token": 0.1, "predicted_seconds_per_token": 0.05})
    results.plot()
    assert [label.get_text() for label in drawn[0].axes[0].get_legend().get_texts()] == ["graph, KV heads kept: 9 (10%)"]


def test_rows_without_a_file_of_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    plotted(tmp_path, [512, 4096], [1])
    assert "no plot: plots need matplotlib: pip install" in capsys.readouterr().out and not list(tmp_path.iterdir())
