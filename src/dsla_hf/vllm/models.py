"""Hybrids as models of vLLM: its own classes, in whose converted layers DSLA stands where attention stood."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.mamba.mamba_utils import get_temporal_copy_spec
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid
from vllm.model_executor.models.llama import LlamaForCausalLM

from ..models.hybrid import hybrid_classes
from .checks import SERVED_BASES
from .kept_heads import backend_of_kept_heads
from .mixer import OPERATOR, DSLAAttention, DSLAHeadsAttention, DSLAMixer
from .pages import page_parts, places
from .ranks import RankHeads, heads_by_layer, own_part
from .state_page import StatePage


def _page_parts(vllm_config: Any) -> Any:
    """What a page holds: as many heads as a rank has of the layer with the most converted ones."""
    model, ranks = vllm_config.model_config, vllm_config.parallel_config.tensor_parallel_size
    most = max(heads.most_converted for heads in heads_by_layer(model.hf_config, ranks).values())
    return page_parts(model.hf_config, model.dtype, most)


def _convert(attention: Any, name: str, heads: RankHeads, page: StatePage, first: int, vllm_config: Any) -> None:
    """Put DSLA into an attention layer of vLLM with this name, in these of its KV heads; `page`, `first` as in `DSLAMixer`."""
    config, softmax = vllm_config.model_config.hf_config, attention.attn
    queries = softmax.num_heads // softmax.num_kv_heads
    del vllm_config.compilation_config.static_forward_context[softmax.layer_name]  # or vLLM would give it pages, too
    mixer = None
    if heads.converted:
        # By the name that its weights have in a hybrid's checkpoint.
        mixer = attention.dsla = DSLAMixer(config, len(heads.converted), attention.scaling, f"{name}.dsla", page, first)
    if mixer is not None and not heads.most_kept:
        attention.attn = DSLAAttention(mixer)
        return
    kept = type(softmax)(
        heads.most_kept * queries,
        softmax.head_size,
        attention.scaling,
        num_kv_heads=heads.most_kept,
        cache_config=vllm_config.cache_config,
        quant_config=softmax.quant_config,
        prefix=softmax.layer_name,
        attn_backend=backend_of_kept_heads(softmax.attn_backend, queries),
    )
    attention.attn = DSLAHeadsAttention(heads, queries, kept, mixer)


class _Hybrid:
    """Put in front of a causal LM class of vLLM; its protocols come last, since they would end the chain of `__init__`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "", **options: Any) -> None:
        config = vllm_config.model_config.hf_config
        split = vllm_config.compilation_config.splitting_ops
        if split and OPERATOR not in split:
            split.append(OPERATOR)
        super().__init__(vllm_config=vllm_config, prefix=prefix, **options)  # type: ignore[call-arg]
        self.dsla_queries = config.num_attention_heads // config.num_key_value_heads
        ranks = vllm_config.parallel_config.tensor_parallel_size
        self.dsla_heads = heads_by_layer(config, ranks, get_tensor_model_parallel_rank())
        pages: dict[int, StatePage] = {}
        for index, place in places({layer: heads.most_converted for layer, heads in self.dsla_heads.items()}).items():
            attention: Any = self.model.layers[index].self_attn  # type: ignore[attr-defined]
            name = attention.attn.layer_name.removesuffix(".attn")
            if place.page not in pages:
                pages[place.page] = StatePage(_page_parts(vllm_config), f"{name}.dsla_page")
            _convert(attention, name, self.dsla_heads[index], pages[place.page], place.first, vllm_config)
        # As many as a page has tensors: vLLM refuses more. The class cannot know that, its instance does.
        copies = (get_temporal_copy_spec,) * len(_page_parts(vllm_config))
        self.get_mamba_state_copy_funcs = lambda mamba_types: dict.fromkeys(mamba_types, copies)
        self.get_mamba_state_copy_func = lambda: copies  # type: ignore[method-assign]  # so in vLLM 0.26.0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """As vLLM's class does; of what is DSLA's own, the part of this rank."""
        parts = ((name, own_part(name, weight, self.dsla_heads, self.dsla_queries)) for name, weight in weights)
        return super().load_weights((name, part) for name, part in parts if part is not None)  # type: ignore[misc]

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: Any) -> Any:
        return tuple(shape for shape, _ in _page_parts(vllm_config))

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: Any) -> Any:
        return tuple(dtype for _, dtype in _page_parts(vllm_config))

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        return (get_temporal_copy_spec,) * 3  # at most: states, keys, values


class DSLARefused(_Hybrid, LlamaForCausalLM, HasInnerState, IsHybrid):
    """For hybrids of all other types, which `HybridSettings` refuses: vLLM wants to know a class before it asks there."""


@functools.cache
def served_class(base: str) -> type[nn.Module]:
    """vLLM's class for hybrids of a base in `SERVED_BASES`, e.g. `DSLALlamaForCausalLM`."""
    module, name = SERVED_BASES[base]
    vllm_class = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    return type(f"DSLA{name}", (_Hybrid, vllm_class, HasInnerState, IsHybrid), {"__module__": __name__})


def __getattr__(name: str) -> Any:
    """These classes as attributes of this module: vLLM imports the one that it needs, and no other of its models, by name."""
    for base in SERVED_BASES if name.startswith("DSLA") else ():
        if name == hybrid_classes(base)[1].__name__:
            return served_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
