"""The attention and mask functions that transformers' models choose among, by name: imported by what calls one of them itself."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

__all__ = ["ALL_ATTENTION_FUNCTIONS", "ALL_MASK_ATTENTION_FUNCTIONS", "attention_function", "masks_as_rehearsed"]


def attention_function(base_class: type, implementation: str) -> Callable[..., Any]:
    """What the forward of a base's attention class calls where its config says `implementation`; "eager" is a function of its module."""
    eager = getattr(sys.modules[base_class.__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)


@contextmanager
def masks_as_rehearsed(none: dict[tuple[int | None, ...], bool]) -> Iterator[None]:
    """Within it "sdpa" gets no mask in a stream that is captured where it got none before. There transformers cannot look at position ids,
    so it makes a mask in case rows are packed, with which no flash attention runs.

    none: whether there was no mask, by the numbers of queries, of keys, and of a local attention; written to where nothing is captured.
    """
    made = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]

    def mask(*args: Any, **kwargs: Any) -> Any:
        sizes = tuple(kwargs.get(name) for name in ("q_length", "kv_length", "local_size"))
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if captured and none.get(sizes):
            return None
        found = made(*args, **kwargs)
        if not captured:
            none[sizes] = none.get(sizes, True) and found is None
        return found

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = mask
    try:
        yield
    finally:
        ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = made
