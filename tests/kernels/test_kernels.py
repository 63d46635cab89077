"""The Triton kernels against the PyTorch truth in fp64: outputs, states and every gradient.

On a CUDA device they run as compiled, bf16 included. Without one they run through Triton's interpreter, in fp32 (its bf16
product is wrong): TRITON_INTERPRET=1 pytest tests/kernels/test_kernels.py
"""

import copy
import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

from dsla_hf.core.attention import DualStateAttention  # noqa: E402 (after the choice of how kernels run)
from dsla_kernels import reference  # noqa: E402
from dsla_kernels.ops import chunk, decode, states, window  # noqa: E402
from dsla_kernels.ops.decode import launch as decode_launch  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16,
        marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 product is wrong")],
    ),
]
OUTPUT_BOUND = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 2e-3}
GRADIENT_BOUND = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}
RESULTS = ("o", "final_state")
# Sums over all tokens of terms of both signs: on a short text little is left of them, and the error of a term is not small beside it.
SUMS = ("mix", "norm_weight", "state_gain", "state_bias", "sink_logits")


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def relative_error(found, expected):
    found, expected = found.detach().double(), expected.detach().double()
    norm = expected.norm()
    return float((found - expected).norm() / norm) if norm > 0 else float(found.norm())


def slack(name, expected):
    """The relative error of a few values scatters: of 64, four roundings to bf16 give 0.003 in the mean, 0.005 once in a hundred times."""
    return 3 if name in SUMS else 2 if expected.numel() < 100 else 1


