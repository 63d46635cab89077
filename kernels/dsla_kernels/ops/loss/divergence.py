"""KL between the rows of two tensors of logits: each is read once for the value and once for the gradient, and nothing of their size is
made beside the gradient."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...common import on_its_device

BLOCK, WARPS = 4096, 8  # logits that a program reads at a time


@triton.jit
def _start(top, total, block):
    """The largest logit so far, what sums lose by it, and the block's exponentials."""
    new = tl.maximum(top, tl.max(block, 0))
    return new, total * tl.exp(top - new), tl.exp(block - new)


@triton.jit
def _value_kernel(student, teacher, weights, total, student_log, teacher_log, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    student += row * size
    teacher += row * size
    student_top = tl.full((), -1e30, tl.float32)  # finite: a block may be -inf throughout
    teacher_top = tl.full((), -1e30, tl.float32)
    student_sum = tl.zeros((), tl.float32)
    teacher_sum = tl.zeros((), tl.float32)
    product = tl.zeros((), tl.float32)  # of probabilities and differences of logits
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        s = tl.load(student + place, mask=place < size, other=float("-inf")).to(tl.float32)
        t = tl.load(teacher + place, mask=place < size, other=float("-inf")).to(tl.float32)
        student_top, student_sum, e = _start(student_top, student_sum, s)
        student_sum += tl.sum(e, 0)
        before = teacher_top
        teacher_top, teacher_sum, e = _start(teacher_top, teacher_sum, t)
        teacher_sum += tl.sum(e, 0)
        product = product * tl.exp(before - teacher_top) + tl.sum(tl.where(e > 0, e * (t - s), 0.0), 0)
    s_log, t_log = student_top + tl.log(student_sum), teacher_top + tl.log(teacher_sum)
    tl.store(student_log + row, s_log)
    tl.store(teacher_log + row, t_log)
    weight = tl.load(weights + row)
    tl.store(total + row, tl.where(weight != 0, weight * (product / teacher_sum - t_log + s_log), 0.0))


@triton.jit
def _gradient_kernel(student, teacher, weights, student_log, teacher_log, factor, gradient, size, BLOCK: tl.constexpr):
    """Of the student's logits; `gradient` may be `teacher`."""
    row = tl.program_id(0).to(tl.int64)
    s_log, t_log = tl.load(student_log + row), tl.load(teacher_log + row)
    weight = tl.load(weights + row) * tl.load(factor)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = place < size
    s = tl.load(student + row * size + place, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(teacher + row * size + place, mask=inside, other=0.0).to(tl.float32)
    result = tl.where(weight != 0, weight * (tl.exp(s - s_log) - tl.exp(t - t_log)), 0.0)
    tl.store(gradient + row * size + place, result, mask=inside)


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Tensor, reuse_teacher: bool) -> Tensor:
        total, student_log, teacher_log = (torch.empty_like(weights) for _ in range(3))
        if total.numel():
            _value_kernel[(total.numel(),)](
                student, teacher, weights, total, student_log, teacher_log, student.shape[1], BLOCK=BLOCK, num_warps=WARPS
            )
        ctx.save_for_backward(student, teacher, weights, student_log, teacher_log)
        ctx.reuse_teacher = reuse_teacher and teacher.dtype == student.dtype
        return total.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        student, teacher, weights, student_log, teacher_log = ctx.saved_tensors
        gradient = teacher if ctx.reuse_teacher else torch.empty_like(student)
        rows, size = student.shape
        if rows:
            with torch.cuda.device_of(student):
                _gradient_kernel[(rows, triton.cdiv(size, BLOCK))](
                    student, teacher, weights, student_log, teacher_log, gradients[0], gradient, size, BLOCK=BLOCK, num_warps=WARPS
                )
        return gradient, None, None, None


@on_its_device
def divergence(student: Tensor, teacher: Tensor, weights: Tensor, reuse_teacher: bool = False) -> Tensor:
    """Sum over rows of weight * KL(teacher || student), fp32; differentiable in the student.

    Args:
        student, teacher: logits `[N, vocabulary]`, bf16, fp16 or fp32; made contiguous if they are not.
        weights: fp32 `[N]`; what a row of weight 0 holds has no effect.
        reuse_teacher: the backward pass writes the student's gradient over a contiguous teacher's logits of the same dtype.

    Raises:
        ValueError: for other shapes.
    """
    if student.ndim != 2 or teacher.shape != student.shape or weights.shape != student.shape[:1]:
        raise ValueError(
            f"divergence takes logits [N, vocabulary], as many of the teacher, and weights [N], got {list(student.shape)}, "
            f"{list(teacher.shape)} and {list(weights.shape)}"
        )
    return _Divergence.apply(student.contiguous(), teacher.detach().contiguous(), weights.float().contiguous(), reuse_teacher)
