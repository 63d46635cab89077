"""Kernels that are given keys and values of all heads of a layer read those that `kv_heads` names, in its order, and no other.

On a CUDA device as compiled, bf16 included; without one through Triton's interpreter, in fp32 and fp16.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

from kernel_choice import both  # noqa: E402

from dsla_hf.core.attention import DualStateAttention, clone_state  # noqa: E402 (after the choice of how kernels run)
from dsla_kernels import dispatch, reference  # noqa: E402
from dsla_kernels.ops import chunk, decode, states, window  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
BOUNDS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}
NOT_INTERPRETED = pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 product is wrong")
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=[pytest.mark.gpu, NOT_INTERPRETED])]
HEADS, ALL = [3, 0], 4  # in use, of the layer
GROUP, KEY, VALUE, WINDOW, SINKS = 2, 16, 24, 16, 3


@pytest.fixture
def kv_heads():
    return torch.tensor(HEADS, dtype=torch.int32, device=DEVICE)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def of_all_heads(dtype, batch, tokens):
    """k and v as a fused projection leaves them: not contiguous, and NaN in heads that are not in use."""
    fused = random(batch, tokens, ALL, 8 + KEY + VALUE, dtype=dtype)
    fused[:, :, [head for head in range(ALL) if head not in HEADS]] = float("nan")
    return fused[..., 8 : 8 + KEY], fused[..., 8 + KEY :]


def own(x):
    return x[:, :, HEADS]


def assert_close(found, expected, dtype):
    for f, e in zip(found, expected, strict=True):
        if f is not None:
            f, e = f.double(), e.double()
            assert (f - e).norm() <= BOUNDS[dtype] * e.norm().clamp_min(1e-9)


def gates(batch, tokens):
    return random(batch, tokens, len(HEADS), 2, KEY // 2) * 4, random(batch, tokens, len(HEADS), 2)


def doubled(options):
    return {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in options.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ["plain", "padded", "packed"])
def test_the_pure_layer(kv_heads, dtype, rows):
    batch, tokens = (1 if rows == "packed" else 2), 39
    k, v = of_all_heads(dtype, batch, tokens)
    q, (gate_logits, write_logits) = random(batch, tokens, len(HEADS) * GROUP, KEY, dtype=dtype), gates(batch, tokens)
    mix = random(len(HEADS) * GROUP, 2).softmax(-1)
    options = {"write_logits": write_logits, "output_final_state": True}
    if rows == "padded":
        options["padding_mask"] = torch.rand(batch, tokens, device=DEVICE) > 0.3
    if rows == "packed":
        options["cu_seqlens"] = torch.tensor([0, 5, 5, tokens], device=DEVICE)
    found = chunk.dual_state_attention(q, k, v, gate_logits, mix, kv_heads=kv_heads, segment_blocks=1, **options)
    arguments = [x.double() for x in (q, own(k), own(v), gate_logits, mix)]
    assert_close(found, reference.dual_state_attention(*arguments, **doubled(options)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padded", [False, True])
def test_the_layer_with_a_window(kv_heads, dtype, padded):
    tokens, heads = 39, len(HEADS) * GROUP
    k, v = of_all_heads(dtype, 2, tokens)
    q, (gate_logits, write_logits) = random(2, tokens, heads, KEY, dtype=dtype), gates(2, tokens)
    weights = random(heads, 2).softmax(-1), random(heads, VALUE), random(heads), random(heads)
    options = {"write_logits": write_logits, "output_final_state": True, "sinks": tuple(own(x)[:, :SINKS] for x in (k, v))}
    options["state_mask"] = (torch.arange(tokens, device=DEVICE) >= SINKS).expand(2, -1)
    if padded:
        options["padding_mask"] = torch.arange(tokens, device=DEVICE) < torch.tensor([[tokens], [20]], device=DEVICE)
    found = window.fused_window_attention(q, k, v, gate_logits, *weights, WINDOW, kv_heads=kv_heads, **options)
    options["sinks"] = tuple(x.double() for x in options["sinks"])
    arguments = [x.double() for x in (q, own(k), own(v), gate_logits, *weights)]
    assert_close(found, reference.fused_window_attention(*arguments, WINDOW, **doubled(options)), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_and_states(kv_heads, dtype):
    """As a fold reads them from a cache `[B, heads, T, D]`."""
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in of_all_heads(dtype, 2, 39))
    heads, rank, decays = len(HEADS), 4, KEY // 2
    weights = (random(heads, VALUE, rank), random(heads, rank, 2 * decays), random(heads, 2, decays), random(heads, VALUE, 2))
    weights = (*weights, random(heads, 2))
    found = states.gate_logits(v, *weights, norm_eps=1e-6, kv_heads=kv_heads)
    expected = reference.gate_logits(own(v).double(), *(x.double() for x in weights), norm_eps=1e-6)
    assert_close(found, expected, dtype)
    options = {
        "write_logits": found[1],
        "padding_mask": torch.rand(2, 39, device=DEVICE) > 0.2,
        "initial_state": random(2, heads, 2, KEY, VALUE),
    }
    boundaries = states.block_states(k, v, found[0], 16, kv_heads=kv_heads, **options)
    expected = reference.block_states(own(k).double(), own(v).double(), found[0].double(), 16, **doubled(options))
    assert_close([boundaries], [expected], dtype)
    assert_close([states.final_state(k, v, found[0], kv_heads=kv_heads, **options)], [expected[:, -1]], dtype)


def layer_of(**options):
    layer = DualStateAttention(len(HEADS) * GROUP, len(HEADS), KEY, VALUE, gate_rank=4, half_lives=((4.0, 64.0), (2.0, 16.0)), **options)
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer.to(DEVICE).requires_grad_(False)


LAYERS = {
    "window": {"window_size": WINDOW, "sink_tokens": SINKS},
    "pure": {"window_size": 0},
    "window alone": {"window_size": WINDOW, "sink_tokens": SINKS, "states": False},
}


@pytest.fixture(params=LAYERS.values(), ids=LAYERS)
def layer(request):
    return layer_of(**request.param)


def queries(dtype, batch, tokens):
    return random(batch, tokens, len(HEADS) * GROUP, KEY, dtype=dtype)


def test_what_the_kernels_read_was_not_selected_before(layer, kv_heads, monkeypatch):
    monkeypatch.setattr(dispatch, "choice", "triton")
    q, k, v = queries(torch.float32, 2, 37), *of_all_heads(torch.float32, 2, 37)
    taken = []
    select = torch.Tensor.index_select
    monkeypatch.setattr(torch.Tensor, "index_select", lambda x, *others: taken.append(x.shape[1]) or select(x, *others))
    state = layer(q, k, v, output_state=True, kv_heads=kv_heads)[1]
    layer(q[:, :1], k[:, :1], v[:, :1], state=state, output_state=True, kv_heads=kv_heads)
    whole = layer.fold(k, v, kv_heads=kv_heads)
    pieces = layer.fold(k[:, 30:], v[:, 30:], state=layer.fold(k[:, :30], v[:, :30], kv_heads=kv_heads), kv_heads=kv_heads)
    assert_close(pieces, whole, torch.float32)
    assert all(tokens <= layer.window_size + layer.sink_tokens for tokens in taken), taken  # what the state keeps of a text


@pytest.mark.parametrize("mask", ["none", "left", "at the end", "packed"])
def test_a_prompt(layer, kv_heads, mask, monkeypatch):
    batch = 1 if mask == "packed" else 2
    q, k, v = queries(torch.float32, batch, 37), *of_all_heads(torch.float32, batch, 37)
    options = {"output_state": mask != "packed", "padding_at_end": mask == "at the end"}
    if mask in ("left", "at the end"):
        real = torch.arange(37, device=DEVICE) < torch.tensor([[37], [20]], device=DEVICE)
        options["padding_mask"] = real.flip(1) if mask == "left" else real
    if mask == "packed":
        options["cu_seqlens"] = torch.tensor([0, 7, 8, 37], device=DEVICE)
    expected, found = both(monkeypatch, lambda: layer(q, k, v, kv_heads=kv_heads, **options))
    own_alone = layer(q, own(k), own(v), **options)
    for other in (expected, own_alone):
        assert_close([found[0]], [other[0]], torch.float32)
        if found[1] is not None:
            assert_close(found[1][:1], other[1][:1], torch.float32)
            assert torch.equal(found[1].lengths, other[1].lengths) and found[1].window_k.shape == other[1].window_k.shape


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_into_a_larger_output(layer, kv_heads, dtype, parts, monkeypatch):
    """Behind a prompt, across the boundary of a block, one row padded now and then; nobody else's heads are touched."""
    monkeypatch.setattr(decode.launch, "tuned", decode.launch.Launch(4, 16, 16, parts=parts))
    prompt = queries(dtype, 2, 11), *of_all_heads(dtype, 2, 11)
    steps = [(queries(dtype, 2, 1), *of_all_heads(dtype, 2, 1)) for _ in range(6)]
    heads = len(HEADS) * GROUP
    monkeypatch.setattr(dispatch, "choice", "pytorch")
    first = layer(prompt[0], own(prompt[1]), own(prompt[2]), output_state=True)[1]
    results = []
    for choice in ("pytorch", "triton"):
        monkeypatch.setattr(dispatch, "choice", choice)
        state, outputs = clone_state(first), []
        for step, (q, k, v) in enumerate(steps):
            mask = torch.tensor([[True], [step % 4 > 0]], device=DEVICE)
            whole = torch.full((2, 1, 5 + heads + 2, VALUE), 7.0, dtype=dtype, device=DEVICE)
            out = whole[:, :, 5 : 5 + heads]
            o, state = layer(q, k, v, padding_mask=mask, state=state, output_state=True, in_place=True, kv_heads=kv_heads, out=out)
            assert o is out and bool((whole[:, :, :5] == 7).all()) and bool((whole[:, :, 5 + heads :] == 7).all())
            outputs.append(out.clone())
        results.append([torch.cat(outputs, 1), state.recurrent, state.window_k, state.window_v])
    assert_close(results[1], results[0], dtype)


