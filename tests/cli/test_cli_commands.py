"""`dsla distill`, `order`, `merge` and `generate`: end to end on a tiny model, config files, errors and exit codes."""

import hashlib
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dsla_cli import main, preflight
from dsla_hf import DSLAConfig
from dsla_hf.cli import distill as distill_job
from dsla_hf.cli import distill_defaults
from dsla_hf.cli.distill_options import DistillOptions, parse_options
from dsla_hf.cli.order import order as order_layers
from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.models.configuration import resolve_level
from dsla_hf.training.arguments import DSLATrainingArguments

ROOT = Path(__file__).resolve().parents[2]
LAYERS, ORDER, LEVEL = 4, [2, 0, 3, 1], 2
TEXT = " ".join(f"{number} green bottles hang on the wall, and if one of them should fall" for number in range(100, 0, -1))


def fingerprints(directory):
    """Every file below `directory` and the hash of its content."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(file.relative_to(directory)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def save_base(directory, tokenizer, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_hidden_layers": LAYERS, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)).to(dtype).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_adapter(directory, base, **config):
    """An adapter whose weights are away from their start and in more digits than the base's: fp32 over bf16."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, DSLAConfig(task_type="CAUSAL_LM", window_size=8, **config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dsla_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(str(directory))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base with tokenizer, text, and adapters: of the whole model, of two layers, of another base, of another method."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = train_tokenizer([TEXT], vocab_size=320)
    save_base(folder / "base", tokenizer, dtype=torch.bfloat16)
    save_base(folder / "other", tokenizer, seed=5)
    (folder / "text.txt").write_text(TEXT)
    (folder / "more.jsonl").write_text("\n".join(json.dumps({"text": part}) for part in TEXT.split(",")))
    (folder / "short.txt").write_text("too little")
    save_adapter(folder / "adapter", folder / "base", conversion_order=ORDER, level=LEVEL, level_metrics={"2": {"kl": 0.5}})
    save_adapter(folder / "short_plan", folder / "base", conversion_order=[3, 1])
    save_adapter(folder / "other_adapter", folder / "other")
    lora = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(r=2, target_modules=["q_proj"]))
    lora.save_pretrained(str(folder / "lora"))
    names = ("base", "other", "adapter", "short_plan", "other_adapter", "lora")
    paths = {name: str(folder / name) for name in names}
    return SimpleNamespace(**paths, text=str(folder / "text.txt"), more=str(folder / "more.jsonl"), short=str(folder / "short.txt"))


@pytest.fixture
def adapter(made, tmp_path):
    """A copy of the adapter that a test may change."""
    return shutil.copytree(made.adapter, tmp_path / "adapter")


