"""The harness's model type `dsla`, hybrids in the harness, and `dsla eval`: tiny models, local tasks, nothing downloaded."""

import json
import logging
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from dsla_cli import main
from dsla_hf import DSLAConfig
from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.evaluation import harness as evaluate_job
from dsla_hf.evaluation import long_context
from dsla_hf.evaluation.harness import evaluate, table

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'dsla-hf[eval]'")
import lm_eval.tasks
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from dsla_hf.evaluation.lm_eval import DSLALM
from dsla_hf.evaluation.lm_eval import main as harness_main

LAYERS, ORDER, LEVEL = 4, [2, 0, 3, 1], 2
TEXT = " ".join(f"{number} green bottles hang on the wall, and if one of them should fall" for number in range(100, 0, -1))
ENDS = [" wall", " bottles, and if one of them should fall", " if one"]
TASKS = {
    "bottles_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "bottles_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "query",
        "metric_list": [{"metric": "byte_perplexity", "aggregation": "weighted_perplexity", "higher_is_better": False}],
    },
    "bottles_generate": {
        "output_type": "generate_until",
        "doc_to_text": "query",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
}


def save_base(directory, tokenizer, seed=0):
    """Its embeddings have more rows than the tokenizer has tokens, as many models have."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    sizes |= {"num_hidden_layers": LAYERS, "vocab_size": len(tokenizer) + 7, "initializer_range": 0.2, "max_position_embeddings": 4096}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_adapter(directory, base):
    torch.manual_seed(1)
    plan = DSLAConfig(task_type="CAUSAL_LM", window_size=8, conversion_order=ORDER, level=LEVEL)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), plan)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dsla_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(str(directory))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base with tokenizer, its adapter and hybrid, another base, and a folder with three tasks."""
    folder = tmp_path_factory.mktemp("made")
    tokenizer = train_tokenizer([TEXT], vocab_size=320)
    save_base(folder / "base", tokenizer)
    save_base(folder / "other", tokenizer, seed=5)
    save_adapter(folder / "adapter", folder / "base")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base"), str(folder / "adapter"))
    model.merge_and_unload().save_pretrained(str(folder / "hybrid"))
    tokenizer.save_pretrained(folder / "hybrid")
    (folder / "tasks").mkdir()
    texts = [TEXT[20 * i : 20 * i + 30 + 11 * (i % 5)] for i in range(8)]  # of five lengths, for padding
    docs = [{"query": text, "choices": ENDS, "gold": i % 3} for i, text in enumerate(texts)]
    (folder / "tasks" / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "tasks" / "docs.jsonl")}}}
    for name, task in TASKS.items():  # JSON is YAML
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name, **source, "test_split": "test", **task}))
    broken = {**source, "dataset_kwargs": {"data_files": {"test": str(folder / "none.jsonl")}}, "test_split": "test"}
    (folder / "tasks" / "bottles_broken.yaml").write_text(json.dumps({"task": "bottles_broken", **broken, **TASKS["bottles_text"]}))
    return SimpleNamespace(**{name: str(folder / name) for name in ("base", "other", "adapter", "hybrid", "tasks")}, folder=folder)