def test_gradients_select_first(layer, kv_heads, monkeypatch):
    layer.requires_grad_(True)
    q, k, v = queries(torch.float32, 2, 21), *(x.nan_to_num(0.5) for x in of_all_heads(torch.float32, 2, 21))

    def run():
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o = layer(*leaves, kv_heads=kv_heads)[0]
        return [o, *torch.autograd.grad(o, [*leaves, *layer.parameters()], torch.ones_like(o))]

    expected, found = both(monkeypatch, run)
    assert_close(found, expected, torch.float32)
    unused = [head for head in range(ALL) if head not in HEADS]
    assert not found[2][:, :, unused].any() and found[2][:, :, HEADS].any()


def test_kernels_have_no_gradient_of_some_heads(kv_heads):
    k, v = (x.requires_grad_() for x in of_all_heads(torch.float32, 1, 5))
    gate_logits, write_logits = gates(1, 5)
    heads = len(HEADS) * GROUP
    with pytest.raises(ValueError, match=r"have no gradient: give them k\.index_select"):
        chunk.dual_state_attention(queries(torch.float32, 1, 5), k, v, gate_logits, random(heads, 2), kv_heads=kv_heads)


@pytest.mark.skipif(INTERPRETED, reason="what is compiled launches kernels")
@pytest.mark.gpu
def test_compiled(layer, kv_heads):
    torch._dynamo.reset()
    q, k, v = queries(torch.bfloat16, 2, 37), *of_all_heads(torch.bfloat16, 2, 37)
    token = queries(torch.bfloat16, 2, 1), *of_all_heads(torch.bfloat16, 2, 1)

    def run():
        o, state = layer(q, k, v, output_state=True, kv_heads=kv_heads)
        whole = torch.zeros(2, 1, 3 + len(HEADS) * GROUP, VALUE, dtype=q.dtype, device=DEVICE)
        layer(*token, state=state, output_state=True, in_place=True, kv_heads=kv_heads, out=whole[:, :, 3:])
        return o, whole, state.recurrent

    with torch.no_grad():
        assert_close(torch.compile(run, fullgraph=True)(), run(), torch.bfloat16)


