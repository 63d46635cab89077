"""KL from hidden states: the values and gradients of that of logits, and never all of these at once."""

import pytest
import torch
from torch import nn

from dsla_hf.training import head_kl
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.head_kl import head_kl_sums, hidden_for_logits, plain_head
from dsla_hf.training.losses import kl_sums
from dsla_hf.training.trainer import DSLATrainer

IDS = torch.arange(8)[None] % 97


def plain_kl(student, teacher, mask):
    student, teacher = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    return ((teacher.exp() * (teacher - student)).sum(-1) * mask).sum() / mask.sum().clamp_min(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("at_once", [1, 5 * 23, 10**9])
def test_values_and_gradients(monkeypatch, at_once, bias, dtype):
    monkeypatch.setattr(head_kl, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    head = nn.Linear(16, 23, bias=bias, dtype=dtype).requires_grad_(False)
    student, teacher = (3 * torch.randn(2, 7, 16)).to(dtype).requires_grad_(), (3 * torch.randn(2, 7, 16)).to(dtype)
    for mask in (None, torch.tensor([[1.0] * 7, [1, 0, 0, 2.5, 0, 1, 0]])):
        total, weight = head_kl_sums(student, teacher, head, mask)
        (found,) = torch.autograd.grad(3 * total / weight, student)
        exact = student.detach().double().requires_grad_()
        loss = plain_kl(head.double()(exact), head(teacher.double()), torch.ones(2, 7) if mask is None else mask)
        (expected,) = torch.autograd.grad(3 * loss, exact)
        head.to(dtype)
        close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.03}
        torch.testing.assert_close((total / weight).double(), loss, **close)
        torch.testing.assert_close(found.double(), expected, **close)


def test_without_a_gradient_there_is_none():
    head, hidden = nn.Linear(4, 9).requires_grad_(False), torch.randn(1, 3, 4)
    total, weight = head_kl_sums(hidden, hidden + 1, head)
    assert not total.requires_grad and total / weight == pytest.approx(float(kl_sums(head(hidden), head(hidden + 1))[0] / 3), rel=1e-5)


@pytest.mark.parametrize(("kind", "plain"), [("llama", True), ("qwen3", True), ("gemma2", False), ("granite", False), ("cohere2", False)])
def test_heads_whose_logits_are_changed_behind_are_not_plain(tiny_model, kind, plain):
    model = tiny_model(kind, **{"granite": {"logits_scaling": 3.0}, "cohere2": {"logit_scale": 0.3}}.get(kind, {})).requires_grad_(False)
    head = plain_head(model, IDS)
    assert (head is model.get_output_embeddings()) if plain else (head is None)
    if plain:
        with hidden_for_logits(head):
            hidden = model(IDS).logits
        assert torch.equal(head(hidden), model(IDS).logits)


def test_heads_that_are_trained_or_of_another_kind_are_not_plain(tiny_model):
    model = tiny_model("llama")
    assert plain_head(model, IDS) is None
    model.requires_grad_(False)
    assert plain_head(model, IDS) is not None

    class Other(nn.Linear):
        pass

    head = model.get_output_embeddings()
    other = Other(head.in_features, head.out_features, bias=False).requires_grad_(False)
    model.set_output_embeddings(other)
    assert plain_head(model, IDS) is None


def test_training_takes_it_and_makes_no_logits_of_all_tokens(tmp_path, monkeypatch, tiny_model, adapter_model):
    monkeypatch.setattr(head_kl, "LOGITS_AT_ONCE", 97 * 10)
    model = adapter_model(tiny_model("llama"))
    rows = []
    head = model.get_output_embeddings()
    head.register_forward_hook(
        lambda module, args, output: rows.append(output.numel() // output.shape[-1]) if output.shape[-1] == 97 else None
    )
    data = [{"input_ids": torch.randint(0, 97, (64,))} for _ in range(4)]
    losses = []
    for heads in (True, False):
        if not heads:
            monkeypatch.setattr("dsla_hf.training.trainer.plain_head", lambda *args: None)
        options = {"per_device_train_batch_size": 2, "use_cpu": True, "report_to": []}
        trainer = DSLATrainer(model, DSLATrainingArguments(output_dir=str(tmp_path), **options), train_dataset=data, eval_dataset=data)
        losses.append(trainer.evaluate()["eval_loss"])
        assert max(rows) == (4 if heads else 4 * 64)  # the few tokens of the look at the head, or all of a batch
        rows.clear()
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
