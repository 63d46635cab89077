"""The task groups: each resolves and runs on local stand-ins with the columns and splits of the data sets on the hub."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MambaConfig, PreTrainedTokenizerFast

import dsla_hf.evaluation.tasks.documents
from dsla_cli import main
from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.evaluation.harness import evaluate
from dsla_hf.evaluation.local_datasets import local_datasets

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'dsla-hf[eval]'")
import datasets
import lm_eval.tasks
import yaml
from lm_eval import simple_evaluate

from dsla_hf.evaluation.lm_eval import DSLALM
from dsla_hf.evaluation.lm_eval import main as harness_main
from dsla_hf.evaluation.tasks.truncation import MiddleTruncated, cut_middle, tokenizer_and_context

REPOSITORY = Path(__file__).resolve().parents[2]
BUILT_IN = Path(lm_eval.tasks.__file__).parent
# Of which the groups are made; reading the definitions of all built-in tasks takes ten seconds.
PARTS = ("winogrande", "hellaswag", "piqa", "arc", "mmlu/default", "longbench", "cnn_dailymail", "wikitext", "lambada", "ruler")
CONTEXT = 640
TEXT = " ".join(f"{number} green bottles hang on the wall, and if one of them should fall" for number in range(100, 0, -1))
LONGBENCH = ("hotpotqa", "2wikimqa", "lcc", "repobench-p", "trec", "samsum", "triviaqa")
GROUPS = {
    "dsla_commonsense": {"winogrande", "hellaswag", "piqa", "arc_easy", "arc_challenge", "mmlu", "dsla_logiqa"},
    "dsla_longbench": {"dsla_longbench", *(f"longbench_{name}" for name in LONGBENCH)},
    "dsla_summarization": {"cnn_dailymail_abisee", "dsla_xsum"},
    "dsla_perplexity": {"wikitext", "lambada_standard"},
}


def write(folder, rows, splits=("train", "validation", "test")):
    folder.mkdir(parents=True)
    for split in splits:
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


def longbench_row(name, i):
    # Three times as long as the context: bottles at both ends, other words in the middle.
    context = f"First of all {TEXT} {'middle ' * 400} {TEXT} That is all."
    classes = ["Location", "Number of something"] if name == "trec" else None
    answers = {"trec": ["Location"], "lcc": ["    return bottles"]}.get(name, ["green bottles", "a wall"])
    row = {"context": context, "question": f"How many hang there, {i}?", "answers": answers, "all_classes": classes}
    return row | {"length": 1000, "dataset": name, "language": "en", "_id": str(i)}


def write_stand_ins(folder):
    """As on the hub: the same names, columns, types and splits; texts of our own."""
    sentence = "The bottle fell off the wall because the _ was shaking."
    rows = [{"sentence": sentence, "option1": "wall", "option2": "bottle", "answer": str(i + 1)} for i in range(2)]
    write(folder / "allenai/winogrande/winogrande_xl", rows)

    activity = {"activity_label": "Counting", "ctx_a": "A man counts bottles.", "ctx_b": "he", "ctx": "A man counts bottles. he"}
    ends = ["sees [title] one fall.", "sings.", "sleeps.", "goes home."]
    write(folder / "Rowan/hellaswag", [{"ind": i, **activity, "endings": ends, "split": "val", "label": str(i)} for i in range(2)])

    rows = [{"goal": f"Hang bottle {i}", "sol1": "use a string", "sol2": "use a cloud", "label": i} for i in range(2)]
    write(folder / "baber/piqa", rows)

    choices = {"text": ["bottles", "walls", "songs"], "label": ["A", "B", "C"]}
    rows = [{"id": str(i), "question": "What falls?", "choices": choices, "answerKey": "AB"[i]} for i in range(2)]
    for name in ("ARC-Easy", "ARC-Challenge"):
        write(folder / "allenai/ai2_arc" / name, rows)

    rows = [{"question": "How many?", "subject": "bottles", "choices": ["1", "2", "3", "4"], "answer": i} for i in range(2)]
    for path in (BUILT_IN / "mmlu/default").glob("mmlu_*.yaml"):
        name = re.search('\\bdataset_name"?: *["\']?(\\w+)', path.read_text())
        if name:  # the others only include
            write(folder / "cais/mmlu" / name[1], rows, ("dev", "validation", "test"))

    options = ["All fall.", "None falls.", "One falls.", "They sing."]
    rows = [{"context": TEXT[:90], "query": "Which is true?", "options": options, "correct_option": i} for i in range(2)]
    write(folder / "lucasmccabe/logiqa", rows)

    for name in LONGBENCH:
        write(folder / "Xnhyacinth/LongBench" / name, [longbench_row(name, i) for i in range(2)], ("test",))

    rows = [{"article": 2 * TEXT, "highlights": "Bottles fall.\nAll of them.", "id": str(i)} for i in range(2)]
    write(folder / "abisee/cnn_dailymail/3.0.0", rows)
    write(folder / "EdinburghNLP/xsum", [{"document": TEXT, "summary": "Bottles fall.", "id": str(i)} for i in range(2)])

    write(folder / "EleutherAI/wikitext_document_level/wikitext-2-raw-v1", [{"page": f" = Wall {i} = \n {TEXT}"} for i in range(2)])
    write(folder / "cimec/lambada", [{"text": f"{TEXT[:200]} the wall", "domain": "Songs"} for _ in range(2)])
    write(folder / "baber/paul_graham_essays", [{"text": 40 * f"{TEXT}. "}], ("train",))


def save_base(folder, tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": len(tokenizer)}
    config = LlamaConfig(**sizes, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny base whose context is short, and the data."""
    folder = tmp_path_factory.mktemp("groups")
    tokenizer = train_tokenizer([TEXT], vocab_size=320)
    save_base(folder / "base", tokenizer)
    write_stand_ins(folder / "data")
    return SimpleNamespace(base=str(folder / "base"), data=str(folder / "data"), folder=folder, tokenizer=tokenizer)


