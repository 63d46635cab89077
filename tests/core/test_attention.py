"""The layer between its projections: every way through it gives what the plain formula gives."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from dsla_hf import DualState, DualStateAttention
from dsla_hf.core.attention import NORM_EPS, half_life_to_logit
from dsla_kernels.reference import log_decays

WINDOWS = [0, 8, 16]
HEADS = [(4, 4), (4, 2), (6, 1)]
WAYS = {
    "pure": {"window_size": 0},
    "pure, no write gate": {"window_size": 0, "heads": (4, 4), "write_gate": False},
    "2, 1 sink": {"window_size": 2, "sink_tokens": 1},
    "8, 4 sinks": {"window_size": 8, "heads": (4, 4)},
    "8, no sinks": {"window_size": 8, "heads": (6, 1), "sink_tokens": 0},
    "10, 5 sinks": {"window_size": 10, "sink_tokens": 5},
    "16, 3 sinks, no write gate": {"window_size": 16, "sink_tokens": 3, "write_gate": False},
    "8, 2 sinks, no states": {"window_size": 8, "sink_tokens": 2, "states": False},
}
windows = pytest.mark.parametrize("window_size", WINDOWS)
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
every_window = pytest.mark.parametrize(
    "way", [way for way in WAYS.values() if way["window_size"]], ids=[n for n in WAYS if "pure" not in n]
)


def relative_error(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def make_attention(window_size=8, heads=(4, 2), key_dim=8, value_dim=10, dtype=torch.float64, **options):
    """A layer whose parameters are all away from their start, with decays from a few tokens to many."""
    options = {"half_lives": ((4.0, 64.0), 8.0), **options}
    attention = DualStateAttention(*heads, key_dim, value_dim, window_size=window_size, gate_rank=3, **options).to(dtype)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
        if attention.states:
            attention.gate_bias.add_(2 * torch.randn_like(attention.gate_bias))
    return attention


def make_qkv(attention, batch=2, tokens=53, dtype=torch.float64):
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    sizes = ((heads, attention.key_dim), (kv_heads, attention.key_dim), (kv_heads, attention.value_dim))
    return tuple(torch.randn(batch, tokens, *size, dtype=torch.float64).to(dtype) for size in sizes)


def make_mask(tokens=53):
    """Rows: left, right, middle and scattered padding, none."""
    mask = torch.ones(5, tokens, dtype=torch.bool)
    mask[0, :11] = False
    mask[1, -5:] = False  # after 48 tokens: at the end of a block of 8 and of 16
    mask[2, 5:30] = False
    mask[3] = torch.rand(tokens, generator=torch.Generator().manual_seed(3)) < 0.7
    return mask


def poisoned(tensors, mask):
    """NaN at padded tokens: whatever touches one cannot stay unseen."""
    return tuple(x.masked_fill(~mask[..., None, None], float("nan")) for x in tensors)


def run_in_pieces(attention, qkv, sizes, mask=None, state=None, known=False):
    """The outputs of successive calls, one after the other, and the last state. known: the layer is told what the state has seen."""
    outputs, start = [], 0
    seen = 0 if state is None else int(state.lengths[0])
    for size in sizes:
        piece = slice(start, start + size)
        o, state = attention(
            *(x[:, piece] for x in qkv),
            padding_mask=None if mask is None else mask[:, piece],
            state=state,
            output_state=True,
            seen=seen + start if known else None,
        )
        outputs.append(o)
        start += size
    assert start == qkv[0].shape[1]
    return torch.cat(outputs, 1), state


def assert_same_state(attention, found, expected, bound=1e-10):
    """Equal in all that the state is documented to hold; slots that no token has filled may hold anything."""
    assert torch.equal(found.lengths, expected.lengths)
    assert found.recurrent.shape == expected.recurrent.shape
    scale = max([1.0, *expected.recurrent.abs().flatten().tolist()])
    assert ((found.recurrent - expected.recurrent).abs() <= bound * scale).all()
    assert found.window_k.shape == expected.window_k.shape and found.window_v.shape == expected.window_v.shape
    window, sinks = attention.window_size, attention.sink_tokens
    for row, count in enumerate(found.lengths.tolist() if window else []):
        slots = [*range(min(count, sinks)), *(sinks + token % window for token in range(max(count - window, 0), count))]
        for x, y in ((found.window_k, expected.window_k), (found.window_v, expected.window_v)):
            assert torch.equal(x[row, slots], y[row, slots])


@torch.no_grad()
def slow_layer(attention, q, k, v):
    """The documented formula, a token at a time, over one text without padding: outputs and the state after it."""
    window, sinks, tokens, group = attention.window_size, attention.sink_tokens, q.shape[1], attention.num_heads // attention.num_kv_heads
    states = [k.new_zeros(k.shape[0], k.shape[2], attention.num_states, k.shape[-1], v.shape[-1])]  # after each number of tokens
    if attention.states:
        gate_logits, write_logits = attention.gate_logits(v)
        decay = log_decays(gate_logits, attention.key_dim, attention.gate_normalizer, attention.gate_lower_bound).exp()
        share = torch.ones_like(gate_logits[..., 0]) if write_logits is None else write_logits.sigmoid()
    for t in range(tokens):
        if not attention.states:
            states.append(states[-1])
            continue
        added = share[:, t, :, :, None, None] * k[:, t, :, None, :, None] * v[:, t, :, None, None, :]
        states.append(states[-1] if t < sinks else decay[:, t, ..., None] * states[-1] + added)

    def held(t):
        """How many tokens the states that token t reads reach over: its own too, or the blocks before the last one."""
        return max(t // (window // 2) - 1, 0) * (window // 2) if window else t + 1

    outputs = q.new_zeros(*q.shape[:3], v.shape[-1])
    for t in range(tokens):
        if attention.states:
            state = states[held(t)].repeat_interleave(group, dim=1)
            read = attention.scale * torch.einsum("bhk,hi,bhikv->bhv", q[:, t], attention.mix(), state)
            rms = (read.square().mean(-1) + NORM_EPS).sqrt()
            normalised = read / rms[..., None] * attention.norm_weight
        if not window:
            outputs[:, t] = normalised
            continue
        seen = [s for s in range(t + 1) if s > t - window or s < sinks]
        keys, values = (x[:, seen].repeat_interleave(group, dim=2) for x in (k, v))
        scores = attention.scale * torch.einsum("bhk,bshk->bhs", q[:, t], keys)
        softmax = torch.einsum("bhs,bshv->bhv", scores.softmax(-1), values)
        if not attention.states:
            outputs[:, t] = softmax
            continue
        alpha = torch.sigmoid(attention.state_gain * rms.log() + attention.state_bias - scores.exp().sum(-1).log())[..., None]
        outputs[:, t] = (1 - alpha) * softmax + alpha * normalised if held(t) > sinks else softmax

    window_k, window_v = (x.new_zeros(x.shape[0], sinks + window, *x.shape[2:]) for x in (k, v))
    for j in range(tokens):
        for slot in ([j] if j < sinks else []) + ([sinks + j % window] if window else []):
            window_k[:, slot], window_v[:, slot] = k[:, j], v[:, j]
    return outputs, DualState(states[min(held(tokens), tokens)], window_k, window_v, torch.full(k.shape[:1], tokens))


def slow_rows(attention, qkv, mask=None):
    """`slow_layer` on the real tokens of each row; zeros at padding."""
    if mask is None:
        return slow_layer(attention, *qkv)
    q, _, v = qkv
    outputs, states = q.new_zeros(*q.shape[:3], v.shape[-1]), []
    for row in range(len(mask)):
        o, state = slow_layer(attention, *(x[row : row + 1, mask[row]] for x in qkv))
        outputs[row, mask[row]] = o[0]
        states.append(state)
    return outputs, DualState(*map(torch.cat, zip(*states, strict=True)))


@every_way
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", [1, 3, 8, 37])
def test_layer_equals_the_documented_formula(way, heads, tokens):
    attention = make_attention(**{**way, "heads": heads}, scale=0.6, gate_normalizer=8.0, gate_lower_bound=-0.7)
    qkv = make_qkv(attention, tokens=tokens)
    o, state = attention(*qkv)
    assert state is None and o.shape == (2, tokens, heads[0], 10)
    expected, end = slow_layer(attention, *qkv)
    assert relative_error(o, expected) <= 1e-10
    assert_same_state(attention, attention(*qkv, output_state=True)[1], end)
    assert_same_state(attention, attention.fold(*qkv[1:]), end)


@every_way
def test_every_part_of_the_layer_matters(way):
    """Without this the equalities of this file could hold for a layer that ignores its states."""
    attention = make_attention(**way)
    q, k, v = make_qkv(attention, tokens=60)
    o, _ = attention(q, k, v)
    early = v.clone()
    early[:, 6] += 1
    changed, _ = attention(q, k, early)
    assert (relative_error(changed[:, 40:], o[:, 40:]) > 1e-5) == attention.states
    assert relative_error(changed[:, :6], o[:, :6]) <= 1e-12
    for name, parameter in attention.named_parameters():
        with torch.no_grad():
            parameter.add_(0.3)
        # A constant on both mix logits is no change of their softmax.
        assert relative_error(attention(q, k, v)[0], o) > 1e-7 or name == "mix_logits", name
        with torch.no_grad():
            parameter.sub_(0.3)


# --- padding ------------------------------------------------------------------------------------------------------


@every_way
def test_padding_anywhere_equals_the_row_alone(way):
    attention, mask = make_attention(**way), make_mask()
    qkv = poisoned(make_qkv(attention, batch=5), mask)
    o, state = attention(*qkv, padding_mask=mask, output_state=True)
    assert (o[~mask] == 0).all()
    assert state.lengths.tolist() == mask.sum(1).tolist()
    expected, end = slow_rows(attention, qkv, mask)
    for row in range(5):
        assert relative_error(o[row, mask[row]], expected[row, mask[row]]) <= 1e-10
    assert_same_state(attention, state, end)
    assert_same_state(attention, attention.fold(*qkv[1:], mask), end)


@every_way
def test_padding_at_the_end_need_not_be_moved(way, monkeypatch):
    attention = make_attention(**way)
    lengths = torch.tensor([53, 0, 1, 20, 40])
    mask = torch.arange(53) < lengths[:, None]
    qkv = poisoned(make_qkv(attention, batch=5), mask)
    expected, end = attention(*qkv, padding_mask=mask, output_state=True)
    if attention.window_size:
        monkeypatch.setattr("dsla_hf.core.padding.rows_from_mask", None)
    o, state = attention(*qkv, padding_mask=mask, padding_at_end=True, output_state=True)
    assert torch.equal(o, expected) and not o[~mask].any()
    assert_same_state(attention, state, end)
    assert_same_state(attention, attention.fold(*qkv[1:], mask, padding_at_end=True), end)


@every_way
@pytest.mark.parametrize("windows", [1, 2, 5])
def test_what_comes_behind_whole_windows(way, windows, monkeypatch):
    """With and without padding at the end, of rows that have seen different numbers of windows."""
    attention = make_attention(**way)
    if not attention.window_size:
        pytest.skip("has no window")
    size = attention.window_size
    counts = torch.tensor([windows, 1, 3]) * size
    first = make_qkv(attention, batch=3, tokens=int(counts.max()))
    second = make_qkv(attention, batch=3, tokens=3 * size + 5)
    _, state = attention(*first, padding_mask=torch.arange(first[0].shape[1]) < counts[:, None], output_state=True)
    mask = torch.arange(second[0].shape[1]) < torch.tensor([second[0].shape[1], 7, 0])[:, None]
    for padding in (None, mask):
        expected, end = attention(*second, padding_mask=padding, state=state, output_state=True)
        with monkeypatch.context() as patch:
            patch.setattr("dsla_hf.core.padding.rows_from_mask", None)
            o, new = attention(*second, padding_mask=padding, padding_at_end=True, whole_windows=True, state=state, output_state=True)
        assert relative_error(o, expected) <= 1e-12
        assert_same_state(attention, new, end)


@every_way
def test_gradients_pass_padding_by(way):
    """Every gradient, of inputs and parameters, is that of the rows without their padding."""
    attention, mask = make_attention(**way), make_mask()
    qkv = [x.requires_grad_() for x in make_qkv(attention, batch=5)]
    weights = torch.randn(5, 53, attention.num_heads, 10, dtype=torch.float64)
    (attention(*qkv, padding_mask=mask)[0] * weights).sum().backward()
    found = {name: parameter.grad for name, parameter in attention.named_parameters()}
    attention.zero_grad()
    for row in range(5):
        alone = [x.detach()[row : row + 1, mask[row]].requires_grad_() for x in qkv]
        (attention(*alone)[0][0] * weights[row, mask[row]]).sum().backward()
        for x, one in zip(qkv, alone, strict=True):
            assert relative_error(x.grad[row, mask[row]], one.grad[0]) <= 1e-10
            assert (x.grad[row, ~mask[row]] == 0).all()
    for name, parameter in attention.named_parameters():
        assert relative_error(found[name], parameter.grad) <= 1e-9, name


@windows
def test_a_row_of_nothing_but_padding_stays_empty_and_finite(window_size):
    attention = make_attention(window_size)
    qkv, mask = make_qkv(attention, tokens=20), torch.ones(2, 20, dtype=torch.bool)
    mask[0] = False
    o, state = attention(*qkv, padding_mask=mask, output_state=True)
    assert (o[0] == 0).all() and state.lengths.tolist() == [0, 20] and not state.recurrent[0].any()
    o, _ = attention(*(x[:, :1] for x in qkv), state=state)
    first, _ = slow_layer(attention, *(x[:1, :1] for x in qkv))
    assert relative_error(o[:1], first) <= 1e-12


# --- pieces, decoding, folding ------------------------------------------------------------------------------------


SIZES = [[53], [1] * 53, [7] * 7 + [4], [1, 16, 1, 15, 3, 17], [2, 1, 2, 30, 1, 1, 1, 15], [52, 1], [4, 4, 8, 9, 20, 8]]


@every_way
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_equal_the_whole(way, padded):
    attention = make_attention(**way)
    qkv, mask = make_qkv(attention, batch=5), None
    if padded:
        mask = make_mask()
        qkv = poisoned(qkv, mask)
    expected, state = slow_rows(attention, qkv, mask)
    for sizes, known in itertools.product(SIZES, (False,) if padded else (False, True)):  # the slow layer takes longest: once for all
        pieces, end = run_in_pieces(attention, qkv, sizes, mask, known=known)
        assert relative_error(pieces, expected) <= 1e-10, (sizes, known)
        if padded:
            assert (pieces[~mask] == 0).all(), (sizes, known)
        assert_same_state(attention, end, state)


@every_way
@pytest.mark.parametrize("sizes", [[26], [1] * 26, [3, 1, 1, 1, 20], [2, 11, 13]], ids=lambda sizes: f"{len(sizes)}_pieces")
def test_rows_that_begin_with_fewer_tokens_than_sinks(way, sizes):
    """Rows with 0 to 6 tokens in their first piece: of sinks that are not all there yet, nothing may be made up."""
    attention = make_attention(**way)
    assert attention.sink_tokens <= 5
    mask = torch.cat([torch.arange(6) >= 6 - torch.arange(7)[:, None], torch.ones(7, 26, dtype=torch.bool)], 1)
    mask[3, 7:9] = mask[2, 6] = False
    qkv = poisoned(make_qkv(attention, batch=7, tokens=32), mask)
    expected, end = slow_rows(attention, qkv, mask)
    found, last = run_in_pieces(attention, qkv, [6, *sizes], mask)
    assert relative_error(found, expected) <= 1e-10
    assert_same_state(attention, last, end)
    folded = attention.fold(*(x[:, :6] for x in qkv[1:]), mask[:, :6])
    rest = [x[:, 6:] for x in qkv]
    found, last = run_in_pieces(attention, rest, sizes, mask[:, 6:], folded)
    assert relative_error(found, expected[:, 6:]) <= 1e-10
    assert_same_state(attention, last, end)
    assert_same_state(attention, attention.fold(*rest[1:], mask[:, 6:], folded), end)


@every_way
@pytest.mark.parametrize("padded", [False, True])
def test_fold_then_decode_equals_from_the_start(way, padded):
    attention = make_attention(**way)
    qkv, mask = make_qkv(attention, batch=3), None
    if padded:
        mask = torch.arange(53) >= torch.tensor([[0], [9], [30]])
        qkv = poisoned(qkv, mask)
    expected, end = slow_rows(attention, qkv, mask)
    for cut in (1, 7, 8, 10, 15, 16, 17, 32, 40):
        before, after = (None, None) if mask is None else (mask[:, :cut], mask[:, cut:])
        folded = attention.fold(*(x[:, :cut] for x in qkv[1:]), before)
        assert_same_state(attention, folded, slow_rows(attention, [x[:, :cut] for x in qkv], before)[1])
        rest = [x[:, cut:] for x in qkv]
        single = min(18, 53 - cut)  # past every window
        walk = [1] * single + [53 - cut - single] * (cut + single < 53)
        for sizes, known in ((walk, False), ([53 - cut], False), ([53 - cut], not padded), ([2, 51 - cut], not padded)):
            found, last = run_in_pieces(attention, rest, sizes, after, folded, known)
            assert relative_error(found, expected[:, cut:]) <= 1e-10, (cut, sizes)
            assert_same_state(attention, last, end)
        assert_same_state(attention, attention.fold(*rest[1:], after, folded), end)


@every_way
def test_fp32_decoding_after_a_fold_stays_near_the_fp64_truth(way):
    attention = make_attention(**way)
    qkv, mask = make_qkv(attention, tokens=90), torch.arange(90) >= torch.tensor([[0], [21]])
    truth, _ = slow_rows(attention, qkv, mask)
    attention.float()
    qkv = [x.float() for x in qkv]
    state = attention.fold(*(x[:, :40] for x in qkv[1:]), mask[:, :40])
    o, _ = run_in_pieces(attention, [x[:, 40:] for x in qkv], [1] * 50, mask[:, 40:], state)
    assert o.dtype == torch.float32
    assert relative_error(o, truth[:, 40:]) <= 1e-5


@windows
def test_a_padded_step_changes_nothing_of_the_row(window_size):
    """Rows whose new token is padding keep their state, bit for bit, wherever they stand in a block."""
    attention = make_attention(window_size)
    qkv = make_qkv(attention, batch=4, tokens=33)
    mask = torch.arange(32) >= torch.tensor([[0], [0], [1], [8]])  # two rows at the end of a block
    _, state = attention(*(x[:, :32] for x in qkv), padding_mask=mask, output_state=True)
    real = torch.tensor([[True], [False], [False], [False]])
    o, after = attention(*poisoned((x[:, 32:] for x in qkv), real), padding_mask=real, state=state, output_state=True)
    assert (o[1:] == 0).all() and o[0].any()
    for x, y in zip(after, state, strict=True):
        assert torch.equal(x[1:], y[1:])
    assert after.lengths.tolist() == [33, 32, 31, 24]


@every_way
def test_packed_sequences_equal_each_alone(way):
    attention = make_attention(**way)
    qkv, boundaries = make_qkv(attention, batch=1, tokens=73), [0, 1, 20, 20, 61, 64, 73]
    o, _ = attention(*qkv, cu_seqlens=torch.tensor(boundaries, dtype=torch.int32))
    for start, end in itertools.pairwise(boundaries):
        if end > start:
            alone, _ = slow_layer(attention, *(x[:, start:end] for x in qkv))
            assert relative_error(o[:, start:end], alone) <= 1e-10


def test_packed_sequences_shorter_than_their_sinks():
    """All of them: even the row of the longest holds fewer tokens than there are sinks."""
    attention = make_attention(10, sink_tokens=5)
    qkv, boundaries = make_qkv(attention, batch=1, tokens=9), [0, 3, 7, 9]
    o, _ = attention(*qkv, cu_seqlens=torch.tensor(boundaries, dtype=torch.int32))
    for start, end in itertools.pairwise(boundaries):
        assert relative_error(o[:, start:end], slow_layer(attention, *(x[:, start:end] for x in qkv))[0]) <= 1e-12


@windows
def test_packed_sequences_take_and_give_no_state(window_size):
    attention = make_attention(window_size)
    qkv, boundaries = make_qkv(attention, batch=1, tokens=20), torch.tensor([0, 5, 20])
    _, state = attention(*qkv, output_state=True)
    for options in ({"state": state}, {"output_state": True}):
        with pytest.raises(ValueError, match="cu_seqlens"):
            attention(*qkv, cu_seqlens=boundaries, **options)


@windows
def test_a_state_of_other_rows_is_refused(window_size):
    attention = make_attention(window_size)
    _, state = attention(*make_qkv(attention, batch=3), output_state=True)
    for tokens in (1, 5):
        with pytest.raises(ValueError, match="3 sequences, the input 2"):
            attention(*make_qkv(attention, batch=2, tokens=tokens), state=state)


@windows
def test_size_of_the_state_does_not_depend_on_the_length(window_size):
    attention = make_attention(window_size)

    def sizes(state):
        return [(x.shape, x.dtype) for x in state]

    _, short = attention(*make_qkv(attention, tokens=1), output_state=True)
    _, long = attention(*make_qkv(attention, tokens=130), output_state=True)
    _, decoded = attention(*make_qkv(attention, tokens=1), state=long, output_state=True)
    _, more = attention(*make_qkv(attention, tokens=41), state=long, output_state=True)
    assert sizes(short) == sizes(long) == sizes(decoded) == sizes(more) == sizes(attention.fold(*make_qkv(attention, tokens=77)[1:]))
    slots = window_size + 4 if window_size else 0
    assert short.recurrent.shape == (2, 2, 2, 8, 10)
    assert short.window_k.shape == (2, slots, 2, 8) and short.window_v.shape == (2, slots, 2, 10)


@windows
def test_the_state_keeps_no_memory_of_longer_tensors(window_size):
    """A view would keep alive, unseen, all the keys and block states that it was cut from."""
    attention = make_attention(window_size).requires_grad_(False)
    qkv = make_qkv(attention, tokens=200)
    _, after_prefill = attention(*qkv, output_state=True)
    _, after_step = attention(*make_qkv(attention, tokens=1), state=after_prefill, output_state=True)
    for state in (after_prefill, after_step, attention.fold(*qkv[1:])):
        for name, x in state._asdict().items():
            assert x.untyped_storage().nbytes() == x.numel() * x.element_size(), name


# --- gradients, positions, softmax ----------------------------------------------------------------------------------


@every_way
def test_gradients_flow_to_every_parameter_and_input(way):
    options = {"heads": (4, 2), **way}
    attention = DualStateAttention(*options.pop("heads"), 8, **options)  # from its initial values
    qkv = [x.float().requires_grad_() for x in make_qkv(attention, tokens=50)]
    o, _ = attention(*qkv)
    (o * torch.randn_like(o)).sum().backward()
    for name, x in [*attention.named_parameters(), *zip("qkv", qkv, strict=True)]:
        assert x.grad is not None and x.grad.isfinite().all(), name
        assert x.grad.flatten(1).any(1).all() if x.ndim > 1 else x.grad.all(), name


@every_way
@pytest.mark.parametrize("cuts", [(30,), (5, 12, 30)], ids=str)
def test_gradients_flow_through_folds(way, cuts):
    """Of inputs and parameters, as if the layer itself had read what is folded, in one piece or several."""
    attention, mask = make_attention(**way), make_mask(40)
    q, k, v = (x.requires_grad_() for x in make_qkv(attention, batch=5, tokens=40))

    def gradients(state):
        o, _ = attention(q[:, 30:], k[:, 30:], v[:, 30:], padding_mask=mask[:, 30:], state=state)
        return torch.autograd.grad(o.sin().sum(), [q, k, v, *attention.parameters()])

    state = None
    for a, b in itertools.pairwise((0, *cuts)):
        state = attention.fold(k[:, a:b], v[:, a:b], mask[:, a:b], state)
    expected = gradients(attention(*(x[:, :30] for x in (q, k, v)), padding_mask=mask[:, :30], output_state=True)[1])
    for found, x in zip(gradients(state), expected, strict=True):
        torch.testing.assert_close(found, x, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("window_size, sink_tokens", [(0, 0), (2, 0), (2, 1), (4, 1)])
@pytest.mark.parametrize("write_gate", [False, True])
def test_gradcheck_in_fp64(window_size, sink_tokens, write_gate):
    attention = make_attention(window_size, (2, 1), 2, 3, sink_tokens=sink_tokens, write_gate=write_gate)
    names = [name for name, _ in attention.named_parameters()]
    q, k, v = make_qkv(attention, batch=1, tokens=7)
    mask = torch.tensor([[True, False, True, True, True, True, True]])

    def run(q, k, v, *parameters):
        return torch.func.functional_call(
            attention, dict(zip(names, parameters, strict=True)), (q, k, v), {"padding_mask": mask}, strict=True
        )[0]

    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *attention.parameters())]
    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def rotate(x, positions):
    """The rotary embedding of Llama: channels i and i + K/2 are a pair."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = (torch.cat([y, y], -1)[:, None] for y in (angle.cos(), angle.sin()))
    return (x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin).to(x.dtype)


