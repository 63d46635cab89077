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


def make_write(batch=2, tokens=70, kv_heads=2, dtype=torch.float64):
    """Raw write gates, from nearly closed to nearly open."""
    return (torch.randn(batch, tokens, kv_heads, 2, dtype=torch.float64) * 2).to(dtype)


def make_state(rows, kv_heads=2, key_dim=12, value_dim=20, dtype=torch.float64):
    return torch.randn(rows, kv_heads, 2, key_dim, value_dim, dtype=torch.float64).to(dtype)


def with_gradients(form, inputs, state, write=None, **options):
    """Output, final state and the gradients of a random weighted sum of both, by name."""
    tensors = dict(zip((*NAMES, "initial_state"), (*inputs, state), strict=True)) | ({} if write is None else {"write_logits": write})
    leaves = {name: x.detach().clone().requires_grad_() for name, x in tensors.items()}
    o, final = form(**leaves, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in (o, final)]
    ((o * weights[0]).sum() + (final * weights[1]).sum()).backward()
    return {"o": o, "final_state": final, **{f"d{name}": leaf.grad for name, leaf in leaves.items()}}


def assert_same_results(found, expected, bound):
    errors = {name: relative_error(found[name], x) for name, x in expected.items()}
    assert all(error <= bound for error in errors.values()), errors


# --- recurrent against chunked ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 15, 63, 64, 65, 200, 1000])
@pytest.mark.parametrize("gated_writes", [False, True])
def test_chunked_equals_recurrent_with_all_gradients(tokens, gated_writes):
    inputs, state, write = make_inputs(tokens=tokens), make_state(2), make_write(tokens=tokens) if gated_writes else None
    truth = with_gradients(dual_state_attention_recurrent, inputs, state, write)
    assert ("dwrite_logits" in truth) == gated_writes
    assert_same_results(with_gradients(dual_state_attention, inputs, state, write), truth, 1e-11)
    single = (tuple(x.float() for x in inputs), state.float(), write.float() if gated_writes else None)
    expected = with_gradients(dual_state_attention_recurrent, *single)
    assert_same_results(with_gradients(dual_state_attention, *single), expected, 1e-5)


@pytest.mark.parametrize("gates", ["bound", "open"])
@pytest.mark.parametrize("form", FORMS)
def test_extreme_gates_in_fp32_equal_the_fp64_truth(form, gates):
    inputs, state = make_inputs(tokens=200, gates=gates), make_state(2)
    write = make_write(tokens=200)
    truth = with_gradients(dual_state_attention_recurrent, inputs, state, write)
    found = with_gradients(FORMS[form], tuple(x.float() for x in inputs), state.float(), write.float())
    if gates == "bound":
        assert not truth["dgate_logits"].any() and not found["dgate_logits"].any()
    assert_same_results(found, truth, 1e-5)


@pytest.mark.parametrize("ratio", [1, 2, 3, 8])
@pytest.mark.parametrize("shared_decays", [True, False])
def test_grouped_heads_and_both_gate_sizes(ratio, shared_decays):
    inputs = make_inputs(tokens=70, heads=2 * ratio, decays=6 if shared_decays else 12)
    state, write = make_state(2), make_write()
    truth = with_gradients(dual_state_attention_recurrent, inputs, state, write)
    assert_same_results(with_gradients(dual_state_attention, inputs, state, write), truth, 1e-11)
    # A query head reads the KV head of its group: the same as ordinary heads over repeated keys.
    q, k, v, gate_logits, mix = inputs
    k, v, gate_logits, write = (x.repeat_interleave(ratio, dim=2) for x in (k, v, gate_logits, write))
    o, _ = dual_state_attention(q, k, v, gate_logits, mix, write_logits=write, initial_state=state.repeat_interleave(ratio, dim=1))
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


