"""How transformers cuts models over processes: imported when one is cut."""

from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

__all__ = ["ALL_PARALLEL_STYLES", "TensorParallelLayer"]
