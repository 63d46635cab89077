"""What is known of tensor parallelism without it: whether a model is cut over processes, and the names that its plan has.

`head_sharding` cuts models. It needs names of transformers that are not public, and is imported when a model is cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

FEATURE = "tensor parallelism"
HEADS = "dsla_heads"
KEYS, DSLA = "layers.*.self_attn.k_proj", "layers.*.self_attn.dsla"  # names in plans

MERGE_FIRST = (
    "load base and adapter in one process, without tp_plan, set the level, save merge_and_unload() as a hybrid, and load that with tp_plan"
)


def is_tensor_parallel(model: Any) -> bool:
    """Whether transformers has cut this model (or the base of this `PeftModel`) over processes."""
    return (getattr(model, "tp_size", None) or 1) > 1


def asks_for_tensor_parallel(options: Mapping[str, Any]) -> bool:
    """Whether these options of `from_pretrained` make transformers cut the model over processes."""
    config = options.get("distributed_config") or {}
    places = (options, config if isinstance(config, Mapping) else vars(config))
    return any(place.get("tp_plan") is not None or (place.get("tp_size") or 1) > 1 for place in places)


def cuts_heads(model: Any) -> bool:
    """Whether processes hold different heads of this model's attention."""
    return is_tensor_parallel(model) and any(name.endswith(KEYS) and style == "colwise" for name, style in model.tp_plan.items())


def check_heads(kv_heads: int, processes: int) -> None:
    """Raises ValueError unless the KV heads can be divided among the processes."""
    if kv_heads % processes:
        raise ValueError(
            f"{kv_heads} key-value heads cannot be divided among {processes} processes: each holds the DSLA states of whole heads. "
            f"Start a number of processes that divides {kv_heads}"
        )


def hybrid_plan(base_plan: dict[str, str] | None) -> dict[str, str] | None:
    """The plan of a base's decoder with DSLA's own parameters, if it cuts heads."""
    return {**base_plan, DSLA: HEADS} if base_plan and base_plan.get(KEYS) == "colwise" else base_plan


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together if processes hold parts of it (a `DTensor`). Gradients go back to the parts."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mesh_of(model: Any) -> Any:
    """The processes that share a model, a `DeviceMesh`."""
    return next(parameter.device_mesh for parameter in model.parameters() if hasattr(parameter, "device_mesh"))


def agreed_level(model: Any, level: int) -> int:
    """The level that the first process wants. Times and free memory differ, and all processes must run the same layers."""
    if not is_tensor_parallel(model):
        return level
    mesh = mesh_of(model)
    wanted = torch.tensor(level, device=mesh.device_type)
    torch.distributed.broadcast(wanted, group=mesh.get_group(), group_src=0)
    return int(wanted)


def wait_for_first(model: Any) -> None:
    """Until the first of the processes that share a model has come here."""
    agreed_level(model, 0)
