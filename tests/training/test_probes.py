"""Probes: exact lengths, answers that the text holds, nothing of the evaluation's."""

import random

import pytest
from server import byte_tokenizer

from dsla_hf.evaluation import long_context
from dsla_hf.training import probes
from dsla_hf.training.probes import FAMILIES, make_probes

TEXT = [5 + number % 60 for number in range(3000)]


@pytest.fixture
def tokenizer():
    return byte_tokenizer(300)


def test_probes_have_the_lengths_and_the_answer_at_the_end(tokenizer):
    made = make_probes(tokenizer, TEXT, longest=2000, count=7, shortest=500)
    lengths = [probe["input_ids"].shape[1] for probe in made]
    assert lengths[0] == 500 and lengths[-1] == 2000 and lengths == sorted(lengths)
    for number, probe in enumerate(made):
        ids, mask = probe["input_ids"][0], probe["answer_mask"][0]
        answer, before = tokenizer.decode(ids[mask]), tokenizer.decode(ids[~mask])
        assert mask[-1] and mask.sum() < 40 and mask.diff().sum() == 1
        family = list(FAMILIES)[number % 3]
        assert answer in before, (family, answer)
    again = make_probes(tokenizer, TEXT, longest=2000, count=7, shortest=500)
    assert all(one["input_ids"].equal(other["input_ids"]) for one, other in zip(made, again, strict=True))
    assert not make_probes(tokenizer, TEXT, longest=2000, count=7, shortest=500, seed=1)[0]["input_ids"].equal(made[0]["input_ids"])


def test_nothing_is_shared_with_the_evaluation():
    def words(*sentences):
        return {word.strip(".,:?{}").lower() for sentence in sentences for word in sentence.split() if len(word) > 4}

    asked = words(long_context.FACT, long_context.QUESTION, long_context.ASSIGNMENT, long_context.ASKED, long_context.OTHER_FACT)
    for family in FAMILIES.values():
        facts, question, _ = family(random.Random(0))
        assert not words(*facts, question) & asked
    assert not {*long_context.FIRST, *long_context.SECOND} & {*probes.NAMES, *probes.TOWNS, *probes.WORDS}


def test_bad_input_is_named(tokenizer):
    with pytest.raises(ValueError, match=r"unknown families of probes \['codes'\]"):
        make_probes(tokenizer, TEXT, 500, 3, families=["codes"])
    with pytest.raises(ValueError, match="fewer than the longest probe, 4,000"):
        make_probes(tokenizer, TEXT, 4000, 3)
    with pytest.raises(ValueError, match="have no room"):
        make_probes(tokenizer, TEXT, 20, 3)
