"""Imported first, it has Triton compile kernels for an H100 wherever this runs, and launch none: what they would write stays as it is.

`compiled` counts what was compiled, by the name of the kernel. Needs no GPU; of Triton it replaces the driver and the launch.
"""

import collections
import os

os.environ.pop("TRITON_INTERPRET", None)
os.environ["DSLA_KERNELS"] = "triton"

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

compiled: collections.Counter[str] = collections.Counter()


class H100:
    """What the compiler asks of a driver."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


class Properties:
    multi_processor_count = 132


driver.set_active(H100())
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: Properties
launch = JITFunction.run


def compile_only(self, *arguments, grid, warmup, **options):
    def variants():
        return sum(len(cache[0]) for cache in self.device_caches.values())

    before = variants()
    result = launch(self, *arguments, grid=grid, warmup=True, **options)
    compiled[self.fn.__name__] += variants() - before
    return result


JITFunction.run = compile_only