@windows
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_shifting_all_positions_changes_nothing(window_size, dtype, bound):
    attention = make_attention(window_size, dtype=dtype)
    q, k, v = make_qkv(attention, tokens=80, dtype=dtype)
    near = torch.arange(80, dtype=torch.float64)
    o = [attention(rotate(q, near + shift), rotate(k, near + shift), v)[0] for shift in (0, 1000)]
    assert relative_error(o[1], o[0]) <= bound
    moved, _ = attention(rotate(q, 2 * near), rotate(k, 2 * near), v)
    assert relative_error(moved, o[0]) > 0.05, "positions have no effect here: the test above would prove nothing"


@pytest.mark.parametrize("window_size, sink_tokens", [(2, 1), (8, 0), (8, 4), (16, 3)])
@pytest.mark.parametrize("heads", HEADS)
def test_closed_states_leave_plain_window_softmax(window_size, sink_tokens, heads):
    attention = make_attention(window_size, heads, sink_tokens=sink_tokens)
    with torch.no_grad():
        attention.state_bias.fill_(-1e4)
    qkv = make_qkv(attention, tokens=53)
    o, state = attention(*(x[:, :52] for x in qkv), output_state=True)
    o = torch.cat([o, attention(*(x[:, 52:] for x in qkv), state=state)[0]], 1)
    query, key = torch.arange(53)[:, None], torch.arange(53)
    visible = (key <= query) & ((key > query - window_size) | (key < sink_tokens))
    softmax = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), attn_mask=visible, enable_gqa=True).transpose(1, 2)
    assert relative_error(o, softmax) <= 1e-12


