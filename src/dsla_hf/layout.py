"""Which tokens of a model call are real, and where packed sequences begin: read once per call, used by every layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
    """padding_mask: bool `[B, past + T]`, True at real tokens, None without padding.
    cu_seqlens: int `[N + 1]`, boundaries of sequences packed into one row, or None.
    padding_at_end: whether padding lies behind all real tokens.
    shared: what the first layer of a call makes of these for all that follow."""

    padding_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    padding_at_end: bool = False
    shared: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def past_mask(self, past: int, cached: int) -> Tensor | None:
        """The mask of the last `cached` of the `past` tokens before this call."""
        if self.padding_mask is None:
            return None
        if self.padding_mask.shape[1] <= past:  # of a static sliding window, which begins with the cached tokens
            return self.padding_mask[:, :cached]
        return self.padding_mask[:, past - cached : past]

    def new_mask(self, past: int | Tensor, tokens: int) -> Tensor | None:
        """The mask of the `tokens` tokens of this call, which `past` tokens precede.

        Raises:
            ValueError: if the mask does not reach that far.
        """
        if self.padding_mask is None:
            return None
        if isinstance(past, Tensor):  # a static cache, whose masks are as long as it is
            # Those of sliding windows are shorter, and end with the new tokens.
            start = past.clamp_max(self.padding_mask.shape[1] - tokens)
            return self.padding_mask.index_select(1, start + torch.arange(tokens, device=self.padding_mask.device))
        if self.padding_mask.shape[1] < past + tokens:
            raise ValueError(
                f"attention_mask covers {self.padding_mask.shape[1]} tokens, but {past} cached and {tokens} new ones are there: "
                "it must cover both"
            )
        return self.padding_mask[:, past : past + tokens]


def read_layout(
    attention_mask: Any = None,
    position_ids: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    has_past: bool = False,
) -> TokenLayout:
    """The layout from what a decoder of transformers is called with.

    Args:
        attention_mask: None, 2-D `[B, past + T]`, or the 4-D mask (bool or additive) that `generate` prepares for
            compiled caches, alone or in a dict by layer type.
        position_ids: `[B, T]`; without mask and cache, a restart in them marks packed sequences, as in transformers.
        cu_seqlens: boundaries of packed sequences, where the caller gives them (`cu_seq_lens_q`).
        has_past: whether cached tokens come before these.

    Raises:
        ValueError: for a mask of another kind, or packed sequences in more than one row.
    """
    if cu_seqlens is not None:
        return TokenLayout(cu_seqlens=cu_seqlens)
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if attention_mask is None:
        if position_ids is None or has_past or position_ids.shape[-1] == 1 or torch.compiler.is_compiling():
            return TokenLayout()
        return TokenLayout(cu_seqlens=_packed_boundaries(position_ids))
    if not isinstance(attention_mask, Tensor) or attention_mask.ndim not in (2, 4):
        raise ValueError(
            f"DSLA layers take a 2-D attention_mask [batch, tokens] or a 4-D one, got {type(attention_mask).__name__}"
            f"{list(attention_mask.shape) if isinstance(attention_mask, Tensor) else ''}"
        )
    if attention_mask.ndim == 4:
        # A real token is seen by itself, if by none other.
        seen = attention_mask[:, 0] if attention_mask.dtype == torch.bool else attention_mask[:, 0] == 0
        return TokenLayout(padding_mask=seen.any(1))
    mask = attention_mask.bool()
    captured = mask.is_cuda and torch.cuda.is_current_stream_capturing()  # in a CUDA graph the host cannot look at values
    if not captured and not torch.compiler.is_compiling() and bool(mask.all()):
        return TokenLayout()
    return TokenLayout(padding_mask=mask, padding_at_end=_at_end.get())


def _packed_boundaries(position_ids: Tensor) -> Tensor | None:
    restarts = position_ids.diff(dim=-1) != 1
    if not bool(restarts.any()):
        return None
    if position_ids.shape[0] != 1:
        raise ValueError(
            "position_ids restart inside a row, which marks packed sequences; DSLA layers take them in one row: "
            "pack with batch size 1 (DataCollatorWithFlattening), or pass an attention_mask"
        )
    starts = restarts[0].nonzero().flatten() + 1
    ends = torch.tensor([0, position_ids.shape[1]], device=starts.device)
    return torch.cat([ends[:1], starts, ends[1:]])


_HOOK_MARK = "_dsla_layout_hook"


def install_layout_hook(decoder: nn.Module) -> None:
    """Make `decoder` (the `LlamaModel` of a `LlamaForCausalLM`) hand a `TokenLayout` to its layers. Idempotent."""
    if getattr(decoder, _HOOK_MARK, None) is None:
        setattr(decoder, _HOOK_MARK, decoder.register_forward_pre_hook(_hand_over_layout, with_kwargs=True))


def remove_layout_hook(decoder: nn.Module) -> None:
    """Undo `install_layout_hook`."""
    if (handle := getattr(decoder, _HOOK_MARK, None)) is not None:
        handle.remove()
        delattr(decoder, _HOOK_MARK)


def _hand_over_layout(decoder: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    attention_mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    past, positions = kwargs.get("past_key_values"), kwargs.get("position_ids")
    # Asked only where it matters: the length of a static cache lies on the device.
    asks = attention_mask is None and positions is not None and positions.shape[-1] > 1 and not torch.compiler.is_compiling()
    layout = read_layout(
        attention_mask,
        positions,
        kwargs.get("cu_seq_lens_q"),
        has_past=asks and past is not None and bool(past.get_seq_length() > 0),
    )
    return args, {**kwargs, "dsla_layout": layout}
