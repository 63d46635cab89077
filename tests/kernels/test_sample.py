"""Draws by the kernels against plain PyTorch: what top_k, top_p and min_p leave, and who wins the race."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
triton = pytest.importorskip("triton")

from dsla_hf.inference import draws  # noqa: E402 (after the choice of how kernels run)
from dsla_hf.inference.noise import gumbel, token_ids  # noqa: E402
from dsla_hf.inference.sampling import Sampling  # noqa: E402
from dsla_kernels.ops.sample import draw, likeliest, race  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)]
INF = float("inf")


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(likeliest, "BLOCK", 64)
    monkeypatch.setattr(race, "BLOCK", 64)


def settings(*rows):
    """temperature, top_k, top_p, log_min_p of each row, and keys."""
    temperature, top_k, top_p, log_min_p = zip(*rows, strict=True)
    keys = torch.randint(-(2**31), 2**31, (len(rows), 2), dtype=torch.int32)
    found = (torch.tensor(temperature), torch.tensor(top_k), torch.tensor(top_p), torch.tensor(log_min_p), keys)
    return [x.to(DEVICE) for x in found]


def left(x, top_k, top_p, log_min_p):
    """What is in question, of logits over temperature `[V]` in fp64."""
    stays = torch.ones_like(x, dtype=torch.bool)
    if 0 < top_k < len(x):
        stays = x >= x.topk(top_k)[0][-1]
    share = x.masked_fill(~stays, -INF).softmax(-1)
    if top_p < 1:
        ordered = share.sort(descending=True)[0]
        stays &= share >= ordered[(ordered.cumsum(0) - ordered < top_p).nonzero()[-1, 0]]
    return stays & (x >= x.max() + log_min_p)


HOW = [
    (1.0, 0, INF, -INF),
    (0.7, 5, INF, -INF),
    (1.0, 0, 0.9, -INF),
    (1.3, 0, 0.5, -3.0),
    (1.0, 40, 0.3, -INF),
    (2.0, 0, INF, -1.5),
    (1.0, 0, 1e-30, -INF),
    (1e-5, 0, INF, -INF),
    (0.9, 10**6, 0.999, -INF),
    (1.0, 1, INF, -INF),
    (1.0, 150, INF, -INF),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 150])
def test_draws_are_those_of_plain_pytorch(small_blocks, size, dtype):
    logits = (3 * torch.randn(len(HOW), size, device=DEVICE)).to(dtype)
    temperature, top_k, top_p, log_min_p, keys = given = settings(*HOW)
    found = draw(logits, *given, filtered=True)
    x = logits.float() / temperature[:, None]
    noisy = x + gumbel(keys, token_ids(size, DEVICE))
    for row, (_, *how) in enumerate(HOW):
        expected = int(noisy[row].masked_fill(~left(x[row].double(), *how), -INF).argmax())
        assert int(found[row]) == expected, HOW[row]
    open_rows = draw(logits, *given, filtered=False)
    assert torch.equal(open_rows, noisy.argmax(-1))


@pytest.mark.parametrize("how", HOW[1:7])
def test_the_least_that_is_left(small_blocks, how):
    """Some logits are equal, some impossible, one is far below all others."""
    row = torch.tensor([[1.0, 1.0, 0.5, -1e30, 2.0, 0.5, 0.5, 0.0, -0.0, -INF, -1.0, 0.0]], device=DEVICE)
    least = likeliest.least_logits(row, *settings(how)[:-1])
    x = row / how[0]
    assert torch.equal(row >= least[:, None], left(x[0].double(), *how[1:])[None])


def test_one_token_allowed_and_rows_apart():
    """Of a view whose rows lie apart; a grammar leaves one token."""
    few = [HOW[i] for i in (0, 1, 3, 8)]
    wide = torch.full((len(few), 400), -INF, device=DEVICE)
    wide[:, 17] = -5.0
    assert draw(wide[:, :300], *settings(*few), filtered=True).tolist() == [17] * len(few)
    with pytest.raises(ValueError, match=r"\[R, V\]"):
        draw(wide, *settings(*few[1:]), filtered=True)


def test_the_library_draws_by_the_kernels_what_it_draws_without(small_blocks, monkeypatch):
    logits = (3 * torch.randn(6, 500, device=DEVICE)).half()
    how = [
        Sampling(1.0),
        Sampling(0.7, top_k=5),
        Sampling(1.0, top_p=0.9),
        Sampling(1.3, 40, 0.5, 0.05),
        Sampling(2.0, min_p=0.2),
        Sampling(1.0),
    ]
    rows = [draws.Row(sampling, 2**63 - 1, place) for place, sampling in enumerate(how)]
    calls = []
    monkeypatch.setattr("dsla_kernels.dispatch.choice", "pytorch")
    expected = draws.exactly(logits, rows)
    monkeypatch.setattr("dsla_kernels.dispatch.choice", "triton")
    real = race.draw
    monkeypatch.setattr("dsla_kernels.ops.sample.draw", lambda *args: (calls.append(args), real(*args))[1])
    found, sure = draws.draw(logits, rows)
    assert torch.equal(found, expected) and sure.all() and len(calls) == 1
    one, _ = draws.draw(logits[:1], rows[:1])
    assert one[0] == expected[0] and calls[1][-1] is False


SCRIPT = """
import sys
sys.path.insert(0, {support!r})
import compile_only, torch
from dsla_kernels import draw

for dtype in (torch.bfloat16, torch.float32):
    for rows in (2, 3, 64):
        real, whole = torch.ones(rows), torch.zeros(rows, dtype=torch.long)
        draw(torch.zeros(rows, 128_256, dtype=dtype), real, whole, real, real, torch.zeros(rows, 2, dtype=torch.int32), True)
print(*sorted(compile_only.compiled.items()))
"""


@pytest.mark.skipif(not triton.backends.backends.get("nvidia"), reason="this Triton compiles nothing for NVIDIA GPUs")
def test_kernels_are_compiled_once_for_any_number_of_rows():
    """For an H100, on any machine."""
    script = SCRIPT.format(support=str(Path(__file__).parents[1] / "support"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "('_likeliest_kernel', 2) ('_race_kernel', 2)"
