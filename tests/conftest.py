"""Fixtures shared by all tests: small random models of both kinds, adapters far from their start, the shared folder."""

import gc
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # Triton kernels then run through its interpreter; to be said before triton is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import kernel_sources
from head_layers import ORDER
from peft import get_peft_model
from tiny import tiny_model_of

from dsla_hf import DSLAConfig

# What is tested in depth: with and without norms of queries and keys.
KINDS = ("llama", "qwen3")

# These files come first, so that none of them is what one of two processes waits for at the end.
LONGEST = (
    "test_distributed",
    "test_engine",
    "test_heads_cached",
    "test_generation_paths",
    "test_distillation",
    "test_tensor_parallel",
    "test_serving_http",
    "test_architectures",
    "test_assisted_and_compiled",
    "test_generation_mixin",
    "test_lm_eval",
    "test_cli",
)
LAST = "test_serving_ray"  # Ray leaves threads behind, beside which lm-eval's forked processes may wait for ever

# Small tensors gain nothing from threads, and workers of xdist that each start one per core slow each other down.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--kernels", action="store_true", help="run the kernel tests in Triton's interpreter though nothing has changed")


def pytest_collection_modifyitems(config, items):
    kernel_sources.leave_out(config, items)
    order = {name: place for place, name in enumerate(LONGEST)} | {LAST: len(LONGEST) + 1}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What was imported stays: a garbage collection over it takes a third of a second, and every training and benchmark asks for one."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seed():
    """Every test starts from the same random numbers, alone or among others."""
    torch.manual_seed(0)


@pytest.fixture
def tiny_model(seed):
    """Factory of small random causal LMs: `tiny_model("llama")`; keyword arguments go to the model's config.

    Weights are large enough (0.2) that attention moves the logits: a wrong attention cannot hide behind a small output.
    """

    return tiny_model_of


@pytest.fixture(params=KINDS)
def base_kind(request):
    """The kind of base model, for tests that must hold for all of them."""
    return request.param


@pytest.fixture
def adapter_model(seed):
    """Factory `adapter_model(base, **config)`: a DSLA adapter on `base`, each of its weights moved away from its start,
    so that every gate, mix, norm, gain and projection has an effect."""

    def make(base, **config):
        config = {"task_type": "CAUSAL_LM", "conversion_order": [2, 0, 3, 1], "window_size": 8, **config}
        model = get_peft_model(base, DSLAConfig(**config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "dsla_" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model.eval()

    return make


@pytest.fixture
def head_model(tiny_model, adapter_model):
    """Factory of adapters over heads, far from their start: `head_model("llama", level=3)`; `base` goes to the base's config."""

    def make(kind="llama", base=None, **config):
        config = {"conversion_unit": "head", "conversion_order": ORDER, **config}
        return adapter_model(tiny_model(kind, **(base or {})), **config)

    return make


@pytest.fixture(scope="session")
def shared_dir():
    """The folder with the yardstick teacher and text, which lies beside the repository and is not part of it."""
    path = Path(__file__).resolve().parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder 'shared' beside the repository (teacher model and text); it is not there")
    return path


@pytest.fixture
def interpreted_kernels(monkeypatch):
    """Triton kernels wherever there is one, on the CPU, until `monkeypatch.undo` or the end."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs TRITON_INTERPRET=1: on a CPU Triton's kernels run in its interpreter")
    monkeypatch.setattr("dsla_kernels.dispatch.choice", "triton")


@pytest.fixture
def watched_recording(monkeypatch):
    """A recording that calls its step, and fails if that reads a value on the host, which a CUDA graph cannot capture. `is_compiling`
    stands for the stream that captures."""

    class NoValues(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            assert "local_scalar" not in name and "nonzero" not in name and "masked_select" not in name, name
            return function(*args, **(kwargs or {}))

    class Recording:
        def __init__(self, step, pool):
            self.step = step

        def replay(self):
            with monkeypatch.context() as patch, NoValues():
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
                self.step()

    return Recording
