"""Which of PyTorch's kernels reads how much of a prompt, and that the parts are the whole."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsla_hf.inference import prompt_attention
from dsla_hf.inference.prompt_attention import attend_to_prompt, planned_tokens

CPU = torch.device("cpu")


@pytest.fixture
def fast_cudnn(monkeypatch):
    """As on a card where cuDNN is the faster one."""
    monkeypatch.setattr(prompt_attention, "cudnn_is_fast", lambda device: True)


@pytest.fixture
def calls(monkeypatch):
    """Shapes and strides of what PyTorch is given, and the first kernel that it may take."""
    seen, real, order = [], F.scaled_dot_product_attention, []

    def spied(query, key, value, **options):
        seen.append((order[-1] if order else None, tuple(query.shape), query.stride(), key.stride()))
        return real(query, key, value, **options)

    def choose(backends, set_priority=False):
        order.append(backends[0])
        return sdpa_kernel(backends, set_priority)

    monkeypatch.setattr(prompt_attention, "F", SimpleNamespace(scaled_dot_product_attention=spied))
    monkeypatch.setattr(prompt_attention, "sdpa_kernel", choose)
    return seen


def planned(tokens, head_dim=128, dtype=torch.bfloat16, **options):
    return planned_tokens(tokens, head_dim, dtype, CPU, **options)


def test_few_lengths_have_plans(fast_cudnn):
    lengths = {planned(tokens) for tokens in range(1, 2**17 + 1)}
    expected = {0, *range(2048, 16384, 1024), *(n << shift for shift in range(3) for n in range(16384, 32769, 2048))}
    assert lengths == expected and len(lengths) == 40
    for tokens in (2048, 2049, 5000, 16383, 20011, 131071):
        assert tokens - max(tokens // 8, 1024) < planned(tokens) <= tokens and planned(tokens) % 128 == 0
    assert planned(2047) == planned(1) == 0


def test_recorded_calls_have_their_own(fast_cudnn):
    assert planned(1024, recorded=True) == 1024 and planned(1792, recorded=True) == 1792
    assert planned(512, recorded=True) == planned(1000, recorded=True) == planned(1100, recorded=True) == 0


def test_what_cudnn_does_not_take_has_none(fast_cudnn, monkeypatch):
    assert planned(8192, dtype=torch.float32) == planned(8192, head_dim=256) == planned(8192, head_dim=36) == 0
    assert planned(8192, dtype=torch.float16) == planned(8192, head_dim=64) == 8192
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)  # the user has said so
    assert planned(8192) == planned(8192, recorded=True) == 0


def test_on_other_devices_there_are_none():
    assert planned(8192) == 0


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("rows, new, tokens", [(1, 40, 40), (2, 35, 35), (1, 32, 32), (1, 7, 7), (2, 9, 40), (1, 40, 41)])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_the_parts_are_the_whole(fast_cudnn, monkeypatch, calls, kv_heads, rows, new, tokens, scale):
    """Queries of the plan, those behind it, and texts behind a cache, whose keys lie apart in a cache of more room."""
    monkeypatch.setattr(prompt_attention, "planned_tokens", lambda tokens, *args: tokens // 16 * 16)
    torch.manual_seed(0)
    q = torch.randn(rows, new, 4, 8).transpose(1, 2)
    k, v = (torch.randn(rows, kv_heads, 64, 8)[:, :, :tokens] for _ in range(2))
    found = attend_to_prompt(q, k, v, scale)
    mask = torch.ones(new, tokens, dtype=torch.bool).tril(tokens - new)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)
    assert found.is_contiguous()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    by_cudnn = [shape[2] for first, shape, *_ in calls if first is SDPBackend.CUDNN_ATTENTION]
    assert by_cudnn == ([new // 16 * 16] * rows if new == tokens >= 16 else [])


def test_a_plan_is_of_a_length_alone(fast_cudnn, monkeypatch, calls):
    """Neither the text's length, nor the room of its cache, nor other rows are in what cuDNN is shown."""
    monkeypatch.setattr(prompt_attention, "planned_tokens", lambda tokens, *args: tokens // 16 * 16)
    for tokens, room, rows in ((16, 16, 1), (19, 64, 1), (31, 40, 3)):
        q = torch.randn(rows, tokens, 4, 8).transpose(1, 2)
        k, v = (torch.randn(rows, 2, room, 8)[:, :, :tokens] for _ in range(2))
        attend_to_prompt(q, k, v)
    shown = [call for call in calls if call[0] is SDPBackend.CUDNN_ATTENTION]
    assert len(shown) == 5 and len(set(shown)) == 1


def test_the_users_switches_are_left_as_they_are(fast_cudnn, calls):
    switches = (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.math_sdp_enabled)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        before = [is_on() for is_on in switches]
        q = torch.randn(1, 4, 8, 8)
        attend_to_prompt(q, q, q)
        assert [is_on() for is_on in switches] == before and before[0] is False
        assert calls[0][0] is SDPBackend.EFFICIENT_ATTENTION  # the first that is on, of those without plans
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
