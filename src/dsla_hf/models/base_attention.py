"""The drop-in attention: DSLA under the forward of any base's own attention class.

A converted layer is a subclass of the base model's own attention class. The base's forward runs as it is (projections,
q/k norms, rotary embedding, output projection); only the attention function it calls is ours.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig

from ..compat import align_module_device, needed_for
from ..compat.attributes import attention_implementation, set_attention_implementation, versions_of
from ..core.attention import DualStateAttention
from ..core.branches import both
from ..core.cache import DSLACacheLayer
from ..core.fold import dsla_cache_layer, partial_cache_layer
from ..core.heads import HeadIndices, HeadSplit, of_heads, split_of
from ..core.layout import TokenLayout, read_layout
from ..core.tensor_parallel import DSLA, HEADS
from ..core.window_view import WindowView, window_view
from .architectures import kv_heads_of, sliding_window_of
from .configuration import DSLAConfig

ATTENTION_FUNCTION = "dsla"

NO_CONTINUOUS_BATCHING = (
    "transformers' continuous batching (generate_batch, serve --continuous-batching) keeps keys and values only, and would give wrong "
    "text with DSLA layers: use generate()"
)

NO_HEADS = (
    "layers converted in part (conversion_unit='head') are not supported here yet: use a plan of whole layers (conversion_unit='layer'), "
    "or generate() of a model in one process"
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
    dsla_kept: KeptKeys | None = None,
    dsla_view: WindowView | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of converted layers, in transformers' interface: q, k, v `[B, H, T, D]`, output `[B, T, H, D]`.

    dsla_layer, dsla_kept: of a cache, what converted and kept heads have in it. dsla_view: of a cache that has both in one memory.
    dsla_layout: of the tokens of the call.
    """
    if dsla_view is not None:
        return dsla_view.attend(query, key, value, **kwargs), None
    layout = dsla_layout or TokenLayout()
    dsla: Any = getattr(module, "dsla", None)
    if dsla is None:  # someone wrote the name into the config of a model
        raise ValueError(NO_ATTENTION_IMPLEMENTATION)
    split: HeadSplit | None = module.split  # type: ignore[assignment]
    if split is not None:
        return _attend_in_part(module, split, query, key, value, attention_mask, dsla_layer, layout, dsla_kept, kwargs), None
    if key.shape[1] != dsla.num_kv_heads:
        raise ValueError(
            f"this process has the keys of {key.shape[1]} heads and the DSLA weights of {dsla.num_kv_heads}: a tp_plan of your own that "
            f"cuts the projections must cut these, too: {{'model.{DSLA}': '{HEADS}'}}; tp_plan=\"auto\" does"
        )
    return _attend(dsla, query, key, value, dsla_layer, layout, kwargs), None


def _attend(
    dsla: DualStateAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dsla_layer: DSLACacheLayer | None,
    layout: TokenLayout,
    kwargs: dict[str, Any],
    kv_heads: Tensor | None = None,
) -> Tensor:
    """The output of DSLA heads; shapes as in `dsla_attention_function`. kv_heads: of keys and values of more heads those of these."""
    shape = query.shape[0], query.shape[2]
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
        state_heads=None if dsla_layer is None else dsla_layer.state_heads,
        kv_heads=kv_heads,
    )
    if dsla_layer is not None:
        if kv_heads is not None and dsla_layer.record_past:
            k, v = k.index_select(2, kv_heads), v.index_select(2, kv_heads)
        dsla_layer.advance(state, k, v, padding_mask)
        dsla_layer.shorten_record(dsla)
    return o if layout.cu_seqlens is None else layout.apart(o, shape)


