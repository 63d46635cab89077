"""The terms of the distillation loss. Small, named, and each a mean over real tokens."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dsla_kernels import divergence, takes_logits

TOKENS_PER_CHUNK = 1024


def alignment_loss(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error of an attention output relative to the target's energy: 0 is equal, 1 is as bad as predicting zero.

    Args:
        prediction, target: `[B, T, hidden]`; the target gets no gradient.
        mask: `[B, T]`, nonzero at real tokens.
    """
    error, energy = alignment_sums(prediction, target, mask)
    return error / energy


def alignment_sums(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of `alignment_loss`, so that several processes can share one denominator."""
    target = target.detach().float()
    error, energy = (prediction.float() - target).square().sum(-1), target.square().sum(-1)
    if mask is not None:
        error, energy = error * mask, energy * mask
    return error.sum(), energy.sum().clamp_min(torch.finfo(torch.float32).tiny)


def kl_loss(student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) in nats per token, in fp32.

    One kernel reads the logits where Triton runs. Elsewhere they are gone through in chunks that are computed again in the backward pass;
    either way no full-size probabilities are kept beside the logits.

    Args:
        student_logits, teacher_logits: `[B, T, vocabulary]`; the teacher gets no gradient.
        mask: `[B, T]`, nonzero at real tokens.
    """
    total, tokens = kl_sums(student_logits, teacher_logits, mask)
    return total / tokens


def kl_sums(
    student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None, reuse_teacher: bool = False
) -> tuple[Tensor, Tensor]:
    """Numerator and denominator of `kl_loss`, so that several processes can share one denominator.

    With `reuse_teacher` the backward pass writes the student's gradient over the teacher's logits, which saves as much memory.
    """
    student, teacher = student_logits.flatten(0, -2), teacher_logits.detach().flatten(0, -2)
    weights = torch.ones_like(student[:, 0], dtype=torch.float32) if mask is None else mask.flatten().float()
    total = divergence if takes_logits(student, teacher) else _ChunkedKL.apply
    return total(student, teacher, weights, reuse_teacher), weights.sum().clamp_min(1)


class _ChunkedKL(torch.autograd.Function):
    """Sum of weight * KL over tokens. Beside the logits, only one chunk at a time is held; for the gradient each is computed again."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, reuse_teacher: bool) -> Tensor:
        ctx.save_for_backward(student, teacher, weights)
        ctx.reuse_teacher = reuse_teacher and teacher.dtype == student.dtype
        total = student.new_zeros((), dtype=torch.float32)
        for s, t, w in _chunks(student, teacher, weights):
            total = total + _weighted_kl(s, t, w)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        student, teacher, weights = ctx.saved_tensors
        result = teacher if ctx.reuse_teacher else torch.empty_like(student)
        for s, t, w, r in _chunks(student, teacher, weights, result):
            with torch.enable_grad():
                s = s.detach().requires_grad_()
                loss = _weighted_kl(s, t, w)
            r.copy_(*torch.autograd.grad(loss, s, gradients[0]))
        return result, None, None, None


def _chunks(*tensors: Tensor) -> Any:
    return zip(*(x.split(TOKENS_PER_CHUNK) for x in tensors), strict=True)


def _weighted_kl(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    student, teacher = F.log_softmax(student.float(), -1), F.log_softmax(teacher.float(), -1)
    return (F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1) * weights).sum()
