"""The layer with the Triton kernels does what it does with PyTorch: prefill, texts that go on, single tokens, folds, gradients.

As tests/kernels/test_kernels.py, on a GPU compiled and in bf16 too, without one through Triton's interpreter.
"""

import copy
import os

import pytest
import torch
from kernel_choice import both

from dsla_hf.core.attention import DualState, DualStateAttention, clone_state
from dsla_kernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 1.5e-2}
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 product is wrong")),
]
LAYERS = {
    "window": {"window_size": 16, "sink_tokens": 3},
    "window without sinks, plain gates": {"window_size": 20, "sink_tokens": 0, "write_gate": False},
    "pure": {"window_size": 0},
    "window alone": {"window_size": 16, "sink_tokens": 3, "states": False},
    "window alone, without sinks": {"window_size": 20, "sink_tokens": 0, "states": False},
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    torch.manual_seed(0)
    layer = DualStateAttention(4, 2, 16, 24, gate_rank=4, half_lives=((4.0, 64.0), (2.0, 16.0)), **request.param).to(DEVICE)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def inputs(dtype, batch, tokens):
    return [torch.randn(batch, tokens, heads, size, device=DEVICE).to(dtype) for heads, size in ((4, 16), (2, 16), (2, 24))]


def without_what_nobody_sees(layer, state):
    """Zeros in the slots of tokens that have not come yet."""
    window, sinks = layer.window_size, layer.sink_tokens
    token = torch.cat([torch.arange(sinks), torch.arange(window)]).to(DEVICE) if window else torch.arange(0, device=DEVICE)
    hidden = (token >= state.lengths[:, None])[..., None, None]
    return state._replace(window_k=state.window_k.masked_fill(hidden, 0), window_v=state.window_v.masked_fill(hidden, 0))


def assert_same(expected, found, dtype):
    expected, found = (([*x] if isinstance(x, (tuple, list)) else [x]) for x in (expected, found))
    for e, f in zip(expected, found, strict=True):
        if e.is_floating_point():
            error = (f.detach().double() - e.detach().double()).norm() / e.detach().double().norm().clamp_min(1e-9)
            assert error <= BOUNDS[dtype], float(error)
        else:
            assert torch.equal(e, f)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_prefill_and_a_text_that_goes_on(layer, dtype, padded, monkeypatch):
    first, second = inputs(dtype, 2, 45), inputs(dtype, 2, 21)
    mask = torch.ones(2, 45, dtype=torch.bool, device=DEVICE)
    mask[1, :9] = False

    @torch.no_grad()
    def run():
        o, state = layer(*first, padding_mask=mask if padded else None, output_state=True)
        return [o, layer(*second, state=state, output_state=True)[0], *layer.fold(first[1], first[2], mask if padded else None)]

    assert_same(*both(monkeypatch, run), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_at_the_end(layer, dtype, monkeypatch):
    q, k, v = inputs(dtype, 3, 45)
    mask = torch.arange(45, device=DEVICE) < torch.tensor([45, 0, 33], device=DEVICE)[:, None]
    for x in (q, k, v):
        x[~mask] = float("nan") if layer.window_size else 100.0

    @torch.no_grad()
    def run():
        o, state = layer(q, k, v, padding_mask=mask, padding_at_end=True, output_state=True)
        return [o, *without_what_nobody_sees(layer, state), *layer.fold(k, v, mask, padding_at_end=True)]

    assert_same(*both(monkeypatch, run), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pieces_that_share_what_follows_from_their_mask(layer, dtype, monkeypatch):
    """Two layers, first pieces and such behind whole windows."""
    if not layer.window_size:
        pytest.skip("has no window")
    size = 2 * layer.window_size
    layers = [layer, copy.deepcopy(layer)]
    if layer.states:
        layers[1].gate_bias.data += 1
    first, second = inputs(dtype, 2, size), inputs(dtype, 2, 45)
    masks = [
        torch.arange(tokens, device=DEVICE) < torch.tensor(rows, device=DEVICE)[:, None]
        for tokens, rows in ((size, [size, 1]), (45, [0, 33]))
    ]

    @torch.no_grad()
    def run():
        results, states = [], [one(*first, output_state=True)[1] for one in layers]
        for qkv, mask, behind in ((first, masks[0], False), (second, masks[1], True)):
            options = {"padding_mask": mask, "padding_at_end": True, "output_state": True, "whole_windows": behind}
            shared, keys = {}, set()
            for one, state in zip(layers, states, strict=True):
                with_kernels = dispatch.choice == "triton"
                o, new = one(*qkv, **options, shared=shared if with_kernels else None, state=state if behind else None)
                results += [o, *without_what_nobody_sees(one, new)]
                keys = keys or {*shared}
            assert keys == {*shared} and bool(keys) == with_kernels
        return results

    assert_same(*both(monkeypatch, run), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packed_texts(layer, dtype, monkeypatch):
    q, k, v = inputs(dtype, 1, 50)
    bounds = torch.tensor([0, 7, 8, 50], device=DEVICE)
    assert_same(*both(monkeypatch, lambda: layer(q, k, v, cu_seqlens=bounds)[0]), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_single_tokens(layer, dtype, monkeypatch):
    """Across several blocks, one row padded now and then; the state is written over only where that is allowed."""
    prompt, tokens = inputs(dtype, 2, 11), [inputs(dtype, 2, 1) for _ in range(22)]
    masks = [torch.tensor([[True], [step % 5 > 0]], device=DEVICE) for step in range(len(tokens))]

    @torch.no_grad()
    def run():
        state = layer(*prompt, output_state=True)[1]
        outputs = []
        for (q, k, v), mask in zip(tokens, masks, strict=True):
            before = clone_state(state)
            kept = layer(q, k, v, padding_mask=mask, state=state, output_state=True)
            assert_same(list(before), list(state), dtype)
            o, state = layer(q, k, v, padding_mask=mask, state=state, output_state=True, in_place=True)
            assert_same([kept[0], *kept[1]], [o, *state], dtype)
            outputs.append(o)
        return [torch.cat(outputs, 1), state.recurrent, state.lengths]

    assert_same(*both(monkeypatch, run), dtype)


def test_a_kernel_step_writes_over_the_state_it_may(layer, monkeypatch):
    monkeypatch.setattr(dispatch, "choice", "triton")
    with torch.no_grad():
        state = layer(*inputs(torch.float32, 1, 40), output_state=True)[1]
        after = layer(*inputs(torch.float32, 1, 1), state=state, output_state=True, in_place=True)[1]
    assert isinstance(after, DualState) and all(a is b for a, b in zip(state, after, strict=True))


def test_gradients_reach_every_parameter(layer, monkeypatch):
    q, k, v = inputs(torch.float32, 2, 45)

    def run():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = layer(*leaves)[0]
        return [o, *torch.autograd.grad(o, [*leaves, *layer.parameters()], torch.ones_like(o))]

    assert_same(*both(monkeypatch, run), torch.float32)


def test_single_tokens_with_gradients_run_in_pytorch(layer, monkeypatch):
    monkeypatch.setattr(dispatch, "choice", "triton")
    state = layer(*inputs(torch.float32, 1, 40), output_state=True)[1]
    q, k, v = (x.requires_grad_() for x in inputs(torch.float32, 1, 1))
    o, _ = layer(q, k, v, state=DualState(*(x.detach() for x in state)), output_state=True)
    o.sum().backward()
    assert q.grad is not None and v.grad is not None
    assert not layer.states or layer.mix_logits.grad is not None


def test_what_requires_a_gradient_is_not_decoded_in_place(layer, monkeypatch):
    """A token over a state that takes part in one, with gradients on and off, and a fold of trained keys."""
    monkeypatch.setattr(dispatch, "choice", "triton")
    layer.requires_grad_(False)
    k, v = (x.requires_grad_() for x in inputs(torch.float32, 1, 40)[1:])
    state = layer.fold(k, v)
    before, token = state.recurrent.detach().clone(), inputs(torch.float32, 1, 1)
    with torch.no_grad():
        kernel, after = layer(*token, state=state, output_state=True, in_place=True)
    assert torch.equal(state.recurrent, before) and not after.recurrent.requires_grad
    o, _ = layer(*token, state=state, output_state=True, in_place=True)
    torch.testing.assert_close(o.detach(), kernel, rtol=1e-4, atol=1e-4)
    assert all(x.any() for x in torch.autograd.grad(o.square().sum(), (k, v)))


def test_the_choice_is_told(monkeypatch):
    heads = torch.zeros(1, 1, 1, 16)
    assert not dispatch.uses_triton(heads, heads) or dispatch.choice == "triton"
    for choice, expected in (("pytorch", False), ("triton", True)):
        monkeypatch.setattr(dispatch, "choice", choice)
        assert dispatch.uses_triton(heads, heads) is expected and "DSLA_KERNELS" in dispatch.kernel_path("cpu")


def test_a_slow_path_on_an_accelerator_says_so(monkeypatch):
    monkeypatch.setattr(dispatch, "choice", "auto")
    heads = torch.empty(1, 1, 1, 16, device="meta")
    with pytest.warns(UserWarning, match="written for NVIDIA GPUs"):
        assert not dispatch.uses_triton(heads, heads)
    monkeypatch.setattr(dispatch, "HAS_TRITON", False)
    assert "pip install triton" in dispatch.kernel_path("cuda")
    with pytest.warns(UserWarning, match="pip install triton"):
        assert not dispatch.uses_triton(heads, heads)


@pytest.mark.parametrize("window_size", [0, 8])
def test_a_step_writes_its_own_heads_of_a_state_that_holds_more(window_size, monkeypatch):
    """To the bit what it gives over a state of its heads alone; the others keep what they are."""
    monkeypatch.setattr(dispatch, "choice", "triton")
    layer = DualStateAttention(6, 3, 16, window_size=window_size, sink_tokens=2).to(DEVICE).requires_grad_(False)
    q, k, v = (torch.randn(2, 12, heads, 16, device=DEVICE) for heads in (6, 3, 3))
    _, alone = layer(q, k, v, output_state=True)
    heads = torch.tensor([4, 0, 3], device=DEVICE)
    held = DualState(
        torch.randn(2, 5, 2, 16, 16, device=DEVICE),
        *(torch.randn(2, x.shape[1], 5, 16, device=DEVICE) for x in (alone.window_k, alone.window_v)),
        alone.lengths.clone(),
    )
    for dim, mine, theirs in zip((1, 2, 2), held, alone, strict=False):
        mine.index_copy_(dim, heads, theirs)
    before = clone_state(held)
    for _ in range(6):
        token = [torch.randn(2, 1, x.shape[2], 16, device=DEVICE) for x in (q, k, v)]
        expected, alone = layer(*token, state=alone, output_state=True, in_place=True)
        found, written = layer(*token, state=held, output_state=True, in_place=True, state_heads=heads.int())
        assert written is held and torch.equal(found, expected)
    assert all(torch.equal(x, y) for x, y in zip(held.of_heads(heads), alone, strict=True))
    others = torch.tensor([1, 2], device=DEVICE)
    assert all(torch.equal(x, y) for x, y in zip(held.of_heads(others)[:3], before.of_heads(others)[:3], strict=True))
