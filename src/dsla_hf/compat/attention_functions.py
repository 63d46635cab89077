"""The attention and mask functions that transformers' models choose among, by name: imported by what calls one of them itself."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS", "attention_function", "no_plain_masks"]


def attention_function(base_class: type, implementation: str) -> Callable[..., Any]:
    """What the forward of a base's attention class calls where its config says `implementation`; "eager" is a function of its module."""
    eager = getattr(sys.modules[base_class.__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


@contextmanager
def no_plain_masks() -> Iterator[None]:
    """Within it "sdpa" gets no mask for whole rows under plain causal attention, as without a recording: where a stream is captured
    transformers (before 5.20 or so) makes one for them, with which no flash attention runs."""
    made = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def mask(*args: Any, **kwargs: Any) -> Any:
        queries, keys, local = kwargs.get("q_length"), kwargs.get("kv_length"), kwargs.get("local_size")
        if queries is None and "cache_position" in kwargs:  # transformers 5.17
            queries = len(kwargs["cache_position"])
        plain = kwargs.get("attention_mask") is None and kwargs.get("allow_is_causal_skip", True) and queries == keys
        return None if plain and queries is not None and (local is None or keys < local) else made(*args, **kwargs)

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = mask
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = made
