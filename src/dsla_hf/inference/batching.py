"""Batches that fit: half as large whenever memory does not suffice."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory does not suffice, on the CPU or an accelerator."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def halve_until_it_fits(run: Callable[[int], Result], batch_size: int, what: str) -> Result:
    """`run(batch_size)`; after an out-of-memory error again with half the batch, which a warning says. `what` names the work.

    Raises:
        ValueError: if a batch of one does not fit either.
    """
    while True:
        try:
            return run(batch_size)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            if batch_size == 1:
                raise ValueError(f"{what}: out of memory with one sequence at a time; give shorter texts, or a smaller dtype") from error
        # Here, outside the handler, nothing holds the activations of the failed batch any more.
        clear_device_cache(garbage_collection=True)
        logger.warning("%s: out of memory with batches of %d, going on with %d", what, batch_size, batch_size // 2)
        batch_size //= 2
