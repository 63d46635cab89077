"""What a bug report needs to know of a machine."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch

from dsla_kernels import kernel_path


def environment() -> str:
    """Versions, device and kernel path, a line each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [("python", platform.python_version()), ("platform", platform.platform())]
    lines += [(package, version(package)) for package in ("dsla-hf", "torch", "transformers", "peft", "accelerate")]
    lines += [("device", torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads")]
    lines += [("kernels", kernel_path(device))]
    return "\n".join(f"{name:<14}{value}" for name, value in lines)
