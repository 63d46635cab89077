"""The layer between its projections: every way through it gives what the plain formula gives."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from dsla_hf import DualStateAttention
from dsla_hf.attention import NORM_EPS, half_life_to_logit
from dsla_kernels.reference import dual_state_attention_recurrent, log_decays

WINDOWS = [0, 8, 16]
HEADS = [(4, 4), (4, 2), (6, 1)]
windows = pytest.mark.parametrize("window_size", WINDOWS)
every_way = pytest.mark.parametrize("window_size, heads", [(0, (4, 2)), (8, (4, 4)), (8, (6, 1)), (16, (4, 2))])


def relative_error(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


def make_attention(window_size=8, heads=(4, 2), key_dim=8, value_dim=10, dtype=torch.float64, **options):
    """A layer whose parameters are all away from their start."""
    attention = DualStateAttention(*heads, key_dim, value_dim, window_size=window_size, gate_rank=3, **options).to(dtype)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
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


def run_in_pieces(attention, qkv, sizes, mask=None, state=None):
    """The outputs of successive calls, one after the other, and the last state."""
    outputs, start = [], 0
    for size in sizes:
        piece = slice(start, start + size)
        o, state = attention(
            *(x[:, piece] for x in qkv), padding_mask=None if mask is None else mask[:, piece], state=state, output_state=True
        )
        outputs.append(o)
        start += size
    assert start == qkv[0].shape[1]
    return torch.cat(outputs, 1), state


def assert_same_state(attention, found, expected, bound=1e-10):
    """Equal in everything that later tokens can read."""
    assert torch.equal(found.lengths, expected.lengths)
    scale = expected.recurrent.abs().max().clamp_min(1)
    assert ((found.recurrent - expected.recurrent).abs() <= bound * scale).all()
    assert found.window_k.shape == expected.window_k.shape and found.window_v.shape == expected.window_v.shape
    if attention.window_size:
        for x, y in ((found.window_k, expected.window_k), (found.window_v, expected.window_v)):
            for row, count in enumerate(found.lengths.tolist()):
                first = max(count // attention.window_size - 1, 0) * attention.window_size
                slots = [token % (2 * attention.window_size) for token in range(first, count)]
                assert torch.equal(x[row, slots], y[row, slots])


def slow_layer(attention, q, k, v):
    """The documented formula, a token at a time, over one text without padding."""
    size, tokens, group = attention.window_size, q.shape[1], attention.num_heads // attention.num_kv_heads
    gate_logits, mix = attention.gate_logits(v), attention.mix()
    options = {"gate_normalizer": attention.gate_normalizer, "lower_bound": attention.gate_lower_bound, "scale": attention.scale}
    outputs = []
    for t in range(tokens):
        first = max(t // size - 1, 0) * size if size else t + 1
        read = torch.zeros_like(attention.norm_weight)[None].expand(q.shape[0], -1, -1)
        if first:
            before = (k[:, :first], v[:, :first], gate_logits[:, :first])
            _, state = dual_state_attention_recurrent(q[:, :first], *before, mix, output_final_state=True, **options)
            mixed = torch.einsum("hi,bhikv->bhkv", mix, state.repeat_interleave(group, dim=1))
            read = attention.scale * torch.einsum("bhk,bhkv->bhv", q[:, t], mixed)
        rms = (read.square().mean(-1) + NORM_EPS).sqrt()
        normalised = read / rms[..., None] * attention.norm_weight
        if not size:
            outputs.append(normalised)
            continue
        keys, values = (x[:, first : t + 1].repeat_interleave(group, dim=2) for x in (k, v))
        scores = attention.scale * torch.einsum("bhk,bshk->bhs", q[:, t], keys)
        softmax = torch.einsum("bhs,bshv->bhv", scores.softmax(-1), values)
        alpha = torch.sigmoid(attention.state_gain * rms.log() + attention.state_bias - scores.exp().sum(-1).log())[..., None]
        outputs.append((1 - alpha) * softmax + alpha * normalised if first else softmax)
    return torch.stack(outputs, 1)


@windows
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", [1, 8, 37])
def test_layer_equals_the_documented_formula(window_size, heads, tokens):
    attention = make_attention(window_size, heads, scale=0.6, gate_normalizer=8.0, gate_lower_bound=-0.7)
    qkv = make_qkv(attention, tokens=tokens)
    o, state = attention(*qkv)
    assert state is None and o.shape == (2, tokens, heads[0], 10)
    assert relative_error(o, slow_layer(attention, *qkv)) <= 1e-10


@every_way
def test_every_part_of_the_layer_matters(window_size, heads):
    """Without this the equalities of this file could hold for a layer that ignores its states."""
    attention = make_attention(window_size, heads)
    q, k, v = make_qkv(attention, tokens=60)
    o, _ = attention(q, k, v)
    early = v.clone()
    early[:, 3] += 1
    changed, _ = attention(q, k, early)
    assert relative_error(changed[:, 40:], o[:, 40:]) > 1e-4
    assert relative_error(changed[:, :3], o[:, :3]) <= 1e-12
    for name, parameter in attention.named_parameters():
        with torch.no_grad():
            parameter.add_(0.3)
        # A constant on both mix logits is no change of their softmax.
        assert relative_error(attention(q, k, v)[0], o) > 1e-7 or name == "mix_logits", name
        with torch.no_grad():
            parameter.sub_(0.3)


# --- padding ------------------------------------------------------------------------------------------------------


@every_way
def test_padding_anywhere_equals_the_row_alone(window_size, heads):
    attention, mask = make_attention(window_size, heads), make_mask()
    qkv = poisoned(make_qkv(attention, batch=5), mask)
    o, state = attention(*qkv, padding_mask=mask, output_state=True)
    assert (o[~mask] == 0).all()
    assert state.lengths.tolist() == mask.sum(1).tolist()
    for row in range(5):
        alone, end = attention(*(x[row : row + 1, mask[row]] for x in qkv), output_state=True)
        assert relative_error(o[row, mask[row]], alone[0]) <= 1e-10
        assert_same_state(attention, type(state)(*(x[row : row + 1] for x in state)), end)


@every_way
def test_gradients_pass_padding_by(window_size, heads):
    """Every gradient, of inputs and parameters, is that of the rows without their padding."""
    attention, mask = make_attention(window_size, heads), make_mask()
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
    first, _ = attention(*(x[:1, :1] for x in qkv))
    assert relative_error(o[:1], first) <= 1e-12


# --- pieces, decoding, folding ------------------------------------------------------------------------------------


@every_way
@pytest.mark.parametrize(
    "sizes", [[53], [1] * 53, [7] * 7 + [4], [1, 16, 1, 15, 3, 17], [30, 1, 1, 1, 20], [52, 1]], ids=lambda sizes: f"{len(sizes)}_pieces"
)
@pytest.mark.parametrize("padded", [False, True])
def test_pieces_equal_the_whole(window_size, heads, sizes, padded):
    attention = make_attention(window_size, heads)
    qkv, mask = make_qkv(attention, batch=5), None
    if padded:
        mask = make_mask()
        qkv = poisoned(qkv, mask)
    o, state = attention(*qkv, padding_mask=mask, output_state=True)
    pieces, end = run_in_pieces(attention, qkv, sizes, mask)
    assert relative_error(pieces, o) <= 1e-10
    if padded:
        assert (pieces[~mask] == 0).all()
    assert_same_state(attention, end, state)


@every_way
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("cut", [1, 7, 8, 15, 16, 17, 32, 40])
def test_fold_then_decode_equals_from_the_start(window_size, heads, padded, cut):
    attention = make_attention(window_size, heads)
    qkv, mask = make_qkv(attention, batch=3), None
    if padded:
        mask = torch.arange(53) >= torch.tensor([[0], [9], [30]])
        qkv = poisoned(qkv, mask)
    o, end = attention(*qkv, padding_mask=mask, output_state=True)
    folded = attention.fold(*(x[:, :cut] for x in qkv[1:]), None if mask is None else mask[:, :cut])
    _, state = attention(*(x[:, :cut] for x in qkv), padding_mask=None if mask is None else mask[:, :cut], output_state=True)
    assert_same_state(attention, folded, state)
    for sizes in ([1] * (53 - cut), [53 - cut]):
        rest = [x[:, cut:] for x in qkv]
        found, last = run_in_pieces(attention, rest, sizes, None if mask is None else mask[:, cut:], folded)
        assert relative_error(found, o[:, cut:]) <= 1e-10
        assert_same_state(attention, last, end)


@every_way
def test_fp32_decoding_after_a_fold_stays_near_the_fp64_truth(window_size, heads):
    attention = make_attention(window_size, heads)
    qkv, mask = make_qkv(attention, tokens=90), torch.arange(90) >= torch.tensor([[0], [21]])
    truth, _ = attention(*qkv, padding_mask=mask)
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
def test_packed_sequences_equal_each_alone(window_size, heads):
    attention = make_attention(window_size, heads)
    qkv, boundaries = make_qkv(attention, batch=1, tokens=70), [0, 1, 20, 20, 61, 70]
    o, _ = attention(*qkv, cu_seqlens=torch.tensor(boundaries, dtype=torch.int32))
    for start, end in itertools.pairwise(boundaries):
        if end > start:
            alone, _ = attention(*(x[:, start:end] for x in qkv))
            assert relative_error(o[:, start:end], alone) <= 1e-10


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
    assert short.recurrent.shape == (2, 2, 2, 8, 10) and short.window_k.shape == (2, 2 * window_size, 2, 8)


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


# --- gradients, positions, gates ----------------------------------------------------------------------------------


@every_way
def test_gradients_flow_to_every_parameter_and_input(window_size, heads):
    attention = DualStateAttention(*heads, 8, window_size=window_size)  # from its initial values
    qkv = [x.float().requires_grad_() for x in make_qkv(attention, tokens=50)]
    o, _ = attention(*qkv)
    (o * torch.randn_like(o)).sum().backward()
    for name, x in [*attention.named_parameters(), *zip("qkv", qkv, strict=True)]:
        assert x.grad is not None and x.grad.isfinite().all(), name
        assert x.grad.flatten(1).any(1).all() if x.ndim > 1 else x.grad.all(), name


@pytest.mark.parametrize("window_size", [0, 2])
def test_gradcheck_in_fp64(window_size):
    attention = make_attention(window_size, (2, 1), key_dim=2, value_dim=3)
    names = [name for name, _ in attention.named_parameters()]
    q, k, v = make_qkv(attention, batch=1, tokens=7)
    mask = torch.tensor([[True, False, True, True, True, True, True]])

    def run(q, k, v, *parameters):
        return torch.func.functional_call(
            attention, dict(zip(names, parameters, strict=True)), (q, k, v), {"padding_mask": mask}, strict=True
        )[0]

    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v, *attention.parameters())]
    assert torch.autograd.gradcheck(run, leaves)


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


@pytest.mark.parametrize("window_size", [8, 16])
@pytest.mark.parametrize("heads", HEADS)
def test_closed_states_leave_plain_block_softmax(window_size, heads):
    attention = make_attention(window_size, heads)
    with torch.no_grad():
        attention.state_bias.fill_(-1e4)
    qkv = make_qkv(attention, tokens=53)
    o, state = attention(*qkv, output_state=True)
    block = torch.arange(53) // window_size
    distance = block[:, None] - block
    visible = torch.ones(53, 53).tril().bool() & (distance <= 1)
    softmax = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in qkv), attn_mask=visible, enable_gqa=True).transpose(1, 2)
    assert relative_error(o, softmax) <= 1e-12
    step = make_qkv(attention, tokens=1)
    keys, values = (torch.cat([x, y], 1).transpose(1, 2) for x, y in zip(qkv[1:], step[1:], strict=True))
    first = (53 // window_size - 1) * window_size
    softmax = F.scaled_dot_product_attention(step[0].transpose(1, 2), keys[:, :, first:], values[:, :, first:], enable_gqa=True)
    assert relative_error(attention(*step, state=state)[0], softmax.transpose(1, 2)) <= 1e-12


def test_gates_of_a_head_read_that_head_only_and_not_its_length():
    attention = make_attention()
    v = make_qkv(attention)[2]
    gates = attention.gate_logits(v)
    assert gates.shape == (2, 53, 2, 2, 4)
    other = v.clone()
    other[:, :, 1] = torch.randn_like(other[:, :, 1])
    assert torch.equal(attention.gate_logits(other)[:, :, 0], gates[:, :, 0])
    assert not torch.equal(attention.gate_logits(other)[:, :, 1], gates[:, :, 1])
    assert relative_error(attention.gate_logits(100 * v), gates) <= 1e-4


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


def test_gates_start_at_the_half_lives_asked_for():
    """A zero value vector leaves the bias alone."""
    attention = DualStateAttention(4, 2, 8, half_lives=(512.0, 8.0))
    half_lives = -math.log(2) / log_decays(attention.gate_logits(torch.zeros(1, 1, 2, 8)), 4)[0, 0]
    assert half_lives.shape == (2, 2, 4)
    torch.testing.assert_close(attention.bias_half_lives(), half_lives)
    torch.testing.assert_close(half_lives[:, 0], torch.full((2, 4), 512.0), rtol=1e-4, atol=0)
    torch.testing.assert_close(half_lives[:, 1], torch.full((2, 4), 8.0), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("multiple of", (4, 3, 8)),
        ("key_dim must be even", (4, 2, 7)),
        ("lower_bound", (4, 2, 8, 8, -2.0)),
        ("half-life", (4, 2, 8, 8, -1.0, (0, 1))),
    ],
)
def test_bad_sizes_are_refused(message, arguments):
    names = ("num_heads", "num_kv_heads", "key_dim", "value_dim", "gate_lower_bound", "half_lives")
    with pytest.raises(ValueError, match=message):
        DualStateAttention(**dict(zip(names, arguments, strict=False)))


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
