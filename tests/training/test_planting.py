"""Facts in training rows: asked for later, of the same length, a pure function of seed and place."""

import math
import random
from statistics import mean

import pytest
import torch

from dsla_hf.cli.quickstart import train_tokenizer
from dsla_hf.training.planting import NEAREST, TOKENS_PER_FACT, planted, with_planted

TEXT = "Some quiet text that says nothing of any of it, over and over. " * 40


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT], vocab_size=258)  # a token is a byte


@pytest.fixture(scope="module")
def rows(tokenizer):
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"][:2000]
    return [{"input_ids": torch.tensor(ids)} for _ in range(24)]


def pairs(text):
    """Of the family `words` where each passphrase is told, and where it is asked for."""
    for part in text.split("has to say: ")[1:]:
        phrase = part[: part.index(".")]
        told, asked = text.find(f"has to say: {phrase}"), text.find(f"one has to say: {phrase}")
        if told >= 0 and asked >= 0:
            yield told, asked


def test_facts_come_before_their_questions_and_the_rest_is_the_text(tokenizer, rows):
    row = planted(rows[0], tokenizer, random.Random(0))
    text = tokenizer.decode(row["input_ids"].tolist())
    assert row["input_ids"].shape == (2000,) and row["input_ids"].dtype == torch.int64
    left = "".join(line for line in text.split("\n") if not any(word in line for word in ("gate", "ocker", "spring", "holiday", "Letters")))
    assert left == TEXT[: len(left)] and 1000 <= len(left) < 2000, "text loses its end alone"
    assert text.count("gate one has to say:") + text.count("Someone opens") + text.count("are now sent") <= 2000 // TOKENS_PER_FACT


def test_distances_are_even_by_their_logarithm(tokenizer, rows):
    found = []
    for number in range(120):
        text = tokenizer.decode(planted(rows[0], tokenizer, random.Random(number))["input_ids"].tolist())
        found += [asked - told for told, asked in pairs(text)]
    assert len(found) > 40 and min(found) >= 0.9 * NEAREST and max(found) > 1000
    middle = math.exp(mean(map(math.log, found)))
    assert 150 < middle < 450, middle


def test_planted_tokens_count_for_the_loss(tokenizer, rows):
    row = planted({**rows[0], "loss_mask": torch.zeros(2000, dtype=torch.long)}, tokenizer, random.Random(1))
    learnt = tokenizer.decode(row["input_ids"][row["loss_mask"] == 1].tolist())
    assert "quiet" not in learnt and learnt.count(".\n") >= 4 and row["loss_mask"].shape == (2000,)


def test_share_and_content_depend_on_seed_and_place_alone(tokenizer, rows):
    data = with_planted(rows, tokenizer, 0.5, seed=3)
    changed = [not torch.equal(data[place]["input_ids"], row["input_ids"]) for place, row in enumerate(rows)]
    assert len(data) == 24 and 6 <= sum(changed) <= 18
    again = with_planted(rows, tokenizer, 0.5, seed=3)
    assert all(torch.equal(again[place]["input_ids"], data[place]["input_ids"]) for place in reversed(range(24)))
    other = with_planted(rows, tokenizer, 0.5, seed=4)
    assert changed != [not torch.equal(other[place]["input_ids"], row["input_ids"]) for place, row in enumerate(rows)]
    every = with_planted(rows, tokenizer, 1.0, seed=3)
    assert all(not torch.equal(every[place]["input_ids"], row["input_ids"]) for place, row in enumerate(rows))
    assert with_planted(rows, tokenizer, 0.0, seed=3) is rows


def test_rows_that_stream_are_planted_alike(tokenizer, rows):
    datasets = pytest.importorskip("datasets")
    kept = datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in rows[:4]]).with_format("torch")
    stream = with_planted(kept.to_iterable_dataset(), tokenizer, 0.7, seed=5)
    whole = with_planted(kept, tokenizer, 0.7, seed=5)
    assert all(torch.equal(one["input_ids"], whole[place]["input_ids"]) for place, one in enumerate(stream))


def test_rows_too_short_for_a_fact_stay(tokenizer, rows):
    short = {"input_ids": rows[0]["input_ids"][:60]}
    assert torch.equal(planted(short, tokenizer, random.Random(0))["input_ids"], short["input_ids"])


def test_no_share_is_refused(tokenizer, rows):
    with pytest.raises(ValueError, match=r"from 0 to 1, got 1.5"):
        with_planted(rows, tokenizer, 1.5, seed=0)


def test_answers_weigh_what_is_asked_for(tokenizer, rows):
    """At the places that predict them, a byte before; all else counts once, in rows without facts too."""
    row = planted(rows[0], tokenizer, random.Random(1), 7.0)
    plain = planted(rows[0], tokenizer, random.Random(1))
    assert torch.equal(row["input_ids"], plain["input_ids"]) and "loss_mask" not in plain
    assert row["loss_mask"].dtype == torch.float32 and set(row["loss_mask"].tolist()) == {1.0, 7.0}
    places = (row["loss_mask"] == 7).nonzero().flatten() + 1
    text, answers = tokenizer.decode(row["input_ids"].tolist()), tokenizer.decode(row["input_ids"][places].tolist())
    asked = text.count("one has to say:") + text.count("finds the") + text.count("the town of")
    assert asked >= 4 and len(answers.split()) >= asked and all(f" {word}" in text for word in answers.split())
    assert "." not in answers and ":" not in answers
    some = with_planted([{**rows[0], "loss_mask": torch.zeros(2000, dtype=torch.long)}] * 12, tokenizer, 0.5, 0, 3.0)
    masks = [item["loss_mask"] for item in some]
    assert all(mask.dtype == torch.float32 and mask.shape == (2000,) for mask in masks)
    assert {float(mask.max()) for mask in masks} == {0.0, 3.0}, "some rows are left as they were"


@pytest.mark.parametrize("weight", [0, -1.0, math.inf, math.nan])
def test_a_weight_that_is_none_is_refused(tokenizer, rows, weight):
    with pytest.raises(ValueError, match="answer_weight must be above 0"):
        with_planted(rows, tokenizer, 0.5, 0, weight)
