"""Hybrids as models of vLLM: its own classes, in whose converted layers DSLA stands where attention stood."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM

from .mixer import DSLAAttention, DSLAMixer
from .pages import page_parts


class _Hybrid:
    """Put in front of a causal LM class of vLLM; its protocols come last, since they would end the chain of `__init__`."""

    # Each state is replaced as a whole, so a copy of a page at a block's end is all that a cached prefix needs.
    supports_mamba_prefix_caching = True

    def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
        config = vllm_config.model_config.hf_config
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)  # type: ignore[call-arg]
        registered = vllm_config.compilation_config.static_forward_context
        for index in config.get_dsla_config().converted_layers:
            attention: Any = self.model.layers[index].self_attn  # type: ignore[attr-defined]
            softmax = attention.attn
            del registered[softmax.layer_name]  # or vLLM would give it a page, too
            attention.dsla = DSLAMixer(config, attention.scaling, softmax.layer_name)
            attention.attn = DSLAAttention(attention.dsla)
        # As many as a page has tensors: vLLM refuses more. The class cannot know that, its instance does.
        copies = (get_temporal_copy_spec,) * len(page_parts(config, vllm_config.model_config.dtype))
        self.get_mamba_state_copy_funcs = lambda mamba_types: dict.fromkeys(mamba_types, copies)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> Any:
        config = vllm_config.model_config.hf_config
        return tuple(shape for shape, _ in page_parts(config, vllm_config.model_config.dtype))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> Any:
        config = vllm_config.model_config.hf_config
        return tuple(dtype for _, dtype in page_parts(config, vllm_config.model_config.dtype))

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return (get_temporal_copy_spec,) * 3  # at most: states, keys, values


class DSLALlamaForCausalLM(_Hybrid, LlamaForCausalLM, HasInnerState, IsHybrid):
    pass


class DSLAMistralForCausalLM(_Hybrid, MistralForCausalLM, HasInnerState, IsHybrid):
    pass


class DSLAQwen2ForCausalLM(_Hybrid, Qwen2ForCausalLM, HasInnerState, IsHybrid):
    pass


class DSLAQwen3ForCausalLM(_Hybrid, Qwen3ForCausalLM, HasInnerState, IsHybrid):
    pass


class DSLARefused(_Hybrid, LlamaForCausalLM, HasInnerState, IsHybrid):
    """For hybrids of all other types, which `HybridSettings` refuses: vLLM wants to know a class before it asks there."""
