"""The models that `dsla bench` measures: presets, checkpoints with and without an adapter, hybrids."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from ...levels.table import measured_kept
from ...models.architectures import convertible_layers
from ...models.configuration import DSLAConfig, resolve_level
from ...models.loading import load_adapter, load_config, load_model, read_adapter_config

# Shapes of well-known models, to be filled with random weights; nothing is downloaded.
PRESETS: dict[str, dict[str, Any]] = {
    "llama2-7b": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "llama3-8b": {
        "model_type": "llama",
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    },
    "qwen3-1.7b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
    },
}
LONGEST = 262144  # tokens that presets take
NOT_SHAPE = ("model_type", "architectures", "auto_map", "dsla_config", "dtype", "transformers_version")


def networks(
    model: str, adapter: str | None, levels: list[str] | None, dtype: str, where: torch.device
) -> Iterator[tuple[Any, int, int | None]]:
    """The models to measure with their levels, one at a time: the unconverted one, then the others. Third how many KV heads the level
    keeps, None where levels count layers."""
    preset = model in PRESETS and not Path(model).exists()
    config = preset_config(model) if preset else load_config(model)
    if not preset and config.model_type == "dsla":
        if adapter is not None or levels:
            raise ValueError(f"{model} is a hybrid of one level: leave adapter and levels out")
        base = AutoConfig.for_model(config.base_model_type, **{k: v for k, v in config.to_dict().items() if k not in NOT_SHAPE})
        units = _all_heads(config.get_dsla_config(), base)
        yield ready(random_model(base, config.dtype or torch.float32, where), where), 0, units
        hybrid = ready(load_model(model, dtype), where)
        yield hybrid, hybrid.get_level(), None if units is None else units - hybrid.get_level()
        return
    plan = DSLAConfig(task_type="CAUSAL_LM") if adapter is None else read_adapter_config(adapter)
    units = _all_heads(plan, config)
    if units is not None and not levels:
        wanted = measured_kept(units, units if plan.conversion_order is None else len(plan.conversion_order))[1:]
    else:
        wanted = sorted({resolve_level(level, plan, len(convertible_layers(config))) for level in levels or ["50%", "100%"]} - {0})
    if preset:
        kinds = {"auto": torch.bfloat16, "bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
        network = random_model(config, kinds[dtype], where)
    else:
        network = load_model(model, dtype)
    network = ready(network, where)
    yield network, 0, units
    if not wanted:
        return
    if adapter is None:
        with where:
            network = get_peft_model(network, plan)
        network.base_model.warned_of_untrained = True  # speed does not depend on it
    else:
        del network
        collect()
        network = load_adapter(model, adapter, dtype)
    network = ready(network, where)
    for level in wanted:
        network.set_level(level)
        yield network, level, None if units is None else units - level


def _all_heads(plan: DSLAConfig, config: Any) -> int | None:
    """How many KV heads a base with this config has where levels of the plan count them, else None."""
    return len(convertible_layers(config)) * plan.kv_heads if plan.conversion_unit == "head" else None


def preset_config(name: str) -> Any:
    """The configuration of a preset."""
    values = dict(PRESETS[name])
    theta = values.pop("rope_theta", 10000.0)
    rope = {"rope_type": "default", "rope_theta": theta}
    return AutoConfig.for_model(values.pop("model_type"), **values, rope_parameters=rope, max_position_embeddings=LONGEST)


def random_model(config: Any, dtype: torch.dtype, where: torch.device) -> Any:
    """A model with random weights, made where it is to run."""
    with where:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def ready(network: Any, where: torch.device) -> Any:
    """On its device, and with texts that end only when they are long enough."""
    network = network.to(where).eval()
    network.generation_config.eos_token_id = None
    network.generation_config.pad_token_id = 0
    network.generation_config.do_sample = False
    network.generation_config.temperature = network.generation_config.top_p = network.generation_config.top_k = None
    return network


def collect() -> None:
    """Free what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
