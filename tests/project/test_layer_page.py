"""docs/layer.md is enough to write the layer from: this does it, token by token, with nothing but what the page says."""

import math

import pytest
import torch
from torch.nn import functional as F

from dsla_hf import DualStateAttention

SINK_LOGITS = torch.tensor([0.5, -1.0, 2.0, 0.1], dtype=torch.float64)
OPTIONS = {
    "pure": ({"window_size": 0}, {}),
    "pure, options": ({"window_size": 0, "write_gate": False, "gate_lower_bound": -0.3, "scale": 0.7}, {}),
    "window": ({"window_size": 8, "sink_tokens": 3}, {"softcap": 1.5, "sink_logits": SINK_LOGITS}),
    "no sinks": ({"window_size": 6, "sink_tokens": 0, "gate_normalizer": 4.0}, {}),
    "no write gate": ({"window_size": 4, "sink_tokens": 2, "write_gate": False}, {"softcap": 0.8}),
}
LAYOUTS = [("interleaved", 12), ("halves", 8), ("interleaved", 4)]
CASES = [*((name, ("halves", 12)) for name in OPTIONS), *((name, layout) for layout in LAYOUTS for name in ("pure", "window"))]
EPS = 1e-6


def pairs_of(layout, rotated, channels):
    """The page's table: the channels of every pair."""
    still = channels - rotated
    if layout == "halves":
        return [(p, p + rotated // 2) for p in range(rotated // 2)] + [(rotated + j, rotated + j + still // 2) for j in range(still // 2)]
    return [(2 * p, 2 * p + 1) for p in range(rotated // 2)] + [(rotated + 2 * j, rotated + 2 * j + 1) for j in range(still // 2)]


def head_of_the_page(weights, h, group, q, k, v, *, scale, window, sinks, normalizer, bound, pairs, softcap, sink_logit):
    """What query head h gives at every token of one text: q, k `[T, K]`, v `[T, V]` to `[T, V]`."""
    kv, (tokens, channels), outputs = h // group, k.shape, []
    mix = weights["mix_logits"][h].softmax(0)
    pair_of = [next(p for p, pair in enumerate(pairs) if c in pair) for c in range(channels)]
    states, held = [torch.zeros(channels, v.shape[1], dtype=q.dtype)] * 2, 0  # held: the first token that is not in them yet

    def take_in(j):
        n = v[j] / (v[j].square().mean() + EPS).sqrt()
        up = weights["gate_up"][kv].chunk(2, 1)
        for i in range(2):
            x = n @ weights["gate_down"][kv] @ up[i] + weights["gate_bias"][kv, i]
            decay = (F.logsigmoid(x) / normalizer).clamp_min(bound).exp()[pair_of]
            beta = torch.sigmoid(n @ weights["write_weight"][kv, :, i] + weights["write_bias"][kv, i]) if "write_weight" in weights else 1
            states[i] = decay[:, None] * states[i] + beta * k[j][:, None] * v[j]

    for t in range(tokens):
        end = max(t // (window // 2) - 1, 0) * (window // 2) if window else t + 1
        for j in range(held, end):
            if j >= sinks or not window:
                take_in(j)
        held = max(end, held)
        read = scale * q[t] @ (mix[0] * states[0] + mix[1] * states[1])
        rms = (read.square().mean() + EPS).sqrt()
        o_state = weights["norm_weight"][h] * read / rms
        if not window:
            outputs.append(o_state)
            continue
        seen = [j for j in range(t + 1) if j > t - window or j < sinks]
        scores = scale * k[seen] @ q[t]
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        total = scores.exp().sum() + (0 if sink_logit is None else sink_logit.exp())
        o_window = scores.exp() @ v[seen] / total
        alpha = torch.sigmoid(weights["state_gain"][h] * rms.log() + weights["state_bias"][h] - total.log()) if read.any() else 0
        outputs.append((1 - alpha) * o_window + alpha * o_state)
    return torch.stack(outputs)


@pytest.mark.parametrize("case, layout", CASES)
@torch.no_grad()
def test_the_page_is_enough(case, layout):
    """With padding in every place, two query heads per KV head, and a text no longer than the window."""
    options, softmax = OPTIONS[case]
    channels, size, heads, group, tokens = 12, 5, 4, 2, 23
    options = {"half_lives": ((4.0, 40.0), (2.0, 9.0)), "gate_rank": 3, **options}
    layer = DualStateAttention(heads, heads // group, channels, size, rotary_layout=layout[0], rotary_dim=layout[1], **options).double()
    for parameter in layer.parameters():
        parameter.add_(0.5 * torch.randn_like(parameter))
    weights = dict(layer.named_parameters())
    q, k, v = (torch.randn(3, tokens, n, m, dtype=torch.float64) for n, m in ((heads, channels), (2, channels), (2, size)))
    mask = torch.ones(3, tokens, dtype=torch.bool)
    mask[0, :7], mask[0, 12:15], mask[0, -2:], mask[1, 3:] = False, False, False, False
    found = layer(q, k, v, padding_mask=mask, **softmax)[0]

    expected = torch.zeros_like(found)
    for row in range(3):
        real = mask[row]
        for h in range(heads):
            expected[row, real, h] = head_of_the_page(
                weights,
                h,
                group,
                q[row, real, h],
                k[row, real, h // group],
                v[row, real, h // group],
                scale=options.get("scale", channels**-0.5),
                window=options["window_size"],
                sinks=options.get("sink_tokens", 4),
                normalizer=options.get("gate_normalizer", 16.0),
                bound=options.get("gate_lower_bound", -1.25),
                pairs=pairs_of(*layout, channels),
                softcap=softmax.get("softcap"),
                sink_logit=softmax["sink_logits"][h] if "sink_logits" in softmax else None,
            )
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_start_of_the_page():
    layer = DualStateAttention(4, 2, 8, 6).double()
    start = {name: p.detach() for name, p in layer.named_parameters()}
    shapes = {"gate_down": (2, 6, 16), "gate_up": (2, 16, 8), "gate_bias": (2, 2, 4), "write_weight": (2, 6, 2), "write_bias": (2, 2)}
    shapes |= {"mix_logits": (4, 2), "norm_weight": (4, 6), "state_gain": (4,), "state_bias": (4,)}
    assert {name: tuple(p.shape) for name, p in start.items()} == shapes
    lives = -math.log(2) * 16 / F.logsigmoid(start["gate_bias"])
    for i, (fast, slow) in enumerate(((64.0, 4096.0), (8.0, 256.0))):
        spread = torch.tensor([fast * (slow / fast) ** (p / 3) for p in range(4)], dtype=torch.float64)
        torch.testing.assert_close(lives[:, i], spread.expand(2, 4), rtol=1e-4, atol=0)
    assert not any(start[name].any() for name in ("write_weight", "write_bias", "mix_logits", "state_bias"))
    assert all((start[name] == 1).all() for name in ("norm_weight", "state_gain"))
    assert 0.5 < start["gate_down"].std() * 6**0.5 < 1.5 and 0.015 < start["gate_up"].std() < 0.025
