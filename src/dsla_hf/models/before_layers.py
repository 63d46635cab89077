"""What is settled once per call, before the first decoder layer runs: whether the call can be followed, and its `TokenLayout`.

Everything that a converted layer refuses is refused here, so that a refused call has changed nothing: no cache layer is advanced, nothing
is folded. Where no layer of the decoder is DSLA, the base gets what it was given, and only the cache is looked at.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..compat import masks_for_generate
from ..compat.attributes import attention_implementation
from ..core.cache import DSLACacheLayer
from ..core.fold import check_cache, counts_tokens
from ..core.layout import TokenLayout, read_layout
from ..core.masks import check_shape
from ..core.partial_cache import PartialCacheLayer
from ..core.recording import records_steps
from .architectures import sliding_window_of
from .decoder import attentions_of
from .layout_carrier import carry_layouts

logger = logging.get_logger(__name__)

_HOOK_MARK = "_dsla_layout_hook"
# Entries of the dict of masks that `generate` gets from us for a static cache.
PADDING, MASK = "dsla_padding", "dsla_mask"
TEXT_AND_AXES = 4  # rows of `position_ids`: place in the text, time, height, width


def install_layout_hook(decoder: nn.Module) -> None:
    """Make `decoder` (the `LlamaModel` of a `LlamaForCausalLM`) check its calls and hand a `TokenLayout` to its layers. Idempotent, but
    for attention modules that were exchanged since."""
    remove_layout_hook(decoder)
    names = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
    hook = functools.partial(_before_layers, names)
    setattr(decoder, _HOOK_MARK, [decoder.register_forward_pre_hook(hook, with_kwargs=True), *carry_layouts(decoder)])


def remove_layout_hook(decoder: nn.Module) -> None:
    """Undo `install_layout_hook`."""
    for handle in decoder.__dict__.pop(_HOOK_MARK, ()):
        handle.remove()


def masks_with_padding(make_masks: Any, decoder: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What `create_masks_for_generate` of a model with DSLA layers returns: the masks that `make_masks` makes for a static cache, and the
    2-D mask beside them, for the values of 4-D masks cannot be looked at in compiled steps. The hook of the decoder takes both apart.

    The 2-D mask is cut to the new tokens, whose number does not change from step to step, unless a layer is about to fold its cache."""
    create_masks_for_generate = masks_for_generate()
    call = inspect.signature(create_masks_for_generate).bind(*args, **kwargs).arguments
    cache, padding = call.get("past_key_values"), call.get("attention_mask")
    masks = (make_masks or create_masks_for_generate)(*args, **kwargs)
    if padding is not None and not _folds(decoder, cache):
        padding = padding[:, -call["inputs_embeds"].shape[1] :]
    return {**(masks if isinstance(masks, dict) else {MASK: masks}), PADDING: padding}


def converted_part(attention: Any) -> bool | tuple[int, ...]:
    """Whether an attention runs as DSLA now; of one that is converted in part the KV heads that do."""
    return getattr(attention, "converted_part", False)


def _folds(decoder: nn.Module, cache: Any) -> bool:
    for attention, layer in zip(attentions_of(decoder), getattr(cache, "layers", ()), strict=False):
        part = converted_part(attention)
        goes_on = isinstance(layer, DSLACacheLayer) or (isinstance(layer, PartialCacheLayer) and layer.has_heads(part))
        if part and not goes_on and layer.get_seq_length() > 0:
            return True
    return False


