"""Padded and packed batches brought to one form: rows of tokens, first and in order."""

import pytest
import torch

from dsla_kernels import rows_from_cu_seqlens, rows_from_mask


def masks():
    mask = torch.rand(7, 23) < 0.6
    mask[0], mask[1] = True, False
    mask[2, :9], mask[2, 9:] = False, True
    return mask


@pytest.mark.parametrize("trailing", [(), (3,), (2, 5)])
def test_gather_and_scatter_are_inverse_at_real_tokens(trailing):
    mask = masks()
    x = torch.randn(7, 23, *trailing)
    rows = rows_from_mask(mask)
    gathered = rows.gather(x)
    back = rows.scatter(gathered, (7, 23))
    assert torch.equal(back[mask], x[mask])
    assert (back[~mask] == 0).all()
    assert torch.equal(rows.gather(back)[rows.valid], gathered[rows.valid])


def test_real_tokens_come_first_and_in_order_wherever_padding_lies():
    mask = masks()
    rows = rows_from_mask(mask)
    flat = torch.arange(7 * 23).view(7, 23)
    for row in range(7):
        length = int(mask[row].sum())
        assert rows.valid[row].tolist() == [True] * length + [False] * (23 - length)
        assert rows.gather(flat)[row, :length].tolist() == flat[row, mask[row]].tolist()


def test_masks_of_numbers_work_like_bool():
    mask = masks()
    for x, y in zip(rows_from_mask(mask), rows_from_mask(mask.long()), strict=True):
        assert torch.equal(x, y)


def test_what_lies_behind_a_row_does_not_come_back():
    mask = masks()
    rows = rows_from_mask(mask)
    poisoned = rows.gather(torch.randn(7, 23, 4)).masked_fill(~rows.valid[..., None], float("nan"))
    assert rows.scatter(poisoned, (7, 23)).isfinite().all()


def test_gradients_reach_exactly_the_real_tokens():
    mask = masks()
    rows = rows_from_mask(mask)
    x = torch.randn(7, 23, 2, requires_grad=True)
    rows.scatter(rows.gather(x), (7, 23)).sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand(7, 23, 2).float())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_boundaries_give_one_row_a_sequence(dtype):
    rows = rows_from_cu_seqlens(torch.tensor([0, 3, 3, 4, 9], dtype=dtype), 9)
    assert rows.source.dtype == torch.int64 and rows.source.shape == (4, 5)
    assert rows.valid.sum(1).tolist() == [3, 0, 1, 5]
    x = torch.arange(9.0).view(1, 9)
    tokens = [row[valid].tolist() for row, valid in zip(rows.gather(x), rows.valid, strict=True)]
    assert tokens == [[0, 1, 2], [], [3], [4, 5, 6, 7, 8]]
    assert torch.equal(rows.scatter(rows.gather(x), (1, 9)), x)


@pytest.mark.parametrize(
    "boundaries",
    [[0, 5], [0, 5, 11], [1, 10], [0, 7, 5, 10], [0, 0], [0], [-2, 10]],
    ids=["ends early", "ends late", "starts late", "falls", "empty", "one entry", "negative"],
)
def test_bad_boundaries_are_named_with_their_values(boundaries):
    with pytest.raises(ValueError, match=r"cu_seqlens must rise from 0 to the number of tokens 10, got \["):
        rows_from_cu_seqlens(torch.tensor(boundaries), 10)