@pytest.fixture(autouse=True)
def local(monkeypatch, made):
    """A cache of these tests alone, and of the built-in tasks those that are needed."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", made.folder / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    for place in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{place}.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", True, raising=False)
    every = lm_eval.tasks.TaskManager

    def some(*args, include_path=None, **kwargs):
        folders = [include_path] if isinstance(include_path, str) else include_path or []
        return every(*args, include_path=[*(str(BUILT_IN / part) for part in PARTS), *folders], **{**kwargs, "include_defaults": False})

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", some)


@pytest.fixture
def prompts(monkeypatch):
    """What tasks ask of models that generate: by name of the task, (prompt, new tokens)."""
    seen, construct = {}, MiddleTruncated.construct_requests

    def note(self, *args, **kwargs):
        made = construct(self, *args, **kwargs)
        seen.setdefault(self.config.task, []).append((made.args[0], made.args[1]["max_gen_toks"]))
        return made

    monkeypatch.setattr(MiddleTruncated, "construct_requests", note)
    return seen


@pytest.fixture
def paper(made, prompts, tmp_path):
    """Results and prompts of the group that holds the others, which runs once for all tests."""
    pytest.importorskip("fuzzywuzzy", reason="needs pip install 'lm-eval[longbench]'")
    if not hasattr(made, "paper"):
        made.paper = run(made, tmp_path, "dsla_paper"), prompts
    return made.paper


def run(made, tmp_path, *tasks, **more):
    return evaluate(made.base, None, None, list(tasks), str(tmp_path / "results"), limit=2, data=made.data, **more)[0]


# --- groups -----------------------------------------------------------------------------------------------------


def test_the_groups_are_found_without_flags_and_from_a_clone():
    manager = lm_eval.tasks.TaskManager(include_path=str(REPOSITORY / "eval" / "tasks"))
    assert (REPOSITORY / "eval" / "tasks").resolve() == dsla_hf.evaluation.tasks.FOLDER.resolve()
    paper = manager.task_index["dsla_paper"].cfg["task"]
    assert paper == list(GROUPS)
    for group in [*paper, "dsla_ruler", "dsla_ruler_synthetic"]:
        for member in manager.task_index[group].cfg["task"]:
            assert (member if isinstance(member, str) else member["task"]) in manager.all_tasks
    ours = [
        yaml.load(path.read_text(), yaml.BaseLoader)
        for path in dsla_hf.evaluation.tasks.FOLDER.glob("*.yaml")
        if "!function" not in path.read_text()
    ]
    assert {entry["group"] for entry in ours} <= set(manager.all_groups)


@pytest.mark.parametrize("group", GROUPS)
def test_the_paper_is_one_group_and_each_part_of_it_runs(group, made, paper):
    result, prompts = paper
    assert GROUPS[group] <= result["tasks"].keys()
    for task in GROUPS[group]:
        metrics = {name: value for name, value in result["tasks"][task].items() if "_stderr" not in name}
        assert metrics and all(value >= 0 for value in metrics.values()), task
    assert all(samples == 2 for samples in result["samples"].values())
    asked = [prompt for task in GROUPS[group] for prompt in prompts.get(task, [])]
    assert len(asked) == {"dsla_longbench": 14, "dsla_summarization": 4}.get(group, 0)
    for prompt, new_tokens in asked:
        tokens = len(made.tokenizer(prompt)["input_ids"])
        assert tokens <= CONTEXT - new_tokens
        if group == "dsla_longbench":
            assert tokens > CONTEXT - new_tokens - 5 and "middle" not in prompt
            assert "First of all 100 green" in prompt and "That is all." in prompt


@pytest.mark.slow
def test_ruler_runs(made, tmp_path, monkeypatch):
    """Beside its own text it reads essays, and questions by their addresses."""
    pytest.importorskip("wonderwords", reason="needs pip install 'lm-eval[ruler]'")
    from lm_eval.tasks.ruler import prepare_niah

    monkeypatch.setattr(prepare_niah, "sent_tokenize", lambda text: text.split(". "))
    answer = {"question": "How many?", "answers": [{"text": "green"}], "is_impossible": False}
    paragraphs = [{"context": f"{i} {TEXT[:60]}", "qas": [answer]} for i in range(600)]
    hotpot = [{"question": "How many?", "answer": "green", "context": [[f"Wall {i}", [TEXT[:60]]]]} for i in range(600)]
    answers = {True: hotpot, False: {"data": [{"paragraphs": paragraphs}]}}
    response = {kind: SimpleNamespace(raise_for_status=lambda: None, json=lambda kind=kind: answers[kind]) for kind in answers}
    monkeypatch.setattr("requests.get", lambda url, **options: response["hotpot" in url])
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<pad>": 1, "<unk>": 2}, unk_token="<unk>"))  # a token a word: the lengths are enough
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    save_base(tmp_path / "base", PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"))
    made = SimpleNamespace(base=str(tmp_path / "base"), data=made.data)
    result = run(made, tmp_path, "dsla_ruler", lengths=[1024])
    assert {"niah_single_2", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_squad", "ruler_qa_hotpot"} <= result["tasks"].keys()
    assert all(set(metrics) <= {"1024", "1024_stderr"} for metrics in result["tasks"].values()), "of 4096 tokens nothing is measured"


def test_the_command_of_the_harness_finds_the_groups(made, monkeypatch, capsys):
    monkeypatch.chdir(made.data)
    arguments = ["--model", "hf", "--model_args", f"pretrained={made.base}", "--tasks", "dsla_summarization", "--limit", "2"]
    monkeypatch.setattr("lm_eval.config.evaluate_config.TaskManager", lm_eval.tasks.TaskManager, raising=False)
    # lm-eval's own command reads local data by the folder that it runs in, which holds OWNER/NAME; configurations need a README.md.
    (Path(made.data) / "abisee/cnn_dailymail/README.md").write_text("---\nconfigs:\n- config_name: 3.0.0\n  data_dir: 3.0.0\n---\n")
    monkeypatch.setattr("sys.argv", ["dsla_hf.evaluation.lm_eval", *arguments, "--batch_size", "2", "--device", "cpu"])
    assert harness_main() == 0
    assert re.search(r"dsla_xsum.*rouge1", capsys.readouterr().out)


def test_folders_as_the_hub_writes_them(made, tmp_path):
    """With a README.md that names configurations, as `hf download` gets it."""
    folder = tmp_path / "data/allenai/winogrande"
    write(folder / "winogrande_xl", [{"sentence": "a _ b", "option1": "1", "option2": "2", "answer": "1"}])
    (folder / "README.md").write_text("---\nconfigs:\n- config_name: winogrande_xl\n  data_dir: winogrande_xl\n- config_name: other\n---\n")
    before = datasets.load_dataset
    with local_datasets(str(tmp_path / "data")):
        assert datasets.load_dataset("allenai/winogrande", "winogrande_xl", revision="main")["test"][0]["sentence"] == "a _ b"
        with pytest.raises(ValueError, match="none_of_these"):
            datasets.load_dataset("allenai/winogrande", "none_of_these")
    assert datasets.load_dataset is before


# --- what is ours -----------------------------------------------------------------------------------------------


def test_logiqa_asks_as_the_harness_does(made):
    from lm_eval.tasks.logiqa.utils_logiqa import doc_to_text

    rows = [{"context": "All fall.", "query": "Who?", "options": ["A.All", "B. One", "None", "D"], "correct_option": c} for c in ("b", "3")]
    found = list(dsla_hf.evaluation.tasks.documents.logiqa(datasets.Dataset.from_list(rows)))
    assert [row["label"] for row in found] == ["b", "d"]
    assert doc_to_text(found[0]) == "Passage: All fall.\nQuestion: Who?\nChoices:\nA. All\nB. One\nC. None\nD. D\nAnswer:"


def test_cut_middle_keeps_both_ends(made):
    text = f"Begin here. {TEXT} End there."
    whole = len(made.tokenizer(text)["input_ids"])
    assert cut_middle(text, made.tokenizer, whole) == text
    for room in (whole - 1, 100, 41, 40, 3, 2, 1):
        cut = cut_middle(text, made.tokenizer, room)
        tokens = len(made.tokenizer(cut)["input_ids"])
        assert room - 3 <= tokens <= room
        begin = next((i for i, (a, b) in enumerate(zip(cut, text, strict=False)) if a != b), len(cut))
        end = cut[begin:]
        assert text.startswith(cut[:begin]) and text.endswith(end)
        if room >= 40:
            assert 0.4 < len(made.tokenizer(cut[:begin])["input_ids"]) / room < 0.65
    with pytest.raises(ValueError, match="room for 0 tokens"):
        cut_middle(text, made.tokenizer, 0)


def test_cut_middle_counts_what_the_tokenizer_adds(made):
    tokenizer = AutoTokenizer.from_pretrained(made.base)

    class WithBeginning:
        decode = tokenizer.decode

        def __call__(self, text, add_special_tokens, verbose):
            return {"input_ids": [1] * add_special_tokens + tokenizer(text, add_special_tokens=False)["input_ids"]}

    cut = cut_middle(TEXT, WithBeginning(), 50)
    assert 47 <= len(tokenizer(cut)["input_ids"]) <= 49


def test_context_is_that_of_the_harness(made, tmp_path):
    assert tokenizer_and_context(made.base, made.base, False)[1] == CONTEXT == DSLALM(made.base, device="cpu").max_length
    MambaConfig().save_pretrained(tmp_path)  # says nothing of a context
    made.tokenizer.model_max_length = 777
    made.tokenizer.save_pretrained(tmp_path)
    assert tokenizer_and_context(str(tmp_path), str(tmp_path), False)[1] == 777
    made.tokenizer.model_max_length = int(1e30)
    made.tokenizer.save_pretrained(tmp_path / "unlimited")
    assert tokenizer_and_context(str(tmp_path / "unlimited"), str(tmp_path), False)[1] == 2048


def test_truncation_needs_a_model_and_room(made):
    model = DSLALM(made.base, device="cpu")

    def ask(metadata):
        manager = lm_eval.tasks.TaskManager(include_path=[str(dsla_hf.evaluation.tasks.FOLDER)], metadata=metadata)
        with local_datasets(made.data):
            simple_evaluate(model=model, tasks=["dsla_xsum"], limit=1, task_manager=manager, bootstrap_iters=0)

    with pytest.raises(ValueError, match=r"knows no model.*--metadata pretrained=NAME"):
        ask({})
    with pytest.raises(ValueError, match="asks for 64 tokens, the model's context has 64"):
        ask({"pretrained": made.base, "max_length": 64})
    ask({"pretrained": made.base, "max_length": 200})


def metric(name, prediction, **document):
    """The score of a prediction by the task's own function."""
    manager = lm_eval.tasks.TaskManager(include_path=[str(dsla_hf.evaluation.tasks.FOLDER)])
    config = manager.task_index[f"longbench_{name}"]
    from lm_eval.tasks._yaml_loader import load_yaml

    return load_yaml(config.yaml_path)["process_results"](document, [prediction])["score"]


