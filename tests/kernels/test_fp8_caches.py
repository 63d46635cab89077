"""Keys and values in fp8: what writes them, and the attention that reads them, against the PyTorch truth over what they stand for.

As tests/kernels/test_kernels.py, on a GPU compiled and in bf16 too, without one through Triton's interpreter; and compiled, for an H100, on
any machine.
"""

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
if not INTERPRETED and torch.cuda.get_device_capability() < (8, 9):
    pytest.skip("needs a card with fp8", allow_module_level=True)

from dsla_kernels import dispatch, narrow, reference  # noqa: E402 (after the choice of how kernels run)
from dsla_kernels.ops import softmax  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=on_gpu)]
BOUNDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
FP8 = torch.float8_e4m3fn


def random(*shape):
    return torch.randn(*shape, device=DEVICE)


def to_fp8(x):
    return narrow.stored(x, FP8)


def make_cache(lengths, room, layout, key_dim=32, value_dim=32, kv_heads=2, block_size=16):
    """keys, values, lengths, and options of `softmax_decode`; NaN behind the lengths."""
    rows, most, columns = len(lengths), -(-room // block_size), 5
    held = torch.tensor(lengths, device=DEVICE)
    if layout == "static":
        both = [random(rows, kv_heads, room, size) for size in (key_dim, value_dim)]
        for x in both:
            x.masked_fill_((torch.arange(room, device=DEVICE) >= held[:, None])[:, None, :, None], float("nan"))
        return *map(to_fp8, both), held, {}
    tables = kv_heads if layout == "heads" else 1
    table = (torch.randperm(tables * rows * most, device=DEVICE) + 1).view(tables, rows, most).int()
    inside = torch.arange(most * block_size, device=DEVICE).view(most, block_size) < held[:, None, None]
    pools = []
    for size in (key_dim, value_dim):
        pool = torch.full((tables * rows * most + 1, block_size, columns if layout == "heads" else kv_heads, size), float("nan"))
        pool = pool.to(DEVICE)
        for one in table.long():
            pool[one] = random(rows, most, *pool.shape[1:]).masked_fill(~inside[..., None, None], float("nan"))
        pools.append(to_fp8(pool))
    if layout == "blocks":
        return *pools, held, {"block_table": table[0]}
    heads = torch.tensor([[head, (2 * head + 1) % columns] for head in range(kv_heads)], dtype=torch.int32, device=DEVICE)
    return *pools, held, {"block_table": table, "heads": heads}


def close(found, expected):
    assert found.shape == expected.shape
    assert float((found.double() - expected).norm() / expected.norm()) <= BOUNDS[found.dtype]


def test_what_a_cache_makes_of_numbers():
    x = torch.tensor([0.0, -1.0, 1.0625, 1.0626, 447.0, 449.0, -1e30, float("inf"), 2.0**-9, 2.0**-11, float("nan")])
    held = narrow.stored(x, FP8).float()
    assert held[:-1].tolist() == [0.0, -1.0, 1.0, 1.125, 448.0, 448.0, -448.0, 448.0, 2.0**-9, 0.0] and held[-1].isnan()
    assert narrow.stored(x, torch.float32) is x
    assert narrow.bits(x) is x and narrow.bits(narrow.stored(x, FP8)).dtype == torch.uint8


@pytest.mark.parametrize("splits", [0, 1, 3])
@pytest.mark.parametrize("layout", ["static", "blocks", "heads"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_over_fp8(dtype, layout, splits):
    keys, values, lengths, options = make_cache([0, 1, 64, 130], 140, layout)
    q = random(4, 1, 4, 32).to(dtype)
    expected = reference.softmax_decode(q.double(), keys.double(), values.double(), lengths, **options)
    found = softmax.softmax_decode(q, keys, values, lengths, splits=splits, **options)
    close(found, expected)
    close(reference.softmax_decode(q, keys, values, lengths, **options), expected)
    wider = softmax.softmax_decode(q, keys.to(dtype), values.to(dtype), lengths, splits=splits, **options)
    torch.testing.assert_close(found, wider, rtol=0, atol=BOUNDS[dtype])


@pytest.mark.parametrize("key_dim, value_dim, block_size", [(128, 128, 64), (20, 12, 16), (256, 64, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_queries_windows_and_sinks_over_fp8(dtype, key_dim, value_dim, block_size):
    keys, values, lengths, options = make_cache([40, 3, 130], 140, "heads", key_dim, value_dim, 3, block_size)
    q = random(3, 3, 6, key_dim).to(dtype)
    options |= {"window": 33, "sink_tokens": 4, "whole_heads": 1, "sink_logits": random(6)}
    expected = reference.softmax_decode(q.double(), keys.double(), values.double(), lengths, **options)
    close(softmax.softmax_decode(q, keys, values, lengths, **options), expected)


@pytest.mark.parametrize("options", [{}, {"window": 40}], ids=str)
@pytest.mark.parametrize("layout, block_size", [("blocks", 64), ("blocks", 16), ("heads", 128)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_piece_of_a_text_over_fp8(dtype, layout, block_size, options):
    starts = torch.tensor([0, 63, 30], device=DEVICE)
    keys, values, lengths, where = make_cache([70, 133, 31], 140, layout, block_size=block_size)
    q = random(3, 70, 4, 32).to(dtype)
    arguments = starts, lengths, where.pop("block_table")
    expected = reference.softmax_prompt(q.double(), keys.double(), values.double(), *arguments, **where, **options)
    close(softmax.softmax_prompt(q, keys, values, *arguments, **where, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_heads", [False, True])
def test_a_token_is_written_as_it_is_rounded(of_heads, dtype, monkeypatch):
    """To the bit; the interpreter, which rounds carelessly and knows no NaN, is given what needs no rounding, and what is too large."""
    k, v = (random(3, 2, 1, size) * torch.logspace(-1, 4, size, device=DEVICE) for size in (24, 40))
    if INTERPRETED:
        k, v = (torch.where((x.abs() > 2**-6) & (x.abs() < 448), to_fp8(x).float(), x.sign() * 1000) for x in (k, v))
    else:
        k[0, 0, 0, 0] = float("nan")
    k, v = k.to(dtype), v.to(dtype)
    v[0, 1, 0, 3] = float("inf")
    places = torch.tensor([3, 0, 7], device=DEVICE)
    options = {}
    if of_heads:
        places = torch.stack([places, places + 1])
        options = {"heads": torch.tensor([[1, 0], [0, 3]], dtype=torch.int32, device=DEVICE)}
    found, expected = ([torch.zeros(1, 4 if of_heads else 2, 10, x.shape[-1], device=DEVICE).to(FP8) for x in (k, v)] for _ in range(2))
    softmax.append(*found, k, v, places, **options)
    monkeypatch.setattr(dispatch, "choice", "pytorch")
    dispatch.append(*expected, k, v, places, **options)
    for x, y, new in zip(found, expected, (k, v), strict=True):
        assert torch.equal(narrow.bits(x), narrow.bits(y))
        assert int((x.float() != 0).sum()) == new.numel() and x.float().nan_to_num(0).abs().max() == narrow.LARGEST
        assert torch.equal(x.float().isnan().sum(), new.isnan().sum())


def test_other_dtypes_are_named():
    keys, values, lengths, _ = make_cache([5], 8, "static")
    q = random(1, 1, 4, 32)
    for run in (reference.softmax_decode, softmax.softmax_decode):
        with pytest.raises(
            ValueError, match=r"keys must be torch.float32 or torch.float8_e4m3fn .* got torch.float8_e5m2 .*\(of the dtype of q\)"
        ):
            run(q, keys.float().to(torch.float8_e5m2), values, lengths)
        with pytest.raises(ValueError, match=r"values must be torch.float8_e4m3fn .* got torch.float32 .*\(of the dtype of keys\)"):
            run(q, keys, values.float(), lengths)
        with pytest.raises(ValueError, match="q must be floating-point"):
            run(to_fp8(q), keys, values, lengths)
    k, v = random(1, 2, 1, 32), random(1, 2, 1, 32)
    with pytest.raises(ValueError, match=r"values must be torch.float32 or torch.float8_e4m3fn"):
        softmax.append(keys, values.to(torch.float16), k, v, lengths)


SCRIPT = """
import sys
sys.path.insert(0, {support!r})
import compile_only, torch
from dsla_kernels.ops import softmax

for size in (64, 128, 256):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for narrow in (torch.float8_e4m3fn, dtype):
            pool = torch.zeros(9, 64, 4, size).to(narrow)
            q, table = torch.zeros(2, 128, 8, size, dtype=dtype), torch.zeros(2, 4, dtype=torch.int32)
            lengths = torch.full((2,), 200)
            for queries in (1, 4, 16):
                softmax.softmax_decode(q[:, :queries], pool, pool, lengths, block_table=table)
            softmax.softmax_prompt(q, pool, pool, lengths - 128, lengths, table)
            token = torch.zeros(2, 4, 1, size, dtype=dtype)
            places = pool.flatten(0, 1)[None].transpose(1, 2)
            softmax.append(places, places, token, token, lengths)
print(*sorted(compile_only.compiled))
"""


@pytest.mark.skipif(not triton.backends.backends.get("nvidia"), reason="this Triton compiles nothing for NVIDIA GPUs")
def test_all_is_compiled_for_an_h100():
    """On any machine: conversions that a card does not have would end here."""
    script = SCRIPT.format(support=str(Path(__file__).parents[1] / "support"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"_softmax_decode_kernel", "_softmax_prompt_kernel", "_append_kernel"} <= {*done.stdout.split()}
