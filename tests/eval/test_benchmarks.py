"""The CPU side of the benchmarks: floors by bytes, cases and options."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scripts import loaded_script

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "benchmarks" / "kernels.py"
TB_S = 4.25


@pytest.fixture(scope="module")
def benchmark():
    with loaded_script("benchmarks/kernels.py") as module:
        yield module


def test_floors_are_what_a_count_by_hand_gives(benchmark):
    def milliseconds(bytes_moved):
        return bytes_moved / TB_S / 1e9

    one = 8192 * 32 * 128 * 2  # bytes of q at T = 8,192
    states = 128 * 32 * 2 * 128 * 128 * 2  # of both bf16 states at 128 boundaries
    pure = benchmark.PURE
    assert benchmark.forward_bytes(pure) == 6 * one
    assert benchmark.forward_bytes(pure, 2) == 10 * one + 2 * states
    assert benchmark.training_bytes(pure) == 10 * one + 2 * states + 4 * states + (4 + 4 + 11) * one
    assert milliseconds(benchmark.forward_bytes(pure)) == pytest.approx(0.095, rel=0.01)
    assert milliseconds(benchmark.forward_bytes(pure, 2)) == pytest.approx(0.284, rel=0.01)
    assert milliseconds(benchmark.forward_bytes(benchmark.GROUPED, 2)) == pytest.approx(0.095, rel=0.01)
    assert milliseconds(benchmark.training_bytes(pure)) == pytest.approx(0.84, rel=0.01)
    assert milliseconds(benchmark.decode_bytes(replace(pure, batch=16))) == pytest.approx(0.0316, rel=0.01)
    assert benchmark.fold_bytes(pure) == 4 * one + 32 * 2 * 128 * 128 * 4


def test_floors_with_a_window_count_ring_sinks_and_write_gates(benchmark):
    x = replace(benchmark.WINDOW, batch=2, heads=8, kv_heads=4, tokens=256)
    state, token = 2 * 4 * 2 * 128 * 128 * 4, 2 * 4 * 128 * 2
    assert benchmark.decode_bytes(x) == state + state * 2 / 64 + (128 + 4) * 2 * token
    gates = 256 * 2 * 4 * (2 * 64 + 2) * 2
    assert benchmark.forward_bytes(x) == 256 * (2 * 2 * token + 2 * token) + gates
    assert benchmark.forward_bytes(x, 2) - benchmark.forward_bytes(x) == 256 * 2 * token + 2 * 4 * state / 2


def test_every_part_has_cases_and_quick_runs_have_fewer(benchmark):
    for part in benchmark.PARTS[:-1]:
        full, quick = (set(benchmark.cases([part], quick, True)) for quick in (False, True))
        assert quick and len(quick) <= len(full) and {case.part for case in full} == {part}
        for case in full:
            assert case.form in benchmark.FORMS and benchmark.operations(case.what, case.shape) > 0
            assert all(moved > 0 for moved in benchmark.floors(case.what, case.shape).values())


def test_options(benchmark, capsys, monkeypatch):
    assert benchmark.parse_arguments(["--parts", "decode,fold", "--quick"]).parts == ["decode", "fold"]
    with pytest.raises(SystemExit):
        benchmark.parse_arguments(["--parts", "dinner"])
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--floors", "--parts", "forward"])
    benchmark.main()
    assert "two passes" in capsys.readouterr().out


def test_the_reference_in_pieces_is_the_reference(benchmark, monkeypatch):
    """On the CPU, so that a long run on a device compares with the truth."""
    plain_arange, plain_randn = torch.arange, torch.randn
    monkeypatch.setattr(torch, "arange", lambda *a, device=None, **o: plain_arange(*a, **o))
    monkeypatch.setattr(torch, "randn", lambda *a, device=None, **o: plain_randn(*a, **o))
    from dsla_kernels import reference

    for layer in (replace(benchmark.PURE, size=8, decays=8), replace(benchmark.WINDOW, size=8, decays=4, window=8, sinks=2)):
        x = replace(layer, tokens=50, heads=2, kv_heads=1)
        inputs = {name: value.double() for name, value in benchmark.make_inputs(x).items()}
        expected = benchmark.apply(reference, inputs, benchmark.window_options(x, inputs))
        assert torch.allclose(benchmark.reference_in_pieces(x, inputs, piece=16), expected, rtol=0, atol=1e-12)


def test_plots_and_result_file(benchmark, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(benchmark, "IMAGES", tmp_path)
    rows = []
    for case in benchmark.cases(["tokens", "batch", "heads"], True, True):
        row = {"part": case.part, "layer": case.layer, "form": case.form, **vars(case.shape), "ms": 1.0}
        rows.append(row | {"floors": benchmark.floors(case.what, case.shape)})
    benchmark.make_plots(rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kernels-batch.png", "kernels-heads.png", "kernels-tokens.png"]


def test_a_benchmark_starts_beside_one_that_is_called_as_a_package():
    """transformers imports a package `kernels`; in this folder lies a file of that name."""
    done = subprocess.run([sys.executable, SCRIPT.with_name("kernel_training.py"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["readme", "recipe_page", "real_checkpoint_page"])
def test_makers_of_pages_say_what_they_do_and_do_nothing_then(script):
    done = subprocess.run([sys.executable, SCRIPT.parents[1] / f"{script}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: {script}.py" in done.stdout, done.stderr


@pytest.mark.parametrize(
    "script, wrong, words",
    [
        ("sampling", ["--rows", "0"], "--rows must be 1 or more, got 0"),
        ("sampling", ["--repeats", "0"], "--repeats must be 1 or more, got 0"),
        ("sampling", ["--vocabularies", "400", "100"], "--vocabularies must be 356 or more"),
        ("sampling", ["--device", "nonsense"], "--device must be cpu or cuda, got nonsense"),
        ("softmax_prompt", [], "needs a CUDA device"),
    ],
)
def test_benchmarks_refuse_what_they_cannot_time(script, wrong, words, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with loaded_script(f"benchmarks/{script}.py") as benchmark:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--results", str(tmp_path), *wrong])
        with pytest.raises(SystemExit):
            benchmark.main()
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_benchmark_of_draws_serves_every_case(monkeypatch, tmp_path, capsys):
    with loaded_script("benchmarks/sampling.py") as sampling:
        arguments = ["sampling.py", "--device", "cpu", "--rows", "2", "--vocabularies", "400", "--repeats", "1", "--results", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", arguments)
        sampling.main()
        rows = json.loads((tmp_path / "sampling.json").read_text())["rows"]
        assert [row["asked"] for row in rows] == list(sampling.CASES) and all(row["ms"] > 0 for row in rows)
        (request,) = sampling.requests_of(sampling.CASES["all of it"], 1, 400)
        assert request.sampling.top_k == 50 and request.constraint.mask().tolist() == [0x55555555] * 13
        page = sampling.page_part(json.loads((tmp_path / "sampling.json").read_text()))
        assert "2 rows" in page and page.count("\n| 400 | ") == len(sampling.CASES) and "host_ms" not in page
    assert "| cpu | 400 | 2 | greedy |" in capsys.readouterr().out


def test_speed_of_training_is_measured_beside_a_plain_step(tmp_path):
    with loaded_script("benchmarks/training_speed.py") as script:
        script.main(f"--shape tiny --rows 1 --length 96 --steps 1 --ways eager --layers window --results {tmp_path}".split())
    rows = json.loads((tmp_path / "training-speed.json").read_text())["rows"]
    assert [(row["step"], row["layer"]) for row in rows] == [("plain", ""), ("alignment", "window"), ("logits", "window")]
    assert rows[0]["of_plain"] == 1 and all(row["tokens_per_second"] == pytest.approx(96 / row["step_seconds"]) for row in rows)


def test_times_of_prompts_leave_out_what_there_is_not(tmp_path):
    with loaded_script("benchmarks/prompt_attention.py") as script:
        rows = script.main(["--shapes", "llama3-8b", "--results", str(tmp_path)])
    timed = [row for row in rows if "new" in row]
    assert timed and all(row["chosen"] > 0 and row["chosen_first"] > 0 for row in timed)
    if not torch.cuda.is_available():
        assert not any(key.startswith(("flash", "cudnn", "blocks")) for row in timed for key in row)
    one_by_one = {row["form"]: row for row in rows if "form" in row}
    assert {"default", "chosen"} <= set(one_by_one) and all(row["second_time"] > 0 for row in one_by_one.values())
    assert json.loads((tmp_path / "prompt_attention.json").read_text())["rows"] == rows


def test_times_of_the_linear_layers_of_a_step(tmp_path):
    with loaded_script("benchmarks/step_linears.py") as script:
        rows = script.main(["--results", str(tmp_path)])
    assert {row["rows"] for row in rows} >= {1, 17} and all(row["separate"] > 0 and row["joined"] > 0 for row in rows)
    assert json.loads((tmp_path / "step_linears.json").read_text())["rows"] == rows