def slow_states(k, v, log_g, state, write=None, mask=None):
    """States after every token, one entry more than tokens, by the formula; tokens that `mask` leaves out change nothing."""
    states = [state]
    for t in range(k.shape[1]):
        added = k[:, t, :, None, :, None] * v[:, t, :, None, None, :]
        if write is not None:
            added = added * write[:, t].sigmoid()[..., None, None]
        after = states[-1] * log_g[:, t].exp()[..., None] + added
        states.append(after if mask is None else torch.where(mask[:, t, None, None, None, None], after, states[-1]))
    return torch.stack(states, dim=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gated_writes", [False, True])
def test_three_tokens_by_hand(form, gated_writes):
    """K = V = 1, one head, every number computed by plain Python floats."""
    q, k, v = [0.5, -1.0, 2.0], [1.0, 0.25, -0.5], [3.0, -2.0, 1.5]
    logits, mix, scale = [[0.0, 2.0], [-1.0, -60.0], [1.5, 0.3]], (0.3, 0.7), 0.9
    writes = [[-0.5, 0.7], [3.0, -4.0], [0.0, 1.1]]

    def decay(x):
        return math.exp(max(-math.log1p(math.exp(-x)) / 16, -1.25))

    def share(x):
        return 1 / (1 + math.exp(-x)) if gated_writes else 1.0

    states, expected = [0.0, 0.0], []
    for t in range(3):
        states = [decay(logits[t][i]) * states[i] + share(writes[t][i]) * k[t] * v[t] for i in range(2)]
        expected.append(scale * q[t] * sum(w * s for w, s in zip(mix, states, strict=True)))
    if not gated_writes:
        assert expected[0] == pytest.approx(0.9 * 0.5 * 3.0)  # k v of the first token, whatever the gates and mix

    def tensor(x, *shape):
        return torch.tensor(x, dtype=torch.float64).view(*shape)

    inputs = (*(tensor(x, 1, 3, 1, 1) for x in (q, k, v)), tensor(logits, 1, 3, 1, 2, 1), tensor(mix, 1, 2))
    write_logits = tensor(writes, 1, 3, 1, 2) if gated_writes else None
    o, final = FORMS[form](*inputs, write_logits=write_logits, scale=scale, output_final_state=True)
    assert o.flatten().tolist() == pytest.approx(expected, rel=1e-13)
    assert final.flatten().tolist() == pytest.approx(states, rel=1e-13)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_in_fp64(form, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_SIZE", 3)  # seven tokens then are three chunks
    inputs = make_inputs(batch=1, tokens=7, heads=2, kv_heads=1, key_dim=2, value_dim=3)
    state = make_state(1, 1, 2, 3)
    mask = torch.tensor([[True, True, False, True, True, True, True]])
    leaves = [x.clone().requires_grad_() for x in (*inputs, state, make_write(1, 7, 1))]

    def run(q, k, v, gate_logits, mix, state, write=None):
        return FORMS[form](q, k, v, gate_logits, mix, write_logits=write, initial_state=state, padding_mask=mask, output_final_state=True)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    assert torch.autograd.gradcheck(run, leaves[:-1], fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_write_gates_scale_what_each_state_takes_in(form):
    """Closed for one state, it only forgets; open, it takes in all; half open, as if values were half as large."""
    inputs, state = make_inputs(tokens=80), make_state(2)
    plain = FORMS[form](*inputs, initial_state=state, output_final_state=True)
    write = torch.full((2, 80, 2, 2), 1e4, dtype=torch.float64)
    for x, y in zip(FORMS[form](*inputs, write_logits=write, initial_state=state, output_final_state=True), plain, strict=True):
        assert torch.equal(x, y)
    write[..., 0] = -1e4
    _, final = FORMS[form](*inputs, write_logits=write, initial_state=state, output_final_state=True)
    decayed = state * log_decays(inputs[3], 12).sum(1).exp()[..., None]
    assert relative_error(final[:, :, 0], decayed[:, :, 0]) <= 1e-11
    assert torch.equal(final[:, :, 1], plain[1][:, :, 1])
    q, k, v, gate_logits, mix = inputs
    o, final = FORMS[form](*inputs, write_logits=torch.zeros_like(write), output_final_state=True)
    halves = FORMS[form](q, k, v / 2, gate_logits, mix, output_final_state=True)
    assert relative_error(o, halves[0]) <= 1e-12 and relative_error(final, halves[1]) <= 1e-12


def test_bf16_inputs_stay_near_the_fp64_truth():
    inputs, write = make_inputs(tokens=300, dtype=torch.bfloat16), make_write(tokens=300, dtype=torch.bfloat16)
    truth, state = dual_state_attention_recurrent(*(x.double() for x in inputs), write_logits=write.double(), output_final_state=True)
    for form in FORMS.values():
        o, final = form(*inputs, write_logits=write, output_final_state=True)
        assert o.dtype == torch.bfloat16 and final.dtype == torch.float32
        assert relative_error(o, truth) <= 5e-3
        assert relative_error(final, state) <= 1e-4


def test_long_text_at_the_bound_and_open_stays_finite_in_fp32():
    gate_logits = torch.full((1, 4096, 1, 2, 4), 30.0)
    gate_logits[..., 1, :] = -1e4
    q, k, v = (torch.randn(1, 4096, 1, 8) for _ in range(3))
    mix = torch.full((1, 2), 0.5)
    write = torch.full((1, 4096, 1, 2), 1e4)
    write[:, ::3] = -1e4
    for gate in (None, write):
        for x in with_gradients(dual_state_attention, (q, k, v, gate_logits, mix), torch.zeros(1, 1, 2, 8, 8), gate).values():
            assert x.isfinite().all()


# --- state carried on, padding, packing ---------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 63, 64, 100, 129])
@pytest.mark.parametrize("form", FORMS)
def test_two_calls_with_the_state_carried_on_equal_one(form, cut):
    *inputs, mix = make_inputs(tokens=130)
    inputs.append(make_write(tokens=130))

    def run(inputs, state):
        return FORMS[form](*inputs[:4], mix, write_logits=inputs[4], initial_state=state, output_final_state=True)

    state = make_state(2)
    o, final = run(inputs, state)
    first, middle = run([x[:, :cut] for x in inputs], state)
    second, end = run([x[:, cut:] for x in inputs], middle)
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
@pytest.mark.parametrize("gated_writes", [False, True])
def test_padding_anywhere_leaves_no_trace(form, gated_writes):
    mask = padded_masks()
    *inputs, mix = make_inputs(batch=6, tokens=80)
    inputs.append(make_write(6, 80))
    inputs = [x.masked_fill(~mask.view(6, 80, *[1] * (x.ndim - 2)), float("nan")) for x in inputs]
    state = make_state(6)

    def run(form, inputs, state, **options):
        write = inputs[4] if gated_writes else None
        return form(*inputs[:4], mix, write_logits=write, initial_state=state, output_final_state=True, **options)

    o, final = run(FORMS[form], inputs, state, padding_mask=mask)
    assert (o[~mask] == 0).all()
    assert torch.equal(final[5], state[5])
    for row in range(5):
        alone, end = run(dual_state_attention_recurrent, [x[row : row + 1, mask[row]] for x in inputs], state[row : row + 1])
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
    leaves = [x.clone().requires_grad_() for x in (*inputs, make_write(5, 80), state)]
    o, _ = FORMS[form](*leaves[:4], mix, write_logits=leaves[4], padding_mask=mask, initial_state=leaves[-1])
    (o * weights).sum().backward()
    for row in range(5):
        alone = [x.detach()[row : row + 1].clone() for x in leaves]
        alone = [x[:, mask[row]].requires_grad_() for x in alone[:-1]] + [alone[-1].requires_grad_()]
        o, _ = dual_state_attention_recurrent(*alone[:4], mix, write_logits=alone[4], initial_state=alone[-1])
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
    write, state = make_write(1, 140), make_state(5)
    o, final = FORMS[form](*inputs, mix, write_logits=write, cu_seqlens=boundaries, initial_state=state, output_final_state=True)
    for n, (start, end) in enumerate(zip(boundaries[:-1].tolist(), boundaries[1:].tolist(), strict=True)):
        if start == end:
            assert torch.equal(final[n], state[n])
            continue
        alone, last = dual_state_attention_recurrent(
            *(x[:, start:end] for x in inputs),
            mix,
            write_logits=write[:, start:end],
            initial_state=state[n : n + 1],
            output_final_state=True,
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
@pytest.mark.parametrize("gated_writes", [False, True])
def test_block_states_are_the_states_at_the_boundaries(block_size, tokens, gated_writes):
    _, k, v, gate_logits, _ = make_inputs(tokens=tokens)
    write = make_write(tokens=tokens) if gated_writes else None
    state, mask = make_state(2), torch.ones(2, tokens, dtype=torch.bool)
    mask[0, : tokens // 4] = False
    mask[1, tokens - tokens // 3 :] = False
    found = block_states(k, v, gate_logits, block_size, write_logits=write, padding_mask=mask, initial_state=state)
    slow = slow_states(k, v, log_decays(gate_logits, 12), state, write, mask)
    ends = [min(n * block_size, tokens) for n in range(math.ceil(tokens / block_size) + 1)]
    assert found.shape == slow[:, ends].shape
    assert relative_error(found, slow[:, ends]) <= 1e-11
    assert torch.equal(found[:, 0], state)


def test_kernel_path_names_the_implementation_of_each_device():
    assert kernel_path("cpu") == "chunked PyTorch"
    assert kernel_path(torch.device("cuda")) != kernel_path("cpu")


# --- window and states --------------------------------------------------------------------------------------------


def slow_window_attention(
    q,
    k,
    v,
    gate_logits,
    mix,
    window_size,
    *,
    state,
    scale=12**-0.5,
    write=None,
    state_mask=None,
    sinks=None,
    row_start=None,
    softcap=None,
    sink_logits=None,
    **gates,
):
    """Token by token and obviously right: softmax over the last W tokens and the sinks before them; the states of whole blocks of
    W / 2 tokens, without the block of the query and the one before."""
    batch, tokens, heads, key_dim = q.shape
    ratio, block = heads // k.shape[2], window_size // 2
    if sinks is None:
        sinks = (k[:, :0], v[:, :0])
    keys, values, sink_keys, sink_values = (x.repeat_interleave(ratio, dim=2) for x in (k, v, *sinks))
    states = slow_states(k, v, log_decays(gate_logits, key_dim, **gates), state, write, state_mask)
    o_window, o_state = (torch.zeros(batch, tokens, heads, v.shape[-1], dtype=q.dtype) for _ in range(2))
    log_denominator = torch.zeros(batch, tokens, heads, dtype=q.dtype)
    for row in range(batch):
        start = 0 if row_start is None else int(row_start[row])
        for t in range(tokens):
            window = range(max(t - window_size + 1, 0), t + 1)
            seen = [s for s in range(sinks[0].shape[1]) if s <= start + t - window_size]
            seen_k = torch.cat([sink_keys[row, seen], keys[row, window]])
            seen_v = torch.cat([sink_values[row, seen], values[row, window]])
            scores = scale * torch.einsum("hk,shk->hs", q[row, t], seen_k)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.exp()
            denominator = weights.sum(-1) if sink_logits is None else weights.sum(-1) + sink_logits.exp()
            log_denominator[row, t] = denominator.log()
            o_window[row, t] = torch.einsum("hs,shv->hv", weights / denominator[:, None], seen_v)
            held = block * max(t // block - 1, 0)  # tokens of blocks 0 to n - 2
            mixed = torch.einsum("hi,hikv->hkv", mix, states[row, held].repeat_interleave(ratio, dim=0))
            o_state[row, t] = scale * torch.einsum("hk,hkv->hv", q[row, t], mixed)
    return o_window, log_denominator, o_state, states[:, [min(n * block, tokens) for n in range(math.ceil(tokens / block) + 1)]]


def make_sinks(count, batch=2, kv_heads=2):
    return tuple(torch.randn(batch, count, kv_heads, size, dtype=torch.float64) for size in (12, 20))


def assert_same_window(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert x.shape == y.shape
        assert relative_error(x, y) <= 1e-11


@pytest.mark.parametrize("window_size, tokens", [(2, 5), (4, 1), (4, 4), (4, 9), (6, 31), (16, 50)])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_window_attention_equals_the_slow_truth(window_size, tokens, kv_heads):
    inputs = make_inputs(tokens=tokens, heads=6, kv_heads=kv_heads)
    for state in (make_state(2, kv_heads), None):
        for write in (make_write(tokens=tokens, kv_heads=kv_heads), None):
            found = dual_state_window_attention(*inputs, window_size, write_logits=write, initial_state=state)
            start = torch.zeros(2, kv_heads, 2, 12, 20, dtype=torch.float64) if state is None else state
            assert_same_window(found, slow_window_attention(*inputs, window_size, state=start, write=write))
            blocks = block_states(*inputs[1:4], window_size // 2, write_logits=write, initial_state=state)
            assert torch.equal(found[3], blocks)
    if tokens > window_size:
        assert found[2][:, window_size:].abs().max() > 1e-3
    assert (found[2][:, :window_size] == 0).all()


@pytest.mark.parametrize("starts", [None, [0, 0], [0, 9], [30, 3]])
@pytest.mark.parametrize("window_size, count", [(2, 1), (6, 0), (6, 1), (6, 3), (8, 4)])
def test_sinks_are_seen_once_they_left_the_window(window_size, count, starts):
    inputs, state, sinks = make_inputs(tokens=21), make_state(2), make_sinks(count)
    row_start = None if starts is None else torch.tensor(starts)
    state_mask = torch.rand(2, 21) < 0.6
    options = {"sinks": sinks, "row_start": row_start, "state_mask": state_mask}
    found = dual_state_window_attention(*inputs, window_size, initial_state=state, **options)
    assert_same_window(found, slow_window_attention(*inputs, window_size, state=state, **options))
    without = dual_state_window_attention(*inputs, window_size, initial_state=state, state_mask=state_mask)
    # The first sink is seen from W tokens after it on, and whether it is can be told from the denominator.
    for row, start in enumerate(starts or [0, 0]):
        changed = ((found[1][row] - without[1][row]).abs() > 1e-9).any(-1)
        assert changed.tolist() == [bool(count) and start + t >= window_size for t in range(21)]


def test_state_mask_hides_tokens_from_the_states_only():
    inputs, state = make_inputs(tokens=30), make_state(2)
    mask = torch.rand(2, 30) < 0.5
    found = dual_state_window_attention(*inputs, 6, state_mask=mask, initial_state=state)
    plain = dual_state_window_attention(*inputs, 6, initial_state=state)
    assert torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])
    assert relative_error(found[2], plain[2]) > 0.1
    assert torch.equal(found[3], block_states(*inputs[1:4], 3, padding_mask=mask, initial_state=state))
    whole = torch.arange(30) < torch.tensor([[30], [17]])
    both = dual_state_window_attention(*inputs, 6, state_mask=mask.long(), padding_mask=whole.long(), initial_state=state)
    assert torch.equal(both[3], block_states(*inputs[1:4], 3, padding_mask=mask & whole, initial_state=state))


def test_window_attention_uses_its_options():
    inputs, state = make_inputs(tokens=30), make_state(2)
    gates = {"gate_normalizer": 3.0, "lower_bound": -0.2}
    found = dual_state_window_attention(*inputs, 4, initial_state=state, scale=0.7, **gates)
    assert_same_window(found, slow_window_attention(*inputs, 4, state=state, scale=0.7, **gates))


def test_window_attention_with_a_padded_suffix_equals_the_row_alone():
    lengths, tokens = [30, 17, 8, 1], 30
    mask = torch.arange(tokens) < torch.tensor(lengths)[:, None]
    *inputs, mix = make_inputs(batch=4, tokens=tokens)
    inputs.append(make_write(4, tokens))
    inputs = [x.masked_fill(~mask.view(4, tokens, *[1] * (x.ndim - 2)), float("nan")) for x in inputs]
    state, sinks, row_start, taken_in = make_state(4), make_sinks(2, batch=4), torch.tensor([0, 4, 2, 20]), torch.rand(4, tokens) < 0.7
    found = dual_state_window_attention(
        *inputs[:4],
        mix,
        4,
        write_logits=inputs[4],
        padding_mask=mask,
        state_mask=taken_in,
        sinks=sinks,
        row_start=row_start,
        initial_state=state,
    )
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        q, k, v, gate_logits, write = (x[one, :length] for x in inputs)
        alone = slow_window_attention(
            q,
            k,
            v,
            gate_logits,
            mix,
            4,
            state=state[one],
            write=write,
            state_mask=taken_in[one, :length],
            sinks=tuple(x[one] for x in sinks),
            row_start=row_start[one],
        )
        for x, y in zip(found[:3], alone[:3], strict=True):
            assert relative_error(x[row, :length], y[0]) <= 1e-11
        assert relative_error(found[3][row, -1], alone[3][0, -1]) <= 1e-11


@pytest.mark.parametrize("window_size", [2, 4])
def test_window_attention_gradcheck_in_fp64(window_size):
    inputs = make_inputs(batch=1, tokens=7, heads=2, kv_heads=1, key_dim=2, value_dim=3)
    sinks = (torch.randn(1, 1, 1, size, dtype=torch.float64) for size in (2, 3))
    leaves = [x.clone().requires_grad_() for x in (*inputs, make_state(1, 1, 2, 3), make_write(1, 7, 1), *sinks)]
    mask, taken_in = torch.ones(2, 1, 7, dtype=torch.bool)
    mask[:, 6:] = taken_in[:, :1] = False

    def run(q, k, v, gate_logits, mix, state, write, sink_k, sink_v):
        o_window, log_denominator, o_state, states = dual_state_window_attention(
            q,
            k,
            v,
            gate_logits,
            mix,
            window_size,
            write_logits=write,
            padding_mask=mask,
            state_mask=taken_in,
            sinks=(sink_k, sink_v),
            initial_state=state,
        )
        return o_window[:, :6], log_denominator[:, :6], o_state[:, :6], states

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


def test_window_attention_in_low_precision_returns_fp32_near_the_truth():
    inputs, write = make_inputs(tokens=100, dtype=torch.bfloat16), make_write(tokens=100, dtype=torch.bfloat16)
    sinks = [x.bfloat16() for x in make_sinks(4)]
    truth = dual_state_window_attention(
        *(x.double() for x in inputs), 16, write_logits=write.double(), sinks=tuple(x.double() for x in sinks)
    )
    found = dual_state_window_attention(*inputs, 16, write_logits=write, sinks=tuple(sinks))
    for x, y in zip(found, truth, strict=True):
        assert x.dtype == torch.float32
        assert relative_error(x, y) <= 1e-2


# --- bad inputs ---------------------------------------------------------------------------------------------------


def bad(**changes):
    """Arguments of a good call with `changes`, each a function of the good value."""
    names = (*NAMES, "padding_mask", "cu_seqlens", "initial_state", "write_logits", "lower_bound")
    good = dict(zip(names, (*make_inputs(tokens=10), None, None, None, None, -1.25), strict=True))
    return {**good, **{name: change(good[name]) for name, change in changes.items()}}


BAD_INPUTS = {
    "lower bound too low": ("lower_bound", {"lower_bound": lambda _: -1.26}),
    "lower bound zero": ("lower_bound", {"lower_bound": lambda _: 0.0}),
    "lower bound not a number": ("lower_bound", {"lower_bound": lambda _: float("nan")}),
    "q of three dimensions": ("^q must be", {"q": lambda q: q[0]}),
    "v of five dimensions": ("^v must be", {"v": lambda v: v[None]}),
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
    "write gates of one state": ("write_logits", {"write_logits": lambda _: make_write(tokens=10)[..., :1]}),
    "write gates of every channel": ("write_logits", {"write_logits": lambda _: torch.zeros(2, 10, 2, 2, 12)}),
    "write gates of other tokens": ("write_logits", {"write_logits": lambda _: make_write(tokens=9)}),
    "write gates of query heads": ("write_logits", {"write_logits": lambda _: make_write(tokens=10, kv_heads=4)}),
    "write gates of another device": ("write_logits.*meta", {"write_logits": lambda _: make_write(tokens=10).to("meta")}),
    "mix of KV heads": ("mix", {"mix": lambda m: m[:2]}),
    "mix of three states": ("mix", {"mix": lambda m: m[:, [0, 1, 1]]}),
    "dtypes that differ": ("^v must be torch.float64 .*got torch.float32", {"v": lambda v: v.float()}),
    "whole numbers": ("^q must be floating-point .*int64", {name: lambda x: x.long() for name in ("q", "k", "v")}),
    "another device": ("mix must be .* on cpu, got .* on meta", {"mix": lambda m: m.to("meta")}),
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


OF_STATES = ("lower_bound", "^v must be", "gate_logits", "write_logits", "padding_mask", "initial_state")


@pytest.mark.parametrize("case", [case for case, (message, _) in BAD_INPUTS.items() if message.startswith(OF_STATES)])
def test_bad_inputs_of_the_states_alone_are_named(case):
    message, changes = BAD_INPUTS[case]
    arguments = bad(**changes)
    for name in ("q", "mix", "cu_seqlens"):
        del arguments[name]
    with pytest.raises(ValueError, match=message):
        block_states(**arguments, block_size=4)


def test_blocks_without_tokens_are_refused():
    _, k, v, gate_logits, _ = make_inputs(tokens=10)
    with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
        block_states(k, v, gate_logits, 0)


@pytest.mark.parametrize("window_size", [-2, 0, 1, 7])
def test_windows_that_are_no_even_number_of_tokens_are_refused(window_size):
    with pytest.raises(ValueError, match=f"window_size must be an even number of tokens, got {window_size}"):
        dual_state_window_attention(*make_inputs(tokens=10), window_size)


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


WINDOW_EXTRAS = {
    "sinks of other heads": ("k of the sinks", {"sinks": (torch.zeros(2, 3, 4, 12), torch.zeros(2, 3, 2, 20))}),
    "sinks of other rows": ("k of the sinks", {"sinks": (torch.zeros(1, 3, 2, 12), torch.zeros(1, 3, 2, 20))}),
    "values of sinks like keys": ("v of the sinks", {"sinks": (torch.zeros(2, 3, 2, 12), torch.zeros(2, 3, 2, 12))}),
    "half of the sinks": ("sinks must be k and v", {"sinks": (torch.zeros(2, 3, 2, 12), None)}),
    "sinks of another dtype": ("k of the sinks", {"sinks": (torch.zeros(2, 3, 2, 12).half(), torch.zeros(2, 3, 2, 20).half())}),
    "start of other rows": ("row_start", {"row_start": torch.zeros(3, dtype=torch.long)}),
    "start of no whole number": ("row_start", {"row_start": torch.zeros(2)}),
    "state mask of other tokens": ("state_mask", {"state_mask": torch.ones(2, 9, dtype=torch.bool)}),
}


@pytest.mark.parametrize("case", WINDOW_EXTRAS)
def test_bad_extras_of_the_window_form_are_named(case):
    message, options = WINDOW_EXTRAS[case]
    with pytest.raises(ValueError, match=message):
        dual_state_window_attention(*make_inputs(tokens=10, dtype=torch.float32), 4, **options)


# --- score cap and sink logits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("with_sink_logits", [False, True])
def test_window_attention_with_score_cap_and_sink_logits_equals_the_slow_truth(softcap, with_sink_logits):
    inputs, sinks = make_inputs(tokens=23, heads=6, kv_heads=2), make_sinks(3)
    options = {"softcap": softcap, "sink_logits": torch.randn(6, dtype=torch.float64) + 1 if with_sink_logits else None, "sinks": sinks}
    state = torch.zeros(2, 2, 2, 12, 20, dtype=torch.float64)
    found = dual_state_window_attention(*inputs, 8, **options)
    assert_same_window(found, slow_window_attention(*inputs, 8, state=state, **options))
    plain = dual_state_window_attention(*inputs, 8, sinks=sinks)
    assert torch.equal(found[2], plain[2]), "what the states give is not capped"
    if softcap or with_sink_logits:
        assert relative_error(found[0], plain[0]) > 0.01


def test_gradients_reach_the_sink_logits():
    inputs = make_inputs(batch=1, tokens=7, heads=2, kv_heads=1, key_dim=2, value_dim=3)
    leaves = [x.clone().requires_grad_() for x in (*inputs, torch.randn(2, dtype=torch.float64))]

    def run(q, k, v, gate_logits, mix, sink_logits):
        return dual_state_window_attention(q, k, v, gate_logits, mix, 4, softcap=1.3, sink_logits=sink_logits)[:2]

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