@every_window
def test_a_text_that_fits_into_the_window_is_read_by_plain_softmax(way):
    attention = make_attention(**way)
    length = attention.window_size  # blocks 0 and 1; the states are empty until both are full
    qkv = make_qkv(attention, tokens=length + 1)
    o, _ = attention(*qkv)
    softmax = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), is_causal=True, enable_gqa=True).transpose(1, 2)
    assert relative_error(o[:, :length], softmax[:, :length]) <= 1e-12
    # The first token after it reads a block that is all sinks in some ways, and then is plain softmax too; so it is without states.
    plain = not attention.states or attention.sink_tokens == length // 2
    assert (relative_error(o[:, length], softmax[:, length]) <= 1e-12) == plain


# --- sinks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_size, sink_tokens", [(2, 1), (8, 1), (8, 4), (16, 5)])
def test_sinks_are_always_seen_and_never_taken_in(window_size, sink_tokens):
    attention = make_attention(window_size, sink_tokens=sink_tokens)
    q, k, v = make_qkv(attention, tokens=60)
    o, state = attention(q, k, v, output_state=True)
    for x in (k, v):
        original = x.clone()
        x[:, :sink_tokens] += 1
        changed, after = attention(q, k, v, output_state=True)
        assert torch.equal(after.recurrent, state.recurrent)
        assert all(relative_error(changed[:, t], o[:, t]) > 1e-4 for t in range(sink_tokens, 60))
        x.copy_(original)
    # The first token behind the sinks leaves the window and goes into the states.
    later = v.clone()
    later[:, sink_tokens] += 1
    with torch.no_grad():
        attention.state_bias.fill_(-1e4)
    o, state = attention(q, k, v, output_state=True)
    changed, after = attention(q, k, later, output_state=True)
    gone = sink_tokens + window_size
    assert torch.equal(changed[:, gone:], o[:, gone:]) and not torch.equal(changed[:, gone - 1], o[:, gone - 1])
    assert relative_error(after.recurrent, state.recurrent) > 1e-6


