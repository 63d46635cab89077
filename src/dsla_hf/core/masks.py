"""What a 4-D attention mask says of the text, or that a state cannot follow it.

transformers takes any pattern of who sees whom, and softmax attention obeys it. A recurrent state follows three: causal, sliding over the
model's own window, and several texts in one row (block-diagonal), each with padding. Whatever else there is (prefix-LM, trees of drafts,
additive biases, other windows) is told apart here and refused by name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Additive masks hide a token by the lowest number of their dtype, by -inf, or, in older code, by -10,000.
HIDDEN = -1e4
WAY_OUT = (
    "DSLA layers take causal masks with padding, the model's own sliding window, and several texts in one row (block-diagonal). "
    "Pass a 2-D attention_mask [batch, tokens], or run the original model (set_level(0) or disable_adapter(), where an adapter is used)"
)


class ReadMask(NamedTuple):
    """real: bool `[B, past + T]`, False at padding, None without any. starts: bool `[B, T]`, True at tokens with which another text of the
    row begins (its first one not counted), None where each row is one text."""

    real: Tensor | None
    starts: Tensor | None


def read_mask(mask: Tensor, past: int, tokens: int, sliding_window: int | None = None) -> ReadMask:
    """The padding and the texts that a 4-D mask stands for. Looks at its values.

    Args:
        mask: bool (True: sees) or additive (0: sees) `[B, 1 or heads, T, S]`, over the last S of `past + T` tokens or, from a static cache,
            over more places than there are tokens. That its shape fits the call is `check_shape`'s to say.
        past, tokens: tokens before the new ones, and T.
        sliding_window: of the layers that the mask is for, if they have one.

    Raises:
        ValueError: says what the mask does that a state cannot follow.
    """
    sees = _sees(mask)
    end = past + tokens
    offset = max(end - sees.shape[2], 0)
    if bool(sees[:, :, end - offset :].any()):
        raise _refusal(mask, "it shows tokens places behind the text")
    sees = sees[:, :, : end - offset]
    query, key = torch.arange(past, end, device=sees.device)[:, None], torch.arange(offset, end, device=sees.device)
    new = sees.diagonal(past - offset, 1, 2)  # a real token is seen by itself, if by none other
    old = (sees & new[:, :, None]).any(1)[:, : past - offset]
    if sliding_window is not None:
        old = old | (key[: past - offset] <= past - sliding_window)  # what has left the window tells nothing
    real = torch.cat([old, new], 1)
    causal = (key <= query) & real[:, None]

    def is_seen(expected: Tensor) -> bool:
        """Whether real tokens see what is expected; rows of padding may hold anything."""
        window = None if sliding_window is None else expected & (key > query - sliding_window)
        return any(bool(((sees == x) | ~new[:, :, None]).all()) for x in (expected, window) if x is not None)

    starts = None
    if not is_seen(causal):
        starts = _starts(sees, real) if past == 0 else None
        text = None if starts is None else starts.cumsum(1)
        if text is None or not is_seen(causal & (text[:, :, None] == text[:, None])):
            raise _refusal(mask, _what_it_does(sees & new[:, :, None], key <= query, past))
    real = F.pad(real, (offset, 0), value=True)  # sliding windows: nobody asks for what is before
    return ReadMask(None if bool(real.all()) else real, starts)


def check_shape(mask: Tensor, rows: int, heads: int, tokens: int, lengths: set[int]) -> None:
    """Raises ValueError unless a 2-D or 4-D mask fits a call of `rows` and `tokens`; `lengths` are those that its last dimension may have
    (4-D)."""
    if mask.ndim == 2:
        fits, wanted = mask.shape[0] == rows, f"[{rows}, cached and new tokens]"
    else:
        fits = mask.shape[0] in (1, rows) and mask.shape[1] in (1, heads) and mask.shape[2] == tokens and {mask.shape[3]} == lengths
        wanted = f"[{rows} or 1, {heads} or 1, {tokens}, {' and '.join(map(str, sorted(lengths)))}]"
    if not fits:
        raise ValueError(f"attention_mask: {_name(mask)} does not fit this call, it must be {wanted}. {WAY_OUT}")


def _sees(mask: Tensor) -> Tensor:
    """Who sees whom, bool `[B, T, S]`."""
    if mask.dtype == torch.bool:
        sees = mask
    elif mask.is_floating_point():
        sees = mask == 0
        if not bool((sees | (mask <= HIDDEN)).all()):
            raise _refusal(mask, "it adds a bias to scores, where a state has none")
    else:
        raise _refusal(mask, f"it is {mask.dtype}, neither bool nor floating-point")
    if mask.shape[1] > 1 and not bool((sees == sees[:, :1]).all()):
        raise _refusal(mask, "it differs from head to head")
    return sees[:, 0]


def _starts(sees: Tensor, real: Tensor) -> Tensor:
    """Real tokens that do not see the real token before them."""
    place = torch.arange(real.shape[1], device=real.device).expand_as(real)
    before = F.pad(torch.where(real, place, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    seen = sees.gather(2, before.clamp_min(0)[:, :, None])[:, :, 0]
    return real & (before >= 0) & ~seen


def _what_it_does(sees: Tensor, causal: Tensor, past: int) -> str:
    if bool((sees & ~causal).any()):
        return "tokens see others behind them (prefix-LM or bidirectional attention)"
    if past:
        return "new tokens leave out cached ones that others see (a tree of drafts, a hole in the text, or packed texts behind a cache)"
    return "tokens leave out earlier ones that others see (a tree, a hole in the text, or a window that is not the model's)"


def _refusal(mask: Tensor, why: str) -> ValueError:
    return ValueError(f"attention_mask: {_name(mask)} cannot be followed, {why}. {WAY_OUT}")


def _name(mask: Tensor) -> str:
    return f"a mask {list(mask.shape)}"
