"""A layer of some heads that is given keys and values of all heads of a larger one, in plain PyTorch."""

import pytest
import torch

from dsla_hf.core.attention import DualStateAttention

HEADS = torch.tensor([4, 1, 2], dtype=torch.int32)
LAYERS = {
    "window": {"window_size": 8, "sink_tokens": 2},
    "pure": {"window_size": 0},
    "interleaved": {"window_size": 8, "rotary_layout": "interleaved"},
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    return DualStateAttention(6, 3, 8, gate_rank=4, **request.param)


def inputs(tokens):
    return [torch.randn(2, tokens, heads, 8) for heads in (6, 5, 5)]


def own(*tensors):
    return [x[:, :, HEADS.long()] for x in tensors]


def same(found, expected):
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_a_text_is_read_as_with_these_heads_alone(layer):
    """Prompt, a piece that goes on, a token, with and without padding."""
    for mask in (None, torch.arange(21).flip(0) < torch.tensor([[21], [9]])):
        (q, k, v), piece, token = inputs(21), inputs(5), inputs(1)
        o, state = layer(q, k, v, padding_mask=mask, output_state=True, kv_heads=HEADS)
        expected, expected_state = layer(q, *own(k, v), padding_mask=mask, output_state=True)
        same([o, *state], [expected, *expected_state])
        same(layer.fold(k, v, mask, kv_heads=HEADS), layer.fold(*own(k, v), mask))
        for q, k, v in (piece, token):
            o, state = layer(q, k, v, state=state, output_state=True, kv_heads=HEADS)
            expected, expected_state = layer(q, *own(k, v), state=expected_state, output_state=True)
            same([o, *state], [expected, *expected_state])
        same(layer.fold(k, v, state=state, kv_heads=HEADS), layer.fold(*own(k, v), state=state))


def test_gradients_reach_these_heads_alone(layer):
    q, k, v = (x.requires_grad_() for x in inputs(21))
    layer(q, k, v, kv_heads=HEADS)[0].square().sum().backward()
    for x in (k.grad, v.grad):
        assert not x[:, :, [0, 3]].any() and all(x[:, :, head].any() for head in HEADS)


@torch.no_grad()
def test_the_output_is_written_where_it_is_wanted(layer):
    prompt = inputs(21)
    past = layer(prompt[0], *own(*prompt[1:]), output_state=True)[1]
    for tokens, state in ((21, None), (1, past)):
        q, k, v = inputs(tokens)
        whole = torch.full((2, tokens, 9, 8), 7.0)
        o, _ = layer(q, k, v, state=state, kv_heads=HEADS, out=whole[:, :, 2:8])
        assert o.data_ptr() == whole[:, :, 2:].data_ptr() and bool((whole[:, :, [0, 1, 8]] == 7).all())
        assert torch.equal(whole[:, :, 2:8], layer(q, *own(k, v), state=state)[0])


def test_what_does_not_fit_is_named(layer):
    q, k, v = inputs(5)
    for wrong in (HEADS.long(), HEADS[:2]):
        for call in (lambda heads=wrong: layer(q, k, v, kv_heads=heads), lambda heads=wrong: layer.fold(k, v, kv_heads=heads)):
            with pytest.raises(
                ValueError, match=r"kv_heads must be int32 \[3\], one number for each KV head of this layer, got torch\.int"
            ):
                call()
    with pytest.raises(ValueError, match=r"out must be \[2, 5, 6, 8\].* got \[2, 5, 7, 8\]"):
        layer(q, k, v, kv_heads=HEADS, out=torch.zeros(2, 5, 7, 8))
