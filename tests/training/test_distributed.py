"""Distillation on two processes, with DDP and with FSDP2: the same losses and levels as on one with the same global batch, and a run
that is killed goes on, on the same number of processes (one, too) bit for bit, and on another."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.training.trainer import draw_level

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIGS = REPOSITORY / "examples" / "configs"
PROCESSES = str(REPOSITORY / "tests" / "support" / "processes.py")
OPTIONS = [
    "--length",
    "64",
    "--tokens",
    "2048",
    "--ranking_sequences",
    "2",
    "--eval_sequences",
    "2",
    "--window_size",
    "8",
    "--dtype",
    "float32",
]
OPTIONS += ["--logging_steps", "1", "--save_steps", "2", "--report_to", "none", "--disable_tqdm", "True"]
# Half of the key-value weights fit no second process, whose parts of them are empty.
OPTIONS += ["--hidden_weight", "0.5", "--unit", "layer"]
OPTIONS += ["--states", "true", "--alignment_share", "0.5", "--probes_in_training", "0", "--level_draws", "2", "--learning_rate", "1e-3"]

LAYERS = 3
RAN = {}  # folders by config and jobs
TELLS = "import json, os, pathlib, sys; pathlib.Path(sys.argv[1], os.environ['RANK']).write_text(json.dumps(dict(os.environ)))"


def save_all(folder, tiny_model):
    """Text, and bases for levels of layers and of heads, with a tokenizer."""
    texts = [" ".join(f"word{(i * j) % 23} of text" for j in range(300)) for i in range(1, 30)]
    tokenizer = train_tokenizer(texts, vocab_size=290)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    for name, heads in (("base", 1), ("base-of-heads", 2)):
        torch.manual_seed(0)
        base = tiny_model("llama", num_hidden_layers=LAYERS, num_key_value_heads=heads)
        base.resize_token_embeddings(len(tokenizer))
        base.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "text.txt").write_text("\0".join(texts))


def job(folder, base, name, batch):
    """Options of a small distillation."""
    options = ["--model", str(folder / base), "--data", str(folder / "text.txt"), *OPTIONS]
    return {"options": [*options, "--output_dir", str(folder / name), "--per_device_train_batch_size", str(batch)]}


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def launch(config, *script):
    """Run a script with its arguments through `accelerate launch` on two fresh processes."""
    (port,) = free_ports(1)
    options = ["--config_file", str(CONFIGS / config), "--main_process_port", str(port), *map(str, script)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_", "MASTER_", "TORCH"))}
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *options],
        env={**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-5000:]


def logs(output, stage):
    """What was logged after each step, without times."""
    history = json.loads((output / stage / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "loss" in entry]


def assert_close(found, expected, **tolerance):
    for stage, term in (("alignment", "alignment/layer_2"), ("logits", "kl")):
        for name in ("loss", "grad_norm", term):
            one, other = ([entry[name] for entry in logs(output, stage)] for output in (found, expected))
            assert len(one) == len(other) == 4
            assert one == pytest.approx(other, rel=1e-4), (stage, name)
    found, expected = (load_file(output / "adapter_model.safetensors") for output in (found, expected))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


# Where parts are written and read one way in both stages, one of them is enough.
KILLS = {"cpu2.yaml": ("alignment/checkpoint-4", "logits/checkpoint-2"), "fsdp2.yaml": ("logits/checkpoint-2",)}


def jobs_of_layers(folder, config):
    def options(name, batch):
        return job(folder, "base", name, batch)

    def moved(name, batch):
        """Go on from a copy of the run in which the second stage has come half way."""
        target = folder / f"{name}-moved"
        unfinished = ("adapter_config.json", "logits/adapter_config.json", "logits/checkpoint-4")
        changes = {"copy": [str(folder / name), str(target)], "remove": [str(target / path) for path in unfinished]}
        return options(target.name, batch) | changes

    def killed(name, batch, **more):
        """In each stage, as soon as another checkpoint begins to appear (often in the middle of writing it); then the rest."""
        kills = [folder / name / stage for stage in KILLS[config]]
        return [options(name, batch) | more | kill for kill in (*({"kill_at": str(path)} for path in kills), {})]

    jobs = [options("two", 2), options("one", 4) | {"processes": 1}, *killed("parts", 2)]
    jobs += [moved("two", 4) | {"processes": 1}, moved("one", 2)]
    return jobs + (killed("alone", 4, processes=1) if runs_alone(config) else [])


def runs_alone(config):
    """One process is one process whatever the config says."""
    return config == "cpu2.yaml"


def jobs_of_heads(folder, config):
    def options(name, batch):
        one = job(folder, "base-of-heads", name, batch)
        own = ["--unit", "head", "--ranking_probes", "3", "--probe_length", "260", "--sequence_lengths", "32", "64"]
        own += ["--probes_in_training", "0.5", "--eval_sequences", "0"]
        return one | {"options": one["options"] + own}

    return [options("two-of-heads", 2), options("one-of-heads", 4) | {"processes": 1}]


def told(config, folder):
    """What `accelerate launch` tells both processes of a config: a script that imports nothing writes it down."""
    (folder / "tells.py").write_text(TELLS)
    launch(config, folder / "tells.py", folder)
    both = [json.loads((folder / rank).read_text()) for rank in ("0", "1")]
    first, second = ({name: value for name, value in one.items() if name.startswith(("ACCELERATE_", "FSDP_"))} for one in both)
    assert first == second and first, "what is told differs between processes, or nothing is"
    return first


@pytest.fixture
def ran(config, tiny_model, tmp_path_factory):
    """`ran(jobs_of_layers)`: the folder in which the jobs have run, and what they printed. Processes take longer to start than jobs
    take, so all run in those of one launch, each with what its own config tells; those of the slow test in another."""
    usual = (("cpu2.yaml", jobs_of_layers), ("cpu2.yaml", jobs_of_heads), ("fsdp2.yaml", jobs_of_layers))

    def run(jobs):
        if (config, jobs) not in RAN:
            top, listed, environments = tmp_path_factory.mktemp("ran"), [], {}
            together = usual if (config, jobs) in usual else ((config, jobs),)
            for name, some in together:
                folder = top / name
                if name not in environments:
                    save_all(folder, tiny_model)
                    environments[name] = {} if name == together[0][0] else told(name, folder)
                more = {"printed": str(folder / some.__name__), "environment": environments[name]}
                listed += [each | more for each in some(folder, name)]
            file = top / "jobs.json"
            file.write_text(json.dumps([each | {"port": port} for each, port in zip(listed, free_ports(len(listed)), strict=True)]))
            launch(together[0][0], PROCESSES, file)
            RAN.update({pair: top / pair[0] for pair in together})
        folder = RAN[config, jobs]
        return folder, (folder / jobs.__name__).read_text()

    return run


@pytest.mark.parametrize("config", ["cpu2.yaml", "fsdp2.yaml"])
def test_two_processes_equal_one_and_a_killed_run_goes_on_on_both(config, ran):
    folder, output = ran(jobs_of_layers)
    alone = runs_alone(config)
    assert "processes 2" in output and "processes 1" in output
    assert output.count("DistributedType.FSDP") == (6 if config == "fsdp2.yaml" else 0)  # twice in each of three runs to the end
    # Of the two processes only the first speaks, once in each run, and of the levels at its end.
    ends = 5 + alone
    for words in ("Distilling an adapter", "Levels on 126 tokens kept apart", "Answers to "):
        begun = ends + len(KILLS[config]) * (1 + alone)
        assert output.count(words) == (begun if words.startswith("Distilling") else ends), words
    two, one, parts = (folder / name for name in ("two", "one", "parts"))

    assert_close(two, one, rtol=0, atol=1e-4)
    # The mean over processes is a whole number, that of the pure function, only if all of them drew it.
    assert [entry["level"] for entry in logs(two, "logits")] == [draw_level(42, step, LAYERS, 2) for step in range(4)]
    assert json.loads((two / "ranking.json").read_text())["order"] == json.loads((one / "ranking.json").read_text())["order"]
    assert_close(parts, two, rtol=0, atol=0)
    if alone:
        assert_close(folder / "alone", one, rtol=0, atol=0)
    for stage in ("alignment", "logits"):
        assert logs(parts, stage) == logs(two, stage)
        assert not alone or logs(folder / "alone", stage) == logs(one, stage)

    tables = {path: json.loads((path / "levels.json").read_text())["rows"] for path in (two, one, parts)}
    assert tables[parts] == tables[two]
    for row, other in zip(tables[two], tables[one], strict=True):
        assert row == pytest.approx(other, rel=1e-2, abs=1e-4)
        assert row["level"] == 0 or row["untrained_kl"] == pytest.approx(other["untrained_kl"], rel=1e-5)
        assert row["level"] == 0 or abs(row["untrained_kl"] - row["kl"]) > 1e-4, "the same weights were measured twice"
    assert load_file(two / "adapter_model.safetensors").keys() == load_file(two / "logits" / "adapter_model.safetensors").keys()

    # What two processes began one ends, and the other way round.
    assert_close(folder / "two-moved", two, rtol=0, atol=1e-4)
    assert_close(folder / "one-moved", one, rtol=0, atol=1e-4)


@pytest.mark.parametrize("config", ["cpu2.yaml", pytest.param("fsdp2.yaml", marks=pytest.mark.slow)])
def test_heads_on_two_processes_are_those_of_one(ran):
    folder, _ = ran(jobs_of_heads)
    two, one = folder / "two-of-heads", folder / "one-of-heads"
    assert_close(two, one, rtol=0, atol=1e-4)
    rankings = [json.loads((folder / "ranking.json").read_text()) for folder in (two, one)]
    assert rankings[0]["order"] == rankings[1]["order"] and rankings[0]["metric"] == "shares"
    assert [entry["level"] for entry in logs(two, "logits")] == [draw_level(42, step, 2 * LAYERS, 2) for step in range(4)]


@pytest.mark.parametrize("config, kind", [("one_gpu.yaml", "NO"), ("ddp.yaml", "MULTI_GPU"), ("fsdp2.yaml", "FSDP")])
def test_configs_are_of_their_kind_and_leave_dtypes_alone(config, kind):
    content = yaml.safe_load((CONFIGS / config).read_text())
    assert content["distributed_type"] == kind and content["mixed_precision"] == "no"
    assert content["num_processes"] == (1 if kind == "NO" else 2)