def test_without_a_window_there_are_no_sinks():
    attention = make_attention(0, sink_tokens=4)
    assert attention.sink_tokens == 0
    qkv = make_qkv(attention)
    _, state = attention(*(x[:, :3] for x in qkv), output_state=True)
    assert state.recurrent.any() and state.window_k.shape[1] == 0


# --- gates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write_gate", [False, True])
def test_gates_are_low_rank_and_linear_maps_of_the_normalised_value(write_gate):
    attention = make_attention(write_gate=write_gate)
    v = make_qkv(attention)[2]
    gates, writes = attention.gate_logits(v)
    assert gates.shape == (2, 53, 2, 2, 4)
    for head in range(2):
        x = v[:, :, head]
        x = x / (x.square().mean(-1, keepdim=True) + NORM_EPS).sqrt()
        expected = (x @ attention.gate_down[head] @ attention.gate_up[head]).view(2, 53, 2, 4) + attention.gate_bias[head]
        assert relative_error(gates[:, :, head], expected) <= 1e-12
        if write_gate:
            expected = x @ attention.write_weight[head] + attention.write_bias[head]
            assert writes.shape == (2, 53, 2, 2) and relative_error(writes[:, :, head], expected) <= 1e-12
    if not write_gate:
        assert writes is None and not any("write" in name for name, _ in attention.named_parameters())
    assert {x.dtype for x in attention.bfloat16().gate_logits(v.bfloat16()) if x is not None} == {torch.float32}


