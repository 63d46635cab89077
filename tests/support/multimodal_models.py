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
PINPOINTS = [[12, 24], [24, 12], [24, 24]]
BY_ID = ("internvl", "smolvlm", "idefics3")  # whose config calls the token of an image `image_token_id`
PARTS = {"smolvlm": (1,), "idefics3": (1,), "llava_next": (3,), "llava_onevision": (3,)}  # of an image, read apart
SIZED = {"mistral3": [12, 12], "llava_next": [12, 24], "llava_onevision": [12, 24]}  # images that come with their size
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
    "qwen2_vl": {
        "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        "text": ("qwen2_vl_text", {"head_dim": None, "rope_parameters": AXES}),
    },
    "qwen3_vl_moe": {
        "vision_config": {**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
        "text": (
            "qwen3_vl_moe_text",
            {"head_dim": 12, "rope_parameters": WIDE_AXES, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ),
    },
    "internvl": {
        "vision_config": {**SIGLIP, "model_type": "internvl_vision", "image_size": [12, 12], "patch_size": [3, 3]},
        "image_seq_length": 4,
        "text": ("qwen3", {"head_dim": 12}),
    },
    "mistral3": {
        "vision_config": {**SIGLIP, "model_type": "pixtral", "head_dim": 8},
        "text": ("mistral", {"head_dim": 12, "rope_parameters": YARN}),
    },
    "llava_next": {"vision_config": CLIP, "image_grid_pinpoints": PINPOINTS, "text": ("mistral", {"sliding_window": None})},
    "llava_onevision": {"vision_config": SIGLIP, "image_grid_pinpoints": PINPOINTS, "text": ("qwen2", {"rope_parameters": YARN})},
    "aya_vision": {
        "vision_config": SIGLIP,
        "downsample_factor": 2,
        "vision_feature_layer": -1,
        "text": ("cohere2", {"layer_types": ["full_attention"] * 4}),
    },
    "idefics3": {"vision_config": SIGLIP, "text": ("llama", {"rope_parameters": YARN, "attention_bias": True})},
    "smolvlm": {
        "vision_config": {**SIGLIP, "model_type": "smolvlm_vision"},
        "text": ("llama", {"rope_parameters": YARN, "attention_bias": True}),
    },
    "gemma3": {
        "vision_config": SIGLIP,
        "mm_tokens_per_image": 16,
        "text": ("gemma3_text", {"query_pre_attn_scalar": 5, "rope_parameters": BY_TYPE}),
    },
}
KINDS = tuple(OPTIONS)
TIED = ("aya_vision", "gemma3", "internvl", "qwen3_vl")
# One each of what types differ in: plain; three dimensions of positions; image blocks; another place for the text model.
DAILY = ("llava", "qwen3_vl", "gemma3", "smolvlm")
# Tokens of an image, where not 4.
TOKENS = {"gemma3": 16, "llava": 16, "llava_next": 52, "llava_onevision": 52}


def tiny_multimodal(kind, uneven=False, tied=None, over=None, **text):
    """A small random multimodal model; keyword arguments go to the config of its text model. tied: whether its head has the weights of its
    embeddings, None: as most checkpoints of the type. over: another type of text model, where there is a choice.

    uneven: norms and biases, which start at 0 or 1, are moved, so that one that is left out or of the wrong head is seen.
    """
    options = dict(OPTIONS[kind])
    text_kind, particulars = options.pop("text") if over is None else (over, {})
    options.pop("text", None)
    particulars = {name: value for name, value in {**particulars, **text}.items() if value is not None}
    if "qwen" in kind:  # text models that are none by themselves
        sizes = {name: value for name, value in SIZES.items() if name != "head_dim"}
        text_config = {"model_type": text_kind, **sizes, **particulars}
    else:
        text_config = tiny_config(text_kind, **particulars).to_dict()
    tokens = {"image_token_id" if "qwen" in kind or kind in BY_ID else "image_token_index": IMAGE}
    if "qwen" in kind:
        tokens |= {"video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
    text_config["tie_word_embeddings"] = tied = kind in TIED if tied is None else tied
    config = AutoConfig.for_model(kind, text_config=text_config, tie_word_embeddings=tied, **tokens, **options)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mm_input_projection" in name:  # Gemma's, which starts at 0
                parameter.normal_(std=0.5)
            if uneven and ("language_model" in name or "text_model" in name) and (parameter.ndim == 1 or parameter.shape[0] in (2, 4)):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def prompt_with_images(model, rows=2, before=5, after=19):
    """What a processor gives: ids `[rows, before + tokens of an image + after]`, and what goes with them; another image for each row."""
    kind = model.config.model_type if model.config.model_type != "dsla" else model.config.base_model_type
    count = TOKENS.get(kind, 4)
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
        images = (rows, *PARTS[kind]) if kind in PARTS else (rows,)
        inputs["pixel_values"] = torch.randn(*images, 3, 12, 12)
        if kind in SIZED:
            inputs["image_sizes"] = torch.tensor([SIZED[kind]] * rows)
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
