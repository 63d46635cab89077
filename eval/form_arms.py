"""A form of states that a pilot likes, trained in a whole model: `eval/heads.py` with another layer, as far as texts are read at once.

    python eval/form_arms.py --form pairs train MODEL DATA --cache text.pkl --arm heads-window --window 480 --out runs/pairs ...
    python eval/form_arms.py --form pairs measure MODEL DATA --cache text.pkl --arm heads-window --adapter runs/pairs --out pairs.json

Behind `--form` come the arguments of `eval/heads.py`. Converted heads then have, beside their window, one state of rectified features with
a decay a token, and one denominator for both (`eval/state_forms.py` describes the forms). The window is given shorter by what a state takes
(K x V numbers in bf16 are the bytes of K / 2 tokens). There is no decoding: codes count as found where, given the prompt and the tokens of
the number before it, each token of the number is the likeliest.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import heads
import torch
import torch.nn.functional as F
from layer_arms import in_blocks
from state_forms import lengths_of_pairs
from torch import Tensor, nn

from dsla_hf import DualStateAttention
from dsla_hf.core.precision import autocast_off, one_dtype
from dsla_hf.evaluation import long_context
from dsla_hf.models import base_attention
from dsla_hf.models.loading import load_config
from dsla_kernels import uses_triton
from dsla_kernels.checks import SMALLEST_LOG_DECAY

FORMS = {"rotated": 0.0, "unrotated": 0.0, "pairs": 1.0, "slow": 0.5}  # share of rotary pairs of which features see the length alone
SMALLEST = 1e-9
FLOOR = 1e-4  # of a feature
CLOSED = -2.0  # bias that the weight of states starts from
LONG = 5.0  # logit of a decay: a half-life of about 100 tokens


class FormAttention(DualStateAttention):
    """A window, and one state of rectified features under one denominator with it. To the rest of the library it is a window alone."""

    form, size, theta = "pairs", 0, 10_000.0

    def __init__(self, num_heads: int, num_kv_heads: int, key_dim: int, **options: Any):
        super().__init__(num_heads, num_kv_heads, key_dim, **options)
        if self.states or not self.window_size:
            raise ValueError("a form takes the place of a window alone: take --arm heads-window or layers-window, and a --window above 0")
        small = torch.eye(key_dim, self.size or key_dim) * key_dim**-0.25
        self.gate_features = nn.Parameter(small.repeat(num_kv_heads, 1, 1))
        self.gate_weight = nn.Parameter(torch.zeros(num_kv_heads, self.value_dim))
        self.gate_bias = nn.Parameter(torch.full((num_kv_heads,), LONG))
        self.features = nn.Parameter(small.repeat(num_heads, 1, 1))
        self.gain, self.bias = nn.Parameter(torch.ones(num_heads)), nn.Parameter(torch.full((num_heads,), CLOSED))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *, kv_heads: Tensor | None = None, out: Tensor | None = None, **others: Any) -> Any:  # type: ignore[override]
        """As the layer's, of whole texts that begin at their first token, without padding and without a cache."""
        mask = others.get("padding_mask")
        if others.get("state") is not None or others.get("output_state") or others.get("cu_seqlens") is not None:
            raise NotImplementedError("forms read whole texts: pass use_cache=False")
        if mask is not None and not bool(mask.all()):
            raise NotImplementedError("forms read texts without padding")
        dtype = q.dtype
        _, q, k, v = one_dtype(None, q, k, v)
        if kv_heads is not None:
            k, v = k.index_select(2, kv_heads), v.index_select(2, kv_heads)
        q, k = self.in_halves(q), self.in_halves(k)
        with autocast_off(q):
            o, log_sum = self._softmax(q, k, v)
            if q.shape[1] > self.window_size:
                read, mass = self._read(q, k, v)
                alpha = (self.gain * mass.clamp(min=SMALLEST).log() + self.bias - log_sum).sigmoid() * (mass > 0)
                o = torch.lerp(o.float(), read, alpha[..., None])
            o = o.to(dtype)
        return (o if out is None else out.copy_(o)), None

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Attention to window and sinks `[B, T, Hq, V]`, and the logarithm of its denominator, fp32 `[B, T, Hq]`."""
        if uses_triton(q, v):
            return _Window.apply(q, k, v, self.window_size, self.sink_tokens, self.scale)
        t = torch.arange(q.shape[1], device=q.device)
        seen = (t[:, None] >= t) & ((t[:, None] - t < self.window_size) | (t < self.sink_tokens))
        scores = torch.einsum("bthgd,bshd->bhgts", q.unflatten(2, (self.num_kv_heads, -1)), k).float() * self.scale
        scores = scores.masked_fill(~seen, -math.inf)
        o = torch.einsum("bhgts,bshd->bthgd", scores.softmax(-1).to(v.dtype), v)
        return o.flatten(2, 3), scores.logsumexp(-1).permute(0, 3, 1, 2).flatten(2)

    def _read(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """What the states give, their mean `[B, T, Hq, V]` and their mass `[B, T, Hq]`, fp32; of the blocks (of half a window) before
        the last one, as the layer's are."""
        tokens, size = q.shape[1], self.window_size // 2
        n = v.float()
        n = n * (n.square().mean(-1, keepdim=True) + self.norm_eps).rsqrt()
        log_decay = F.logsigmoid(torch.einsum("bthv,hv->bth", n, self.gate_weight.float()) + self.gate_bias)
        of_k = self._features(k, self.gate_features) * (torch.arange(tokens, device=k.device) >= self.sink_tokens)[:, None, None]
        of_q = self._features(q, self.features).unflatten(2, (self.num_kv_heads, -1))
        with_one = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        of_k, of_q, with_one, log_decay = (in_blocks(x, size) for x in (of_k, of_q, with_one, log_decay))
        cumulative = log_decay.cumsum(2)
        total = cumulative[:, :, -1:]
        added = torch.einsum("bnchf,bnchv->bnhfv", (of_k * (total - cumulative).exp()[..., None]).to(v.dtype), with_one).float()
        states = [torch.zeros_like(added[:, 0])]
        for block in range(added.shape[1] - 2):  # the last two are read by nobody
            states.append(states[-1] * total[:, block, 0].exp()[..., None, None] + added[:, block])
        two_back = torch.stack([states[0], *states], 1)[:, : added.shape[1]]
        read = torch.einsum("bnchrf,bnhfv->bnchrv", of_q, two_back.to(of_q.dtype)).float()
        read = read.flatten(1, 2)[:, :tokens].flatten(2, 3)
        mass = read[..., -1]
        return read[..., :-1] / mass.clamp(min=SMALLEST)[..., None], mass

    def _features(self, x: Tensor, weight: Tensor) -> Tensor:
        """`[B, T, heads, F]`, above 0."""
        if self.form == "unrotated":
            x = unrotated(x, self.theta)
        x = lengths_of_pairs(x, FORMS[self.form])
        return torch.einsum("bthd,hde->bthe", x, weight.to(x.dtype)).relu() + FLOOR


