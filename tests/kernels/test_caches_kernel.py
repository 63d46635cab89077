"""A token's keys and values into a cache: the Triton kernel against PyTorch's indexing, to the bit.

As tests/kernels/test_kernels.py, on a GPU compiled and in bf16 too, without one through Triton's interpreter.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

from dsla_kernels import dispatch  # noqa: E402 (after the choice of how kernels run)
from dsla_kernels.ops.softmax import append  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def make_inputs(rows=3, kv_heads=2, room=10, key_dim=8, value_dim=8, pool=False, dtype=torch.float32):
    """Caches that are parts of larger ones, a token that lies with heads behind it, and places."""
    made = 1 if pool else rows
    keys, values = (
        torch.randn(made, room, kv_heads, d + 3, device=DEVICE)[..., :d].transpose(1, 2).to(dtype) for d in (key_dim, value_dim)
    )
    k, v = (torch.randn(rows, 1, kv_heads, d, device=DEVICE).transpose(1, 2).to(dtype) for d in (key_dim, value_dim))
    places = torch.randperm(room, device=DEVICE)[:rows]
    return keys, values, k, v, places, torch.tensor(5, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [{}, {"key_dim": 24, "value_dim": 40}, {"kv_heads": 1, "key_dim": 128}, {"rows": 1}], ids=str)
@pytest.mark.parametrize("pool", [False, True])
def test_the_kernel_writes_what_indexing_writes_and_nothing_else(pool, sizes, dtype, monkeypatch):
    arguments = make_inputs(pool=pool, dtype=dtype, **sizes)
    found, expected = ([x.clone() for x in arguments] for _ in range(2))
    before = found[0].clone()
    append(*found)
    monkeypatch.setattr(dispatch, "choice", "pytorch")
    dispatch.append(*expected)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert int(found[-1]) == 6 and not torch.equal(found[0], before)


def test_strides_are_kept_to():
    """A cache inside a larger tensor: its neighbours stay."""
    large = torch.zeros(2, 6, 3, 16, device=DEVICE)
    keys = values = large[:, 1:5, :, 4:12].transpose(1, 2)
    token = torch.ones(2, 3, 1, 8, device=DEVICE)
    append(keys, values, token, token, torch.tensor([0, 3], device=DEVICE))
    assert large.sum() == 2 * 3 * 8 and large[0, 1, :, 4:12].all() and large[1, 4, :, 4:12].all()


def test_places_of_32_bits_and_no_count():
    keys, values, k, v, places, _ = make_inputs()
    append(keys, values, k, v, places.int())
    for row, place in enumerate(places.tolist()):
        assert torch.equal(keys[row, :, place], k[row, :, 0]) and torch.equal(values[row, :, place], v[row, :, 0])


def test_heads_of_several_layers_share_a_pool(monkeypatch):
    """Heads go into their own columns, to the places of their own tables; places lie in a larger tensor."""
    keys, values = (torch.zeros(1, 5, 12, 8, device=DEVICE) for _ in range(2))
    k, v = (torch.randn(2, 3, 1, 8, device=DEVICE) for _ in range(2))
    places = torch.tensor([[0, 1, 9], [2, 3, 9], [4, 5, 9]], device=DEVICE)[:, :2]
    heads = torch.tensor([[2, 4], [0, 1], [2, 0]], dtype=torch.int32, device=DEVICE)
    append(keys, values, k, v, places, heads=heads)
    for head, (table, column) in enumerate(heads.tolist()):
        for row in range(2):
            assert torch.equal(keys[0, column, places[table, row]], k[row, head, 0])
            assert torch.equal(values[0, column, places[table, row]], v[row, head, 0])
    assert keys.count_nonzero() == values.count_nonzero() == 2 * 3 * 8
    found = keys.clone(), values.clone()
    monkeypatch.setattr(dispatch, "choice", "pytorch")
    dispatch.append(keys.zero_(), values.zero_(), k, v, places, heads=heads)
    assert torch.equal(keys, found[0]) and torch.equal(values, found[1])
    with pytest.raises(ValueError, match=r"heads must be int32 \[3, 2\]"):
        append(keys, values, k, v, places, heads=heads[:, :1])
    with pytest.raises(ValueError, match=r"keys must be .*\[1, columns, L, 8\]"):
        append(keys.repeat(2, 1, 1, 1), values, k, v, places, heads=heads)


def test_the_operator_is_registered_in_full():
    torch.library.opcheck(torch.ops.dsla_kernels.append, (*make_inputs(), None))


@pytest.mark.parametrize(
    "index, change, message",
    [
        (2, lambda x: x.repeat(1, 1, 2, 1), r"k must be \[B, Hkv, 1, K\]"),
        (0, lambda x: x[:, :1], r"keys must be .*\[rows, 2, L, 8\]"),
        (slice(2), lambda x: [each[:2] for each in x], "keys and values must have 1 row or 3"),
        (1, lambda x: x[..., :4], "values must be"),
        (0, lambda x: x.half(), "keys must be torch.float32 .* got torch.float16"),
        (1, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), "values must be dense"),
        (4, lambda x: x[:2], "places must be"),
        (4, lambda x: x.float(), "places must be"),
        (5, lambda x: x.float(), "count must be"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(index, change, message):
    arguments = list(make_inputs())
    arguments[index] = change(arguments[index])
    before = [x.clone() for x in arguments]
    with pytest.raises(ValueError, match=message):
        append(*arguments)
    assert all(torch.equal(x, y) for x, y in zip(arguments, before, strict=True))
