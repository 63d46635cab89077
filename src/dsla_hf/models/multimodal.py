"""Models that read images beside text: which are tested, and the text model inside, whose layers DSLA converts in place.

What reads images stays as it is, and hands its tokens to the text model among those of the text. All else is that of the text model: its
sizes, its attention, the layers of a plan. So an adapter of the text model alone fits the whole, and the other way round.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Multimodal:
    """image_blocks: tokens of an image see those behind them in it, which a state cannot: images are read at level 0. notes: for the table
    in the docs."""

    image_blocks: bool = False
    notes: str = ""


MULTIMODAL: dict[str, Multimodal] = {
    "aya_vision": Multimodal(notes="over any supported text model"),
    "gemma3": Multimodal(image_blocks=True, notes="images at level 0; it may rise behind the prompt"),
    "idefics3": Multimodal(notes="over any supported text model"),
    "internvl": Multimodal(notes="over any supported text model"),
    "llava": Multimodal(notes="over any supported text model"),
    "llava_next": Multimodal(notes="over any supported text model"),
    "llava_onevision": Multimodal(notes="over any supported text model"),
    "mistral3": Multimodal(notes="over any supported text model"),
    "qwen2_5_vl": Multimodal(notes="positions in three dimensions"),
    "qwen2_vl": Multimodal(notes="positions in three dimensions"),
    "qwen3_vl": Multimodal(notes="positions in three dimensions, interleaved; features of several depths of the vision model"),
    "qwen3_vl_moe": Multimodal(notes="as Qwen3-VL; mixture of experts"),
    "smolvlm": Multimodal(notes="over any supported text model"),
}

# Text models inside which are another one whose positions have three dimensions. Each rotary pair follows one of them, so a decay per pair
# commutes with its rotation as ever; text has the same position in all three, and is the other model's.
SAME_ATTENTION = {
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_moe_text": "qwen3_moe",
    "qwen3_vl_text": "qwen3",
}


def inner_text_config(config: Any) -> Any:
    """The config of the text model inside a multimodal one, None if it is a text model itself."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    return None if text is config or not getattr(text, "model_type", None) else text


def text_config_of(config: Any) -> Any:
    """The config that has the sizes of the decoder: of a multimodal model that of its text model, else itself."""
    text = inner_text_config(config)
    return config if text is None else text


def attention_type(model_type: str) -> str:
    """The type whose attention a text model has."""
    return SAME_ATTENTION.get(model_type, model_type)


def auto_class_of(model_type: str | None) -> str:
    """The Auto class of transformers that loads models of this type, and hybrids over them."""
    return "AutoModelForImageTextToText" if model_type in MULTIMODAL else "AutoModelForCausalLM"


def reads_image_blocks(model_type: str | None) -> bool:
    """Whether a model of this type lets tokens of an image see those behind them."""
    return model_type in MULTIMODAL and MULTIMODAL[model_type].image_blocks
