"""What the command line says of checkpoints and adapters that are none, before it imports torch."""

import json
import os
import subprocess
import sys
import time

import pytest

from dsla_cli import main, preflight

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a folder in the current one: a config (None: none), further files by name and content."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))

    def made(name, config=LLAMA, weights=True, tokenizer=True, **files):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        if weights:
            (folder / "model.safetensors").write_bytes(b"")
        if tokenizer:
            (folder / "tokenizer.json").write_text("{}")
        for file, content in files.items():
            (folder / file.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content))
        return name

    return made


def test_a_whole_checkpoint_and_its_adapter_pass(make):
    base = make("models/base")
    adapter = make("adapter", None, False, False, adapter_config__json={"peft_type": "DSLA"}, adapter_model__safetensors="")
    preflight.check(base, converts=True)
    preflight.check(base, adapter)
    preflight.check(make("no-tokenizer", tokenizer=False), tokenizer=False)
    preflight.check(make("hybrid", {"model_type": "dsla"}))


WRONG_MODELS = {
    "a file": ("base/model.safetensors", {}, ["is a file", "give the folder", "base"]),
    "empty folder": ("empty", {}, ["is no checkpoint", "the folder is empty", "save_pretrained"]),
    "folder of other things": ("notes", {}, ["is no checkpoint", "it holds today.md", "save_pretrained"]),
    "folder of checkpoints": ("runs", {}, ["is no checkpoint", "did you mean runs/last?"]),
    "mistyped folder": ("basse", {}, ["basse", "did you mean base?"]),
    "mistyped parent": ("rnus/last", {}, ["rnus/last", "did you mean runs?"]),
    "mistyped path": ("./basse", {}, ["no such folder: ./basse", "did you mean base?"]),
    "no weights": ("bare", {}, ["no weights", "copy or download it again"]),
    "no tokenizer": ("mute", {}, ["has no tokenizer", "AutoTokenizer.from_pretrained(ORIGINAL)"]),
    "damaged config": ("damaged", {}, ["damaged/config.json is damaged", "download the folder again"]),
    "config of another library": ("foreign", {}, ["names no model_type"]),
    "LoRA": ("lora", {}, ["is a LORA adapter of some/base, not a model", "merge it into some/base first", "merge_and_unload"]),
    "DSLA adapter": ("adapter", {}, ["is a DSLA adapter, not a model: give --model some/base --adapter adapter"]),
    "folder of GGUF files": ("gguf", {}, ["holds GGUF files", "--model gguf/a.gguf", "others: b.gguf"]),
    "missing GGUF file": ("gguf/c.gguf", {}, ["no such file: gguf/c.gguf", "gguf has a.gguf, b.gguf"]),
    "encoder": ("bert", {}, ["is an encoder (bert)", "give a decoder"]),
    "encoder by its head": ("odd", {}, ["is an encoder (odd_bert)"]),
    "encoder-decoder": ("t5", {}, ["is an encoder-decoder (t5)"]),
    "multimodal": ("omni", {}, ["is a multimodal model (qwen2_5_omni)", "text_config", "docs/multimodal.md"]),
    "multimodal without parts": ("vision", {}, ["is a multimodal model (qwen2_vl)"]),
    "linear": ("mamba", {}, ["has no softmax attention", "linear already"]),
    "hybrid": ("hybrid", {"converts": True}, ["is a hybrid already", "give the original model, some/base"]),
    "hybrid with an adapter": ("hybrid", {"adapter": "adapter"}, ["is a hybrid already", "some/base"]),
    "hub name": ("Some/Model-0.6B", {}, ["Some/Model-0.6B is no folder here", "HF_HUB_OFFLINE is set", "hf download Some/Model-0.6B"]),
    "repository of GGUF": ("Some/Model-GGUF/a.gguf", {}, ["Some/Model-GGUF is no folder here", "hf download Some/Model-GGUF"]),
    "no name at all": ("what is this", {}, ["no such folder: what is this"]),
}
WRONG_ADAPTERS = {
    "a file": ("adapter/adapter_config.json", ["is a file", "give the folder"]),
    "checkpoint": ("base", ["is not an adapter but a whole model", "--model"]),
    "hybrid": ("hybrid", ["is not an adapter but a hybrid", "--model"]),
    "LoRA": ("lora", ["holds a LORA adapter, not a DSLA adapter", "merge it into its model first"]),
    "unfinished run": ("unfinished", ["is not an adapter yet", "the same command goes on"]),
    "empty folder": ("empty", ["is not an adapter", "the folder is empty", "dsla distill"]),
    "no weights": ("half", ["no weights", "copy it again"]),
    "mistyped folder": ("adaptor", ["adaptor is no folder here", "did you mean adapter?"]),
}