def refusal(capsys, arguments, *words):
    """Run, expecting status 1 and an error of one line with these words; progress bars may stand before it."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 1
    output, error = capsys.readouterr()
    lines = [
        line for line in re.split(r"[\r\n]+", error) if line and not re.search(r"%\||\?? documents/s|it/s\]|Generating .* split", line)
    ]
    assert len(lines) == 1 and lines[0].startswith(f"dsla {arguments[0]}: "), error
    assert output == "" and "Traceback" not in error
    for word in words:
        assert str(word) in lines[0]
    return lines[0]


# --- levels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "level, num_layers, expected",
    [
        (0, 8, 0),
        (3, 8, 3),
        ("3", 8, 3),
        (" 8 ", 8, 8),
        ("0%", 8, 0),
        ("25%", 8, 2),
        ("50%", 8, 4),
        ("100%", 8, 8),
        ("50 %", 8, 4),
        ("12.5%", 8, 1),
        ("50%", 7, 4),  # 3.5: halves upwards, also where the number below is even
        ("50%", 5, 3),
        ("50%", 28, 14),
        ("33.3%", 6, 2),
        ("1%", 8, 0),
        ("50%", 36, 18),
    ],
)
def test_level_as_number_or_share(level, num_layers, expected):
    assert resolve_level(level, DSLAConfig(conversion_order=list(range(num_layers))), num_layers) == expected


def test_share_is_of_the_model_not_of_the_plan():
    plan = DSLAConfig(conversion_order=[5, 3, 1, 7])
    assert [resolve_level(share, plan, 8) for share in ("0%", "25%", "50%")] == [0, 2, 4]
    with pytest.raises(ValueError, match=r"level 75%, 6 of 8 layers, is above the plan; this plan has levels 0 to 4, .* up to 50%"):
        resolve_level("75%", plan, 8)
    with pytest.raises(ValueError, match="level 5 is above the plan; this plan has levels 0 to 4"):
        resolve_level(5, plan, 8)


def test_share_without_a_plan_is_of_all_layers():
    assert resolve_level("50%", DSLAConfig(), 12) == 6


def test_largest_share_that_errors_name_is_accepted():
    for layers in range(1, 130):
        for depth in range(1, layers + 1):
            plan = DSLAConfig(conversion_order=list(range(depth)))
            with pytest.raises(ValueError, match="above the plan") as caught:
                resolve_level(depth + 1, plan, layers)
            assert resolve_level(re.search(r"up to (\S+%)", str(caught.value))[1], plan, layers) == depth


@pytest.mark.parametrize("level", [-1, "-1", "-5%", "half", "", "%", "5.0", "1e1%", "٣", 2.0, True, None, "104%"])
def test_other_levels_are_refused_by_name(level):
    with pytest.raises(ValueError, match="level") as caught:
        resolve_level(level, DSLAConfig(conversion_order=list(range(8))), 8)
    assert str(level) in str(caught.value) and "levels 0 to 8" in str(caught.value) and "100%" in str(caught.value)


# --- help -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["distill", "order", "merge", "generate"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    output = capsys.readouterr().out
    assert caught.value.code == 0 and f"  dsla {command} --" in output and "example" in output and "(default: " in output


def test_help_of_distill_is_short_and_starts_with_its_own_options(capsys):
    with pytest.raises(SystemExit):
        main(["distill", "--help"])
    output = capsys.readouterr().out
    places = [output.index(f"\n  --{name} ") for name in ("model", "data", "window_size", "output_dir", "learning_rate")]
    assert places == sorted(places) and len(output.splitlines()) < 165
    assert "--adam_beta2 " not in output.split("All other options")[0] and "--stage" not in output


@pytest.mark.parametrize("command", ["distill", "order", "merge", "generate"])
def test_missing_and_unknown_options_give_the_usage(command, capsys):
    for arguments in ([command], [command, "--frobnicate", "1"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        output, error = capsys.readouterr()
        assert caught.value.code == 2 and output == "" and error.startswith(f"usage: dsla {command}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["order", "--model", "m", "--adapter", "a", "--data", "d", "--sequences", "0"],
        ["order", "--model", "m", "--adapter", "a", "--data", "d", "--length", "-1"],
        ["generate", "--model", "m", "--prompt", "p", "--max-new-tokens", "many"],
    ],
    ids=" ".join,
)
def test_counts_are_whole_numbers_from_one_on(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and f"argument {arguments[-2]}: must be a whole number, 1 or more, got {arguments[-1]!r}" in error


def test_unknown_option_of_distill_names_the_nearest(capsys, monkeypatch):
    monkeypatch.setattr(preflight, "check", lambda *_, **__: None)
    with pytest.raises(SystemExit):
        main(["distill", "--model", "m", "--data", "d", "--output_dir", "o", "--learning_rat", "1"])
    assert "did you mean '--learning_rate'" in capsys.readouterr().err


# --- options of distill -----------------------------------------------------------------------------------------

REQUIRED = ["--model", "m", "--data", "a.txt", "--output_dir", "o"]


def config_file(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return ["--config", str(path)]


def test_defaults_are_the_recipe():
    options, args = parse_options(REQUIRED)
    assert options == DistillOptions(model="m", data=["a.txt"])
    assert type(args) is DSLATrainingArguments and args.output_dir == "o"
    assert (args.learning_rate, args.lr_scheduler_type, args.train_level) == (5e-4, "cosine", None)
    assert (args.logging_steps, args.save_steps, args.ddp_find_unused_parameters) == (10, 100, False)


def test_config_file_gives_options_and_satisfies_the_required_ones(tmp_path):
    content = """