def _before_layers(names: tuple[str, ...], decoder: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """The forward pre-hook."""
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    mask: Any = given.get("attention_mask")
    beside = given.pop(PADDING, None)  # the 2-D mask of a model that makes masks of it before the decoder is called
    carried = beside is not None or (isinstance(mask, dict) and PADDING in mask)
    if beside is not None:
        mask = beside
    elif carried:
        others = {kind: x for kind, x in mask.items() if kind != PADDING}
        given["attention_mask"], mask = others.get(MASK, others), mask[PADDING]
    attentions = attentions_of(decoder)
    parts = [converted_part(attention) for attention in attentions]
    converted = [attention for attention, part in zip(attentions, parts, strict=True) if part]
    cache = given.get("past_key_values")
    ids = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if ids is None:
        return None  # the decoder says what is wrong
    recorded = records_steps(ids)
    past: Any = 0
    if cache is not None:
        shown = getattr(decoder.config, "num_hidden_layers", len(attentions))
        past = check_cache(cache, parts[:shown], ids.shape[0], ids.shape[1], recorded)
    if not converted:
        return ((), given) if carried else None
    _check_causal(decoder.config, given)
    window = None
    if isinstance(mask, dict):
        kinds = {_layer_type(decoder.config, attention.layer_idx) for attention in converted}
        mask = {kind: x for kind, x in mask.items() if kind in kinds}
    if isinstance(mask, dict) or getattr(mask, "ndim", 0) == 4:
        windows = {sliding_window_of(attention) for attention in converted} - ({None} if isinstance(mask, dict) else set())
        window = windows.pop() if len(windows) == 1 else None
    if not carried:
        for kind, x in mask.items() if isinstance(mask, dict) else [(None, mask)]:
            if isinstance(x, Tensor) and x.ndim in (2, 4):
                heads = decoder.config.num_attention_heads
                check_shape(
                    x, ids.shape[0], heads, ids.shape[1], _lengths(decoder, cache, kind, past, ids.shape[1]) if x.ndim == 4 else set()
                )
    alone = mask is None and not carried
    positions = _of_text(given.get("position_ids"))
    layout = read_layout(
        mask,
        positions if alone and _may_pack(positions, past) else None,
        past=past,
        rows=ids.shape[0],
        tokens=ids.shape[1],
        sliding_window=window,
    )
    if given.get("cu_seq_lens_q") is not None:
        layout = _with_boundaries(
            given["cu_seq_lens_q"], layout, str(attention_implementation(decoder.config)), ids.shape[0] * ids.shape[1]
        )
    given["dsla_layout"] = layout
    if layout.cu_seqlens is not None:
        _check_packed(decoder, given)
    elif isinstance(mask, Tensor) and not carried and isinstance(past, int) and mask.ndim == 2 and mask.shape[1] < past + ids.shape[1]:
        raise ValueError(
            f"attention_mask covers {mask.shape[1]} tokens, but {past} cached and {ids.shape[1]} new ones are there: it must cover both"
        )
    return (), given


def _lengths(decoder: Any, cache: Any, kind: str | None, past: int, tokens: int) -> set[int]:
    """What the last dimension of a 4-D mask (of layers of this kind, None: of all) must be."""
    layers = [layer for i, layer in enumerate(getattr(cache, "layers", ())) if kind is None or _layer_type(decoder.config, i) == kind]
    layers = [layer for layer in layers if counts_tokens(layer)]
    if cached := {layer.get_mask_sizes(tokens)[0] for layer in layers if not isinstance(layer, DSLACacheLayer)}:
        return cached
    places = {layer.get_mask_sizes(tokens)[0] for layer in layers}  # of a static cache there are more than tokens
    return places if places and min(places) >= past + tokens else {past + tokens}


def _layer_type(config: Any, index: int) -> str | None:
    """By which name a dict of masks has that of the attention of this layer."""
    types = getattr(config, "layer_types", None)
    kind = None if types is None or index >= len(types) else types[index]
    return "full_attention" if kind == "hybrid" else kind


def _check_causal(config: Any, given: dict[str, Any]) -> None:
    """Raises ValueError where the base would let tokens see those behind them."""
    causal = given.get("is_causal")
    causal = getattr(config, "is_causal", True) if causal is None else causal
    # "vision": between the tokens of an image, of which a text model knows nothing.
    if causal is False or getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
        raise ValueError(
            "attention is asked to be bidirectional (is_causal=False or use_bidirectional_attention), and a state cannot look ahead: "
            "run the original model (set_level(0) or disable_adapter(), where an adapter is used)"
        )


def _of_text(position_ids: Any) -> Tensor | None:
    """The places of tokens in their text, where positions have three dimensions (of images): those before them, as their models have it, or
    none."""
    if getattr(position_ids, "ndim", 0) != 3:
        return position_ids
    return position_ids[0] if position_ids.shape[0] == TEXT_AND_AXES else None


def _may_pack(position_ids: Tensor | None, past: Any) -> bool:
    """Whether positions could mark packed texts: of several tokens, with which texts begin."""
    if position_ids is None or position_ids.shape[-1] == 1 or int(past) > 0:
        return False
    if position_ids.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "position_ids of several tokens could mark packed texts, and their values cannot be looked at while a CUDA graph is captured: "
            "pass an attention_mask (of ones, where each row is one text)"
        )
    return True


def _with_boundaries(boundaries: Any, layout: TokenLayout, implementation: str, tokens: int) -> TokenLayout:
    """The layout of a call that gives `cu_seq_lens_q`, which flash attention alone heeds, and where no mask is given.

    Raises:
        ValueError: if they are no boundaries, or others than those that this model's softmax layers know.
    """
    whole = [0, tokens]
    given = boundaries.tolist() if isinstance(boundaries, Tensor) and boundaries.ndim == 1 else None
    if given is None or given[:1] + given[-1:] != whole or any(x > y for x, y in itertools.pairwise(given)):
        raise ValueError(
            f"cu_seq_lens_q must be an integer tensor that rises from 0 to {tokens}, all tokens of the call, got {boundaries!r}"
        )
    if "flash" in implementation and layout.padding_mask is None:
        return TokenLayout(cu_seqlens=boundaries)
    found = whole if layout.cu_seqlens is None or layout.real is not None else layout.cu_seqlens.tolist()
    if found != given:
        raise ValueError(
            f"cu_seq_lens_q {given} marks other texts than position_ids or attention_mask, {found}: softmax layers of this model "
            f"({implementation}) know the latter only. Pass position_ids that restart with each text, and no attention_mask, as "
            "DataCollatorWithFlattening does"
        )
    return layout


def _check_packed(decoder: Any, given: dict[str, Any]) -> None:
    """Packed texts leave no cache behind, and every layer must read them as such.

    Raises:
        ValueError: says what to change.
    """
    cache, use_cache = given.get("past_key_values"), given.get("use_cache")
    use_cache = getattr(decoder.config, "use_cache", False) if use_cache is None else use_cache
    if cache is None and not use_cache:
        return
    if cache is None and decoder.training:
        given["use_cache"] = False
        logger.warning_once("texts are packed into rows, and nothing can go on from them: use_cache=False for this call")
        return
    raise ValueError(
        "packed texts (position_ids that restart, cu_seq_lens_q, or a block-diagonal mask) leave no state behind: pass use_cache=False and "
        "no past_key_values; or, where a row is one text whatever its positions, an attention_mask of ones"
    )
