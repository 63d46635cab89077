"""Dual-state linear attention in plain PyTorch: the truth that every kernel is tested against.

Per KV head, with states i = 1 (history) and 2 (recency), and per query head a mix w (DSLA, arXiv 2506.09316, eq. 5-7;
the gate is that of gated linear attention, arXiv 2312.06635, with a lower bound):

    log g^i_t = max(logsigmoid(gate_logits^i_t) / gate_normalizer, lower_bound)
    S^i_t     = Diag(exp(log g^i_t)) S^i_{t-1} + sigmoid(write_logits^i_t) k_t^T v_t
    o_t       = scale * q_t (w_1 S^1_t + w_2 S^2_t)

The paper has no write gate: without `write_logits` every token is written in full.

Shape legend: B batch, T tokens, Hq query heads, Hkv key-value heads, R = Hq / Hkv, K key size, V value size,
G decays per state (K, or K/2 when the two channels i and i + K/2 of a rotary pair share one), N chunks, C chunk size.

`dual_state_attention_recurrent` goes token by token and is obviously right; `dual_state_attention` computes the same
function in chunks. `dual_state_window_attention` is the form that leaves the nearest tokens to a softmax window; `window_attention` is
that window without states.

All of them take keys and values of all heads of a layer, too: `kv_heads`, int32 `[Hkv]`, then names those that all other tensors are of, in
their order. Nobody looks at its values: a head that is not there is an error of indexing at best.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import (
    WINDOW_ALONE,
    check_gate_inputs,
    check_gated_linear_inputs,
    check_inputs,
    check_softmax_decode_inputs,
    check_softmax_prompt_inputs,
    check_state_inputs,
    check_window_inputs,
)
from .ragged import Rows, rows_from_cu_seqlens
from .shapes import FP8

CHUNK_SIZE = 64


def select_heads(x: Tensor, kv_heads: Tensor | None) -> Tensor:
    """Of keys or values `[B, T, H, D]` the heads that int32 `kv_heads` names, all when None."""
    return x if kv_heads is None else x.index_select(2, kv_heads)


def log_decays(gate_logits: Tensor, key_dim: int, gate_normalizer: float = 16.0, lower_bound: float = -1.25) -> Tensor:
    """Log-decay of every key channel: `[..., G]` raw logits to `[..., K]`, in fp32 (fp64 for fp64 logits), each in
    `[lower_bound, 0)`."""
    logits = gate_logits if gate_logits.dtype == torch.float64 else gate_logits.float()
    log_decay = (F.logsigmoid(logits) / gate_normalizer).clamp_min(lower_bound)
    return log_decay if log_decay.shape[-1] == key_dim else torch.cat([log_decay, log_decay], dim=-1)


def gate_logits(
    v: Tensor,
    gate_down: Tensor,
    gate_up: Tensor,
    gate_bias: Tensor,
    write_weight: Tensor | None = None,
    write_bias: Tensor | None = None,
    *,
    norm_eps: float,
    kv_heads: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Raw gates and raw write gates of every KV head, from its value vectors.

        n            = v / sqrt(mean(v²) + norm_eps)
        gate_logits  = n gate_down gate_up + gate_bias
        write_logits = n write_weight + write_bias

    Args:
        v: values `[B, T, Hkv, V]`.
        gate_down: `[Hkv, V, rank]`.
        gate_up: `[Hkv, rank, 2 G]`, the gates of the history state before those of the recency state.
        gate_bias: `[Hkv, 2, G]`.
        write_weight, write_bias: `[Hkv, V, 2]` and `[Hkv, 2]`; None for a layer without write gates.
        norm_eps: keeps the norm of a value vector of zeros finite.
        kv_heads: of v, see above.

    Returns:
        gate_logits `[B, T, Hkv, 2, G]`, and write_logits `[B, T, Hkv, 2]` or None; fp32 (fp64 for fp64 values), as all sums are.

    Raises:
        ValueError: names the argument whose shape, dtype or device does not fit.
    """
    check_gate_inputs(v, gate_down, gate_up, gate_bias, write_weight, write_bias, kv_heads)
    dtype = torch.float64 if v.dtype == torch.float64 else torch.float32
    # Normalised: value vectors differ in size between layers, their direction is what the gate should read.
    # (Not F.rms_norm: compiled for sizes that change, its gradient on a GPU fails in torch 2.11.)
    v = select_heads(v, kv_heads).to(dtype)
    v = v * (v.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
    logits = torch.einsum("bthv,hvr,hrg->bthg", v, gate_down.to(dtype), gate_up.to(dtype))
    logits = logits.unflatten(-1, (2, -1)) + gate_bias.to(dtype)
    if write_weight is None or write_bias is None:
        return logits, None
    return logits, torch.einsum("bthv,hvi->bthi", v, write_weight.to(dtype)) + write_bias.to(dtype)


def dual_state_attention_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    kv_heads: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One token after the other. Arguments and results as `dual_state_attention`."""
    args = _Prepared(
        q, k, v, gate_logits, mix, write_logits, gate_normalizer, lower_bound, scale, padding_mask, cu_seqlens, initial_state, kv_heads
    )
    state, outputs = args.state, []
    for t in range(args.q.shape[1]):
        state = args.log_decay[:, t].exp()[..., None] * state + args.k[:, t, ..., None] * args.v[:, t, :, None, None, :]
        outputs.append(torch.einsum("bhrk,hri,bhikv->bhrv", args.q[:, t], args.mix, state))
    return args.output(torch.stack(outputs, dim=1)), state if output_final_state else None


def dual_state_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    kv_heads: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Dual-state linear attention, vectorised over chunks of 64 tokens.

    Args:
        q: queries `[B, T, Hq, K]`.
        k: keys `[B, T, Hkv, K]`; query head h reads KV head `h // (Hq / Hkv)`.
        v: values `[B, T, Hkv, V]`.
        gate_logits: raw gates `[B, T, Hkv, 2, G]`, G = K, or K/2 for one decay per rotary pair (i, i + K/2).
        mix: weights of the two states per query head `[Hq, 2]` (already normalised).
        write_logits: raw write gates `[B, T, Hkv, 2]`; None writes every token in full.
        gate_normalizer: divides the log-sigmoid of the gate; 16 turns a logit of 0 into a half-life of 16 tokens.
        lower_bound: smallest log-decay per token, at least -1.25: a chunk of 64 tokens then stays within exp(80).
        scale: of the scores; `K ** -0.5` when None.
        padding_mask: `[B, T]`, True at real tokens. A padded token is a no-op for the states and its output is zero.
        cu_seqlens: int `[N + 1]` boundaries of sequences packed in one row (B = 1); states start anew at each.
        initial_state: `[B, Hkv, 2, K, V]` (`[N, ...]` when packed), fp32; zeros when None.
        output_final_state: also return the states after the last token.
        kv_heads: of k and v, see above.

    Returns:
        o `[B, T, Hq, V]` in q's dtype, and the final state fp32 (fp64 for fp64 inputs) or None.

    Raises:
        ValueError: names the argument whose shape, dtype or value does not fit.
    """
    args = _Prepared(
        q, k, v, gate_logits, mix, write_logits, gate_normalizer, lower_bound, scale, padding_mask, cu_seqlens, initial_state, kv_heads
    )
    tokens = args.q.shape[1]
    size = min(CHUNK_SIZE, tokens)  # one decoded token is a chunk of one
    q_c, k_c, v_c, decay_c = (_chunks(x, size) for x in (args.q, args.k, args.v, args.log_decay))

    cumulative = decay_c.cumsum(2)  # [B, N, C, Hkv, 2, K], ends at >= 64 * lower_bound >= -80
    states = _chunk_states(k_c, v_c, cumulative, args.state)

    # What the chunk itself adds. exp(b_i - b_j) is split around the middle of the chunk: no factor passes exp(40).
    middle = cumulative[:, :, -1:] / 2
    q_mixed = q_c[..., None, :] * args.mix[..., None]  # elementwise: as part of an einsum it would become thin matrix products
    q_decayed = q_mixed * (cumulative - middle).exp()[:, :, :, :, None]
    k_decayed = k_c * (middle - cumulative).exp()
    scores = torch.einsum("bnchrik,bndhik->bnhrcd", q_decayed, k_decayed).tril()
    o = torch.einsum("bnhrcd,bndhv->bnchrv", scores, v_c)

    # What came before it.
    q_decayed = q_mixed * cumulative.exp()[:, :, :, :, None]
    o = o + torch.einsum("bnchrik,bnhikv->bnchrv", q_decayed, states[:, :-1])
    return args.output(o.flatten(1, 2)[:, :tokens]), states[:, -1] if output_final_state else None


def dual_state_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    window_size: int,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    state_mask: Tensor | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,
    row_start: Tensor | None = None,
    initial_state: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    kv_heads: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two halves of the layer with a softmax window.

    A query attends by softmax to itself, the `window_size - 1` tokens before it, and the sinks that lie before those. The
    states follow in blocks of half a window, counted from the row's first token: a query reads them as they were at the end
    of the block before the last one, so they hold what has left the window and up to a block of what is about to leave it.
    No decayed product inside a block is needed, and a decoder writes the states once a block.

    Arguments as `dual_state_attention`, and

        window_size: W tokens, even.
        padding_mask: may only mark a suffix of each row.
        state_mask: `[B, T]`, True at tokens that the states take in (all, if None); the window sees the others too.
        sinks: k `[B, S, Hkv, K]` and v `[B, S, Hkv, V]` of the first tokens of each text, which the window always sees.
        row_start: int `[B]`, number of each row's first token in its text; 0 if None.
        initial_state: what the states hold before the row; read by the first two blocks.
        softcap: scores s of the window become softcap * tanh(s / softcap), as in Gemma 2.
        sink_logits: `[Hq]`, a score per head that takes its share of the softmax and gives nothing, as in gpt-oss.

    Returns:
        o_window: softmax attention over window and sinks, `[B, T, Hq, V]`, fp32 (fp64 for fp64 inputs) like all results.
        log_denominator: log of the softmax denominator, `[B, T, Hq]`.
        o_state: what the query reads from the mixed states, `[B, T, Hq, V]`.
        states: at every block boundary, `[B, ceil(T / (W / 2)) + 1, Hkv, 2, K, V]`; entry n holds blocks 0 to n - 1.
    """
    check_inputs(q, k, v, gate_logits, mix, lower_bound, padding_mask, None, initial_state, write_logits, kv_heads)
    check_window_inputs(
        q, k, v, window_size, sinks, softcap, kv_heads=kv_heads, row_start=row_start, state_mask=state_mask, sink_logits=sink_logits
    )
    k, v = select_heads(k, kv_heads), select_heads(v, kv_heads)
    if padding_mask is not None:
        q, k, v = (x.masked_fill(~padding_mask.bool()[..., None, None], 0) for x in (q, k, v))
        state_mask = padding_mask if state_mask is None else padding_mask.bool() & state_mask.bool()
    tokens, num_kv_heads, size = q.shape[1], k.shape[2], window_size // 2
    states = block_states(
        k,
        v,
        gate_logits,
        size,
        write_logits=write_logits,
        gate_normalizer=gate_normalizer,
        lower_bound=lower_bound,
        padding_mask=state_mask,
        initial_state=initial_state,
    )
    o_window, log_denominator = _softmax_of_window(q, k, v, window_size, scale, sinks, row_start, softcap, sink_logits)

    q = q.unflatten(2, (num_kv_heads, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    q_b = _chunks(q, size)
    blocks = q_b.shape[1]
    q_mixed = q_b.to(states.dtype)[..., None, :] * mix.to(states.dtype).unflatten(0, (num_kv_heads, -1))[..., None]
    two_back = torch.cat([states[:, :1], states[:, : blocks - 1]], dim=1)
    o_state = torch.einsum("bnchrik,bnhikv->bnchrv", q_mixed, two_back)
    return o_window, log_denominator, o_state.flatten(1, 2)[:, :tokens].flatten(2, 3), states


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    *,
    scale: float | None = None,
    padding_mask: Tensor | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,
    row_start: Tensor | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    row_counts: tuple[Tensor, Tensor] | None = None,
    kv_heads: Tensor | None = None,
) -> Tensor:
    """The window of the layer alone, without states: softmax attention to a token, the `window_size - 1` before it, and the sinks that lie
    before those (StreamingLLM, arXiv 2309.17453).

    Arguments as `dual_state_window_attention`; row_counts is of use to kernels only.

    Returns:
        o `[B, T, Hq, V]` in q's dtype, zero at padding; the sums are in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: names the argument whose shape, dtype or value does not fit.
    """
    check_window_inputs(
        q, k, v, window_size, sinks, softcap, tables=WINDOW_ALONE, kv_heads=kv_heads, row_start=row_start, padding_mask=padding_mask,
        sink_logits=sink_logits,
    )  # fmt: skip
    k, v = select_heads(k, kv_heads), select_heads(v, kv_heads)
    pad = None if padding_mask is None else ~padding_mask.bool()[..., None, None]
    if pad is not None:
        q, k, v = (x.masked_fill(pad, 0) for x in (q, k, v))
    o = _softmax_of_window(q, k, v, window_size, scale, sinks, row_start, softcap, sink_logits)[0].to(q.dtype)
    return o if pad is None else o.masked_fill(pad, 0)


def _softmax_of_window(q, k, v, window_size, scale, sinks, row_start, softcap, sink_logits) -> tuple[Tensor, Tensor]:
    """Softmax attention over window and sinks `[B, T, Hq, V]` and the log of its denominator `[B, T, Hq]`, fp32 (fp64 for fp64 inputs),
    of blocks of half a window beside the two before them."""
    tokens, num_kv_heads, size = q.shape[1], k.shape[2], window_size // 2
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q.unflatten(2, (num_kv_heads, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    q_b, k_b, v_b = (_chunks(x, size) for x in (q, k, v))
    blocks, device = q_b.shape[1], q.device

    # Before the first blocks there is nothing.
    k_b, v_b = (torch.cat([F.pad(x, (0, 0) * 3 + (back, 0))[:, :blocks] for back in (2, 1, 0)], dim=2) for x in (k_b, v_b))
    first = torch.arange(blocks, device=device)[:, None, None] * size  # first token of each block
    query = first + torch.arange(size, device=device)[:, None]
    key = first - 2 * size + torch.arange(3 * size, device=device)
    visible = ((key >= 0) & (key <= query) & (key > query - window_size))[None]  # [1, N, C, 3C]
    if sinks is not None:
        k_b, v_b = (torch.cat([x[:, None].expand(-1, blocks, -1, -1, -1), x_b], dim=2) for x, x_b in zip(sinks, (k_b, v_b), strict=True))
        start = q.new_zeros(1, dtype=torch.long) if row_start is None else row_start
        sink = torch.arange(sinks[0].shape[1], device=device)
        sinks_visible = sink <= (start[:, None, None, None] + query - window_size)
        visible = torch.cat([sinks_visible, visible.expand(len(start), -1, -1, -1)], dim=-1)
    scores = torch.einsum("bnchrk,bndhk->bnhrcd", q_b, k_b).to(dtype)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible[:, :, None, None], float("-inf"))
    log_denominator = scores.logsumexp(-1)
    if sink_logits is not None:
        log_denominator = log_denominator.logaddexp(sink_logits.to(dtype).view(num_kv_heads, -1, 1))
    weights = (scores - log_denominator[..., None]).exp()
    o = torch.einsum("bnhrcd,bndhv->bnchrv", weights.to(v.dtype), v_b).to(dtype)
    o, log_denominator = (x.flatten(1, 2)[:, :tokens].flatten(2, 3) for x in (o, log_denominator.movedim(4, 2)))
    return o, log_denominator


def block_states(
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    block_size: int,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    padding_mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    kv_heads: Tensor | None = None,
) -> Tensor:
    """The states at every boundary of blocks of `block_size` tokens: `[B, ceil(T / block_size) + 1, Hkv, 2, K, V]`.

    Entry n holds the tokens of blocks 0 to n - 1, entry 0 is `initial_state`, the last one holds the whole row.
    Arguments as `dual_state_attention`.

    Raises:
        ValueError: names the argument whose shape, dtype or value does not fit.
    """
    check_state_inputs(k, v, gate_logits, block_size, lower_bound, padding_mask, initial_state, write_logits, kv_heads)
    k, v = select_heads(k, kv_heads), select_heads(v, kv_heads)
    k, v, log_decay, state = _prepare_state_inputs(
        k, v, gate_logits, write_logits, gate_normalizer, lower_bound, padding_mask, initial_state
    )
    cumulative = _chunks(log_decay, block_size).cumsum(2)
    return _chunk_states(_chunks(k, block_size), _chunks(v, block_size), cumulative, state)


class _Prepared:
    """Checked inputs in working precision, one row a sequence: q `[B, T, Hkv, R, K]`, k `[B, T, Hkv, 1 or 2, K]`, mix `[Hkv, R, 2]`."""

    def __init__(
        self, q, k, v, gate_logits, mix, write_logits, gate_normalizer, lower_bound, scale, padding_mask, cu_seqlens, initial_state,
        kv_heads,
    ):  # fmt: skip
        check_inputs(q, k, v, gate_logits, mix, lower_bound, padding_mask, cu_seqlens, initial_state, write_logits, kv_heads)
        k, v = select_heads(k, kv_heads), select_heads(v, kv_heads)
        self.shape, self.dtype = (*q.shape[:3], v.shape[-1]), q.dtype
        self.rows: Rows | None = None
        if cu_seqlens is not None:
            self.rows = rows_from_cu_seqlens(cu_seqlens, q.shape[1])
            padding_mask = self.rows.valid
            q, k, v, gate_logits = (self.rows.gather(x) for x in (q, k, v, gate_logits))
            write_logits = None if write_logits is None else self.rows.gather(write_logits)
        self.k, self.v, self.log_decay, self.state = _prepare_state_inputs(
            k, v, gate_logits, write_logits, gate_normalizer, lower_bound, padding_mask, initial_state
        )
        if padding_mask is not None:
            q = q.masked_fill(~padding_mask.bool()[..., None, None], 0)
        num_kv_heads = k.shape[2]
        self.q = (q.to(self.k.dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)).unflatten(2, (num_kv_heads, -1))
        self.mix = mix.to(self.k.dtype).unflatten(0, (num_kv_heads, -1))
        self.padding_mask = padding_mask

    def output(self, o: Tensor) -> Tensor:
        """`[B, T, Hkv, R, V]` in working precision to the caller's layout and dtype."""
        o = o.flatten(2, 3).to(self.dtype)
        if self.padding_mask is not None:
            o = o.masked_fill(~self.padding_mask.bool()[..., None, None], 0)
        return o if self.rows is None else self.rows.scatter(o, self.shape[:2])


def _prepare_state_inputs(k, v, gate_logits, write_logits, gate_normalizer, lower_bound, padding_mask, initial_state):
    """k as the states take it in `[B, T, Hkv, 1 or 2, K]`, v and log-decays in working precision with padding turned into
    no-ops, and the first state."""
    dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
    log_decay = log_decays(gate_logits, k.shape[-1], gate_normalizer, lower_bound).to(dtype)
    k, v = k.to(dtype), v.to(dtype)
    if padding_mask is not None:
        pad = ~padding_mask.bool()[..., None, None]
        k, v, log_decay = k.masked_fill(pad, 0), v.masked_fill(pad, 0), log_decay.masked_fill(pad[..., None], 0)
        write_logits = None if write_logits is None else write_logits.masked_fill(pad, 0)
    if initial_state is None:
        initial_state = k.new_zeros(k.shape[0], k.shape[2], 2, k.shape[-1], v.shape[-1])
    k = k[:, :, :, None]
    if write_logits is not None:
        k = k * write_logits.to(dtype).sigmoid()[..., None]
    return k, v, log_decay, initial_state.to(dtype)


def _chunks(x: Tensor, size: int) -> Tensor:
    """`[B, T, ...]` to `[B, N, C, ...]`, zero-padded at the end (k = 0 and log-decay = 0 are no-ops)."""
    pad = -x.shape[1] % size
    return F.pad(x, (0, 0) * (x.ndim - 2) + (0, pad)).unflatten(1, (-1, size))


def _chunk_states(k: Tensor, v: Tensor, cumulative: Tensor, state: Tensor) -> Tensor:
    """States at the chunk boundaries, `[B, N + 1, Hkv, 2, K, V]`, from chunked k, v and cumulative log-decays."""
    total = cumulative[:, :, -1]
    k_to_end = k * (total[:, :, None] - cumulative).exp()
    added = torch.einsum("bnchik,bnchv->bnhikv", k_to_end, v)
    return _linear_scan(total.exp()[..., None], added, state)


def _linear_scan(decay: Tensor, added: Tensor, state: Tensor) -> Tensor:
    """S_n = decay_n S_{n-1} + added_n along dim 1, S_0 first, by recursive doubling: log2(N) vectorised steps.

    Only products of decays are formed, never quotients, so nothing can overflow (Hillis and Steele, 1986).
    """
    added = torch.cat([state[:, None], added], dim=1)
    decay = torch.cat([torch.ones_like(decay[:, :1]), decay], dim=1)
    step = 1
    while step < added.shape[1]:
        added = torch.cat([added[:, :step], added[:, step:] + decay[:, step:] * added[:, :-step]], dim=1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], dim=1)
        step *= 2
    return added