def _attend_in_part(
    module: Any,
    split: HeadSplit,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dsla_layer: DSLACacheLayer | None,
    layout: TokenLayout,
    kept: KeptKeys | None,
    kwargs: dict[str, Any],
) -> Tensor:
    """The output of a layer converted in part: converted heads through DSLA, the others through the base's own attention function."""
    if key.shape[1] != split.num_kv_heads:
        raise NotImplementedError(f"tensor parallel ({key.shape[1]} of {split.num_kv_heads} KV heads in this process): {NO_HEADS}")
    index = split.on(query.device)
    sinks = kwargs.get("s_aux")
    if module.ordered:
        q_kept, q_converted = query.split([len(index.kept_queries), len(index.converted_queries)], 1)
    else:
        q_kept, q_converted = (query.index_select(1, queries) for queries in (index.kept_queries, index.converted_queries))

    def converted_heads() -> Tensor:
        options = kwargs if sinks is None else {**kwargs, "s_aux": sinks[index.converted_queries]}
        return _attend(module.converted_core(), q_converted, key, value, dsla_layer, layout, options, index.converted)

    def kept_heads() -> Tensor:
        keys, values = (x.index_select(1, index.kept) for x in (key, value)) if kept is None else (kept.keys, kept.values)
        mask, options = attention_mask, kwargs if sinks is None else {**kwargs, "s_aux": sinks[index.kept_queries]}
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[1] == query.shape[1] > 1:
            mask = mask.index_select(1, index.kept_queries)
        return _softmax_attention(module)(_KeptHeads(module, index), q_kept, keys, values, mask, **options)[0]

    o_converted, o_kept = both(query, converted_heads, kept_heads)
    return torch.cat([o_kept, o_converted], 2) if module.ordered else split.joined(o_converted, o_kept)


def _softmax_attention(module: Any) -> Any:
    """The attention function by which the kept heads of a layer attend."""
    with needed_for("a layer converted in part"):
        from ..compat.attention_functions import attention_function
    implementation: Any = attention_implementation(module.softmax_config)
    return attention_function(type(module).__mro__[2], implementation)


class _KeptHeads:
    """A base attention as its attention function sees it where it has its kept heads alone."""

    def __init__(self, module: Any, index: HeadIndices):
        self._module, self.config = module, module.softmax_config
        if hasattr(module, "sinks"):  # gpt-oss, whose eager attention reads them here
            self.sinks = module.sinks[index.kept_queries]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


AttentionInterface.register(ATTENTION_FUNCTION, dsla_attention_function)


class _PassThrough:
    """What a converted layer's base sees as its cache: earlier tokens are in the states, new ones go by."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


class KeptKeys:
    """What the base of a layer converted in part sees as its cache: new keys and values go by, and those of kept heads are put to the
    earlier ones, `[B, kept, tokens so far, D]`."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: Any, layer_idx: int, split: HeadSplit):
        self._cache, self._layer_idx, self._split = cache, layer_idx, split

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        kept = self._split.on(key_states.device).kept
        new = (x.index_select(1, kept) for x in (key_states, value_states))
        self.keys, self.values = self._cache.update(*new, self._layer_idx)
        return key_states, value_states


