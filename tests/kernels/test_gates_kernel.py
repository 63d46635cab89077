"""Raw gates from values: the Triton kernel against the PyTorch truth in fp64, and the layer with the one and the other.

As tests/kernels/test_kernels.py, on a GPU compiled and in bf16 too, without one through Triton's interpreter.
"""

import os
import warnings

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

from dsla_hf.core.attention import NORM_EPS, DualStateAttention  # noqa: E402 (after the choice of how kernels run)
from dsla_kernels import dispatch, reference  # noqa: E402
from dsla_kernels.ops.states import gates  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
DTYPES = [
    torch.float32,
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=[pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="the interpreter's bf16 product is wrong")],
    ),
]
# Relative. The results are fp32 and the weights are not rounded: two parts of them in bf16 have 16 bits, in fp16 22.
OUTPUT_BOUND = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 5e-5}
# Of gradients in this dtype, that of their input.
GRADIENT_BOUND = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}
OUTPUTS = ("gate_logits", "write_logits")


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def make_inputs(tokens, value_dim, rank=16, decays=None, kv_heads=2, batch=1, write=True, dtype=torch.float32, weight_dtype=torch.float32):
    """v, cut out of a larger tensor and with heads before tokens in memory, and weights as large as trained ones."""
    decays = value_dim // 2 if decays is None else decays
    weights = {
        "gate_down": random(kv_heads, value_dim, rank) * value_dim**-0.5,
        "gate_up": random(kv_heads, rank, 2 * decays),
        "gate_bias": random(kv_heads, 2, decays) * 3,
        "write_weight": random(kv_heads, value_dim, 2) * value_dim**-0.5 if write else None,
        "write_bias": random(kv_heads, 2) if write else None,
    }
    v = random(batch, kv_heads, tokens, value_dim + 3).to(dtype)[..., :value_dim].transpose(1, 2) * 3
    return {"v": v, **{name: None if x is None else x.to(weight_dtype) for name, x in weights.items()}}


def form(module):
    return lambda inputs: module.gate_logits(**inputs, norm_eps=NORM_EPS)


