"""KL of two passes from their hidden states: logits of some rows at a time, and never all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .losses import kl_sums

LOGITS_AT_ONCE = 2**28  # of teacher and student each: half a gigabyte in bf16


@torch.no_grad()
def plain_head(model: Any, ids: Tensor) -> nn.Linear | None:
    """The output embeddings of a causal LM, where its logits are what this layer gives and nothing else: no score cap, no factor, and
    weights that are not trained, cut or quantised. None where that is not so, which a pass over a few tokens, `ids` `[1, T]`, tells."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or type(head.weight.data) is not Tensor or any(p.requires_grad for p in head.parameters()):
        return None
    given: list[tuple[Tensor, Tensor]] = []
    handle = head.register_forward_hook(lambda module, args, output: given.append((args[0], output)))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
    finally:
        handle.remove()
    if len(given) != 1:
        return None
    hidden, output = given[0]
    plain = logits.dtype == output.dtype == hidden.dtype and logits.shape == output.shape and torch.equal(logits, output)
    return head if plain and hidden.shape[:2] == ids.shape else None


@contextmanager
def hidden_for_logits(head: nn.Linear) -> Iterator[None]:
    """Within it a model gives as logits what its head would take, `[B, T, hidden]`."""
    vars(head)["forward"] = lambda hidden: hidden
    try:
        yield
    finally:
        del head.forward


def head_kl_sums(student: Tensor, teacher: Tensor, head: nn.Linear, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `losses.kl_sums` of the logits that `head` gives of hidden states `[B, T, hidden]`.

    The gradient of the student's is made with the loss, rows of logits after rows, so that the backward pass has nothing left to do.
    """
    weights = torch.ones_like(student[..., 0], dtype=torch.float32) if mask is None else mask.float()
    total = _HeadKL.apply(student.flatten(0, -2), teacher.detach().flatten(0, -2), head.weight, head.bias, weights.flatten())
    return total, weights.sum().clamp_min(1)


class _HeadKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, weights: Tensor) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if wanted else student.new_empty(0)
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        rows = max(LOGITS_AT_ONCE // len(weight), 1)
        for start in range(0, len(student), rows):
            part = slice(start, start + rows)
            logits, target = (F.linear(hidden[part], weight, bias) for hidden in (student, teacher))
            with torch.set_grad_enabled(wanted):
                loss, _ = kl_sums(logits.requires_grad_(wanted)[None], target[None], weights[None, part], reuse_teacher=True)
            total += loss.detach()
            if wanted:
                gradient[part] = torch.autograd.grad(loss, logits)[0] @ weight
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return ctx.saved_tensors[0] * gradients[0].to(ctx.saved_tensors[0].dtype), None, None, None, None
