"""From logits to tokens: the same tokens for the same seeds, whatever company a row is in."""

import pytest
import torch
from transformers import LogitsProcessorList, TopKLogitsWarper

from dsla_hf.inference.sampling import Sampler, Sampling, draw


def by_formula(logits, sampling, generator):
    """The draw in plain PyTorch, as the server did it at first: seeds of users rest on it."""
    probabilities = (logits.float() / max(sampling.temperature, 1e-5)).softmax(-1)
    if sampling.top_p < 1:
        ordered, order = probabilities.sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p
        beyond[0] = False
        probabilities = torch.zeros_like(probabilities).scatter(0, order, ordered.masked_fill(beyond, 0))
    return int(torch.multinomial(probabilities, 1, generator=generator))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature, top_p", [(0.7, 1.0), (1.0, 0.9), (1.3, 0.5), (1.0, 1e-6), (1e-9, 1.0), (2, 0.95)])
def test_seeds_give_the_tokens_of_the_formula(temperature, top_p, dtype):
    logits = (3 * torch.randn(50, 300)).to(dtype)
    for seed in range(4):
        sampling = Sampling(temperature, top_p, seed)
        sampler, generator = Sampler.of(sampling), torch.Generator().manual_seed(seed)
        expected = [by_formula(row, sampling, generator) for row in logits]
        assert [draw(row[None], [sampler])[0] for row in logits] == expected


def test_each_row_has_its_own_sampler():
    logits = torch.randn(5, 40)
    how = [Sampling(), Sampling(1.0, seed=3), Sampling(), Sampling(2.0, 0.8, seed=3), Sampling(1.0, seed=4)]
    alone = [draw(row[None], [Sampler.of(sampling)])[0] for row, sampling in zip(logits, how, strict=True)]
    said = []
    assert draw(logits, [Sampler.of(sampling) for sampling in how], lambda: said.append(1)) == alone and said == [1]
    assert [alone[0], alone[2]] == logits[[0, 2]].argmax(-1).tolist()


def test_processors_come_first_and_draws_follow_torch():
    logits, ids = torch.randn(3, 40), torch.zeros(3, 2, dtype=torch.long)
    seen = []
    likeliest = Sampler(lambda ids, scores: (seen.append(ids), -scores)[1])
    assert torch.equal(likeliest(logits, ids), logits.argmin(-1)) and seen[0] is ids
    top = Sampler(LogitsProcessorList([TopKLogitsWarper(2)]), sample=True)
    torch.manual_seed(5)
    found = top(logits, ids)
    torch.manual_seed(5)
    scores = logits.masked_fill(logits < logits.topk(2)[0][:, 1:], float("-inf"))
    assert torch.equal(found, torch.multinomial(scores.softmax(-1), 1)[:, 0])


def test_without_a_seed_every_sampler_draws_otherwise():
    logits = torch.zeros(1, 10**6)
    assert draw(logits, [Sampler.of(Sampling(1.0))]) != draw(logits, [Sampler.of(Sampling(1.0))])
