"""DSLA inside transformers models: the drop-in attention over any base attention class, and the hybrid model classes.

A converted layer is a subclass of the base model's own attention class. The base's forward runs as it is (projections,
q/k norms, rotary embedding, output projection); only the attention function it calls is ours. Hybrid checkpoints have
`model_type: "dsla"`; their config and model classes are made per base, on first use, over the two mixins here.
"""

from __future__ import annotations

import copy
import functools
from contextlib import contextmanager
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..compat import guard_torch_init_functions, needed_for
from ..core.attention import DualStateAttention
from ..core.cache import DSLACacheLayer, dsla_cache_layer
from ..core.layout import TokenLayout, read_layout
from ..core.tensor_parallel import DSLA, FEATURE, HEADS, asks_for_tensor_parallel, hybrid_plan
from ..levels.generation import generate_with_levels
from .architectures import SUPPORTED_BASES
from .before_layers import install_layout_hook, masks_with_padding
from .configuration import DSLAConfig, check_order
from .saving import push_saved, save_hybrid

ATTENTION_FUNCTION = "dsla"

# By name: a release may lack one.
OTHER_AUTO_CLASSES = (
    "AutoModel",
    "AutoModelForMaskedLM",
    "AutoModelForMultipleChoice",
    "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
)

NO_CONTINUOUS_BATCHING = (
    "transformers' continuous batching (generate_batch, serve --continuous-batching) keeps keys and values only, and would give wrong "
    "text with DSLA layers: use generate()"
)

NO_ATTENTION_IMPLEMENTATION = (
    'attn_implementation="dsla" is no way to convert a model, whose layers would lack DSLA\'s weights: use '
    "get_peft_model(model, DSLAConfig(...)), or load an adapter or a hybrid; leave attn_implementation out, or choose that of the softmax "
    'layers, such as "sdpa"'
)


# --- the drop-in attention --------------------------------------------------------------------------------------


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
    config._attn_implementation = ATTENTION_FUNCTION
    return config


def new_dual_state_attention(attention: nn.Module, dsla_config: DSLAConfig) -> DualStateAttention:
    """DSLA's own parameters for a base attention module, sized by the base's config."""
    config: Any = attention.config
    head_dim: Any = attention.head_dim
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    scale: Any = attention.scaling
    return DualStateAttention(config.num_attention_heads, kv_heads, head_dim, scale=scale, **dsla_config.mathematics())


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder's layers of a causal LM of transformers.

    Raises:
        ValueError: if there are none where transformers puts them.
    """
    layers = getattr(decoder_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no list of decoder layers; supported base models: {list(SUPPORTED_BASES)}")
    return layers


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder inside a causal LM, e.g. the `LlamaModel` of a `LlamaForCausalLM` (or the model itself if it is one)."""
    return model.base_model if isinstance(model, PreTrainedModel) else model


