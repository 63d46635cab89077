"""What vLLM is told of a hybrid before it decides anything: whether it can be served, and that some of its layers have states."""

from __future__ import annotations

from typing import Any

from vllm import envs
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from .checks import check_pages, check_servable
from .ranks import heads_by_layer
from .releases import has_cache_layouts

__all__ = ["MODELS_CONFIG_MAP", "HybridSettings"]


class HybridSettings(VerifyAndUpdateConfig):
    """What vLLM calls with its settings of a hybrid, by the name of its model class (`MODELS_CONFIG_MAP`)."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Refuse what cannot be served, and name the layers with states in `layer_types`, where the base has any.

        vLLM takes a model whose `layer_types` are all "full_attention" for one without states, whatever its class says. In transformers
        they are what the base's layers are, so that a hybrid's config has them so (Qwen2, Qwen3).

        Raises:
            ValueError: as `check_servable`.
        """
        config = model_config.hf_config
        check_servable(config)
        if getattr(config, "layer_types", None) is None:
            return
        converted = {*config.get_dsla_config().layers_to_transform}
        config.layer_types = ["linear_attention" if i in converted else "full_attention" for i in range(config.num_hidden_layers)]
        # As every layer of what is not refused attends to all: vLLM's Qwen2 asks for this where `layer_types` differ.
        config.max_window_layers = config.num_hidden_layers

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse settings with which a hybrid cannot be served, and on a CPU let pages of different sizes share blocks.

        Raises:
            ValueError: as `check_servable` and `check_pages`.
        """
        config, parallel = vllm_config.model_config.hf_config, vllm_config.parallel_config
        ranks, speculative = parallel.tensor_parallel_size, vllm_config.speculative_config is not None
        check_servable(config, ranks, parallel.pipeline_parallel_size, speculative)
        kept = {layer: heads.most_kept for layer, heads in heads_by_layer(config, ranks).items()}
        check_pages(config.num_key_value_heads // ranks, kept, has_cache_layouts())
        if has_cache_layouts() and current_platform.is_cpu() and envs.VLLM_KV_CACHE_LAYOUT is None:
            # What `StatePageBackend` asks for. vLLM's attention on CPUs does not offer it, but takes blocks of any stride.
            vllm_config.cache_config.kv_cache_layout = "BLHNC"
