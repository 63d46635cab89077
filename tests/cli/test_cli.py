"""The command `dsla`, and its quickstart at a small size."""

import contextlib
import hashlib
import io
import json
import re
import sys
from importlib.metadata import version
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from dsla_cli import main
from dsla_hf import DSLAConfig, cache_bytes
from dsla_hf.cli import quickstart
from dsla_kernels import kernel_path

LAYERS, LENGTH, WINDOW = 2, 32, 8


def fingerprints(directory):
    """Every file below `directory` and the hash of its content."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def one_line_error(capsys, command):
    """The error that was printed, once it is clear that nothing else was."""
    output, error = capsys.readouterr()
    assert output == "" and error.startswith(f"dsla {command}: ") and error.count("\n") == 1 and error.endswith("\n")
    return error


def run_quickstart(output, *options, unit=("--unit", "layer"), length=LENGTH):
    """Run it at a small size: status, table rows, what was printed."""
    rows, printed, run = [], io.StringIO(), quickstart.run

    def keep_rows(*args, **kwargs):
        rows.extend(run(*args, **kwargs))

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        for name, value in (("LAYERS", LAYERS), ("LENGTH", length), ("WINDOW", WINDOW), ("PROBES", 3), ("run", keep_rows)):
            patch.setattr(quickstart, name, value)
        status = main(["quickstart", "--output", str(output), "--steps", "4", *unit, *options])
    return SimpleNamespace(status=status, rows=rows, printed=printed.getvalue(), output=output)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A quickstart that ran through."""
    return run_quickstart(tmp_path_factory.mktemp("quickstart") / "deep" / "output")


# --- the command ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["convert"], ["env", "--fast"], ["quickstart", "--steps", "many"]], ids=" ".join)
def test_unknown_commands_and_options_give_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    output, error = capsys.readouterr()
    assert caught.value.code == 2 and output == ""
    assert error.startswith("usage: dsla") and "error:" in error