def test_gates_of_a_head_read_that_head_only_and_not_its_length():
    attention = make_attention()
    v = make_qkv(attention)[2]
    other = v.clone()
    other[:, :, 1] = torch.randn_like(other[:, :, 1])
    for found, changed, scaled in zip(*(attention.gate_logits(x) for x in (v, other, 100 * v)), strict=True):
        assert torch.equal(changed[:, :, 0], found[:, :, 0])
        assert not torch.equal(changed[:, :, 1], found[:, :, 1])
        assert relative_error(scaled, found) <= 1e-4


@windows
def test_open_write_gates_are_none_at_all_and_closed_ones_keep_the_states_empty(window_size):
    attention, without = make_attention(window_size), make_attention(window_size, write_gate=False)
    without.load_state_dict(attention.state_dict(), strict=False)
    qkv = make_qkv(attention)
    expected, end = without(*qkv, output_state=True)
    assert relative_error(attention(*qkv)[0], expected) > 1e-3
    with torch.no_grad():
        attention.write_weight.zero_()
        attention.write_bias.fill_(1e4)
    for sizes in ([53], [30] + [1] * 23):
        found, state = run_in_pieces(attention, qkv, sizes)
        assert relative_error(found, expected) <= 1e-12
        assert_same_state(attention, state, end)
    with torch.no_grad():
        attention.write_bias.fill_(-1e4)
    o, state = attention(*qkv, output_state=True)
    assert not state.recurrent.any()
    assert o.any() == bool(window_size)


