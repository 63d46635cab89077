"""Training steps as CUDA graphs: forward and backward pass of every draw by the same recording.

A small model's step is thousands of short launches, which the host gives no faster than several times what the device takes. What differs
from step to step, the heads that are converted, is data here: each KV head has a switch between its softmax attention and its DSLA
(`switches`), and both run in every layer. That costs the device a part of the attention twice, and saves the host all of it, so it pays for
small models and steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.attention_functions import masks_as_rehearsed
from ..inference.recorder import CudaRecording, Record, Recorder
from .arguments import CHECKPOINTING
from .liger import has_experts

# Weights times tokens of a step, up to which the host is what a step waits for: at 0.1 s of a GPU, and 0.25 s of launches for 30 layers.
SMALL = 1e13

PLAIN = {"input_ids", "labels", "loss_mask"}  # of batches whose rows are whole texts, for all that a recording can tell

RECORD: Record = CudaRecording  # tests put another in its place

# The loss of a batch and its terms by name; the stack is closed behind the backward pass.
Losses = Callable[[dict[str, Tensor], ExitStack], tuple[Tensor, dict[str, Tensor]]]


class RecordedSteps:
    """Runs a loss and its backward pass, recorded for each shape of batch.

    Args:
        model: whose weights are trained. losses: reads `switches` where heads are drawn.
        switches: `[layers, Hkv]`, 1 for heads that are converted in a step; a tensor whose place does not change.
    """

    def __init__(
        self,
        model: nn.Module,
        losses: Losses,
        switches: Tensor,
    ) -> None:
        self.switches = switches
        self._losses = losses
        self._recorder = Recorder(model, RECORD, fuse=False)
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._flat: Tensor | None = None
        self._gradients: list[Tensor] = []
        self._inputs: dict[Any, dict[str, Tensor]] = {}
        self._no_masks: dict[tuple[int | None, ...], bool] = {}
        self._found: dict[Any, tuple[list[str], Tensor]] = {}

    @property
    def failed(self) -> str | None:
        """Why steps cannot be recorded, None while they can."""
        return self._recorder.reason

    def __call__(self, inputs: dict[str, Tensor], converted: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch and its terms; gradients are added to those of the weights.

        converted: what `switches` hold in this step, on any device; None: as they are.
        """
        key = tuple((name, tuple(x.shape), x.dtype) for name, x in sorted(inputs.items()))
        if key not in self._inputs:
            self._inputs[key] = {name: x.clone() for name, x in inputs.items()}
        for name, x in inputs.items():
            self._inputs[key][name].copy_(x)
        if converted is not None:
            self.switches.copy_(converted, non_blocking=True)
        self._place_gradients()
        self._recorder.run(key, lambda: self._pass(key))
        names, values = self._found[key]
        loss, *terms = values.clone().unbind()
        return loss, dict(zip(names, terms, strict=True))

    def _place_gradients(self) -> None:
        """Where recordings add to them; of weights that have none yet zero."""
        if self._flat is None:
            sizes = [p.numel() for p in self._weights]
            self._flat = torch.zeros(sum(sizes), device=self._weights[0].device, dtype=self._weights[0].dtype)
            self._gradients = [x.view_as(p) for x, p in zip(self._flat.split(sizes), self._weights, strict=True)]
        fresh = all(p.grad is None for p in self._weights)
        if fresh:
            self._flat.zero_()
        for p, gradient in zip(self._weights, self._gradients, strict=True):
            if p.grad is gradient:
                continue
            if p.grad is not None:
                gradient.copy_(p.grad)
            elif not fresh:
                gradient.zero_()
            p.grad = gradient

    def _pass(self, key: Any) -> None:
        with masks_as_rehearsed(self._no_masks), ExitStack() as until_backward:
            loss, terms = self._losses(self._inputs[key], until_backward)
            loss.backward()
        self._found[key] = list(terms), torch.stack([loss, *terms.values()]).detach()


def is_small(model: nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether the host, not the device, is what a step with this batch waits for."""
    return sum(p.numel() for p in model.parameters()) * inputs["input_ids"].numel() < SMALL


def is_plain(inputs: dict[str, Any]) -> bool:
    """Whether a batch has nothing that says where in its rows texts are: a recording could not look at it."""
    return set(inputs) <= PLAIN


def why_not_recorded(args: Any, model: Any, inputs: dict[str, Any]) -> str | None:
    """Why steps of this training cannot be recorded, in words; None where they can."""
    base = model.get_base_model()
    reasons = {
        f"training is on {args.device.type}, which has no CUDA graphs": args.device.type != "cuda" and RECORD is CudaRecording,
        "several processes train": args.world_size > 1,
        "gradients are accumulated over several batches": args.gradient_accumulation_steps > 1,
        "autocast is on (fp16, bf16)": args.fp16 or args.bf16,
        "the model is compiled (torch_compile)": args.torch_compile,
        "activations are computed again in the backward pass": any(getattr(args, name, False) for name in CHECKPOINTING),
        "hidden states are compared (hidden_weight)": args.hidden_weight,
        "all steps have one level (train_level)": args.stage == "logits" and args.train_level is not None,
        f"batches have {', '.join(sorted(set(inputs) - PLAIN))}": not is_plain(inputs),
        "blocks are mixtures of experts": has_experts(base.config),
        "the base is quantised": getattr(base, "hf_quantizer", None) is not None,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)
