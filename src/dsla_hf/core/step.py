"""One token a row: in one kernel, or in plain PyTorch.

Both are `DualStateAttention.forward` for T = 1 behind a state, and give what it gives for more tokens. Shapes as in `attention`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsla_kernels import join_window_and_states

from .past import DualState
from .recording import records_steps

if TYPE_CHECKING:
    from .attention import DualStateAttention


def kernel_step(
    layer: DualStateAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding_mask: Tensor | None,
    state: DualState,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    counts: bool = True,
    kv_heads: Tensor | None = None,
    state_heads: Tensor | None = None,
    out: Tensor | None = None,
    pages: Tensor | None = None,
) -> tuple[Tensor, DualState]:
    """One token a row in one kernel, which writes the new state over `state`, and the output to `out` if that is given."""
    from dsla_kernels.ops.decode import GateWeights, pure_decode, ring_decode, window_decode  # imports Triton

    options: dict[str, Any] = {
        "scale": layer.scale,
        "padding_mask": padding_mask,
        "kv_heads": kv_heads,
        "state_heads": state_heads,
        "pages": pages,
        "out": out,
    }
    of_window: dict[str, Any] = {"softcap": softcap, "sink_logits": sink_logits, "advance": counts}
    if not layer.states:
        o = ring_decode(q, k, v, state.window_k, state.window_v, state.lengths, layer.window_size, **of_window, **options)
        return o, state
    write = (layer.write_weight, layer.write_bias) if layer.write_gate else (None, None)
    gates = GateWeights(layer.gate_down, layer.gate_up, layer.gate_bias, *write)
    options |= {"norm_eps": layer.norm_eps, **layer.gate_options}
    if not layer.window_size:
        lengths = None if pages is None else state.lengths
        o = pure_decode(q, k, v, state.recurrent, gates, layer.mix_logits, layer.norm_weight, lengths=lengths, **options)
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
        layer.mix_logits,
        layer.norm_weight,
        layer.state_gain,
        layer.state_bias,
        layer.window_size,
        **of_window,
        **options,
    )
    return o, state


def plain_step(
    layer: DualStateAttention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    padding_mask: Tensor | None,
    state: DualState,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> tuple[Tensor, DualState]:
    """One token a row, written into the window; a block that another has followed goes into the states."""
    window, sinks, length = layer.window_size, layer.sink_tokens, state.lengths
    size = window // 2
    slot = torch.arange(-sinks, window, device=q.device)  # below 0: the sinks
    real = torch.ones_like(length, dtype=torch.bool) if padding_mask is None else padding_mask[:, -1].bool()
    write = ((slot == (length % window)[:, None]) | (slot + sinks == length[:, None]) & (slot < 0)) & real[:, None]
    window_k, window_v = (torch.where(write[..., None, None], x, w) for x, w in ((k, state.window_k), (v, state.window_v)))

    # The token in a slot is the newest whose index leaves the slot's number as remainder; sinks are seen once they leave the window.
    token = length[:, None] - (length[:, None] - slot) % window
    visible = torch.where(slot < 0, slot + sinks <= length[:, None] - window, token >= 0)
    dtype = state.recurrent.dtype
    q_h = (q[:, 0] * layer.scale).unflatten(1, (layer.num_kv_heads, -1))
    scores = torch.einsum("bhrk,bshk->bhrs", q_h, window_k).to(dtype)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    log_denominator = scores.logsumexp(-1)
    if sink_logits is not None:
        log_denominator = log_denominator.logaddexp(sink_logits.to(dtype).view(layer.num_kv_heads, -1))
    weights = (scores - log_denominator[..., None]).exp().to(v.dtype)
    o_window = torch.einsum("bhrs,bshv->bhrv", weights, window_v).to(dtype)
    if not layer.states:
        o = o_window.flatten(1, 2)[:, None].to(q.dtype).masked_fill(~real[:, None, None, None], 0)
        return o, DualState(state.recurrent, window_k, window_v, length + real)
    mix = layer.mix().to(dtype).unflatten(0, (layer.num_kv_heads, -1))
    o_state = torch.einsum("bhrk,hri,bhikv->bhrv", q_h.to(dtype), mix, state.recurrent)
    o = join_window_and_states(
        o_window.flatten(1, 2),
        log_denominator.flatten(1, 2),
        o_state.flatten(1, 2),
        layer.norm_weight,
        layer.state_gain,
        layer.state_bias,
        norm_eps=layer.norm_eps,
    )[:, None].to(q.dtype)
    o = o.masked_fill(~real[:, None, None, None], 0)

    length = length + real
    full = real & (length % size == 0) & (length >= window)
    recurrent = state.recurrent
    if records_steps(q) or bool(full.any()):  # a recorded step cannot branch on values: it always folds
        second_half = ((length // size) % 2 == 1)[:, None, None, None]  # where the block before the last one lies
        old_k, old_v = (torch.where(second_half, w[:, sinks + size :], w[:, sinks : sinks + size]) for w in (window_k, window_v))
        taken_in = (length - window)[:, None] + torch.arange(size, device=q.device) >= sinks
        folded = layer.final_state(old_k, old_v, taken_in, recurrent)
        recurrent = torch.where(full[:, None, None, None, None], folded, recurrent)
    return o, DualState(recurrent, window_k, window_v, length)