def test_write_gates_start_half_open():
    attention = DualStateAttention(4, 2, 8)
    writes = attention.gate_logits(torch.randn(1, 5, 2, 8))[1]
    assert torch.equal(writes.sigmoid(), torch.full((1, 5, 2, 2), 0.5))


def test_mix_is_a_softmax_over_the_two_states():
    attention = make_attention()
    assert torch.allclose(attention.mix().sum(-1), torch.ones(4, dtype=torch.float64), atol=1e-15)
    assert torch.equal(DualStateAttention(4, 2, 8).mix(), torch.full((4, 2), 0.5))


@pytest.mark.parametrize("normalizer", [1.0, 16.0])
@pytest.mark.parametrize("half_life", [1.0, 4.0, 16.0, 64.0, 1024.0, 1e5])
def test_half_life_to_logit_is_the_inverse_of_the_gate(half_life, normalizer):
    logit = torch.tensor([half_life_to_logit(half_life, normalizer)], dtype=torch.float64)
    log_decay = log_decays(logit, 1, normalizer)
    assert math.exp(half_life * float(log_decay)) == pytest.approx(0.5, rel=1e-9)


def test_known_half_lives():
    for half_life, logit in {4: -2.708, 16: 0.0, 64: 1.665, 1024: 4.520}.items():
        assert half_life_to_logit(half_life) == pytest.approx(logit, abs=1e-3)