class DSLAAttentionMixin:
    """Put in front of a base attention class by `dsla_attention_class`; `dsla` holds what is DSLA's own.

    A layer converted in part has a `split`, and `softmax_config`, the config by which its kept heads attend; `dsla` is then of all
    heads, or of converted ones alone.
    """

    config: PreTrainedConfig
    softmax_config: PreTrainedConfig
    dsla: DualStateAttention
    layer_idx: int
    exact_fold = True  # False where keys and values in a softmax layer's cache are not those of this layer
    split: HeadSplit | None = None
    ordered = False  # whether queries and outputs have kept heads first and then converted ones, in the order of `split`
    _core: tuple[Any, DualStateAttention] | None = None

    @property
    def converted_part(self) -> bool | tuple[int, ...]:
        """As that of a `DSLALayer`: the converted KV heads where they are not all."""
        return True if self.split is None else self.split.converted

    def convert(self, dsla: DualStateAttention, split: HeadSplit | None = None) -> None:
        """Make this base attention module run `dsla`, in the converted heads of `split` if one is given."""
        self.softmax_config, self.split = self.config, split
        self.config = attention_config(self.config)
        self.dsla = dsla

    def in_order(self, core: DualStateAttention) -> None:
        """From now on projections give and take heads in the order of `split`, kept ones first. core: what is DSLA's own of the converted
        ones."""
        self.ordered, self._core = True, (None, core)

    def converted_core(self) -> DualStateAttention:
        """What is DSLA's own of the converted heads."""
        if self.ordered and self._core is not None:
            return self._core[1]
        split = self.split
        return self.dsla if split is None or self.dsla.num_kv_heads == len(split.converted) else self._core_of(split)

    @torch.compiler.disable(
        reason="a layer of an adapter that is converted in part picks its heads' weights outside of compiled code: leave out "
        "fullgraph=True, or compile a hybrid (merge_and_unload)"
    )
    def _core_of(self, split: HeadSplit) -> DualStateAttention:
        """Those heads of `dsla`; kept until a weight changes, where nothing is trained."""
        parameters = list(self.dsla.parameters())
        if any(x.requires_grad or x.is_meta for x in parameters):
            with align_module_device(self.dsla):  # offloaded weights lie on the meta device otherwise
                return of_heads(self.dsla, split.converted)
        key = versions_of(parameters)
        if self._core is None or self._core[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # what is kept may be read by a pass with gradients later
                self._core = key, of_heads(self.dsla, split.converted)
        return self._core[1]

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
        if past_key_values is not None and (view := window_view(past_key_values, self.layer_idx)) is not None:
            options = {"attention_mask": None, "past_key_values": past_key_values, "dsla_view": view}
            return super().forward(hidden_states, *args, **options, **kwargs)  # type: ignore[misc]
        if (layout := dsla_layout) is None:
            layout = read_layout(attention_mask, tokens=hidden_states.shape[1], sliding_window=sliding_window_of(self))
        if self.split is not None:
            return self._forward_in_part(self.split, hidden_states, args, attention_mask, past_key_values, layout, kwargs)
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

    def _forward_in_part(
        self,
        split: HeadSplit,
        hidden_states: Tensor,
        args: tuple,
        attention_mask: Any,
        cache: Any,
        layout: TokenLayout,
        kwargs: dict[str, Any],
    ) -> Any:
        layer = kept = None
        if cache is not None:
            layer = partial_cache_layer(cache, self.layer_idx, self.dsla, split, layout, self.exact_fold).converted
            kept = KeptKeys(cache, self.layer_idx, split)
        return super().forward(  # type: ignore[misc]
            hidden_states,
            *args,
            attention_mask=attention_mask,
            past_key_values=kept,
            dsla_layer=layer,
            dsla_layout=layout,
            dsla_kept=kept,
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


def new_dual_state_attention(attention: nn.Module, dsla_config: DSLAConfig, kv_heads: int | None = None) -> DualStateAttention:
    """DSLA's own parameters for a base attention module, sized by the base's config; for so many of its KV heads, all when None."""
    config: Any = attention.config
    head_dim: Any = attention.head_dim
    scale: Any = attention.scaling
    all_heads = kv_heads_of(config)
    kv_heads = all_heads if kv_heads is None else kv_heads
    queries = config.num_attention_heads // all_heads
    return DualStateAttention(queries * kv_heads, kv_heads, head_dim, scale=scale, **dsla_config.mathematics())


def head_split(attention: Any, heads: tuple[int, ...], order: tuple[int, ...] = ()) -> HeadSplit | None:
    """How these converted KV heads split a base attention module; None where they are all of it. order: all its heads in the order of their
    conversion, which both kinds then follow; where `heads` are not its first ones, and without it, they go by number."""
    kv_heads = kv_heads_of(attention.config)
    if len(heads) == kv_heads:
        return None
    return split_of(tuple(heads), kv_heads, attention.config.num_attention_heads // kv_heads, tuple(order))
