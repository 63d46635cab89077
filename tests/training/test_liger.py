"""Liger's kernels: when they are taken, that they train the same, and that nothing is left of them."""

import sys

import pytest
import torch

from dsla_hf.training import liger
from dsla_hf.training.liger import TESTED, fused_by_liger, wants_liger
from dsla_hf.training.losses import kl_sums

IDS = torch.arange(48).view(2, 24) % 97
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def state_of(model):
    return [dict(vars(module)) for module in model.modules()], dict(vars(sys.modules[type(model).__module__]))


def same(one, other):
    return one.keys() == other.keys() and all(value is other[name] for name, value in one.items())


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_all_is_put_back(tiny_model, kind):
    pytest.importorskip("liger_kernel")
    model = tiny_model(kind)
    before, expected = state_of(model), model(IDS).logits
    with fused_by_liger(model):
        assert "forward" in vars(model.model.norm) and not same(before[1], state_of(model)[1])
        model.train()  # what is set within, and not by Liger, stays
    after = state_of(model.eval())
    assert all(map(same, before[0], after[0])) and same(before[1], after[1])
    assert torch.equal(model(IDS).logits, expected)


def test_all_is_put_back_after_an_error(tiny_model):
    pytest.importorskip("liger_kernel")
    model = tiny_model("llama")
    before = state_of(model)
    with pytest.raises(KeyError), fused_by_liger(model):
        raise KeyError
    assert all(map(same, before[0], state_of(model)[0])) and same(before[1], state_of(model)[1])


def test_when_they_are_taken(tiny_model, monkeypatch, caplog):
    model = tiny_model("llama")
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: True)
    assert wants_liger(None, model, CUDA) and wants_liger(True, model, CUDA)
    assert not wants_liger(False, model, CUDA) and not wants_liger(None, model, CPU)
    with pytest.raises(ValueError, match="use_liger_kernel=True needs a CUDA device, training is on cpu"):
        wants_liger(True, model, CPU)
    untested = tiny_model("granite")
    assert "granite" not in TESTED and not wants_liger(None, untested, CUDA) and wants_liger(True, untested, CUDA)
    monkeypatch.setattr(liger, "is_liger_kernel_available", lambda: False)
    assert not wants_liger(None, model, CUDA)
    with pytest.raises(ImportError, match="pip install liger-kernel"):
        wants_liger(True, model, CUDA)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", TESTED)
def test_losses_and_gradients_are_those_without(tiny_model, adapter_model, kind):
    pytest.importorskip("liger_kernel")
    model = adapter_model(tiny_model(kind)).cuda()
    ids = IDS.cuda()

    def step():
        model.zero_grad()
        with torch.no_grad(), model.disable_adapter():
            teacher = model(ids).logits
        loss = kl_sums(model(ids).logits, teacher)[0]
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, gradients = step()
    with fused_by_liger(model.get_base_model()):
        loss, found = step()
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        # The kernels' products round to tf32, so other last bits before them are seen behind them.
        torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=1e-2 * gradient.abs().max().item())
