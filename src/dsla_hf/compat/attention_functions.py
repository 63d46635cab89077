"""The attention and mask functions that transformers' models choose among, by name: imported by what calls one of them itself."""

import sys
from collections.abc import Callable
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS", "attention_function"]


def attention_function(base_class: type, implementation: str) -> Callable[..., Any]:
    """What the forward of a base's attention class calls where its config says `implementation`; "eager" is a function of its module."""
    eager = getattr(sys.modules[base_class.__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
