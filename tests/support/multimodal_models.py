"""Small random multimodal models with unusual settings, and prompts with images for them."""

import copy

import torch
from tiny import SIZES, YARN, tiny_config
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

IMAGE = 90  # the token that stands for a part of an image
NOT_TEXT = {"tie_word_embeddings", "initializer_range"}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,  # layers with `self_attn`, numbered as those of the text model
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 3,
}
CLIP = {**SIGLIP, "model_type": "clip_vision_model"}
QWEN = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
AXES = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}  # of the 4 pairs of a head of 8 channels
WIDE_AXES = {**AXES, "mrope_section": [2, 2, 2]}  # of 12
BY_TYPE = {"full_attention": {**YARN, "rope_theta": 20000.0}, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0}}

# Of each type what its config has beside the sizes of text models. Heads are wider than the hidden states where a type can have it.
OPTIONS = {
    "llava": {"vision_config": CLIP, "vision_feature_layer": -2, "image_seq_length": 16, "text": ("llama", {"rope_parameters": YARN})},
    "qwen3_vl": {
        "vision_config": {**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        "text": ("qwen3_vl_text", {"head_dim": 12, "rope_parameters": WIDE_AXES, "attention_bias": True}),
    },
    "qwen2_5_vl": {
        "vision_config": {**QWEN, "fullatt_block_indexes": [1], "window_size": 16},
        "text": ("qwen2_5_vl_text", {"head_dim": None, "rope_parameters": AXES}),
    },
    "gemma3": {
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 16,
        "text": ("gemma3_text", {"query_pre_attn_scalar": 5, "rope_parameters": BY_TYPE}),
    },
}
KINDS = tuple(OPTIONS)


def tiny_multimodal(kind, uneven=False, **text):
    """A small random multimodal model; keyword arguments go to the config of its text model.

    uneven: norms and biases, which start at 0 or 1, are moved, so that one that is left out or of the wrong head is seen.
    """
    options = dict(OPTIONS[kind])
    text_kind, particulars = options.pop("text")
    particulars = {name: value for name, value in {**particulars, **text}.items() if value is not None}
    if text_kind in ("llama", "gemma3_text", "mistral", "qwen2", "qwen3"):
        text_config = tiny_config(text_kind, **particulars).to_dict()
    else:
        sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
        text_config = {"model_type": text_kind, **sizes, **particulars}
    tokens = {"image_token_id": IMAGE} if "qwen" in kind else {"image_token_index": IMAGE}
    if "qwen" in kind:
        tokens |= {"video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    config = AutoConfig.for_model(kind, text_config=text_config, tie_word_embeddings=True, **tokens, **options)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mm_input_projection" in name:  # Gemma's, which starts at 0
                parameter.normal_(std=0.5)
            if uneven and "language_model" in name and (parameter.ndim == 1 or parameter.shape[0] in (2, 4)):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompt_with_images(model, rows=2, before=5, after=19):
    """What a processor gives: ids `[rows, before + 16 + after]`, or with 4 tokens of an image for Qwen, and what goes with them; another
    image for each row. The text of each row is the longer the later it comes: others are padded on the left."""
    kind = model.config.model_type if model.config.model_type != "dsla" else model.config.base_model_type
    count = 4 if "qwen" in kind else 16
    total = before + count + after
    ids = torch.randint(2, 90, (rows, total))
    ids[:, before : before + count] = IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    types = (ids == IMAGE).long()
    if "qwen" in kind:
        inputs |= {
            "pixel_values": torch.randn(rows * 16, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
            "mm_token_type_ids": types,
        }
    else:
        inputs["pixel_values"] = torch.randn(rows, 3, 12, 12)
        if kind == "gemma3":
            inputs["token_type_ids"] = types
    return inputs


def without_images(inputs):
    """The same prompt as text alone."""
    ids = inputs["input_ids"].clone()
    ids[ids == IMAGE] = 7
    return {"input_ids": ids, "attention_mask": inputs["attention_mask"]}


def save_llava(folder, text_config, tokenizer):
    """A LLaVA over a text model with these sizes, with its processor."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vision = CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1, image_size=8, patch_size=4)
    text = text_config.__class__(**{**text_config.to_dict(), "vocab_size": len(tokenizer)})
    image = tokenizer.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    strategy = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(image_processor=images, tokenizer=tokenizer, **strategy).save_pretrained(folder)
