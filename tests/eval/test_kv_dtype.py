"""eval/kv_dtype.py: what it measures is what the model gives by hand, and rows of other runs stay."""

import json
import math

import pytest
import torch
from peft import get_peft_model
from scripts import loaded_with
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_hf import DSLAConfig
from dsla_hf.cli.quickstart import train_tokenizer


@pytest.fixture(scope="module")
def script():
    with loaded_with("kv_dtype.py", ("reporting",)) as module:
        yield module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with an adapter, and a text."""
    folder = tmp_path_factory.mktemp("kv")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 260, "max_position_embeddings": 512}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=0, initializer_range=0.3)
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "model")
    train_tokenizer(["aa"], vocab_size=260).save_pretrained(folder / "model")
    plan = DSLAConfig(conversion_unit="head", window_size=16, conversion_order=[[0, 1], [1, 0]], task_type="CAUSAL_LM")
    get_peft_model(base, plan).save_pretrained(folder / "adapter")
    (folder / "text.txt").write_text(" ".join(f"Number {i} has {i * i} as its square." for i in range(100)))
    return folder


def run(script, folder, *options):
    sizes = ["--length", "64", "--blocks", "2", "--numbers", "2", "--number-lengths", "300", "--chunk", "32"]
    script.main([str(folder / "model"), str(folder / "text.txt"), *sizes, "--results", str(folder), *options])
    return json.loads((folder / "kv-dtype.json").read_text())["rows"]


def test_perplexity_is_the_model_s_and_rows_of_other_levels_stay(script, folder):
    rows = run(script, folder)
    assert [(row["what"], row["kv_cache_dtype"]) for row in rows] == [
        (w, kept) for kept in ("auto", "fp8") for w in ("text.txt", "numbers")
    ]
    plain, narrow = rows[0], rows[2]
    model = LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = script.load_tokenizer(str(folder / "model"))
    blocks = torch.tensor(tokenizer((folder / "text.txt").read_text())["input_ids"][:128]).view(2, 64)
    with torch.no_grad():
        loss = float(model(blocks, labels=blocks).loss)
    assert plain["tokens"] == 2 * 63 and plain["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert narrow["perplexity"] != plain["perplexity"] and narrow["perplexity"] == pytest.approx(plain["perplexity"], rel=0.1)
    assert plain["bytes_per_token"] == 4 * narrow["bytes_per_token"] == 4 * 2 * 2 * 2 * 8
    assert narrow["largest_key"] == pytest.approx(plain["largest_key"], rel=1 / 16) and 0 < plain["largest_value"] < 448
    assert [row["asked"] for row in rows[1::2]] == [2, 2]
    more = run(script, folder, "--adapter", str(folder / "adapter"), "--levels", "kept:75%")
    assert more[:4] == rows and [(row["level"], row["adapter"]) for row in more[4:]] == [(1, "adapter")] * 4
    assert len(run(script, folder)) == 8, "what is measured again takes the place of what was there"

    said = script.table(more).splitlines()
    assert (
        len(said) == 2 + 4 and "| perplexity of text.txt, 126 tokens | 64 |" in said[2] and "| 1 | numbers found, of 2 | 300 |" in said[5]
    )


def test_the_page_is_what_would_be_written(script):
    assert script.table(script.stored(script.RESULTS)) in script.PAGE.read_text()


@pytest.mark.parametrize(
    "wrong, words",
    [
        (["m", "x.txt", "--levels", "kept:50%"], "--levels kept:50% are of an adapter: give --adapter, or leave them out"),
        (["m"], "a checkpoint and texts, or --page alone"),
        (["m", "x.txt", "--page"], "a checkpoint and texts, or --page alone"),
    ],
)
def test_wrong_options(script, wrong, words, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(wrong)
    assert words in capsys.readouterr().err
