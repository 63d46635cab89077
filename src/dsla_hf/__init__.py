"""Dual-State Linear Attention for transformers: convert a pretrained decoder layer by layer into a fast hybrid.

Importing the package registers hybrids with transformers' Auto classes and DSLA with PEFT.
"""

from importlib.metadata import version

from . import refusals  # noqa: F401
from .adapter import DSLALayer, DSLAModel, get_level, set_level
from .attention import DualState, DualStateAttention
from .cache import DSLACacheLayer, cache_bytes, fold
from .configuration import DSLAConfig
from .generation import LevelProcessor, lower_level
from .graph import GraphDecoder
from .modeling import DSLAForCausalLM, DSLAHybridConfig
from .policies import CacheMemory, FixedLevel, LatencyTarget, Load, PromptLength, Stats

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