model: m
data: [a.txt, b.jsonl]
output_dir: o
tokens: 1000
learning-rate: 1e-4   # a string to YAML
use_cpu: true
dataloader_pin_memory: false
lr_scheduler_kwargs: {num_cycles: 0.25}
train_level: null
"""
    options, args = parse_options(config_file(tmp_path, content))
    assert options == DistillOptions(model="m", data=["a.txt", "b.jsonl"], tokens=1000)
    assert args.learning_rate == 1e-4 and args.use_cpu is True and args.dataloader_pin_memory is False
    assert args.lr_scheduler_kwargs == {"num_cycles": 0.25} and args.train_level is None


def test_command_line_overrides_the_file_wherever_it_stands(tmp_path):
    content = {"model": "m", "data": ["a.txt", "b.txt"], "output_dir": "o", "tokens": 1000, "use_cpu": True, "window_size": 16}
    content["dataloader_pin_memory"] = True
    config = config_file(tmp_path, content)
    own = ["--tokens", "7", "--data", "c.txt", "--use_cpu", "false", "--no_dataloader_pin_memory"]
    for arguments in ([*config, *own], [*own, *config], [*own, f"--config={config[1]}"]):
        options, args = parse_options(arguments)
        assert options == DistillOptions(model="m", data=["c.txt"], tokens=7, window_size=16)
        assert args.use_cpu is False and args.dataloader_pin_memory is False


@pytest.mark.parametrize(
    "content, words",
    [
        ("lenght: 5", ["unknown option 'lenght'", "did you mean 'length'"]),
        ("learningrate: 5", ["'learningrate'", "'learning_rate'"]),
        ("config: x", ["unknown option 'config'"]),
        ("zzzz: 5", ["unknown option 'zzzz'"]),
        ("length: long", ["length: invalid int value: 'long'"]),
        ("length: 2.5", ["length", "2.5"]),
        ("length: [1, 2]", ["length takes one value"]),
        ("dtype: float8", ["dtype", "float8", "bfloat16"]),
        ("save_steps: no", ["save_steps", "in quotes"]),
        ("tokens:", ["tokens has no value", "24000000"]),
        ("- length", ["run.yaml", "name: value"]),
        ("a: [", ["run.yaml", "not YAML"]),
        ("length: 0", ["length must be 1 or more"]),
        ("ranking_sequences: -1", ["ranking_sequences", "-1"]),
        ("max_steps: 5", ["--max_steps", "--tokens"]),
        ("stage: alignment", ["--stage", "both stages"]),
        ("lr_scheduler_type: sinus", ["sinus"]),
    ],
)
def test_config_file_that_does_not_fit(content, words, tmp_path, capsys):
    required = {"model": "m", "data": "d.txt", "output_dir": str(tmp_path / "o")}
    content = content if content.startswith(("-", "a:")) else f"{yaml.safe_dump(required)}{content}\n"
    refusal(capsys, ["distill", *config_file(tmp_path, content)], *words)
    assert not (tmp_path / "o").exists()


def test_missing_config_file(tmp_path, capsys):
    refusal(capsys, ["distill", "--config", tmp_path / "none.yaml"], "none.yaml")


def test_sample_file_is_the_default_recipe():
    options, args = parse_options(["--config", str(ROOT / "examples" / "configs" / "distill.yaml")])
    same, same_args = parse_options(["--model", options.model, "--data", *options.data, "--output_dir", args.output_dir])
    same.window_size = distill_defaults.of_conversion(same)["window_size"]
    assert options == same
    different = {name for name, value in args.to_dict().items() if value != same_args.to_dict()[name]}
    assert different <= {"logging_dir", "run_name"}


def test_example_script_is_the_command(monkeypatch, tmp_path):
    """The same job with the same options, whichever way it is started."""
    jobs = []
    monkeypatch.setattr(preflight, "check", lambda *_, **__: None)
    monkeypatch.setattr(distill_job, "distill_job", lambda *job: jobs.append(job))
    arguments = [*REQUIRED, "--bf16", "false", "--warmup_steps", "7", "--length", "64", "--adam_beta2", "0.9"]
    assert main(["distill", *arguments]) == 0
    monkeypatch.setattr(sys, "argv", ["distill.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / "examples" / "distill.py"), run_name="__main__")
    assert caught.value.code == 0
    (options, args), (same, same_args) = jobs
    assert options == same and args.to_dict() == same_args.to_dict() and args.adam_beta2 == 0.9 and options.length == 64


# --- distill ----------------------------------------------------------------------------------------------------


def distill(made, output, *more, data=None):
    arguments = ["--model", made.base, "--data", *(data or [made.text]), "--output_dir", output, "--length", 32, "--tokens", 256]
    arguments += ["--ranking_sequences", 2, "--per_device_train_batch_size", 2, "--use_cpu", "--window_size", 8, "--unit", "layer"]
    arguments += ["--states", "true", "--alignment_share", 0.5]
    return ["distill", *map(str, [*arguments, *more])]


@pytest.fixture(scope="module")
def distilled(made, tmp_path_factory):
    """What the command made, with a file of options under those of the command line."""
    folder = tmp_path_factory.mktemp("distilled")
    options = yaml.safe_dump({"window_size": 8, "dtype": "float32", "ranking_sequences": 9, "learning_rate": 0.01})
    (folder / "run.yaml").write_text(options)
    assert main(distill(made, folder / "adapter", "--config", folder / "run.yaml", data=[made.text, made.more])) == 0
    return folder / "adapter"


def test_distill_as_a_chain(made, tmp_path, capsys):
    assert main(distill(made, tmp_path / "out", "--method", "chain", "--ranking_metric", "entropy", "--tokens", 1024)) == 0
    order = DSLAConfig.from_pretrained(tmp_path / "out").conversion_order
    assert json.loads((tmp_path / "out" / "ranking.json").read_text())["metric"] == "entropy"
    assert "one layer after the other (4 links)" in capsys.readouterr().out
    assert [DSLAConfig.from_pretrained(tmp_path / "out" / "logits" / f"level_{i:02d}").level for i in range(1, 5)] == [1, 2, 3, 4]
    assert (
        DSLAConfig.from_pretrained(tmp_path / "out").level
        == len(order)
        == len(DSLAConfig.from_pretrained(tmp_path / "out").level_metrics) - 1
    )
    assert sorted(path.name for path in (tmp_path / "out" / "logits").glob("level_*")) == [
        f"level_{i:02d}" for i in range(1, len(order) + 1)
    ]


def test_distill_while_the_text_streams(made, tmp_path):
    assert main(distill(made, tmp_path / "out", "--streaming", "true", "--window_size", 8, data=[made.text, made.more])) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() and (tmp_path / "out" / "ranking.json").exists()


def test_tokenizer_of_another_checkpoint_is_refused(made, tmp_path, capsys):
    base = shutil.copytree(made.base, tmp_path / "base")
    train_tokenizer([TEXT * 2 + "".join(map(chr, range(0x400, 0x450)))], vocab_size=700).save_pretrained(base)
    arguments = distill(made, tmp_path / "out", "--model", base, data=[made.text])
    line = refusal(capsys, arguments, "tokenizer", "belongs to another checkpoint")
    assert re.search(r"gives token \d+, and the model knows tokens up to \d+", line) and not (tmp_path / "out").exists()


def test_distill_gives_an_adapter_of_every_level(made, distilled):
    config = DSLAConfig.from_pretrained(distilled)
    assert config.window_size == 8 and sorted(config.conversion_order) == list(range(LAYERS)) == list(range(config.level))
    assert config.conversion_order == sorted(config.conversion_order, key=lambda layer: config.order_scores[str(layer)])
    assert json.loads((distilled / "ranking.json").read_text())["tokens"] == 2 * 32, "ranking_sequences of the command line"
    for stage in ("alignment", "logits"):
        state = json.loads((distilled / stage / "trainer_state.json").read_text())
        assert state["global_step"] == 256 // 2 // (2 * 32)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.base), str(distilled))
    model.set_level(2)
    assert torch.isfinite(model(torch.arange(20)[None]).logits).all()


def test_distill_goes_on_from_an_adapter(made, tmp_path, capsys):
    assert main(distill(made, tmp_path / "new", "--adapter", made.adapter, "--ranking_sequences", 0, "--learning_rate", 1e-9)) == 0
    output = capsys.readouterr().out
    assert f"adapter saved in {tmp_path / 'new'}; level {LAYERS}; conversion order {ORDER}" in output
    assert re.search(r"level +perplexity +before +KL to level 0 +before", output), "compared with the adapter, not with an untrained layer"
    config = DSLAConfig.from_pretrained(tmp_path / "new")
    assert config.conversion_order == ORDER and config.window_size == 8 and config.level == LAYERS
    metrics = config.level_metrics[str(LAYERS)]
    assert metrics["kl"] == pytest.approx(metrics["before_kl"], rel=1e-3) and "untrained_kl" not in metrics
    before, after = weights(made.adapter), weights(tmp_path / "new")
    # Not those of a new adapter: at this rate they stay where they were, to the digits of the base's bf16.
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name].float(), after[name].float(), atol=2e-2) for name in before)


def weights(directory):
    from safetensors.torch import load_file

    return load_file(Path(directory) / "adapter_model.safetensors")


def test_same_distill_again_trains_nothing_and_gives_the_same(made, distilled, tmp_path, capsys):
    used = shutil.copytree(distilled, tmp_path / "used")
    data = {"data": [made.text, made.more]}
    line = refusal(capsys, distill(made, used, "--dtype", "float32", "--tokens", 512, **data), used, "--learning_rate 0.01 (now 0.0005)")
    assert "--tokens 256 (now 512)" in line and "max_steps" not in line and "items" not in line
    assert main(distill(made, used, "--window_size", 8, "--dtype", "float32", "--learning_rate", "1e-2", **data)) == 0
    output = capsys.readouterr().out
    assert "adapter saved in" in output and "train_runtime" not in output
    before, after = weights(distilled), weights(used)
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    assert DSLAConfig.from_pretrained(used).conversion_order == DSLAConfig.from_pretrained(distilled).conversion_order


def test_distill_again_with_another_window_is_refused(made, distilled, tmp_path, capsys):
    used = shutil.copytree(distilled, tmp_path / "used")
    before = fingerprints(used)
    refusal(capsys, distill(made, used, "--dtype", "float32", "--window_size", 16), used, "--window_size 8 (now 16)")
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # as if stopped before the end
        (used / name).unlink()
    refusal(capsys, distill(made, used, "--dtype", "float32", "--window_size", 16), used, "--window_size 8 (now 16)")
    (used / "distill.json").unlink()  # as of a run of the library
    before.pop("distill.json")
    refusal(capsys, distill(made, used, "--dtype", "float32", "--window_size", 16), used / "alignment", "holds another adapter")
    assert fingerprints(used) == {name: value for name, value in before.items() if (used / name).exists()}


@pytest.mark.parametrize(
    "change, words",
    [
        (["--data", "{folder}/none.txt"], ["no such file", "none.txt"]),
        (["--data", "{text}", "{folder}/none.txt"], ["no such file", "none.txt"]),
        (["--data", "{adapter}/README.md"], ["README.md", ".jsonl"]),
        (["--data", "{short}"], ["less than one block of 32"]),
        (["--ranking_sequences", "100000"], ["none is left to train on", "--ranking_sequences"]),
        (["--model", "{folder}/none"], ["none"]),
        (["--adapter", "{base}"], ["is not an adapter"]),
        (["--adapter", "{lora}"], ["LORA adapter"]),
        (["--adapter", "{adapter}", "--window_size", "16"], ["window_size 8", "--window_size 16"]),
        (["--adapter", "{other_adapter}"], ["other weights"]),
        (["--window_size", "-1"], ["window_size", "-1"]),
        (["--eval_sequences", "-1"], ["eval_sequences", "-1"]),
        (["--window_size", "128"], ["beyond the window", "132 tokens", "window_size"]),
        (["--window_size", "128", "--streaming", "true"], ["beyond the window"]),
        (["--train_level", "9"], ["level 9"]),
        (["--eval_strategy", "epoch"], ["eval"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_distill_refuses_before_it_writes(change, words, made, tmp_path, capsys):
    change = [item.format(**vars(made), folder=tmp_path) for item in change]
    refusal(capsys, distill(made, tmp_path / "output", *change), *words)
    assert not (tmp_path / "output").exists()


def test_distill_into_a_folder_of_something_else_is_refused(made, tmp_path, adapter, capsys):
    before = fingerprints(Path(made.base))
    refusal(capsys, distill(made, made.base), made.base, "holds a model")
    assert fingerprints(Path(made.base)) == before
    refusal(capsys, distill(made, adapter, "--adapter", adapter), adapter, "another folder")
    (tmp_path / "file").write_text("mine")
    refusal(capsys, distill(made, tmp_path / "file"), "is a file")
    assert (tmp_path / "file").read_text() == "mine"


# --- order ------------------------------------------------------------------------------------------------------


def order(made, adapter, *more):
    return ["order", *map(str, ["--model", made.base, "--adapter", adapter, "--data", made.text, "--length", 32, "--sequences", 2, *more])]


def table(output):
    """Layers and scores as printed."""
    return {int(layer): float(score) for layer, score in re.findall(r"^ +(\d+) +(\d\.\d+)$", output, re.MULTILINE)}


def test_damaged_weights_are_refused_by_name(made, adapter, tmp_path, capsys):
    base = shutil.copytree(made.base, tmp_path / "base")
    for directory, file in ((adapter, "adapter_model.safetensors"), (base, "model.safetensors")):
        (directory / file).write_bytes((directory / file).read_bytes()[:200])
        refusal(capsys, order(made, adapter, "--model", base), f"{directory}: its weights are damaged")


def test_order_is_printed_and_stored(made, adapter, capsys):
    before = weights(adapter)
    assert main(order(made, adapter)) == 0
    output = capsys.readouterr().out
    scores = table(output)
    config = DSLAConfig.from_pretrained(adapter)
    assert list(scores) == config.conversion_order == sorted(scores, key=scores.__getitem__) != ORDER
    assert f"order: {config.conversion_order}" in output and "64 tokens" in output and f"level stays {LEVEL}" in output
    assert scores == pytest.approx({int(layer): score for layer, score in config.order_scores.items()}, abs=1e-6)
    assert config.level == LEVEL and config.level_metrics is None, "measurements of the old order"
    scored = ", ".join(f"{layer} ({config.order_scores[str(layer)]:.3g})" for layer in config.conversion_order)
    assert scored in (adapter / "README.md").read_text()
    after = weights(adapter)
    assert before.keys() == after.keys() and all(before[n].dtype == after[n].dtype and before[n].equal(after[n]) for n in before)
    assert next(iter(after.values())).dtype == torch.float32, "the base is bf16"
    assert sorted(path.name for path in adapter.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_order_again_changes_nothing_and_keeps_measurements(made, adapter, capsys):
    assert main(order(made, adapter)) == 0
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "level_metrics": {"2": {"kl": 0.25}}}))
    assert main(order(made, adapter)) == 0
    assert json.loads((adapter / "adapter_config.json").read_text()) == {**config, "level_metrics": {"2": {"kl": 0.25}}}


@pytest.mark.parametrize("metric, heading", [("greedy", "kl up to it"), ("entropy", "entropy")])
def test_order_by_another_metric(made, adapter, metric, heading, capsys):
    assert main(order(made, adapter, "--metric", metric)) == 0
    output = capsys.readouterr().out
    config = DSLAConfig.from_pretrained(adapter)
    assert heading in output and f"order: {config.conversion_order}" in output and sorted(config.conversion_order) == sorted(ORDER)
    scores = {int(layer): score for layer, score in config.order_scores.items()}
    if metric == "entropy":
        assert config.conversion_order == sorted(scores, key=scores.__getitem__)


def test_dry_run_stores_nothing(made, adapter, capsys):
    before = fingerprints(adapter)
    assert main(order(made, adapter, "--dry-run")) == 0
    output = capsys.readouterr().out
    assert sorted(table(output)) == list(range(LAYERS)) and "stored" not in output
    assert fingerprints(adapter) == before


@pytest.mark.parametrize(
    "change, words",
    [
        (["--data", "{short}"], ["less than one block of 32"]),
        (["--data", "{folder}/none.jsonl"], ["no such file", "none.jsonl"]),
        (["--length", "12"], ["to rank layers on", "beyond the window", "12 tokens"]),
        (["--adapter", "{base}"], ["is not an adapter"]),
        (["--adapter", "{lora}"], ["LORA adapter"]),
        (["--adapter", "{folder}/none"], ["none"]),
        (["--model", "{other}"], ["other weights"]),
        (["--model", "{folder}/none"], ["none"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else None,
)
def test_order_refuses_and_changes_nothing(change, words, made, adapter, tmp_path, capsys):
    before = fingerprints(adapter)
    refusal(capsys, order(made, adapter, *[item.format(**vars(made), folder=tmp_path) for item in change]), *words)
    assert fingerprints(adapter) == before


def test_order_reads_what_distill_reads(made, adapter, tmp_path, capsys):
    messages = [{"role": "user", "content": TEXT}, {"role": "assistant", "content": TEXT}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": messages}))
    base = shutil.copytree(made.base, tmp_path / "base")
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    pd = pytest.importorskip("datasets").Dataset.from_dict({"text": [TEXT]})
    pd.to_parquet(str(tmp_path / "text.parquet"))
    for data in ("chats.jsonl", "text.parquet"):
        assert main([*order(made, adapter, "--dry-run"), "--model", str(base), "--data", str(tmp_path / data)]) == 0
        assert "64 tokens" in capsys.readouterr().out


def test_interrupted_order_says_that_the_adapter_is_as_it_was(made, adapter, monkeypatch):
    before = fingerprints(adapter)

    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("dsla_hf.cli.order.rank_layers", interrupt)
    with pytest.raises(KeyboardInterrupt, match=f"^{re.escape(str(adapter))} is as it was$"):
        order_layers(made.base, str(adapter), [made.text], length=32, sequences=2)
    assert fingerprints(adapter) == before


# --- merge ------------------------------------------------------------------------------------------------------


def merge(made, level, output, *more):
    return ["merge", *map(str, ["--model", made.base, "--adapter", made.adapter, "--level", level, "--output", output, *more])]


@pytest.fixture(scope="module")
def hybrid(made, tmp_path_factory):
    directory = tmp_path_factory.mktemp("merged") / "deep" / "hybrid"
    assert main(merge(made, "75%", directory, "--dtype", "float32")) == 0
    return directory


def test_hybrid_is_the_adapter_at_that_level(made, hybrid):
    merged = AutoModelForCausalLM.from_pretrained(hybrid).eval()
    assert merged.config.get_dsla_config().converted_layers == ORDER[:3] and merged.dtype == torch.float32
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32), made.adapter).eval()
    model.set_level(3)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=0, atol=1e-5)


def test_hybrid_comes_with_its_tokenizer(made, hybrid):
    assert AutoTokenizer.from_pretrained(hybrid)(TEXT).input_ids == AutoTokenizer.from_pretrained(made.base)(TEXT).input_ids


def test_merge_keeps_the_dtype_of_the_base(made, tmp_path, capsys):
    assert main(merge(made, 1, tmp_path / "hybrid")) == 0
    assert f"layers {ORDER[:1]} of {LAYERS} are DSLA (level 1)" in capsys.readouterr().out
    assert {tensor.dtype for tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "hybrid").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "level, change, words",
    [
        ("0", [], ["level 0 converts no layer", "base"]),
        ("1%", [], ["level 1% converts no layer"]),
        ("5", [], ["level 5", "above the plan", "0 to 4"]),
        ("-1", [], ["-1", "levels 0 to 4"]),
        ("half", [], ["'half'", "50%"]),
        ("75%", ["--adapter", "{short_plan}"], ["3 of 4 layers", "up to 50%"]),
        ("2", ["--adapter", "{other_adapter}"], ["other weights"]),
        ("2", ["--adapter", "{base}"], ["is not an adapter"]),
        ("2", ["--adapter", "{lora}"], ["LORA adapter"]),
        ("2", ["--model", "{folder}/none"], ["none"]),
    ],
    ids=str,
)
def test_merge_refuses_and_writes_nothing(level, change, words, made, tmp_path, capsys):
    refusal(capsys, merge(made, level, tmp_path / "hybrid", *[item.format(**vars(made), folder=tmp_path) for item in change]), *words)
    assert not (tmp_path / "hybrid").exists()


def test_merge_into_a_folder_of_something_else_is_refused(made, hybrid, adapter, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output, words in ((made.base, "holds another model"), (adapter, "holds an adapter"), (tmp_path / "file", "is a file")):
        before = fingerprints(Path(output))
        refusal(capsys, merge(made, 2, output), output, words)
        assert fingerprints(Path(output)) == before
    before = fingerprints(hybrid)
    refusal(capsys, merge(made, 2, hybrid), "holds another model")
    assert fingerprints(hybrid) == before


def test_hybrid_is_no_base(made, hybrid, tmp_path, capsys):
    refusal(capsys, merge(made, 2, tmp_path / "hybrid", "--model", hybrid), "hybrid already")


# --- generate ---------------------------------------------------------------------------------------------------

PROMPT = "99 green bottles hang on the wall, and if one"


def generate(capsys, *arguments, prompt=("--prompt", PROMPT), tokens=12):
    """What is printed, without the line end."""
    capsys.readouterr()
    assert main(["generate", *map(str, [*prompt, "--max-new-tokens", tokens, "--dtype", "float32", *arguments])]) == 0
    output = capsys.readouterr().out
    assert output.endswith("\n")
    return output[:-1]


def expected(model, made, **options):
    tokenizer = AutoTokenizer.from_pretrained(made.base)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_generate_at_every_level(made, capsys):
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(made.base, dtype=torch.float32), made.adapter).eval()
    texts = {}
    for level, number in (("0", 0), ("50%", 2), ("4", 4)):
        model.set_level(number)
        texts[level] = generate(capsys, "--model", made.base, "--adapter", made.adapter, "--level", level)
        assert texts[level] == expected(model, made)
    assert len(set(texts.values())) == 3
    assert generate(capsys, "--model", made.base, "--adapter", made.adapter) == texts["50%"], "the level of the adapter"
    assert generate(capsys, "--model", made.base) == texts["0"]


def test_generate_with_a_hybrid(made, hybrid, capsys):
    with_adapter = generate(capsys, "--model", made.base, "--adapter", made.adapter, "--level", "3")
    assert generate(capsys, "--model", hybrid) == with_adapter


def test_prompt_file_is_read_as_it_is(made, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text(PROMPT, encoding="utf-8")
    from_file = generate(capsys, "--model", made.base, prompt=("--prompt-file", tmp_path / "prompt.txt"))
    assert from_file == generate(capsys, "--model", made.base)


def test_sampling_follows_its_seed(made, capsys):
    def sample(*more):
        return generate(capsys, "--model", made.base, "--do-sample", "--temperature", "1.5", "--top-p", "0.95", *more, tokens=24)

    first = sample("--seed", "3")
    assert sample("--seed", "3") == first != sample("--seed", "4")
    assert generate(capsys, "--model", made.base, tokens=24) != first


def test_settings_of_the_checkpoint_are_no_noise(made, tmp_path, capsys):
    """A checkpoint made for sampling (most instruct models) generates greedily, without a warning."""
    chat = shutil.copytree(made.base, tmp_path / "chat")
    (chat / "generation_config.json").write_text(json.dumps({"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}))
    text = generate(capsys, "--model", made.base)
    assert main(["generate", "--model", str(chat), "--prompt", PROMPT, "--max-new-tokens", "12", "--dtype", "float32"]) == 0
    output, error = capsys.readouterr()
    assert output == text + "\n" and "temperature" not in error and "pad_token_id" not in error


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--model", "{hybrid}", "--level", "1"], ["--level cannot be had", "is a hybrid"]),
        (["--model", "{hybrid}", "--adapter", "{adapter}"], ["is a hybrid already", "give the original model"]),
        (["--model", "{base}", "--level", "1"], ["--level needs --adapter"]),
        (["--model", "{base}", "--adapter", "{adapter}", "--level", "5"], ["level 5", "0 to 4"]),
        (["--model", "{base}", "--adapter", "{other_adapter}"], ["other weights"]),
        (["--model", "{base}", "--adapter", "{lora}"], ["LORA adapter"]),
        (["--model", "{folder}/none"], ["none"]),
        (["--model", "{base}", "--temperature", "0.5", "--top-p", "0.5"], ["--temperature and --top-p", "--do-sample"]),
        (["--model", "{base}", "--prompt", ""], ["prompt is empty"]),
    ],
    ids=str,
)
def test_generate_refuses(arguments, words, made, hybrid, tmp_path, capsys):
    arguments = [item.format(**vars(made), hybrid=hybrid, folder=tmp_path) for item in arguments]
    refusal(capsys, ["generate", *([] if "--prompt" in arguments else ["--prompt", PROMPT]), *arguments], *words)


def test_missing_prompt_file(made, tmp_path, capsys):
    refusal(capsys, ["generate", "--model", made.base, "--prompt-file", tmp_path / "none.txt"], "none.txt")


def test_two_prompts_or_none_give_the_usage(made, tmp_path, capsys):
    for prompts in ([], ["--prompt", "a", "--prompt-file", "b"]):
        with pytest.raises(SystemExit) as caught:
            main(["generate", "--model", made.base, *prompts])
        assert caught.value.code == 2 and "--prompt" in capsys.readouterr().err
