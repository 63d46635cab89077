"""eval/state_forms.py on a small model: forms begin where they should, learn, and see what they may."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

from scripts import loaded_script
from transformers import LlamaConfig, LlamaForCausalLM

from dsla_hf.cli.quickstart import train_tokenizer

TEXT = " ".join(f"{number} boats lie in the harbour of {number % 17} towns" for number in range(400))


@pytest.fixture(scope="module")
def script():
    with loaded_script("state_forms.py") as module:
        yield module


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=300, initializer_range=0.3)).eval()


@pytest.fixture(scope="module")
def layer(script, model):
    rows = torch.randint(300, (6, 48), generator=torch.Generator().manual_seed(0))
    return script.record(model, rows, [1])[1]


ROWS = torch.arange(2)


def test_a_window_that_holds_all_is_the_original(script, layer):
    student = script.Student(script.Form(48), layer)
    torch.testing.assert_close(student(ROWS), layer.output[ROWS], atol=1e-5, rtol=1e-4)


def test_every_form_is_causal_and_reads_beyond_the_window(script, layer):
    for name, form in script.FORMS.items():
        form = script.Form(**{**form.__dict__, "window": 8 if form.window else 0})
        student = script.Student(form, layer)
        with torch.no_grad():
            if form.layer and form.window:
                student.core.state_bias.fill_(2.0)
            before = student(ROWS)
            changed = script.Layer(**layer.__dict__)
            changed.v = layer.v.clone()
            changed.v[:, 20] += 1.0
            student.layer = changed
            moved = (student(ROWS) - before).abs().amax((0, 2))
        assert moved[:20].max() < 1e-5, name
        beyond = bool((moved[36:] > 1e-4).any())
        assert beyond == bool(form.features or form.layer), name


def test_training_brings_a_form_nearer(script, layer):
    before, after = script.align(script.Form(8, "relu", decays=1, gate=True), layer, 60, 2, 3e-3, 10.0, 0)
    assert after < 0.8 * before


def test_command_writes_a_row_for_each_form_and_layer(script, model, tmp_path, capsys):
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    words = [str(tmp_path / "model"), str(tmp_path / "text.txt"), "--tokens", "40", "--rows", "6", "--steps", "2"]
    words += ["--forms", "window 512", "relu, gate", "--results", str(tmp_path)]
    script.main(words)
    rows = json.loads((tmp_path / "state-forms.json").read_text())["rows"]
    assert [(row["form"], row["layer"]) for row in rows] == [(form, layer) for form in ("window 512", "relu, gate") for layer in (0, 1)]
    assert rows[0]["error_before"] < 1e-6, "the window holds the rows"
    assert "| relu, gate | 480 |" in capsys.readouterr().out
    script.main([*words, "--forms", "relu, gate", "mean"])  # goes on: what is measured is not measured again
    more = json.loads((tmp_path / "state-forms.json").read_text())["rows"]
    assert more[:4] == rows and [row["form"] for row in more[4:]] == ["mean", "mean"]
    script.main(["page", "--results", str(tmp_path), "--docs", str(tmp_path / "docs")])
    text = (tmp_path / "docs/measured/state-forms.md").read_text()
    assert f"| mean | 510 | {more[4]['error']:.4f} | {more[5]['error']:.4f} |" in text
    assert (tmp_path / "docs/images/state-forms.png").exists()
    with pytest.raises(ValueError, match="another steps: name another folder"):
        script.main([*words, "--steps", "3"])
    with pytest.raises(ValueError, match="rows of 4000 need 24,000: give more text"):
        script.main([*words, "--tokens", "4000"])
