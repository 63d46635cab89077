"""Whether text is long enough to teach: where the window reads nearly everything, converted heads do what the base's do, and the states get
no gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch

MASKS = ("attention_mask", "loss_mask")
LEAST_BEYOND = 0.1  # share of the tokens learnt from that the window must not reach
JUDGED_ROWS = 512  # of a data set, evenly spread
JUDGED_STREAM = 64  # rows of one that streams, the first


def check_teaches(data: Any, window_size: int, sink_tokens: int, purpose: str = "to train on") -> None:
    """Refuse data of which the window and the sinks read nearly everything: there nothing is lost and nothing learnt, and layers differ by
    noise.

    Args:
        data: rows or batches: `input_ids` `[T]` or `[B, T]`, or dicts with them, and with `attention_mask` and `loss_mask` where they
            have them. Of a long data set 512 rows are judged, evenly spread, and of one without a length the first 64: short chats
            may be among longer texts.
        window_size, sink_tokens: of the `DSLAConfig`. Without a window only sequences of one token are refused.
        purpose: what the data is for, in the message.

    Raises:
        ValueError: if fewer than a tenth of the tokens that count lie beyond window and sinks.
    """
    reach = window_size + sink_tokens if window_size else 1
    counted = beyond = longest = 0
    for row in _judged(data):
        entries: Any = row if isinstance(row, Mapping) else {"input_ids": row}
        ids = torch.as_tensor(entries["input_ids"])
        masks = {name: torch.as_tensor(entries[name]).reshape(ids.shape) for name in MASKS if entries.get(name) is not None}
        real = masks.get("attention_mask", torch.ones_like(ids)) != 0
        learnt = real & (masks["loss_mask"] != 0) if "loss_mask" in masks else real
        place = real.cumsum(-1)  # of each token in its text, from 1
        counted += int(learnt.sum())
        beyond += int((learnt & (place > reach)).sum())
        longest = max(longest, int(real.sum(-1).max()))
    if counted and beyond >= LEAST_BEYOND * counted:
        return
    if not counted:
        raise ValueError(f"the data {purpose} has no token that counts: its loss_mask or attention_mask is zero everywhere")
    if not window_size:
        raise ValueError(f"the data {purpose} has sequences of {longest} token, from which no state learns: give longer ones")
    raise ValueError(
        f"the data {purpose} has {100 * beyond / counted:.0f} % of its tokens beyond the window, which reads {reach} tokens (window_size "
        f"{window_size} + sink_tokens {sink_tokens}); the longest sequence has {longest}. Less than {100 * LEAST_BEYOND:.0f} % teaches "
        f"nothing of what lies further back: give a length of {4 * reach} or more, or a smaller window_size"
    )


def _judged(data: Any) -> Iterator[Any]:
    """The rows that are looked at."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        yield from islice(iter(data), JUDGED_STREAM)
        return
    rows = len(data)
    for place in range(min(rows, JUDGED_ROWS)):
        yield data[place * rows // min(rows, JUDGED_ROWS)]
