"""vLLM's attention for some heads of a layer: what its backends make once a step is made for as many as there are.

vLLM 0.26.0 takes the numbers of heads from the model's config, for all layers. On Hopper, FlashAttention 3 then divides the work of more
heads than a layer converted in part has kept, and what it computes is wrong. Later releases ask the layers, but for one backend.
"""

from __future__ import annotations

import functools
from typing import Any

# Of metadata builders, by backend; those that have neither do not count heads.
QUERY_HEADS, KV_HEADS = ("num_heads_q", "num_qo_heads"), ("num_heads_kv", "num_kv_heads")


@functools.cache
def backend_of_kept_heads(backend: Any, queries: int) -> Any:
    """A backend of vLLM's attention for layers that have fewer heads than the model's config says.

    Args:
        backend: a class, an `AttentionBackend`.
        queries: query heads that read a KV head.
    """
    base = backend.get_builder_cls()

    class Builder(base):  # type: ignore[misc, valid-type]
        def __init__(self, kv_cache_spec: Any, *args: Any, **kwargs: Any) -> None:
            super().__init__(kv_cache_spec, *args, **kwargs)
            heads = kv_cache_spec.num_kv_heads
            for names, count in ((QUERY_HEADS, heads * queries), (KV_HEADS, heads)):
                for name in names:
                    if hasattr(self, name):
                        setattr(self, name, count)

    class Backend(backend):
        @staticmethod
        def get_builder_cls() -> Any:
            return Builder

    for made, named in ((Builder, base), (Backend, backend)):  # vLLM groups layers by the names of their backends
        made.__name__, made.__qualname__ = f"{named.__name__}OfKeptHeads", f"{named.__qualname__}OfKeptHeads"
    return Backend
