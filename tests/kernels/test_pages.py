"""A token whose states and ring lie in pages among others: as in rows, wherever the pages are and whatever they held before."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

from dsla_kernels.ops.decode import (  # noqa: E402 (after the choice of how kernels run)
    GateWeights,
    pure_decode,
    ring_decode,
    window_decode,
)
from dsla_kernels.ops.decode import launch as decode_launch  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
B, HQ, HKV, HELD, K, V, W, S = 3, 4, 2, 5, 8, 12, 4, 2
PAGES, TOKENS = 6, 11
# Programs of another number of heads are compiled anew, and may add in another order.
EXACTLY = {"rtol": 0, "atol": 0} if INTERPRETED else {"rtol": 1e-5, "atol": 1e-6}
WEIGHTS = {"mix_logits": (HQ, 2), "norm_weight": (HQ, V), "state_gain": (HQ,), "state_bias": (HQ,)}


def weights(pure):
    down, up, bias = torch.randn(HKV, V, 3), torch.randn(HKV, 3, K), torch.randn(HKV, 2, K // 2)
    gates = GateWeights(*(x.to(DEVICE) for x in (down, up, bias, torch.randn(HKV, V, 2), torch.randn(HKV, 2))))
    names = ("mix_logits", "norm_weight") if pure else WEIGHTS
    return {"gates": gates, **{name: torch.randn(WEIGHTS[name], device=DEVICE) for name in names}}


def places(held):
    """States and ring of all pages, side by side in each of them as in vLLM's cache, and full of NaN."""
    shapes = (held, 2, K, V), (S + W, held, K), (S + W, held, V)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    buffer = torch.full((PAGES, sum(sizes) + 16), torch.nan, device=DEVICE)
    return [part.unflatten(1, shape) for part, shape in zip(buffer[:, : sum(sizes)].split(sizes, 1), shapes, strict=True)]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("held", [HKV, HELD])
@pytest.mark.parametrize("kind", ["window", "pure", "ring"])
def test_pages_are_rows_elsewhere(kind, held, parts, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(decode_launch, "tuned", decode_launch.Launch(4, 4, 16, parts=parts))
    recurrent, window_k, window_v = places(held)
    given = weights(kind == "pure") if kind != "ring" else {}
    state_heads = None if held == HKV else torch.tensor([3, 1], dtype=torch.int32, device=DEVICE)
    heads = torch.arange(HKV) if state_heads is None else state_heads.tolist()
    dense = [torch.zeros(B, *shape, device=DEVICE) for shape in ((HKV, 2, K, V), (S + W, HKV, K), (S + W, HKV, V))]
    lengths = torch.zeros(B, dtype=torch.int64, device=DEVICE)
    numbers = torch.tensor([4, -1, 2], dtype=torch.int32, device=DEVICE)  # the second row is padding
    real = numbers >= 0

    def step(token, state, lengths, **more):
        if kind == "pure":
            return pure_decode(*token, state[0], **given, **more, **({"lengths": lengths} if "pages" in more else {}))
        if kind == "ring":
            return ring_decode(*token, *state[1:], lengths, W, advance=False, **more)
        return window_decode(*token, *state, lengths, window_size=W, advance=False, **given, **more)

    for _ in range(TOKENS):
        token = [torch.randn(B, 1, h, d, device=DEVICE) for h, d in ((HQ, K), (HKV, K), (HKV, V))]
        expected = step(token, dense, lengths, padding_mask=real[:, None])
        found = step(token, (recurrent, window_k, window_v), lengths, pages=numbers, state_heads=state_heads)
        torch.testing.assert_close(found, expected, **EXACTLY)
        lengths += real
    rows = real.nonzero()[:, 0]
    of_rows = numbers[rows].long()
    if kind != "ring":
        torch.testing.assert_close(recurrent[of_rows][:, heads], dense[0][rows])
    others = [p for p in range(PAGES) if p not in numbers.tolist()]
    for x in (recurrent, window_k, window_v):
        assert x[others].isnan().all(), "pages of others are written"
    if held > HKV:
        assert recurrent[of_rows][:, [0, 2, 4]].isnan().all() and window_k[of_rows][:, :, [0, 2, 4]].isnan().all()


def test_pages_that_do_not_fit_are_named():
    given = weights(True)
    token = [torch.randn(B, 1, h, d, device=DEVICE) for h, d in ((HQ, K), (HKV, K), (HKV, V))]
    recurrent, *_ = places(HELD)
    numbers, lengths = torch.zeros(B, dtype=torch.int32, device=DEVICE), torch.zeros(B, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="pages hold 5 heads, and the layer has 2: say which with state_heads"):
        pure_decode(*token, recurrent, **given, pages=numbers, lengths=lengths)
    with pytest.raises(ValueError, match=r"recurrent\[i\] must be contiguous"):
        pure_decode(*token, recurrent[:, :HKV].mT.contiguous().mT, **given, pages=numbers, lengths=lengths)
    with pytest.raises(ValueError, match="lengths must be a tensor, got None"):
        pure_decode(*token, recurrent[:, :HKV], **given, pages=numbers)
    with pytest.raises(ValueError, match="lengths must come with pages"):
        pure_decode(*token, torch.zeros(B, HKV, 2, K, V, device=DEVICE), **given, lengths=lengths)
    with pytest.raises(ValueError, match=r"pages must be int32 \[3\]"):
        pure_decode(*token, recurrent[:, :HKV], **given, pages=numbers.long(), lengths=lengths)
