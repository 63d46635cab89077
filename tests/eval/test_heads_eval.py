"""Levels in heads on a checkpoint: training, measuring and the page at tiny sizes, what the controls are, and figures by hand."""

import importlib
import json
import lzma
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from server import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_hf import DSLAConfig

EVAL = Path(__file__).resolve().parents[2] / "eval"
LAYERS, KV_HEADS = 2, 2
WINDOW = 40  # of the control
EVERY = [[layer, head] for layer in range(LAYERS) for head in range(KV_HEADS)]


@pytest.fixture(scope="module")
def heads():
    before, known = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(EVAL))
    yield importlib.import_module("heads")
    sys.path[:] = before
    for name in set(sys.modules) - known:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == EVAL:
            del sys.modules[name]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, texts, and what the parts write."""
    folder = tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": LAYERS, "vocab_size": 97, "max_position_embeddings": 2048}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=KV_HEADS, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    data = folder / "data"
    (data / "wikitext2").mkdir(parents=True)

    def text(kind, lines):
        return " ".join(f"{kind} line {i} of some {i * i} words\n" for i in range(lines))

    with lzma.open(data / "distill.txt.xz", "wt") as file:
        file.write("\0".join(text(f"document {i}", 60) for i in range(12)))
    with lzma.open(data / "novels_val.jsonl.xz", "wt") as file:
        file.writelines(json.dumps({"text": text(f"novel {i}", 80)}) + "\n" for i in range(2))
    (data / "wikitext2" / "valid.txt").write_text(text("article", 80))
    return folder


def run(heads, folder, part, *options):
    heads.main(
        [part, str(folder / "model"), str(folder / "data"), "--cache", str(folder / "text.pt"), "--processes", "1", "--tiny", *options]
    )


def train(heads, folder, arm, *options):
    run(heads, folder, "train", "--arm", arm, "--out", str(folder / arm), "--align-steps", "1", "--steps", "2", "--batch", "1", *options)


@pytest.fixture(scope="module")
def trained(heads, folder):
    run(heads, folder, "text")
    train(heads, folder, "heads")
    (folder / "given.json").write_text(json.dumps([[1, 1], [0, 0], [1, 0], [0, 1]]))
    train(heads, folder, "layers-window", "--order", str(folder / "given.json"))
    return folder


def measure(heads, folder, arm, *options):
    files = ["--adapter", str(folder / arm), "--out", str(folder / f"{arm}.json")]
    run(heads, folder, "measure", "--arm", arm, *files, "--probes", "3", *options)
    return json.loads((folder / f"{arm}.json").read_text())


@pytest.fixture(scope="module")
def measured(heads, trained):
    return {arm: measure(heads, trained, arm, "--kept", kept) for arm, kept in (("heads", "3,0"), ("layers-window", "3,0"))}


def weights(folder, arm, name):
    from safetensors.torch import load_file

    return [x for key, x in load_file(folder / arm / "adapter_model.safetensors").items() if name in key]


def test_ranking_and_training_share_no_document(heads, trained):
    text = torch.load(trained / "text.pt")
    tokenizer = heads.load_tokenizer(str(trained / "model"))

    def documents(ids):
        return {part.split(" line")[0].strip() for part in tokenizer.decode(ids.flatten().tolist()).split("document")[1:]}

    ranked, learnt = documents(text["ranking"]), documents(text["train"])
    assert ranked and learnt and not ranked & learnt
    assert text["train"].shape[1] == max(heads.TINY.lengths) and text["wiki"].shape[1] == heads.TINY.wiki_length
    assert "novel" in tokenizer.decode(text["novels"][0].tolist()) and "article" in tokenizer.decode(text["wiki"][0].tolist())


def test_a_cache_of_other_sizes_is_refused(heads, trained):
    with pytest.raises(ValueError, match="name another --cache"):
        heads.main(["text", str(trained / "model"), str(trained / "data"), "--cache", str(trained / "text.pt"), "--processes", "1"])


def test_units_are_ranked_or_in_the_given_order(trained):
    assert sorted(json.loads((trained / "heads" / "order.json").read_text())) == EVERY
    assert json.loads((trained / "heads" / "ranking.json").read_text())["metric"] == "shares"
    # Head (0, 1) is converted last of all, so layer 0 is worth more than layer 1.
    assert json.loads((trained / "layers-window" / "order.json").read_text()) == [1, 0]
    assert not (trained / "layers-window" / "ranking.json").exists()


def test_a_control_has_a_window_of_equal_bytes(heads, trained):
    """In fp32 the states of heads of 8 channels take as much as 8 tokens."""
    control, arm = (json.loads((trained / name / "adapter_config.json").read_text()) for name in ("layers-window", "heads"))
    assert (control["states"], control["conversion_unit"]) == (False, "layer") and (arm["states"], arm["conversion_unit"]) == (True, "head")
    assert (control["window_size"], arm["window_size"]) == (heads.TINY_WINDOW + 8, heads.TINY_WINDOW)
    assert not weights(trained, "layers-window", "dsla_core.") and len(weights(trained, "heads", "state_bias")) == LAYERS


def test_frozen_parts_of_a_control_are_not_trained(heads, folder, monkeypatch):
    seen = {}

    def look(model, *args, **kwargs):
        seen["trained"] = {name.split(".dsla_")[1].split(".")[0] for name, x in model.named_parameters() if x.requires_grad}
        raise KeyboardInterrupt

    monkeypatch.setattr(heads, "distill", look)
    with pytest.raises(KeyboardInterrupt):
        train(heads, folder, "heads-window")
    assert seen["trained"] == {"q_proj", "o_proj"}


def test_a_finished_training_is_read_back(heads, trained):
    file = trained / "heads" / heads.TRAINING
    before = file.read_text(), weights(trained, "heads", "q_proj")
    train(heads, trained, "heads")
    assert file.read_text() == before[0]
    assert all(torch.equal(a, b) for a, b in zip(before[1], weights(trained, "heads", "q_proj"), strict=True))


def test_an_order_that_lacks_a_head_is_refused(heads, tmp_path):
    (tmp_path / "order.json").write_text(json.dumps(EVERY[1:]))
    with pytest.raises(ValueError, match="each of the 4 KV heads"):
        heads.read_order(tmp_path / "order.json", "head", LAYERS, KV_HEADS)


def test_levels_by_heads_kept(heads):
    assert heads.plan_of_levels([45, 22, 0], "head", 30, 3) == {45: 45, 22: 68, 0: 90}
    assert heads.plan_of_levels(heads.KEPT, "layer", 30, 3) == {45: 15, 21: 23, 9: 27, 6: 28, 3: 29, 0: 30}
    with pytest.raises(ValueError, match="below 90"):
        heads.plan_of_levels([90], "head", 30, 3)


def test_rows_are_the_teacher_and_the_levels(measured):
    assert [(row["kept"], row["level"]) for row in measured["heads"]["rows"]] == [(4, 0), (3, 1), (0, 4)]
    assert [(row["kept"], row["level"]) for row in measured["layers-window"]["rows"]] == [(4, 0), (2, 1), (0, 2)]
    teachers = [part["rows"][0] for part in measured.values()]
    for name in ("wiki", "novels", "code_300_found", "associative_recall", "variable_tracking"):
        assert teachers[0][name] == teachers[1][name]
    assert measured["heads"]["rows"][2]["wiki"] != teachers[0]["wiki"]
    assert len(teachers[0]["code_400_found"]) == 3


def test_perplexities_are_means_of_token_losses(heads, trained, measured):
    model = LlamaForCausalLM.from_pretrained(trained / "model").eval()
    text = torch.load(trained / "text.pt")
    with torch.no_grad():
        logits = model(text["novels"]).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text["novels"][:, 1:].flatten(), reduction="none").view(2, -1)
    half = heads.TINY.novels_length // 2
    assert measured["heads"]["rows"][0]["novels"] == pytest.approx(losses[:, half - 1 :].mean().exp().item(), rel=1e-5)


def test_bytes_of_a_control_are_those_of_its_window(measured):
    teacher, part, whole = measured["layers-window"]["rows"]
    a_token = 2 * 8 * 4  # k and v of a head, fp32
    assert teacher["bytes_2k"] == 4 * a_token * 2048
    # A layer counts its tokens in 8 bytes.
    assert whole["bytes_2k"] == whole["bytes_32k"] == 4 * a_token * (WINDOW + 4) + 2 * 8
    assert part["bytes_8k"] == 2 * a_token * (8192 + WINDOW + 4) + 8
    states = 2 * 8 * 8 * 4
    assert measured["heads"]["rows"][2]["bytes_8k"] == 4 * (a_token * (WINDOW - 8 + 4) + states + 8)


def test_measured_levels_stay_and_others_come_beside(heads, trained, measured, monkeypatch):
    made = []
    monkeypatch.setattr(heads, "measured", lambda *args: made.append(1) or dict(measured["heads"]["rows"][0]))
    (trained / "again.json").write_text(json.dumps(measured["heads"]))
    files = ["--adapter", str(trained / "heads"), "--out", str(trained / "again.json")]
    run(heads, trained, "measure", "--arm", "heads", *files, "--probes", "3", "--kept", "3,2,0")
    rows = json.loads((trained / "again.json").read_text())["rows"]
    assert made == [1] and rows[:3] == measured["heads"]["rows"] and len(rows) == 4
    with pytest.raises(ValueError, match="another probes"):
        run(heads, trained, "measure", "--arm", "heads", *files, "--probes", "4")
    with pytest.raises(ValueError, match="give --arm heads"):
        run(heads, trained, "measure", "--arm", "layers", *files)


def test_the_page_has_the_figures(heads, trained, measured, tmp_path):
    pytest.importorskip("matplotlib")
    files = [str(trained / f"{arm}.json") for arm in measured]
    for folder in ("measured", "images"):
        (tmp_path / folder).mkdir()
    where = ["--results", str(tmp_path), "--docs", str(tmp_path)]
    heads.main(["page", *files, *where])
    joined = json.loads((tmp_path / "heads.json").read_text())
    assert [row["arm"] for row in joined["rows"]] == ["teacher", "heads", "heads", "layers-window", "layers-window"]
    assert {"command", "versions", "device"} <= joined.keys()
    teacher, first = joined["rows"][:2]
    assert first["wiki_ratio"] == pytest.approx(first["wiki"] / teacher["wiki"])
    text = (tmp_path / "measured" / "heads.md").read_text()
    assert "measured on model" in text
    assert (
        f"| heads | 3 | {first['wiki_ratio']:.3f} |" in text and "(../images/heads-quality.png)" in text and "not trained alike" not in text
    )
    assert f"{first['bytes_8k'] / 1e6:.2f}" in text
    assert str(tmp_path) not in text + json.dumps(joined)
    assert (tmp_path / "images" / "heads-quality.png").read_bytes().startswith(b"\x89PNG")
    heads.main(["page", *files, *where, "--name", "other"])
    assert (tmp_path / "measured" / "other.md").exists() and (tmp_path / "other.json").exists()


def test_ways_of_training_stand_beside_one_another(heads, measured, tmp_path):
    other = json.loads(json.dumps(measured["heads"]))
    other["training"]["answer_weight"] = 3
    files = []
    for name, part in (("one", measured["heads"]), ("two", other)):
        files.append(str(tmp_path / f"{name}.json"))
        Path(files[-1]).write_text(json.dumps(part))
    heads.main(["recipes", *files, "--results", str(tmp_path)])
    rows = json.loads((tmp_path / "heads-recipes.json").read_text())["rows"]
    assert [(row["arm"], row["kept"], row["answer_weight"]) for row in rows[:2]] == [("teacher", 4, None), ("heads", 3, 3)]
    assert rows[1]["wiki"] == measured["heads"]["rows"][1]["wiki"] and "code_300_found" not in rows[1]
    text = heads.recipes_text(tmp_path)
    assert "| arm | kept | answer_weight | wiki |" in text and "| heads | 3 | 3 | " in text and "level_draws 1, " in text
    assert str(tmp_path) not in (tmp_path / "heads-recipes.json").read_text()
    assert heads.recipes_text(tmp_path / "nothing") == ""


def test_lengths_fit_the_context_of_the_model(heads):
    sizes = heads.Sizes().shorter(0.5)
    assert sizes.lengths == (1024, 4096) and sizes.code_lengths == (512, 1024, 2048, 3750) and sizes.longest_probe == 3750
    assert sizes.ranking == heads.Sizes().ranking and heads.Sizes().shorter(1.0) == heads.Sizes()


def test_codes_are_compared_prompt_by_prompt(heads, measured, tmp_path):
    part = json.loads(json.dumps(measured["heads"]))
    part["rows"][0]["code_300_found"], part["rows"][1]["code_300_found"] = "110", "011"
    (tmp_path / "a.json").write_text(json.dumps(part))
    row = heads.join([tmp_path / "a.json"])["rows"][1]
    assert (row["code_300_lost"], row["code_300_gained"]) == (1, 1)


def test_files_that_do_not_compare_are_refused(heads, measured, tmp_path):
    def written(name, **changes):
        (tmp_path / name).write_text(json.dumps(measured[changes.pop("of", "heads")] | changes))
        return tmp_path / name

    one = written("one.json")
    with pytest.raises(ValueError, match="each arm needs one file"):
        heads.join([one, one])
    with pytest.raises(ValueError, match="differ in probes"):
        heads.join([one, written("two.json", of="layers-window", probes=9)])
    with pytest.raises(ValueError, match="no file has the teacher"):
        heads.join([written("three.json", rows=measured["heads"]["rows"][1:])])


def test_arms_that_were_trained_otherwise_are_said(heads, measured):
    training = {arm: part["training"] for arm, part in measured.items()}
    assert "heads, layers-window: 1 steps" in heads.how_trained(training)
    training["heads"] = training["heads"] | {"steps": 9}
    assert "not trained alike" in heads.how_trained(training)


def test_interval_of_a_share(heads):
    # Values of Wilson's interval as tables have them.
    assert heads.wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert heads.wilson(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert heads.wilson(500, 500)[1] == pytest.approx(1.0)


def test_orders_are_measured_on_an_aligned_adapter(heads, trained, tmp_path, capsys):
    orders = importlib.import_module("head_orders")
    words = [
        str(trained / "model"),
        str(trained / "data"),
        "--cache",
        str(trained / "text.pt"),
        "--processes",
        "1",
        "--tiny",
        "--probes",
        "2",
    ]
    words += ["--adapter", str(trained / "heads" / "alignment"), "--results", str(tmp_path), "--kept", "3,1"]
    orders.main([*words, "--orders", "shares@1,random"])
    rows = json.loads((tmp_path / "head-orders.json").read_text())["rows"]
    assert [(row["order"], row["kept"]) for row in rows] == [("shares@1", 3), ("shares@1", 1), ("random", 3), ("random", 1)]
    assert all(len(row["heads"]) == row["kept"] and row["wiki"] > 1 for row in rows)
    assert rows[1]["heads"][0] == rows[0]["heads"][-1] and rows[0]["passes"] > 0 == rows[2]["passes"]
    assert "| shares@1 | 3 |" in capsys.readouterr().out
    orders.main([*words, "--orders", "shares@1,entropy", "--kept", "3"])
    again = json.loads((tmp_path / "head-orders.json").read_text())["rows"]
    assert again[:4] == rows and [row["order"] for row in again[4:]] == ["entropy"]
    with pytest.raises(ValueError, match="was measured with another probes"):
        orders.main([*words, "--probes", "3"])
    with pytest.raises(ValueError, match=r"--orders must be some of .* got 'shares'"):
        orders.main([*words, "--orders", "shares"])
    with pytest.raises(ValueError, match=r"--kept must be numbers of KV heads from 0 to below 4, got \[9\]"):
        orders.main([*words, "--kept", "9"])


def test_one_state_is_read_beside_a_window_longer_by_the_other(heads, folder):
    base = LlamaForCausalLM.from_pretrained(folder / "model")
    one, both, none = (heads.window_of(heads.ARMS[arm], 32, base.config, 4) for arm in ("heads-one", "heads", "heads-window"))
    assert (one - both, none - both) == (4, 8)
    model = get_peft_model(base, DSLAConfig(conversion_unit="head", window_size=one, task_type="CAUSAL_LM"))
    heads.read_one_state(model)
    mixes = {name: x for name, x in model.named_parameters() if "mix_logits" in name}
    assert len(mixes) == LAYERS and not any(x.requires_grad for x in mixes.values())
    assert all(torch.equal(x.softmax(-1)[:, 0], torch.ones(len(x))) for x in mixes.values())
    assert any(x.requires_grad for name, x in model.named_parameters() if "gate_up" in name)