@pytest.fixture(autouse=True)
def local(monkeypatch, tmp_path, made):
    """A cache of these tests alone, and nothing slow: definitions of all tasks take ten seconds to read, the harness's description of
    the machine two."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", made.folder / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True, raising=False)  # no handler that outlives a test
    every = lm_eval.tasks.TaskManager
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda *args, **kwargs: every(*args, **{**kwargs, "include_defaults": False}))


def scores(made, model, model_args, tasks=tuple(TASKS), batch_size=4):
    """What the harness finds by name and arguments: {task: {metric: value}}."""
    manager = TaskManager(include_path=made.tasks, include_defaults=False)
    found = simple_evaluate(
        model=model, model_args=model_args, tasks=list(tasks), batch_size=batch_size, device="cpu", bootstrap_iters=0, task_manager=manager
    )
    answers = {task: [sample["filtered_resps"] for sample in samples] for task, samples in found["samples"].items()}
    results = {task: {name: value for name, value in values.items() if name.endswith(",none")} for task, values in found["results"].items()}
    return {task: {name: values[name] for name in values if "_stderr" not in name} for task, values in results.items()}, answers


def close(one, other):
    assert one.keys() == other.keys()
    for task in one:
        assert one[task] == pytest.approx(other[task], rel=1e-5), task


@pytest.fixture(scope="module")
def at_level(made):
    """Scores and answers of the model type `dsla`, by level."""
    return {level: scores(made, "dsla", f"pretrained={made.base},peft={made.adapter},level={level}") for level in (0, "50%", 4)}


# --- in the harness ---------------------------------------------------------------------------------------------


def test_level_0_is_the_base_exactly_and_other_levels_are_not(made, at_level):
    base = scores(made, "hf", f"pretrained={made.base}")
    assert at_level[0] == base
    assert len({at_level[level][0]["bottles_text"]["byte_perplexity,none"] for level in at_level}) == 3


def test_hybrid_scores_as_the_adapter_at_its_level(made, at_level):
    results, answers = at_level["50%"]
    for model in ("hf", "dsla"):  # without trust_remote_code: dsla_hf is imported
        found, found_answers = scores(made, model, f"pretrained={made.hybrid}")
        close(found, results)
        assert found_answers["bottles_generate"] == answers["bottles_generate"]


def test_without_a_level_the_adapter_has_its_own(made, at_level):
    assert (
        scores(made, "dsla", f"pretrained={made.base},peft={made.adapter}", ["bottles_text"])[0]["bottles_text"]
        == (at_level["50%"][0]["bottles_text"])
    )


@pytest.mark.parametrize("level", [0, "50%", 4])
def test_padded_batches_answer_as_batch_1(made, at_level, level):
    results, answers = scores(made, "dsla", f"pretrained={made.base},peft={made.adapter},level={level}", batch_size=1)
    assert answers["bottles_generate"] == at_level[level][1]["bottles_generate"]
    assert len({str(answer) for answer in answers["bottles_generate"]}) > 3, "the answers say nothing"
    close(results, at_level[level][0])


def test_stock_harness_runs_a_hybrid_with_trust_remote_code(made, at_level):
    """A process that never imports dsla_hf by itself."""
    code = f"""
