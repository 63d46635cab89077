"""Training with the weights cut over processes (FSDP2): whole weights in and out, gradients of losses that are no output.

A checkpoint holds whole tensors under the names that one process gives them, so that any number of processes reads it,
with FSDP or without. Every function here is called by all processes alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import get_peft_model_state_dict, load_peft_weights
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.utils import logging

from ..compat.attributes import parameters_of, with_parameters
from ..core.tensor_parallel import whole

logger = logging.get_logger(__name__)

ANCHOR = "dsla_anchor"


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds the weights of a model in parts."""
    return isinstance(model, FSDPModule)


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, as `like` is held."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def with_whole_weights(module: nn.Module) -> Any:
    """A copy of a module without children whose weights are whole."""
    return with_parameters(module, {name: None if p is None else whole(p) for name, p in parameters_of(module).items()})


# --- weights and optimizer state --------------------------------------------------------------------------------


def whole_adapter(model: nn.Module) -> dict[str, Tensor]:
    """The adapter's weights, whole, by their names in the model; on the first process alone, which writes them."""
    return {name: _whole_on_first(tensor) for name, tensor in model.state_dict().items() if "dsla_" in name}


@torch.no_grad()
def load_adapter_weights(model: Any, directory: Path, adapter: str) -> None:
    """Read the adapter in `directory` into that of the model, which stays trainable.

    Raises:
        ValueError: if the file has other weights than the adapter.
    """
    if not is_sharded(model):
        model.load_adapter(str(directory), adapter, is_trainable=True)
        return
    saved, own = load_peft_weights(str(directory), device="cpu"), get_peft_model_state_dict(model, adapter_name=adapter)
    if different := sorted(saved.keys() ^ own.keys()):
        raise ValueError(f"{directory} holds other weights than this adapter, for example {different[0]}: give another output_dir")
    for name, tensor in own.items():
        tensor.copy_(cut_like(saved[name].to(tensor.dtype), tensor))


def initial_weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the adapter's weights by their names in the model, on the CPU: before FSDP cuts them, every process has all."""
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if "dsla_" in name}


@contextmanager
def adapter_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> Any:
    """Within it the adapter has `weights`, whole and by name as `initial_weights` gives them; afterwards its own, bit for bit.

    Raises:
        ValueError: if the model has other weights than these.
    """
    cut_again(model)
    own = {name: p for name, p in model.named_parameters() if "dsla_" in name}
    if different := sorted(own.keys() ^ weights.keys()):
        raise ValueError(f"these are not the weights of this adapter: {different[0]} is on one side only")
    kept = {name: _local(p).to("cpu", copy=True) for name, p in own.items()}
    try:
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(cut_like(weights[name].to(p.device, p.dtype), p))
        yield
    finally:
        cut_again(model)
        with torch.no_grad():
            for name, p in own.items():
                _local(p).copy_(kept[name])


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def cut_again(model: nn.Module) -> None:
    """Let FSDP take back what it gathered for the last forward, so that the model's weights are the parts that it keeps."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_optimizer_state(optimizer: Any) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors; on the first process alone."""
    content = optimizer.state_dict()
    states = {i: _each(state, _whole_on_first) for i, state in content["state"].items()}
    return {**content, "state": states}


def load_optimizer_state(optimizer: Any, content: dict[str, Any]) -> None:
    """Undo `whole_optimizer_state`, each process for its parts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        i: _each(state, lambda value, p=parameters[i]: cut_like(value, p) if value.shape == p.shape else value)  # type: ignore[misc]
        for i, state in content["state"].items()
    }
    optimizer.load_state_dict({**content, "state": states})


def _whole_on_first(tensor: Tensor) -> Tensor:
    """On the first process the whole tensor, on the CPU; elsewhere an empty one, for a host would hold it once per process."""
    tensor = whole(tensor)
    return tensor.cpu() if PartialState().is_main_process else tensor.new_empty(0, device="cpu")


def _each(state: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in state.items()}


# --- how it is set up --------------------------------------------------------------------------------------------


def check_fsdp(accelerator: Any) -> None:
    """Raises ValueError if FSDP is set up in another way than examples/configs/fsdp2.yaml has it."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            logger.warning_once("accelerate knows FSDP on accelerators only: on the CPU every process holds the whole model")
        return
    if getattr(plugin, "fsdp_version", 1) != 2:
        raise ValueError("fsdp_version 1 wants the weights of a block all trained or all frozen, in one dtype: set fsdp_version: 2")
    if accelerator.mixed_precision != "no":
        raise ValueError(
            f"mixed precision {accelerator.mixed_precision} with FSDP would round the gates, which are float32: leave it out, "
            "the base computes in its own dtype (--dtype bfloat16)"
        )
    if plugin.activation_checkpointing:
        raise ValueError(
            "fsdp_activation_checkpointing would run alignment's losses twice: set it to false and give --gradient_checkpointing true"
        )


# --- losses inside a block --------------------------------------------------------------------------------------


@contextmanager
def losses_inside(blocks: Mapping[int, nn.Module], losses: dict[int, Tensor]) -> Any:
    """Within it, a loss that the forward of block i adds to `losses[i]` can be differentiated as if the block had returned it.

    FSDP gathers a block's weights for the backward pass when a gradient reaches an output of the block, and takes them back, with
    their gradients, when one leaves through an input. So each block gets a zero among its inputs, from which `losses[i]` starts, and
    `losses[i]` stands beside its output, as far as FSDP sees. Blocks that are not FSDP's own are left alone and have no entry.
    """
    handles = []

    def follow(i: int, block: nn.Module) -> None:
        def bring(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            zero = torch.zeros((), device=next(block.parameters()).device, requires_grad=True)
            return args, {**kwargs, ANCHOR: zero}

        def take(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            losses[i] = kwargs.pop(ANCHOR)
            return args, kwargs

        # Around the hooks of FSDP: before and after its own on the way in, likewise on the way out.
        handles.append(block.register_forward_pre_hook(bring, with_kwargs=True, prepend=True))
        handles.append(block.register_forward_pre_hook(take, with_kwargs=True))
        handles.append(block.register_forward_hook(lambda module, args, output: (output, losses[i]), prepend=True))
        handles.append(block.register_forward_hook(lambda module, args, output: output[0]))

    for i, block in blocks.items():
        if isinstance(block, FSDPModule):
            follow(i, block)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
