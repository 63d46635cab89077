"""Hybrids: the config and model classes of checkpoints some of whose layers are DSLA.

They have `model_type: "dsla"`; their config and model classes are made per base, on first use, over the two mixins here.
"""

from __future__ import annotations

import functools
from typing import Any

import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..compat import guard_torch_init_functions, needed_for
from ..core.attention import DualStateAttention
from ..core.tensor_parallel import FEATURE, asks_for_tensor_parallel, hybrid_plan
from ..levels.generation import generate_with_levels
from .architectures import SUPPORTED_BASES, TRIED, find_architecture, kv_heads_of
from .base_attention import NO_CONTINUOUS_BATCHING, NO_HEADS, dsla_attention_class, head_split, new_dual_state_attention
from .before_layers import install_layout_hook, masks_with_padding
from .configuration import DSLAConfig, resolve_level
from .decoder import attention_name, attentions_of, decoder_layers, decoder_of
from .image_blocks import install_image_guard
from .multimodal import MULTIMODAL, attention_type, auto_class_of, text_config_of
from .saving import push_saved, save_hybrid
from .sizes import unit_sizes
from .trial.records import take_record_of_hybrid

HYBRID_BASES = (*SUPPORTED_BASES, *MULTIMODAL)
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
        source = _config_file(self.name_or_path)
        text = text_config_of(self)
        config = DSLAConfig.from_hybrid_dict(self.dsla_config, source, kv_heads_of(text))
        try:
            config.check_units(config.conversion_order, text.num_hidden_layers, name="converted_layers")
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        config.take_rotary(text, self.base_model_type if text is self else attention_type(text.model_type), source)
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> PreTrainedConfig:
        """Resolves to the class for the base model that the dict names.

        Raises:
            ValueError: names the file and the supported base models, if it names none of them.
        """
        source = _config_file(kwargs.get("name_or_path") or config_dict.get("_name_or_path"))
        if "dsla_config" in kwargs:  # would replace the stored one as a whole
            sizes = config_dict.get("text_config") or config_dict
            heads = sizes.get("num_key_value_heads") or sizes.get("num_attention_heads")
            DSLAConfig.from_hybrid_dict(kwargs["dsla_config"], source, heads)
        if cls is not DSLAHybridConfig:
            return super().from_dict(config_dict, **kwargs)
        hybrid = config_dict.get("dsla_config")
        base = hybrid.get("base_model_type") if isinstance(hybrid, dict) else None
        if isinstance(hybrid, dict) and base not in HYBRID_BASES and hybrid.get("checked_base") is not None:
            take_record_of_hybrid(base, hybrid["checked_base"], source, hybrid.get("conversion_unit", "layer"))
        if not _can_be_hybrid(base):
            raise ValueError(
                f"{source}: 'dsla_config' names the base_model_type {base!r}; supported are {list(HYBRID_BASES)}. "
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


def _kinds_for_vllm(config: Any) -> list[str]:
    """Kind of each layer in the words that vLLM counts a hybrid's caches by: `"linear_attention"` if it is DSLA as a whole."""
    converted = set(config.get_dsla_config().converted_layers) if config.dsla_config else set()
    return ["linear_attention" if i in converted else "attention" for i in range(text_config_of(config).num_hidden_layers)]


def _can_be_hybrid(base_model_type: str | None) -> bool:
    """Whether hybrids over bases of this type can be made: over those of the tables, and over types that were tried."""
    return base_model_type in MULTIMODAL or find_architecture(base_model_type) is not None


def _config_file(name_or_path: str | None) -> str:
    return f"{name_or_path}/config.json" if name_or_path else "config.json"


class DSLAHybridMixin:
    """Put in front of a causal LM class: its converted layers are DSLA attention from the start."""

    config: Any
    base_model_class: type[PreTrainedModel]

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        dsla_config = config.get_dsla_config()
        for index in dsla_config.layers_to_transform or ():
            layer, base = decoder_layers(self)[index], attentions_of(self)[index]  # type: ignore[arg-type]
            split = None if dsla_config.conversion_unit == "layer" else head_split(base, dsla_config.heads_of(index))
            core = new_dual_state_attention(base, dsla_config, None if split is None else len(split.converted))
            attention = dsla_attention_class(base.__class__)(base.config, index)
            attention.convert(core, split)
            setattr(layer, attention_name(text_config_of(config)), attention)
        install_layout_hook(decoder_of(self))  # type: ignore[arg-type]
        install_image_guard(self, config.base_model_type)  # type: ignore[arg-type]
        self.post_init()  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the style by which a `tp_plan` cuts DSLA's own weights is made known first."""
        if asks_for_tensor_parallel(kwargs):
            if (config := kwargs.get("config")) is not None and config.get_dsla_config().converted_heads:
                raise NotImplementedError(f"tensor parallel: {NO_HEADS}")
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
        """How many layers are DSLA; KV heads, where the level of its adapter counted those."""
        return len(self.config.get_dsla_config().conversion_order)

    def set_level(self, level: int | str) -> None:
        """A hybrid has one level; text is read as that of an adapter.

        Raises:
            ValueError: for another one.
        """
        if isinstance(level, str):
            level = resolve_level(level, self.config.get_dsla_config(), self.config.num_hidden_layers)
        if level != self.get_level():
            raise ValueError(
                f"this hybrid has level {self.get_level()} and no other, so not {level}: softmax weights of its converted layers are "
                "gone. Load the original model with the adapter to choose a level"
            )

    def level_sizes(self) -> dict[str, Any]:
        """Sizes that policies of `generate(level_policy=...)` reckon with."""
        level = self.get_level()
        return {"min_level": level, "max_level": level, **unit_sizes(self, self.config.get_dsla_config())}

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(NO_CONTINUOUS_BATCHING)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """Transformers reads this from the source of the class's module: that of the base says it."""
        return cls.base_model_class._can_set_attn_implementation()

    @classmethod
    def is_custom_code(cls) -> bool:
        """By this transformers knows whose `_init_weights` heeds what is loaded already: that of the base does, and what a base computes
        there, without weights of its own, must be computed (Falcon-H1's multipliers)."""
        return cls.base_model_class.is_custom_code()

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
    if not _can_be_hybrid(base_model_type):
        raise ValueError(f"base model type {base_model_type!r} is not supported; supported are {list(HYBRID_BASES)}")
    base_config = CONFIG_MAPPING[base_model_type]
    mapping = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING if base_model_type in MULTIMODAL else MODEL_FOR_CAUSAL_LM_MAPPING
    base_model = mapping[base_config]
    names: dict[str, Any] = {"model_type": "dsla", "base_model_type": base_model_type, "__module__": __name__, "__annotations__": {}}
    names["base_model_tp_plan"] = hybrid_plan(base_config.base_model_tp_plan)
    names["is_custom_code"] = classmethod(lambda cls: base_config.is_custom_code())  # its names of layers are those of the base
    kinds = "layers_block_type"
    if not hasattr(base_config, kinds) and kinds not in base_config.attribute_map:  # bases with linear layers read their own
        names[kinds] = property(_kinds_for_vllm)
    config_class: Any = type(f"DSLA{base_config.__name__}", (DSLAHybridConfig, base_config), names)
    names = {"config_class": config_class, "base_model_class": base_model, "__module__": __name__}
    model_class: Any = type(f"DSLA{base_model.__name__}", (DSLAHybridMixin, base_model), names)
    own = auto_class_of(base_model_type)
    getattr(transformers, own).register(config_class, model_class, exist_ok=True)
    for name in OTHER_AUTO_CLASSES if own == "AutoModelForCausalLM" else (*OTHER_AUTO_CLASSES, "AutoModelForCausalLM"):
        auto_class = getattr(transformers, name, None)
        if auto_class is None:
            continue
        names = {"config_class": config_class, "auto_class": name, "own_class": own, "__module__": __name__}
        auto_class.register(config_class, type(f"DSLA{base_config.__name__}Refused", (_Refused,), names), exist_ok=True)
    return config_class, model_class


class _Refused:
    """What other Auto classes find for a hybrid."""

    auto_class: str
    own_class: str

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        kind = "are causal language models" if cls.own_class == "AutoModelForCausalLM" else "of multimodal models read images, too"
        raise ValueError(f"DSLA hybrids {kind}: load them with {cls.own_class}, not {cls.auto_class}")

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
    for base in (*HYBRID_BASES, *TRIED) if name.startswith("DSLA") else ():
        for cls in hybrid_classes(base):
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
