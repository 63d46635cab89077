"""A page of states, to vLLM a layer with a cache: whichever layers' states it holds."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.v1.attention.backends.linear_attn import LinearAttentionBackend, LinearAttentionMetadata, LinearAttentionMetadataBuilder
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from .prefills import Prefill
from .releases import has_cache_layouts


@dataclass
class StatePageMetadata(LinearAttentionMetadata):
    """What mixers are told of a step.

    pages: int32 `[num_decodes]`, where each request's states lie; -1 of what only fills up a recorded batch.
    lengths: int64 `[num_decodes]`, tokens that the states have seen. Both at the same place in every step, where graphs find them.
    prefills: the other requests, in order.
    """

    pages: Tensor
    lengths: Tensor
    prefills: tuple[Prefill, ...]


class StatePageMetadataBuilder(LinearAttentionMetadataBuilder):
    """Makes `StatePageMetadata` once a step, so that no mixer waits for the device."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        recorded = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        most = max(vllm_config.scheduler_config.max_num_seqs, recorded)
        self.pages = torch.full((most,), -1, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(most, dtype=torch.int64, device=device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> StatePageMetadata:
        own = super().build(common_prefix_len, common_attn_metadata, fast_build)
        decodes, requests = own.num_decodes, own.num_decodes + own.num_prefills
        pages, lengths = self.pages[:decodes], self.lengths[:decodes]
        found = own.state_indices_tensor[:decodes]
        pages.copy_(torch.where(found > 0, found, -1))  # vLLM's block 0 is nobody's
        lengths.copy_((own.seq_lens[:decodes] - 1).clamp_min(0))
        prefills: list[Prefill] = []
        if own.num_prefills:
            starts = common_attn_metadata.query_start_loc_cpu[decodes : requests + 1].tolist()
            known = common_attn_metadata.seq_lens_cpu_upper_bound  # of a prefill it is no bound but the length
            ends = (own.seq_lens if known is None else known)[decodes:requests].tolist()
            prefills = [Prefill(i, j, length - (j - i)) for (i, j), length in zip(pairwise(starts), ends, strict=True)]
        inherited = {field.name: getattr(own, field.name) for field in fields(LinearAttentionMetadata)}
        return StatePageMetadata(**inherited, pages=pages, lengths=lengths, prefills=tuple(prefills))


class StatePageBackend(LinearAttentionBackend):
    """vLLM's metadata of layers with states, and that of mixers: lengths and pages, decodes before prefills."""

    @staticmethod
    def get_name() -> str:
        return "DSLA"

    @staticmethod
    def get_builder_cls() -> type[StatePageMetadataBuilder]:
        return StatePageMetadataBuilder

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
