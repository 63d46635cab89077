"""Which tokens of a model call are real, and where texts that share a row begin: read once per call, used by every layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .masks import WAY_OUT, ReadMask, read_mask
from .recording import records_steps

_at_end: ContextVar[bool] = ContextVar("whether padding lies behind all real tokens", default=False)


@contextmanager
def padding_at_end() -> Iterator[None]:
    """In calls of the model inside, padding lies behind all real tokens of each row, which nobody could see from the mask without
    looking at its values."""
    token = _at_end.set(True)
    try:
        yield
    finally:
        _at_end.reset(token)


@dataclass(frozen=True)
class TokenLayout:
    """padding_mask: bool `[B, past + T]` or, of the new tokens alone, `[B, T]`; True at real tokens, None without padding.
    cu_seqlens: int `[N + 1]`, boundaries of texts packed into rows: among all `B * T` tokens, one row after the other, or among those that
        `real` names. None where each row is one text.
    real: int64 `[R]`, which of the `B * T` tokens of packed rows are no padding; None if all are.
    padding_at_end: whether padding lies behind all real tokens.
    shared: what the first layer of a call makes of these for all that follow."""

    padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    real: Tensor | None = None
    padding_at_end: bool = False
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def past_mask(self, past: int, cached: int) -> Tensor | None:
        """The mask of the last `cached` of the `past` tokens before this call."""
        return None if self.padding_mask is None else self.padding_mask[:, past - cached : past]

    def new_mask(self, past: int | Tensor, tokens: int) -> Tensor | None:
        """The mask of the `tokens` tokens of this call, which `past` tokens precede.

        Raises:
            ValueError: if the mask does not reach that far.
        """
        if self.padding_mask is None:
            return None
        if isinstance(past, Tensor):  # of a static cache: the host does not know it
            start = past.clamp_max(self.padding_mask.shape[1] - tokens)  # 0 where the mask is of the new tokens alone
            return self.padding_mask.index_select(1, start + torch.arange(tokens, device=self.padding_mask.device))
        if self.padding_mask.shape[1] < past + tokens:
            raise ValueError(
                f"attention_mask covers {self.padding_mask.shape[1]} tokens, but {past} cached and {tokens} new ones are there: "
                "it must cover both"
            )
        return self.padding_mask[:, past : past + tokens]

    def joined(self, x: Tensor) -> Tensor:
        """Packed rows `[B, T, ...]` as one row of their real tokens `[1, R, ...]`."""
        x = x.flatten(0, 1)
        return (x if self.real is None else x[self.real])[None]

    def apart(self, x: Tensor, shape: tuple[int, int]) -> Tensor:
        """Undo `joined` for rows of shape `(B, T)`; zero at padding."""
        x = x[0]
        if self.real is not None:
            x = x.new_zeros(shape[0] * shape[1], *x.shape[1:]).index_copy(0, self.real, x)
        return x.unflatten(0, shape)


def read_layout(
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    *,
    past: int | Tensor = 0,
    rows: int | None = None,
    tokens: int | None = None,
    sliding_window: int | None = None,
) -> TokenLayout:
    """The layout from what a decoder of transformers is called with.

    Args:
        attention_mask: None, 2-D `[B, past + T]`, 4-D `[B, 1 or heads, T, S]` (bool or additive), or a dict of masks: those of the
            converted layers by their type.
        position_ids: `[B or 1, T]`, where they are to be looked at: steps other than one then mark packed texts, as in transformers.
        past: tokens before the new ones. tokens: T, where the mask is 4-D.
        rows: B, where a mask or positions may be given once for all rows.
        sliding_window: of the converted layers, if all slide; in a dict, of those whose type says so.

    Raises:
        ValueError: for a mask that a state cannot follow.
    """
    masks = attention_mask if isinstance(attention_mask, dict) else {"": attention_mask}
    if all(mask is None for mask in masks.values()):
        starts = None if position_ids is None else packed_starts(position_ids)
        return TokenLayout() if starts is None else _packed(starts, None, rows)
    given = [mask for mask in masks.values() if mask is not None]
    for mask in given:
        if not isinstance(mask, Tensor) or mask.ndim not in (2, 4):
            shape = list(mask.shape) if isinstance(mask, Tensor) else ""
            raise ValueError(f"attention_mask: a {type(mask).__name__}{shape} is no mask that DSLA layers can read. {WAY_OUT}")
    if len(given) == 1 and given[0].ndim == 2:
        mask = given[0].bool()
        if not records_steps(mask) and bool(mask.all()):
            return TokenLayout()
        at_end = not torch.compiler.is_dynamo_compiling() and _at_end.get()
        return TokenLayout(padding_mask=mask, padding_at_end=at_end)
    if any(mask.ndim == 2 for mask in given):
        raise ValueError(f"attention_mask: {len(given)} masks for layer types, of which some are 2-D: give one for all, outside a dict")
    if any(records_steps(mask) for mask in given):
        raise ValueError(
            "attention_mask: the values of a 4-D mask cannot be looked at in compiled or captured code. Pass a 2-D attention_mask "
            "[batch, tokens] (generate() with a static cache hands its own over), or call the model as it is"
        )
    tokens = given[0].shape[2] if tokens is None else tokens
    found = [
        ReadMask(None, None)
        if mask is None
        else read_mask(mask, int(past), tokens, None if kind and not kind.startswith("sliding") else sliding_window)
        for kind, mask in masks.items()
    ]
    return _agreed(found, int(past) + tokens, tokens, rows)


def _agreed(found: Iterable[ReadMask], length: int, tokens: int, rows: int | None) -> TokenLayout:
    """The layout that all masks of a call agree on, as far as each goes."""
    first, *others = found
    for other in others:
        # Past tokens count only where a mask shows them: those of sliding windows do not reach as far.
        pairs = [(x if x is None else x[:, -tokens:], y if y is None else y[:, -tokens:]) for x, y in zip(first, other, strict=True)]
        if any((x is None or bool(x.all())) != (y is None or bool(y.all())) or not _same(x, y) for x, y in pairs):
            raise ValueError(f"attention_mask: the masks of the layer types differ in padding or texts. {WAY_OUT}")
        if first.real is None or (other.real is not None and int(other.real.sum()) < int(first.real.sum())):
            first = other._replace(starts=first.starts)
    if first.starts is not None:
        return _packed(first.starts, None if first.real is None else first.real[:, length - tokens :], rows)
    return TokenLayout(padding_mask=None if first.real is None else first.real.expand(rows or len(first.real), -1))


def _same(x: Tensor | None, y: Tensor | None) -> bool:
    return x is None or y is None or torch.equal(x, y)


@torch.compiler.disable(reason="whether position_ids mark packed texts is seen from their values: pass an attention_mask where they do not")
def packed_starts(position_ids: Tensor) -> Tensor | None:
    """Tokens `[B, T]` with which another text of a row begins, None if every row is one text. Looks at values."""
    steps = position_ids.diff(dim=-1) != 1
    if not bool(steps.any()):
        return None
    return torch.nn.functional.pad(steps, (1, 0))


def _packed(starts: Tensor, padding_mask: Tensor | None, rows: int | None) -> TokenLayout:
    """The layout of rows of several texts; starts, padding_mask `[B or 1, T]`, rows: B."""
    rows = rows or starts.shape[0]
    first = starts.expand(rows, -1).clone()
    real = None
    if padding_mask is None:
        first[:, 0] = True
        first = first.flatten()
    else:
        padding_mask = padding_mask.expand(rows, -1)
        first |= padding_mask & (padding_mask.cumsum(1) == 1)
        real = padding_mask.flatten().nonzero().flatten()
        first = first.flatten()[real]
    return TokenLayout(cu_seqlens=torch.cat([first.nonzero().flatten(), torch.tensor([first.numel()], device=first.device)]), real=real)
