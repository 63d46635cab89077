"""What is particular about the attention of a type that nobody has described, read from a small model of it: names and sizes of its
projections, and which channels of a head its rotary embedding turns together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..architectures import Architecture, convertible_layers, head_dim_of, kv_heads_of
from ..decoder import decoder_layers, decoder_of
from .checks import ORDER, without_linear_layers

OUTPUTS = ("o_proj", "out_proj", "dense", "wo")  # what output projections are called
PROBED = 64  # positions of the same token
TOLERANCE = 1e-4  # of a pair's length, in fp32


def read_structure(model: Any) -> Architecture:
    """The entry that a small model's type would have in the table.

    Raises:
        ValueError: if its attention is not built as those in the table are; says in which way.
    """
    if not isinstance(getattr(decoder_of(model), "layers", None), nn.ModuleList):
        raise ValueError(f"{type(decoder_of(model)).__name__} has no list of decoder layers of this name")
    layers = [decoder_layers(model)[i] for i in convertible_layers(model.config)]
    if len(layers) < len(ORDER):
        raise ValueError(f"it has {len(layers)} layers with softmax attention by its config, and checks take {len(ORDER)}")
    attention, name = _attention(layers[0])
    found: list[Any] = [getattr(layer, name, None) for layer in layers]
    if not all(isinstance(x, nn.Module) for x in found):
        raise ValueError(f"not every layer with softmax attention calls it {name!r}")
    output = next((x for x in OUTPUTS if isinstance(getattr(attention, x, None), nn.Linear)), None)
    if output is None:
        raise ValueError(f"{type(attention).__name__} has no output projection of a known name ({', '.join(OUTPUTS)})")
    for x in found:
        _check_sizes(x, output, model.config)
    layout, partial = _rotation(model)
    names = {} if output == "o_proj" else {"o_proj": output}
    # Layouts go in the mask: what else a decoder layer hands its keyword arguments to is not known.
    return Architecture(attention=name, names=names, rotary_layout=layout, partial_rotary=partial, keywords=False)


def _attention(layer: nn.Module) -> tuple[Any, str]:
    for name, child in layer.named_children():
        if all(isinstance(getattr(child, x, None), nn.Linear) for x in ("q_proj", "k_proj", "v_proj")):
            if missing := [x for x in ("config", "layer_idx", "head_dim", "scaling") if not hasattr(child, x)]:
                raise ValueError(f"{type(child).__name__} does not say its {', '.join(missing)}")
            return child, name
    children = ", ".join(f"{name} ({type(child).__name__})" for name, child in layer.named_children())
    raise ValueError(f"{type(layer).__name__} has no attention with q_proj, k_proj and v_proj of their own; it has {children}")


def _check_sizes(attention: Any, output: str, config: Any) -> None:
    """Raises ValueError for heads of other numbers or sizes than the config names, which all layers would share."""
    heads, kv_heads, head_dim = config.num_attention_heads, kv_heads_of(config), head_dim_of(config)
    queries, each = attention.q_proj.out_features, heads * head_dim
    sizes = (attention.head_dim, attention.k_proj.out_features, attention.v_proj.out_features, getattr(attention, output).in_features)
    expected = (head_dim, kv_heads * head_dim, kv_heads * head_dim, each)
    if sizes != expected or queries not in (each, 2 * each):
        raise ValueError(
            f"layer {attention.layer_idx}: head size, rows of k_proj and v_proj, and columns of {output} are {sizes}, and {expected} by "
            f"the config; q_proj has {queries} rows, and {each} or (with a gate) {2 * each} are known"
        )


@torch.no_grad()
def _rotation(model: Any) -> tuple[str, bool]:
    """Which channels rotate together, and whether `partial_rotary_factor` says how many do.

    The same token at every position has the same hidden states in every layer (of linear ones apart, which are left out), so that its
    cached keys differ by their rotation alone: the lengths of rotated pairs stay.
    """
    cache = DynamicCache(config=model.config)
    with without_linear_layers(model):
        model(torch.full((1, PROBED), 5), past_key_values=cache)
    keys: list[Any] = [cache.layers[i].keys[0] for i in convertible_layers(model.config)]  # [heads, positions, channels] of each layer
    turned = {int(i) for x in keys for i in ((x - x[:, :1]).abs().amax((0, 1)) > TOLERANCE * x.abs().amax()).nonzero()}
    if not turned:
        return "halves", False  # without a rotary embedding any two may share a decay
    channels, some = keys[0].shape[-1], max(turned) + 1
    for layers in (keys, keys[:1]):  # behind sink logits hidden states do depend on how many tokens there are
        for rotated in (some + some % 2, channels):
            for layout in ("halves", "interleaved"):
                if all(_lengths_stay(x[..., :rotated], layout) for x in layers):
                    return layout, rotated < channels and _says_so(model.config, rotated)
    raise ValueError("its cached keys turn with their position in a way that no known rotary embedding does")


def _lengths_stay(keys: Tensor, layout: str) -> bool:
    half = keys.shape[-1] // 2
    x, y = (keys[..., :half], keys[..., half:]) if layout == "halves" else (keys[..., ::2], keys[..., 1::2])
    lengths = torch.hypot(x, y)
    return bool((lengths - lengths[:, :1]).abs().amax() <= TOLERANCE * keys.abs().amax())


def _says_so(config: Any, rotated: int) -> bool:
    factor = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor")
    named = None if factor is None else int(head_dim_of(config) * factor)
    if named is None or named + named % 2 != rotated:
        raise ValueError(f"its rotary embedding turns {rotated} of {head_dim_of(config)} channels, and partial_rotary_factor is {factor}")
    return True
