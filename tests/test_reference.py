"""The PyTorch truth of the kernels: recurrent, chunked and windowed forms against each other, slow loops and plain floats."""

import math

import pytest
import torch

from dsla_kernels import block_states, dual_state_attention, dual_state_window_attention, kernel_path, log_decays, reference
from dsla_kernels.reference import dual_state_attention_recurrent

FORMS = {"recurrent": dual_state_attention_recurrent, "chunked": dual_state_attention}
NAMES = ("q", "k", "v", "gate_logits", "mix")


def relative_error(a, b):
    """‖a − b‖ / ‖b‖ in fp64; the plain norm of a where b is all zero."""
    a, b = a.detach().double(), b.detach().double()
    norm = b.norm()
    return float((a - b).norm() / norm if norm > 0 else a.norm())


def make_inputs(batch=2, tokens=70, heads=4, kv_heads=2, key_dim=12, value_dim=20, decays=None, gates="random", dtype=torch.float64):
    """q, k, v, gate logits and mix in `dtype`, drawn in fp64 so that every dtype holds the same numbers up to rounding."""
    shape = (batch, tokens, kv_heads, 2, decays or key_dim // 2)
    gate_logits = {
        # Between a half-life of a few thousand tokens and the bound (-20 / 16 = -1.25), on both sides of it.
        "random": lambda: torch.randn(shape, dtype=torch.float64) * 8,
        "bound": lambda: torch.full(shape, -100.0, dtype=torch.float64),
        "open": lambda: torch.full(shape, 20.0, dtype=torch.float64),
    }[gates]()
    q = torch.randn(batch, tokens, heads, key_dim, dtype=torch.float64)
    k = torch.randn(batch, tokens, kv_heads, key_dim, dtype=torch.float64)
    v = torch.randn(batch, tokens, kv_heads, value_dim, dtype=torch.float64)
    mix = torch.randn(heads, 2, dtype=torch.float64).softmax(-1)
    return tuple(x.to(dtype) for x in (q, k, v, gate_logits, mix))


def make_state(rows, kv_heads=2, key_dim=12, value_dim=20, dtype=torch.float64):
    return torch.randn(rows, kv_heads, 2, key_dim, value_dim, dtype=torch.float64).to(dtype)


def with_gradients(form, inputs, state, **options):
    """Output, final state and the gradients of a random weighted sum of both, by name."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, state)]
    o, final = form(*leaves[:-1], initial_state=leaves[-1], output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, final)]
    ((o * weights[0]).sum() + (final * weights[1]).sum()).backward()
    gradients = {f"d{name}": leaf.grad for name, leaf in zip((*NAMES, "initial_state"), leaves, strict=True)}
    return {"o": o, "final_state": final, **gradients}


def assert_same_results(found, expected, bound):
    errors = {name: relative_error(found[name], x) for name, x in expected.items()}
    assert all(error <= bound for error in errors.values()), errors


# --- recurrent against chunked ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 200, 1000])
def test_chunked_equals_recurrent_with_all_gradients(tokens):
    inputs, state = make_inputs(tokens=tokens), make_state(2)
    truth = with_gradients(dual_state_attention_recurrent, inputs, state)
    assert_same_results(with_gradients(dual_state_attention, inputs, state), truth, 1e-11)
    single = tuple(x.float() for x in inputs)
    expected = with_gradients(dual_state_attention_recurrent, single, state.float())
    assert_same_results(with_gradients(dual_state_attention, single, state.float()), expected, 1e-5)


@pytest.mark.parametrize("gates", ["bound", "open"])
@pytest.mark.parametrize("form", FORMS)
def test_extreme_gates_in_fp32_equal_the_fp64_truth(form, gates):
    inputs, state = make_inputs(tokens=200, gates=gates), make_state(2)
    truth = with_gradients(dual_state_attention_recurrent, inputs, state)
    found = with_gradients(FORMS[form], tuple(x.float() for x in inputs), state.float())
    if gates == "bound":
        assert not truth["dgate_logits"].any() and not found["dgate_logits"].any()
    assert_same_results(found, truth, 1e-5)


@pytest.mark.parametrize("ratio", [1, 2, 3, 8])
@pytest.mark.parametrize("shared_decays", [True, False])
def test_grouped_heads_and_both_gate_sizes(ratio, shared_decays):
    inputs = make_inputs(tokens=70, heads=2 * ratio, decays=6 if shared_decays else 12)
    state = make_state(2)
    truth = with_gradients(dual_state_attention_recurrent, inputs, state)
    assert_same_results(with_gradients(dual_state_attention, inputs, state), truth, 1e-11)
    # A query head reads the KV head of its group: the same as ordinary heads over repeated keys.
    q, k, v, gate_logits, mix = inputs
    repeated = (x.repeat_interleave(ratio, dim=2) for x in (k, v, gate_logits))
    o, _ = dual_state_attention(q, *repeated, mix, initial_state=state.repeat_interleave(ratio, dim=1))
    assert relative_error(o, truth["o"]) <= 1e-12


def test_one_decay_per_rotary_pair_equals_the_decay_written_out():
    q, k, v, gate_logits, mix = make_inputs(tokens=70, decays=6)
    o, _ = dual_state_attention(q, k, v, gate_logits, mix)
    twice, _ = dual_state_attention(q, k, v, torch.cat([gate_logits, gate_logits], -1), mix)
    assert torch.equal(o, twice)


@pytest.mark.parametrize("form", FORMS)
def test_scale_normalizer_and_bound_are_used(form):
    inputs = make_inputs(tokens=30)
    q, k, v, gate_logits, mix = inputs
    o, _ = FORMS[form](*inputs)
    assert relative_error(FORMS[form](*inputs, scale=1.0)[0], o * math.sqrt(12)) <= 1e-12
    options = {"gate_normalizer": 4.0, "lower_bound": -0.5}
    log_g = torch.nn.functional.logsigmoid(gate_logits).div(4).clamp_min(-0.5)
    expected = slow_states(k, v, torch.cat([log_g, log_g], -1), torch.zeros_like(make_state(2)))
    _, final = FORMS[form](*inputs, output_final_state=True, **options)
    assert relative_error(final, expected[:, -1]) <= 1e-12
    assert FORMS[form](*inputs)[1] is None


def slow_states(k, v, log_g, state):
    """States after every token, one entry more than tokens, by the formula of the paper."""
    states = [state]
    for t in range(k.shape[1]):
        added = k[:, t, :, None, :, None] * v[:, t, :, None, None, :]
        states.append(states[-1] * log_g[:, t].exp()[..., None] + added)
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("form", FORMS)
def test_three_tokens_by_hand(form):
    """K = V = 1, one head, every number computed by plain Python floats."""
    q, k, v = [0.5, -1.0, 2.0], [1.0, 0.25, -0.5], [3.0, -2.0, 1.5]
    logits, mix, scale = [[0.0, 2.0], [-1.0, -60.0], [1.5, 0.3]], (0.3, 0.7), 0.9

    def decay(x):
        return math.exp(max(-math.log1p(math.exp(-x)) / 16, -1.25))

    states, expected = [0.0, 0.0], []
    for t in range(3):
        states = [decay(logits[t][i]) * states[i] + k[t] * v[t] for i in range(2)]
        expected.append(scale * q[t] * sum(w * s for w, s in zip(mix, states, strict=True)))
    assert expected[0] == pytest.approx(0.9 * 0.5 * 3.0)  # k v of the first token, whatever the gates and mix

    def tensor(x, *shape):
        return torch.tensor(x, dtype=torch.float64).view(*shape)

    o, final = FORMS[form](
        *(tensor(x, 1, 3, 1, 1) for x in (q, k, v)), tensor(logits, 1, 3, 1, 2, 1), tensor(mix, 1, 2), scale=scale, output_final_state=True
    )
    assert o.flatten().tolist() == pytest.approx(expected, rel=1e-13)
    assert final.flatten().tolist() == pytest.approx(states, rel=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_fp64(form, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_SIZE", 3)  # seven tokens then are three chunks
    inputs = make_inputs(batch=1, tokens=7, heads=2, kv_heads=1, key_dim=2, value_dim=3)
    state = make_state(1, 1, 2, 3)
    mask = torch.tensor([[True, True, False, True, True, True, True]])
    leaves = [x.clone().requires_grad_() for x in (*inputs, state)]

    def run(q, k, v, gate_logits, mix, state):
        return FORMS[form](q, k, v, gate_logits, mix, initial_state=state, padding_mask=mask, output_final_state=True)

    assert torch.autograd.gradcheck(run, leaves)


def test_bf16_inputs_stay_near_the_fp64_truth():
    inputs = make_inputs(tokens=300, dtype=torch.bfloat16)
    truth, state = dual_state_attention_recurrent(*(x.double() for x in inputs), output_final_state=True)
    for form in FORMS.values():
        o, final = form(*inputs, output_final_state=True)
        assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
        assert relative_error(o, truth) <= 5e-3
        assert relative_error(final, state) <= 1e-4


def test_long_text_at_the_bound_and_open_stays_finite_in_fp32():
    gate_logits = torch.full((1, 4096, 1, 2, 4), 30.0)
    gate_logits[..., 1, :] = -1e4
    q, k, v = (torch.randn(1, 4096, 1, 8) for _ in range(3))
    mix = torch.full((1, 2), 0.5)
    for x in with_gradients(dual_state_attention, (q, k, v, gate_logits, mix), torch.zeros(1, 1, 2, 8, 8)).values():
        assert x.isfinite().all()


# --- state carried on, padding, packing ---------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 63, 64, 100, 129])
@pytest.mark.parametrize("form", FORMS)
def test_two_calls_with_the_state_carried_on_equal_one(form, cut):
    *inputs, mix = make_inputs(tokens=130)
    state = make_state(2)
    o, final = FORMS[form](*inputs, mix, initial_state=state, output_final_state=True)
    first, middle = FORMS[form](*(x[:, :cut] for x in inputs), mix, initial_state=state, output_final_state=True)
    second, end = FORMS[form](*(x[:, cut:] for x in inputs), mix, initial_state=middle, output_final_state=True)
    assert relative_error(torch.cat([first, second], 1), o) <= 1e-11
    assert relative_error(end, final) <= 1e-11


def padded_masks(tokens=80):
    """Left, right and middle padding, every second token, none, and a row of nothing but padding."""
    mask = torch.ones(6, tokens, dtype=torch.bool)
    mask[0, :13] = False
    mask[1, 67:] = False
    mask[2, 20:50] = False
    mask[3, ::2] = False
    mask[5] = False
    return mask


@pytest.mark.parametrize("form", FORMS)
def test_padding_anywhere_leaves_no_trace(form):
    mask = padded_masks()
    *inputs, mix = make_inputs(batch=6, tokens=80)
    inputs = [x.masked_fill(~mask.view(6, 80, *[1] * (x.ndim - 2)), float("nan")) for x in inputs]
    state = make_state(6)
    o, final = FORMS[form](*inputs, mix, padding_mask=mask, initial_state=state, output_final_state=True)
    assert (o[~mask] == 0).all()
    assert torch.equal(final[5], state[5])
    for row in range(5):
        alone, end = dual_state_attention_recurrent(
            *(x[row : row + 1, mask[row]] for x in inputs), mix, initial_state=state[row : row + 1], output_final_state=True
        )
        assert relative_error(o[row, mask[row]], alone[0]) <= 1e-11
        assert relative_error(final[row], end[0]) <= 1e-11


@pytest.mark.parametrize("form", FORMS)
def test_integer_masks_work_like_bool(form):
    mask = padded_masks()
    inputs = make_inputs(batch=6, tokens=80)
    assert torch.equal(FORMS[form](*inputs, padding_mask=mask)[0], FORMS[form](*inputs, padding_mask=mask.long())[0])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_pass_padding_by(form):
    """Real tokens get the gradients of the row without padding, padded ones exactly zero."""
    mask = padded_masks()[:5]
    *inputs, mix = make_inputs(batch=5, tokens=80)
    state, weights = make_state(5), torch.randn(5, 80, 4, 20, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (*inputs, state)]
    o, _ = FORMS[form](*leaves[:-1], mix, padding_mask=mask, initial_state=leaves[-1])
    (o * weights).sum().backward()
    for row in range(5):
        alone = [x.detach()[row : row + 1].clone() for x in leaves]
        alone = [x[:, mask[row]].requires_grad_() for x in alone[:-1]] + [alone[-1].requires_grad_()]
        o, _ = dual_state_attention_recurrent(*alone[:-1], mix, initial_state=alone[-1])
        (o[0] * weights[row, mask[row]]).sum().backward()
        for leaf, one in zip(leaves[:-1], alone[:-1], strict=True):
            assert relative_error(leaf.grad[row, mask[row]], one.grad[0]) <= 1e-11
            assert (leaf.grad[row, ~mask[row]] == 0).all()
        assert relative_error(leaves[-1].grad[row], alone[-1].grad[0]) <= 1e-11


@pytest.mark.parametrize("form", FORMS)
def test_packed_sequences_equal_each_alone(form):
    """One of the sequences is empty, one has a single token, one is longer than a chunk."""
    boundaries = torch.tensor([0, 5, 5, 75, 76, 140], dtype=torch.int32)
    *inputs, mix = make_inputs(batch=1, tokens=140)
    state = make_state(5)
    o, final = FORMS[form](*inputs, mix, cu_seqlens=boundaries, initial_state=state, output_final_state=True)
    for n, (start, end) in enumerate(zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True)):
        if start == end:
            assert torch.equal(final[n], state[n])
            continue
        alone, last = dual_state_attention_recurrent(
            *(x[:, start:end] for x in inputs), mix, initial_state=state[n : n + 1], output_final_state=True
        )
        assert relative_error(o[:, start:end], alone) <= 1e-11
        assert relative_error(final[n], last[0]) <= 1e-11


def rotate(x, positions, base=10000.0):
    """The rotary embedding of Llama: channels i and i + K/2 are a pair."""
    half = x.shape[-1] // 2
    angle = positions[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin = (torch.cat([y, y], -1)[:, None] for y in (angle.cos(), angle.sin()))
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


@pytest.mark.parametrize("form", FORMS)
def test_shifting_all_positions_changes_nothing_if_rotary_pairs_share_a_decay(form):
    q, k, v, gate_logits, mix = make_inputs(tokens=80, decays=6)
    near, far = torch.arange(80.0, dtype=torch.float64), torch.arange(1000.0, 1080.0, dtype=torch.float64)
    o = [FORMS[form](rotate(q, p), rotate(k, p), v, gate_logits, mix)[0] for p in (near, far)]
    assert relative_error(o[1], o[0]) <= 1e-10
    free = torch.randn(*gate_logits.shape[:-1], 12, dtype=torch.float64) * 8
    o = [FORMS[form](rotate(q, p), rotate(k, p), v, free, mix)[0] for p in (near, far)]
    assert relative_error(o[1], o[0]) > 0.05, "free decays do not commute with the rotation: the test above would prove nothing"


# --- gates and states ---------------------------------------------------------------------------------------------


def test_log_decays_are_bounded_and_a_zero_logit_halves_in_sixteen_tokens():
    logits = torch.tensor([-1e30, -100.0, -5.0, 0.0, 5.0, 100.0])
    decay = log_decays(logits, 6)
    assert decay.min() == -1.25 and (decay <= 0).all() and decay.dtype == torch.float32
    assert log_decays(logits, 6, lower_bound=-0.1).min() == pytest.approx(-0.1)
    assert (decay.diff() >= 0).all()
    assert math.exp(16 * float(decay[3])) == pytest.approx(0.5, rel=1e-6)
    assert math.exp(4 * float(log_decays(logits, 6, gate_normalizer=4.0)[3])) == pytest.approx(0.5, rel=1e-6)
    assert log_decays(logits.bfloat16(), 6).dtype == torch.float32
    assert log_decays(logits.double(), 12).tolist() == pytest.approx(2 * log_decays(logits.double(), 6).tolist())


@pytest.mark.parametrize("block_size, tokens", [(1, 5), (8, 41), (16, 16), (64, 200)])
def test_block_states_are_the_states_at_the_boundaries(block_size, tokens):
    _, k, v, gate_logits, _ = make_inputs(tokens=tokens)
    state, mask = make_state(2), torch.ones(2, tokens, dtype=torch.bool)
    mask[1, tokens - tokens // 3 :] = False
    found = block_states(k, v, gate_logits, block_size, padding_mask=mask, initial_state=state)
    log_g = log_decays(gate_logits, 12).masked_fill(~mask[..., None, None, None], 0)
    slow = slow_states(k.masked_fill(~mask[..., None, None], 0), v, log_g, state)
    ends = [min(n * block_size, tokens) for n in range(math.ceil(tokens / block_size) + 1)]
    assert found.shape == slow[:, ends].shape
    assert relative_error(found, slow[:, ends]) <= 1e-11
    assert torch.equal(found[:, 0], state)


def test_kernel_path_names_the_implementation_of_each_device():
    assert kernel_path("cpu") == "chunked PyTorch"
    assert kernel_path(torch.device("cuda")) != kernel_path("cpu")


# --- window and states --------------------------------------------------------------------------------------------


def slow_window_attention(q, k, v, gate_logits, mix, window_size, state, scale):
    """Token by token and obviously right: softmax over the own and the previous block, states of all blocks before."""
    batch, tokens, heads, key_dim = q.shape
    ratio = heads // k.shape[2]
    keys, values = (x.repeat_interleave(ratio, dim=2) for x in (k, v))
    o_window, o_state = (torch.zeros(batch, tokens, heads, v.shape[-1], dtype=q.dtype) for _ in range(2))
    log_denominator = torch.zeros(batch, tokens, heads, dtype=q.dtype)
    for t in range(tokens):
        first = max(t // window_size - 1, 0) * window_size
        scores = scale * torch.einsum("bhk,bshk->bhs", q[:, t], keys[:, first : t + 1])
        log_denominator[:, t] = scores.exp().sum(-1).log()
        o_window[:, t] = torch.einsum("bhs,bshv->bhv", scores.softmax(-1), values[:, first : t + 1])
        earlier = state
        if first:
            before = (x[:, :first] for x in (q, k, v, gate_logits))
            _, earlier = dual_state_attention_recurrent(*before, mix, initial_state=state, output_final_state=True)
        mixed = torch.einsum("hi,bhikv->bhkv", mix, earlier.repeat_interleave(ratio, dim=1))
        o_state[:, t] = scale * torch.einsum("bhk,bhkv->bhv", q[:, t], mixed)
    return o_window, log_denominator, o_state


@pytest.mark.parametrize("window_size, tokens", [(1, 4), (4, 3), (4, 4), (4, 9), (5, 31), (16, 50)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_window_attention_equals_the_slow_truth(window_size, tokens, kv_heads):
    inputs = make_inputs(tokens=tokens, heads=6, kv_heads=kv_heads)
    for state in (make_state(2, kv_heads), None):
        found = dual_state_window_attention(*inputs, window_size, initial_state=state)
        start = torch.zeros(2, kv_heads, 2, 12, 20, dtype=torch.float64) if state is None else state
        expected = slow_window_attention(*inputs, window_size, start, 12**-0.5)
        for x, y in zip(found[:3], expected, strict=True):
            assert relative_error(x, y) <= 1e-11
        assert torch.equal(found[3], block_states(*inputs[1:4], window_size, initial_state=state))
    if tokens > 2 * window_size:
        assert found[2].abs().max() > 1e-3
    assert (found[2][:, : 2 * window_size] == 0).all()


def test_window_attention_uses_its_options():
    inputs, state = make_inputs(tokens=30), make_state(2)
    found = dual_state_window_attention(*inputs, 4, initial_state=state, scale=0.7, gate_normalizer=3.0, lower_bound=-0.2)
    expected = slow_window_attention(*inputs, 4, state, 0.7)
    assert all(relative_error(x, y) <= 1e-11 for x, y in zip(found[:2], expected[:2], strict=True))
    assert torch.equal(found[3], block_states(*inputs[1:4], 4, initial_state=state, gate_normalizer=3.0, lower_bound=-0.2))


def test_window_attention_with_a_padded_suffix_equals_the_row_alone():
    lengths, tokens = [30, 17, 8, 1], 30
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    *inputs, mix = make_inputs(batch=4, tokens=tokens)
    inputs = [x.masked_fill(~mask.view(4, tokens, *[1] * (x.ndim - 2)), float("nan")) for x in inputs]
    state = make_state(4)
    found = dual_state_window_attention(*inputs, mix, 4, padding_mask=mask, initial_state=state)
    for row, length in enumerate(lengths):
        alone = dual_state_window_attention(*(x[row : row + 1, :length] for x in inputs), mix, 4, initial_state=state[row : row + 1])
        for x, y in zip(found[:3], alone[:3], strict=True):
            assert relative_error(x[row, :length], y[0]) <= 1e-11
        assert relative_error(found[3][row, -1], alone[3][0, -1]) <= 1e-11


def test_window_attention_gradcheck_in_fp64():
    inputs = make_inputs(batch=1, tokens=7, heads=2, kv_heads=1, key_dim=2, value_dim=3)
    leaves = [x.clone().requires_grad_() for x in (*inputs, make_state(1, 1, 2, 3))]
    mask = torch.ones(1, 7, dtype=torch.bool)
    mask[:, 6:] = False

    def run(q, k, v, gate_logits, mix, state):
        o_window, log_denominator, o_state, states = dual_state_window_attention(
            q, k, v, gate_logits, mix, 2, padding_mask=mask, initial_state=state
        )
        return o_window[:, :6], log_denominator[:, :6], o_state[:, :6], states

    assert torch.autograd.gradcheck(run, leaves)


def test_window_attention_in_low_precision_returns_fp32_near_the_truth():
    inputs = make_inputs(tokens=100, dtype=torch.bfloat16)
    truth = dual_state_window_attention(*(x.double() for x in inputs), 16)
    for found, expected in zip(dual_state_window_attention(*inputs, 16), truth, strict=True):
        assert found.dtype == torch.float32
        assert relative_error(found, expected) <= 1e-2


# --- bad inputs ---------------------------------------------------------------------------------------------------


def bad(**changes):
    """Arguments of a good call with `changes`, each a function of the good value."""
    names = (*NAMES, "padding_mask", "cu_seqlens", "initial_state", "lower_bound")
    good = dict(zip(names, (*make_inputs(tokens=10), None, None, None, -1.25), strict=True))
    return {**good, **{name: change(good[name]) for name, change in changes.items()}}


BAD_INPUTS = {
    "lower bound too low": ("lower_bound", {"lower_bound": lambda _: -1.26}),
    "lower bound zero": ("lower_bound", {"lower_bound": lambda _: 0.0}),
    "lower bound not a number": ("lower_bound", {"lower_bound": lambda _: float("nan")}),
    "q of three dimensions": ("q, k, v", {"q": lambda q: q[0]}),
    "v of five dimensions": ("q, k, v", {"v": lambda v: v[None]}),
    "no tokens": ("q holds no tokens", {name: lambda x: x[:, :0] for name in NAMES[:4]}),
    "k of another batch": ("^k must be", {"k": lambda k: k[:1]}),
    "k of other tokens": ("^k must be", {"k": lambda k: k[:, 1:]}),
    "k of another size": ("^k must be", {"k": lambda k: k[..., 1:]}),
    "v of other tokens": ("^v must be", {"v": lambda v: v[:, 1:]}),
    "v of other heads": ("^v must be", {"v": lambda v: v[:, :, :1]}),
    "heads that do not group": ("3 query heads.*2 key-value heads", {"q": lambda q: q[:, :, :3], "mix": lambda m: m[:3]}),
    "no key-value heads": ("0 key-value heads", {name: lambda x: x[:, :, :0] for name in ("k", "v", "gate_logits")}),
    "gates of one state": ("gate_logits", {"gate_logits": lambda g: g[:, :, :, :1]}),
    "gates of another size": ("gate_logits", {"gate_logits": lambda g: g[..., :5]}),
    "gates of other tokens": ("gate_logits", {"gate_logits": lambda g: g[:, 1:]}),
    "mix of KV heads": ("mix", {"mix": lambda m: m[:2]}),
    "mix of three states": ("mix", {"mix": lambda m: m[:, [0, 1, 1]]}),
    "dtypes that differ": ("share one floating-point dtype", {"v": lambda v: v.float()}),
    "whole numbers": ("share one floating-point dtype", {name: lambda x: x.long() for name in ("q", "k", "v")}),
    "another device": ("device", {"mix": lambda m: m.to("meta")}),
    "mask of other tokens": ("padding_mask", {"padding_mask": lambda _: torch.ones(2, 9, dtype=torch.bool)}),
    "mask with heads": ("padding_mask", {"padding_mask": lambda _: torch.ones(2, 10, 1, dtype=torch.bool)}),
    "packing in two rows": ("cu_seqlens", {"cu_seqlens": lambda _: torch.tensor([0, 10])}),
    "state of other rows": ("initial_state", {"initial_state": lambda _: make_state(3)}),
    "state transposed": ("initial_state", {"initial_state": lambda _: make_state(2, 2, 20, 12)}),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
@pytest.mark.parametrize("form", FORMS)
def test_bad_inputs_are_named(form, case):
    message, changes = BAD_INPUTS[case]
    with pytest.raises(ValueError, match=message):
        FORMS[form](**bad(**changes))


@pytest.mark.parametrize("case", [case for case, (name, _) in BAD_INPUTS.items() if name != "cu_seqlens"])
def test_bad_inputs_of_the_window_form_are_named(case):
    message, changes = BAD_INPUTS[case]
    arguments = bad(**changes)
    del arguments["cu_seqlens"]
    with pytest.raises(ValueError, match=message):
        dual_state_window_attention(**arguments, window_size=4)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "boundaries", [[0, 4], [1, 10], [0, 6, 4, 10], [0], [[0, 10]], [0, 11]], ids=["short", "late", "falling", "one", "2-D", "long"]
)
def test_bad_boundaries_are_named(form, boundaries):
    arguments = bad(**{name: lambda x: x[:1] for name in NAMES[:4]})
    with pytest.raises(ValueError, match="cu_seqlens"):
        FORMS[form](**{**arguments, "cu_seqlens": torch.tensor(boundaries)})


@pytest.mark.parametrize("form", FORMS)
def test_packing_and_padding_at_once_are_refused_and_states_go_by_sequence(form):
    arguments = bad(**{name: lambda x: x[:1] for name in NAMES[:4]})
    arguments["cu_seqlens"] = torch.tensor([0, 4, 10])
    with pytest.raises(ValueError, match="cu_seqlens"):
        FORMS[form](**{**arguments, "padding_mask": torch.ones(1, 10, dtype=torch.bool)})
    with pytest.raises(ValueError, match="initial_state"):
        FORMS[form](**{**arguments, "initial_state": make_state(1)})
    FORMS[form](**{**arguments, "initial_state": make_state(2)})
