"""Losses of next tokens against the plain formula, and what they take of memory."""

import pytest
import torch

from dsla_hf.evaluation.next_tokens import next_token_losses
from dsla_hf.training.losses import TOKENS_PER_CHUNK


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 2), (3, 7), (2, TOKENS_PER_CHUNK + 1), (1, TOKENS_PER_CHUNK + 2)])
def test_losses_are_those_of_the_formula(rows, tokens, dtype):
    torch.manual_seed(0)
    logits, ids = torch.randn(rows, tokens, 11).to(dtype), torch.randint(0, 11, (rows, tokens))
    expected = -logits.double().log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    found = next_token_losses(logits, ids)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
    assert torch.equal(next_token_losses(logits[:, :-1], ids), found)  # those of the last token are not looked at


def test_one_token_has_none():
    assert next_token_losses(torch.zeros(2, 1, 5), torch.zeros(2, 1, dtype=torch.long)).shape == (2, 0)


def test_no_copy_of_all_logits_is_made(monkeypatch):
    largest, float_of = [], torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda x: largest.append(x.numel()) or float_of(x))
    next_token_losses(torch.zeros(2, 3 * TOKENS_PER_CHUNK, 5, dtype=torch.bfloat16), torch.zeros(2, 3 * TOKENS_PER_CHUNK, dtype=torch.long))
    assert max(largest) == 5 * TOKENS_PER_CHUNK
