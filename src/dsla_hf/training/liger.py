"""Norms, rotary embedding and activations of the base as one kernel each while a stage is trained, by Liger Kernel
(github.com/linkedin/Liger-Kernel): eager PyTorch takes a dozen, and most of a step's time at small models.

transformers patches a model for it, the classes of its file with it, and leaves it so; here all is put back behind the training, so that
what is loaded or measured then in the same process is what it would be without.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.integrations.liger import apply_liger_kernel
from transformers.utils import is_liger_kernel_available, logging

logger = logging.get_logger(__name__)

# Whose losses and gradients are tested with it; for others `use_liger_kernel=True` asks for it.
TESTED = ("gemma2", "llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3")
# The losses here are our own.
KERNELS = {"rope": True, "rms_norm": True, "cross_entropy": False, "fused_linear_cross_entropy": False}
ADVICE = (
    "training is slower than it could be without Liger Kernel's fused norms, rotary embedding and activations: pip install liger-kernel"
)


def wants_liger(asked: bool | None, base: Any, device: torch.device) -> bool:
    """Whether the base is trained with Liger's kernels. asked: `use_liger_kernel`; None takes them on a CUDA device where they are
    installed and `base` is of a type that is tested, and says once what is missed where they are not installed.

    Raises:
        ValueError: if they are asked for on another device.
        ImportError: if they are asked for and not installed.
    """
    if asked is False:
        return False
    if device.type != "cuda":
        if asked:
            raise ValueError(f"use_liger_kernel=True needs a CUDA device, training is on {device.type}: leave it out")
        return False
    if is_liger_kernel_available():
        return bool(asked) or base.config.model_type in TESTED
    if asked:
        raise ImportError("use_liger_kernel=True needs Liger Kernel: pip install liger-kernel")
    logger.warning_once(ADVICE)
    return False


@contextmanager
def fused_by_liger(base: Any, kernels: dict[str, Any] | None = None) -> Iterator[None]:
    """Within it the modules of `base`, a transformers model, run Liger's kernels. kernels: which, as in `liger_kernel_config`."""
    file: Any = vars(sys.modules[type(base).__module__])
    places: list[dict[str, Any]] = [file, *(vars(module) for module in base.modules())]
    before = [dict(place) for place in places]
    chosen = {**KERNELS, _activation(base.config): not has_experts(base.config), **(kernels or {})}
    try:
        apply_liger_kernel(base, chosen)
    finally:
        changed = [
            [name for name, value in place.items() if name not in old or value is not old[name]]
            for place, old in zip(places, before, strict=True)
        ]
    try:
        yield
    finally:
        for place, old, names in zip(places, before, changed, strict=True):
            for name in names:
                if name in old:
                    place[name] = old[name]
                else:
                    place.pop(name, None)


def _activation(config: Any) -> str:
    """What Liger calls the kernel of the activation."""
    return "geglu" if config.model_type.startswith("gemma") else "swiglu"


def has_experts(config: Any) -> bool:
    """Whether blocks are mixtures, whose kernels make gradients of frozen weights."""
    return any(getattr(config, name, None) for name in ("num_experts", "num_local_experts"))