@pytest.mark.parametrize("name", ["window_decode", "pure_decode", "window_forward", "chunk_forward", "gate_logits"])
def test_operators_take_the_heads(name):
    arguments = getattr(torch.ops.dsla_kernels, name).default._schema.arguments
    assert str(next(argument.type for argument in arguments if argument.name == "kv_heads")) == "Optional[Tensor]"


@pytest.mark.parametrize("given_out", [False, True])
def test_the_operator_of_a_token_is_registered_in_full(kv_heads, given_out):
    heads, weights = len(HEADS), layer_of(window_size=0)
    gates = decode.GateWeights(weights.gate_down, weights.gate_up, weights.gate_bias, weights.write_weight, weights.write_bias)
    k, v = (x.nan_to_num(0.5).contiguous() for x in of_all_heads(torch.float32, 2, 1))
    out = random(2, 1, 3 + heads * GROUP, VALUE)[:, :, 3:] if given_out else None
    step = decode.step.PureStep(
        q=queries(torch.float32, 2, 1),
        k=k,
        v=v,
        recurrent=random(2, heads, 2, KEY, VALUE),
        lengths=None,
        real=None,
        **gates._asdict(),
        mix_logits=weights.mix_logits,
        norm_weight=weights.norm_weight,
        kv_heads=kv_heads,
        state_heads=None,
        pages=None,
        out=out,
        gate_normalizer=16.0,
        lower_bound=-1.25,
        scale=1.0,
        norm_eps=1e-6,
    )
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dsla_kernels.pure_decode, tuple(step), test_utils=tests)
