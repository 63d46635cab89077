"""`dsla distill --unit head` and `dsla order --unit head`, end to end on a tiny model."""

import json
import re
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_cli import main
from dsla_hf import DSLAConfig
from dsla_hf.cli.distill import new_config
from dsla_hf.cli.distill_defaults import PLANTED
from dsla_hf.cli.distill_options import parse_options
from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.levels.table import measured_kept
from dsla_hf.models.loading import load_model
from dsla_hf.training.planting import ANSWER_WEIGHT, with_planted

TEXT = " ".join(f"{number} green bottles hang on the wall, and if one of them should fall" for number in range(300, 0, -1))
LAYERS, KV_HEADS = 4, 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer([TEXT], vocab_size=400)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": KV_HEADS, "head_dim": 8}
    sizes |= {"num_hidden_layers": LAYERS, "vocab_size": len(tokenizer), "initializer_range": 0.2, "max_position_embeddings": 512}
    LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "text.txt").write_text(TEXT)
    return folder


def distill(base, output, *more):
    options = ["--model", base, "--data", base / "text.txt", "--output_dir", output, "--length", 64, "--tokens", 1024, "--window_size", 8]
    options += ["--ranking_sequences", 2, "--eval_sequences", 2, "--per_device_train_batch_size", 2, "--use_cpu", "--dtype", "float32"]
    options += ["--states", "true", "--alignment_share", 0.5, "--ranking_probes", 3, "--probe_length", 400]
    return ["distill", *map(str, [*options, *more])]


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A finished run: its folder and what it printed."""
    output, said = tmp_path_factory.mktemp("heads") / "out", []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdout.write", lambda text: said.append(text) or len(text))
        assert main(distill(base, output, "--unit", "head", "--sequence_lengths", 32, 64, "--probes_in_training", 0.5)) == 0
    return output, "".join(said)


@pytest.mark.parametrize(("options", "unit"), [((), "head"), (("--method", "chain"), "layer"), (("--unit", "layer"), "layer")])
def test_a_new_adapter_counts_heads_but_in_a_chain(options, unit, base, tmp_path):
    options, _ = parse_options(distill(base, tmp_path, *options)[1:])
    assert new_config(options, tmp_path).conversion_unit == unit


def test_plan_and_result_speak_of_heads(finished):
    output, printed = finished
    assert "apart: 2 to rank the heads (and 3 probes of up to 400 tokens), 2 to measure the levels" in printed
    assert "in steps of 32 and 64 tokens in turn, 50 % of them with facts asked for later" in printed
    assert "% of all, in 8 KV heads of 4 of 4 layers" in printed
    order = DSLAConfig.from_pretrained(output).conversion_order
    last = ", ".join(f"{layer}.{head}" for layer, head in reversed(order))
    assert f"level 8; of 8 KV heads (layer.head) converted last: {last}; processes 1" in printed


def test_levels_of_the_table_are_those_that_keep_shares_of_the_heads(finished):
    output, printed = finished
    rows = json.loads((output / "levels.json").read_text())["rows"]
    assert [(row["level"], row["kept"]) for row in rows] == [(0, 8), (4, 4), (6, 2), (7, 1), (8, 0)]
    assert re.search(r"^level +KV heads kept +perplexity +untrained ", printed, re.M)
    config = DSLAConfig.from_pretrained(output)
    assert config.conversion_unit == "head" and config.level == 8 and config.level_metrics["7"]["kept"] == 1
    assert all(f"bytes_{length}" in row for row in rows for length in ("2k", "8k", "32k")) and "bytes_1k" not in rows[0]
    card = (output / "README.md").read_text()
    assert "| level | KV heads kept | perplexity |" in card and "| 7 | 1 (12.5%) | " in card
    assert card.count("at 8k tokens") == 1, "with what was measured, and not once more"
    ranking = json.loads((output / "ranking.json").read_text())
    assert ranking["metric"] == "shares" and ranking["tokens"] == 2 * 32 + 3 * 400, "sequences are cut to the shortest length of a step"
    assert ranking["order"] == [list(unit) for unit in config.conversion_order]


def test_shares_that_are_measured():
    assert measured_kept(90, 90) == [0, 45, 67, 81, 87, 90]
    assert measured_kept(1024, 900) == [0, 512, 768, 900]
    assert measured_kept(2, 2) == [0, 1, 2]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--unit", "head", "--method", "chain"], "this plan counts heads"),
        (["--unit", "head", "--ranking_metric", "greedy"], "heads are ranked by one of"),
        (["--unit", "layer", "--ranking_metric", "shares"], "layers are ranked by one of"),
        (["--unit", "head", "--probe_length", "600"], "longer than the context of"),
        (["--unit", "head", "--probe_length", "20"], "have no room"),
        (["--unit", "head", "--train_level", "kept:99"], "keeps more KV heads than the 8"),
        (["--sequence_lengths", "30", "64"], r"--sequence_lengths \[30\] do not divide --length 64"),
        (["--probes_in_training", "1.5"], "probes_in_training must be a share from 0 to 1"),
        (["--adapter", "ADAPTER", "--unit", "layer"], "counts heads: leave --unit layer out"),
    ],
)
def test_distill_refuses_before_it_writes(more, words, base, finished, tmp_path, capsys):
    more = [str(finished[0]) if word == "ADAPTER" else word for word in more]
    assert main(distill(base, tmp_path / "out", *more)) == 1
    assert re.search(words, capsys.readouterr().err) and not (tmp_path / "out").exists()


# --- dsla order -------------------------------------------------------------------------------------------------


def order(base, adapter, *more):
    options = ["--model", base, "--adapter", adapter, "--data", base / "text.txt", "--sequences", 2, "--length", 64, "--dtype", "float32"]
    return ["order", *map(str, [*options, "--probes", 3, "--probe-length", 400, *more])]


def test_order_of_heads_is_measured_anew(base, finished, tmp_path, capsys):
    adapter = shutil.copytree(finished[0], tmp_path / "adapter")
    before = DSLAConfig.from_pretrained(adapter)
    assert main(order(base, adapter, "--metric", "single")) == 0
    printed = capsys.readouterr().out
    config = DSLAConfig.from_pretrained(adapter)
    assert f"order stored in {adapter}; its level stays 8 heads" in printed and "kl of it alone" in printed
    assert sorted(config.conversion_order) == sorted(before.conversion_order) and config.order_scores != before.order_scores
    scores = [config.order_scores[f"{layer}.{head}"] for layer, head in config.conversion_order]
    assert scores == sorted(scores) and "read 8 times" in printed


def test_an_adapter_of_layers_counts_heads_from_then_on(base, tmp_path, capsys):
    assert main(distill(base, tmp_path / "layers", "--unit", "layer", "--eval_sequences", 0)) == 0
    weights = (tmp_path / "layers" / "adapter_model.safetensors").read_bytes()
    assert main(order(base, tmp_path / "layers", "--unit", "head", "--metric", "random", "--ranks", 2)) == 0
    config = DSLAConfig.from_pretrained(tmp_path / "layers")
    assert config.conversion_unit == "head" and config.level == 8 and config.level_metrics is None
    assert all({head for _, head in config.conversion_order[at : at + 2]} == {0, 1} for at in range(0, 8, 2)), "even over ranks"
    assert (tmp_path / "layers" / "adapter_model.safetensors").read_bytes() == weights
    capsys.readouterr()
    assert main(order(base, tmp_path / "layers", "--unit", "layer")) == 1
    assert "counts KV heads: leave --unit layer out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--metric", "kl"], "heads are ranked by one of"),
        (["--ranks", "3"], "ranks must divide the 2 KV heads"),
        (["--probe-length", "513"], "longer than the context of"),
    ],
)
def test_order_refuses_and_changes_nothing(more, words, base, finished, capsys):
    before = (finished[0] / "adapter_config.json").read_bytes()
    assert main(order(base, finished[0], *more)) == 1
    assert words in capsys.readouterr().err and (finished[0] / "adapter_config.json").read_bytes() == before


def test_short_sequences_rank_heads_on_text_alone(base, tmp_path, capsys):
    words = [word for word in distill(base, tmp_path / "out", "--tokens", 512) if word not in ("--probe_length", "400")]
    assert main(words) == 0
    assert "sequences of 64 tokens have no room for questions: heads are ranked on text alone" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "ranking.json").read_text())["probe_weight"] is None
    assert main([*words, "--probe_length", "64", "--output_dir", str(tmp_path / "other")]) == 1
    assert "have no room for" in capsys.readouterr().err


def on_own_texts(base, output):
    words = [*distill(base, output, "--tokens", 512, "--seed", 3), "--data", "self"]
    return [word for place, word in enumerate(words) if place not in (words.index("--data"), words.index("--data") + 1)]


def test_a_checkpoint_is_distilled_on_what_it_writes_itself(base, tmp_path, capsys):
    words = on_own_texts(base, tmp_path / "out")
    assert main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "self.jsonl").read_bytes().splitlines()]  # text has other ends of lines
    tokens = 256 + 4 * 64  # a stage's, and those kept apart
    assert sum(row.get("tokens_of_batch", 0) for row in rows) >= tokens and all(row["text"] for row in rows)
    assert DSLAConfig.from_pretrained(tmp_path / "out").level_metrics
    before = (tmp_path / "out" / "self.jsonl").read_bytes()
    assert main(words) == 0 and (tmp_path / "out" / "self.jsonl").read_bytes() == before


def test_a_checkpoint_that_writes_its_texts_is_loaded_once(base, tmp_path, monkeypatch, capsys):
    loaded = []
    monkeypatch.setattr("dsla_hf.cli.distill.load_model", lambda *args: loaded.append(args) or load_model(*args))
    words = on_own_texts(base, tmp_path / "out")
    assert main(words) == 0 and len(loaded) == 1
    # The weights begin as they do where another process wrote the texts.
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "out" / "self.jsonl", tmp_path / "other")
    assert main(on_own_texts(base, tmp_path / "other")) == 0 and len(loaded) == 2
    written = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "other")]
    assert written[0] == written[1]


def test_a_folder_of_something_else_gets_no_texts(base, finished, tmp_path, capsys):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(finished[0] / name, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"window_size": 24}))
    assert main(on_own_texts(base, tmp_path)) == 1
    assert "holds another adapter" in capsys.readouterr().err and not (tmp_path / "self.jsonl").exists()


def test_an_adapter_goes_on_with_what_the_checkpoint_writes(base, finished, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("dsla_hf.models.loading.load_model", lambda *args: loaded.append(args) or load_model(*args))
    words = on_own_texts(base, tmp_path / "out")
    assert main([*words, "--adapter", str(finished[0])]) == 0 and len(loaded) == 1
    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "out" / "self.jsonl", tmp_path / "other")
    assert main([*on_own_texts(base, tmp_path / "other"), "--adapter", str(finished[0])]) == 0
    written = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "other")]
    assert written[0] == written[1]


CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(("data", "planted"), [(["self"], True), (["self", "text.txt"], True), (["self", "chats.jsonl"], False)])
def test_facts_are_planted_in_chats_that_the_checkpoint_writes_itself(data, planted, base, tmp_path, monkeypatch):
    model = shutil.copytree(base, tmp_path / "chats")
    (model / "chat_template.jinja").write_text(CHAT)
    said = [{"role": "user", "content": TEXT[:200]}, {"role": "assistant", "content": TEXT[200:4000]}]
    (model / "chats.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    made = []
    monkeypatch.setattr("dsla_hf.cli.distill.with_planted", lambda *of: made.append((of, with_planted(*of))) or made[0][1])
    words = [*distill(model, tmp_path / "out", "--tokens", 4096, "--length", 256, "--eval_sequences", 0)]
    at = words.index("--data")
    words[at + 1 : at + 2] = [name if name == "self" else str(model / name) for name in data]
    assert main(words) == 0
    rows = [json.loads(line) for line in (tmp_path / "out" / "self.jsonl").read_bytes().splitlines()]
    assert rows and all([message["role"] for message in row["messages"]] == ["user", "assistant"] for row in rows)
    [((before, tokenizer, share, *_), after)] = made
    assert share == (PLANTED if planted else 0)
    changed = [place for place in range(len(before)) if not torch.equal(before[place]["input_ids"], after[place]["input_ids"])]
    assert bool(changed) == planted
    for place in changed:
        row = after[place]
        assert row["input_ids"].shape == row["loss_mask"].shape == (256,) and ANSWER_WEIGHT in row["loss_mask"].tolist()
        text = tokenizer.decode(row["input_ids"].tolist())
        assert any(asked in text for asked in ("gate one has to say:", "finds the", "are now sent to the town of"))


def test_sequences_that_the_window_holds_are_refused_before_texts_are_written(base, tmp_path, capsys):
    words = on_own_texts(base, tmp_path / "out")
    words[words.index("--window_size") + 1] = "64"
    assert main(words) == 1
    said = capsys.readouterr().err
    assert "in sequences of --length has 0 % of its tokens beyond the window" in said and "nothing of what lies further back" in said
    assert not (tmp_path / "out").exists()
