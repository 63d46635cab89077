"""KL of logits in one kernel against the plain formula in fp64."""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True)
pytest.importorskip("triton")

from dsla_kernels.ops.loss import divergence  # noqa: E402 (after the choice of how kernels run)
from dsla_kernels.ops.loss.divergence import BLOCK  # noqa: E402

DEVICE = torch.device("cpu" if INTERPRETED else "cuda")


def plain(student, teacher, weights):
    student, teacher = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    terms = teacher.exp() * (teacher - student)
    return (terms.masked_fill(teacher.isneginf(), 0).sum(-1) * weights.double()).sum()


def inputs(rows, size, dtype):
    student, teacher = (3 * torch.randn(rows, size, device=DEVICE) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype), torch.rand(rows, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("rows, size", [(1, 1), (3, 7), (2, BLOCK), (5, BLOCK + 1), (2, 3 * BLOCK - 5)])
def test_value_and_gradient(rows, size, dtype):
    student, teacher, weights = inputs(rows, size, dtype)
    found = divergence(student, teacher, weights)
    (gradient,) = torch.autograd.grad(2.5 * found, student)
    exact = student.detach().double().requires_grad_()
    expected = plain(exact, teacher, weights)
    (expected_gradient,) = torch.autograd.grad(2.5 * expected, exact)
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-6)


def test_a_row_of_weight_0_and_words_that_cannot_come():
    student, teacher, weights = inputs(4, BLOCK + 9, torch.float32)
    with torch.no_grad():
        student[0], weights[0] = float("nan"), 0
        student[1, :BLOCK], teacher[1, :BLOCK] = float("-inf"), float("-inf")
        teacher[2, 5] = float("-inf")
    found = divergence(student, teacher, weights)
    (gradient,) = torch.autograd.grad(found, student)
    rest = plain(student[2:].detach(), teacher[2:], weights[2:]) + plain(student[1:2, BLOCK:].detach(), teacher[1:2, BLOCK:], weights[1:2])
    torch.testing.assert_close(found.double(), rest, rtol=1e-5, atol=1e-6)
    assert not gradient[0].any() and not gradient[1, :BLOCK].any() and gradient.isfinite().all()


@pytest.mark.parametrize("reuse", [False, True])
def test_the_gradient_may_take_the_place_of_the_teacher(reuse):
    student, teacher, weights = inputs(3, 50, torch.float32)
    (expected,) = torch.autograd.grad(divergence(student, teacher.clone(), weights), student)
    before = teacher.clone()
    (found,) = torch.autograd.grad(divergence(student, teacher, weights, reuse), student)
    assert torch.equal(found, expected) and torch.equal(teacher, found if reuse else before)


def test_teachers_of_another_dtype_and_views():
    student, teacher, weights = inputs(6, 40, torch.float32)
    wide = torch.cat([teacher, teacher], 1).half()[:, :40]
    found = divergence(student, wide, weights, True)
    torch.testing.assert_close(found.double(), plain(student.detach(), wide, weights), rtol=1e-5, atol=1e-6)
    found.backward()
    assert student.grad.dtype == torch.float32 and torch.equal(wide, teacher.half())


def test_shapes_that_do_not_fit_are_named():
    student, teacher, weights = inputs(3, 50, torch.float32)
    with pytest.raises(ValueError, match=r"weights \[N\], got \[3, 50\], \[3, 50\] and \[2\]"):
        divergence(student, teacher, weights[:2])
