"""The loss terms against their plain formulas in fp64."""

import pytest
import torch

from dsla_hf.training.losses import TOKENS_PER_CHUNK, alignment_loss, kl_loss

VOCABULARY = 13
# One chunk or less, exactly one, one and a bit, several; in one row and in several.
SHAPES = [(1, 1), (1, 1023), (1, 1024), (1, 1025), (1, 3000), (3, 1000), (5, 7)]


def plain_alignment(prediction, target, mask=None):
    prediction, target = prediction.double(), target.double()
    real = torch.ones(target.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return (prediction - target)[real].square().sum() / target[real].square().sum()


def plain_kl(student, teacher, mask=None):
    student, teacher = student.double().softmax(-1), teacher.double().softmax(-1)
    real = torch.ones(student.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
    return (teacher * (teacher / student).log()).sum(-1)[real].mean()


LOSSES = pytest.mark.parametrize("loss, plain", [(alignment_loss, plain_alignment), (kl_loss, plain_kl)], ids=["alignment", "kl"])


def inputs(shape, scale=3.0):
    """Student's and teacher's tensors; both could get a gradient."""
    return tuple((scale * torch.randn(*shape, VOCABULARY)).requires_grad_() for _ in range(2))


def random_mask(shape):
    mask = torch.rand(shape) < 0.6
    mask[0, 0], mask[-1, -1] = True, shape == (1, 1)
    return mask


# --- value and gradient -----------------------------------------------------------------------------------------


def test_shapes_lie_on_both_sides_of_the_chunk_boundary():
    assert TOKENS_PER_CHUNK == 1024


@LOSSES
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_value_and_gradient_are_those_of_the_plain_formula(loss, plain, shape, masked):
    student, teacher = inputs(shape)
    mask = random_mask(shape) if masked else None
    expected = plain(student, teacher.detach(), mask)
    (expected_gradient,) = torch.autograd.grad(expected, student)
    found = loss(student, teacher, mask)
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)
    found.backward()
    torch.testing.assert_close(student.grad, expected_gradient, rtol=1e-4, atol=1e-8)
    assert teacher.grad is None


def test_alignment_is_one_for_a_prediction_of_zero_and_four_for_the_opposite_sign():
    _, target = inputs((2, 9))
    torch.testing.assert_close(alignment_loss(torch.zeros_like(target), target), torch.tensor(1.0))
    torch.testing.assert_close(alignment_loss(-target, target), torch.tensor(4.0))


def test_kl_is_of_the_student_from_the_teacher_not_the_other_way():
    student, teacher = (x.detach() for x in inputs((2, 9)))
    assert (plain_kl(student, teacher) - plain_kl(teacher, student)).abs() > 0.05
    torch.testing.assert_close(kl_loss(student, teacher).double(), plain_kl(student, teacher), rtol=1e-5, atol=0)


def test_kl_does_not_depend_on_a_constant_added_to_the_logits():
    student, teacher = (x.detach() for x in inputs((2, 9)))
    torch.testing.assert_close(kl_loss(student - 300, teacher + 300), kl_loss(student, teacher), rtol=1e-4, atol=1e-5)


@LOSSES
def test_equal_inputs_give_zero_and_no_gradient(loss, plain):
    student, _ = inputs((3, 700))
    found = loss(student, student.detach().clone())
    assert found == 0
    found.backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-9)


@LOSSES
def test_bfloat16_is_computed_in_float32(loss, plain):
    student, teacher = (x.detach().bfloat16() for x in inputs((3, 700)))
    found = loss(student.requires_grad_(), teacher)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), plain(student, teacher), rtol=1e-5, atol=0)
    found.backward()
    assert student.grad.dtype == torch.bfloat16 and student.grad.isfinite().all()


def test_kl_keeps_no_full_size_probabilities_for_the_backward_pass():
    student, teacher = inputs((2, 1500))
    own = {x.untyped_storage().data_ptr() for x in (student, teacher)}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = kl_loss(student, teacher)
    assert sum(kept) < student.numel() / 2, "tensors as large as the logits are kept"
    loss.backward()
    assert student.grad.abs().max() > 0


# --- masks ------------------------------------------------------------------------------------------------------


@LOSSES
@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_dtype_of_the_mask_does_not_matter(loss, plain, dtype):
    (student, teacher), mask = inputs((3, 700)), random_mask((3, 700))
    assert torch.equal(loss(student, teacher, mask.to(dtype)), loss(student, teacher, mask))


@LOSSES
def test_padded_positions_have_no_influence_and_get_no_gradient(loss, plain):
    (student, teacher), mask = inputs((3, 700)), random_mask((3, 700))
    garbage = [x.detach().clone().masked_fill(~mask[..., None], 0) + 1e6 * torch.randn_like(x) * ~mask[..., None] for x in inputs((3, 700))]
    expected = loss(student, teacher, mask)
    student_changed = torch.where(mask[..., None], student.detach(), garbage[0]).requires_grad_()
    found = loss(student_changed, torch.where(mask[..., None], teacher.detach(), garbage[1]), mask)
    assert torch.equal(found, expected)
    found.backward()
    assert not student_changed.grad[~mask].any() and student_changed.grad[mask].abs().sum(-1).min() > 0


@LOSSES
def test_mask_of_ones_is_no_mask(loss, plain):
    student, teacher = inputs((3, 700))
    assert torch.equal(loss(student, teacher, torch.ones(3, 700)), loss(student, teacher))


@LOSSES
def test_batch_without_a_real_token_gives_zero_and_no_gradient(loss, plain):
    student, teacher = inputs((2, 9))
    found = loss(student, teacher, torch.zeros(2, 9, dtype=torch.long))
    found.backward()
    assert found == 0 and torch.equal(student.grad, torch.zeros_like(student))
