"""Every name of other packages that we rest on and that is not public, or may move: what for, and what it must look like.

Names are `module:attribute`, as `pkgutil.resolve_name` takes them. tests/compat/test_compat.py goes through the table, and
docs/compatibility.md lists it. `methods.around` wraps what stands here alone.
"""

from __future__ import annotations

from typing import NamedTuple


class Touch(NamedTuple):
    """why: what we need it for. parameters: of a function, the first ones, which must be these."""

    why: str
    parameters: tuple[str, ...] | None = None


TUNER = "peft.tuners.tuners_utils:BaseTuner"
TUNER_LAYER = "peft.tuners.tuners_utils:BaseTunerLayer"

# Wrapped for every user of the class: a callback of ours looks first, and calls the original.
WRAPPED = {
    f"{TUNER}.__init__": Touch("another method over DSLA layers is refused", ("self", "model", "peft_config", "adapter_name")),
    "peft:PeftMixedModel.__init__": Touch("another method over DSLA layers is refused", ("self", "model", "peft_config", "adapter_name")),
    "peft:PeftModel.__init__": Touch(
        "another method over DSLA layers is refused, and a task that is not the model's", ("self", "model", "peft_config", "adapter_name")
    ),
    "peft:PeftModel.add_adapter": Touch("another method over DSLA layers is refused", ("self", "adapter_name", "peft_config")),
    "peft:PeftModel.generate": Touch("texts whose level changes, where PEFT passes the tuner by", ("self",)),
    "peft:PeftModel.load_adapter": Touch("an adapter of a bare decoder fits a model with a head", ("self", "model_id", "adapter_name")),
    "peft:PeftModel.push_to_hub": Touch("a model card goes with it", ("self", "repo_id")),
    "peft:PeftModel.save_pretrained": Touch("a folder is whole or as it was", ("self", "save_directory", "safe_serialization")),
    "transformers.cache_utils:Cache.activate_past_recording": Touch("layers that come later record too", ("self",)),
    "transformers.cache_utils:Cache.crop": Touch("a crop that one layer refuses changes none", ("self", "tokens_to_remove")),
    "transformers:PreTrainedConfig.from_dict": Touch("classes of the base do not read a hybrid", ("config_dict",)),
    "transformers:PreTrainedModel.__init__": Touch("classes of the base take no config of a hybrid", ("self", "config")),
    "transformers:PreTrainedModel.get_correct_attn_implementation": Touch(
        'attn_implementation="dsla" is refused', ("self", "requested_attention")
    ),
}

# Overridden in subclasses of ours, where their owners call them.
OVERRIDDEN = {
    f"{TUNER}._cast_adapter_dtype": Touch("weights stay in the base's dtype", ("self", "adapter_name", "autocast_adapter_dtype")),
    f"{TUNER}._check_target_module_exists": Touch("names of a bare decoder's layers", ("peft_config", "key")),
    f"{TUNER}._create_and_replace": Touch(
        "attention modules are wrapped", ("self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key")
    ),
    f"{TUNER}._prepare_adapter_config": Touch("a plan follows from the model, not from a table", ("self", "peft_config", "model_config")),
    f"{TUNER}._prepare_model": Touch("checks before anything is changed", ("self", "peft_config", "model")),
    f"{TUNER}._replace_module": Touch("a module is put in place without a copy", ("self", "parent", "child_name", "new_module", "child")),
    f"{TUNER}._unload_and_optionally_merge": Touch(
        "the base becomes a hybrid", ("self", "merge", "progressbar", "safe_merge", "adapter_names")
    ),
    f"{TUNER_LAYER}._active_adapter": Touch("none is active in a new layer"),
    f"{TUNER_LAYER}._disable_adapters": Touch("switched off without a change of what is trained"),
    f"{TUNER_LAYER}._get_base_layer_device_and_dtype": Touch("the device of offloaded weights", ("self", "base_layer")),
    "transformers:PreTrainedModel._can_set_attn_implementation": Touch("a hybrid can what its base can", ()),
    "transformers:PreTrainedModel._can_set_experts_implementation": Touch("a hybrid can what its base can", ()),
    "transformers:PreTrainedModel._from_config": Touch("Auto classes that take no hybrid say so", ("config",)),
    "transformers:Trainer._load_best_model": Touch("the best adapter, back into shared weights", ("self",)),
    "transformers:Trainer._load_from_checkpoint": Touch("a run goes on", ("self", "resume_from_checkpoint")),
    "transformers:Trainer._load_optimizer_and_scheduler": Touch("a run goes on", ("self", "checkpoint")),
    "transformers:Trainer._save_checkpoint": Touch("a checkpoint is whole or absent", ("self", "model", "trial")),
    "transformers:Trainer._save_optimizer_and_scheduler": Touch("a checkpoint is whole or absent", ("self", "output_dir")),
}

