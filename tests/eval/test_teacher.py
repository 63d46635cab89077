"""The yardstick teacher, a trained 16-layer Llama, on real text: decoding through the cache equals the full forward."""

import math

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from dsla_hf import DSLACacheLayer, DSLAConfig, cache_bytes, fold
from dsla_hf.models.adapter import dsla_layers

TOKENS = 300
ORDER = [(7 * i + 3) % 16 for i in range(16)]


@pytest.fixture(scope="module")
def teacher(shared_dir):
    """The teacher in fp32 under an adapter whose weights are a little away from their start."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(shared_dir / "teacher", dtype=torch.float32)
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", conversion_order=ORDER))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "dsla_" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    return model.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def tokens(shared_dir):
    """The first tokens of WikiText's validation text, `[1, TOKENS]`."""
    tokenizer = AutoTokenizer.from_pretrained(shared_dir / "teacher")
    text = (shared_dir / "data" / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[: 20 * TOKENS]
    return tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :TOKENS]


@pytest.fixture(scope="module")
def full(teacher, tokens):
    """`full(level)`: logits of one forward without cache."""
    known = {}

    def logits(level):
        if level not in known:
            teacher.set_level(level)
            known[level] = teacher(tokens, use_cache=False).logits[0]
        return known[level]

    return logits


@torch.inference_mode()
def run(model, tokens, sizes, mask=None, at=None):
    """Logits of successive calls with one cache, and the cache; `at` maps a call's number to what is done before it."""
    cache, logits, start = DynamicCache(), [], 0
    for number, size in enumerate(sizes):
        if at and number in at:
            at[number](cache)
        piece, options = slice(start, start + size), {}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            options = {"attention_mask": mask[:, : piece.stop], "position_ids": positions[:, piece]}
        logits.append(model(tokens[:, piece], past_key_values=cache, **options).logits)
        start += size
    assert start == tokens.shape[1]
    return torch.cat(logits, 1), cache


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_teacher_stays_a_language_model(full, tokens):
    """The equalities below are about a model that reads its text, at level 0 and converted."""
    loss = {level: float(torch.nn.functional.cross_entropy(full(level)[:-1], tokens[0, 1:])) for level in (0, 3, 16)}
    assert loss[0] < loss[3] < loss[16] < math.log(8192), loss
    assert loss[0] < 5.5


@pytest.mark.parametrize("level", [8, 16])
def test_decoding_token_by_token_equals_the_full_forward(teacher, tokens, full, level):
    """A batch of the text and of its beginning, padded on the left: a start, and each later token by a call of its own, while blocks
    leave the windows of both."""
    expected, length = full(level), 231
    mask = (torch.arange(TOKENS) >= TOKENS - torch.tensor([[TOKENS], [length]])).long()
    rows = torch.full((2, TOKENS), teacher.config.pad_token_id)
    rows[0], rows[1, -length:] = tokens[0], tokens[0, :length]
    teacher.set_level(level)
    found, cache = run(teacher, rows, [140, *[1] * (TOKENS - 140)], mask)
    assert_close(found[0], expected)
    assert_close(found[1, -length:], expected[:length])
    assert sum(isinstance(layer, DSLACacheLayer) for layer in cache.layers) == level
    # Per row and layer: two fp32 states of 64 x 64 for two heads, keys and values of a window of 128 and of 4 sinks, a count;
    # or all keys and values.
    dsla, softmax = 2 * 2 * 64 * 64 * 4 + 2 * 132 * 2 * 64 * 4 + 8, 2 * TOKENS * 2 * 64 * 4
    assert cache_bytes(cache) == 2 * (level * dsla + (16 - level) * softmax)


@pytest.mark.parametrize("level", [0, 3, 8, 16])
def test_text_alone_in_pieces_equals_the_full_forward(teacher, tokens, full, level):
    """Without any mask: prefill in several calls, with single tokens where blocks begin, end and leave the window."""
    expected = full(level)
    teacher.set_level(level)
    assert_close(run(teacher, tokens, [62, 1, 1, 1, 60, 1, 1, 1, 1, 62, 1, 1, 1, 1, 59, 1, 1, 1, 1, 42])[0][0], expected)


@pytest.mark.parametrize("low, high, padded", [(0, 8, True), (3, 16, False)])
def test_raising_in_mid_text_equals_layers_folded_by_hand(teacher, tokens, full, low, high, padded):
    cut, end = 240, 262  # a block leaves the window at 256
    rows, mask = tokens[:, :end], None
    if padded:
        rows, mask = rows.repeat(2, 1), torch.ones(2, end, dtype=torch.long)
        rows[1, 33:], mask[1, :33] = tokens[0, : end - 33], 0

    def raise_level(cache):
        teacher.set_level(high)

    def fold_by_hand(cache):
        for index in ORDER[low:high]:
            layer, attention = cache.layers[index], dsla_layers(teacher)[index].dsla_attention().dsla
            assert layer.keys.shape[2] == cut
            cache.layers[index] = fold(attention, layer.keys, layer.values, attention_mask=None if mask is None else mask[:, :cut])
        teacher.set_level(high)

    results = []
    for change in (raise_level, fold_by_hand):
        teacher.set_level(low)
        results.append(run(teacher, rows, [cut, *[1] * (end - cut)], mask, {1: change})[0])
    real = slice(None) if mask is None else mask.bool()
    assert_close(results[0][real], results[1][real])
    before, after = full(low)[:cut], full(low)[cut:end]
    assert_close(results[0][0, :cut], before)
    assert (results[0][0, cut:] - after).abs().max() > 0.1