class _Window(torch.autograd.Function):
    """The kernel of a window alone, with the logarithm of its denominator, which has a gradient here."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float) -> Any:
        from dsla_kernels._ops import ops

        # As `ops.window.attention.window_attention` calls it.
        tensors = (q.contiguous(), k.contiguous(), v.contiguous(), *(None,) * 6, k[:, :sinks].contiguous(), v[:, :sinks].contiguous())
        inputs = (*tensors, *(None,) * 7, window, 1.0, SMALLEST_LOG_DECAY, scale, 0.0, None, False, 0)
        o, log_sum, _ = ops.window_forward(*inputs)
        ctx.save_for_backward(o, log_sum, *(x for x in tensors if x is not None))
        ctx.options = inputs[11:]
        return o, log_sum

    @staticmethod
    def backward(ctx: Any, do: Tensor, d_log_sum: Tensor) -> Any:  # type: ignore[override]
        from dsla_kernels._ops import ops

        o, log_sum, q, k, v, sink_k, sink_v = ctx.saved_tensors
        # The kernel takes sum(do * o) of each query; the gradient of the denominator comes off it.
        do = do.contiguous()
        square = do.float().square().sum(-1, keepdim=True).clamp(min=1e-30)
        moved = o.float() - d_log_sum[..., None] * do.float() / square
        found = ops.window_backward(do, None, moved.contiguous(), log_sum, q, k, v, *(None,) * 6, sink_k, sink_v, *ctx.options)
        dq, dk, dv = found[:3]
        dk[:, : sink_k.shape[1]] += found[9]
        dv[:, : sink_v.shape[1]] += found[10]
        return dq, dk, dv, None, None, None


def unrotated(x: Tensor, theta: float) -> Tensor:
    """Queries or keys `[B, T, heads, D]` of tokens 0 to T - 1 before their rotation."""
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[1], device=x.device)[:, None, None] * frequencies
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], -1)


@torch.no_grad()
def answers_right(model: Any, tokenizer: Any, prompts: Sequence[Any], batch_size: int) -> list[bool]:
    """In place of `long_context.answers_right`, without a cache: see above."""
    right = []
    for prompt in prompts:
        text = tokenizer.decode(prompt.input_ids[-1:])
        answer = tokenizer(prompt.answer if text[-1:].isspace() else f" {prompt.answer}", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt.input_ids, *answer[:-1]]], device=model.device)
        found = model(input_ids=ids, use_cache=False, logits_to_keep=len(answer)).logits[0].argmax(-1)
        right.append(found.tolist() == answer)
    return right


def install(form: str, size: int, theta: float) -> Callable[[], None]:
    """Let converted layers have this form from now on; what is given back undoes it."""
    before = base_attention.DualStateAttention, heads.answers_right, long_context.answers_right, heads.window_of
    kind = type("FormAttention", (FormAttention,), {"form": form, "size": size, "theta": theta})
    base_attention.DualStateAttention = kind  # type: ignore[misc]
    heads.answers_right = long_context.answers_right = answers_right  # type: ignore[assignment]
    heads.window_of = lambda arm, window, *others: window

    def undo() -> None:
        base_attention.DualStateAttention, heads.answers_right, long_context.answers_right, heads.window_of = before  # type: ignore[misc]

    return undo


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--form", choices=FORMS, required=True)
    parser.add_argument("--features", type=int, default=0, help="their number, as many as channels when 0")
    options, rest = parser.parse_known_args(arguments)
    model = next((word for word in rest[1:] if not word.startswith("-")), None)
    if model is None:
        parser.error("behind --form the arguments of eval/heads.py are missing: train MODEL DATA ... or measure MODEL DATA ...")
    rope: Any = getattr(load_config(model), "rope_parameters", None) or {}
    undo = install(options.form, options.features, rope.get("rope_theta", FormAttention.theta))
    try:
        heads.main(rest)
    finally:
        undo()


if __name__ == "__main__":
    main(sys.argv[1:])
