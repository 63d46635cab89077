"""Which hybrids vLLM can serve, and how: everything else is refused in one sentence before a weight is loaded."""

from __future__ import annotations

from typing import Any

# Their attention in vLLM calls `self.attn(q, k, v)` on rotated queries and keys, which is where the DSLA layer goes.
SERVED_BASES = "llama", "mistral", "qwen2", "qwen3"


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
    for name, size in (("tensor_parallel_size", tensor_parallel), ("pipeline_parallel_size", pipeline_parallel)):
        if size != 1:
            raise ValueError(f"vLLM cannot serve DSLA hybrids with {name}={size}: use {name}=1")
    if speculative:
        raise ValueError("vLLM cannot serve DSLA hybrids with speculative decoding: leave --speculative-config out")


def check_graphs(device_type: str, enforce_eager: bool) -> None:
    """Refuse CUDA graphs: the layer reads lengths on the host, which a graph would record once and for all.

    Raises:
        ValueError: names the option to give.
    """
    if device_type != "cpu" and not enforce_eager:
        raise ValueError(f"vLLM cannot record DSLA hybrids in graphs on {device_type!r}: pass --enforce-eager (enforce_eager=True)")
