"""Every form of mask that transformers documents: DSLA layers give what the texts alone give, without packing and padding, or refuse."""

import copy
import functools
import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.masking_utils import create_masks_for_generate

from dsla_hf.core.masks import read_mask

SEGMENTS = ([12, 20], [5, 27], [32], [16, 9, 7])  # tokens of the texts of each row


@functools.cache
def rows():
    """ids `[4, 32]` and, of each row, where its texts begin and end."""
    ids = torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(1))
    return ids, [list(itertools.pairwise([0, *itertools.accumulate(lengths)])) for lengths in SEGMENTS]


def block_diagonal(padding=None, window=None):
    ids, texts = rows()
    mask = torch.zeros(4, 32, 32, dtype=torch.bool)
    for row, places in zip(mask, texts, strict=True):
        for start, end in places:
            row[start:end, start:end] = True
    mask &= torch.ones(32, 32, dtype=torch.bool).tril()
    if window is not None:
        mask &= torch.ones(32, 32, dtype=torch.bool).triu(1 - window)
    return (mask if padding is None else mask & padding[:, None])[:, None]


def positions():
    return torch.stack([torch.cat([torch.arange(length) for length in lengths]) for lengths in SEGMENTS])


def additive(mask, dtype=torch.float32, hidden=None):
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min if hidden is None else hidden)


def alone(model, padding=None):
    """Logits of each text by itself, zero at padding."""
    ids, texts = rows()
    logits = torch.zeros(4, 32, 97)
    for row, places in enumerate(texts):
        for start, end in places:
            real = slice(start, end) if padding is None else start + padding[row, start:end].nonzero().flatten()
            logits[row, real] = model(ids[row : row + 1, real], use_cache=False).logits[0]
    return logits


@pytest.fixture(params=["adapter", "hybrid"])
def model(request, tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=2)
    return (model if request.param == "adapter" else model.merge_and_unload()).requires_grad_(False).eval()


def assert_as_alone(model, padding=None, **options):
    found = model(rows()[0], use_cache=False, **options).logits
    if padding is not None:
        found = found * padding[..., None]
    torch.testing.assert_close(found, alone(model, padding), atol=2e-5, rtol=0)


# --- several texts in a row ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size", [0, 8])
def test_packed_rows_of_a_batch_equal_the_texts_alone(tiny_model, adapter_model, window_size):
    model = adapter_model(tiny_model("qwen3"), window_size=window_size).requires_grad_(False)
    for level in (1, 4):
        model.set_level(level)
        assert_as_alone(model, position_ids=positions())
        assert_as_alone(model, attention_mask=block_diagonal(), position_ids=positions())


def test_block_diagonal_masks_of_any_form(model):
    for mask in (
        block_diagonal().expand(-1, 4, -1, -1),
        additive(block_diagonal()),
        additive(block_diagonal(), hidden=float("-inf")),
        additive(block_diagonal(), hidden=-1e9),
    ):
        assert_as_alone(model, attention_mask=mask, position_ids=positions())


def test_packed_texts_given_once_for_all_rows(model):
    ids = rows()[0]
    expected = torch.cat([model(ids[:, :12], use_cache=False).logits, model(ids[:, 12:], use_cache=False).logits], 1)
    for options in ({}, {"attention_mask": block_diagonal()[:1]}):
        found = model(ids, position_ids=positions()[:1], use_cache=False, **options).logits
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    padding = torch.ones(1, 32, dtype=torch.bool)
    padding[0, 28:] = False
    found = model(ids, attention_mask=causal(padding=padding), use_cache=False).logits
    torch.testing.assert_close(found[:, :28], model(ids[:, :28], use_cache=False).logits, atol=2e-5, rtol=0)


def test_padding_inside_packed_rows_leaves_no_trace(model):
    padding = torch.ones(4, 32, dtype=torch.bool)
    padding[0, 12:15] = padding[1, 30:] = padding[2, :4] = padding[3, 18] = False
    at = (block_diagonal(padding)[:, 0].float() * padding[:, None]).sum(-1).long().sub(1).clamp_min(0)
    assert_as_alone(model, padding, attention_mask=block_diagonal(padding), position_ids=at)


