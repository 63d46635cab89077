"""Models whose images are read in blocks, in which tokens see those behind them (Gemma 3): refused where a layer is DSLA.

Seen before the masks are made, from what the whole model is called with: flash attention gets no mask that shows it, and steps over a
static cache get masks whose values nobody looks at.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from .before_layers import PADDING, attentions_of, converted_part
from .decoder import decoder_of
from .multimodal import reads_image_blocks

_HOOK_MARK = "_dsla_image_guard"


def install_image_guard(model: nn.Module, model_type: str | None) -> None:
    """Make a multimodal `model` of a type that reads images in blocks check its calls. Idempotent, and nothing for other types."""
    if not reads_image_blocks(model_type):
        return
    whole = _holder(model)
    if getattr(whole, _HOOK_MARK, None) is None:
        names = tuple(inspect.signature(type(whole).forward).parameters)[1:]
        setattr(whole, _HOOK_MARK, whole.register_forward_pre_hook(functools.partial(_before_images, names), with_kwargs=True))


def remove_image_guard(model: nn.Module) -> None:
    """Undo `install_image_guard`."""
    for module in model.modules():
        if (handle := getattr(module, _HOOK_MARK, None)) is not None:
            handle.remove()
            delattr(module, _HOOK_MARK)


def _holder(model: nn.Module) -> nn.Module:
    """The module that puts images and text together, whose child the decoder is."""
    decoder = decoder_of(model)
    return next(module for module in model.modules() if any(child is decoder for child in module.children()))


def _before_images(names: tuple[str, ...], whole: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The forward pre-hook. It also hands the 2-D mask on beside the masks that are made of it."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if not any(converted_part(attention) for attention in attentions_of(decoder_of(whole))):
        return None
    if _has_images(given):
        raise ValueError(
            f"{type(whole).__name__} reads the tokens of an image in both directions, and a state cannot look ahead: prompts with images "
            "are read at level 0, set_level(0) or disable_adapter(). The level may rise behind the prompt, generate(..., level_policy="
            "lambda stats: 0 if stats.tokens == stats.prompt_tokens else 4). A hybrid has one level and takes text alone"
        )
    if count := _placeholders(given.get("input_ids"), getattr(whole.config, "image_token_id", None)):
        raise ValueError(
            f"{count} tokens of the prompt stand for parts of an image (image_token_id {whole.config.image_token_id}), and "
            f"{type(whole).__name__} was given no pixel_values to put there: it would read them as text. Give what the processor made, at "
            "level 0, where prompts with images are read; or a prompt without these tokens"
        )
    if isinstance(mask := given.get("attention_mask"), Tensor) and mask.ndim == 2:
        return (), {**given, PADDING: mask}
    return None


def _has_images(given: dict[str, Any]) -> bool:
    """Whether tokens of images are among those of a call."""
    if given.get("pixel_values") is not None or (given.get("mm_encoder_outputs") or {}).get("image") is not None:
        return True
    types = given.get("token_type_ids")
    if types is None:
        return False
    ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    tokens = types.shape[1] if ids is None else ids.shape[1]  # a part of a prompt comes with the types of all of it
    return bool(types[:, -tokens:].any())


def _placeholders(ids: Tensor | None, image_token: int | None) -> int:
    """How many tokens of a prompt stand for parts of images. Steps of one token are not asked: a GPU would be waited for at each."""
    return 0 if ids is None or image_token is None or ids.shape[1] == 1 else int((ids == image_token).sum())
