"""What a bug report needs to know of a machine, and what of a model runs fused there."""

from __future__ import annotations

import platform
from importlib.metadata import version

import torch
from transformers import AutoModelForCausalLM

from dsla_kernels import kernel_path

from ..inference.parts import summary
from ..models.loading import load_config


def environment(model: str | None = None) -> str:
    """Versions, device and kernel path, a line each; and of a checkpoint what captured steps run fused.

    Raises:
        ValueError: if the checkpoint is of a kind that transformers does not know.
        OSError: if its config is missing.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = [("python", platform.python_version()), ("platform", platform.platform())]
    lines += [(package, version(package)) for package in ("dsla-hf", "torch", "transformers", "peft", "accelerate")]
    lines += [("device", torch.cuda.get_device_name() if device == "cuda" else f"cpu, {torch.get_num_threads()} threads")]
    lines += [("kernels", kernel_path(device))]
    if model is not None:
        lines += [("fused", fused_in(model))]
    return "\n".join(f"{name:<14}{value}" for name, value in lines)


def fused_in(model: str) -> str:
    """Which parts of a checkpoint's model are fused in captured steps: those of its config, without weights."""
    config = load_config(model)
    with torch.device("meta"):
        parts = summary(AutoModelForCausalLM.from_config(config))
    quantised = getattr(config, "quantization_config", None) is not None
    return f"{parts} (without the MLPs: the weights are quantised)" if quantised else parts