@pytest.mark.parametrize(
    "arguments, words", [(["--help"], ["quickstart", "env"]), (["quickstart", "--help"], ["--output", "--steps", "--seed"])]
)
def test_help(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    output = capsys.readouterr().out
    assert caught.value.code == 0 and all(word in output for word in words)


def test_environment(capsys):
    assert main(["env"]) == 0
    output, error = capsys.readouterr()
    lines = dict(line.split(maxsplit=1) for line in output.splitlines())
    for package in ("dsla-hf", "torch", "transformers", "peft", "accelerate"):
        assert lines[package] == version(package)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert lines["kernels"] == kernel_path(device) and lines["python"] == sys.version.split()[0] and lines["platform"]
    assert lines["device"] == (torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads")
    assert error == ""


@pytest.mark.parametrize("hybrid", [False, True])
def test_what_of_a_model_is_fused(hybrid, tiny_model, adapter_model, tmp_path, capsys):
    model = tiny_model("qwen3")
    model = adapter_model(model, level=2).merge_and_unload() if hybrid else model
    model.save_pretrained(tmp_path)
    assert main(["env", "--model", str(tmp_path)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fused")]
    assert line.split(maxsplit=1)[1] == "norms 17 of 17, rotations 4 of 4, gated MLPs 4 of 4, layers 4 of 4"


def test_quantised_weights_are_not_fused(tiny_model, tmp_path, capsys):
    tiny_model("llama").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["env", "--model", str(tmp_path)]) == 0
    assert "layers 4 of 4 (without the MLPs: the weights are quantised)" in capsys.readouterr().out


def test_no_model_to_look_at(tmp_path, capsys):
    assert main(["env", "--model", str(tmp_path / "none")]) == 1
    output, error = capsys.readouterr()
    assert output == "" and error.startswith("dsla env: ") and error.count("\n") == 1


# --- errors of the quickstart -----------------------------------------------------------------------------------


@pytest.fixture
def no_training(monkeypatch):
    """Training fails: for what must be refused before it."""

    def fail(*args, **kwargs):
        raise AssertionError("training began")

    monkeypatch.setattr(quickstart, "train_teacher", fail)


def test_folder_with_other_content_is_refused_and_untouched(tmp_path, capsys, no_training):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    before = fingerprints(tmp_path)
    assert main(["quickstart", "--output", str(tmp_path)]) == 1
    error = one_line_error(capsys, "quickstart")
    assert str(tmp_path) in error and "--output" in error
    assert fingerprints(tmp_path) == before


def test_file_as_output_is_refused_and_untouched(tmp_path, capsys, no_training):
    (tmp_path / "notes").write_text("mine")
    assert main(["quickstart", "--output", str(tmp_path / "notes")]) == 1
    assert "notes" in one_line_error(capsys, "quickstart")
    assert (tmp_path / "notes").read_text() == "mine"


def test_missing_matplotlib_is_noticed_before_the_work(tmp_path, capsys, monkeypatch, no_training):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["quickstart", "--output", str(tmp_path / "output")]) == 1
    assert "matplotlib" in one_line_error(capsys, "quickstart")
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("steps", ["0", "-1"])
def test_number_of_steps_that_trains_nothing_is_refused(steps, tmp_path, capsys, no_training):
    status = None
    try:
        status = main(["quickstart", "--output", str(tmp_path / "output"), "--steps", steps])
    except SystemExit as end:  # refused by the parser
        status = end.code
    assert status in (1, 2) and "steps" in capsys.readouterr().err
    assert not (tmp_path / "output").exists()


# --- a whole quickstart -----------------------------------------------------------------------------------------


def test_quickstart_writes_models_and_plot(finished):
    assert finished.status == 0
    files = fingerprints(finished.output)
    for name in (
        "teacher/model.safetensors",
        "teacher/tokenizer.json",  # so that `dsla generate`, `merge` and `order` take it as it is
        "adapter/adapter_model.safetensors",
        "adapter/README.md",
        "hybrid/model.safetensors",
        "hybrid/tokenizer.json",
        "quickstart.png",
    ):
        assert name in files
    assert str(finished.output / "quickstart.png") in finished.printed
    written = json.loads((finished.output / "quickstart.json").read_text())
    assert written["rows"] == finished.rows and written["versions"]["torch"]
    assert written["command"] == "dsla quickstart --steps 4 --seed 0 --unit layer"


def test_plot_is_a_picture_with_something_in_it(finished):
    import matplotlib.image

    picture = matplotlib.image.imread(finished.output / "quickstart.png", format="png")
    assert picture.shape[0] > 200 and picture.shape[1] > 400
    assert picture[..., :3].std() > 0.01


def test_table_has_a_row_for_every_level(finished):
    assert [row["level"] for row in finished.rows] == list(range(LAYERS + 1))
    table = finished.printed[finished.printed.index("level  perplexity") :].splitlines()[1 : LAYERS + 2]
    for row, line in zip(finished.rows, table, strict=True):
        level, perplexity, kl, *sizes = re.sub(" KiB", "", line).replace(",", "").split()
        assert int(level) == row["level"]
        assert float(perplexity) == pytest.approx(row["perplexity"], abs=1e-3) and float(kl) == pytest.approx(row["kl"], abs=1e-4)
        assert [int(size) for size in sizes] == [round(row["bytes_1k"] / 1024), round(row["bytes_32k"] / 1024)]


def test_rows_are_of_the_saved_models(finished):
    assert finished.rows[0]["kl"] == 0 and all(row["kl"] > 0 for row in finished.rows[1:])
    sizes = [row["bytes_32k"] for row in finished.rows]
    assert sizes == sorted(sizes, reverse=True) and finished.rows[-1]["bytes_1k"] == finished.rows[-1]["bytes_32k"]
    hybrid = AutoModelForCausalLM.from_pretrained(finished.output / "hybrid")
    with torch.no_grad():
        cache = hybrid(torch.arange(1024)[None] % hybrid.config.vocab_size, use_cache=True).past_key_values
    assert cache_bytes(cache) == finished.rows[LAYERS // 2]["bytes_1k"]


def test_adapter_and_hybrid_load_and_agree(finished):
    hybrid = AutoModelForCausalLM.from_pretrained(finished.output / "hybrid").eval()
    teacher = AutoModelForCausalLM.from_pretrained(finished.output / "teacher").eval()
    ids = AutoTokenizer.from_pretrained(finished.output / "hybrid")(quickstart.PROMPT * 8, return_tensors="pt").input_ids
    assert type(hybrid).__name__ == "DSLALlamaForCausalLM" and ids.shape[1] > 2 * WINDOW
    with torch.no_grad():
        expected, original = hybrid(ids).logits, teacher(ids).logits
        adapter = PeftModel.from_pretrained(teacher, str(finished.output / "adapter")).eval()
        assert adapter.get_level() == LAYERS // 2
        torch.testing.assert_close(adapter(ids).logits, expected, rtol=0, atol=1e-5)
    assert (expected - original).abs().max() > 1e-3


def test_saved_plan_is_the_measured_one(finished):
    config = DSLAConfig.from_pretrained(finished.output / "adapter")
    assert config.order_scores is not None and sorted(config.conversion_order) == list(range(LAYERS))
    assert config.conversion_order == sorted(config.conversion_order, key=lambda layer: config.order_scores[str(layer)])
    assert config.level_metrics == {str(row["level"]): {name: row[name] for name in ("perplexity", "kl")} for row in finished.rows}


def test_both_texts_are_shown(finished):
    assert "[level 0] The following example" in finished.printed and f"[level {LAYERS}] " in finished.printed
    (difference,) = re.findall(r"differ by (\S+) in their logits", finished.printed)
    assert float(difference) < 1e-4


def test_quickstart_again_in_the_same_folder_gives_the_same(finished):
    again = run_quickstart(finished.output)
    assert again.status == 0 and again.rows == finished.rows


def test_quickstart_with_other_options_in_a_used_folder(tmp_path, capsys):
    """It may refuse and leave the folder alone, or do what it would have done in a new one: no mixture of two runs."""
    assert run_quickstart(tmp_path / "used").status == 0
    before = fingerprints(tmp_path / "used")
    for name, options in (("steps", ["--steps", "2"]),):
        capsys.readouterr()
        found = run_quickstart(tmp_path / "used", *options)
        if found.status:
            assert fingerprints(tmp_path / "used") == before, capsys.readouterr().err
        else:
            assert found.rows == run_quickstart(tmp_path / name, *options).rows


def test_quickstart_of_heads(tmp_path):
    """Levels that count the KV heads of all layers, the adapter saved where a quarter of them is kept, and a picture of which."""
    found = run_quickstart(tmp_path / "output", unit=(), length=192)  # tokens that questions have room in
    heads = LAYERS * quickstart.KV_HEADS
    assert found.status == 0
    assert [(row["level"], row["kept"]) for row in found.rows] == [(level, heads - level) for level in range(heads + 1)]
    assert re.search(r"^level +KV heads kept +perplexity .* cache at 2k tokens +at 8k tokens +at 32k tokens$", found.printed, re.M)
    config = DSLAConfig.from_pretrained(found.output / "adapter")
    assert config.conversion_unit == "head" and config.level == heads - heads // 4 and len(config.order_scores) == heads
    assert f"| {config.level} | {heads // 4} (25%) |" in (found.output / "adapter" / "README.md").read_text()
    assert (found.output / "heads.png").read_bytes().startswith(b"\x89PNG") and str(found.output / "heads.png") in found.printed
    assert json.loads((found.output / "quickstart.json").read_text())["command"] == "dsla quickstart --steps 4 --seed 0"
    assert AutoModelForCausalLM.from_pretrained(found.output / "hybrid").get_level() == config.level
