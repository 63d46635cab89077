"""Long prompts: read in chunks with the same text and bounded memory, and folded without a copy of the cache."""

import pytest
import torch
from peak_bytes import PeakBytes
from transformers import DynamicCache

from dsla_hf import DualStateAttention, fold
from dsla_hf.core import cache

IDS = torch.tensor([[5, 17, 31, 44, 9, 60, 61, 62, 3, 8, 12, 77] * 4, [9, 60, 5, 17, 31, 5, 60, 61, 62, 5, 17, 31] * 4])
MASK = torch.ones_like(IDS)
MASK[0, :11] = 0


# Each chunk with each window and level, with padding and without; at level 0 the base reads it.
@pytest.mark.parametrize(
    "window_size, level, chunk, padded",
    [
        (0, 0, 7, True),
        (8, 0, 20, False),
        (0, 2, 1, False),
        (8, 2, 1, True),
        (0, 2, 20, True),
        (8, 2, 7, False),
        (0, 4, 7, True),
        (8, 4, 20, False),
        (0, 4, 20, False),
        (8, 4, 1, True),
    ],
)
def test_chunks_give_the_text_of_one_forward(tiny_model, adapter_model, window_size, level, chunk, padded):
    model = adapter_model(tiny_model("llama"), window_size=window_size, level=level)
    options = {"attention_mask": MASK if padded else torch.ones_like(MASK), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(IDS, **options)
    assert torch.equal(model.generate(IDS, prefill_chunk_size=chunk, **options), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(model.generate(IDS, prefill_chunk_size=chunk, **static, **options), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_a_raise_between_two_chunks_is_the_raise_of_a_text_read_in_two_calls(tiny_model, adapter_model, padded):
    model = adapter_model(tiny_model("llama"), level=1)
    mask = MASK if padded else torch.ones_like(MASK)
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = []
    hook = model.get_base_model().register_forward_hook(lambda module, args, output: found.append(output.logits[:, -1]))
    wanted = iter([1, 1, 1, 4, 4])  # before the prompt, before each chunk, after the first token
    options = {"level_policy": lambda stats: next(wanted), "prefill_chunk_size": 16, "max_new_tokens": 1, "do_sample": False}
    model.generate(IDS, attention_mask=mask, **options)
    hook.remove()
    parts = DynamicCache(config=model.config)
    with torch.no_grad():
        for level, end in ((1, 16), (1, 32), (4, 48)):
            model.set_level(level)
            part = {"attention_mask": mask[:, :end], "position_ids": positions[:, end - 16 : end]}
            logits = model(IDS[:, end - 16 : end], past_key_values=parts, **part).logits[:, -1]
    torch.testing.assert_close(found[2], logits, atol=1e-5, rtol=0)


def test_generate_asks_for_one_logit_a_chunk(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=2)
    seen = []
    hook = model.get_base_model().register_forward_hook(lambda module, args, output: seen.append(tuple(output.logits.shape)))
    model.generate(IDS, max_new_tokens=2, do_sample=False)
    assert seen == [(2, 1, 97)] * 2
    with torch.no_grad():
        assert model(IDS, logits_to_keep=3).logits.shape == (2, 3, 97)
    hook.remove()


def test_the_memory_of_a_prompt_in_chunks_does_not_grow_with_it(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama", num_hidden_layers=2), conversion_order=[1, 0], level=2)

    def peak(tokens, chunk):
        ids = torch.randint(3, 97, (1, tokens))
        with PeakBytes(*model.parameters()) as memory:
            model.generate(ids, max_new_tokens=1, do_sample=False, prefill_chunk_size=chunk)
        return memory.peak

    numbers = 16 * 8  # a token and its place, in a dozen small tensors; its keys and values would be 512 bytes
    short, long, whole = peak(256, 32), peak(1024, 32), peak(1024, None)
    assert long < short + 768 * numbers
    assert long < whole / 8


@pytest.mark.parametrize("window_size", [0, 8])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("piece", [1, 7, 16, 48])
def test_a_fold_in_pieces_is_the_fold(monkeypatch, window_size, padded, piece):
    attention = DualStateAttention(4, 2, 8, window_size=window_size)
    keys, values = torch.randn(2, 2, 48, 8), torch.randn(2, 2, 48, 8)
    mask = MASK if padded else None
    expected = fold(attention, keys, values, attention_mask=mask)
    monkeypatch.setattr(cache, "FOLDED_AT_ONCE", 2 * piece)
    found = fold(attention, keys, values, attention_mask=mask)
    assert found.tokens == expected.tokens == 48
    q, k, v = torch.randn(2, 30, 4, 8), torch.randn(2, 30, 2, 8), torch.randn(2, 30, 2, 8)
    outputs = [attention(q, k, v, state=layer.state)[0] for layer in (expected, found)]
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(found.state.lengths, expected.state.lengths)


@pytest.mark.parametrize("window_size", [0, 128])
@pytest.mark.parametrize("padded", [False, True])
def test_a_fold_copies_no_cache(monkeypatch, window_size, padded):
    """What it takes beside the cache does not grow with the text."""
    monkeypatch.setattr(cache, "FOLDED_AT_ONCE", 512)
    attention = DualStateAttention(4, 4, 32, window_size=window_size).bfloat16()

    def peak(tokens):
        keys, values = (torch.randn(1, 4, tokens, 32, dtype=torch.bfloat16) for _ in range(2))
        mask = torch.ones(1, tokens, dtype=torch.bool)
        mask[:, :5] = False
        with PeakBytes(keys, values, mask, *attention.parameters()) as memory:
            fold(attention, keys, values, attention_mask=mask if padded else None)
        return memory.peak

    assert peak(8192) < 1.1 * peak(1024)