@pytest.mark.parametrize("half_life", [0, -1.0, math.inf, math.nan])
def test_half_lives_that_are_no_time_are_refused(half_life):
    with pytest.raises(ValueError, match="half-life"):
        half_life_to_logit(half_life)


@pytest.mark.parametrize(
    "half_lives, expected",
    [
        ((512.0, 8.0), ([512.0] * 4, [8.0] * 4)),
        (((64.0, 4096.0), (8.0, 1.0)), ([64.0, 256.0, 1024.0, 4096.0], [8.0, 4.0, 2.0, 1.0])),
        ([[10, 80], 3], ([10.0, 20.0, 40.0, 80.0], [3.0] * 4)),
    ],
)
def test_gates_start_at_the_half_lives_asked_for(half_lives, expected):
    """A zero value vector leaves the bias alone."""
    attention = DualStateAttention(4, 2, 8, half_lives=half_lives)
    found = -math.log(2) / log_decays(attention.gate_logits(torch.zeros(1, 1, 2, 8))[0], 4)[0, 0]
    assert found.shape == (2, 2, 4)
    torch.testing.assert_close(attention.bias_half_lives(), found)
    for head in range(2):
        torch.testing.assert_close(found[head], torch.tensor(expected), rtol=1e-4, atol=0)


def test_defaults():
    attention = DualStateAttention(4, 2, 8)
    assert (attention.window_size, attention.sink_tokens, attention.write_gate) == (128, 4, True)
    assert attention.half_lives == ((64.0, 4096.0), (8.0, 256.0))


