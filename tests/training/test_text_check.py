"""Data of which the window reads nearly everything is refused."""

from contextlib import nullcontext

import pytest
import torch

from dsla_hf.training.text_check import check_teaches


def rows(*lengths):
    return [{"input_ids": torch.arange(length)} for length in lengths]


def test_data_that_the_window_reads_alone_is_refused():
    with pytest.raises(
        ValueError, match=r"to train on has 0 % .* reads 132 tokens .*; the longest sequence has 132\..* smaller window_size"
    ):
        check_teaches(rows(132, 100), 128, 4)
    with pytest.raises(ValueError, match="has 9 % of its tokens"):
        check_teaches(rows(145), 128, 4)
    check_teaches(rows(147), 128, 4)
    check_teaches([row["input_ids"][None] for row in rows(147, 20)] * 50 + rows(1000), 128, 4)


def test_short_chats_may_be_mixed_in_wherever_they_stand():
    check_teaches(rows(*[20] * 2000, *[1000] * 300), 128, 4)
    with pytest.raises(ValueError, match="beyond the window"):
        check_teaches(rows(*[20] * 2000, 140), 128, 4)


@pytest.mark.parametrize("window, length, taught", [(0, 1, False), (0, 2, True), (8, 12, False), (8, 14, True)])
def test_without_a_window_only_single_tokens_are_refused(window, length, taught):
    with nullcontext() if taught else pytest.raises(ValueError, match=r"longer ones|beyond the window"):
        check_teaches(rows(length), window, 4)


def test_only_tokens_that_count_are_counted():
    ids, late = torch.arange(40), (torch.arange(40) >= 30).long()
    check_teaches([{"input_ids": ids, "loss_mask": late}], 8, 4)
    with pytest.raises(ValueError, match="beyond the window"):
        check_teaches([{"input_ids": ids, "loss_mask": (ids < 12).long()}], 8, 4)
    with pytest.raises(ValueError, match="longest sequence has 10"):  # padding before a text does not move it away from its start
        check_teaches([{"input_ids": ids[None], "attention_mask": late[None]}], 8, 4)
    with pytest.raises(ValueError, match="no token that counts"):
        check_teaches([{"input_ids": ids, "loss_mask": 0 * ids}], 8, 4)


def test_of_a_stream_the_first_rows_are_judged():
    class Stream:
        def __iter__(self):
            yield from rows(*[20] * 64)
            raise AssertionError("read on")

    check_teaches(Stream(), 8, 4)