def test_gradients_of_packed_rows_are_those_of_the_texts_alone(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), level=4)

    def gradients(logits):
        model.zero_grad()
        logits.square().mean().backward()
        return [p.grad.clone() for n, p in model.named_parameters() if "dsla_" in n and p.grad is not None]

    found = gradients(model(rows()[0], position_ids=positions(), use_cache=False).logits)
    assert len(found) > 10
    for x, y in zip(found, gradients(alone(model)), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_packed_texts_leave_no_cache(model):
    ids, base = rows()[0], model(rows()[0], use_cache=False)
    for options in ({"position_ids": positions()}, {"attention_mask": block_diagonal(), "position_ids": positions()}):
        for cache in (None, DynamicCache(config=model.config)):
            with pytest.raises(ValueError, match=r"packed texts .* pass use_cache=False"):
                model(ids, past_key_values=cache, **options)
            assert cache is None or cache.get_seq_length() == 0
        model.train()
        torch.testing.assert_close(model(ids, **options).logits, alone(model.eval()), atol=2e-5, rtol=0)
    ones = model(ids, attention_mask=torch.ones_like(ids), position_ids=positions()).logits
    assert not torch.allclose(ones, base.logits), "a row is one text where a mask says so, at whatever positions"


def test_boundaries_must_be_known_to_every_layer(model):
    ids, cut = rows()[0][:1], torch.tensor([0, 12, 32], dtype=torch.int32)
    found = model(ids, position_ids=positions()[:1], cu_seq_lens_q=cut, use_cache=False).logits
    torch.testing.assert_close(found, alone(model)[:1], atol=2e-5, rtol=0)
    padded = torch.ones_like(ids)
    padded[:, :4] = 0
    if hasattr(model, "disable_adapter"):
        model.set_level(4)  # no softmax layer is left, and it means the same
    for wrong in ({}, {"position_ids": torch.arange(32)[None]}, {"position_ids": positions()[1:2]}, {"attention_mask": padded}):
        with pytest.raises(ValueError, match=r"cu_seq_lens_q \[0, 12, 32\] marks other texts"):
            model(ids, cu_seq_lens_q=cut, use_cache=False, **wrong)
    for wrong in (cut.tolist(), cut[:2], cut.flip(0)):
        with pytest.raises(ValueError, match="cu_seq_lens_q must be"):
            model(ids, position_ids=positions()[:1], cu_seq_lens_q=wrong, use_cache=False)


# --- one text a row -----------------------------------------------------------------------------------------------


def causal(window=None, padding=None, past=0, tokens=32):
    query, key = torch.arange(past, past + tokens)[:, None], torch.arange(past + tokens)
    mask = (key <= query) & (key > query - (window or 10**6))
    return (mask if padding is None else mask & padding[:, None])[:, None] if padding is not None else mask[None, None]


@pytest.mark.parametrize("cached", [0, 20])
@pytest.mark.parametrize("make", [DynamicCache, functools.partial(StaticCache, max_cache_len=40)], ids=["dynamic", "static"])
def test_causal_masks_with_padding_in_pieces(model, cached, make):
    ids, padding = rows()[0], torch.ones(4, 32, dtype=torch.bool)
    padding[0, :3] = padding[2, 9] = padding[3, 30:] = False
    expected = model(ids, attention_mask=padding.long(), use_cache=False).logits
    cache = make(config=model.config)
    full = causal(padding=padding)
    if isinstance(cache, StaticCache):
        full = torch.nn.functional.pad(full, (0, 8))
    found = []
    for start, end in ((0, cached), (cached, 32)) if cached else ((0, 32),):
        piece = full[:, :, start:end, : 40 if isinstance(cache, StaticCache) else end]
        found.append(model(ids[:, start:end], attention_mask=piece, past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, 1)[padding], expected[padding], atol=2e-5, rtol=0)


def test_masks_by_layer_type_and_those_of_sliding_windows(tiny_model, adapter_model):
    model = adapter_model(tiny_model("gemma2"), level=4).requires_grad_(False)
    ids = rows()[0]
    expected = model(ids, use_cache=False).logits
    masks = {"full_attention": additive(causal()), "sliding_attention": additive(causal(12))}
    torch.testing.assert_close(model(ids, attention_mask=masks, use_cache=False).logits, expected)
    torch.testing.assert_close(model(ids, attention_mask={**masks, "full_attention": None}, use_cache=False).logits, expected)
    for wrong in ({**masks, "sliding_attention": additive(causal(11))}, {**masks, "full_attention": additive(causal(12))}):
        with pytest.raises(ValueError, match="window that is not the model's"):
            model(ids, attention_mask=wrong, use_cache=False)
    packed = {"full_attention": additive(block_diagonal()), "sliding_attention": additive(block_diagonal(window=12))}
    assert_as_alone(model, attention_mask=packed, position_ids=positions())
    with pytest.raises(ValueError, match="differ in padding or texts"):
        model(ids, attention_mask={**packed, "full_attention": additive(causal())}, use_cache=False)


def ahead(mask):
    mask = mask.clone()
    mask[..., :10, :10] = True
    return mask


def hole(mask):
    mask = mask.clone()
    mask[..., 20:, 7] = False
    return mask


REFUSED = {
    "prefix-LM": (ahead(causal()), "prefix-LM or bidirectional"),
    "bidirectional": (torch.ones(1, 1, 32, 32, dtype=torch.bool), "prefix-LM or bidirectional"),
    "a hole": (hole(causal()), "leave out earlier ones"),
    "another window": (causal(9), "window that is not the model's"),
    "ALiBi": (additive(causal()) - 0.1 * torch.arange(32.0), "bias"),
    "heads": (torch.cat([causal(), hole(causal())], 1).repeat(1, 2, 1, 1), "head to head"),
    "integers": (causal().long(), "neither bool nor"),
    "3-D": (causal()[0], "no mask that DSLA layers can read"),
    "object": (object(), "no mask that DSLA layers can read"),
    "too few queries": (causal()[:, :, :5], r"\[1, 1, 5, 32\] does not fit this call, it must be \[4 or 1, 4 or 1, 32, 32\]"),
    "too short": (causal()[..., 5:], "does not fit this call"),
    "too long": (torch.nn.functional.pad(causal(), (0, 5)), "does not fit this call"),
    "other rows": (causal().expand(3, 1, -1, -1), "does not fit this call"),
    "other heads": (causal().expand(1, 3, -1, -1), "does not fit this call"),
    "2-D, other rows": (torch.ones(3, 32), r"does not fit this call, it must be \[4, cached"),
}


@pytest.mark.parametrize("mask, message", REFUSED.values(), ids=REFUSED)
def test_what_a_state_cannot_follow_is_refused_before_any_layer(model, mask, message):
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match=f"attention_mask.*{message}"):
        model(rows()[0], attention_mask=mask, past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [0] * 4


@pytest.mark.parametrize("name", ["prefix-LM", "bidirectional", "a hole", "another window", "ALiBi", "heads"])
def test_the_original_model_takes_any_mask(tiny_model, adapter_model, name):
    base = tiny_model("llama").requires_grad_(False)
    expected = base(rows()[0], attention_mask=REFUSED[name][0]).logits
    model = adapter_model(base, level=2)
    with model.disable_adapter():
        assert torch.equal(model(rows()[0], attention_mask=REFUSED[name][0]).logits, expected)
    model.set_level(0)
    assert torch.equal(model(rows()[0], attention_mask=REFUSED[name][0]).logits, expected)


def test_masks_shorter_than_the_text_are_those_of_sliding_windows(tiny_model, adapter_model):
    """Of others the padding in the part that is left out would be folded, and after a window the new token would be padding."""
    ids, padding = rows()[0], torch.ones(4, 32, dtype=torch.bool)
    padding[0, :6] = False
    full = causal(padding=padding)
    model = adapter_model(tiny_model("llama"), level=0).requires_grad_(False)
    cache = DynamicCache(config=model.config)
    model(ids[:, :20], attention_mask=padding[:, :20].long(), past_key_values=cache)
    model.set_level(4)
    with pytest.raises(ValueError, match="does not fit this call"):
        model(ids[:, 20:], attention_mask=full[:, :, 20:, 10:], past_key_values=cache)
    expected = model(ids[:, 20:], attention_mask=padding.long(), past_key_values=copy.deepcopy(cache)).logits
    found = model(ids[:, 20:], attention_mask=full[:, :, 20:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)

    model = adapter_model(tiny_model("mistral", sliding_window=12), level=4).requires_grad_(False)
    cache = StaticCache(config=model.config, max_cache_len=40)
    model(ids[:, :20], past_key_values=cache)
    masks = create_masks_for_generate(model.config, torch.empty(4, 1, 0), torch.ones(4, 21), cache)
    with pytest.raises(ValueError, match="does not fit this call"):
        model(ids[:, 20:21], attention_mask=masks.get("sliding_attention") if isinstance(masks, dict) else masks, past_key_values=cache)


def test_trees_of_drafts_are_refused(model):
    ids = rows()[0][:1]
    cache = model(ids[:, :20], use_cache=True).past_key_values
    tree = torch.ones(1, 1, 2, 22, dtype=torch.bool)
    tree[0, 0, 1, 20] = tree[0, 0, 0, 21] = False
    with pytest.raises(ValueError, match="tree of drafts"):
        model(ids[:, 20:22], attention_mask=tree, position_ids=torch.tensor([[20, 20]]), past_key_values=cache)
    assert cache.get_seq_length() == 20
    found = model(ids[:, 20:22], past_key_values=cache).logits
    torch.testing.assert_close(found, model(ids[:, :22], use_cache=False).logits[:, 20:], atol=2e-5, rtol=0)


@pytest.mark.parametrize("where", ["call", "config"])
def test_bidirectional_attention_is_refused(model, where, monkeypatch):
    options = {"is_causal": False} if where == "call" else {}
    if where == "config":
        monkeypatch.setattr(model.config, "is_causal", False, raising=False)
    with pytest.raises(ValueError, match="bidirectional"):
        model(rows()[0], use_cache=False, **options)


@pytest.mark.parametrize("make", [DynamicCache, functools.partial(StaticCache, max_cache_len=40)], ids=["dynamic", "static"])
def test_masks_that_are_too_short_are_refused(model, make):
    ids, cache = rows()[0], make(config=model.config)
    model(ids[:, :20], past_key_values=cache)
    with pytest.raises(ValueError, match="covers 12 tokens, but 20 cached and 12 new"):
        model(ids[:, 20:], attention_mask=torch.ones(4, 12), past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == [20] * 4


# --- reading ------------------------------------------------------------------------------------------------------


def test_random_masks_are_read_back_or_refused():
    """What is read from a mask stands for that mask exactly."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size, high=2):
        return torch.randint(0, high, size, generator=generator)

    refused = 0
    for _ in range(300):
        tokens, past = int(draw(1, high=9)) + 1, int(draw(1, high=2)) * 3
        query, key = torch.arange(past, past + tokens)[:, None], torch.arange(past + tokens)
        mask = (key <= query).expand(2, -1, -1) & ((draw(2, 1, past + tokens, high=6) > 0) if draw(1) else True)
        if draw(1) and not past:
            text = draw(2, tokens, high=3).eq(0).cumsum(1)
            mask = mask & (text[:, :, None] == text[:, None])
        if not draw(1, high=3):
            mask = mask ^ (draw(2, tokens, past + tokens, high=20) == 0)
        try:
            real, starts = read_mask(mask[:, None], past, tokens)
        except ValueError:
            refused += 1
            continue
        real = torch.ones(2, past + tokens, dtype=torch.bool) if real is None else real
        expected = (key <= query) & real[:, None]
        if starts is not None:
            text = starts.cumsum(1)
            expected = expected & (text[:, :, None] == text[:, None])
        new = real[:, past:, None]
        assert torch.equal(mask & new, expected & new)
    assert 40 < refused < 200
