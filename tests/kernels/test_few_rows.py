"""Linear layers of a few rows: the Triton kernels against PyTorch in fp64.

As tests/kernels/test_kernels.py, on a GPU compiled and in bf16 too, without one through Triton's interpreter.
"""

import os

import pytest
import torch
import torch.nn.functional as F

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

from dsla_kernels import dispatch, reference  # noqa: E402 (after the choice of how kernels run)
from dsla_kernels.ops.linear import few_rows  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)]
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}
SMALL = few_rows.Launch(16, 64, 4, 3)


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """What is allocated and not written holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device=DEVICE).to(dtype)


def make_inputs(rows, k, sizes, dtype=torch.float32, bias=False):
    """x, weights and biases. Weights are as large as those of a model, so that activations see numbers around 1."""
    weights = [(random(n, k) * k**-0.5).to(dtype) for n in sizes]
    return random(rows, 1, k, dtype=dtype), weights, [random(n, dtype=dtype) for n in sizes] if bias else None


def assert_close(found, expected, dtype):
    assert found.dtype == dtype and found.shape == expected.shape
    assert float((found.double() - expected).norm() / expected.norm().clamp_min(1e-3)) <= BOUNDS[dtype]


def check(x, weights, biases=None, **options):
    found = few_rows.linears(x, weights, biases, **options)
    for number, weight in enumerate(weights):
        expected = F.linear(x.double(), weight.double(), None if biases is None else biases[number].double())
        assert_close(found[number], expected, x.dtype)
    return found


def check_gated(x, gate, up, activation, **options):
    found = few_rows.gated_linear(x, gate, up, activation, **options)
    assert_close(found, reference.gated_linear(x.double(), gate.double(), up.double(), activation), x.dtype)
    return found


@pytest.fixture(params=[None, SMALL], ids=["chosen", "small tiles"])
def tiles(request, monkeypatch):
    monkeypatch.setattr(few_rows, "tuned", request.param)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 3, 16])
@pytest.mark.parametrize("k, sizes", [(128, (64,)), (136, (40, 24, 9)), (50, (33, 1)), (1, (1, 2, 3)), (1536, (8,))])
def test_sizes_that_are_and_are_no_multiples_of_tiles(rows, k, sizes, dtype, tiles):
    for bias in (False, True):
        check(*make_inputs(rows, k, sizes, dtype, bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("k, size", [(128, 64), (136, 41), (50, 25), (1536, 18)])
def test_gated(rows, k, size, dtype, tiles):
    x, (gate, up), _ = make_inputs(rows, k, (size, size), dtype)
    for activation in ("silu", "gelu_tanh"):
        check_gated(x, gate, up, activation)
        check_gated(30 * x, gate, up, activation)  # to where the activation is flat


def test_gated_rounds_where_the_layers_do():
    x, weights, _ = make_inputs(2, 64, (64, 64), torch.float16)
    for activation in ("silu", "gelu_tanh"):
        found, expected = (f(x, *weights, activation) for f in (few_rows.gated_linear, reference.gated_linear))
        assert (found == expected).float().mean() > 0.97


def test_shapes_of_x():
    x, weights, _ = make_inputs(6, 32, (8, 8))
    expected = check(x, weights)
    rows = x[:, 0]
    for shaped in (rows, rows.view(2, 3, 32), F.pad(rows, (0, 3))[:, :32], rows.t().contiguous().t()):
        for found, other in zip(check(shaped, weights), expected, strict=True):
            assert torch.equal(found.reshape(other.shape), other)
    check(rows[0], weights)
    check(x[:1].expand(4, 1, 32), weights)


@pytest.mark.parametrize("rows", [1, 5])
def test_weights_that_are_columns_of_wider_ones(rows):
    """As those of an output projection in order of conversion are."""
    x, weights, _ = make_inputs(rows, 72, (40, 24))
    columns = [F.pad(weight, (16, 40), value=float("nan"))[:, 16:88] for weight in weights]
    assert not columns[0].is_contiguous()
    for found, expected in zip(check(x, columns), check(x, weights), strict=True):
        assert torch.equal(found, expected)
    wide = [F.pad(weight, (0, 8))[:, :72] for weight in (weights[0], weights[0] * 0.5)]
    found, expected = (few_rows.gated_linear(x, *pair, "silu") for pair in (wide, [weights[0], weights[0] * 0.5]))
    assert torch.equal(found, expected)


def test_rows_do_not_depend_on_their_number():
    """As far as they are computed alike."""
    x, weights, _ = make_inputs(16, 200, (40, 24))
    for all_rows, some in zip(check(x, weights), check(x[:5], weights), strict=True):
        assert torch.equal(all_rows[:5], some)


@torch.no_grad()
def test_the_choice_of_how_they_run(monkeypatch):
    x, weights, biases = make_inputs(2, 64, (40, 40), bias=True)
    launched = []
    run = few_rows._run
    monkeypatch.setattr(few_rows, "_run", lambda *arguments: launched.append(1) or run(*arguments))
    results = []
    for choice in ("pytorch", "triton"):
        monkeypatch.setattr(dispatch, "choice", choice)
        results.append([*dispatch.linears(x, weights, biases), *dispatch.linears(x, weights), dispatch.gated_linear(x, *weights)])
    assert len(launched) == 3
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with torch.enable_grad():
        torch.testing.assert_close(dispatch.linears(x, weights)[0], results[0][2])
    many = random(17, 64)
    assert torch.equal(dispatch.linears(many, weights)[0], F.linear(many, weights[0]))
    assert len(launched) == 3


@torch.no_grad()
@pytest.mark.parametrize(
    "refused",
    {
        "many rows": lambda x, w: (x.expand(2, 9, -1), w),
        "no rows": lambda x, w: (x[:0], w),
        "another dtype": lambda x, w: (x.half(), w),
        "fp64": lambda x, w: (x.double(), w.double()),
        "strided": lambda x, w: (x, w.t().contiguous().t()),
        "elsewhere": lambda x, w: (x, w.to("meta")),
        "another size": lambda x, w: (x[..., :8], w),
    }.items(),
    ids=lambda case: case[0],
)
def test_what_runs_as_before(refused, monkeypatch):
    monkeypatch.setattr(dispatch, "choice", "triton")
    x, (weight,), _ = make_inputs(2, 64, (40,))
    assert dispatch.takes_few_rows(x, weight)
    x, weight = refused[1](x, weight)
    assert not dispatch.takes_few_rows(x, weight)


@torch.no_grad()
def test_not_under_autocast(monkeypatch):
    monkeypatch.setattr(dispatch, "choice", "triton")
    x, weights, _ = make_inputs(2, 64, (40,))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert not dispatch.takes_few_rows(x, *weights)


def test_weights_that_train_without_gradient(monkeypatch):
    monkeypatch.setattr(dispatch, "choice", "triton")
    x, weights, _ = make_inputs(2, 64, (40,))
    weights[0].requires_grad_()
    assert not dispatch.takes_few_rows(x, *weights)
    with torch.no_grad():
        assert dispatch.takes_few_rows(x, *weights)
        check(x, weights)
    with pytest.raises(ValueError, match="weight 0 requires a gradient"):
        few_rows.linears(x, weights)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_graph(dynamic):
    x, weights, biases = make_inputs(3, 64, (40, 40), bias=True)

    def step(x):
        return *few_rows.linears(x, weights, biases), few_rows.gated_linear(x, *weights) * 2

    for found, expected in zip(torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)(x), step(x), strict=True):
        assert torch.equal(found, expected)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.dsla_kernels.linears, (x[:, 0], weights, biases, False), test_utils=tests)
    torch.library.opcheck(torch.ops.dsla_kernels.gated_linear, (x[:, 0], *weights, "silu", False), test_utils=tests)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("rows", [1, 2, 16])
@pytest.mark.parametrize("k, n", [(4096, 1024), (11008, 4096), (4096, 11008), (2048, 128256)])
def test_a_cuda_graph_of_layers_that_overlap(rows, k, n):
    """Each layer reads what the one before it has written, in sizes of real models."""
    x, (up, gate, down), _ = make_inputs(rows, k, (n, n, n), torch.bfloat16)
    down = down.view(k, n)
    up, gate, down = (weight * 2 for weight in (up, gate, down))

    def step():
        hidden = few_rows.gated_linear(x, gate, up, overlap=True)
        out = few_rows.linears(hidden, [down], overlap=True)[0]
        return hidden, out, *few_rows.linears(out, [gate, up], overlap=True)

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert_close(found[0], reference.gated_linear(x.double(), gate.double(), up.double()), x.dtype)
        assert_close(found[1], F.linear(found[0].double(), down.double()), x.dtype)
        assert_close(found[2], F.linear(found[1].double(), gate.double()), x.dtype)
        assert_close(found[3], F.linear(found[1].double(), up.double()), x.dtype)


WRONG = {
    "many rows": ({"x": lambda x: x.expand(2, 9, -1)}, "1 to 16 rows, got 18"),
    "no rows": ({"x": lambda x: x[:0]}, "1 to 16 rows, got 0"),
    "a number": ({"x": lambda x: x[0, 0, 0]}, "x"),
    "fp64": ({"x": torch.Tensor.double}, "x must be fp32, bf16 or fp16, got torch.float64"),
    "integers": ({"x": torch.Tensor.long}, "x must be fp32"),
    "sizes": ({"x": lambda x: x[..., :60]}, r"\[N, 60\] to fit x \[2, 1, 60\], got \[40, 64\]"),
    "dtypes": ({"first": torch.Tensor.half}, "weight 0 must be torch.float32 .* got torch.float16"),
    "strided": ({"second": lambda x: x.t().contiguous().t()}, r"weight 1 must have strides \(64, 1\) as weight 0 has, got \(1, 40\)"),
    "strided first": ({"first": lambda x: x.t().contiguous().t()}, r"weight 0 must have .* dense last dimension, got \(1, 40\)"),
    "apart": ({"second": lambda x: F.pad(x, (0, 8))[:, :64]}, r"weight 1 must have strides \(64, 1\) as weight 0 has, got \(72, 1\)"),
    "elsewhere": ({"first": lambda x: x.to("meta")}, "weight 0 must be .* got .* on meta"),
    "gradient": ({"x": lambda x: x.requires_grad_()}, "x 0 requires a gradient"),
    "three dimensions": ({"first": lambda x: x[None]}, r"to fit x \[2, 1, 64\], got \[1, 40, 64\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_inputs_are_named_before_a_launch(case, monkeypatch):
    monkeypatch.setattr(torch.ops.dsla_kernels, "linears", None)
    monkeypatch.setattr(torch.ops.dsla_kernels, "gated_linear", None)
    changes, message = WRONG[case]
    x, (first, second), _ = make_inputs(2, 64, (40, 40))
    arguments = {"x": x, "first": first, "second": second}
    arguments |= {name: edit(arguments[name]) for name, edit in changes.items()}
    with pytest.raises(ValueError, match=message):
        few_rows.linears(arguments["x"], [arguments["first"], arguments["second"]])
    with pytest.raises(ValueError, match=r"x|weight"):
        few_rows.gated_linear(*arguments.values())


def test_wrong_numbers_of_weights_and_biases():
    x, weights, biases = make_inputs(2, 64, (40, 24), bias=True)
    for wrong, message in (
        (lambda: few_rows.linears(x, []), "1 to 3 weights, got 0"),
        (lambda: few_rows.linears(x, weights * 2), "1 to 3 weights, got 4"),
        (lambda: few_rows.linears(x, weights, biases[:1]), "a bias for each of the 2 weights, or none at all, got 1"),
        (lambda: few_rows.linears(x, weights, biases[::-1]), r"bias 0 must be \[40\] as its weight, got \[24\]"),
        (lambda: few_rows.linears(x, weights, [biases[0], biases[1].half()]), "bias 1 must be torch.float32"),
        (lambda: few_rows.gated_linear(x, *weights), r"up_weight must be \[40, 64\] as gate_weight is, got \[24, 64\]"),
        (lambda: few_rows.gated_linear(x, weights[0], weights[0], "relu"), "activation must be one of silu, gelu_tanh, got 'relu'"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
