"""What `dsla distill` says before, during and after a run: plan, progress, table of the levels; interrupts, full disks, going on."""

import errno
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, TrainerCallback, TrainerState, set_seed

from dsla_cli import main
from dsla_hf import DSLAConfig
from dsla_hf.cli import distill as distill_job
from dsla_hf.cli import distill_plan
from dsla_hf.cli.distill_options import parse_options
from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.evaluation import short_answers
from dsla_hf.evaluation.levels import evaluate_levels
from dsla_hf.evaluation.report.measurements import read_measurements
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.recipe import distill
from dsla_hf.training.trainer import DSLATrainer

TEXT = " ".join(f"{number} green bottles hang on the wall, and if one of them should fall" for number in range(200, 0, -1))
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
LAYERS = 4


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small model with a tokenizer that has a chat template, and a text."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([TEXT, " ".join(short_answers.QUESTIONS)], vocab_size=320)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_hidden_layers": LAYERS, "vocab_size": len(tokenizer), "initializer_range": 0.2}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    (folder / "little.txt").write_text(TEXT[:5000])
    return folder


@pytest.fixture(scope="module", autouse=True)
def brief_answers():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(short_answers, "ANSWER_TOKENS", 6)
        patch.setattr(short_answers, "SAMPLE_TOKENS", 3)
        yield


def command(base, output, *more, text="text.txt"):
    arguments = ["--model", base, "--data", base / text, "--output_dir", output, "--length", 32, "--tokens", 512, "--window_size", 8]
    arguments += [
        "--ranking_sequences",
        2,
        "--eval_sequences",
        3,
        "--per_device_train_batch_size",
        2,
        "--use_cpu",
        "--dtype",
        "float32",
        "--unit",
        "layer",
    ]
    arguments += ["--states", "true", "--alignment_share", 0.5, "--probes_in_training", 0]
    return list(map(str, [*arguments, "--save_steps", 2, *more]))


def run(*arguments):
    assert main(["distill", *arguments]) == 0


@pytest.fixture(scope="module")
def finished(base, brief_answers, tmp_path_factory):
    """A finished run: its folder and what it printed."""
    output = tmp_path_factory.mktemp("finished") / "out"
    with pytest.MonkeyPatch.context() as patch:
        lines = {"out": [], "err": []}
        for name, kept in lines.items():
            patch.setattr(getattr(sys, f"std{name}"), "write", lambda text, kept=kept: kept.append(text) or len(text))
        patch.setattr(sys, "argv", ["dsla", "distill", *command(base, output)])
        run(*command(base, output, "--learning_rate", "1e-2"))
    return output, "".join(lines["out"]), "".join(lines["err"])


def rows_of(output):
    return json.loads((output / "levels.json").read_text())["rows"]


# --- before -----------------------------------------------------------------------------------------------------


def test_plan_says_text_steps_parameters_place_and_disk(finished, base):
    output, printed, _ = finished
    sequences = 512 // 32
    assert (
        f"  text      512 tokens to train on, {sequences} sequences of 32, each read 1.0 times; apart: 2 to rank the layers, 3 to measure"
        in printed
    )
    assert "  steps     4 of alignment, 4 of logits (random levels); 2 sequences in each" in printed
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), DSLAConfig(task_type="CAUSAL_LM", window_size=8))
    trained, everything = model.get_nb_trainable_parameters()
    assert f"  trained   {trained:,} parameters, {100 * trained / everything:.1f} % of all, in 4 of 4 layers" in printed
    assert "  converted layers have a window of 8 tokens and states behind it" in printed
    assert re.search(
        rf"  where     cpu, \d+ threads?, base in float32\n  disk      at most \d+ MiB in {re.escape(str(output))}, where", printed
    )
    assert printed.count("Distilling an adapter") == 1 and "WARNING: each sequence is read" not in printed


def test_disk_is_enough_for_what_a_run_leaves_and_little_more(finished):
    output, printed, _ = finished
    most = int(re.search(r"at most (\d+) MiB", printed)[1]) * 2**20
    written = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    spare = distill_plan.BYTES_OF_OTHERS  # of small models most of it
    assert written < most < written + 40 * spare