def assert_close(found, expected, dtype):
    """Every result within its bound; NaN and inf fail."""
    errors = {name: relative_error(found[name], x) for name, x in expected.items()}
    bounds = {name: (OUTPUT_BOUND if name in RESULTS else GRADIENT_BOUND)[dtype] * slack(name, expected[name]) for name in errors}
    beyond = {name: error for name, error in errors.items() if not error <= bounds[name]}
    assert not beyond, beyond


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def make_inputs(dtype, tokens, key_dim, value_dim, group, batch=1, kv_heads=1, decays=None, gates="random", write=True):
    """q, k, v, gate_logits, mix, write_logits; k and v not contiguous."""
    shape = (batch, tokens, kv_heads, 2, decays or key_dim // 2)
    gate_logits = {"random": lambda: random(*shape) * 8, "bound": lambda: random(*shape) - 100, "open": lambda: random(*shape) + 20}
    heads = kv_heads * group
    return {
        "q": random(batch, tokens, heads, key_dim).to(dtype),
        "k": random(batch, kv_heads, tokens, key_dim).to(dtype).transpose(1, 2),
        "v": random(batch, kv_heads, tokens, value_dim).to(dtype).transpose(1, 2),
        "gate_logits": gate_logits[gates](),
        "mix": random(heads, 2).softmax(-1),
        "write_logits": random(batch, tokens, kv_heads, 2) if write else None,
    }


def with_gradients(form, inputs, weights, dtype=None, **options):
    """Results and the gradients of a random weighted sum of them, by name; inputs in `dtype` if one is given."""
    leaves = {name: None if x is None else (x if dtype is None else x.to(dtype)).detach().requires_grad_() for name, x in inputs.items()}
    o, final = form(leaves, **options)
    sum(((x * w.to(x.dtype)).sum() for x, w in zip((o, final), weights, strict=True) if x.requires_grad), start=0.0).backward()
    gradients = {name: x.grad if x.grad is not None else torch.zeros_like(x) for name, x in leaves.items() if x is not None}
    return {"o": o, "final_state": final, **gradients}


# --- the pure layer -------------------------------------------------------------------------------------------------

PURE = {  # tokens, K, V, group, and more
    "one token": (1, 32, 32, 2, {"state": True}),
    "15 tokens": (15, 64, 64, 1, {"state": True, "write": False}),
    "63 tokens, every channel its decay": (63, 48, 48, 1, {"decays": 48}),
    "a chunk": (64, 32, 64, 8, {"state": True}),
    "65 tokens": (65, 64, 48, 1, {}),
    "three segments": (200, 32, 32, 2, {"segment_blocks": 2, "state": True}),
    "one segment, odd sizes": (130, 20, 12, 3, {"state": True}),
    "values in two tiles": (70, 16, 72, 1, {"segment_blocks": 1, "state": True}),
    "padded": (100, 32, 32, 1, {"padded": True, "batch": 2, "kv_heads": 2, "segment_blocks": 1}),
    "packed": (150, 32, 32, 1, {"packed": [0, 70, 70, 71, 150], "state": True, "segment_blocks": 1}),
    "gates at the bound": (130, 32, 32, 1, {"gates": "bound", "segment_blocks": 1, "state": True}),
    "open gates": (130, 32, 32, 1, {"gates": "open", "segment_blocks": 1, "state": True}),
}


def pure(module, padding_mask=None, cu_seqlens=None, **more):
    def form(x):
        arguments = [x[name] for name in ("q", "k", "v", "gate_logits", "mix")]
        return module.dual_state_attention(
            *arguments,
            write_logits=x["write_logits"],
            initial_state=x.get("initial_state"),
            output_final_state=True,
            padding_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            **more,
        )

    return form


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PURE)
def test_pure_layer_with_all_gradients(case, dtype):
    tokens, key_dim, value_dim, group, options = PURE[case]
    options = dict(options)
    segment_blocks, packed, state = options.pop("segment_blocks", 0), options.pop("packed", None), options.pop("state", False)
    padded = options.pop("padded", False)
    inputs = make_inputs(dtype, tokens, key_dim, value_dim, group, **options)
    batch, kv_heads = inputs["k"].shape[0], inputs["k"].shape[2]
    rows = {
        "padding_mask": torch.rand(batch, tokens, device=DEVICE) > 0.3 if padded else None,
        "cu_seqlens": None if packed is None else torch.tensor(packed, device=DEVICE),
    }
    count = batch if packed is None else len(packed) - 1
    if state:
        inputs["initial_state"] = random(count, kv_heads, 2, key_dim, value_dim)
    weights = random(*inputs["q"].shape[:3], value_dim), random(count, kv_heads, 2, key_dim, value_dim)
    expected = with_gradients(pure(reference, **rows), inputs, weights, torch.float64)
    found = with_gradients(pure(chunk, segment_blocks=segment_blocks, **rows), inputs, weights)
    assert found["o"].dtype == dtype and found["final_state"].dtype == torch.float32
    assert_close(found, expected, dtype)


def test_pure_layer_in_fp16_keeps_the_range():
    inputs = make_inputs(torch.float16, 70, 32, 32, 1, gates="bound")
    weights = random(1, 70, 1, 32), random(1, 1, 2, 32, 32)
    expected = with_gradients(pure(reference), inputs, weights, torch.float64)
    assert_close(with_gradients(pure(chunk), inputs, weights), expected, torch.float16)


# --- the layer with a softmax window --------------------------------------------------------------------------------

WINDOW = {  # tokens, W, K, V, group, sinks, and more
    "one token": (1, 16, 32, 32, 2, 2, {}),
    "inside the window": (15, 64, 64, 64, 1, 4, {}),
    "63 tokens after a state": (63, 64, 32, 48, 1, 4, {"state": True, "row_start": [96]}),
    "two blocks": (64, 64, 48, 48, 1, 0, {"write": False}),
    "65 tokens": (65, 32, 32, 32, 8, 16, {}),
    "segments": (200, 64, 64, 64, 1, 4, {"segment_blocks": 1}),
    "odd sizes, every channel its decay": (70, 20, 20, 12, 3, 3, {"state": True, "decays": 20, "segment_blocks": 1}),
    "values in two tiles": (100, 64, 16, 72, 1, 4, {"segment_blocks": 1, "state": True}),
    "blocks of several tiles": (300, 200, 32, 32, 1, 2, {"state": True, "row_start": [300]}),
    "padded": (90, 32, 32, 32, 1, 3, {"lengths": [90, 20], "row_start": [0, 48], "state_mask": True, "state": True, "segment_blocks": 2}),
    "gates at the bound": (100, 32, 32, 32, 1, 4, {"gates": "bound", "state": True, "segment_blocks": 2}),
    "open gates": (100, 32, 32, 32, 1, 4, {"gates": "open", "state": True, "segment_blocks": 2}),
    "capped scores and a sink logit": (100, 32, 32, 32, 2, 3, {"softcap": 3.0, "sink_logit": True, "state": True, "segment_blocks": 2}),
    "padded, capped, a sink logit": (50, 24, 20, 12, 3, 0, {"lengths": [50, 20], "softcap": 50.0, "sink_logit": True, "kv_heads": 2}),
}
PARAMETERS = ("q", "k", "v", "gate_logits", "mix", "norm_weight", "state_gain", "state_bias")


