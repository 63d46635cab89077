"""Tensor parallelism: each process holds some heads of every layer, as transformers cuts a model loaded with a `tp_plan`.

The base's plan cuts the projections. What is DSLA's own has the heads in front, and is cut there by a style of ours in the plan of
hybrids ("dsla_heads"); adapters are cut when they are put over a base that is. Keys, values, states and windows then are those of a
process's own KV heads, and nothing but the plan's own sum after `o_proj` goes between processes.

Models whose plan gathers the projections (OLMo 2, Phi-3) attend with all heads on every process; there DSLA's weights are whole, too.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from ..compat.attributes import is_loaded, parameters_of
from ..compat.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer
from .attention import DualStateAttention
from .tensor_parallel import HEADS, MERGE_FIRST, check_heads, cuts_heads, mesh_of

# Styles of projections that leave a process the activations of its own heads, and of those that leave it all activations.
CUT = ("colwise", "rowwise")
WHOLE = (None, "replicate", "colwise_gather_output", "colwise_rep", "rowwise_split_input", "rowwise_rep")


# --- the core ---------------------------------------------------------------------------------------------------


@contextmanager
def _own_part(module: nn.Module) -> Any:
    """Within it a module computes with the part of its parameters that this process holds."""
    parameters: Any = parameters_of(module)
    whole = {name: parameter for name, parameter in parameters.items() if isinstance(parameter, DTensor)}
    parameters.update({name: parameter.to_local() for name, parameter in whole.items()})
    try:
        yield
    finally:
        parameters.update(whole)


def _on_own_part(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _own_part(self):
            return method(self, *args, **kwargs)

    return run


class HeadShardedAttention(DualStateAttention):
    """The heads of one process. Its parameters are `DTensor`s with the whole shape, as transformers loads and saves them; what
    computes with them is listed here, and sees this process's part."""

    forward = _on_own_part(DualStateAttention.forward)
    fold = _on_own_part(DualStateAttention.fold)
    gate_logits = _on_own_part(DualStateAttention.gate_logits)
    mix = _on_own_part(DualStateAttention.mix)
    bias_half_lives = _on_own_part(DualStateAttention.bias_half_lives)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initial values for parameters that were not loaded: transformers marks those that were, but not the parts."""
        parameters: Any = parameters_of(self)
        loaded = [name for name, parameter in parameters.items() if is_loaded(parameter)]
        if len(loaded) == len(parameters):
            return
        with _own_part(self):
            before = {name: getattr(self, name).clone() for name in loaded}
            super().reset_parameters()
            for name, value in before.items():
                getattr(self, name).copy_(value)


class HeadParallel(TensorParallelLayer):
    """The style "dsla_heads": the parameters of a `DualStateAttention`, all of which have heads in front, cut there."""

    def validate_param(self, module: Any, param: str, mesh: DeviceMesh, parameter_name: str | None = None) -> None:
        """Raises ValueError unless the KV heads can be divided."""
        check_heads(module.num_kv_heads, mesh.size())

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        whole: Any = parameters_of(module)[param]
        part = distribute_tensor(whole.detach(), mesh, [Shard(0)], src_data_rank=None)
        parameters_of(module)[param] = nn.Parameter(part, requires_grad=whole.requires_grad)

    def install_forward(self, module: Any, mesh: DeviceMesh) -> nn.Module:
        module.__class__ = HeadShardedAttention
        module.num_heads //= mesh.size()
        module.num_kv_heads //= mesh.size()
        return module


ALL_PARALLEL_STYLES.register(HEADS, HeadParallel())


# --- adapters ---------------------------------------------------------------------------------------------------


def style_of(model: Any, name: str) -> str | None:
    """How the plan of a model cuts the projection with this name, e.g. `model.layers.3.self_attn.q_proj`.

    Raises:
        ValueError: for a style under which an adapter cannot work.
    """
    style = model.tp_plan.get(re.sub(r"\.\d+(?=\.)", ".*", name))
    if style not in CUT + WHOLE:
        raise ValueError(f"the tp_plan cuts {name} by {style!r}, to which adapters have not been fitted: {MERGE_FIRST}")
    return style


def cut_adapter_core(model: Any, core: nn.Module) -> None:
    """Leave this process its heads of an adapter's `DualStateAttention`."""
    if cuts_heads(model):
        _cut(core, HEADS, mesh_of(model))


def cut_adapter_linear(model: Any, linear: nn.Linear, name: str) -> None:
    """Cut an adapter's copy of the projection `name` as the projection is cut. Where all activations are on every process, the copy
    stays whole."""
    if (style := style_of(model, name)) in CUT:
        _cut(linear, style, mesh_of(model))


def _cut(module: nn.Module, style_name: str, mesh: DeviceMesh) -> None:
    style = ALL_PARALLEL_STYLES[style_name]
    for name, _ in list(module.named_parameters(recurse=False)):
        style.shard_param(module, name, mesh)
    style.install_forward(module, mesh)
    module.register_load_state_dict_pre_hook(_cut_what_is_loaded)


def _cut_what_is_loaded(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Files hold whole tensors; peft cuts them since 0.21."""
    for name, parameter in parameters_of(module).items():
        loaded = state_dict.get(prefix + name)
        if isinstance(parameter, DTensor) and loaded is not None and not isinstance(loaded, DTensor):
            state_dict[prefix + name] = distribute_tensor(loaded, parameter.device_mesh, parameter.placements, src_data_rank=None)
