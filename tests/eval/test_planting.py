"""Facts planted in training text, as eval/distillation.py and eval/layer_arms.py have them."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from dsla_hf.cli.quickstart import train_tokenizer

EVAL = Path(__file__).resolve().parents[2] / "eval"


@pytest.fixture
def planting(monkeypatch):
    monkeypatch.syspath_prepend(EVAL)
    yield importlib.import_module("planting")
    sys.modules.pop("planting", None)


@pytest.fixture(scope="module")
def tokenizer():
    texts = [" ".join(f"word {i * j}" for j in range(90)) for i in range(1, 40)]
    return train_tokenizer([*texts, "The special number for is Remember it. What"], vocab_size=320)


def test_a_planted_fact_is_asked_for_at_the_end(planting, tokenizer):
    blocks = torch.tensor(tokenizer("a word " * 2000)["input_ids"][:4800]).view(8, 600)
    planted = planting.plant_recall(blocks, tokenizer, 0.5, seed=0)
    changed = (planted != blocks).any(1)
    assert planted.shape == blocks.shape and changed.sum() == 4
    for row in planted[changed]:
        text = tokenizer.decode(row)
        number = text.partition("special number for ")[2].partition(" is ")[2][:5]
        assert number.isdigit() and text.count(number) == 2, text
        assert text.rindex("special number") > text.index("Remember it"), text
    assert torch.equal(planted, planting.plant_recall(blocks, tokenizer, 0.5, seed=0))
    assert not torch.equal(planted, planting.plant_recall(blocks, tokenizer, 0.5, seed=1))


def test_several_facts_are_each_asked_for_after_them(planting, tokenizer):
    blocks = torch.tensor(tokenizer("a word " * 4000)["input_ids"][:8000]).view(4, 2000)
    planted = planting.plant_facts(blocks, tokenizer, 1.0, seed=0, facts=3)
    for row in planted:
        text = tokenizer.decode(row)
        assert text.count("Remember it") == text.count("What is the special number") == 3
        for part in text.split("Remember it")[:-1]:
            number = part.rpartition(" is ")[2].rstrip(". ")
            assert len(number) == 5 and text.count(number) == 2


def test_needles_have_the_length_asked_for_and_depths_over_the_text(planting, tokenizer):
    haystack = tokenizer("a word " * 3000)["input_ids"]
    needles = planting.make_needles(tokenizer, haystack, 500, 10, seed=0)
    assert {len(needle.input_ids) for needle in needles} == {500}
    assert all(i / 10 <= needle.depth < (i + 1) / 10 for i, needle in enumerate(needles))
