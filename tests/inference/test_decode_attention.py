"""Attention that knows where a cache ends, beside SDPA with masks."""

import pytest
import torch
from transformers import DynamicCache

import dsla_hf.inference.decode_attention
from dsla_hf.inference.decode_attention import attends_where_cached, over_prompt

IDS = torch.randint(3, 90, (2, 21), generator=torch.Generator().manual_seed(0))


def read(model, pieces):
    cache, logits, begin = DynamicCache(config=model.config), [], 0
    for size in pieces:
        logits.append(model(IDS[:, begin : begin + size], past_key_values=cache).logits)
        begin += size
    return torch.cat(logits, 1)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])  # all tokens are seen; also sliding windows, of 12 tokens
@pytest.mark.parametrize("pieces", [(21,), (8, 13), (8, 1, 7, 5)])
@pytest.mark.parametrize("queries", [1, 512])  # of a window as many as it is long, or all
def test_prompts_that_go_on_behind_a_cache_need_no_mask(tiny_model, kind, pieces, queries, monkeypatch):
    monkeypatch.setattr(dsla_hf.inference.decode_attention, "QUERIES", queries)
    model = tiny_model(kind)
    with torch.no_grad():
        expected = read(model, pieces)
        with attends_where_cached(model), over_prompt():
            found = read(model, pieces)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_elsewhere_it_is_sdpa(tiny_model):
    """Padding is left to masks."""
    model = tiny_model("llama")
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    with torch.no_grad():
        expected = model(IDS, attention_mask=mask).logits
        with attends_where_cached(model):
            assert torch.equal(model(IDS, attention_mask=mask).logits, expected)
    assert model.config._attn_implementation == "sdpa"
