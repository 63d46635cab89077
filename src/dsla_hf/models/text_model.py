"""The causal LM inside a multimodal model, to distil and measure on text alone."""

from __future__ import annotations

import copy
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from ..compat.attributes import attention_implementation
from .adapter_layer import DSLALayer
from .architectures import SUPPORTED_BASES, why_unsupported
from .base_attention import DSLAAttentionMixin
from .multimodal import MULTIMODAL, attention_type, inner_text_config
from .quantised import quantised_weight

OF_AXES = ("mrope_section", "mrope_interleaved")  # of `rope_parameters`
# What a text model does always, and the other type where its config says so.
ALWAYS = {"qwen3_vl_moe_text": {"norm_topk_prob": True}}
# What causal LMs do to logits by their config, and multimodal models over the same decoder do not.
OF_LOGITS = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}
CLOSE = 0.02  # of the largest logit; what is rounded otherwise in bf16 is below


def text_config_alone(config: Any) -> Any:
    """The config of the causal LM inside a multimodal model with this config, named after it; `config` itself if it is none, or its text
    model is of no supported type."""
    text = inner_text_config(config)
    if text is None or getattr(config, "model_type", None) == "dsla" or attention_type(text.model_type) not in SUPPORTED_BASES:
        return config
    values = {name: value for name, value in text.to_dict().items() if name != "model_type"}
    kind = attention_type(text.model_type)
    if kind != text.model_type and values.get("rope_parameters"):
        values["rope_parameters"] = {name: x for name, x in values["rope_parameters"].items() if name not in OF_AXES}
    alone = CONFIG_MAPPING[kind](**values, **ALWAYS.get(text.model_type, {}))
    if config.model_type in MULTIMODAL:
        for name in OF_LOGITS.keys() & values.keys():
            setattr(alone, name, OF_LOGITS[name])
    alone.tie_word_embeddings = bool(config.tie_word_embeddings or text.tie_word_embeddings)
    alone.architectures, alone.name_or_path = None, config.name_or_path
    return alone


def text_model(model: Any) -> PreTrainedModel:
    """The causal LM inside a multimodal model: the same weights, which are not copied, and the same logits of text.

    An adapter of it fits the multimodal model, and the other way round; so a plan can be ranked and distilled on text alone. Where
    positions have three dimensions (Qwen2.5-VL, Qwen3-VL), it is the model that has the same in all three (Qwen2, Qwen3).

    Raises:
        ValueError: if `model` is not multimodal, or its text model is of no supported type, converted or quantised, or gives other logits,
            which is tried on a few tokens, or has other weights than a causal LM of its type.
    """
    config = getattr(model, "config", None)
    inner = inner_text_config(config)
    if config is None or inner is None or not isinstance(model, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no multimodal model of transformers: it has no text model to take out")
    if any(isinstance(module, (DSLALayer, DSLAAttentionMixin)) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} has DSLA layers: take the text model of the original one, and load the adapter over it")
    if (name := quantised_weight(model)) is not None:
        raise ValueError(f"{name} is quantised, and a text model is made of whole weights: load the model without quantization_config")
    if len(places := set(map(str, getattr(model, "hf_device_map", {}).values()))) > 1:
        raise ValueError(f"{type(model).__name__} is spread over {sorted(places)}: load it on one device to take its text model out")
    alone = text_config_alone(config)
    if alone is config:
        raise ValueError(why_unsupported(config))
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    embeddings = model.get_input_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings: load it by AutoModelForImageTextToText")
    alone.tie_word_embeddings = head.weight is embeddings.weight
    with init_empty_weights():
        text: Any = AutoModelForCausalLM.from_config(alone, dtype=model.dtype, attn_implementation=attention_implementation(inner))
    try:
        text.get_decoder().load_state_dict(decoder.state_dict(), assign=True)
        text.get_output_embeddings().load_state_dict(head.state_dict(), assign=True)
    except RuntimeError as error:  # a head with a bias (Ernie 4.5), say
        reason = " ".join(str(error).split())
        raise ValueError(f"the text model of {type(model).__name__} does not make a {type(text).__name__}: {reason}") from None
    text.tie_weights()
    modules = dict(decoder.named_modules())
    for name, module in text.get_decoder().named_modules():  # what no file has, such as frequencies of rotary embeddings
        for buffer, _ in list(module.named_buffers(recurse=False)):
            setattr(module, buffer, getattr(modules[name], buffer))
    text.text_of = config.model_type  # for the card of an adapter, which is of the whole, too
    text.generation_config = copy.deepcopy(model.generation_config)
    _check_same(model, text)
    return text.train(model.training)


@torch.no_grad()
def _check_same(model: Any, text: Any) -> None:
    """Raises ValueError if a multimodal model and its text model give different logits of a text."""
    if model.device.type == "meta":
        return
    image = getattr(model.config, "image_token_id", None)
    ids = torch.tensor([[token for token in range(3, 10) if token != image]], device=model.device)
    training = model.training
    try:
        expected, found = (one.eval()(input_ids=ids, use_cache=False).logits.float() for one in (model, text))
    finally:
        model.train(training)
    if (apart := float((found - expected).abs().max() / expected.abs().max())) > CLOSE:
        raise ValueError(
            f"the text model of {type(model).__name__} as a {type(text).__name__} gives other logits (by {apart:.0%} of the largest): it "
            f"is none of {', '.join(MULTIMODAL)}, which are tested, and must do something that the text model alone does not"
        )