@contextmanager
def first_layers(model: nn.Module, count: int) -> Any:
    """Within it a forward of `model` runs the first `count` layers of its decoder alone.

    The others are out of sight only while the decoder runs: FSDP and DDP look through the whole model before.
    """
    decoder: Any = decoder_of(model)
    layers = decoder_layers(model)

    def shorten(*_: Any) -> None:
        decoder.layers = layers[:count]

    def restore(*_: Any) -> None:
        decoder.layers = layers

    handles = [decoder.register_forward_pre_hook(shorten), decoder.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- hybrid checkpoints -----------------------------------------------------------------------------------------


class DSLAHybridConfig(PreTrainedConfig):
    """Config of a hybrid: the base model's config, and `dsla_config` (see `DSLAConfig.to_hybrid_dict`) inside it."""

    model_type = "dsla"
    dsla_config: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.dsla_config is not None:
            self.dsla_config = self.get_dsla_config().to_hybrid_dict()  # whole, also if its author left out what follows from the base

    def get_dsla_config(self) -> DSLAConfig:
        """The conversion that this hybrid is, checked."""
        source = _config_file(getattr(self, "_name_or_path", None))
        config = DSLAConfig.from_hybrid_dict(self.dsla_config, source)
        try:
            check_order(config.conversion_order, self.num_hidden_layers, name="converted_layers")
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        config.take_rotary(self, self.base_model_type, source)
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        """Resolves to the class for the base model that the dict names.

        Raises:
            ValueError: names the file and the supported base models, if it names none of them.
        """
        source = _config_file(kwargs.get("name_or_path") or config_dict.get("_name_or_path"))
        if "dsla_config" in kwargs:  # would replace the stored one as a whole
            DSLAConfig.from_hybrid_dict(kwargs["dsla_config"], source)
        if cls is not DSLAHybridConfig:
            return super().from_dict(config_dict, **kwargs)
        hybrid = config_dict.get("dsla_config")
        base = hybrid.get("base_model_type") if isinstance(hybrid, dict) else None
        if base not in SUPPORTED_BASES:
            raise ValueError(
                f"{source}: 'dsla_config' names the base_model_type {base!r}; supported are {list(SUPPORTED_BASES)}. "
                "Write hybrids with merge_and_unload() and save_pretrained()"
            )
        return hybrid_classes(base)[0].from_dict(config_dict, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> PreTrainedConfig:
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Does nothing: `save_pretrained` writes `auto_map` and the file it points to."""


def _config_file(name_or_path: str | None) -> str:
    return f"{name_or_path}/config.json" if name_or_path else "config.json"


class DSLAHybridMixin:
    """Put in front of a causal LM class: its converted layers are DSLA attention from the start."""

    config: Any
    base_model_class: type[PreTrainedModel]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        dsla_config = config.get_dsla_config()
        for index in dsla_config.converted_layers:
            layer: Any = decoder_layers(self)[index]  # type: ignore[arg-type]
            base: Any = layer.self_attn
            layer.self_attn = dsla_attention_class(base.__class__)(config, index)
            layer.self_attn.convert(new_dual_state_attention(base, dsla_config))
        install_layout_hook(decoder_of(self))  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the style by which a `tp_plan` cuts DSLA's own weights is made known first."""
        if asks_for_tensor_parallel(kwargs):
            with needed_for(FEATURE):
                from ..core import head_sharding  # noqa: F401
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]

    def initialize_weights(self) -> None:
        """As in transformers, whose decoders do not know DSLA's parameters: those missing from a checkpoint get their initial
        values, those loaded keep theirs."""
        super().initialize_weights()  # type: ignore[misc]
        with guard_torch_init_functions():
            for module in self.modules():  # type: ignore[attr-defined]
                if isinstance(module, DualStateAttention):
                    module.reset_parameters()

    def create_masks_for_generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, with the 2-D mask that the masks are made of."""
        make_masks = getattr(super(), "create_masks_for_generate", None)
        return masks_with_padding(make_masks, decoder_of(self), *args, **kwargs)  # type: ignore[arg-type]

    @functools.wraps(GenerationMixin.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return generate_with_levels(super().generate, self, self, args, kwargs)  # type: ignore[misc]

    def get_level(self) -> int:
        """How many layers are DSLA."""
        return len(self.config.get_dsla_config().converted_layers)

    def set_level(self, level: int) -> None:
        """A hybrid has one level.

        Raises:
            ValueError: for another one.
        """
        if level != self.get_level():
            raise ValueError(
                f"this hybrid has level {self.get_level()} and no other, so not {level}: softmax weights of its converted layers are "
                "gone. Load the original model with the adapter to choose a level"
            )

    def level_sizes(self) -> dict[str, int]:
        """Sizes that policies of `generate(level_policy=...)` reckon with."""
        level = self.get_level()
        return {"min_level": level, "max_level": level, "num_layers": self.config.num_hidden_layers, **layer_bytes(self)}

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(NO_CONTINUOUS_BATCHING)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Transformers reads this from the source of the class's module: that of the base says it."""
        return cls.base_model_class._can_set_attn_implementation()

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return cls.base_model_class._can_set_experts_implementation()

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers; adds the `auto_map` file, so that `trust_remote_code=True` loads it where dsla-hf is
        installed but not imported, and a model card. Refuses a directory that holds another model."""
        save_hybrid(self, super().save_pretrained, save_directory, *args, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """As in transformers; the model card goes with it."""
        return push_saved(self, repo_id, **options)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Does nothing: `save_pretrained` writes `auto_map` and the file it points to."""


@functools.cache
def hybrid_classes(base_model_type: str) -> tuple[type[PreTrainedConfig], type[PreTrainedModel]]:
    """The config and model class of hybrids over a base, e.g. `DSLALlamaConfig` and `DSLALlamaForCausalLM`."""
    if base_model_type not in SUPPORTED_BASES:
        raise ValueError(f"base model type {base_model_type!r} is not supported; supported are {list(SUPPORTED_BASES)}")
    base_config = CONFIG_MAPPING[base_model_type]
    base_model = MODEL_FOR_CAUSAL_LM_MAPPING[base_config]
    names: dict[str, Any] = {"model_type": "dsla", "base_model_type": base_model_type, "__module__": __name__, "__annotations__": {}}
    names["base_model_tp_plan"] = hybrid_plan(base_config.base_model_tp_plan)
    config_class: Any = type(f"DSLA{base_config.__name__}", (DSLAHybridConfig, base_config), names)
    names = {"config_class": config_class, "base_model_class": base_model, "__module__": __name__}
    model_class: Any = type(f"DSLA{base_model.__name__}", (DSLAHybridMixin, base_model), names)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    for name in OTHER_AUTO_CLASSES:
        auto_class = getattr(transformers, name, None)
        if auto_class is None:
            continue
        names = {"config_class": config_class, "auto_class": name, "__module__": __name__}
        auto_class.register(config_class, type(f"DSLA{base_config.__name__}Refused", (_Refused,), names), exist_ok=True)
    return config_class, model_class


class _Refused:
    """What other Auto classes find for a hybrid."""

    auto_class: str

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(f"DSLA hybrids are causal language models: load them with AutoModelForCausalLM, not {cls.auto_class}")

    _from_config = from_pretrained


class DSLAForCausalLM:
    """Entry for `auto_map`: `from_pretrained` loads the hybrid class that a checkpoint's config names."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any) -> PreTrainedModel:
        if config is None:
            config = DSLAHybridConfig.from_pretrained(pretrained_model_name_or_path)
        model_class = hybrid_classes(config.base_model_type)[1]
        return model_class.from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModelForCausalLM") -> None:
        """Does nothing: `save_pretrained` writes `auto_map` and the file it points to."""


AutoConfig.register("dsla", DSLAHybridConfig, exist_ok=True)


def __getattr__(name: str) -> Any:
    """Hybrid classes as attributes of this module, made on first use: they import and pickle by name."""
    for base in SUPPORTED_BASES if name.startswith("DSLA") else ():
        for cls in hybrid_classes(base):
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def layer_bytes(model: PreTrainedModel) -> dict[str, int]:
    """Cache bytes per row that a DSLA layer takes, and a softmax layer per token, in the model's dtype.

    A softmax layer holds k and v of every token; a DSLA layer two fp32 states, k and v of window and sinks, and a counter.
    """
    core = next(module for module in model.modules() if isinstance(module, DualStateAttention))
    per_token = core.num_kv_heads * (core.key_dim + core.value_dim) * model.dtype.itemsize
    states = 2 * core.num_kv_heads * core.key_dim * core.value_dim * 4
    return {"softmax_bytes_per_token": per_token, "dsla_bytes": states + (core.window_size + core.sink_tokens) * per_token + 8}
