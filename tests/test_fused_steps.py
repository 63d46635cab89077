"""Norms, MLPs and rotations that run compiled while a step is captured: the same results, and nothing left behind."""

import pytest
import torch
from transformers.models.llama import modeling_llama

from dsla_hf.fused_steps import can_compile, fused

IDS = torch.tensor([[5, 17, 31, 44, 9, 60]])


@pytest.fixture
def counted():
    """Stands for torch.compile: counts what is compiled, and how often it runs."""

    class Counted:
        def __init__(self):
            self.functions, self.calls = [], 0

        def __call__(self, function):
            self.functions.append(function.__qualname__)

            def run(*args, **kwargs):
                self.calls += 1
                return function(*args, **kwargs)

            return run

    return Counted()


@pytest.mark.parametrize("level", [0, 2, 4])
def test_every_layer_runs_them_and_gives_the_same(tiny_model, adapter_model, base_kind, counted, level):
    model = adapter_model(tiny_model(base_kind), level=level)
    expected = model(IDS).logits
    with fused(model, counted):
        found = model(IDS).logits
    assert torch.equal(found, expected)
    # Two norms and an MLP a layer and the last norm, a rotation a layer; Qwen 3 has norms of queries and keys.
    layers = model.config.num_hidden_layers
    assert counted.calls == layers * (6 if base_kind == "qwen3" else 4) + 1
    assert len(counted.functions) == 3, counted.functions


def test_nothing_is_left_behind(tiny_model, counted):
    model, rotation = tiny_model("llama"), modeling_llama.apply_rotary_pos_emb

    def fail():
        with fused(model, counted):
            assert modeling_llama.apply_rotary_pos_emb is not rotation
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert modeling_llama.apply_rotary_pos_emb is rotation
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_forwards_of_others_stay(tiny_model, counted):
    """accelerate puts hooked forwards into modules."""
    model = tiny_model("llama")
    norm = model.model.norm
    hooked = norm.forward
    norm.forward = lambda x: hooked(x)
    mine = norm.forward
    with fused(model, counted):
        assert norm.forward is mine
    assert norm.forward is mine


def test_a_second_model_of_a_kind_compiles_nothing(tiny_model, counted):
    for model in (tiny_model("llama"), tiny_model("llama")):
        with fused(model, counted):
            model(IDS)
    assert len(counted.functions) == 3


def test_where_compilation_fails(monkeypatch):
    def broken(function, **options):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    can_compile.cache_clear()
    assert not can_compile(torch.device("cpu"))
    can_compile.cache_clear()
