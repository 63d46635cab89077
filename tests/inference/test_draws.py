"""From logits to tokens: the same tokens for the same seeds, whatever company a row is in, by the probabilities asked for."""

import math

import pytest
import torch
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dsla_hf.inference.draws import COLDEST, Row, Sampler, draw, exactly, following
from dsla_hf.inference.noise import gumbel, key_of, token_ids
from dsla_hf.inference.sampling import Sampling

HOW = [
    Sampling(1.0),
    Sampling(0.7, top_k=5),
    Sampling(1.0, top_p=0.9),
    Sampling(1.3, top_p=0.5, min_p=0.05),
    Sampling(1.0, top_k=40, top_p=0.3),
    Sampling(2.0, min_p=0.2),
    Sampling(1.0, top_p=1e-300),
    Sampling(1e-300),
    Sampling(0.9, top_k=10**12),
    Sampling(1.0, top_k=1),
]


def kept(logits, how):
    """What is in question, in plain fp64: bool `[V]`."""
    logits = logits.double() / max(how.temperature, COLDEST)
    stays = torch.ones_like(logits, dtype=torch.bool)
    if 0 < how.top_k < len(logits):
        stays = logits >= logits.topk(how.top_k)[0][-1]
    p = logits.masked_fill(~stays, -math.inf).softmax(-1)
    if how.top_p < 1:
        ordered = p.sort(descending=True)[0]
        stays &= p >= ordered[(ordered.cumsum(0) - ordered < how.top_p).nonzero()[-1, 0]]
    return stays & (p >= how.min_p * p.max())


def by_formula(logits, row):
    noise = gumbel(torch.tensor([key_of(row.seed, row.position)], dtype=torch.int32), token_ids(len(logits), logits.device))[0]
    scores = logits.double() / max(row.sampling.temperature, COLDEST) + noise
    return int(scores.masked_fill(~kept(logits, row.sampling), -math.inf).argmax())


@pytest.mark.parametrize("vocabulary", [300, 3000])
def test_draws_are_those_of_the_formula_in_any_company(vocabulary):
    logits = 3 * torch.randn(40, vocabulary)
    rows = [Row(HOW[i % len(HOW)], seed=i // len(HOW) - 2, position=i) for i in range(40)]
    found = exactly(logits, rows).tolist()
    assert found == [by_formula(*one) for one in zip(logits, rows, strict=True)]
    for some in ([7], [2, 3], [39, 0, 12], list(range(0, 40, 2))):
        assert exactly(logits[some], [rows[i] for i in some]).tolist() == [found[i] for i in some]


@pytest.mark.parametrize("how", HOW[:6])
def test_tokens_come_as_often_as_they_should(how):
    logits = torch.randn(12) * 2
    count = 4000
    tokens = exactly(logits.expand(count, -1).contiguous(), [Row(how, seed=1, position=i) for i in range(count)])
    expected = (logits.double() / how.temperature).masked_fill(~kept(logits, how), -math.inf).softmax(-1)
    found = tokens.bincount(minlength=12) / count
    assert not found[expected == 0].any()
    assert ((found - expected).abs() <= 5 * (expected * (1 - expected) / count).sqrt() + 1e-9).all()


def test_too_few_candidates_are_noticed_and_equal_tokens_stay_together():
    rows = [Row(Sampling(1.0, top_p=0.95), 3, 0), Row(Sampling(1.0, top_k=3), 3, 0), Row(Sampling(1.0, top_p=0.5), 3, 1)]
    flat, steep = torch.zeros(3000), -torch.arange(3000.0)
    logits = torch.stack([flat, steep, steep])
    _, sure = draw(logits, rows, candidates=4)
    assert sure.tolist() == [False, True, True]
    _, sure = draw(torch.stack([flat, flat, steep]), rows)
    assert sure.tolist() == [False, False, True]
    # Of equal logits all are in question, whatever top_k and top_p say.
    found = exactly(flat.expand(300, -1).contiguous(), [Row(Sampling(1.0, top_k=3, top_p=0.1), 3, i) for i in range(300)])
    assert len(set(found.tolist())) > 200


def test_tokens_that_are_ruled_out_never_come():
    logits = torch.full((len(HOW), 5000), -math.inf)
    logits[:, 17] = -5.0
    rows = [Row(how, 1, i) for i, how in enumerate(HOW)]
    tokens, sure = draw(logits, rows)
    assert tokens.tolist() == [17] * len(HOW) and sure.all()


def test_processors_come_first_and_warpers_at_the_end_are_drawn_by():
    logits, ids = torch.randn(3, 40), torch.zeros(3, 2, dtype=torch.long)
    seen = []

    def turned(ids, scores):
        seen.append(ids)
        return -scores

    assert torch.equal(Sampler(turned)(logits, ids), logits.argmin(-1)) and seen[0] is ids
    warpers = [TemperatureLogitsWarper(0.5), TopKLogitsWarper(9), TopPLogitsWarper(0.8), MinPLogitsWarper(0.01)]
    how = Sampling(0.5, top_k=9, top_p=0.8, min_p=0.01)
    expected = exactly(logits, [Row(how, 7 + i, 4 + i) for i in range(3)])
    assert torch.equal(Sampler(LogitsProcessorList(warpers), True, 7)(logits, ids, [4, 5, 6]), expected)
    # In another order they are no settings of ours, and are heard as they are.
    found = Sampler(LogitsProcessorList([TopPLogitsWarper(0.8), TopKLogitsWarper(2)]), True, 7)(logits, ids, [4, 5, 6])
    assert all(token in row.topk(2)[1] for token, row in zip(found, logits, strict=True))
    turned_first = Sampler(LogitsProcessorList([turned, *warpers]), True, 7)(logits, ids, [4, 5, 6])
    assert torch.equal(turned_first, exactly(-logits, [Row(how, 7 + i, 4 + i) for i in range(3)]))
    assert exactly(logits[:1], [Row(Sampling(1.0, top_p=COLDEST), 7, 4)]) == Sampler(LogitsProcessorList([TopPLogitsWarper(0.0)]), True, 7)(
        logits[:1], ids[:1], [4]
    )


def test_without_a_seed_pytorchs_generator_gives_one():
    logits = torch.zeros(1, 10**6)

    def drawn(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return int(Sampler(None, True)(logits, None, [0]))

    assert drawn(1) == drawn(1) != drawn(2) and drawn() != drawn()
    assert following(2**63 - 1, 1) == -(2**63) and following(-3, 2) == -1


@pytest.mark.parametrize(
    "options, words",
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"min_p": 1.5}, "min_p must be from 0 to 1, got 1.5"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"seed": 2**63}, "seed must be from"),
        ({"logprobs": 21}, "logprobs must be from 0 to 20"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"logit_bias": ((3, 101.0),)}, "got 101.0 for token 3"),
        ({"logit_bias": ((3, 1.0), (3, 2.0))}, "twice"),
    ],
)
def test_values_out_of_range(options, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [300, 128_256])
def test_a_gpu_draws_what_a_cpu_does(vocabulary):
    logits = 3 * torch.randn(40, vocabulary)
    rows = [Row(HOW[i % len(HOW)], seed=i, position=i) for i in range(40)]
    assert exactly(logits.cuda(), rows).tolist() == exactly(logits, rows).tolist()
