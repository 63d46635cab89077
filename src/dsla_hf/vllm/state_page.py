"""A page of states, to vLLM a layer with a cache: whichever layers' states it holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from .releases import has_cache_layouts


class StatePageBackend(LinearAttentionBackend):
    """vLLM's metadata of layers with states: lengths and slots, decodes before prefills."""

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """All, first those by which vLLM packs pages of different sizes into a block: otherwise each is padded to the largest."""
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return KVCacheLayout.BLNHC, KVCacheLayout.BLHNC, KVCacheLayout.LBNHC, KVCacheLayout.LBHNC


class StatePage(MambaBase):
    """Where some mixers keep their states.

    Args:
        parts: shape and dtype of its tensors.
        prefix: its name in vLLM.
    """

    mamba_type = MambaAttentionBackendEnum.LINEAR

    def __init__(self, parts: tuple[tuple[tuple[int, ...], torch.dtype], ...], prefix: str) -> None:
        self.parts, self.prefix = parts, prefix
        register(prefix, self)
        self.kv_cache: tuple[Tensor, ...] = (torch.tensor([]),)  # vLLM puts its own here

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return tuple(shape for shape, _ in self.parts)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return tuple(dtype for _, dtype in self.parts)

    def get_attn_backend(self) -> type[StatePageBackend]:
        return StatePageBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """Of its own size where vLLM can pack pages of different sizes; it pads them where it must."""
        spec: Any = super().get_kv_cache_spec(vllm_config)
        return replace(spec, page_size_padded=None) if has_cache_layouts() else spec


def register(prefix: str, layer: Any) -> None:
    """Let vLLM know a layer by its name."""
    get_current_vllm_config().compilation_config.static_forward_context[prefix] = layer
