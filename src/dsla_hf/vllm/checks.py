"""Which hybrids vLLM can serve, and how: everything else is refused in one sentence before a weight is loaded."""

from __future__ import annotations

from typing import Any

from ..core.tensor_parallel import check_heads
from .releases import TESTED_VERSIONS, installed_version

# Module and name of vLLM's class of each. Its attention calls `self.attn(q, k, v)` on rotated queries and keys, which is where DSLA goes.
SERVED_BASES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
    "granitemoe": ("granitemoe", "GraniteMoeForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "apertus": ("apertus", "ApertusForCausalLM"),
    "ernie4_5": ("ernie45", "Ernie4_5ForCausalLM"),
    "glm4": ("glm4", "Glm4ForCausalLM"),
    "cohere": ("commandr", "CohereForCausalLM"),
}
# Those of whose attention vLLM loads biases where a config asks for them; of others it leaves them out without a word, or refuses to load.
WITH_BIASES = "llama", "granite", "apertus", "glm4"
BIASES = "attention_bias", "use_bias"


def check_servable(config: Any, tensor_parallel: int = 1, pipeline_parallel: int = 1, speculative: bool = False) -> None:
    """Refuse what the models here do not compute.

    Args:
        config: of the hybrid, a `DSLAHybridConfig`.
        tensor_parallel: vLLM's `tensor_parallel_size`.
        pipeline_parallel: vLLM's `pipeline_parallel_size`.
        speculative: whether it is to decode speculatively.

    Raises:
        ValueError: names what does not fit and what does.
    """
    base = getattr(config, "base_model_type", None)
    if base not in SERVED_BASES:
        raise ValueError(f"vLLM cannot serve a hybrid of type {base!r}: it can those of {', '.join(SERVED_BASES)}; `dsla serve` takes all")
    if window := getattr(config, "sliding_window", None):
        raise ValueError(f"vLLM cannot serve this hybrid of {base}, whose own layers slide (sliding_window={window}): `dsla serve` can")
    if base not in WITH_BIASES and (biased := [name for name in BIASES if getattr(config, name, False)]):
        raise ValueError(
            f"vLLM cannot serve this hybrid of {base}, whose attention has biases ({biased[0]}=True): its class leaves some out; "
            "`dsla serve` can"
        )
    if (getattr(config, "quantization_config", None) or {}).get("kv_cache_scheme"):
        raise ValueError(
            "vLLM cannot serve DSLA hybrids with scales of keys and values (kv_cache_scheme in quantization_config): quantise the "
            "weights of linear layers alone"
        )
    check_heads(config.num_key_value_heads, tensor_parallel)
    if pipeline_parallel != 1:
        raise ValueError(
            f"vLLM cannot serve DSLA hybrids with pipeline_parallel_size={pipeline_parallel}: use pipeline_parallel_size=1, and "
            "tensor_parallel_size for several GPUs"
        )
    if speculative:
        raise ValueError("vLLM cannot serve DSLA hybrids with speculative decoding: leave --speculative-config out")


def check_pages(kv_heads: int, kept: dict[int, int], layouts: bool) -> None:
    """Refuse kept heads whose pages vLLM cannot fit together.

    Args:
        kv_heads: that a rank has of a layer that keeps all.
        kept: how many of these a rank keeps at most, of each layer that has converted ones.
        layouts: `releases.has_cache_layouts()`; without, all pages must be as large as the largest, by more tokens.

    Raises:
        ValueError: names a layer whose kept heads do not divide those of a whole one.
    """
    for layer, count in {} if layouts else kept.items():
        if count and kv_heads % count:
            raise ValueError(
                f"vLLM {installed_version()} cannot serve this hybrid, of whose layer {layer} {count} of {kv_heads} KV heads are kept: "
                f"let it be a number that divides {kv_heads}, or take vLLM {TESTED_VERSIONS[-1]}"
            )
