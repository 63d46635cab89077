"""Dual-State Linear Attention for transformers: convert a pretrained decoder layer by layer into a fast hybrid.

Importing the package registers hybrids with transformers' Auto classes and DSLA with PEFT.
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from . import refusals  # noqa: F401
from .adapter import DSLALayer, DSLAModel, get_level, set_level
from .attention import DualState, DualStateAttention
from .cache import DSLACacheLayer, cache_bytes, fold
from .compat import needed_for
from .configuration import DSLAConfig
from .generation import LevelProcessor, lower_level
from .modeling import DSLAForCausalLM, DSLAHybridConfig
from .policies import CacheMemory, FixedLevel, LatencyTarget, Load, PromptLength, Stats

if TYPE_CHECKING:
    from .graph import GraphDecoder

__version__ = version("dsla-hf")

__all__ = [
    "CacheMemory",
    "DSLACacheLayer",
    "DSLAConfig",
    "DSLAForCausalLM",
    "DSLAHybridConfig",
    "DSLALayer",
    "DSLAModel",
    "DualState",
    "DualStateAttention",
    "FixedLevel",
    "GraphDecoder",
    "LatencyTarget",
    "LevelProcessor",
    "Load",
    "PromptLength",
    "Stats",
    "cache_bytes",
    "fold",
    "get_level",
    "lower_level",
    "set_level",
]


def __getattr__(name: str) -> Any:
    """`GraphDecoder` is imported on first use: what it alone needs cannot break the import of the package."""
    if name != "GraphDecoder":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed_for(name):
        from .graph import GraphDecoder
    globals()[name] = GraphDecoder
    return GraphDecoder


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
