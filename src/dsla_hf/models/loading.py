"""Checkpoints and adapters by the names that a user gives: folders, names on the hub, GGUF files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from .architectures import SUPPORTED_BASES, why_impossible, why_unsupported
from .base_attention import NO_HEADS
from .configuration import DSLAConfig, resolve_level
from .multimodal import inner_text_config
from .text_model import text_config_alone, text_model

logger = logging.get_logger(__name__)


def source(model: str) -> tuple[str, dict[str, Any]]:
    """What transformers' `from_pretrained` takes for a checkpoint: a name, and options. A GGUF file is named behind its folder or
    repository."""
    folder, _, file = model.rpartition("/")
    return (folder or ".", {"gguf_file": file}) if file.endswith(".gguf") else (model, {})


def load_config(model: str) -> Any:
    """The config of a checkpoint; of a multimodal one that of its text model.

    Raises:
        ValueError: if it is of a kind that transformers does not know, or multimodal without a text model that is supported.
        OSError: if a file is missing.
    """
    name, options = source(model)
    try:
        config = AutoConfig.from_pretrained(name, **options)
    except ValueError as error:
        raise ValueError(f"{model}: its config.json cannot be read: {_first_sentence(error)}") from None
    alone = text_config_alone(config)
    if alone is not config or inner_text_config(config) is None:
        return alone
    if config.model_type == "dsla":
        raise ValueError(
            f"{model} is a hybrid that reads images, too, and commands run text models: use it from Python, as docs/multimodal.md says, or "
            "give the original model and its adapter"
        )
    raise ValueError(f"{model}: {why_unsupported(config)}")


def load_tokenizer(model: str) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: if there is none, or it is damaged.
        OSError: if a file is missing.
    """
    name, options = source(model)
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except ValueError as error:
        raise ValueError(
            f"{model} has no tokenizer that can be read ({_first_sentence(error)}): copy the tokenizer's files of the original "
            "checkpoint into it"
        ) from None


def check_convertible(model: str, config: Any, allow_untested: bool = False) -> None:
    """Raises ValueError if DSLA cannot replace the attention of a checkpoint with this config. Of a type that has not been tested only the
    small models of `trial` can tell; `allow_untested` leaves it to them."""
    if why_impossible(config) is None and (config.model_type in SUPPORTED_BASES or allow_untested):
        return
    raise ValueError(f"{model}: {why_unsupported(config)}")


def load_processor(model: str) -> Any:
    """What prepares inputs of a checkpoint: its tokenizer, of a multimodal one its processor, which has one. Says so where there is none.

    Raises:
        ValueError, OSError: as `load_tokenizer`.
    """
    name, options = source(model)
    tokenizer = load_tokenizer(model)
    if options or inner_text_config(AutoConfig.from_pretrained(name)) is None:
        return tokenizer
    try:
        return AutoProcessor.from_pretrained(name)
    except (ValueError, OSError) as error:
        logger.warning(f"{model} has no processor of images that can be read, so its tokenizer alone is taken ({_first_sentence(error)})")
        return tokenizer


def _first_sentence(error: Exception) -> str:
    """Of what transformers says: its further sentences are lists of everything it knows, and hints for its own developers."""
    return " ".join(str(error).split()).split(". ")[0][:300]


def level_to_run_at(
    model: str, base_config: Any, adapter: str | None, level: int | str | None, names: tuple[str, str] = ("--adapter", "--level")
) -> int | None:
    """The level to set, None where there is none; `names` are what the user calls adapter and level.

    Raises:
        ValueError: for an adapter or a level that `model` cannot have.
    """
    if base_config.model_type == "dsla":
        hybrid = base_config.get_dsla_config()
        units = f"{hybrid.conversion_unit}s {sorted(hybrid.conversion_order)}"
        given = " and ".join(name for name, value in zip(names, (adapter, level), strict=True) if value is not None)
        if given:
            raise ValueError(
                f"{given} cannot be had with {model}: it is a hybrid, merged with {units} as DSLA and without "
                "their softmax weights; levels need the original model and its adapter"
            )
        return None
    if adapter is None:
        if level is not None:
            raise ValueError(f"{names[1]} needs {names[0]}: {model} alone has no DSLA layers")
        return None
    config = read_adapter_config(adapter)
    # Without a level, that of the adapter; None there is the whole plan.
    return config.level if level is None else resolve_level(level, config, base_config.num_hidden_layers)


