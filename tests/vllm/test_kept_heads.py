"""Backends of vLLM's attention for layers converted in part, without vLLM."""

from types import SimpleNamespace

import pytest

from dsla_hf.vllm.kept_heads import backend_of_kept_heads


class FromConfig:
    """As vLLM 0.26.0 makes them."""

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device=None):
        self.num_heads_q, self.num_heads_kv, self.names = vllm_config.query_heads, vllm_config.kv_heads, layer_names


class FromLayers:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device=None):
        self.num_qo_heads, self.num_kv_heads, self.names = 3 * kv_cache_spec.num_kv_heads, kv_cache_spec.num_kv_heads, layer_names


class WithoutHeads:
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device=None):
        self.names = layer_names


@pytest.mark.parametrize("builder", [FromConfig, FromLayers, WithoutHeads])
def test_builders_count_the_heads_that_a_layer_has(builder):
    class Backend:
        @staticmethod
        def get_name():
            return "FLASH_ATTN"

        @staticmethod
        def get_builder_cls():
            return builder

    made = backend_of_kept_heads(Backend, 3)
    assert made is backend_of_kept_heads(Backend, 3), "layers alike share their metadata"
    assert issubclass(made, Backend) and made.get_name() == "FLASH_ATTN" and made.__qualname__ != Backend.__qualname__
    found = made.get_builder_cls()(SimpleNamespace(num_kv_heads=2), ["layer"], SimpleNamespace(query_heads=24, kv_heads=8), device="cpu")
    assert isinstance(found, builder)
    numbers = {name: value for name, value in vars(found).items() if name != "names"}
    assert all(value == (2 if "kv" in name else 6) for name, value in numbers.items())
    assert len(numbers) == (0 if builder is WithoutHeads else 2) and found.names == ["layer"]