import json
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
manager = TaskManager(include_path={made.tasks!r}, include_defaults=False)
found = simple_evaluate(
    model="hf", model_args="pretrained={made.hybrid},trust_remote_code=True", tasks=["bottles_text"], batch_size=4, device="cpu",
    bootstrap_iters=0, task_manager=manager,
)
print(json.dumps(found["results"]["bottles_text"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["byte_perplexity,none"] == pytest.approx(at_level["50%"][0]["bottles_text"]["byte_perplexity,none"], rel=1e-5)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["dsla_hf.evaluation.lm_eval", *map(str, arguments)])
    return harness_main()


def test_module_is_the_command_of_the_harness(made, at_level, monkeypatch, capsys):
    arguments = ["--model", "dsla", "--model_args", f"pretrained={made.base},peft={made.adapter},level=50%", "--tasks", "bottles_text"]
    monkeypatch.setattr(sys, "argv", ["lm_eval", *arguments, "--include_path", made.tasks, "--batch_size", "4", "--device", "cpu"])
    with (
        pytest.warns(RuntimeWarning, match="dsla_hf.evaluation.lm_eval"),
        pytest.raises(SystemExit) as caught,
    ):  # it is imported here already
        runpy.run_module("dsla_hf.evaluation.lm_eval", run_name="__main__")
    output = capsys.readouterr().out
    assert caught.value.code == 0
    assert f"{at_level['50%'][0]['bottles_text']['byte_perplexity,none']:.4f}".rstrip("0") in output


@pytest.mark.parametrize(
    "model_args, words",
    [
        ("pretrained={base},peft={adapter},level=0,4,8", ["one level", "dsla eval --levels"]),
        ("pretrained={base},level=25%,50%,peft={adapter}", ["one level", "dsla eval --levels"]),
        ("pretrained={base},peft={adapter},level=[0;4]", ["level", "levels 0 to 4"]),
        ("pretrained={base},peft={adapter},level=5", ["level 5 is above the plan"]),
        ("pretrained={base},pefft={adapter},level=2", ["['pefft']", "did you mean 'peft'", "'level'", "'revision'"]),
        ("pretrained={base},level=2", ["level needs peft"]),
        ("pretrained={hybrid},level=2", ["level cannot be had", "hybrid"]),
        ("pretrained={hybrid},peft={adapter}", ["peft cannot be had", "hybrid"]),
        ("pretrained={base},peft={base}", ["is not an adapter"]),
        ("pretrained={other},peft={adapter}", ["other weights"]),
        ("pretrained={folder}/none", ["none"]),
    ],
)
def test_model_args_that_do_not_fit(model_args, words, made, monkeypatch, capsys):
    arguments = [
        "--model",
        "dsla",
        "--model_args",
        model_args.format(**vars(made)),
        "--tasks",
        "bottles_text",
        "--include_path",
        made.tasks,
    ]
    assert command(monkeypatch, *arguments) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dsla_hf.evaluation.lm_eval: ") and all(word in error for word in words), error


@pytest.mark.parametrize("level", [[0, 4], (0, 4), "0,4"])
def test_several_levels_in_python_too(level, made):
    with pytest.raises(ValueError, match="dsla eval --levels"):
        DSLALM(made.base, peft=made.adapter, level=level)
    with pytest.raises(ValueError, match="dsla eval --levels"):  # as a harness before 0.4.13 reads level=0,4
        DSLALM(made.base, peft=made.adapter, level=0, **{"4": ""})


def test_loaded_model_takes_no_level(made):
    with pytest.raises(ValueError, match="set_level"):
        DSLALM(AutoModelForCausalLM.from_pretrained(made.base), tokenizer=made.base, level=1)


# --- memory -----------------------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(monkeypatch):
    """Forwards of more than two rows fail; the sizes that were tried."""
    tried, call, generate = [], DSLALM._model_call, DSLALM._model_generate

    def check(rows):
        tried.append(rows)
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(DSLALM, "_model_call", lambda self, ids, *args, **kwargs: check(len(ids)) or call(self, ids, *args, **kwargs))
    monkeypatch.setattr(DSLALM, "_model_generate", lambda self, context, **kwargs: check(len(context)) or generate(self, context, **kwargs))
    return tried


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_that_does_not_fit_is_halved(task, made, at_level, little_memory, caplog):
    with caplog.at_level(logging.WARNING, logger="dsla_hf"):
        results, _ = scores(made, "dsla", f"pretrained={made.base},peft={made.adapter},level=50%", [task], batch_size=8)
    close(results, {task: at_level["50%"][0][task]})
    assert max(little_memory) > 2 and little_memory[-1] <= 2
    warned = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert warned == [f"lm-eval: out of memory with batches of {size}, going on with {size // 2}" for size in (8, 4)]


def test_one_sequence_that_does_not_fit_ends_it(made, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(DSLALM, "_model_call", full)
    refusal(capsys, options(made, tmp_path, "--batch-size", 1), "out of memory with one sequence")
    assert not list((tmp_path / "results").glob("*.json"))


def test_another_error_is_not_taken_for_it(made, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("something else")

    monkeypatch.setattr(DSLALM, "_model_call", broken)
    with pytest.raises(RuntimeError, match="something else"):
        scores(made, "dsla", f"pretrained={made.base}", ["bottles_text"])


# --- dsla eval --------------------------------------------------------------------------------------------------


def options(made, tmp_path, *more):
    """A short run of two tasks at three levels; options given again count."""
    own = ["--model", made.base, "--adapter", made.adapter, "--levels", "0,50%,4", "--tasks", "bottles_text,far_bigrams"]
    own += ["--output", tmp_path / "results", "--include-path", made.tasks, "--limit", "6", "--lengths", "96", "--haystack", made.haystack]
    return ["eval", *map(str, [*own, *more])]


@pytest.fixture(scope="module", autouse=True)
def haystack(made):
    made.haystack = str(made.folder / "hay.txt")
    Path(made.haystack).write_text(TEXT)


@pytest.fixture
def loads(monkeypatch):
    """The checkpoints that are loaded."""
    seen, load = [], AutoModelForCausalLM.from_pretrained

    def note(name, *args, **kwargs):
        seen.append(str(name))
        return load(name, *args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", note)
    return seen


def refusal(capsys, arguments, *words):
    """Status 1 and one line with these words."""
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 1
    output, error = capsys.readouterr()
    lines = re.findall("dsla eval: .*", error)  # a progress bar may stand before it
    assert len(lines) == 1 and "Traceback" not in error, error
    for word in words:
        assert str(word) in lines[0], lines[0]


def result(tmp_path, level):
    return json.loads((tmp_path / "results" / f"level-{level:02d}.json").read_text())


def test_the_table_of_many_levels_has_a_row_for_each():
    results = {level: {"piqa": {"acc": level / 40, "acc_stderr": 0.1}} for level in range(33)}
    lines = [line.split() for line in table(results).splitlines()]
    assert lines[0] == ["task", "metric", "level"] and len(lines) == 34 and lines[5] == ["piqa", "acc", "4", "0.1000"]
    few = table({level: results[level] for level in (0, 4)}).splitlines()
    assert [line.split() for line in few] == [["task", "metric", "level", "0", "level", "4"], ["piqa", "acc", "0.0000", "0.1000"]]


def test_sweep_loads_once_and_writes_a_file_per_level(made, at_level, loads, tmp_path, capsys):
    assert main(options(made, tmp_path, "--tasks", ",".join([*TASKS, "far_bigrams"]), "--limit", "8", "--batch-size", "4")) == 0
    output = capsys.readouterr().out
    assert loads == [made.base]
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["level-00.json", "level-02.json", "level-04.json"]
    for share, level in ((0, 0), ("50%", 2), (4, 4)):
        found = result(tmp_path, level)
        assert (found["level"], found["settings"]["layers"]) == (level, ORDER[:level])
        for task, metrics in at_level[share][0].items():  # the same as by name in the harness
            for name, value in metrics.items():
                assert found["tasks"][task][name.removesuffix(",none")] == value
                assert f"{value:.4f}" in output
        assert found["tasks"]["bottles_choice"]["acc_stderr"] > 0
        assert found["higher_is_better"]["bottles_choice"]["acc"] is True
        assert found["higher_is_better"]["bottles_text"]["byte_perplexity"] is False
        assert found["tasks"]["far_bigrams"]["loss@96[new]"] > 0 and found["samples"]["bottles_text"] == 8
        assert found["window"] == (8 if level else None) and found["longest_text"].keys() == {"bottles_choice", "bottles_text"}
        assert {"dsla-hf", "lm-eval", "torch", "transformers", "python"} <= found["versions"].keys()
        assert found["command"].startswith("dsla eval --model ") and f"--levels {level} " in found["command"]
    header = next(line for line in output.splitlines() if line.startswith("task "))
    assert header.split() == ["task", "metric", "level", "0", "level", "2", "level", "4"]


def test_texts_that_the_window_holds_are_said(made, tmp_path, monkeypatch, capsys):
    tasks = ["--tasks", "bottles_text,bottles_choice,bottles_generate", "--levels", "0,2"]
    assert main(options(made, tmp_path, *tasks)) == 0
    longest, said = result(tmp_path, 2)["longest_text"], "which alone reads it"
    assert min(longest.values()) > 8 and said not in capsys.readouterr().out  # the window has 8 tokens
    monkeypatch.setattr(evaluate_job, "_window", lambda network: min(longest.values()))
    assert main(options(made, tmp_path, *tasks, "--output", tmp_path / "wide")) == 0
    task = min(longest, key=longest.__getitem__)
    lines = [line for line in capsys.readouterr().out.splitlines() if said in line]
    words = f"({longest[task]:,} tokens) fits into the window ({longest[task]:,}), {said}: this says nothing of states."
    assert lines == [f"{task}: its longest text {words}"]


def test_what_is_there_is_not_made_again(made, loads, tmp_path, capsys):
    arguments = options(made, tmp_path, "--levels", "2,4")
    assert main(arguments) == 0
    first, before = capsys.readouterr().out, (tmp_path / "results" / "level-04.json").stat().st_mtime_ns
    (tmp_path / "results" / "level-02.json").unlink()  # as if stopped
    assert main(arguments) == 0
    second = capsys.readouterr().out
    assert len(loads) == 2 and (tmp_path / "results" / "level-04.json").stat().st_mtime_ns == before
    assert "level 4: already in" in second and "level 2: already in" not in second
    assert first[first.index("\ntask ") :] == second[second.index("\ntask ") :]
    assert main([*arguments, "--levels", "100%,50%", "--batch-size", "3"]) == 0, "the batch size is no setting of the measurement"
    assert len(loads) == 2


def test_stopped_while_writing_leaves_no_result(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate_job.os, "replace", lambda *args: (_ for _ in ()).throw(OSError("stopped")))
    refusal(capsys, options(made, tmp_path, "--tasks", "far_bigrams"), "stopped")
    monkeypatch.undo()
    assert not list((tmp_path / "results").glob("*.json"))


def test_the_command_in_a_file_makes_it_again(made, tmp_path, capsys):
    assert main(options(made, tmp_path, "--tasks", "far_bigrams,needle", "--levels", "4", "--lengths", "300", "--seed", "3")) == 0
    first = result(tmp_path, 4)
    shutil.rmtree(tmp_path / "results")
    assert main(first["command"].split()[1:]) == 0
    again = result(tmp_path, 4)
    assert {**again, "seconds": 0} == {**first, "seconds": 0}


def test_other_settings_are_refused(made, loads, tmp_path, capsys):
    arguments = options(made, tmp_path, "--tasks", "far_bigrams", "--levels", "1")
    assert main(arguments) == 0
    for more, words in (
        (["--limit", "7"], ["limit (6 there, 7 now)", "another --output"]),
        (["--tasks", "needle", "--lengths", "300"], ["tasks (['far_bigrams'] there, ['needle'] now)", "lengths"]),
        (["--seed", "1"], ["seed (0 there, 1 now)"]),
        (["--dtype", "bfloat16"], ["dtype"]),
    ):
        refusal(capsys, [*arguments, *more], "level-01.json was made with other settings", *words)
    adapter = shutil.copytree(made.adapter, tmp_path / "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "conversion_order": ORDER[::-1]}))
    refusal(capsys, [*arguments, "--adapter", adapter], f"layers ({ORDER[:1]} there, {ORDER[:-2:-1]} now)")
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "window_size": 10}))
    refusal(capsys, [*arguments, "--adapter", adapter], "mathematics")
    (tmp_path / "results" / "level-01.json").write_text("{")
    refusal(capsys, arguments, "is no result of `dsla eval`")
    assert loads == [made.base]


def test_hybrid_and_base_have_one_level(made, tmp_path, loads, capsys):
    def run(output, *more):
        return evaluate(*more, ["far_bigrams", "bottles_text"], str(tmp_path / output), limit=6, include_path=made.tasks, lengths=[96])

    with_adapter = run("adapter", made.base, made.adapter, None)
    hybrid, base = run("hybrid", made.hybrid, None, None), run("base", made.base, None, None)
    level_0 = run("level_0", made.base, made.adapter, [0])
    assert (*with_adapter, *hybrid, *base) == (LEVEL, LEVEL, 0)
    assert base[0]["tasks"] == level_0[0]["tasks"]
    close(hybrid[LEVEL]["tasks"], with_adapter[LEVEL]["tasks"])
    assert with_adapter[LEVEL]["tasks"] != base[0]["tasks"]


@pytest.mark.parametrize(
    "more, words",
    [
        (["--levels", "0,5"], ["level 5", "0 to 4"]),
        (["--levels", "half"], ["'half'", "50%"]),
        (["--levels", ","], ["no level is named"]),
        (["--adapter", "{base}"], ["is not an adapter"]),
        (["--model", "{hybrid}"], ["is a hybrid already", "give the original model"]),
        (["--model", "{folder}/none"], ["none"]),
        (["--tasks", "bottles_txt"], ["unknown task 'bottles_txt'", "'bottles_text'"]),
        (["--tasks", "needel"], ["unknown task 'needel'", "'needle'"]),
        (["--tasks", "zzzz"], ["unknown task 'zzzz'", "lm_eval ls tasks"]),
        (["--tasks", ","], ["no task is named"]),
        (["--tasks", "bottles_broken"], ["task bottles_broken", "none.jsonl", "local files"]),
        (["--include-path", "{folder}/none"], ["is not a folder"]),
        (["--output", "{tasks}/docs.jsonl"], ["is a file"]),
        (["--tasks", "needle", "--lengths", "16"], ["length 16 is too short", "needle"]),
        (["--tasks", "needle", "--lengths", "500000"], ["haystack has", "500,000"]),
        (["--haystack", "{folder}/none.txt"], ["none.txt"]),
        (["--num-fewshot", "-1"], ["num_fewshot", "-1"]),
    ],
    ids=str,
)
def test_refused_before_a_model_is_loaded(more, words, made, loads, tmp_path, capsys):
    refusal(capsys, options(made, tmp_path, *[item.format(**vars(made)) for item in more]), *words)
    assert not loads and not (tmp_path / "results").exists()


def test_adapter_of_another_base(made, tmp_path, capsys):
    refusal(capsys, options(made, tmp_path, "--model", made.other), "other weights")
    assert not (tmp_path / "results").exists()


def test_level_needs_an_adapter(made, tmp_path, capsys):
    with pytest.raises(ValueError, match="--levels needs --adapter"):
        evaluate(made.base, None, [2], ["needle"], str(tmp_path / "results"))


def test_missing_package_of_a_task(made, tmp_path, monkeypatch, capsys):
    def needs(self, task):
        raise ModuleNotFoundError("No module named 'jieba'", name="jieba")

    monkeypatch.setattr(TaskManager, "load", needs)
    refusal(capsys, options(made, tmp_path), "task bottles_text needs a package", "pip install jieba")


def test_without_lm_eval(made, tmp_path, monkeypatch, capsys):
    """Its tasks say how to install it; the library's own do without."""
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "dsla_hf.evaluation.lm_eval")
    refusal(capsys, options(made, tmp_path), "lm-eval is not installed: pip install 'dsla-hf[eval]'")
    assert main(options(made, tmp_path, "--tasks", "far_bigrams")) == 0
    with pytest.raises(SystemExit, match="pip install 'dsla-hf\\[eval\\]'"):
        runpy.run_module("dsla_hf.evaluation.lm_eval", run_name="__main__")


@pytest.mark.parametrize("batch_size", ["0", "-3", "many"])
def test_batch_size_is_auto_or_a_number(batch_size, made, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main(options(made, tmp_path, "--batch-size", batch_size))
    assert caught.value.code == 2 and "must be a whole number, 1 or more" in capsys.readouterr().err


def test_own_tasks_have_no_name_of_the_harness(monkeypatch):
    """All built-in definitions are read: slow, but names would be taken for ours."""
    names = [path.stem for path in Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")]
    assert not set(names) & set(long_context.TASKS)
