"""Hybrids in vLLM: what its entry point group `vllm.general_plugins` calls, and the models that this registers.

vLLM imports this package in each of its processes. Nothing of vLLM is imported where it is not installed.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

from .releases import TESTED_VERSIONS, installed_version, is_tested


def register() -> None:
    """Make hybrids known to vLLM: `vllm serve my-hybrid` then works as for any model. Does nothing where vLLM is not installed.

    Warns once per process with another release of vLLM than the tested ones.
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
    if found is not None and not is_tested(found):
        warnings.warn(
            f"vLLM {found}: dsla-hf was tested with vLLM {', '.join(TESTED_VERSIONS)}, and another release may compute something else. "
            f"Install dsla-hf[vllm] for {TESTED_VERSIONS[-1]}",
            stacklevel=3,
        )
