"""The DSLA layer between its projections: q, k, v in; output and states out. Knows no transformers class.

Shape legend as in `dsla_kernels.reference`: B batch, T tokens, Hq query heads, Hkv key-value heads, K key size, V value
size, W window size, S sink tokens.
"""

import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsla_kernels import (
    check_lower_bound,
    count_tokens,
    dual_state_attention,
    final_state,
    fused_window_attention,
    gate_logits,
    join_window_and_states,
    log_decays,
    rows_from_cu_seqlens,
    rows_from_mask,
    uses_triton,
)

# Keeps the RMS of an empty state above zero: its logarithm is part of the gate between window and states.
NORM_EPS = 1e-6
# Blocks of half a window that a continued row takes over from the state: the last W tokens reach into three.
PAST_BLOCKS = 3
# Which of the R channels that a base rotates are a pair: (i, i + R/2), or (2i, 2i + 1).
ROTARY_LAYOUTS = ("halves", "interleaved")


class DualState(NamedTuple):
    """What a layer remembers of a sequence; its size does not depend on the length.

    recurrent: `[B, Hkv, 2, K, V]` fp32, history and recency. With a window they hold the blocks (of W / 2 tokens) before the
        last full one.
    window_k, window_v: `[B, S + W, Hkv, K or V]`, the sinks, then the last W tokens; token j lies at slot S + j % W.
        Channels of keys, here and in `recurrent`, lie so that i and i + K/2 are a rotary pair, whatever the base's layout.
    lengths: int64 `[B]`, tokens seen per row, padding not counted.
    """

    recurrent: Tensor
    window_k: Tensor
    window_v: Tensor
    lengths: Tensor