def with_gradients(function, inputs, dtype=None):
    """Results and the gradients of a weighted sum of them, by name; inputs in `dtype` if one is given."""
    leaves = {name: None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
    found = [x for x in function(leaves) if x is not None]
    (sum((x * torch.linspace(-1, 2, x.numel(), device=DEVICE).view_as(x)).sum() for x in found) / found[0].numel()).backward()
    gradients = {f"gradient of {name}": x.grad for name, x in leaves.items() if x is not None}
    return {name: x.detach() for name, x in zip(OUTPUTS, found, strict=False)} | gradients


def assert_close(found, expected, dtype):
    """Every result within its bound; NaN and inf fail."""
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        error = float((found[name].double() - x.double()).norm() / x.double().norm())
        assert error <= (OUTPUT_BOUND[dtype] if name in OUTPUTS else GRADIENT_BOUND[found[name].dtype]), (name, error)
        assert found[name].shape == x.shape


def check(inputs):
    """Results of the kernel and all gradients against the truth in fp64."""
    found = with_gradients(form(gates), inputs)
    expected = with_gradients(form(reference), inputs, torch.float64)
    assert_close(found, expected, inputs["v"].dtype)
    assert float((found["gate_logits"] - expected["gate_logits"]).abs().max()) < 1e-3
    assert all(x.dtype == (torch.float32 if name in OUTPUTS else inputs[name.split()[-1]].dtype) for name, x in found.items())


CASES = {  # tokens, V, and more
    "one token": (1, 64, {"kv_heads": 1}),
    "15 tokens": (15, 12, {"rank": 4, "batch": 2, "kv_heads": 3}),
    "two tiles": (64, 48, {"rank": 4}),
    "two tiles and a token, no write gate": (65, 64, {"write": False}),
    "200 tokens": (200, 72, {"batch": 2, "kv_heads": 1, "rank": 5}),
    "heads of 128": (65, 128, {}),
    "heads of 128, every channel its decay": (40, 128, {"decays": 128, "kv_heads": 1, "write": False}),
    "heads of 256": (33, 256, {"kv_heads": 1}),
    "heads of 256, values a few at a time": (33, 256, {"kv_heads": 1, "rank": 64}),
    "odd sizes, values a few at a time": (40, 200, {"decays": 70, "rank": 33, "write": False}),
    "weights in bf16": (33, 64, {"weight_dtype": torch.bfloat16, "kv_heads": 1}),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_all_gradients(case, dtype):
    tokens, value_dim, options = CASES[case]
    check(make_inputs(tokens, value_dim, dtype=dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [33, 200, 260])
def test_programs_of_several_tiles(tokens, dtype, monkeypatch):
    monkeypatch.setattr(gates, "processors", lambda device: 1)
    check(make_inputs(tokens, 24, kv_heads=3, batch=2, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_of_any_size_and_any_strides(dtype):
    """Vectors of zeros, tiny and huge ones; strides that no load can have are copied."""
    inputs = make_inputs(40, 32, dtype=dtype)
    inputs["v"][:, ::4] = 0
    inputs["v"][:, 1::4] *= 1e-4
    inputs["v"][:, 2::4] *= 1e3
    found = form(gates)(inputs)
    expected = form(reference)({name: x.double() for name, x in inputs.items()})
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=1e-4)
    for v in (inputs["v"].contiguous(), inputs["v"].transpose(1, 3).contiguous().transpose(1, 3)):
        assert all(torch.equal(x, y) for x, y in zip(form(gates)(inputs | {"v": v}), found, strict=True))
    one = inputs["v"][:1, :1].expand(2, 9, -1, -1)
    for x, y in zip(form(gates)(inputs | {"v": one}), found, strict=True):
        assert torch.equal(x, y[:1, :1].expand_as(x))


def test_no_tokens_and_no_rows():
    for shape in ((2, 0, 2, 24), (0, 5, 2, 24)):
        inputs = make_inputs(3, 24) | {"v": random(*shape)}
        found = form(gates)(inputs)
        assert [x.shape for x in found] == [x.shape for x in form(reference)(inputs)]


def test_gradients_of_some_inputs_from_some_outputs():
    inputs = make_inputs(9, 16)
    for needed in (["v"], ["gate_up", "write_bias"], ["write_weight"], ["gate_bias"]):
        for used in (0, 1):
            results = []
            for module in (gates, reference):
                leaves = {name: x.detach().requires_grad_(name in needed) for name, x in inputs.items()}
                y = form(module)(leaves)[used].square().sum()
                names = [name for name in needed if y.requires_grad]
                gradients = torch.autograd.grad(y, [leaves[name] for name in names], allow_unused=True) if names else ()
                results.append([torch.zeros((), device=DEVICE) if x is None else x for x in gradients])
            for found, expected in zip(*results, strict=False):
                torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-4, atol=1e-4)


def test_second_derivatives():
    results = []
    inputs = make_inputs(9, 16)
    for module in (gates, reference):
        leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
        first = torch.autograd.grad(form(module)(leaves)[0].tanh().sum(), leaves["v"], create_graph=True)[0]
        results.append(torch.autograd.grad(first.square().sum(), [leaves[name] for name in ("v", "gate_down", "gate_up")]))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)  # sums in another order, through a tanh, twice


def test_nothing_but_the_inputs_is_kept_for_the_gradients():
    inputs = {name: x.requires_grad_() for name, x in make_inputs(9, 16).items()}
    inputs["v"] = inputs["v"].detach().contiguous().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        form(gates)(inputs)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in inputs.values()}


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="threads race on a GPU only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value_dim, rank", [(24, 4), (64, 16), (128, 16), (256, 64)])
def test_a_call_repeated_gives_the_same_bits(value_dim, rank, dtype):
    inputs = make_inputs(3000, value_dim, rank=rank, kv_heads=3, dtype=dtype)
    first, *others = (form(gates)(inputs) for _ in range(10))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


# --- registration and refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [True, False])
def test_the_operator_is_registered_in_full(write):
    inputs = [None if x is None else x.contiguous().requires_grad_() for x in make_inputs(5, 12, rank=4, write=write).values()]
    torch.library.opcheck(torch.ops.dsla_kernels.gate_logits, (*inputs, None, NORM_EPS))