def test_facts_are_planted_in_plain_text_and_not_in_chats(base, tmp_path, monkeypatch, capsys):
    planted = []
    monkeypatch.setattr(distill_job, "with_planted", lambda rows, tokenizer, share, *more: planted.append(share) or rows)
    monkeypatch.setattr(distill_job, "distill", lambda *a, **k: (_ for _ in ()).throw(ValueError("trained")))
    chat = [{"role": "user", "content": TEXT[:300]}, {"role": "assistant", "content": TEXT[300:900]}]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps({"messages": chat}) for _ in range(20)))
    for number, (text, share) in enumerate(((base / "text.txt", 1 / 3), (tmp_path / "chats.jsonl", 0))):
        arguments = command(base, tmp_path / str(number), text=text)
        at = arguments.index("--probes_in_training")
        assert main(["distill", *arguments[:at], *arguments[at + 2 :]]) == 1
        printed, error = capsys.readouterr()
        assert "trained" in error and planted.pop() == share
        assert ("33 % of them with facts asked for later" in printed) == bool(share)


def test_text_shorter_than_a_sequence_names_the_option(base, tmp_path, capsys):
    arguments = command(base, tmp_path / "out", "--length", 8192)
    assert main(["distill", *arguments]) == 1
    error = capsys.readouterr().err
    assert "less than one block of 8192" in error and "--length" in error and not (tmp_path / "out").exists()


def test_run_begun_before_there_was_an_option_is_told_what_it_had(base, finished, tmp_path, capsys):
    output = shutil.copytree(finished[0], tmp_path / "out")
    file = output / "distill.json"
    content = json.loads(file.read_text())
    del content["--alignment_share"]
    file.write_text(json.dumps(content))
    assert main(["distill", *command(base, output, "--learning_rate", "1e-2", "--alignment_share", 0.13)]) == 1
    assert "holds a run with --alignment_share 0.5 (now 0.13): give the same options to go on" in capsys.readouterr().err


def test_tokenizer_that_cannot_pad_trains_and_answers(base, tmp_path, capsys):
    copy = shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(copy)
    tokenizer.pad_token = None  # as Llama's
    tokenizer.save_pretrained(copy)
    assert AutoTokenizer.from_pretrained(copy).pad_token is None
    run(*command(copy, tmp_path / "out", "--tokens", 128, "--probes_in_training", 0.5))
    assert "adapter saved in" in capsys.readouterr().out


def test_many_passes_over_little_text_are_said_beforehand(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distill_job, "distill", lambda *a, **k: (_ for _ in ()).throw(ValueError("trained")))
    assert main(["distill", *command(base, tmp_path / "out", "--tokens", 8192, text="little.txt")]) == 1
    printed, error = capsys.readouterr()
    there, passes = map(float, re.search(r"(\d+) sequences of 32, each read ([\d.]+) times", printed).groups())
    assert passes == pytest.approx(8192 / 32 / there, abs=0.06) and passes > 4
    assert f"WARNING: each sequence is read {8192 / 32 / there:.0f} times" in printed and "--tokens" in printed
    assert "trained" in error


def test_disk_without_room_is_refused_before_anything_is_written(base, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    assert main(["distill", *command(base, tmp_path / "out")]) == 1
    printed, error = capsys.readouterr()
    assert re.search(r"has 1 MiB free, and this run needs \d+ MiB or more: make room, or give another --output_dir", error)
    assert printed == "" and not (tmp_path / "out").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20 * 2**20))
    monkeypatch.setattr(distill_job, "distill", lambda *a, **k: (_ for _ in ()).throw(ValueError("trained")))
    assert main(["distill", *command(base, tmp_path / "out")]) == 1
    assert "WARNING: that may not suffice" in capsys.readouterr().out


def test_text_kept_apart_is_no_other_text(base):
    options, _ = parse_options(command(base, "out"))
    tokenizer = AutoTokenizer.from_pretrained(base)
    for streaming in (False, True):
        options.streaming = streaming
        text = distill_job._read_text(options, tokenizer)
        used = [tuple(ids.tolist()) for ids in (*text.ranking, *text.held_out)] + [tuple(row["input_ids"].tolist()) for row in text.train]
        assert (len(text.ranking), len(text.held_out)) == (2, 3) and len(used) == len({*used}) == 2 + 3 + 512 // 32


