"""What an adapter asks of the model that it is put over or merged into: refused before anything is changed."""

from __future__ import annotations

from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..core.tensor_parallel import check_heads, cuts_heads, is_tensor_parallel
from .adapter_layer import DSLALayer
from .architectures import convertible_layers, kv_heads_of, projection, text_base_of, why_impossible, why_unsupported
from .configuration import DSLAConfig
from .decoder import attentions_of
from .fingerprint import check_base, fingerprint_of
from .level import dsla_layers
from .multimodal import inner_text_config, text_config_of
from .quantised import dequantised, quantised_weight
from .trial.records import may_convert


def check_full_precision(model: Any) -> None:
    """Refuse a merge over quantised weights: a hybrid is made of whole ones."""
    quantiser = getattr(model, "hf_quantizer", None)
    method = getattr(getattr(quantiser, "quantization_config", None), "quant_method", None)
    name = quantised_weight(model)
    name = name and name.replace(".base_layer", "")
    if name is None and (quantiser is None or method == "gguf"):  # weights of a GGUF file that are not packed were dequantised
        return
    raise ValueError(
        f"the base is quantised ({name or 'by quantization_config'}), and a hybrid is made of weights in full precision: load the base "
        "without quantization_config, merge and save; then load the hybrid with quantization_config, or quantize_() it"
    )


def check_readable(attention: Any, config: DSLAConfig) -> None:
    """Refuse a base of whose weights no trained copy can be made."""
    for name in config.trained_projections:
        linear = projection(attention, name)[0]
        if dequantised(linear) is None:
            raise ValueError(
                f"{name} of layer {attention.layer_idx} is a {type(linear).__name__}, whose weights DSLA cannot copy in full precision: "
                "load the base without quantization_config (a GGUF file: with GgufConfig(dequantize=True)), or in 4 or 8 bits by "
                "bitsandbytes or torchao"
            )


def check_model(model: Any, config: DSLAConfig) -> None:
    if isinstance(model, (PeftModel, PeftMixedModel)):
        raise ValueError(
            f"this is a {type(model).__name__} already: a second DSLA adapter is added by model.add_adapter(name, DSLAConfig(...)); one of "
            "another PEFT method must be merged first, with merge_and_unload(), or taken off"
        )
    base = getattr(model, "config", None)
    supported = text_base_of(base) is not None
    if (obstacle := why_impossible(text_config_of(base) if supported else base)) is not None:
        raise ValueError(obstacle)
    if not supported and not may_convert(getattr(base, "model_type", None), config):
        raise ValueError(why_unsupported(base))
    if "disk" in getattr(model, "hf_device_map", {}).values():
        raise ValueError(
            "the base has layers on disk, over which PEFT cannot load an adapter that wraps whole attention modules: load the base in "
            "memory, or save a hybrid (merge_and_unload) and load that with the same device_map"
        )
    if is_tensor_parallel(model) and inner_text_config(model.config) is not None:
        raise NotImplementedError("tensor parallel of multimodal models is not supported: load the base without tp_plan")
    if cuts_heads(model):
        check_heads(kv_heads_of(model.config), model.tp_size)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, DSLALayer):
            raise ValueError(
                f"{name} carries another PEFT adapter ({type(module).__name__}): call merge_and_unload() on that one first, then convert"
            )


def record_base(config: DSLAConfig, model: Any) -> None:
    """Write type, sizes and fingerprint of the base into a new config; compare them with those of a loaded one."""
    base = text_config_of(model.config)
    base_type = text_base_of(model.config) or base.model_type
    attentions: Any = [getattr(attention, "base_layer", attention) for attention in attentions_of(model)]
    dimensions = {
        "num_hidden_layers": base.num_hidden_layers,
        "hidden_size": base.hidden_size,
        "num_attention_heads": base.num_attention_heads,
        "num_key_value_heads": kv_heads_of(base),
        "head_dim": next(attention.head_dim for attention in attentions if attention is not None),
    }
    if len(softmax := convertible_layers(base)) < base.num_hidden_layers:
        dimensions["convertible_layers"] = softmax
    attention = {i: attentions[i] for i in config.layers_to_transform or ()}
    if config.base_model_type is None:
        config.base_model_type, config.base_dimensions, config.base_fingerprint = base_type, dimensions, fingerprint_of(attention)
        return
    for what, recorded, found in (
        ("model type", config.base_model_type, base_type),
        ("sizes", config.base_dimensions, dimensions),
    ):
        if recorded != found:
            raise ValueError(
                f"this DSLA adapter was made for another base model: its {what} {recorded}, this model's {found} "
                "(a DSLAConfig belongs to one base: make a new one for another)"
            )
    if config.base_fingerprint:
        check_base(config.base_fingerprint, attention, config.base_model_name_or_path, config.trained_projections)


def check_finite(model: nn.Module) -> None:
    """Refuse a merge of broken weights, as `safe_merge` asks."""
    for layer in dsla_layers(model).values():
        name: Any = layer.adapter_name
        modules: Any = [getattr(layer, part) for part in layer.adapter_layer_names] if layer.converted else []
        if not all(p.isfinite().all() for module in modules if name in module for p in module[name].parameters()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken (layer {layer.layer_idx})")
