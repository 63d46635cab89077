"""The window without states, in kernels: a prompt with its gradients, and tokens behind a ring.

On a CUDA device as compiled, bf16 included; without one through Triton's interpreter, in fp32 and fp16.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

from dsla_kernels import reference  # noqa: E402 (after the choice of how kernels run)
from dsla_kernels.ops import decode, window  # noqa: E402
from dsla_kernels.ops.decode import launch as decode_launch  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}
NOT_INTERPRETED = pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 product is wrong")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, NOT_INTERPRETED])]
SHAPES = {  # query heads, KV heads, K, V, W, S, T
    "grouped": (4, 2, 16, 24, 16, 3, 39),
    "odd sizes": (3, 3, 10, 12, 20, 0, 57),
    "one KV head, shorter than the window": (4, 1, 16, 16, 64, 4, 21),
}
OPTIONS = {"plain": {}, "capped": {"softcap": 1.5}, "sink logits": {"sink_logits": True}, "padded": {"padding": True}}


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def assert_close(found, expected, dtype):
    found, expected = found.double(), expected.double()
    assert (found - expected).norm() <= BOUNDS[dtype] * expected.norm().clamp_min(1e-9)


def inputs(shape, dtype, options, batch=2):
    """q, k, v, the window's size and options, of rows that go on from token 7 of their texts."""
    heads, kv_heads, key, value, size, sinks, tokens = shape
    q, k, v = (random(batch, tokens, h, d, dtype=dtype) for h, d in ((heads, key), (kv_heads, key), (kv_heads, value)))
    given = {name: value for name, value in options.items() if name == "softcap"}
    if sinks:
        given["sinks"] = tuple(random(batch, sinks, kv_heads, d, dtype=dtype) for d in (key, value))
        given["row_start"] = torch.full((batch,), 7, device=DEVICE)
    if "sink_logits" in options:
        given["sink_logits"] = random(heads)
    if "padding" in options:
        given["padding_mask"] = torch.arange(tokens, device=DEVICE) < torch.tensor([[tokens], [tokens // 2]], device=DEVICE)
    return [q, k, v], size, given


def doubled(options):
    as_double = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in options.items()}
    return as_double | ({"sinks": tuple(x.double() for x in options["sinks"])} if "sinks" in options else {})


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_prompt_and_its_gradients(shape, options, dtype):
    qkv, size, given = inputs(shape, dtype, options)
    leaves = [*qkv, *given.get("sinks", ()), *([given["sink_logits"]] if "sink_logits" in given else [])]
    for x in leaves:
        x.requires_grad_()
    do = random(*qkv[0].shape[:3], shape[3])

    def run(call, qkv, given, cast):
        o = call(*qkv, size, **given)
        return o.detach(), torch.autograd.grad((o * cast(do)).sum(), leaves, allow_unused=True)

    o, gradients = run(window.window_attention, qkv, given, lambda x: x.to(dtype))
    expected, truth = run(reference.window_attention, [x.double() for x in qkv], doubled(given), torch.Tensor.double)
    assert o.dtype == dtype
    assert_close(o, expected, dtype)
    for found, wanted in zip(gradients, truth, strict=True):
        assert_close(found, torch.zeros_like(found) if wanted is None else wanted, dtype)
    if "padding_mask" in given:
        assert not o[1, shape[-1] // 2 :].any()


def test_the_reference_is_softmax_over_what_is_seen():
    q, k, v = (torch.randn(2, 41, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    query, key = torch.arange(41)[:, None], torch.arange(41)
    visible = (key <= query) & ((key > query - 10) | (key < 3))
    k_all, v_all = (x.repeat_interleave(2, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k_all) * 0.3
    expected = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~visible, float("-inf")).softmax(-1), v_all)
    o = reference.window_attention(q, k, v, 10, scale=0.3, sinks=(k[:, :3], v[:, :3]))
    torch.testing.assert_close(o, expected)


@torch.no_grad()
@pytest.mark.parametrize("parts, options", [(None, {}), (1, {"softcap": 1.5, "sink_logits": True}), (2, {}), (2, {"sink_logits": True})])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_behind_a_ring(parts, dtype, options, monkeypatch):
    """Rows of other lengths, one of them padded now and then, some heads out of all of a layer, into some heads of a larger output."""
    if parts is not None:
        monkeypatch.setattr(decode_launch, "tuned", decode_launch.Launch(4, 16, 32, parts=parts))
    heads, key, value, size, sinks, tokens, before = 4, 16, 24, 32, 3, 44, 30
    q, k, v = (random(3, tokens, h, d, dtype=dtype) for h, d in ((heads, key), (4, key), (4, value)))
    used = torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    held = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)  # of three heads in the ring
    ring = [random(3, sinks + size, 3, d, dtype=dtype) for d in (key, value)]
    mask = torch.rand(3, tokens, generator=torch.Generator().manual_seed(0)).to(DEVICE) > 0.2
    mask[0] = True
    mask[2, :before] = False  # begins here
    lengths = mask[:, :before].sum(1)
    for written, x in zip(ring, (k, v), strict=True):
        for row in range(3):
            read = x[row, :before][mask[row, :before]][:, used]
            for place in (read[:sinks], 0), (read, sinks):
                written[row, place[1] : place[1] + len(place[0]), held] = place[0]
    untouched = [x[:, :, 1].clone() for x in ring]
    given = {"softcap": options.get("softcap"), "sink_logits": random(heads) if "sink_logits" in options else None, "scale": 0.4}
    found = torch.zeros(3, tokens, heads, value, device=DEVICE, dtype=dtype)
    for t in range(before, tokens):
        token = slice(t, t + 1)
        whole = torch.full((3, 1, heads + 2, value), 9.0, device=DEVICE, dtype=dtype)
        decode.ring_decode(
            q[:, token], k[:, token], v[:, token], *ring, lengths, size, padding_mask=mask[:, token], kv_heads=used, state_heads=held,
            out=whole[:, :, 1:-1], **given,
        )  # fmt: skip
        assert (whole[:, :, [0, -1]] == 9).all()
        found[:, token] = whole[:, :, 1:-1]
    assert torch.equal(lengths, mask.sum(1))
    assert all(torch.equal(x[:, :, 1], before) for x, before in zip(ring, untouched, strict=True))
    for row in range(3):
        real = [x[row : row + 1, mask[row]].double() for x in (q, k[:, :, used], v[:, :, used])]
        given_row = {**given, "sink_logits": None if given["sink_logits"] is None else given["sink_logits"].double()}
        expected = reference.window_attention(*real, size, sinks=tuple(x[:, :sinks] for x in real[1:]), **given_row)
        new = mask[row].clone()
        new[:before] = False
        assert_close(found[row, new], expected[0, -int(new.sum()) :], dtype)
        assert not found[row, ~mask[row]].any()


def test_programs_share_a_ring_by_its_size(monkeypatch):
    monkeypatch.setattr(decode_launch, "processors", lambda device: 132)
    monkeypatch.setattr(decode_launch, "can_overlap", lambda device: False)

    def programs(rows, kv_heads, size):
        q, kv = torch.zeros(rows, 1, 2 * kv_heads, 64), torch.zeros(rows, 1, kv_heads, 64)
        ring = [torch.zeros(rows, size + 4, kv_heads, 64) for _ in range(2)]
        step = decode.step.WindowStep(
            q, kv, kv, None, *ring, torch.zeros(rows, dtype=torch.int64), *(None,) * 15, 1.0, -1.25, 1.0, 0.0, None, size
        )
        return decode_launch.plan_window(step).grid

    assert programs(1, 8, 512) == (8, 16), "one row fills the card"
    assert programs(64, 8, 512) == (512, 4), "a program has 128 slots at most"
    assert programs(64, 8, 128) == (512, 1)


WRONG = {
    "odd": ({"window_size": 5}, "window_size must be an even number of tokens, got 5"),
    "too large": ({"size": 300}, "heads of up to 256 channels, got K = 300"),
    "groups": ({"heads": 5}, "the 5 query heads must be a multiple"),
    "nothing": ({"tokens": 0}, r"q holds no tokens \(T = 0\)"),
    "cap": ({"softcap": -1.0}, "softcap must be positive"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_named(case):
    changes, message = WRONG[case]
    changes = dict(changes)
    size, heads, tokens = changes.pop("size", 8), changes.pop("heads", 4), changes.pop("tokens", 9)
    q, k, v = (torch.zeros(1, tokens, h, size, device=DEVICE) for h in (heads, 2, 2))
    with pytest.raises(ValueError, match=message):
        window.window_attention(q, k, v, **{"window_size": 4, **changes})


def test_heads_out_of_a_layer_have_no_gradient():
    q, k, v = (torch.zeros(1, 9, h, 8, device=DEVICE, requires_grad=True) for h in (2, 4, 4))
    with pytest.raises(ValueError, match="with kv_heads the kernels have no gradient"):
        window.window_attention(q, k, v, 4, kv_heads=torch.tensor([3], dtype=torch.int32, device=DEVICE))
