"""eval/form_arms.py: a window alone where that holds the text, causal beyond it, blind to rotations, and trained by eval/heads.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))

from scripts import loaded_script
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from dsla_hf import DualStateAttention
from dsla_hf.core.heads import of_heads

THETA = 100.0


@pytest.fixture(scope="module")
def script():
    with loaded_script("form_arms.py") as module:
        yield module


def core(script, form, window=8, size=0):
    torch.manual_seed(0)
    kind = type("FormAttention", (script.FormAttention,), {"form": form, "size": size, "theta": THETA})
    layer = kind(4, 2, 8, window_size=window, sink_tokens=2, states=False)
    for weight in (layer.gate_features, layer.features, layer.gate_weight):
        torch.nn.init.normal_(weight, std=0.5)
    return layer


def inputs(tokens=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, tokens, heads, 8, generator=generator) for heads in (4, 2, 2)]


def rotated(x, first=0):
    angles = torch.arange(first, first + x.shape[1])[:, None] * THETA ** (-torch.arange(4) / 4)
    angles = torch.cat([angles, angles], -1)[None]
    return apply_rotary_pos_emb(x, x, angles.cos(), angles.sin(), unsqueeze_dim=2)[0]


FORMS = ("rotated", "unrotated", "pairs", "slow")


@pytest.mark.parametrize("form", FORMS)
def test_texts_within_the_window_are_those_of_a_window_alone(script, form):
    q, k, v = inputs(8)
    alone = DualStateAttention(4, 2, 8, window_size=8, sink_tokens=2, states=False)
    torch.testing.assert_close(core(script, form)(q, k, v)[0], alone(q, k, v)[0])


@pytest.mark.parametrize("form", FORMS)
def test_what_lies_behind_is_read_and_what_comes_is_not(script, form):
    layer, (q, k, v) = core(script, form), inputs()
    with torch.no_grad():
        layer.bias.fill_(2.0)
    before = layer(q, k, v)[0]
    changed = v.clone()
    changed[:, 20] += 1
    moved = (layer(q, k, changed)[0] - before).abs().amax((0, 2, 3))
    assert moved[:20].max() == 0 and moved[20:].min() > 1e-5  # in the window, and in the state of all blocks behind it


def test_states_are_sums_over_what_left_the_window(script):
    """Token by token, in plain words."""
    layer, (q, k, v) = core(script, "pairs"), inputs(24)
    with torch.no_grad():
        read, mass = layer._read(q, k, v)
        of_q, of_k = layer._features(q, layer.features), layer._features(k, layer.gate_features)
        n = v * (v.square().mean(-1, keepdim=True) + layer.norm_eps).rsqrt()
        log_decay = torch.nn.functional.logsigmoid(torch.einsum("bthv,hv->bth", n, layer.gate_weight) + layer.gate_bias)
        for t in (0, 7, 8, 13, 23):
            end = max(t // 4 - 1, 0) * 4  # of the block before the last one
            for head in range(4):
                weights = [
                    (of_q[:, t, head] * of_k[:, s, head // 2]).sum(-1) * log_decay[:, s + 1 : end, head // 2].sum(1).exp()
                    for s in range(2, end)
                ]
                total = sum(weights, torch.zeros(2))
                torch.testing.assert_close(mass[:, t, head], total, atol=1e-4, rtol=1e-4)
                if weights:
                    mean = sum(w[:, None] * v[:, s, head // 2] for w, s in zip(weights, range(2, end), strict=True)) / total[:, None]
                    torch.testing.assert_close(read[:, t, head], mean, atol=1e-4, rtol=1e-4)


def test_pairs_and_unrotated_features_do_not_see_the_place_of_a_text(script):
    q, k, _ = inputs()
    for form in ("pairs", "unrotated"):
        layer = core(script, form)
        if form == "unrotated":
            torch.testing.assert_close(layer._features(rotated(k), layer.gate_features), _plain(script, layer, k), atol=1e-4, rtol=1e-4)
        else:
            one, other = (layer._features(rotated(k, first), layer.gate_features) for first in (0, 1000))
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def _plain(script, layer, k):
    """Features of keys that were never rotated."""
    plain = core(script, "rotated")
    return plain._features(k, layer.gate_features)


def test_heads_of_a_layer_are_those_of_the_whole(script):
    layer, (q, k, v) = core(script, "slow", size=4), inputs()
    whole = layer(q, k, v)[0]
    part = of_heads(layer, [1])
    torch.testing.assert_close(part(q[:, :, 2:], k[:, :, 1:], v[:, :, 1:])[0], whole[:, :, 2:])
    whole.square().sum().backward()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in layer.parameters())


def test_what_it_cannot_do_is_refused(script):
    layer, (q, k, v) = core(script, "pairs"), inputs()
    with pytest.raises(NotImplementedError, match="use_cache=False"):
        layer(q, k, v, output_state=True)
    with pytest.raises(NotImplementedError, match="without padding"):
        layer(q, k, v, padding_mask=torch.arange(48)[None].expand(2, -1) > 3)
    with pytest.raises(ValueError, match="--arm heads-window"):
        script.FormAttention(4, 2, 8, window_size=8)