@pytest.mark.parametrize(
    "name, prediction, document, score",
    [
        ("hotpotqa", "The Eiffel Tower.", {"answers": ["eiffel tower", "Paris"]}, 1.0),
        ("hotpotqa", "the tower of London", {"answers": ["Eiffel Tower"]}, 2 * (1 / 3) * (1 / 2) / (1 / 3 + 1 / 2)),
        ("2wikimqa", "no", {"answers": ["yes"]}, 0.0),
        ("triviaqa", " Paris", {"answers": ["paris", "Paris, France"]}, 1.0),
        ("lcc", "\n    return x\n    y = 2", {"answers": ["    return x"]}, 1.0),
        ("lcc", "# a comment\n    return y", {"answers": ["    return x"]}, 0.92),
        ("repobench-p", "abcd", {"answers": ["wxyz"]}, 0.0),
        ("trec", "Location", {"answers": ["Location"], "all_classes": ["Location", "Date"]}, 1.0),
        ("trec", "Location or Date", {"answers": ["Location"], "all_classes": ["Location", "Date"]}, 0.5),
        ("trec", "Number", {"answers": ["Location"], "all_classes": ["Location", "Date"]}, 0.0),
        ("samsum", "Ann buys milk", {"answers": ["Ann buys milk"]}, 1.0),
        ("samsum", "Ann buys milk", {"answers": ["Bob sells bread"]}, 0.0),
    ],
)
def test_longbench_scores_known_answers(name, prediction, document, score):
    pytest.importorskip("fuzzywuzzy", reason="needs pip install 'lm-eval[longbench]'")
    assert metric(name, prediction, **document) == pytest.approx(score, abs=1e-6)