def test_a_single_channel_starts_at_the_fastest_half_life():
    attention = DualStateAttention(4, 2, 2, half_lives=((64.0, 4096.0), 8.0))
    torch.testing.assert_close(attention.bias_half_lives(), torch.tensor([[[64.0], [8.0]]] * 2), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("multiple of", {"num_kv_heads": 3}),
        ("key_dim must be even", {"key_dim": 7}),
        ("lower_bound", {"gate_lower_bound": -2.0}),
        ("half-life", {"half_lives": (0, 1)}),
        ("half-life", {"half_lives": (4, (1, -1))}),
        ("half-life", {"half_lives": (4, (math.nan, 1))}),
        (r"half_lives must be two, .* got \(16\.0,\)", {"half_lives": (16.0,)}),
        (r"half_lives must be two, .* got \(1, 2, 3\)", {"half_lives": (1, 2, 3)}),
        (r"pair \(fastest, slowest\), got \(1, 2, 3\)", {"half_lives": (4, (1, 2, 3))}),
        ("window_size must be an even number of tokens, or 0 for no window, got 7", {"window_size": 7}),
        ("window_size must be an even number of tokens, or 0 for no window, got -2", {"window_size": -2}),
        ("sink_tokens must be from 0 to half the window of 8, got 5", {"window_size": 8, "sink_tokens": 5}),
        ("sink_tokens must be from 0 to half the window of 2, got 4", {"window_size": 2}),
        ("sink_tokens .* got -1", {"sink_tokens": -1}),
        ("sink_tokens .* got -1", {"window_size": 0, "sink_tokens": -1}),
        ("states=False leaves a window alone, and window_size=0 none", {"window_size": 0, "states": False}),
        ("states must be True or False, got 0", {"states": 0}),
    ],
)
def test_bad_sizes_are_refused(message, arguments):
    good = {"num_heads": 4, "num_kv_heads": 2, "key_dim": 8}
    DualStateAttention(**good)
    with pytest.raises(ValueError, match=message):
        DualStateAttention(**{**good, **arguments})


# --- precision ----------------------------------------------------------------------------------------------------


@windows
def test_bf16_stays_near_fp32(window_size):
    attention = make_attention(window_size, dtype=torch.float32)
    qkv = make_qkv(attention, tokens=90, dtype=torch.bfloat16)
    attention.bfloat16()
    o, state = attention(*qkv, output_state=True)
    steps, _ = run_in_pieces(attention, qkv, [40] + [1] * 50)
    assert o.dtype == torch.bfloat16 and state.recurrent.dtype == torch.float32 and state.window_k.dtype == torch.bfloat16
    attention.float()
    truth, end = attention(*(x.float() for x in qkv), output_state=True)
    assert relative_error(o, truth) <= 1e-2
    assert relative_error(steps, truth) <= 1e-2
    assert relative_error(state.recurrent, end.recurrent) <= 1e-4
