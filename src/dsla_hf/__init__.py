"""Dual-State Linear Attention for transformers: convert a pretrained decoder, head by head or layer by layer, into a fast hybrid.

Importing the package registers hybrids with transformers' Auto classes and DSLA with PEFT.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from . import moved  # noqa: F401 (before all others: modules are found by their old names from here on)
from .compat import needed_for
from .core.attention import DualState, DualStateAttention
from .core.cache import DSLACacheLayer, cache_bytes
from .core.fold import fold
from .levels.generation import LevelProcessor, lower_level
from .levels.policies import CacheMemory, FixedLevel, LatencyTarget, Load, PromptLength, Saving, Stats
from .models import refusals  # noqa: F401
from .models.adapter import DSLALayer, DSLAModel, get_level, set_level
from .models.configuration import DSLAConfig
from .models.hybrid import DSLAForCausalLM, DSLAHybridConfig

if TYPE_CHECKING:
    from .evaluation.levels import evaluate_levels
    from .inference.graph import GraphDecoder
    from .models.text_model import text_model
    from .training.arguments import DSLATrainingArguments
    from .training.ranking import rank_layers
    from .training.recipe import distill
    from .training.trainer import DSLATrainer
    from .training.unit_ranking import rank_units

__version__ = version("dsla-hf")

__all__ = [
    "CacheMemory",
    "DSLACacheLayer",
    "DSLAConfig",
    "DSLAForCausalLM",
    "DSLAHybridConfig",
    "DSLALayer",
    "DSLAModel",
    "DSLATrainer",
    "DSLATrainingArguments",
    "DualState",
    "DualStateAttention",
    "FixedLevel",
    "GraphDecoder",
    "LatencyTarget",
    "LevelProcessor",
    "Load",
    "PromptLength",
    "Saving",
    "Stats",
    "cache_bytes",
    "distill",
    "evaluate_levels",
    "fold",
    "get_level",
    "lower_level",
    "rank_layers",
    "rank_units",
    "set_level",
    "text_model",
]


# Imported on first use: what they alone need can neither slow nor break the import of the package.
_LAZY = {
    "DSLATrainer": "training.trainer",
    "DSLATrainingArguments": "training.arguments",
    "GraphDecoder": "inference.graph",
    "distill": "training.recipe",
    "evaluate_levels": "evaluation.levels",
    "rank_layers": "training.ranking",
    "rank_units": "training.unit_ranking",
    "text_model": "models.text_model",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with needed_for(name):
        value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
