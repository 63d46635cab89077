"""What `dsla merge` does. Everything cheap is checked before weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..core.files import written_whole
from ..models.configuration import resolve_level
from ..models.loading import load_adapter, load_processor, load_whole, num_layers, read_adapter_config
from ..models.saving import WEIGHT_FILES, check_hybrid_directory, name_model


def merge(model: str, adapter: str, level: int | str, output: str, *, dtype: str = "auto") -> Any:
    """Save the adapter merged at one level, a hybrid checkpoint with the tokenizer of the base (where that reads images with what prepares
    them), and return the hybrid.

    Raises:
        ValueError: for level 0, a level above the plan, an adapter of another base, or an output that holds another model.
        OSError: if a file is missing.
    """
    number = resolve_level(level, read_adapter_config(adapter), num_layers(model))
    if number == 0:
        raise ValueError(f"level {level} converts no layer: the merged model would be {model} itself; levels to merge start at 1")
    if Path(output).is_file():
        raise ValueError(f"{output} is a file: give a folder to save into")
    processor = load_processor(model)
    tuned = load_adapter(model, adapter, dtype, base=load_whole(model, dtype))
    tuned.set_level(number)
    config = tuned.peft_config["default"]
    layers, heads = sorted(config.converted_layers), len(config.converted_heads)
    hybrid = tuned.merge_and_unload()
    check_hybrid_directory(Path(output), hybrid.config)
    with written_whole(Path(output), WEIGHT_FILES) as temporary:
        processor.save_pretrained(temporary)
        hybrid.save_pretrained(temporary)
    name_model(hybrid, output)
    others = f", and {heads} heads of others" if heads else ""
    print(f"hybrid saved in {output}: layers {layers} of {num_layers(model)} are DSLA{others} (level {number})")
    return hybrid