@pytest.mark.parametrize("write, dynamic", [(True, True), (False, False)])
def test_compiled_whole_graph(write, dynamic):
    inputs = make_inputs(20, 12, rank=4, write=write)
    compiled = torch.compile(form(gates), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert_close(with_gradients(compiled, inputs), with_gradients(form(gates), inputs), torch.float32)


FLOATS = "(floating-point|fp32, bf16 or fp16)"  # of the reference, of the kernel
WRONG = {
    "three dimensions": ({"v": lambda x: x[0]}, rf"v must be {FLOATS} \[B, T, Hkv, V\]"),
    "whole numbers": ({"v": torch.Tensor.long}, f"v must be {FLOATS} .*int64"),
    "fp64": ({"v": torch.Tensor.double}, "v must be fp32, bf16 or fp16 .*float64"),
    "weights in fp64": ({"gate_up": torch.Tensor.double}, "gate_up must be fp32, bf16 or fp16 .*float64"),
    "heads": ({"v": lambda x: x[:, :, :1]}, rf"gate_down must be {FLOATS} \[1, 12, rank\]"),
    "head size": ({"gate_down": lambda x: x[:, :5]}, rf"gate_down must be {FLOATS} \[2, 12, rank\]"),
    "rank": ({"gate_up": lambda x: x[:, :3]}, rf"gate_up must be {FLOATS} \[2, 4, 12\]"),
    "decays": ({"gate_up": lambda x: x[..., :6]}, rf"gate_up must be {FLOATS} \[2, 4, 12\]"),
    "bias": ({"gate_bias": lambda x: x[:, 0]}, rf"gate_bias must be {FLOATS} \[2, 2, G\]"),
    "bias of whole numbers": ({"gate_bias": torch.Tensor.long}, f"gate_bias must be {FLOATS} .*int64"),
    "half a write gate": ({"write_bias": lambda x: None}, "together"),
    "write gate": ({"write_weight": lambda x: x[..., :1]}, rf"write_weight must be {FLOATS} \[2, 12, 2\]"),
    "write bias": ({"write_bias": lambda x: x[:1]}, rf"write_bias must be {FLOATS} \[2, 2\]"),
    "elsewhere": ({"gate_up": lambda x: x.to("meta")}, "gate_up must be .* on meta"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_named_before_a_launch(case, monkeypatch):
    monkeypatch.setattr(torch.ops.dsla_kernels, "gate_logits", None)
    changes, message = WRONG[case]
    inputs = make_inputs(5, 12, rank=4)
    inputs |= {name: edit(inputs[name]) for name, edit in changes.items()}
    with pytest.raises(ValueError, match=message):
        form(gates)(inputs)
    if "fp64" not in case:
        with pytest.raises(ValueError, match=message):
            form(reference)(inputs)


def test_sizes_beyond_what_the_kernel_takes():
    with pytest.raises(ValueError, match="up to 256 channels, got V = 258"):
        form(gates)(make_inputs(2, 258))
    with pytest.raises(ValueError, match="rank of up to 64, got 65 for gate_down"):
        form(gates)(make_inputs(2, 12, rank=65))


# --- the layer ------------------------------------------------------------------------------------------------------


def make_layer(dtype=torch.float32, **options):
    layer = DualStateAttention(4, 2, 16, 24, gate_rank=4, window_size=16, sink_tokens=3, **options).to(DEVICE, dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


@pytest.fixture
def launched(monkeypatch):
    """The calls of the kernel, in a list."""
    calls = []
    run = gates.gate_logits
    monkeypatch.setattr(gates, "gate_logits", lambda *inputs, **options: calls.append(1) or run(*inputs, **options))
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("write_gate", [True, False])
def test_the_layer_through_the_kernel_and_through_pytorch(write_gate, dtype, monkeypatch, launched):
    """The gates alone; tests/kernels/test_kernels_in_layer.py has the layer in full."""
    layer = make_layer(write_gate=write_gate)
    v = random(2, 45, 2, 24).to(dtype).requires_grad_()
    parameters = [x for name, x in layer.named_parameters() if name.startswith(("gate_", "write_"))]
    results = []
    for choice in ("pytorch", "triton"):
        monkeypatch.setattr(dispatch, "choice", choice)
        found = [x for x in layer.gate_logits(v) if x is not None]
        results.append([*found, *torch.autograd.grad([x.sin().sum() for x in found], [v, *parameters])])
    assert launched == [1]
    for expected, found in zip(*results, strict=True):
        assert found.dtype == expected.dtype
        assert (found - expected).double().norm() <= 10 * OUTPUT_BOUND[dtype] * expected.double().norm()


def test_what_the_reference_computes_everywhere(monkeypatch, launched):
    monkeypatch.setattr(dispatch, "choice", "triton")
    layer = make_layer(torch.float64)
    found = layer.gate_logits(random(1, 5, 2, 24).double())
    assert [x.dtype for x in found] == [torch.float64] * 2
    form(dispatch)(make_inputs(3, 12, rank=65))
    assert not launched
    form(dispatch)(make_inputs(3, 12, rank=64))
    assert launched


def test_a_slow_path_is_not_said_twice(monkeypatch):
    monkeypatch.setattr(dispatch, "choice", "auto")
    inputs = {name: x.to("meta") for name, x in make_inputs(3, 12).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert form(dispatch)(inputs)[0].shape == (1, 3, 2, 2, 6)