@pytest.mark.parametrize("streaming", [False, True])
def test_of_little_text_less_is_kept_apart(base, streaming):
    options, _ = parse_options(command(base, "out", "--eval_sequences", 8, "--tokens", 10**6, text="little.txt"))
    options.streaming = streaming
    tokenizer = AutoTokenizer.from_pretrained(base)
    text = distill_job._read_text(options, tokenizer)
    trained = len(list(text.train))
    assert len(text.held_out) == max(1, (trained + len(text.held_out)) // 10) < 8 < trained
    options.length = len(tokenizer(TEXT[:5000]).input_ids) // 3 - 1
    text = distill_job._read_text(options, tokenizer)  # three sequences, two of them for the ranking
    assert (len(text.held_out), len(list(text.train))) == (0, 1)


# --- during -----------------------------------------------------------------------------------------------------


def test_console_has_one_line_per_logging_step_and_no_values_of_layers(base, tmp_path, capsys):
    run(*command(base, tmp_path / "out", "--logging_steps", 2))
    _, error = capsys.readouterr()
    lines = [line for line in error.splitlines() if re.match(r"(alignment|logits): step", line)]
    pace = r", [\d,]+ tokens/s(, \d+ s left)?"
    assert re.fullmatch(rf"alignment: step 2 of 4, loss [\d.e-]+ \(worst: layer [0-3], [\d.e-]+\){pace}", lines[0])
    assert re.fullmatch(rf"logits: step 4 of 4, KL [\d.e-]+, level [\d.]+{pace}", lines[-1])
    assert len(lines) == 4 and "half_life" not in error and "\r" not in error and "%|" not in error
    history = json.loads((tmp_path / "out" / "alignment" / "trainer_state.json").read_text())["log_history"]
    assert {f"alignment/layer_{i}" for i in range(LAYERS)} <= history[0].keys() and "half_life/history/layer_0" in history[0]


def test_rate_and_time_left_are_said_after_the_first_steps(finished):
    _, _, error = finished
    assert re.search(r"^alignment: step 3 of 4, [\d,]+ tokens/s, \d+ s left$", error, re.MULTILINE), "logging_steps is 10"


# --- after ------------------------------------------------------------------------------------------------------


def test_table_is_of_the_held_out_text_at_every_level_beside_the_untrained_layer(finished, base):
    output, printed, _ = finished
    options, args = parse_options(command(base, output))
    held_out = [ids[None] for ids in distill_job._read_text(options, AutoTokenizer.from_pretrained(base)).held_out]
    set_seed(args.seed)
    config = DSLAConfig(task_type="CAUSAL_LM", window_size=8)
    untrained = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    untrained.set_conversion_order = untrained.base_model.set_conversion_order
    untrained.set_conversion_order(DSLAConfig.from_pretrained(output).conversion_order)
    rows = rows_of(output)
    assert [row["level"] for row in rows] == [0, 1, 2, 3, 4]
    for row, expected in zip(rows, evaluate_levels(untrained, held_out, range(5), progress=False), strict=True):
        if row["level"]:
            assert row["untrained_kl"] == pytest.approx(expected["kl"], rel=1e-4)
            assert row["untrained_perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)
    from peft import PeftModel

    trained = PeftModel.from_pretrained(untrained.unload(), str(output))
    for row, expected in zip(rows, evaluate_levels(trained, held_out, range(5), progress=False), strict=True):
        assert (row["kl"], row["perplexity"]) == pytest.approx((expected["kl"], expected["perplexity"]), rel=1e-4)
        assert f"{row['perplexity']:.3f}" in printed and row["bytes_32k"] > 0
    assert printed.count("Levels on 93 tokens kept apart") == 1
    assert re.search(
        r"^level +perplexity +untrained +KL to level 0 +untrained +short answers +KL on them +own answer +cache at 1k tokens", printed, re.M
    )


def test_table_reaches_the_report_the_adapter_and_its_card(finished):
    output, _, _ = finished
    content = json.loads((output / "levels.json").read_text())
    assert content["command"].startswith("dsla distill --model") and content["tokens"] == 93 and content["versions"]["torch"]
    measurements, (source,) = read_measurements(str(output / "levels.json"))
    assert source.device and {m.metric for m in measurements} >= {"perplexity", "untrained_kl", "answers"}
    metrics = DSLAConfig.from_pretrained(output).level_metrics
    assert [metrics[str(row["level"])]["kl"] for row in content["rows"]] == [row["kl"] for row in content["rows"]]
    card = (output / "README.md").read_text()
    assert "| level | perplexity | perplexity untrained |" in card and card.count("\n| 4 |") == 1


def test_short_chats_are_in_the_table_with_an_answer_of_each_level(finished):
    output, printed, _ = finished
    rows = rows_of(output)
    assert rows[0]["answers"] == 1 and all(0 <= row["answers"] <= 1 for row in rows)
    answers = json.loads((output / "levels.json").read_text())["answers"]
    lines = printed[printed.index(f"Answers to {short_answers.QUESTIONS[0]!r}:") :].splitlines()[1:6]
    assert [line.split(maxsplit=1) for line in lines] == [[level, answer] for level, answer in answers.items()]
    assert all(len(line) <= 7 + short_answers.SAMPLE_WIDTH for line in lines)


def test_useless_adapter_does_not_look_like_a_useful_one(base, tmp_path, capsys):
    run(*command(base, tmp_path / "out", "--learning_rate", 3))
    printed, _ = capsys.readouterr()
    worst = rows_of(tmp_path / "out")[-1]
    assert worst["kl"] > worst["untrained_kl"]
    assert re.search(r"WARNING: levels? .*4 (are|is) worse than the untrained layer", printed)
    assert re.search(r"WARNING: levels .*4 are wrong in short chats", printed)
    assert "worse than the untrained layer.**" in (tmp_path / "out" / "README.md").read_text()


def test_template_that_takes_no_question_is_said(base, tmp_path, capsys):
    other = shutil.copytree(base, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{{ raise_exception('only tools may speak') }}"
    tokenizer.save_pretrained(other)
    run(*command(other, tmp_path / "out"))
    assert (
        "WARNING: short chats were left out: the chat template does not take a question (only tools may speak)" in capsys.readouterr().out
    )
    assert "answers" not in rows_of(tmp_path / "out")[0]


def test_without_sequences_to_measure_on_that_is_said_and_old_measurements_are_not_kept(base, finished, tmp_path, capsys):
    run(*command(base, tmp_path / "out", "--eval_sequences", 0, "--adapter", finished[0]))
    assert DSLAConfig.from_pretrained(tmp_path / "out").level_metrics is None
    printed = capsys.readouterr().out
    assert "WARNING: no text is kept apart" in printed and "Levels on" not in printed and not (tmp_path / "out" / "levels.json").exists()


def test_adapter_is_saved_at_the_highest_trained_level(base, finished, tmp_path):
    output, _, _ = finished
    assert DSLAConfig.from_pretrained(output).level == LAYERS
    run(*command(base, tmp_path / "out", "--train_level", 2))
    assert DSLAConfig.from_pretrained(tmp_path / "out").level == 2 and [row["level"] for row in rows_of(tmp_path / "out")] == [0, 1, 2]
    assert DSLAConfig.from_pretrained(tmp_path / "out" / "logits").level == 2
    assert DSLAConfig.from_pretrained(tmp_path / "out" / "alignment").level == LAYERS, "all layers were aligned"


# --- ends before the end ----------------------------------------------------------------------------------------


class Interrupt(TrainerCallback):
    def __init__(self, stage, step):
        self.at = stage, step

    def on_step_end(self, args, state, control, **kwargs):
        if (args.stage, state.global_step) == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def interrupt(monkeypatch):
    """Interrupt the next run after a step of a stage."""

    def at(stage, step):
        make = DSLATrainer.__init__

        def init(self, *args, callbacks=(), **options):
            make(self, *args, callbacks=[*callbacks, Interrupt(stage, step)], **options)

        monkeypatch.setattr(DSLATrainer, "__init__", init)

    return at


def interrupted(*arguments):
    with pytest.raises(KeyboardInterrupt) as caught:
        distill_job.distill_job(*parse_options(list(arguments)))
    return str(caught.value)


def test_interrupt_says_what_is_kept_and_a_resumed_run_where_it_begins(base, finished, tmp_path, interrupt, monkeypatch, capsys):
    arguments = command(base, tmp_path / "out", "--learning_rate", "1e-2")
    interrupt("alignment", 1)
    assert interrupted(*arguments) == "there was no checkpoint yet, so nothing is kept"
    monkeypatch.undo()
    interrupt("logits", 3)
    checkpoint = tmp_path / "out" / "logits" / "checkpoint-2"
    line = interrupted(*arguments)
    assert line == f"alignment is finished; the last checkpoint is step 2 of 4 of logits ({checkpoint})"
    monkeypatch.undo()
    damaged = shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-3"))
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    run(*arguments)
    _, error = capsys.readouterr()
    assert f"alignment: finished, read from {tmp_path / 'out' / 'alignment'}" in error
    assert f"logits: {damaged} is damaged or half-written, and passed over" in error
    assert f"logits: goes on from step 2 of 4 ({checkpoint})" in error
    # The table is that of a run in one piece: what it is compared with does not depend on where the run began.
    assert rows_of(tmp_path / "out") == rows_of(finished[0])


def test_interrupt_while_a_checkpoint_is_written_leaves_none_half_written(base, tmp_path, monkeypatch):
    def save(self, path):
        raise KeyboardInterrupt

    monkeypatch.setattr(TrainerState, "save_to_json", save)
    assert "nothing is kept" in interrupted(*command(base, tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*/checkpoint-*"))


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_process_has_words_for_an_interrupt(rank, base, tmp_path, monkeypatch):
    options = parse_options(command(base, tmp_path / "out"))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(distill_job, "_read_text", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt) as caught:
        distill_job.distill_job(*options)
    assert bool(str(caught.value)) == (rank == "0")


@pytest.mark.parametrize("where", ["weights", "optimizer", "settings", "result"])
def test_full_disk_is_one_line_and_the_run_can_go_on(where, base, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    if where == "optimizer":  # what torch says of a full disk
        save = torch.save

        def full(content, path, *args, **options):
            if "logits/checkpoint-4" in str(path):
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
            save(content, path, *args, **options)

        monkeypatch.setattr(torch, "save", full)
    elif where == "weights":  # what safetensors says
        from safetensors import SafetensorError

        store = DSLATrainer.save_model

        def full(self, directory=None, _internal_call=False):
            if "logits/checkpoint-4" in str(directory):
                Path(directory).mkdir()
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
            store(self, directory, _internal_call)

        monkeypatch.setattr(DSLATrainer, "save_model", full)
    else:
        write, name = Path.write_bytes, {"settings": ".distill.json.partial", "result": ".levels.json.partial"}[where]

        def full(self, text, *args, **options):
            if self.name == name:
                write(self, text[:10])
                raise OSError(errno.ENOSPC, "No space left on device", str(self))
            return write(self, text, *args, **options)

        monkeypatch.setattr(Path, "write_bytes", full)
    assert main(["distill", *command(base, output)]) == 1
    _, error = capsys.readouterr()
    line = error.splitlines()[-1]
    assert (
        "No space left on device while writing to " in line and str(output) in line and "make room and give the same command again" in line
    )
    if where == "result":
        assert "Kept: alignment, logits are finished; make room" in line
    if where in ("weights", "optimizer"):
        assert f"The last whole checkpoint is {output / 'logits' / 'checkpoint-2'}" in line
        assert not (output / "logits" / "checkpoint-4").exists()
    assert not list(output.rglob("*.partial")) and not list(output.rglob(".saving-*"))
    monkeypatch.undo()
    run(*command(base, output))
    assert len(rows_of(output)) == 5


def test_two_checkpoints_are_kept_of_each_stage(base, tmp_path):
    _, args = parse_options(command(base, "out"))
    assert args.save_total_limit == 2
    run(*command(base, tmp_path / "out", "--save_steps", 1))
    assert sorted(path.name for path in (tmp_path / "out" / "logits").glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_options_may_change_while_nothing_is_there_to_go_on_from(base, tmp_path, interrupt, monkeypatch):
    interrupt("alignment", 1)
    interrupted(*command(base, tmp_path / "out"))
    monkeypatch.undo()
    run(*command(base, tmp_path / "out", "--seed", 7))
    assert json.loads((tmp_path / "out" / "distill.json").read_text())["--seed"] == 7


def test_library_measures_nothing_by_itself(tiny_model, adapter_model, tmp_path, capsys):
    model = adapter_model(tiny_model("llama"), level=1)
    data = [{"input_ids": torch.randint(3, 97, (24,))} for _ in range(8)]
    options = {"report_to": [], "use_cpu": True, "per_device_train_batch_size": 2}
    args = DSLATrainingArguments(output_dir=str(tmp_path), **options)
    assert distill(model, data, args, alignment_steps=1, logits_steps=1) is None
    config = DSLAConfig.from_pretrained(tmp_path)
    assert config.level == 4 and config.level_metrics is None and model.get_level() == 4
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="beyond the window"):
        distill(model, [{"input_ids": torch.arange(12)}], args, alignment_steps=1, logits_steps=1)
    with pytest.raises(ValueError, match="to rank layers on has 0 %"):
        distill(model, data, args, alignment_steps=1, logits_steps=1, ranking_data=[torch.arange(10)])
    assert math.isfinite(sum(p.sum().item() for p in model.parameters()))