# Called by subclasses of ours.
CALLED = {
    f"{TUNER_LAYER}._move_adapter_to_device_of_base_layer": Touch("new weights lie beside the base's", ("self", "adapter_name")),
    "transformers:Trainer._get_output_dir": Touch("where a checkpoint lies", ("self", "trial")),
    "transformers:Trainer._prepare_inputs": Touch("a batch on its device", ("self", "inputs")),
    "transformers:Trainer._save": Touch("an adapter of sharded weights", ("self", "output_dir")),
}

# Imported from modules that are not public, within `compat`.
IMPORTED = {
    "accelerate.utils:align_module_device": Touch("weights that are offloaded are brought in", ("module",)),
    "peft.utils.integrations:dequantize_module_weight": Touch("weights in full precision", ("module",)),
    "torch._dynamo:mark_static_address": Touch("tensors of a static cache keep their addresses", ("t",)),
    "transformers.distributed.tensor_parallel:ALL_PARALLEL_STYLES": Touch("the style of plans that cuts DSLA's weights"),
    "transformers.distributed.tensor_parallel:TensorParallelLayer": Touch("the class of such a style"),
    "transformers.masking_utils:ALL_MASK_ATTENTION_FUNCTIONS": Touch("the masks of softmax layers, also where a kernel reads a cache"),
    "transformers.modeling_utils:ALL_ATTENTION_FUNCTIONS": Touch(
        "the attention of softmax layers, where no kernel takes its place, and of heads that a layer keeps"
    ),
    "transformers.models.llama.modeling_llama:eager_attention_forward": Touch(
        'what "eager" means to a base, a function of its module', ("module", "query", "key", "value", "attention_mask")
    ),
    "transformers.initialization:guard_torch_init_functions": Touch("initial values leave loaded weights alone", ()),
    "transformers.masking_utils:create_masks_for_generate": Touch(
        "masks of a static cache", ("config", "inputs_embeds", "attention_mask", "past_key_values")
    ),
}

# Attributes of objects, by their bare names: read and written by functions of `compat` alone.
ATTRIBUTES = {
    "_attn_implementation": Touch("of a config: which attention runs"),
    "_buffers": Touch("of a module: shared by the DSLA view of an attention"),
    "_experts_implementation": Touch("of a config: which experts run"),
    "_forward_hooks": Touch("of a module: with hooks it runs as it is, not fused"),
    "_forward_pre_hooks": Touch("of a module: likewise"),
    "_hf_hook": Touch("of a module: accelerate's mark of offloaded weights"),
    "_hf_peft_config_loaded": Touch("of a model: transformers has put an adapter in, and saves it alone"),
    "_is_hf_initialized": Touch("of a parameter: it was loaded"),
    "_modules": Touch("of a module: the DSLA view has children of its own"),
    "_old_forward": Touch("of a module: what accelerate's hook calls"),
    "_pad_token_tensor": Touch("of generation settings: what is written behind the end of a text"),
    "_parameters": Touch("of a module: shared by the view; parts of cut weights for as long as it computes"),
    "_weight_conversions": Touch("of a model: how its checkpoint names and stacks weights, which that of a hybrid does not"),
    "_version": Touch("of a tensor: how often it was written in place"),
}
