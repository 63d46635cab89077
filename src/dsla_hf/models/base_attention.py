"""The drop-in attention: DSLA under the forward of any base's own attention class.

A converted layer is a subclass of the base model's own attention class. The base's forward runs as it is (projections,
q/k norms, rotary embedding, output projection); only the attention function it calls is ours.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from ..compat.attributes import set_attention_implementation
from ..core.attention import DualStateAttention
from ..core.cache import DSLACacheLayer
from ..core.fold import dsla_cache_layer
from ..core.layout import TokenLayout, read_layout
from ..core.tensor_parallel import DSLA, HEADS
from .architectures import kv_heads_of
from .configuration import DSLAConfig

ATTENTION_FUNCTION = "dsla"

NO_CONTINUOUS_BATCHING = (
    "transformers' continuous batching (generate_batch, serve --continuous-batching) keeps keys and values only, and would give wrong "
    "text with DSLA layers: use generate()"
)

NO_ATTENTION_IMPLEMENTATION = (
    'attn_implementation="dsla" is no way to convert a model, whose layers would lack DSLA\'s weights: use '
    "get_peft_model(model, DSLAConfig(...)), or load an adapter or a hybrid; leave attn_implementation out, or choose that of the softmax "
    'layers, such as "sdpa"'
)


def dsla_attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dsla_layer: DSLACacheLayer | None = None,
    dsla_layout: TokenLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of converted layers, in transformers' interface: q, k, v `[B, H, T, D]`, output `[B, T, H, D]`."""
    layout = dsla_layout or TokenLayout()
    dsla: Any = getattr(module, "dsla", None)
    if dsla is None:  # someone wrote the name into the config of a model
        raise ValueError(NO_ATTENTION_IMPLEMENTATION)
    shape = query.shape[0], query.shape[2]
    if key.shape[1] != dsla.num_kv_heads:
        raise ValueError(
            f"this process has the keys of {key.shape[1]} heads and the DSLA weights of {dsla.num_kv_heads}: a tp_plan of your own that "
            f"cuts the projections must cut these, too: {{'model.{DSLA}': '{HEADS}'}}; tp_plan=\"auto\" does"
        )
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if layout.cu_seqlens is not None:  # one row of all texts, without padding
        q, k, v = (layout.joined(x) for x in (q, k, v))
    padding_mask = layout.new_mask(0 if dsla_layer is None else dsla_layer.tokens, q.shape[1])
    o, state = dsla(
        q,
        k,
        v,
        padding_mask=padding_mask,
        padding_at_end=layout.padding_at_end,
        shared=layout.shared,
        cu_seqlens=layout.cu_seqlens,
        state=None if dsla_layer is None else dsla_layer.current_state(dsla),
        output_state=dsla_layer is not None,
        softcap=kwargs.get("softcap"),  # Gemma 2
        sink_logits=kwargs.get("s_aux"),  # gpt-oss
        in_place=dsla_layer is not None and not dsla_layer.record_past,
        seen=None if dsla_layer is None else dsla_layer.seen,
        whole_windows=dsla_layer is not None and dsla_layer.whole_windows,
        counts=dsla_layer is None or dsla_layer.counts,
    )
    if dsla_layer is not None:
        dsla_layer.advance(state, k, v, padding_mask)
        dsla_layer.shorten_record(dsla)
    return o if layout.cu_seqlens is None else layout.apart(o, shape), None


AttentionInterface.register(ATTENTION_FUNCTION, dsla_attention_function)


class _PassThrough:
    """What a converted layer's base sees as its cache: earlier tokens are in the states, new ones go by."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class DSLAAttentionMixin:
    """Put in front of a base attention class by `dsla_attention_class`; `dsla` holds what is DSLA's own."""

    config: PreTrainedConfig
    dsla: DualStateAttention
    layer_idx: int
    converted = True
    exact_fold = True  # False where keys and values in a softmax layer's cache are not those of this layer

    def convert(self, dsla: DualStateAttention) -> None:
        """Make this base attention module run `dsla`."""
        self.config = attention_config(self.config)
        self.dsla = dsla

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        attention_mask: Any = None,
        past_key_values: Any = None,
        dsla_layout: TokenLayout | None = None,
        **kwargs: Any,
    ) -> Any:
        if "cache" in kwargs:  # the paged cache of continuous batching, which knows keys and values only
            raise NotImplementedError(NO_CONTINUOUS_BATCHING)
        layout = read_layout(attention_mask, tokens=hidden_states.shape[1]) if dsla_layout is None else dsla_layout
        layer = None
        if past_key_values is not None:
            layer = dsla_cache_layer(past_key_values, self.layer_idx, self.dsla, layout, self.exact_fold)
            past_key_values = _PassThrough()
        return super().forward(  # type: ignore[misc]
            hidden_states,
            *args,
            attention_mask=None,
            past_key_values=past_key_values,
            dsla_layer=layer,
            dsla_layout=layout,
            **kwargs,
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time: pickle by its base, which is importable.
        return _new_attention, (type(self).__mro__[2],), self.__getstate__()


@functools.cache
def dsla_attention_class(base_class: Any) -> Any:
    """The drop-in attention over `base_class`, e.g. `DSLALlamaAttention` over `LlamaAttention`."""
    return type(f"DSLA{base_class.__name__}", (DSLAAttentionMixin, base_class), {"__module__": __name__})


def _new_attention(base_class: Any) -> nn.Module:
    return (cls := dsla_attention_class(base_class)).__new__(cls)


def attention_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of a model's config for one attention module, which selects our attention function.

    Never set on the model's own config: its softmax layers would lose their masks.
    """
    config = copy.copy(config)
    set_attention_implementation(config, ATTENTION_FUNCTION)
    return config


def new_dual_state_attention(attention: nn.Module, dsla_config: DSLAConfig) -> DualStateAttention:
    """DSLA's own parameters for a base attention module, sized by the base's config."""
    config: Any = attention.config
    head_dim: Any = attention.head_dim
    scale: Any = attention.scaling
    return DualStateAttention(config.num_attention_heads, kv_heads_of(config), head_dim, scale=scale, **dsla_config.mathematics())
