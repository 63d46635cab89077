"""The DSLA layer between its projections: q, k, v in; output and states out. Knows no transformers class.

Shape legend as in `dsla_kernels.reference`: B batch, T tokens, Hq query heads, Hkv key-value heads, K key size, V value
size, W window size, S sink tokens.
"""

import math
from typing import Any

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
    log_decays,
    uses_triton,
    window_attention,
)

from ..compat.attributes import is_loaded
from .checks import ROTARY_LAYOUTS, check_rotary, check_window, half_life_range, half_life_to_logit
from .padding import Padding, to_rows
from .past import DualState, Past, clone_state
from .precision import autocast_off, one_dtype
from .recording import requires_gradient
from .step import kernel_step, plain_step

__all__ = ["NORM_EPS", "ROTARY_LAYOUTS", "DualState", "DualStateAttention", "clone_state", "half_life_to_logit"]

# Keeps the RMS of an empty state above zero: its logarithm is part of the gate between window and states.
NORM_EPS = 1e-6


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
        states: whether there are states. Without them this is softmax attention to the window and the first tokens alone; the layer then
            has no parameters, and `recurrent` of its state no entries.
        scale: of the scores, `K ** -0.5` when None.
        rotary_layout: one of ROTARY_LAYOUTS; channels of q and k that rotate together share a decay.
        rotary_dim: R, the channels from the first on that rotate, all when None. The others are paired with one another, behind.

    Raises:
        ValueError: names the argument whose value does not fit.
    """

    norm_eps = NORM_EPS

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
        states: bool = True,
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
        check_window(window_size, sink_tokens, states)
        if len(half_lives) != 2:
            raise ValueError(f"half_lives must be two, of the history and the recency state, got {half_lives}")
        value_dim = key_dim if value_dim is None else value_dim
        decays = key_dim // 2  # one per rotary pair: a decay then commutes with the rotation
        self.num_heads, self.num_kv_heads, self.key_dim, self.value_dim = num_heads, num_kv_heads, key_dim, value_dim
        self.window_size, self.sink_tokens = window_size, sink_tokens if window_size else 0
        self.states, self.write_gate = states, write_gate
        self.gate_normalizer, self.gate_lower_bound = gate_normalizer, gate_lower_bound
        self.half_lives = tuple(half_life_range(entry) for entry in half_lives)
        self.scale = key_dim**-0.5 if scale is None else scale
        self.rotary_layout, self.rotary_dim = rotary_layout, rotary_dim

        if not states:
            return
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
        if not self.states:
            return
        nn.init.normal_(self.gate_down, std=self.value_dim**-0.5)
        nn.init.normal_(self.gate_up, std=0.02)
        if not is_loaded(self.gate_bias):  # torch.nn.init looks itself
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
        kv_heads: Tensor | None = None,
        state_heads: Tensor | None = None,
        pages: Tensor | None = None,
        out: Tensor | None = None,
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
            kv_heads: int32 `[Hkv]`: k and v are those of all heads of a larger layer, and these their numbers, in the order of this layer's
                heads. Kernels read them where they lie; where a gradient is asked for, or keys are put anew, they are selected first.
            state_heads: int32 `[Hkv]`, where `state` has heads beside those of this layer: which of its heads each KV head has. A kernel
                that writes over `state` (T = 1) leaves the others as they are; any other new state has this layer's heads alone.
            pages: int32 `[B]`, where the tensors of `state` but its lengths have pages in place of rows: see `window_decode` in
                `dsla_kernels.ops.decode`. For one token a row, in kernels and in place alone.
            out: `[B, T, Hq, V]` in q's dtype, written to and returned: some consecutive heads of a larger output. Not for gradients.

        Returns:
            o `[B, T, Hq, V]` in q's dtype, zero at padding; and the new state or None.

        Raises:
            ValueError: for packed sequences that come with a state or shall leave one, a state of another number of sequences,
                kv_heads or an out that do not fit, and pages where no kernel can take them.
        """
        if cu_seqlens is not None and (state is not None or output_state):
            raise ValueError(
                "packed sequences (cu_seqlens, or position_ids that restart) leave no state behind: pass use_cache=False, "
                "or run each sequence on its own"
            )
        if out is not None and out.shape != (*q.shape[:3], self.value_dim):
            raise ValueError(f"out must be {[*q.shape[:3], self.value_dim]}, as q and the size of a value say, got {list(out.shape)}")
        if state is not None and state.lengths.shape[0] != q.shape[0]:
            raise ValueError(f"the state holds {state.lengths.shape[0]} sequences, the input {q.shape[0]}")
        dtype = q.dtype
        state, q, k, v = one_dtype(state, q, k, v)
        one_token = state is not None and q.shape[1] == 1
        in_kernels = (one_token or kv_heads is not None) and self._runs_in_kernels(q, k, v, *(state or ()), sink_logits)
        if pages is not None and not (one_token and in_kernels and in_place):
            raise ValueError(
                "pages are for one token a row behind a state, with in_place=True, where Triton runs and no gradient is asked for"
            )
        if kv_heads is not None:
            self._check_kv_heads(kv_heads)
            moved = cu_seqlens is not None or (padding_mask is not None and not padding_at_end)
            if not in_kernels or self.reorders_keys or (self.window_size and (moved if state is None else not one_token)):
                k, v, kv_heads = k.index_select(2, kv_heads), v.index_select(2, kv_heads), None
        if state is not None and state_heads is not None and not (one_token and in_kernels):
            state = state.of_heads(state_heads)
        q, k = self.in_halves(q), self.in_halves(k)
        with autocast_off(q):
            if one_token and in_kernels:
                # A state that takes part in a gradient is not written over: what was computed from it needs it as it was.
                written = state if in_place and not requires_gradient(*state) else clone_state(state)
                direct = out if out is not None and out.dtype == q.dtype else None
                places = kv_heads, state_heads, direct, pages
                o, new = kernel_step(self, q, k, v, padding_mask, written, softcap, sink_logits, counts, *places)
            elif not self.window_size:
                o, new = self._pure(q, k, v, padding_mask, cu_seqlens, state, output_state, kv_heads)
            elif one_token:
                o, new = plain_step(self, q, k, v, padding_mask, state, softcap, sink_logits)
                new = new if counts else new._replace(lengths=state.lengths)
            else:
                at_end = padding_at_end and (state is None or whole_windows)
                padding = Padding(padding_mask, cu_seqlens, at_end, shared if at_end else None)
                # With a mask rows are no longer alike, whatever is known of them.
                past = Past(self.window_size, self.sink_tokens, state, seen if padding_mask is None else None, whole_windows, kv_heads)
                o, new = self._window(q, k, v, past, padding, output_state, softcap, sink_logits)
        if out is None:
            return o.to(dtype), new
        return out if o is out else out.copy_(o), new

    def _check_kv_heads(self, kv_heads: Tensor) -> None:
        if kv_heads.dtype != torch.int32 or kv_heads.shape != (self.num_kv_heads,):
            raise ValueError(
                f"kv_heads must be int32 [{self.num_kv_heads}], one number for each KV head of this layer, got {kv_heads.dtype} "
                f"{list(kv_heads.shape)}"
            )

    def _runs_in_kernels(self, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> bool:
        """Whether kernels without a gradient take over: where Triton runs, and none is asked for."""
        return uses_triton(q, v) and not (torch.is_grad_enabled() and requires_gradient(q, k, v, *others, *self.parameters()))

    def fold(
        self,
        k: Tensor,
        v: Tensor,
        padding_mask: Tensor | None = None,
        state: DualState | None = None,
        *,
        padding_at_end: bool = False,
        kv_heads: Tensor | None = None,
    ) -> DualState:
        """The state after tokens of which only keys and values are left: what `forward` would have returned, up to rounding.

        k `[B, T, Hkv, K]`, v `[B, T, Hkv, V]`, `padding_mask` `[B, T]`, `padding_at_end`, `kv_heads` as in `forward`; `state` of the tokens
        before them, if any. Where k, v or `state` require a gradient it flows through the fold, to them and to the parameters of the gates;
        otherwise no graph is kept. Autocast is off within, as in `forward`.
        """
        state, k, v = one_dtype(state, k, v)
        gradient = torch.is_grad_enabled() and requires_gradient(k, v, *(state or ()))
        with torch.set_grad_enabled(gradient), autocast_off(k):
            if kv_heads is not None:
                self._check_kv_heads(kv_heads)
                padded = padding_mask is not None and self.window_size  # what is no token is put to zero, in a copy
                if gradient or not uses_triton(k, v) or self.reorders_keys or padded:
                    k, v, kv_heads = k.index_select(2, kv_heads), v.index_select(2, kv_heads), None
            return self._fold(self.in_halves(k), v, padding_mask, state, padding_at_end, kv_heads)

    def _fold(self, k, v, padding_mask, state, padding_at_end, kv_heads):
        """No key moves: of tokens before these the window has those that are not in the states yet, and what comes is masked."""
        recurrent = None if state is None else state.recurrent
        if not self.window_size:
            return self._state_without_window(self.final_state(k, v, padding_mask, recurrent, kv_heads), k, v, padding_mask, state)
        real = None if padding_mask is None else padding_mask.bool()
        if real is not None:
            k, v = (x.masked_fill(~real[..., None, None], 0) for x in (k, v))
        past = Past(self.window_size, self.sink_tokens, state, kv_heads=kv_heads)
        before = torch.zeros(k.shape[0], dtype=torch.long, device=k.device) if state is None else state.lengths
        counted = torch.arange(1, k.shape[1] + 1, device=k.device) if real is None else real.cumsum(1)
        number = before[:, None] + counted - 1  # of each token in its text
        total = before + (k.shape[1] if real is None else counted[:, -1])
        held = past.held(total)[:, None]
        if state is not None:
            window_k, window_v, old = past.not_held()
            taken_in = (old >= self.sink_tokens) & (old < torch.minimum(held, before[:, None]))
            recurrent = self.final_state(window_k, window_v, taken_in, recurrent)
        taken_in = (number >= self.sink_tokens) & (number < held)
        recurrent = self.final_state(k, v, taken_in if real is None else taken_in & real, recurrent, kv_heads)
        order = None if real is None or padding_at_end else torch.argsort(~real, dim=1, stable=True)
        return past.state_behind(k, v, total, recurrent, order)

    @property
    def num_states(self) -> int:
        """States of a head: 2, or 0 of a window alone."""
        return 2 if self.states else 0

    @property
    def reorders_keys(self) -> bool:
        """Whether `in_halves` puts channels anew."""
        return self.rotary_layout == "interleaved" or self.rotary_dim != self.key_dim

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

    def gate_logits(self, v: Tensor, kv_heads: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Raw gates `[B, T, Hkv, 2, K/2]` and raw write gates `[B, T, Hkv, 2]` (or None), fp32 (fp64 for fp64 inputs), from
        values `[B, T, Hkv, V]`; kv_heads as in `forward`."""
        write = (self.write_weight, self.write_bias) if self.write_gate else ()
        return gate_logits(v, self.gate_down, self.gate_up, self.gate_bias, *write, norm_eps=self.norm_eps, kv_heads=kv_heads)

    def _no_states(self, k: Tensor, v: Tensor) -> Tensor:
        """`recurrent` of a layer without states `[B, Hkv, 0, K, V]`, in the dtype of states."""
        dtype = torch.float64 if k.dtype == torch.float64 else torch.float32
        return k.new_empty(k.shape[0], self.num_kv_heads, 0, k.shape[-1], v.shape[-1], dtype=dtype)

    @property
    def gate_options(self) -> dict[str, float]:
        """What kernels are told of the gates beside their logits."""
        return {"gate_normalizer": self.gate_normalizer, "lower_bound": self.gate_lower_bound}

    def final_state(
        self,
        k: Tensor,
        v: Tensor,
        padding_mask: Tensor | None = None,
        initial_state: Tensor | None = None,
        kv_heads: Tensor | None = None,
    ) -> Tensor:
        """The two states `[B, Hkv, 2, K, V]` after keys `[B, T, Hkv, K]` in halves and values `[B, T, Hkv, V]`; the window takes no part.
        padding_mask: `[B, T]`, True at tokens that the states take in. kv_heads: as in `forward`."""
        if not self.states:
            return self._no_states(k, v)
        gate_logits, write_logits = self.gate_logits(v, kv_heads)
        options: dict[str, Any] = {"padding_mask": padding_mask, "initial_state": initial_state, "kv_heads": kv_heads}
        return final_state(k, v, gate_logits, write_logits=write_logits, **options, **self.gate_options)

    def mix(self) -> Tensor:
        """Weights of the two states `[Hq, 2]`, fp32 (fp64 for fp64 parameters)."""
        logits = self.mix_logits
        return (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)

    def bias_half_lives(self) -> Tensor:
        """Half-life in tokens that the gate biases stand for (gates of a zero value vector): `[Hkv, 2, K/2]`."""
        log_decay = log_decays(self.gate_bias, self.gate_bias.shape[-1], self.gate_normalizer, self.gate_lower_bound)
        return math.log(0.5) / log_decay

    # --- the paper's layer --------------------------------------------------------------------------------------

    def _pure(self, q, k, v, padding_mask, cu_seqlens, state, output_state, kv_heads):
        gate_logits, write_logits = self.gate_logits(v, kv_heads)
        o, recurrent = dual_state_attention(
            q,
            k,
            v,
            gate_logits,
            self.mix(),
            write_logits=write_logits,
            **self.gate_options,
            scale=self.scale,
            padding_mask=padding_mask,
            cu_seqlens=cu_seqlens,
            initial_state=None if state is None else state.recurrent,
            output_final_state=output_state,
            kv_heads=kv_heads,
        )
        o = o.to(gate_logits.dtype)
        o = (o * (o.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt() * self.norm_weight.to(o.dtype)).to(q.dtype)
        return o, self._state_without_window(recurrent, k, v, padding_mask, state) if output_state else None

    def _state_without_window(self, recurrent, k, v, padding_mask, state):
        tokens = torch.full_like(k[:, 0, 0, 0], k.shape[1], dtype=torch.long) if padding_mask is None else padding_mask.long().sum(1)
        lengths = tokens if state is None else state.lengths + tokens
        # Copies, not views: a view would keep the states of every chunk, or all the keys, alive.
        empty_k, empty_v = (x.new_empty(x.shape[0], 0, self.num_kv_heads, x.shape[3]) for x in (k, v))
        return DualState(recurrent.clone(), empty_k, empty_v, lengths)

    # --- with a softmax window ----------------------------------------------------------------------------------

    def _window(self, q, k, v, past, padding, output_state, softcap, sink_logits):
        """Several tokens a row, or the first ones, behind what the window still has of the `past`."""
        tokens, start = q.shape[1], past.row_start()
        k, v, before = past.after_window(k, v, start)
        places = k.shape[1] - tokens
        if places:
            q = F.pad(q, (0, 0, 0, 0, places, 0))  # queries that nobody reads
        # What is shared depends on these, beside the mask.
        of = k.device, k.shape[:2], self.window_size, self.sink_tokens, past.state is None
        mask = padding.once(("mask", *of), lambda: padding.behind(before, places, tokens))
        unread = padding.at_end and uses_triton(q, v, quietly=True)  # kernels load no padding behind a row
        rows, k, v, valid = to_rows(mask, padding.cu_seqlens, k, v, padding.at_end, unread)
        sinks = past.sinks(k, v)
        row_counts = None if valid is None else padding.once(("counts", *of), lambda: count_tokens(valid, self.window_size))
        options: dict[str, Any] = {
            "scale": self.scale,
            "padding_mask": valid,
            "row_counts": row_counts,
            "sinks": sinks if self.sink_tokens else None,
            "row_start": torch.full((k.shape[0],), start, device=k.device) if isinstance(start, int) else start,
            "softcap": softcap,
            "sink_logits": sink_logits,
            "kv_heads": past.kv_heads,
        }
        queries = q if rows is None else rows.gather(q)
        if self.states:
            gate_logits, write_logits = self.gate_logits(v, past.kv_heads)
            o, recurrent = fused_window_attention(
                queries,
                k,
                v,
                gate_logits,
                self.mix(),
                self.norm_weight,
                self.state_gain,
                self.state_bias,
                self.window_size,
                write_logits=write_logits,
                norm_eps=self.norm_eps,
                state_mask=padding.once(("taken in", *of), lambda: past.taken_in(k)),
                initial_state=None if past.state is None else past.state.recurrent,
                output_final_state=output_state,
                **self.gate_options,
                **options,
            )
        else:
            o, recurrent = window_attention(queries, k, v, self.window_size, **options), self._no_states(k, v) if output_state else None
        o = o[:, places:] if rows is None else rows.scatter(o, q.shape[:2])[:, places:]
        if recurrent is None:
            return o, None
        real = newest = None
        if row_counts is not None:
            real = row_counts[0]
            if padding.at_end:  # of rows that begin with a window the number of the first token does not matter
                newest = padding.once(("newest", *of), lambda: past.newest(0, real, k.shape[1]))
        return o, past.state_after(k, v, real, recurrent, sinks, start, newest)