def join_window_and_states(
    o_window: Tensor,
    log_denominator: Tensor,
    o_state: Tensor,
    norm_weight: Tensor,
    state_gain: Tensor,
    state_bias: Tensor,
    norm_eps: float = 1e-6,
) -> Tensor:
    """Window and states under one denominator, as `fused_window_attention` has it: o_window, o_state and the result `[..., Hq, V]`,
    log_denominator `[..., Hq]`, norm_weight `[Hq, V]`, state_gain and state_bias `[Hq]`. While the states are empty this is plain
    softmax attention."""
    dtype = o_state.dtype
    rms = (o_state.square().mean(-1, keepdim=True) + norm_eps).sqrt()
    gate = state_gain.to(dtype) * rms.squeeze(-1).log() + state_bias.to(dtype) - log_denominator
    alpha = gate.sigmoid().masked_fill((o_state == 0).all(-1), 0)[..., None]
    return o_window + alpha * (o_state / rms * norm_weight.to(dtype) - o_window)


def count_tokens(padding_mask: Tensor, window_size: int) -> tuple[Tensor, Tensor]:
    """Of rows with padding at their ends, real tokens and those that the states come to hold, int64 `[B]` each: the blocks of half a window
    that another whole one follows. padding_mask: `[B, T]`."""
    size = window_size // 2
    real = padding_mask.bool().sum(1)
    return real, (real // size - 1).clamp_min(0) * size


def fused_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate_logits: Tensor,
    mix: Tensor,
    norm_weight: Tensor,
    state_gain: Tensor,
    state_bias: Tensor,
    window_size: int,
    *,
    write_logits: Tensor | None = None,
    gate_normalizer: float = 16.0,
    lower_bound: float = -1.25,
    scale: float | None = None,
    norm_eps: float = 1e-6,
    padding_mask: Tensor | None = None,
    state_mask: Tensor | None = None,
    sinks: tuple[Tensor, Tensor] | None = None,
    row_start: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    row_counts: tuple[Tensor, Tensor] | None = None,
    kv_heads: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The layer with a softmax window, from q, k, v to its output: `dual_state_window_attention` and what joins its halves.

        rms   = sqrt(mean(o_state²) + norm_eps)
        alpha = sigmoid(state_gain * log rms + state_bias - log_denominator), and 0 where o_state is all zero
        o     = (1 - alpha) o_window + alpha * norm_weight * o_state / rms

    Arguments as `dual_state_window_attention`, and

        norm_weight: `[Hq, V]`.
        state_gain, state_bias: `[Hq]`.
        norm_eps: keeps the logarithm of an empty state finite.
        output_final_state: also return the states that a decoder goes on from.
        row_counts: `count_tokens` of padding_mask, where the caller has them: the layers of a model share them.

    Returns:
        o `[B, T, Hq, V]` in q's dtype, zero at padding.
        final_state `[B, Hkv, 2, K, V]` fp32 (fp64 for fp64 inputs) or None: of a row with n real tokens it holds the blocks
        before the last full one, that is blocks 0 to n // (W / 2) - 2.
    """
    o_window, log_denominator, o_state, states = dual_state_window_attention(
        q,
        k,
        v,
        gate_logits,
        mix,
        window_size,
        write_logits=write_logits,
        gate_normalizer=gate_normalizer,
        lower_bound=lower_bound,
        scale=scale,
        padding_mask=padding_mask,
        state_mask=state_mask,
        sinks=sinks,
        row_start=row_start,
        initial_state=initial_state,
        softcap=softcap,
        sink_logits=sink_logits,
        kv_heads=kv_heads,
    )
    o = join_window_and_states(o_window, log_denominator, o_state, norm_weight, state_gain, state_bias, norm_eps).to(q.dtype)
    if padding_mask is not None:
        o = o.masked_fill(~padding_mask.bool()[..., None, None], 0)
    if not output_final_state:
        return o, None
    if padding_mask is None:
        padding_mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    held = (count_tokens(padding_mask, window_size) if row_counts is None else row_counts)[1]
    return o, states[torch.arange(len(held), device=q.device), held // (window_size // 2)]


def softmax_decode(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    window: int | None = None,
    block_table: Tensor | None = None,
    mask: Tensor | None = None,
    heads: Tensor | None = None,
    starts: Tensor | None = None,
    sink_tokens: int = 0,
    whole_heads: int = 0,
) -> Tensor:
    """Softmax attention of the last token of each row, or the last few, over its keys and values. Each sees those before it and its own.

    Args:
        q: `[B, queries, Hq, K]`.
        keys, values: `[B, Hkv, T, K]` and `[B, Hkv, T, V]`, a row's tokens from its start on; or, with a block table, a pool
            `[blocks, block_size, Hkv, K]` and `[..., V]`. Of q's dtype, or both in fp8 (`torch.float8_e4m3fn`).
        lengths: int `[B]`, tokens of each row, those of the queries included; what lies behind them is not read.
        scale: of the scores; `K ** -0.5` when None.
        softcap, sink_logits `[Hq]`: see `dual_state_window_attention`.
        window: a query sees this many tokens, its own included; all if None.
        block_table: int `[B, most blocks]`; token j of a row lies in block `block_table[row, j // block_size]`.
        mask: bool `[B, T]`, False at tokens that nobody sees, such as padding on the left. Not with a block table.
        heads: int32 `[Hkv]`, without a block table: KV head h reads head `heads[h]` of keys and values, which may have more or fewer. Or
            int32 `[Hkv, 2]`, with a pool whose blocks hold heads of other layers too, in columns `[blocks, block_size, columns, D]`, and
            several tables `[tables, B, most blocks]`: KV head h lies in blocks of table `heads[h, 0]`, in column `heads[h, 1]`.
        starts: int `[B]`, tokens of each row before those of the queries, where rows have fewer of them than others: a query behind its
            row's length gives zeros. None: the queries are the last tokens of each row (and those before its first give zeros).
        sink_tokens: with a window, a query sees the first so many tokens, too (attention sinks: Xiao et al. 2024, arXiv 2309.17453).
        whole_heads: the first so many KV heads see all tokens, whatever the window of the others is.

    Returns:
        o `[B, queries, Hq, V]` in q's dtype; the sums are in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: names the argument that does not fit.
    """
    seen = window, block_table, mask, heads, starts, sink_tokens, whole_heads
    check_softmax_decode_inputs(q, keys, values, lengths, softcap, sink_logits, *seen)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if keys.dtype == FP8:
        keys, values = keys.to(dtype), values.to(dtype)
    if block_table is not None:
        blocks = block_table.long().clamp(0, keys.shape[0] - 1)  # behind a row's length they may be anything
        if heads is None:
            keys, values = (x[blocks].flatten(1, 2).transpose(1, 2) for x in (keys, values))
        else:
            table, column = heads.long().unbind(1)
            keys, values = (x[blocks[table], :, column[:, None, None]].flatten(2, 3).transpose(0, 1) for x in (keys, values))
    elif heads is not None:
        keys, values = (x[:, heads.long()] for x in (keys, values))
    token = torch.arange(keys.shape[2], device=q.device)
    lengths = lengths.clamp(0, keys.shape[2])
    places = (lengths - q.shape[1] if starts is None else starts)[:, None] + torch.arange(q.shape[1], device=q.device)
    places = places.masked_fill(places >= lengths[:, None], -1)
    visible = ((token < lengths[:, None, None]) & (token <= places[..., None]))[:, None].repeat(1, keys.shape[1], 1, 1)
    if window is not None:  # [B, Hkv, queries, T]
        visible[:, whole_heads:] &= ((token > places[..., None] - window) | (token < sink_tokens))[:, None]
    if mask is not None:
        visible = visible & mask[:, None, None]
    unseen = ~visible.any(2)[..., None]
    keys, values = (x.to(dtype).masked_fill(unseen, 0) for x in (keys, values))
    q_grouped = q.to(dtype).unflatten(2, (keys.shape[1], -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = torch.einsum("bqhrk,bhtk->bqhrt", q_grouped, keys)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible.transpose(1, 2)[:, :, :, None], float("-inf"))
    log_denominator = scores.logsumexp(-1)
    if sink_logits is not None:
        log_denominator = log_denominator.logaddexp(sink_logits.to(dtype).unflatten(0, (keys.shape[1], -1)))
    # Of a query that sees nothing the denominator is zero, and so are all weights.
    weights = (scores - log_denominator.masked_fill(log_denominator.isneginf(), 0)[..., None]).exp()
    return torch.einsum("bqhrt,bhtv->bqhrv", weights, values).flatten(2, 3).to(q.dtype)


def softmax_prompt(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: Tensor,
    lengths: Tensor,
    block_table: Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    heads: Tensor | None = None,
) -> Tensor:
    """Softmax attention of a piece of a text a row over its keys and values in blocks, the piece's own included.

    Args:
        q: `[B, T, Hq, K]`; query t is that of token `starts + t` and sees the tokens up to itself. Queries behind a row's length are
            padding.
        keys, values: a pool `[blocks, block_size, Hkv, K]` and `[..., V]`, of dtypes as in `softmax_decode`.
        starts: int `[B]`, tokens of each row before the piece.
        lengths: int `[B]`, tokens of each row with it; what lies behind them is not read.
        block_table, scale, window, heads: as in `softmax_decode`.

    Returns:
        o `[B, T, Hq, V]` in q's dtype, zero at padding; the sums are in fp32 (fp64 for fp64 inputs).

    Raises:
        ValueError: names the argument that does not fit.
    """
    check_softmax_prompt_inputs(q, keys, values, starts, lengths, block_table, window, heads)
    seen = [torch.where(starts + t < lengths, starts + t + 1, 0) for t in range(q.shape[1])]
    steps = (
        softmax_decode(q[:, t : t + 1], keys, values, seen[t], scale=scale, window=window, block_table=block_table, heads=heads)
        for t in range(q.shape[1])
    )
    return torch.cat(list(steps), 1)


def gated_linear(x: Tensor, gate_weight: Tensor, up_weight: Tensor, activation: str = "silu") -> Tensor:
    """The first half of a gated MLP, activation(x gate_weight^T) * (x up_weight^T), rounded as separate layers round.

    Args:
        x: `[..., K]`.
        gate_weight, up_weight: `[N, K]`.
        activation: "silu", or "gelu_tanh" for GELU by its tanh approximation.

    Returns:
        `[..., N]`.

    Raises:
        ValueError: names the argument that does not fit.
    """
    check_gated_linear_inputs(x, gate_weight, up_weight, activation)
    gate, up = F.linear(x, gate_weight), F.linear(x, up_weight)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