def windowed(module, size, **options):
    def form(x):
        return module.fused_window_attention(
            *(x[name] for name in PARAMETERS),
            size,
            write_logits=x["write_logits"],
            initial_state=x.get("initial_state"),
            sinks=(x["sink_k"], x["sink_v"]) if "sink_k" in x else None,
            sink_logits=x.get("sink_logits"),
            output_final_state=True,
            **options,
        )

    return form


def make_window_inputs(dtype, tokens, key_dim, value_dim, group, sinks, state=False, sink_logit=False, **options):
    inputs = make_inputs(dtype, tokens, key_dim, value_dim, group, **options)
    (batch, _, heads, _), kv_heads = inputs["q"].shape, inputs["k"].shape[2]
    inputs["norm_weight"] = 1 + 0.3 * random(heads, value_dim)
    inputs["state_gain"], inputs["state_bias"] = 1 + 0.3 * random(heads), 2 + random(heads)
    if sinks:
        inputs["sink_k"] = random(batch, sinks, kv_heads, key_dim).to(dtype)
        inputs["sink_v"] = random(batch, sinks, kv_heads, value_dim).to(dtype)
    if state:
        inputs["initial_state"] = random(batch, kv_heads, 2, key_dim, value_dim)
    if sink_logit:
        inputs["sink_logits"] = 2 * random(heads)
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", WINDOW)
def test_window_layer_with_all_gradients(case, dtype):
    tokens, size, key_dim, value_dim, group, sinks, options = WINDOW[case]
    options = dict(options)
    segment_blocks, lengths = options.pop("segment_blocks", 0), options.pop("lengths", None)
    row_start, state_mask = options.pop("row_start", None), options.pop("state_mask", False)
    softcap = options.pop("softcap", None)
    batch = 1 if lengths is None else len(lengths)
    inputs = make_window_inputs(dtype, tokens, key_dim, value_dim, group, sinks, batch=batch, **options)
    rows = {
        "softcap": softcap,
        "padding_mask": None,
        "state_mask": torch.rand(batch, tokens, device=DEVICE) > 0.2 if state_mask else None,
        "row_start": None if row_start is None else torch.tensor(row_start, device=DEVICE),
    }
    if lengths is not None:
        rows["padding_mask"] = torch.arange(tokens, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    weights = random(*inputs["q"].shape[:3], value_dim), random(batch, inputs["k"].shape[2], 2, key_dim, value_dim)
    expected = with_gradients(windowed(reference, size, **rows), inputs, weights, torch.float64)
    found = with_gradients(windowed(window, size, segment_blocks=segment_blocks, **rows), inputs, weights)
    assert found["o"].dtype == dtype and found["final_state"].dtype == torch.float32
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_fused_window_truth_is_the_layer(softcap):
    more = {} if softcap is None else {"softcap": softcap, "sink_logits": torch.randn(4, dtype=torch.float64)}
    layer = DualStateAttention(4, 2, 12, 8, window_size=8, sink_tokens=2).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    q, k, v = (torch.randn(2, 37, heads, size, dtype=torch.float64) for heads, size in ((4, 12), (2, 12), (2, 8)))
    lengths = torch.tensor([37, 12])
    mask = torch.arange(37) < lengths[:, None]
    expected, state = layer(q, k, v, padding_mask=mask, output_state=True, **more)
    gate_logits, write_logits = layer.gate_logits(v)
    found, final = reference.fused_window_attention(
        q, k, v, gate_logits, layer.mix(), layer.norm_weight, layer.state_gain, layer.state_bias, 8,
        write_logits=write_logits, padding_mask=mask, state_mask=torch.arange(37).expand(2, -1) >= 2,
        sinks=(k[:, :2], v[:, :2]), output_final_state=True, **more,
    )  # fmt: skip
    assert relative_error(found, expected) < 1e-12 and relative_error(final, state.recurrent) < 1e-12


# --- the state pass alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, size, segment_blocks", [(1, 64, 0), (130, 64, 1), (130, 64, 0), (45, 20, 1), (150, 100, 1)])
def test_block_states_and_fold(tokens, size, segment_blocks, dtype):
    inputs = make_inputs(dtype, tokens, 32, 20, 1, batch=2)
    arguments = [inputs[name] for name in ("k", "v", "gate_logits")]
    options = {"write_logits": inputs["write_logits"], "initial_state": random(2, 1, 2, 32, 20)}
    mask = torch.rand(2, tokens, device=DEVICE) > 0.3
    expected = reference.block_states(
        *(x.double() for x in arguments), size, **{name: x.double() for name, x in options.items()}, padding_mask=mask
    )
    found = states.block_states(*arguments, size, **options, padding_mask=mask, segment_blocks=segment_blocks or None)
    folded = states.final_state(*arguments, **options, padding_mask=mask, segment_blocks=segment_blocks or None)
    assert relative_error(found, expected) <= OUTPUT_BOUND[dtype]
    assert relative_error(folded, expected[:, -1]) <= OUTPUT_BOUND[dtype]


def test_the_state_pass_refuses_to_drop_gradients():
    inputs = make_inputs(torch.float32, 5, 32, 32, 1)
    with pytest.raises(ValueError, match="no gradient"):
        states.block_states(inputs["k"].requires_grad_(), inputs["v"], inputs["gate_logits"], 64)


# --- decode ---------------------------------------------------------------------------------------------------------

ONE_PROGRAM = {"channels": 16}  # a head


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "size, sinks, group, write, rank, softcap, launch",
    [
        (8, 2, 2, True, 16, None, {}),
        (8, 2, 2, True, 16, 2.0, ONE_PROGRAM),
        (8, 2, 9, True, 16, None, ONE_PROGRAM),
        (8, 2, 9, True, 16, 2.0, {"channels": 16, "parts": 2}),
        (8, 2, 1, True, 16, None, {"channels": 16, "few_rows": 1}),
        (8, 2, 1, True, 16, None, {"channels": 16, "parts": 2, "few_rows": 1}),
        (8, 2, 2, True, 16, 2.0, {"channels": 16, "parts": 4, "key_dim": 64, "batch": 1}),
        (40, 4, 1, False, 5, None, ONE_PROGRAM | {"slots": 16}),
        (72, 4, 3, True, 5, None, {"channels": 16, "slots": 16, "parts": 2, "key_dim": 52, "kv_heads": 2}),
        (0, 0, 8, True, 16, None, {}),
        (0, 0, 8, True, 16, None, ONE_PROGRAM | {"channels": 32}),
        (0, 0, 3, False, 16, None, ONE_PROGRAM),
        (0, 0, 9, True, 16, None, ONE_PROGRAM),
        (0, 0, 9, True, 16, None, {"channels": 16, "parts": 2}),
        (0, 0, 1, True, 16, None, {"channels": 16, "few_rows": 1}),
        (0, 0, 1, True, 16, None, {"channels": 16, "parts": 2, "few_rows": 1}),
        (0, 0, 2, True, 16, None, {"channels": 16, "parts": 2, "key_dim": 52, "kv_heads": 2, "batch": 1}),
        (0, 0, 1, True, 16, None, {"channels": 16, "parts": 4, "key_dim": 64}),
    ],
)
def test_decode_follows_the_layer(size, sinks, group, write, rank, softcap, launch, dtype, monkeypatch):
    """With a cap on the scores there is also a logit that takes a share of the softmax. launch: how heads are worked through, in
    place of the choice by shape, and other sizes; few_rows: among more, padding is left out at once."""
    launch = dict(launch)
    monkeypatch.setattr(decode_launch, "FEW_ROWS", launch.pop("few_rows", decode_launch.FEW_ROWS))
    batch, kv_heads, key_dim, value_dim = launch.pop("batch", 2), launch.pop("kv_heads", 1), launch.pop("key_dim", 32), 48
    monkeypatch.setattr(decode_launch, "tuned", decode_launch.Launch(4, **launch) if launch else None)
    layer = DualStateAttention(
        kv_heads * group, kv_heads, key_dim, value_dim, window_size=size, sink_tokens=sinks, write_gate=write, gate_rank=rank
    ).to(DEVICE)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    truth = copy.deepcopy(layer).double()
    gates = decode.GateWeights(
        layer.gate_down, layer.gate_up, layer.gate_bias, *((layer.write_weight, layer.write_bias) if write else (None, None))
    )

    sink_logits = None if softcap is None else random(kv_heads * group)
    more = {} if softcap is None else {"softcap": softcap, "sink_logits": sink_logits}

    def draw(tokens):
        sizes = ((kv_heads * group, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
        return [random(batch, tokens, *shape).to(dtype) for shape in sizes]

    with torch.no_grad():
        _, state = truth(*(x.double() for x in draw(3 if size < 40 else size + size // 2 - 6)), output_state=True)
        recurrent, ring_k, ring_v = state.recurrent.float(), state.window_k.to(dtype), state.window_v.to(dtype)
        state = state._replace(window_k=ring_k.double(), window_v=ring_v.double())
        lengths = state.lengths.clone()
        for step in range(max(size + 6, 8) if size < 40 else 10):
            q, k, v = draw(1)
            mask = None if step < 4 else torch.rand(batch, 1, device=DEVICE) > 0.2
            expected, state = truth(q.double(), k.double(), v.double(), padding_mask=mask, state=state, output_state=True, **more)
            if size:
                o = decode.window_decode(
                    q, k, v, recurrent, ring_k, ring_v, lengths, gates, layer.mix_logits, layer.norm_weight, layer.state_gain,
                    layer.state_bias, size, padding_mask=mask, **more,
                )  # fmt: skip
                assert torch.equal(lengths, state.lengths)
                assert torch.equal(ring_k.double(), state.window_k) and torch.equal(ring_v.double(), state.window_v)
            else:
                o = decode.pure_decode(q, k, v, recurrent, gates, layer.mix_logits, layer.norm_weight, padding_mask=mask)
            assert relative_error(o, expected) <= OUTPUT_BOUND[dtype]
            assert relative_error(recurrent, state.recurrent) <= OUTPUT_BOUND[dtype]
    assert state.recurrent.any()


# --- registration and refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="threads race on a GPU only")
@pytest.mark.parametrize("size, group", [(32, 1), (64, 3), (128, 2)])
@pytest.mark.parametrize("window_size", [0, 32])
def test_a_call_repeated_gives_the_same_bits(window_size, size, group, dtype):
    """A race between threads shows as a difference now and then: heads of 32 once had one."""
    tokens = 300
    if window_size:
        inputs = make_window_inputs(dtype, tokens, size, size, group, 3, kv_heads=2)
        form = windowed(window, window_size)
    else:
        inputs = make_inputs(dtype, tokens, size, size, group, kv_heads=2)
        form = pure(chunk)
    weights = random(1, tokens, 2 * group, size), random(1, 2, 2, size, size)
    first, *others = (with_gradients(form, inputs, weights) for _ in range(10))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


def test_compiled_whole_graphs_agree_with_eager_ones():
    inputs = make_window_inputs(torch.float32, 40, 32, 32, 1, 2)
    weights = random(1, 40, 1, 32), random(1, 1, 2, 32, 32)
    pure_inputs = {name: inputs[name] for name in ("q", "k", "v", "gate_logits", "mix", "write_logits")}
    for form, plain in ((windowed(window, 32), inputs), (pure(chunk), pure_inputs)):
        expected = with_gradients(form, plain, weights)
        assert_close(with_gradients(torch.compile(form, fullgraph=True, backend="aot_eager"), plain, weights), expected, torch.float32)


def test_compiled_decode_changes_its_buffers_in_place():
    layer = DualStateAttention(2, 1, 32, 32, window_size=8, sink_tokens=2).to(DEVICE)
    gates = decode.GateWeights(layer.gate_down, layer.gate_up, layer.gate_bias, layer.write_weight, layer.write_bias)

    def step(q, k, v, recurrent, ring_k, ring_v, lengths):
        return decode.window_decode(
            q, k, v, recurrent, ring_k, ring_v, lengths, gates, layer.mix_logits, layer.norm_weight, layer.state_gain, layer.state_bias, 8
        )

    arguments = [random(2, 1, 2, 32), random(2, 1, 1, 32), random(2, 1, 1, 32), random(2, 1, 2, 32, 32)]
    arguments += [random(2, 10, 1, 32), random(2, 10, 1, 32), torch.tensor([11, 12], device=DEVICE)]
    copies = [x.clone() for x in arguments]
    with torch.no_grad():
        expected = step(*arguments)
        found = torch.compile(step, fullgraph=True, backend="aot_eager")(*copies)
    assert torch.equal(found, expected) and all(torch.equal(x, y) for x, y in zip(copies, arguments, strict=True))
    assert copies[-1].tolist() == [12, 13]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q": lambda x: x.double(), "k": lambda x: x.double(), "v": lambda x: x.double()}, "q must be fp32, bf16 or fp16 .*float64"),
        ({"k": lambda x: x.half()}, "k must be torch.float32 .*float16"),
        ({"gate_logits": lambda x: x[..., :3]}, "gate_logits"),
        ({"gate_logits": lambda x: x.double()}, "gate_logits"),
        ({"mix": lambda x: x[:, :1]}, "mix"),
        ({"norm_weight": lambda x: x[:, :5]}, "norm_weight"),
        ({"state_gain": lambda x: x.long()}, "state_gain"),
        ({"sink_k": lambda x: x[:, :1]}, "sinks"),
        ({"sink_logits": lambda x: x[:1]}, "sink_logits"),
    ],
)
def test_wrong_inputs_are_named_before_a_launch(change, message, monkeypatch):
    monkeypatch.setattr(torch.ops.dsla_kernels, "window_forward", None)
    inputs = make_window_inputs(torch.float32, 10, 32, 32, 2, 2, sink_logit=True)
    with pytest.raises(ValueError, match=message):
        windowed(window, 8)(inputs | {name: edit(inputs[name]) for name, edit in change.items()})


@pytest.mark.parametrize(
    "options, message",
    [({"lower_bound": -2.0}, "lower_bound"), ({"gate_normalizer": 0.0}, "gate_normalizer")],
)
def test_wrong_options_are_named_before_a_launch(options, message):
    inputs = make_inputs(torch.float32, 10, 32, 32, 1)
    with pytest.raises(ValueError, match=message):
        pure(chunk, **options)(inputs)
    with pytest.raises(ValueError, match="head"):
        pure(chunk)(make_inputs(torch.float32, 2, 258, 258, 1))
    with pytest.raises(ValueError, match="window_size"):
        windowed(window, 7)(make_window_inputs(torch.float32, 10, 32, 32, 1, 2))
    with pytest.raises(ValueError, match="softcap"):
        windowed(window, 8, softcap=-1.0)(make_window_inputs(torch.float32, 10, 32, 32, 1, 2))
