"""Another number of heads, as every level and draw has it, compiles nothing anew."""

import importlib
import pkgutil

import pytest
import torch

import dsla_kernels.ops
from dsla_hf.core.attention import DualStateAttention

COUNTS = ("HKV", "HELD")


def kernels():
    """All that can be launched: what a kernel calls has no launch parameters."""
    found = {}
    for module in pkgutil.walk_packages(dsla_kernels.ops.__path__, "dsla_kernels.ops."):
        for name, kernel in vars(importlib.import_module(module.name)).items():
            if name.endswith("_kernel") and hasattr(kernel, "arg_names"):
                found[kernel.fn.__module__, name] = kernel
    return found


def test_numbers_of_heads_are_no_constants_of_kernels():
    with_heads = {key: kernel for key, kernel in kernels().items() if set(COUNTS) & set(kernel.arg_names)}
    assert len(with_heads) >= 15
    for (module, name), kernel in with_heads.items():
        annotations = kernel.fn.__annotations__
        assert not [count for count in COUNTS if count in annotations], f"{module}.{name}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiles kernels")
@pytest.mark.parametrize("window_size", [0, 128])
def test_the_third_number_of_heads_compiles_nothing(window_size):
    def run(heads):
        layer = DualStateAttention(2 * heads, heads, 64, window_size=window_size).cuda()
        q, k, v = (torch.randn(2, 300, n * heads, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (2, 1, 1))
        layer(q, k, v)[0].float().square().mean().backward()
        with torch.no_grad():
            state = layer(q, k, v, output_state=True)[1]
            layer(q[:, :1], k[:, :1], v[:, :1], state=state, output_state=True)

    def compiled():
        return {key: sum(len(cache[0]) for cache in kernel.device_caches.values()) for key, kernel in kernels().items()}

    run(3)
    run(4)  # grids and splits follow the number of programs, and may take other tiles for few of them
    before = compiled()
    assert sum(before.values())
    run(5)
    run(7)
    assert compiled() == before

