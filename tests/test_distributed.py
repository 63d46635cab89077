"""Distillation on two processes: the same losses and levels as on one with the same global batch, and it goes on after a stop."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dsla_hf.distillation import draw_level
from dsla_hf.quickstart import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[1]
OPTIONS = ["--length", "64", "--tokens", "2048", "--ranking_sequences", "2", "--window_size", "8", "--dtype", "float32"]
OPTIONS += ["--logging_steps", "1", "--save_steps", "2", "--report_to", "none", "--use_cpu", "--disable_tqdm", "True"]


@pytest.fixture
def job(tiny_model, tmp_path):
    texts = [" ".join(f"word{(i * j) % 23} of text" for j in range(300)) for i in range(1, 30)]
    tokenizer = train_tokenizer(texts, vocab_size=290)
    base = tiny_model("llama")
    base.resize_token_embeddings(len(tokenizer))
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\0".join(texts))
    return ["--model", str(tmp_path / "base"), "--data", str(tmp_path / "text.txt"), *OPTIONS]


def distill(options, processes):
    """Run examples/distill.py in fresh processes: nothing that other tests left in this one reaches them."""
    script = [str(REPOSITORY / "examples/distill.py"), *options]
    if processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        config = ["--config_file", str(REPOSITORY / "examples/configs/cpu2.yaml"), "--main_process_port", port]
        script = ["-m", "accelerate.commands.launch", *config, *script]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_", "MASTER_", "TORCH"))}
    done = subprocess.run(
        [sys.executable, *script],
        env={**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def history(output, stage, name):
    state = json.loads((output / stage / "trainer_state.json").read_text())
    return [entry[name] for entry in state["log_history"] if name in entry]


def test_two_processes_equal_one_and_go_on_after_a_stop(job, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    options = [*job, "--output_dir", str(two), "--per_device_train_batch_size", "2"]
    assert "processes 2" in distill(options, processes=2)
    assert "processes 1" in distill([*job, "--output_dir", str(one), "--per_device_train_batch_size", "4"], processes=1)

    for stage, term in (("alignment", "alignment/layer_2"), ("logits", "kl")):
        for name in ("loss", term):
            found, expected = history(two, stage, name), history(one, stage, name)
            assert len(found) == len(expected) == 4
            assert found == pytest.approx(expected, rel=1e-3)
    # The mean over processes is a whole number, that of the pure function, only if all of them drew it.
    assert history(two, "logits", "level") == [draw_level(42, step, 4) for step in range(4)]
    assert json.loads((two / "ranking.json").read_text())["order"] == json.loads((one / "ranking.json").read_text())["order"]

    finished = load_file(two / "adapter_model.safetensors")
    for path in (two / "adapter_config.json", two / "logits" / "adapter_config.json"):
        path.unlink()
    shutil.rmtree(two / "logits" / "checkpoint-4")
    distill(options, processes=2)
    again = load_file(two / "adapter_model.safetensors")
    assert finished.keys() == again.keys()
    for name, weight in finished.items():
        torch.testing.assert_close(again[name], weight, rtol=1e-6, atol=1e-7, msg=name)