@pytest.fixture
def wrong(make, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    bare = {"config": None, "weights": False, "tokenizer": False}
    make("base")
    make("empty", **bare)
    make("notes", **bare, today__md="mine")
    make("runs/last")
    make("bare", weights=False)
    make("mute", tokenizer=False)
    (tmp_path / make("damaged") / "config.json").write_text('{"model_type": "lla')
    make("foreign", {"architecture": "resnet50"})
    make("lora", **bare, adapter_config__json={"peft_type": "LORA", "base_model_name_or_path": "some/base"})
    files = {"adapter_config__json": {"peft_type": "DSLA", "base_model_name_or_path": "some/base"}}
    make("half", **bare, **files)
    make("adapter", **bare, **files, adapter_model__safetensors="")
    make("gguf", **bare, a__gguf="", b__gguf="")
    make("bert", {"model_type": "bert", "architectures": ["BertModel"]})
    make("odd", {"model_type": "odd_bert", "architectures": ["OddForMaskedLM"]})
    make("t5", {"model_type": "t5", "is_encoder_decoder": True})
    make("omni", {"model_type": "qwen2_5_omni", "thinker_config": {"text_config": {"model_type": "qwen2"}}})
    make("vision", {"model_type": "qwen2_vl", "vision_config": {}})
    make("mamba", {"model_type": "mamba"})
    make("hybrid", {"model_type": "dsla", "dsla_config": {"base_model_name_or_path": "some/base"}})
    make("unfinished/alignment", **bare)


@pytest.mark.parametrize("name, options, words", WRONG_MODELS.values(), ids=WRONG_MODELS)
def test_what_is_no_checkpoint_is_named_with_the_next_step(wrong, name, options, words):
    with pytest.raises((ValueError, OSError)) as caught:
        preflight.check(name, **options)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("name, words", WRONG_ADAPTERS.values(), ids=WRONG_ADAPTERS)
def test_what_is_no_adapter_is_named_with_the_next_step(wrong, name, words):
    with pytest.raises((ValueError, OSError)) as caught:
        preflight.check("base", name)
    for word in words:
        assert word in str(caught.value)


def test_what_need_not_be_converted_may_be_a_hybrid(wrong):
    preflight.check("hybrid")


def test_a_name_that_cannot_be_resolved_is_told_so(make, monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid:8443/here")
    monkeypatch.setattr(preflight.socket, "getaddrinfo", lambda host, port: (_ for _ in ()).throw(OSError(host)))
    with pytest.raises(OSError, match=r"Some/Model is no folder here.*hub\.invalid cannot be reached.*hf download Some/Model"):
        preflight.check("Some/Model")


def test_a_name_server_that_is_slow_is_not_one_that_says_no(make, monkeypatch):
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(preflight, "RESOLVE_SECONDS", 0.05)
    monkeypatch.setattr(preflight.socket, "getaddrinfo", lambda host, port: time.sleep(0.5))
    preflight.check("Some/Model")


def test_what_lies_in_the_cache_is_looked_at_and_no_network_is_needed(make, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, config in (("Some--Model", LLAMA), ("Some--Encoder", {"model_type": "bert"})):
        make(f"cache/models--{name}/snapshots/abc", config)
    preflight.check("Some/Model", converts=True)
    with pytest.raises(ValueError, match="Some/Encoder is an encoder"):
        preflight.check("Some/Encoder")


COMMANDS = [
    ["distill", "--model", "empty", "--data", "no.txt", "--output_dir", "out"],
    ["order", "--model", "empty", "--adapter", "adapter", "--data", "no.txt"],
    ["merge", "--model", "empty", "--adapter", "adapter", "--level", "1", "--output", "out"],
    ["generate", "--model", "empty", "--prompt", "Hi"],
    ["eval", "--model", "empty", "--tasks", "needle", "--output", "out"],
    ["bench", "--model", "empty"],
    ["serve", "empty"],
]


@pytest.mark.parametrize("arguments", COMMANDS, ids=lambda arguments: arguments[0])
def test_every_command_looks_before_it_reads_anything(wrong, arguments, capsys, tmp_path):
    assert main(arguments) == 1
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1
    assert error.startswith(f"dsla {arguments[0]}: empty is no checkpoint") and not (tmp_path / "out").exists()


def run_plain(code, *arguments, **environment):
    """What a process prints that ends with the names of the large packages it imported, and its status."""
    large = '{"torch", "transformers", "peft", "numpy"}'
    whole = f"import sys\ntry:\n    {code}\nfinally:\n    print('imported', sorted({large} & sys.modules.keys()))"
    done = subprocess.run(
        [sys.executable, "-c", whole, *arguments], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    return done.stdout, done.stderr, done.returncode


QUICK = [[], ["--help"], ["--version"], ["convert"], ["env", "--fast"], ["order", "--help"], ["generate", "--help"], ["merge"], ["eval"]]


@pytest.mark.parametrize("arguments", QUICK, ids=" ".join)
def test_help_and_errors_in_arguments_import_nothing_heavy(arguments):
    output, error, status = run_plain("from dsla_cli import main; sys.exit(main())", *arguments)
    assert output.endswith("imported []\n")
    if status == 0:
        assert ("usage: dsla" in output or output.startswith("dsla ")) and error == ""
    else:
        assert status == 2 and error.startswith("usage: dsla") and "error:" in error


@pytest.mark.parametrize("arguments", COMMANDS[:2] + COMMANDS[3:4], ids=lambda arguments: arguments[0])
def test_a_name_on_the_hub_without_network_imports_nothing_heavy(arguments, tmp_path):
    arguments = ["Some/Model" if argument == "empty" else argument for argument in arguments]
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    output, error, _ = run_plain("from dsla_cli import main; sys.exit(main())", *arguments, **environment)
    assert output == "imported []\n"
    assert error.startswith(f"dsla {arguments[0]}: Some/Model is no folder here") and error.count("\n") == 1


def test_shapes_of_bench_are_those_that_it_knows():
    from dsla_cli.commands.bench import SHAPES
    from dsla_hf.inference.bench.models import PRESETS

    assert set(SHAPES) == set(PRESETS)


def test_order_and_distill_name_the_same_formats():
    from dsla_cli.options import SOURCES
    from dsla_hf.training import text

    assert SOURCES == text.SOURCES
