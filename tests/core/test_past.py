"""What a window knows of the past: however much of it the host is told, the rows that go on and what they leave are the same."""

import pytest
import torch

from dsla_hf.core.padding import Padding, to_rows
from dsla_hf.core.past import DualState, Past

WINDOW, SINKS = 8, 3


def tokens_of(numbers):
    """k, v `[B, T, 1, 2]` that say which token they are."""
    k = numbers[..., None, None].double().expand(-1, -1, 1, 2)
    return k, -k


def state_after(count, rows=2):
    """That of `count` tokens 0, 1, 2, ... in each row."""
    past = Past(WINDOW, SINKS)
    k, v = tokens_of(torch.arange(count).expand(rows, -1))
    return past.state_after(k, v, None, torch.zeros(rows), past.sinks(k, v), past.row_start())


def pasts(count):
    """Everything that can be known of `count` tokens."""
    state = state_after(count)
    yield Past(WINDOW, SINKS, state)
    yield Past(WINDOW, SINKS, state, seen=count)
    if count and count % WINDOW == 0:
        yield Past(WINDOW, SINKS, state, whole_windows=True)


def goes_on(past, new):
    """Numbers of the tokens in each row that goes on and of those taken in, sinks of a row, and the state after it."""
    k, v = tokens_of(torch.arange(new).expand(2, -1) + past.state.lengths[:, None])
    start = past.row_start()
    k, v, before = past.after_window(k, v, start)
    mask = Padding().behind(before, k.shape[1] - new, new)
    rows, k, v, valid = to_rows(mask, None, k, v)
    real = torch.ones(k.shape[:2], dtype=torch.bool) if valid is None else valid
    taken = past.taken_in(k)
    taken = real if taken is None else taken & real
    numbers = [k[row, real[row], 0, 0].tolist() for row in range(2)]
    sinks = past.sinks(k, v)
    after = past.state_after(k, v, None if valid is None else valid.sum(1), torch.zeros(2), sinks, start)
    assert torch.equal(v, -k)
    return numbers, [k[row, taken[row], 0, 0].tolist() for row in range(2)], after


@pytest.mark.parametrize("new", [1, 5, 8, 21])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 7, 8, 11, 16, 23, 24])
def test_all_that_can_be_known_leads_to_the_same(count, new):
    block, total = WINDOW // 2, count + new
    expected = state_after(total)
    first = max(count // block - 2, 0) * block
    held = first + block if count >= WINDOW else 0  # the first block is in the states already
    for past in pasts(count):
        numbers, taken, after = goes_on(past, new)
        for row in range(2):
            # Of the first block the window has what the next token sees; in place of the rest lie newer tokens.
            seen_again = list(range(held, total))
            assert numbers[row][-len(seen_again) :] == seen_again
            assert len(numbers[row]) == total - first
            assert taken[row] == [n for n in seen_again if n >= SINKS]
        seen_slots = torch.arange(SINKS + WINDOW) < min(total, WINDOW) + SINKS
        seen_slots[:SINKS] = torch.arange(SINKS) < total
        assert after.lengths.tolist() == [total] * 2
        assert torch.equal(after.window_k[:, seen_slots], expected.window_k[:, seen_slots])
        assert torch.equal(after.window_v[:, seen_slots], expected.window_v[:, seen_slots])


@pytest.mark.parametrize("new", [1, 5, 8, 21])
@pytest.mark.parametrize("count", [0, 1, 2, 4, 7, 8, 11, 16, 23, 24])
def test_a_fold_finds_the_tokens_that_states_lack_and_the_slots_of_new_ones(count, new):
    """Of rows whose new tokens lie in order, and of such with padding between them."""
    past, block, total = Past(WINDOW, SINKS, state_after(count)), WINDOW // 2, count + new
    held = max(count // block - 1, 0) * block
    k, v, number = past.not_held()
    assert number[0].tolist() == list(range(held, held + WINDOW)) and bool((past.held(past.state.lengths) == held).all())
    there = list(range(held, count))
    assert k[0, : len(there), 0, 0].tolist() == there and torch.equal(v, -k) and not k[0, len(there) :].any()
    k, v = tokens_of(torch.arange(count, total).expand(2, -1))
    order = (torch.arange(2 * new) % 2).argsort(stable=True).expand(2, -1)
    spread_k, spread_v = (torch.stack([x, torch.full_like(x, float("nan"))], 2).flatten(1, 2) for x in (k, v))
    expected, lengths = state_after(total), torch.tensor([total] * 2)
    slots = torch.cat([torch.arange(SINKS), torch.arange(WINDOW)]) < total
    for given in ((k, v, lengths, torch.zeros(2), None), (spread_k, spread_v, lengths, torch.zeros(2), order)):
        after = past.state_behind(*given)
        assert after.lengths is lengths
        assert torch.equal(after.window_k[:, slots], expected.window_k[:, slots]) and torch.equal(
            after.window_v[:, slots], -after.window_k[:, slots]
        )


def test_the_window_has_each_token_in_its_slot():
    state = state_after(21)
    assert isinstance(state, DualState)
    slots = state.window_k[0, :, 0, 0].tolist()
    assert slots[:SINKS] == [0, 1, 2]
    assert slots[SINKS:] == [16, 17, 18, 19, 20, 13, 14, 15]


def test_at_the_start_of_a_text_nothing_comes_before():
    past = Past(WINDOW, SINKS, seen=5, whole_windows=True)
    k, v = tokens_of(torch.arange(6)[None])
    assert past.row_start() is None and past.after_window(k, v, None) == (k, v, None)
    assert past.taken_in(k).tolist() == [[False] * 3 + [True] * 3]
    assert Past(WINDOW, 0).taken_in(k) is None, "all of them"
    assert past.sinks(k[:, :2], v[:, :2])[0][0, :, 0, 0].tolist() == [0, 1, 0]


def test_what_layers_share_is_made_once():
    made = []
    for padding in (Padding(shared={}), Padding()):
        made.clear()
        found = [padding.once(("x", key), lambda key=key: made.append(key) or key) for key in (1, 2, 1)]
        assert found == [1, 2, 1]
        assert made == ([1, 2] if padding.shared is not None else [1, 2, 1])


def test_places_before_a_row_are_padding_only_where_that_is_known():
    mask = torch.tensor([[1, 0]])
    before = torch.tensor([[True, False, True]])
    assert Padding().behind(None, 3, 2) is None
    assert Padding(mask).behind(None, 0, 2) is mask
    assert Padding(mask).behind(None, 3, 2).tolist() == [[True, True, True, True, False]]
    assert Padding(mask).behind(before, 3, 2).tolist() == [[True, False, True, True, False]]
    assert Padding().behind(before, 3, 2).tolist() == [[True, False, True, True, True]]