class DualStateAttention(nn.Module):
    """Dual-state linear attention with an optional softmax window and the parameters that are its own.

    The gates of a KV head read that head's value vector, so the states are a pure function of the cached k and v. The
    state output is RMS-normalised per head (as in GLA, arXiv 2312.06635). With a window, both parts share one denominator,
    in the manner of LoLCATs (arXiv 2410.10254): the states get the weight

        alpha = sigmoid(state_gain * log rms(o_state) + state_bias - log(softmax denominator of the window))

    so that they are nearly closed at the start, can abstain token by token, and depend on no absolute position. Empty states
    get no weight: a text that fits into the window is read by plain softmax attention. The window always sees the first
    tokens of a text, to which trained models give weight that they want to lose (StreamingLLM, arXiv 2309.17453).

    Args:
        num_heads: query heads Hq.
        num_kv_heads: key-value heads Hkv.
        key_dim: K, the size of a head of q and k.
        value_dim: V, the size of a head of v; K when None.
        window_size: W, the tokens that softmax attention sees, an even number; 0 is the paper's pure layer.
        sink_tokens: S, the first tokens of a text, which the window sees beside its own (with a window only).
        gate_rank: rank of the map from a value vector to its gates.
        gate_normalizer: see `dsla_kernels.reference`.
        gate_lower_bound: see `dsla_kernels.reference`.
        half_lives: initial half-lives in tokens of the history and the recency state, each from its fastest channel to its
            slowest, or one number for all channels.
        write_gate: whether a token's value decides how much of it each state takes in. The paper's layer has none.
        scale: of the scores, `K ** -0.5` when None.
        rotary_layout: one of ROTARY_LAYOUTS; channels of q and k that rotate together share a decay.
        rotary_dim: R, the channels from the first on that rotate, all when None. The others are paired with one another, behind.

    Raises:
        ValueError: names the argument whose value does not fit.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        key_dim: int,
        value_dim: int | None = None,
        *,
        window_size: int = 128,
        sink_tokens: int = 4,
        gate_rank: int = 16,
        gate_normalizer: float = 16.0,
        gate_lower_bound: float = -1.25,
        half_lives: tuple[float | tuple[float, float], ...] = ((64.0, 4096.0), (8.0, 256.0)),
        write_gate: bool = True,
        scale: float | None = None,
        rotary_layout: str = "halves",
        rotary_dim: int | None = None,
    ):
        super().__init__()
        check_lower_bound(gate_lower_bound)
        if num_heads % num_kv_heads:
            raise ValueError(f"the {num_heads} query heads must be a multiple of the {num_kv_heads} key-value heads")
        if key_dim % 2:
            raise ValueError(f"key_dim must be even (rotary pairs share a decay), got {key_dim}")
        rotary_dim = key_dim if rotary_dim is None else rotary_dim
        check_rotary(rotary_layout, rotary_dim)
        if rotary_dim > key_dim:
            raise ValueError(f"rotary_dim must be at most the {key_dim} channels of a head, got {rotary_dim}")
        check_window(window_size, sink_tokens)
        if len(half_lives) != 2:
            raise ValueError(f"half_lives must be two, of the history and the recency state, got {half_lives}")
        value_dim = key_dim if value_dim is None else value_dim
        decays = key_dim // 2  # one per rotary pair: a decay then commutes with the rotation
        self.num_heads, self.num_kv_heads, self.key_dim, self.value_dim = num_heads, num_kv_heads, key_dim, value_dim
        self.window_size, self.sink_tokens = window_size, sink_tokens if window_size else 0
        self.gate_normalizer, self.gate_lower_bound, self.write_gate = gate_normalizer, gate_lower_bound, write_gate
        self.half_lives = tuple(half_life_range(entry) for entry in half_lives)
        self.scale = key_dim**-0.5 if scale is None else scale
        self.rotary_layout, self.rotary_dim = rotary_layout, rotary_dim

        self.gate_down = nn.Parameter(torch.empty(num_kv_heads, value_dim, gate_rank))
        self.gate_up = nn.Parameter(torch.empty(num_kv_heads, gate_rank, 2 * decays))
        self.gate_bias = nn.Parameter(torch.empty(num_kv_heads, 2, decays))
        if write_gate:
            self.write_weight = nn.Parameter(torch.empty(num_kv_heads, value_dim, 2))
            self.write_bias = nn.Parameter(torch.empty(num_kv_heads, 2))
        self.mix_logits = nn.Parameter(torch.empty(num_heads, 2))
        self.norm_weight = nn.Parameter(torch.empty(num_heads, value_dim))
        if window_size:
            self.state_gain = nn.Parameter(torch.empty(num_heads))
            self.state_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        nn.init.normal_(self.gate_down, std=self.value_dim**-0.5)
        nn.init.normal_(self.gate_up, std=0.02)
        if not getattr(self.gate_bias, "_is_hf_initialized", False):  # transformers' mark of loaded weights; torch.nn.init heeds it itself
            channels = self.gate_bias.shape[-1]
            for i, (fast, slow) in enumerate(self.half_lives):
                lives = [fast * (slow / fast) ** (c / max(channels - 1, 1)) for c in range(channels)]
                self.gate_bias[:, i] = torch.tensor([half_life_to_logit(life, self.gate_normalizer) for life in lives])
        if self.write_gate:
            nn.init.zeros_(self.write_weight)
            nn.init.zeros_(self.write_bias)
        nn.init.zeros_(self.mix_logits)
        nn.init.ones_(self.norm_weight)
        if self.window_size:
            nn.init.ones_(self.state_gain)
            nn.init.zeros_(self.state_bias)

    def extra_repr(self) -> str:
        return f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.key_dim}, window_size={self.window_size}"

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        padding_mask: Tensor | None = None,
        padding_at_end: bool = False,
        shared: dict[Any, Any] | None = None,
        cu_seqlens: Tensor | None = None,
        state: DualState | None = None,
        output_state: bool = False,
        softcap: float | None = None,
        sink_logits: Tensor | None = None,
        in_place: bool = False,
        seen: int | None = None,
        whole_windows: bool = False,
        counts: bool = True,
    ) -> tuple[Tensor, DualState | None]:
        """Attend, after `state` if one is given. Autocast is off within: see `one_dtype` for what is computed in.

        Args:
            q: `[B, T, Hq, K]`, k: `[B, T, Hkv, K]`, v: `[B, T, Hkv, V]`, as the base model rotated and normalised them. Their dtypes,
                and those of the keys and values in `state`, may differ.
            padding_mask: `[B, T]`, True at real tokens; padding may lie anywhere and leaves no trace.
            padding_at_end: it lies behind all real tokens of each row: these then need not be moved together (without `state`, or with
                `whole_windows`).
            shared: for what follows from such a mask alone: layers that are given the same dict and the same mask compute it once. Not
                for compiled code.
            cu_seqlens: int `[N + 1]`, boundaries of packed sequences (B = 1, without `state`).
            state: of the tokens before these.
            output_state: also return the state after these tokens.
            softcap: of the window's softmax, see `dual_state_window_attention`; of no effect without a window.
            sink_logits: likewise.
            in_place: nobody needs `state` afterwards: a kernel may write the new one over it.
            seen: what every entry of `state.lengths` is, where the caller knows it: several tokens then take fewer launches.
            whole_windows: every entry of `state.lengths` is a multiple of the window's size, and not 0: what the state has of the text then
                lies in place, whatever the entries are.
            counts: add one token to the lengths; False leaves that to the caller, who does it for all layers at once.

        Returns:
            o `[B, T, Hq, V]` in q's dtype, zero at padding; and the new state or None.
        """
        if cu_seqlens is not None and (state is not None or output_state):
            raise ValueError(
                "packed sequences (cu_seqlens, or position_ids that restart) leave no state behind: pass use_cache=False, "
                "or run each sequence on its own"
            )
        if state is not None and state.lengths.shape[0] != q.shape[0]:
            raise ValueError(f"the state holds {state.lengths.shape[0]} sequences, the input {q.shape[0]}")
        dtype = q.dtype
        state, q, k, v = one_dtype(state, q, k, v)
        q, k = self.in_halves(q), self.in_halves(k)
        with autocast_off(q):
            if state is not None and q.shape[1] == 1 and self._decodes_in_kernel(q, k, v, state, sink_logits):
                # A state that takes part in a gradient is not written over: what was computed from it needs it as it was.
                written = state if in_place and not requires_gradient(*state) else clone_state(state)
                o, new = self._kernel_step(q, k, v, padding_mask, written, softcap, sink_logits, counts)
            elif not self.window_size:
                o, new = self._pure(q, k, v, padding_mask, cu_seqlens, state, output_state)
            elif state is not None and q.shape[1] == 1:
                o, new = self._window_step(q, k, v, padding_mask, state, softcap, sink_logits)
                new = new if counts else new._replace(lengths=state.lengths)
            else:
                o, new = self._window(
                    q,
                    k,
                    v,
                    padding_mask,
                    padding_at_end,
                    shared,
                    cu_seqlens,
                    state,
                    output_state,
                    softcap,
                    sink_logits,
                    seen,
                    whole_windows,
                )
        return o.to(dtype), new

    def fold(
        self, k: Tensor, v: Tensor, padding_mask: Tensor | None = None, state: DualState | None = None, *, padding_at_end: bool = False
    ) -> DualState:
        """The state after tokens of which only keys and values are left: what `forward` would have returned, up to rounding.

        k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`, `padding_mask` `[B, T]`, `padding_at_end` as in `forward`; `state` of the tokens before
        them, if any. Where k, v or `state` require a gradient it flows through the fold, to them and to the parameters of the gates;
        otherwise no graph is kept. Autocast is off within, as in `forward`.
        """
        state, k, v = one_dtype(state, k, v)
        k = self.in_halves(k)
        gradient = torch.is_grad_enabled() and requires_gradient(k, v, *(state or ()))
        with torch.set_grad_enabled(gradient), autocast_off(k):
            return self._fold(k, v, padding_mask, state, padding_at_end)

    def _fold(self, k, v, padding_mask, state, padding_at_end):
        recurrent = None if state is None else state.recurrent
        if not self.window_size:
            return self._state_without_window(self._final_state(k, v, padding_mask, recurrent), k, v, padding_mask, state)
        if state is not None:
            k, v, padding_mask = self._after_window(state, k, v, padding_mask)
        k, v, valid = _to_rows(padding_mask, None, k, v, padding_at_end and state is None)[1:]
        start = None if state is None else self._row_start(state)
        tokens = torch.full((k.shape[0],), k.shape[1], device=k.device) if valid is None else valid.sum(1)
        blocks = (tokens // self._block_size - 1).clamp_min(0)  # whole blocks that another whole block follows
        taken_in = torch.arange(k.shape[1], device=k.device) < (blocks * self._block_size)[:, None]
        masked = self._taken_in(k, None, state)
        recurrent = self._final_state(k, v, taken_in if masked is None else taken_in & masked, recurrent)
        return self._state_after(k, v, None if valid is None else tokens, recurrent, self._sinks(k, v, state), start)

    def in_halves(self, x: Tensor) -> Tensor:
        """Queries or keys `[..., K]` as the base rotated them, channels put so that i and i + K/2 are a pair, as kernels have it: the pairs
        that rotate from the fastest to the slowest, then those that do not. Both in the same order: their products stay what they are."""
        if self.rotary_layout == "interleaved":
            return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        if self.rotary_dim == self.key_dim:
            return x
        rotated, still = self.rotary_dim // 2, (self.key_dim - self.rotary_dim) // 2
        a, b, c, d = x.split([rotated, rotated, still, still], -1)
        return torch.cat([a, c, b, d], -1)

    def gate_logits(self, v: Tensor) -> tuple[Tensor, Tensor | None]:
        """Raw gates `[B, T, Hkv, 2, K/2]` and raw write gates `[B, T, Hkv, 2]` (or None), fp32 (fp64 for fp64 inputs), from
        values `[B, T, Hkv, V]`."""
        write = (self.write_weight, self.write_bias) if self.write_gate else ()
        return gate_logits(v, self.gate_down, self.gate_up, self.gate_bias, *write, norm_eps=NORM_EPS)

    def mix(self) -> Tensor:
        """Weights of the two states `[Hq, 2]`, fp32 (fp64 for fp64 parameters)."""
        logits = self.mix_logits
        return (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)

    def bias_half_lives(self) -> Tensor:
        """Half-life in tokens that the gate biases stand for (gates of a zero value vector): `[Hkv, 2, K/2]`."""
        log_decay = log_decays(self.gate_bias, self.gate_bias.shape[-1], self.gate_normalizer, self.gate_lower_bound)
        return math.log(0.5) / log_decay

    # --- the paper's layer --------------------------------------------------------------------------------------

    def _pure(self, q, k, v, padding_mask, cu_seqlens, state, output_state):
        gate_logits, write_logits = self.gate_logits(v)
        o, recurrent = dual_state_attention(
            q,
            k,
            v,
            gate_logits,
            self.mix(),
            write_logits=write_logits,
            gate_normalizer=self.gate_normalizer,
            lower_bound=self.gate_lower_bound,
            scale=self.scale,
            padding_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            initial_state=None if state is None else state.recurrent,
            output_final_state=output_state,
        )
        o = o.to(gate_logits.dtype)
        o = (o * (o.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt() * self.norm_weight.to(o.dtype)).to(q.dtype)
        return o, self._state_without_window(recurrent, k, v, padding_mask, state) if output_state else None

    def _state_without_window(self, recurrent, k, v, padding_mask, state):
        tokens = torch.full_like(k[:, 0, 0, 0], k.shape[1], dtype=torch.long) if padding_mask is None else padding_mask.long().sum(1)
        lengths = tokens if state is None else state.lengths + tokens
        # Copies, not views: a view would keep the states of every chunk, or all the keys, alive.
        empty_k, empty_v = (x.new_empty(x.shape[0], 0, *x.shape[2:]) for x in (k, v))
        return DualState(recurrent.clone(), empty_k, empty_v, lengths)

    # --- with a softmax window ----------------------------------------------------------------------------------

    def _window(
        self, q, k, v, padding_mask, padding_at_end, shared, cu_seqlens, state, output_state, softcap, sink_logits, seen, whole_windows
    ):
        tokens, start, at_end = q.shape[1], None, padding_at_end and (state is None or whole_windows)
        if not at_end or torch.compiler.is_compiling():
            shared = None

        def once(name: str, make: Callable[[], Any]) -> Any:
            if shared is None:
                return make()
            key = (name, k.device, k.shape[:2], self.window_size, self.sink_tokens, state is None)
            if key not in shared:
                shared[key] = make()
            return shared[key]

        if state is None or padding_mask is not None:
            seen = None  # what is known would have to be known of every row
        if state is not None and whole_windows:
            # All that matters of a length is then what a length of one window has: two blocks, in their order.
            start, seen, mask = state.lengths - self.window_size, self.window_size, padding_mask
            k, v, _ = self._after_window(state, k, v, None, seen)
            padding_mask = None if mask is None else once("mask", lambda: F.pad(mask.bool(), (self.window_size, 0), value=True))
            q = F.pad(q, (0, 0, 0, 0, k.shape[1] - tokens, 0))  # queries that nobody reads
        elif state is not None:
            start = self._row_start(state) if seen is None else max(seen // self._block_size - 2, 0) * self._block_size
            k, v, padding_mask = self._after_window(state, k, v, padding_mask, seen)
            q = F.pad(q, (0, 0, 0, 0, k.shape[1] - tokens, 0))  # queries that nobody reads
        past = q.shape[1] - tokens
        unread = at_end and uses_triton(q, v, quietly=True)  # kernels load no padding behind a row
        rows, k, v, valid = _to_rows(padding_mask, cu_seqlens, k, v, at_end, unread)
        sinks = self._sinks(k, v, state, seen)
        gate_logits, write_logits = self.gate_logits(v)
        row_counts = None if valid is None else once("counts", lambda: count_tokens(valid, self.window_size))
        o, recurrent = fused_window_attention(
            q if rows is None else rows.gather(q),
            k,
            v,
            gate_logits,
            self.mix(),
            self.norm_weight,
            self.state_gain,
            self.state_bias,
            self.window_size,
            write_logits=write_logits,
            gate_normalizer=self.gate_normalizer,
            lower_bound=self.gate_lower_bound,
            scale=self.scale,
            norm_eps=NORM_EPS,
            padding_mask=valid,
            row_counts=row_counts,
            state_mask=once("taken in", lambda: self._taken_in(k, None, state, seen)),
            sinks=sinks if self.sink_tokens else None,
            row_start=torch.full((k.shape[0],), start, device=k.device) if isinstance(start, int) else start,
            initial_state=None if state is None else state.recurrent,
            output_final_state=output_state,
            softcap=softcap,
            sink_logits=sink_logits,
        )
        o = o[:, past:] if rows is None else rows.scatter(o, q.shape[:2])[:, past:]
        if recurrent is None:
            return o, None
        places = None
        if at_end and row_counts is not None:  # of rows that begin with a window the number of the first token does not matter
            places = once("places", lambda: self._newest(0, row_counts[0], k.shape[1]))
        real = None if row_counts is None else row_counts[0]
        return o, self._state_after(k, v, real, recurrent, sinks, start, places)

    # --- one token --------------------------------------------------------------------------------------------------

    def _decodes_in_kernel(self, q, k, v, state, sink_logits) -> bool:
        """Whether a kernel takes a token: where Triton runs, and no gradient is asked for."""
        needs_gradient = torch.is_grad_enabled() and requires_gradient(q, k, v, *state, sink_logits, *self.parameters())
        return uses_triton(q, v) and not needs_gradient

    def _kernel_step(self, q, k, v, padding_mask, state, softcap, sink_logits, counts):
        """One token a row in one kernel, which writes the new state over `state`."""
        from dsla_kernels.ops.decode import GateWeights, pure_decode, window_decode  # imports Triton

        write = (self.write_weight, self.write_bias) if self.write_gate else (None, None)
        gates = GateWeights(self.gate_down, self.gate_up, self.gate_bias, *write)
        options: dict[str, Any] = {
            "gate_normalizer": self.gate_normalizer,
            "lower_bound": self.gate_lower_bound,
            "scale": self.scale,
            "norm_eps": NORM_EPS,
            "padding_mask": padding_mask,
        }
        if not self.window_size:
            o = pure_decode(q, k, v, state.recurrent, gates, self.mix_logits, self.norm_weight, **options)
            if counts:
                state.lengths.add_(1 if padding_mask is None else padding_mask[:, -1])
            return o, state
        o = window_decode(
            q,
            k,
            v,
            state.recurrent,
            state.window_k,
            state.window_v,
            state.lengths,
            gates,
            self.mix_logits,
            self.norm_weight,
            self.state_gain,
            self.state_bias,
            self.window_size,
            softcap=softcap,
            sink_logits=sink_logits,
            advance=counts,
            **options,
        )
        return o, state

    def _window_step(self, q, k, v, padding_mask, state, softcap=None, sink_logits=None):
        """One token a row, written into the window; a block that another has followed goes into the states."""
        size, window, sinks, length, device = self._block_size, self.window_size, self.sink_tokens, state.lengths, q.device
        slot = torch.arange(-sinks, window, device=device)  # below 0: the sinks
        real = torch.ones_like(length, dtype=torch.bool) if padding_mask is None else padding_mask[:, -1].bool()
        write = ((slot == (length % window)[:, None]) | (slot + sinks == length[:, None]) & (slot < 0)) & real[:, None]
        window_k, window_v = (torch.where(write[..., None, None], x, w) for x, w in ((k, state.window_k), (v, state.window_v)))

        # The token in a slot is the newest whose index leaves the slot's number as remainder; sinks are seen once they leave the window.
        token = length[:, None] - (length[:, None] - slot) % window
        visible = torch.where(slot < 0, slot + sinks <= length[:, None] - window, token >= 0)
        dtype = state.recurrent.dtype
        q_h = (q[:, 0] * self.scale).unflatten(1, (self.num_kv_heads, -1))
        scores = torch.einsum("bhrk,bshk->bhrs", q_h, window_k).to(dtype)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        log_denominator = scores.logsumexp(-1)
        if sink_logits is not None:
            log_denominator = log_denominator.logaddexp(sink_logits.to(dtype).view(self.num_kv_heads, -1))
        weights = (scores - log_denominator[..., None]).exp().to(v.dtype)
        o_window = torch.einsum("bhrs,bshv->bhrv", weights, window_v).to(dtype)
        mix = self.mix().to(dtype).unflatten(0, (self.num_kv_heads, -1))
        o_state = torch.einsum("bhrk,hri,bhikv->bhrv", q_h.to(dtype), mix, state.recurrent)
        o = join_window_and_states(
            o_window.flatten(1, 2),
            log_denominator.flatten(1, 2),
            o_state.flatten(1, 2),
            self.norm_weight,
            self.state_gain,
            self.state_bias,
            norm_eps=NORM_EPS,
        )[:, None].to(q.dtype)
        o = o.masked_fill(~real[:, None, None, None], 0)

        length = length + real
        full = real & (length % size == 0) & (length >= window)
        recurrent = state.recurrent
        if records_steps(q) or bool(full.any()):  # a recorded step cannot branch on values: it always folds
            second_half = ((length // size) % 2 == 1)[:, None, None, None]  # where the block before the last one lies
            old_k, old_v = (torch.where(second_half, w[:, sinks + size :], w[:, sinks : sinks + size]) for w in (window_k, window_v))
            taken_in = (length - window)[:, None] + torch.arange(size, device=device) >= sinks
            folded = self._final_state(old_k, old_v, taken_in, recurrent)
            recurrent = torch.where(full[:, None, None, None, None], folded, recurrent)
        return o, DualState(recurrent, window_k, window_v, length)

    @property
    def _block_size(self) -> int:
        """Tokens that go into the states at a time."""
        return self.window_size // 2

    def _final_state(self, k, v, padding_mask, initial_state=None):
        gate_logits, write_logits = self.gate_logits(v)
        return final_state(
            k,
            v,
            gate_logits,
            write_logits=write_logits,
            gate_normalizer=self.gate_normalizer,
            lower_bound=self.gate_lower_bound,
            padding_mask=padding_mask,
            initial_state=initial_state,
        )

    def _row_start(self, state: DualState) -> Tensor:
        """Number of the first token of the rows that continue `state`, `[B]`: the last block in the states, 0 before there is one."""
        return (state.lengths // self._block_size - 2).clamp_min(0) * self._block_size

    def _after_window(
        self, state: DualState, k: Tensor, v: Tensor, padding_mask: Tensor | None, seen: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """k, v and padding mask with three blocks from the window before them: rows that begin at a block boundary. The first of
        these blocks is in the states; of it the window has what the next token sees, and something else in the other places. Where
        it is known how many tokens the state has `seen`, there are no places after the last one, and no mask."""
        size, sinks = self._block_size, self.sink_tokens
        if seen is not None:
            first = max(seen // size - 2, 0)
            starts = [sinks + block % 2 * size for block in range(first, -(-seen // size))]
            ends = [start + size for start in starts]
            if ends and seen % size:
                ends[-1] = starts[-1] + seen % size
            past = [[w[:, a:b] for a, b in zip(starts, ends, strict=True)] for w in (state.window_k, state.window_v)]
            return torch.cat([*past[0], k], 1), torch.cat([*past[1], v], 1), None
        offset = torch.arange(PAST_BLOCKS * size, device=state.lengths.device)
        token = self._row_start(state)[:, None] + offset
        slot = (sinks + token % self.window_size)[..., None, None]
        window_k, window_v = (x.gather(1, slot.expand(-1, -1, *x.shape[2:])) for x in (state.window_k, state.window_v))
        valid = token < state.lengths[:, None]
        new_valid = valid.new_ones(k.shape[:2]) if padding_mask is None else padding_mask.bool()
        return torch.cat([window_k, k], 1), torch.cat([window_v, v], 1), torch.cat([valid, new_valid], 1)

    def _sinks(self, k: Tensor, v: Tensor, state: DualState | None, seen: int | None = None) -> tuple[Tensor, Tensor]:
        """The first tokens of each text `[B, S, ...]`, from rows that continue `state`; what has not been read yet is anything."""
        if state is not None and seen is not None and seen >= self.sink_tokens:
            return state.window_k[:, : self.sink_tokens], state.window_v[:, : self.sink_tokens]
        short = max(self.sink_tokens - k.shape[1], 0)
        new = [(F.pad(x, (0, 0, 0, 0, 0, short)) if short else x)[:, : self.sink_tokens] for x in (k, v)]
        if state is None:
            return new[0], new[1]
        known = (torch.arange(self.sink_tokens, device=k.device) < state.lengths[:, None])[..., None, None]
        sink_k, sink_v = (
            torch.where(known, w[:, : self.sink_tokens], x) for w, x in zip((state.window_k, state.window_v), new, strict=True)
        )
        return sink_k, sink_v

    def _taken_in(self, k: Tensor, valid: Tensor | None, state: DualState | None, seen: int | None = None) -> Tensor | None:
        """Which tokens of rows (that continue `state`) the states take in: no sinks, and nothing that they hold already."""
        if state is None and not self.sink_tokens:
            return valid
        position = torch.arange(k.shape[1], device=k.device)[None]
        if state is None:
            taken_in = (position >= self.sink_tokens).expand(k.shape[0], -1)
        elif seen is not None:
            first = self._block_size if seen >= self.window_size else 0
            taken_in = (position >= max(first, self.sink_tokens)).expand(k.shape[0], -1)
        else:
            held = torch.where(state.lengths >= self.window_size, self._block_size, 0)
            taken_in = (position >= held[:, None]) & (position >= self.sink_tokens)  # a row that starts later skips a whole block
        return taken_in if valid is None else taken_in & valid

    def _state_after(
        self,
        k: Tensor,
        v: Tensor,
        real: Tensor | None,
        recurrent: Tensor,
        sinks: tuple[Tensor, Tensor],
        start: Tensor | int | None,
        places: Tensor | None = None,
    ) -> DualState:
        """The state after rows `[B, L]` of `real` tokens (None: L) whose first one has the number `start`, a multiple of the block size;
        places: `_newest` of these, where it is known."""
        length, window, device = k.shape[1], self.window_size, k.device
        if real is None and not isinstance(start, Tensor):  # every row has the same tokens, so they are slices
            start = start or 0
            end = start + length
            turn, oldest = length - end % window, max(length - window, 0)  # where slot 0 is written anew, and the first that is kept
            window_k, window_v = (torch.cat([sink, x[:, turn:], x[:, oldest:turn]], 1) for sink, x in zip(sinks, (k, v), strict=True))
            if end < window:
                window_k, window_v = (F.pad(x, (0, 0, 0, 0, 0, window - end)) for x in (window_k, window_v))
            return DualState(recurrent, window_k, window_v, torch.full((k.shape[0],), end, device=device))
        real = torch.full((k.shape[0],), length, device=device) if real is None else real
        start = start if isinstance(start, Tensor) else start or 0
        places = (self._newest(start, real, length) if places is None else places)[..., None, None]
        window_k, window_v = (
            torch.cat([sink, x.gather(1, places.expand(-1, -1, *x.shape[2:]))], dim=1) for sink, x in zip(sinks, (k, v), strict=True)
        )
        return DualState(recurrent, window_k, window_v, real + start)

    def _newest(self, start: Tensor | int, real: Tensor, length: int) -> Tensor:
        """Where in rows of `length` places the newest token of each slot of the window lies, `[B, W]`. Before there is one, it is anywhere:
        the count hides it. start: number of the first token; real: tokens of each row `[B]`."""
        last = real[:, None] - 1
        number = last + (start[:, None] if isinstance(start, Tensor) else start)
        behind_slot = (number - torch.arange(self.window_size, device=real.device)) % self.window_size
        return (last - behind_slot).clamp(0, length - 1)


def records_steps(x: Tensor) -> bool:
    """Whether what runs on `x` is recorded to run again, compiled or in a CUDA graph: the host then cannot look at values."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())


def autocast_off(x: Tensor) -> Any:
    """A context in which operations on x's device keep the dtypes of their inputs."""
    return torch.autocast(x.device.type, enabled=False) if autocast_dtype(x.device) is not None else nullcontext()


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast rounds to on a device, or None where it is off."""
    kind = device.type
    if _knows_autocast(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return None


@torch.compiler.assume_constant_result  # dynamo before torch 2.13 cannot trace the question
def _knows_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


def one_dtype(state: DualState | None, *tensors: Tensor) -> tuple[Any, ...]:
    """State and tensors, with the keys and values that the state holds, in one dtype: the widest among them.

    Under autocast they differ: over fp32 weights rotated and normalised keys are fp32, and values what autocast rounds to. Of fp16
    autocast it is fp32 at least, also where all come in fp16, whose range states and decays pass. Of bf16 autocast it is bf16 where
    kernels run: there fp32 takes several times the time, and the base's attention rounds all to bf16 too.
    """
    low = autocast_dtype(tensors[0].device)
    dtypes = {x.dtype for x in (*tensors, *((state.window_k, state.window_v) if state is not None else ()))}
    if low is None and len(dtypes) == 1:
        return state, *tensors
    if low == torch.float16:
        dtypes.add(torch.float32)
    elif low == torch.bfloat16 and tensors[0].device.type != "cpu" and uses_triton(tensors[0], tensors[-1], quietly=True):
        dtypes = {low}
    dtype = functools.reduce(torch.promote_types, dtypes)
    if state is not None:
        state = state._replace(window_k=state.window_k.to(dtype), window_v=state.window_v.to(dtype))
    return state, *(x.to(dtype) for x in tensors)


def requires_gradient(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


def clone_state(state: DualState) -> DualState:
    return DualState(*(x.clone() for x in state))


def check_window(window_size: int, sink_tokens: int) -> None:
    """Raises ValueError unless the window is an even number of tokens and the sinks fit into one block of it."""
    if window_size < 0 or window_size % 2:
        raise ValueError(f"window_size must be an even number of tokens, or 0 for no window, got {window_size}")
    if sink_tokens < 0 or (window_size and sink_tokens > window_size // 2):
        raise ValueError(f"sink_tokens must be from 0 to half the window of {window_size}, got {sink_tokens}")


def check_rotary(layout: str, dim: int) -> None:
    """Raises ValueError unless the layout is known and the channels that rotate are pairs."""
    if layout not in ROTARY_LAYOUTS:
        raise ValueError(f"rotary_layout must be one of {list(ROTARY_LAYOUTS)}, got {layout!r}")
    if not isinstance(dim, int) or isinstance(dim, bool) or dim < 0 or dim % 2:
        raise ValueError(f"rotary_dim must be an even number of channels, got {dim!r}")


def half_life_range(half_life: float | tuple[float, float]) -> tuple[float, float]:
    """A half-life, or the pair (of the fastest channel, of the slowest), as a pair.

    Raises:
        ValueError: if it is no such pair, or an entry is not a positive number of tokens.
    """
    pair = half_life if isinstance(half_life, (tuple, list)) else (half_life, half_life)
    if len(pair) != 2:
        raise ValueError(f"a range of half-lives is a pair (fastest, slowest), got {half_life}")
    for life in pair:
        half_life_to_logit(life)
    return pair[0], pair[1]


def half_life_to_logit(half_life: float, gate_normalizer: float = 16.0) -> float:
    """The gate logit b with logsigmoid(b) / gate_normalizer = -ln 2 / half_life.

    Raises:
        ValueError: if the half-life is not a positive number of tokens.
    """
    if not 0 < half_life < math.inf:
        raise ValueError(f"a half-life is a positive number of tokens, got {half_life}")
    log_sigmoid = -math.log(2) * gate_normalizer / half_life
    return log_sigmoid - math.log(-math.expm1(log_sigmoid))


def _to_rows(padding_mask, cu_seqlens, k, v, at_end=False, unread=False):
    """k and v with padding moved to the end of each row, unless it is `at_end`, and zeroed, unless it stays there `unread`: rows, k, v,
    valid (rows None if nothing is moved, valid None without padding)."""
    if padding_mask is None and cu_seqlens is None:
        return None, k, v, None
    if at_end and padding_mask is not None:
        rows, valid = None, padding_mask.bool()
    else:
        rows = rows_from_mask(padding_mask) if cu_seqlens is None else rows_from_cu_seqlens(cu_seqlens, k.shape[1])
        k, v, valid = rows.gather(k), rows.gather(v), rows.valid
    if rows is None and unread:
        return None, k, v, valid
    pad = ~valid[..., None, None]
    return rows, k.masked_fill(pad, 0), v.masked_fill(pad, 0), valid