def check_whole_layers(command: str, base_config: Any, adapter: str | None) -> None:
    """Raises ValueError for an adapter, or a hybrid, of which this command cannot do with layers converted in part."""
    if adapter is not None:
        heads = read_adapter_config(adapter).conversion_unit == "head"
    else:
        heads = base_config.model_type == "dsla" and bool(base_config.get_dsla_config().converted_heads)
    if heads:
        raise ValueError(f"{command}: {NO_HEADS}")


def read_adapter_config(adapter: str) -> DSLAConfig:
    """The configuration of a DSLA adapter, without its weights.

    Raises:
        ValueError: if there is no adapter, or one of another method.
    """
    path = Path(adapter)
    if path.exists() and not (path / "adapter_config.json").is_file():
        raise ValueError(f"{adapter} is not an adapter: it has no adapter_config.json")
    config = PeftConfig.from_pretrained(adapter)
    if not isinstance(config, DSLAConfig):
        raise ValueError(f"{adapter} holds a {getattr(config.peft_type, 'value', config.peft_type)} adapter, not a DSLA adapter")
    return config


def load_model(model: str, dtype: str, cut: bool = False) -> Any:
    """A checkpoint on the CPU, of a multimodal one its text model; `dtype` "auto" is the one it was saved in. cut: over the processes of
    torch.distributed, each of which has its part on its own device.

    Raises:
        ValueError: if it is of an unknown kind, a file of weights is damaged, or it cannot be cut.
        OSError: if a file is missing.
    """
    network = load_whole(model, dtype, cut)
    return network if inner_text_config(network.config) is None else text_model(network)


def load_whole(model: str, dtype: str, cut: bool = False) -> Any:
    """As `load_model`, but of a multimodal checkpoint all of it."""
    name, options = source(model)
    if cut:
        if options:
            raise ValueError(f"{model}: GGUF files are not cut over processes: give a checkpoint, or one process")
        options = {"tp_plan": "auto"}
    multimodal = "gguf_file" not in options and inner_text_config(AutoConfig.from_pretrained(name)) is not None
    auto_class: Any = AutoModelForImageTextToText if multimodal else AutoModelForCausalLM
    try:
        network = auto_class.from_pretrained(name, dtype=dtype, **options)
    except SafetensorError as error:
        raise ValueError(f"{model}: its weights are damaged or incomplete ({error}): copy or download it again") from None
    except ValueError as error:
        if "nrecognized configuration class" not in str(error):
            raise
        raise ValueError(f"{model} writes no text by itself: give a causal language model, such as a Llama") from None
    if "gguf_file" in options:  # dequantised as it was read, though transformers marks it as quantised and would not train over it
        network.hf_quantizer.remove_quantization_config(network)
    return network


def load_adapter(model: str, adapter: str, dtype: str, trainable: bool = False, base: Any = None) -> Any:
    """A checkpoint with the adapter on it, on the CPU; `dtype` is that of the checkpoint, `base` the checkpoint if it is loaded already.

    Raises:
        ValueError: if the adapter is not of this checkpoint, or a file of weights is damaged.
        OSError: if a file is missing.
    """
    base = load_model(model, dtype) if base is None else base
    try:
        return PeftModel.from_pretrained(base, adapter, is_trainable=trainable)
    except SafetensorError as error:
        raise ValueError(f"{adapter}: its weights are damaged or incomplete ({error})") from None


def num_layers(model: str) -> int:
    """How many decoder layers a checkpoint has, by its configuration."""
    return load_config(model).num_hidden_layers


def device() -> str:
    """Where commands run: a GPU if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_at_least_one(name: str, value: int) -> None:
    """Raises ValueError if it is not."""
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")
