"""What PEFT and transformers would do wrong with DSLA without a word: refused before anything is changed, with the way that works.

Neither has a hook for it, so methods of theirs are wrapped (`compat.methods`): each function here looks, and then calls the original.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from torch import nn
from transformers import PreTrainedModel

from ..compat.methods import around
from .adapter import DSLAModel
from .adapter_layer import DSLALayer
from .base_attention import ATTENTION_FUNCTION, NO_ATTENTION_IMPLEMENTATION
from .configuration import DSLAConfig
from .hybrid import DSLAHybridConfig, DSLAHybridMixin
from .multimodal import auto_class_of
from .trial.untested import try_untested

GENERATION = "prepare_inputs_for_generation"  # what PEFT's class for causal LMs asks a model for

# --- other PEFT methods over a model with DSLA layers -----------------------------------------------------------


def check_tuner(model: nn.Module, config: PeftConfig) -> None:
    """Raises ValueError if `config` is of another PEFT method and `model` has DSLA layers.

    Such a method would not see the attention of planned layers, switch DSLA off with itself, and save itself alone.
    """
    if not isinstance(config, DSLAConfig) and any(isinstance(module, DSLALayer) for module in model.modules()):
        method = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"the model has DSLA layers, over which {method} is not supported: merge_and_unload() makes a hybrid at the current level, "
            f"whose every layer takes {method}; save the hybrid, and then put {method} on it"
        )


def check_task(peft_model: Any, model: nn.Module, config: PeftConfig) -> None:
    """Raises ValueError for a DSLA adapter of causal LMs on another model, over which PEFT fails when all is wrapped already."""
    if isinstance(peft_model, PeftModelForCausalLM) and isinstance(config, DSLAConfig) and not hasattr(model, GENERATION):
        raise ValueError(
            f'task_type="CAUSAL_LM" is for causal LMs, not for {type(model).__name__}: a new DSLAConfig takes "FEATURE_EXTRACTION", or '
            '"SEQ_CLS" and the like to train a head with it; a saved adapter is loaded by '
            'PeftModel.from_pretrained(model, adapter, task_type="FEATURE_EXTRACTION")'
        )


def _init(
    original: Callable[..., None], self: Any, model: nn.Module, peft_config: Any, adapter_name: str = "default", *args: Any, **kwargs: Any
) -> None:
    config = peft_config if isinstance(peft_config, PeftConfig) else peft_config[adapter_name]
    check_tuner(model, config)
    if isinstance(config, DSLAConfig):
        try_untested(model, config)
    check_task(self, model, config)
    original(self, model, peft_config, adapter_name, *args, **kwargs)


def _add_adapter(
    original: Callable[..., None], self: PeftModel, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any
) -> None:
    check_tuner(self, peft_config)
    if isinstance(peft_config, DSLAConfig):
        try_untested(self.get_base_model(), peft_config)
    original(self, adapter_name, peft_config, *args, **kwargs)


def _load_adapter(original: Callable[..., Any], self: PeftModel, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
    tuner: Any = self.base_model
    if not isinstance(tuner, DSLAModel):
        return original(self, model_id, adapter_name, *args, **kwargs)
    fields = sorted(DSLAConfig.__annotations__.keys() & kwargs.keys())
    if fields and adapter_name not in self.peft_config:
        raise ValueError(f"load_adapter takes no {', '.join(fields)}: set_adapter({adapter_name!r}) and set_level() after loading")
    # A bare decoder and a model with a head have the same layers under different names: an adapter of one fits the other.
    layer = next((name for name, module in tuner.model.named_modules() if isinstance(module, DSLALayer)), None)
    if layer is not None and not kwargs.get("key_mapping"):
        kwargs["key_mapping"] = {r"^(\w+\.)*layers\.": layer.partition("layers.")[0] + "layers."}
    is_new = adapter_name not in self.peft_config
    loaded = original(self, model_id, adapter_name, *args, **kwargs)
    if without_place := [key for key in loaded.unexpected_keys if ".dsla_" in key]:
        if is_new:
            self.delete_adapter(adapter_name)
        raise ValueError(_fewer_parts(model_id, without_place))
    return loaded


def _fewer_parts(adapter: Any, keys: list[str]) -> str:
    """What is wrong with an adapter whose weights have these names, and its config no place for them."""
    found = [re.search(r"layers\.(\d+)\..*\.(dsla_\w+(?:\.\w+)*?)(?:\.weight)?$", key) for key in keys]
    layers = sorted({int(match[1]) for match in found if match})
    parts = sorted({match[2] for match in found if match})
    return (
        f"{adapter} holds weights for which its adapter_config.json has no place: {', '.join(parts)} of layers {layers}. Put back what "
        "it said of conversion_order, states, window_size and the like; a lower level needs no other plan: set_level()"
    )


def _generate(original: Callable[..., Any], self: PeftModel, *args: Any, **kwargs: Any) -> Any:
    tuner: Any = self.base_model
    # PEFT's class for no task in particular passes the tuner by, which knows levels.
    return tuner.generate(*args, **kwargs) if isinstance(tuner, DSLAModel) else original(self, *args, **kwargs)


# Every way to a tuner passes one of them: get_peft_model and from_pretrained make a PeftModel, also of methods that are no BaseTuner
# (prompts); inject_adapter_in_model and transformers' add_adapter and load_adapter make a BaseTuner.
for _cls in ("peft.tuners.tuners_utils:BaseTuner", "peft:PeftModel", "peft:PeftMixedModel"):
    around(f"{_cls}.__init__", _init)
around("peft:PeftModel.add_adapter", _add_adapter)
around("peft:PeftModel.generate", _generate)
around("peft:PeftModel.load_adapter", _load_adapter)


# --- transformers -----------------------------------------------------------------------------------------------

OF_A_HYBRID = "this is a DSLA hybrid, of which {} would make a softmax model with other outputs: load it with {}"


def _from_dict(original: Callable[..., Any], cls: Any, config_dict: dict[str, Any], **kwargs: Any) -> Any:
    hybrid = DSLAHybridConfig.model_type
    if config_dict.get("model_type") == hybrid and cls.model_type not in ("", hybrid):
        base = (config_dict.get("dsla_config") or {}).get("base_model_type")
        raise ValueError(OF_A_HYBRID.format(f"a class of {cls.model_type!r} models", auto_class_of(base)))
    return original(cls, config_dict, **kwargs)


def _model_init(original: Callable[..., None], self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
    if isinstance(config, DSLAHybridConfig) and not isinstance(self, DSLAHybridMixin) and self.can_generate():
        raise ValueError(OF_A_HYBRID.format(type(self).__name__, auto_class_of(config.base_model_type)))
    original(self, config, *args, **kwargs)


def _get_correct_attn_implementation(
    original: Callable[..., str], self: PreTrainedModel, requested_attention: str | None, *args: Any, **kwargs: Any
) -> str:
    if requested_attention == ATTENTION_FUNCTION:
        raise ValueError(NO_ATTENTION_IMPLEMENTATION)
    return original(self, requested_attention, *args, **kwargs)


around("transformers:PreTrainedModel.__init__", _model_init)
around("transformers:PreTrainedConfig.from_dict", _from_dict)
around("transformers:PreTrainedModel.get_correct_attn_implementation", _get_correct_attn_implementation)