# --- what goes wrong --------------------------------------------------------------------------------------------


def refused(capsys, made, tmp_path, *more):
    arguments = ["eval", "--model", made.base, "--limit", "2", "--output", tmp_path / "results", *more]
    assert main(list(map(str, arguments))) == 1
    return re.findall("dsla eval: .*", capsys.readouterr().err)[-1]


def test_without_the_hub(made, tmp_path, capsys):
    said = refused(capsys, made, tmp_path, "--tasks", "piqa")
    assert "task piqa: its data set cannot be had" in said and "baber/piqa" in said and "--data DIR" in said


def test_data_that_does_not_fit(made, tmp_path, capsys):
    write(tmp_path / "data/baber/piqa", [{"goal": "a"}])
    assert "task piqa cannot be loaded" in (said := refused(capsys, made, tmp_path, "--tasks", "piqa", "--data", tmp_path / "data"))
    assert "columns and splits" in said
    assert "none is not a folder" in refused(capsys, made, tmp_path, "--tasks", "piqa", "--data", tmp_path / "none")


def test_package_that_is_missing(made, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jieba", None)
    for name in [name for name in sys.modules if "longbench.metrics" in name]:
        monkeypatch.delitem(sys.modules, name)
    said = refused(capsys, made, tmp_path, "--tasks", "dsla_longbench", "--data", made.data)
    assert "task dsla_longbench needs a package that is not installed" in said and "pip install jieba fuzzywuzzy rouge" in said


def test_data_is_part_of_the_settings_and_of_the_command(made, tmp_path, capsys):
    result = run(made, tmp_path, "piqa")
    assert f"--data {made.data}" in result["command"] and result["settings"]["data"]
    assert "made with other settings: data" in refused(capsys, made, tmp_path, "--tasks", "piqa")


def test_an_interrupted_level_keeps_its_answers(made, tmp_path, monkeypatch):
    asked, call = [], DSLALM._model_call

    def stop(self, ids, *args, **kwargs):
        asked.append(len(ids))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return call(self, ids, *args, **kwargs)

    monkeypatch.setattr(DSLALM, "_model_call", stop)
    with pytest.raises(KeyboardInterrupt):
        run(made, tmp_path, "piqa", batch_size=1)
    assert len(list((tmp_path / "results").glob(".level-00-*"))) == 1
    resumed = run(made, tmp_path, "piqa", batch_size=1)
    assert len(asked) == 3 + 2, "of four, two were answered"
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["level-00.json"]
    assert run(made, tmp_path / "again", "piqa", batch_size=1)["tasks"] == resumed["tasks"]
