"""Steps that are recorded with a switch for every KV head train what steps train that run as they are."""

import threading

import pytest
import torch
from transformers import TrainerCallback, masking_utils
from transformers.masking_utils import create_causal_mask

from dsla_hf.compat.attention_functions import masks_as_rehearsed
from dsla_hf.inference.recorder import CudaRecording, PlainRecording
from dsla_hf.training import recorded
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.trainer import DSLATrainer

ORDER = [(2, 1), (0, 0), (3, 0), (1, 1), (0, 1), (3, 1), (2, 0), (1, 0)]
ON_GPU = torch.cuda.is_available()


@pytest.fixture
def record(monkeypatch):
    monkeypatch.setattr(recorded, "RECORD", CudaRecording if ON_GPU else PlainRecording)


def trained(tmp_path, tiny_model, adapter_model, recorded, stage, masked=False, steps=7, options=None, collator=None, **config):
    """Trainer, and its weights before and after some steps on rows of two lengths."""
    torch.manual_seed(0)
    model = adapter_model(tiny_model("llama"), **config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = torch.randint(0, 97, (16, 48))
    data = [{"input_ids": row, **({"loss_mask": (row % 3 > 0).float()} if masked else {})} for row in rows]
    values = {
        "output_dir": str(tmp_path / str(recorded)),
        "stage": stage,
        "per_device_train_batch_size": 2,
        "sequence_lengths": [24, 48],
        "max_steps": steps,
        "optim": "sgd",  # as far as the gradients are
        "learning_rate": 0.1,
        "cuda_graphs": recorded,
        "use_liger_kernel": False,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": not ON_GPU,
    }
    args = DSLATrainingArguments(**{**values, **(options or {})})
    trainer = DSLATrainer(model, args, train_dataset=data, data_collator=collator)
    trainer.train()
    return trainer, before, {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


CASES = [
    ("alignment", {"conversion_unit": "head", "conversion_order": ORDER}),
    ("alignment", {}),
    ("logits", {"conversion_unit": "head", "conversion_order": ORDER}),
    ("logits", {"conversion_unit": "head", "conversion_order": ORDER, "states": False}),
    ("logits", {"conversion_unit": "head", "conversion_order": ORDER[:3]}),
    ("logits", {"conversion_order": [2, 0]}),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("stage", "config"), CASES)
def test_recorded_steps_train_the_same(record, tmp_path, tiny_model, adapter_model, stage, config, masked, caplog):
    plain, before, expected = trained(tmp_path, tiny_model, adapter_model, False, stage, masked, **config)
    trainer, _, found = trained(tmp_path, tiny_model, adapter_model, True, stage, masked, **config)
    assert "cannot be recorded" not in caplog.text
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5)
    assert any((value - before[name]).abs().max() > 1e-3 for name, value in expected.items())
    logs = [[entry["loss"] for entry in x.state.log_history if "loss" in entry] for x in (plain, trainer)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-3) and len(logs[0]) == 7
    terms = [{name for entry in x.state.log_history for name in entry} for x in (plain, trainer)]
    assert terms[0] == terms[1]


def test_masks_are_left_out_where_a_rehearsal_had_none(tiny_model, monkeypatch):
    config, none = tiny_model("llama").config, {}
    rows, positions = torch.zeros(1, 6, 32), torch.arange(6)[None]

    def mask(length=6):
        given = {"inputs_embeds": rows[:, :length], "attention_mask": None, "past_key_values": None}
        return create_causal_mask(config, **given, position_ids=positions[:, :length])

    with masks_as_rehearsed(none):
        assert mask() is None
        # As transformers has it while a stream is captured: it cannot tell whether rows are packed.
        monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert mask() is None and mask(5) is not None
    assert mask() is not None


@pytest.mark.parametrize("options", [{"max_grad_norm": 0.01}, {"optim": "adamw_torch", "learning_rate": 1e-3}])
def test_other_settings_of_the_optimizer(record, tmp_path, tiny_model, adapter_model, options):
    _, _, expected = trained(tmp_path, tiny_model, adapter_model, False, "logits", options=options)
    _, _, found = trained(tmp_path, tiny_model, adapter_model, True, "logits", options=options)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-2, atol=2e-4)


def test_batches_that_are_not_plain_run_as_they_are(record, tmp_path, tiny_model, adapter_model, monkeypatch):
    """Rows that are padded, or hold several texts, come among others."""
    steps = []

    def collator(items):
        steps.append(len(steps))
        batch = {"input_ids": torch.stack([item["input_ids"] for item in items])}
        if steps[-1] % 3 == 1:
            batch["attention_mask"] = (torch.arange(48) < 40).long().repeat(len(items), 1)
        if steps[-1] % 3 == 2:
            batch["position_ids"] = torch.cat([torch.arange(20), torch.arange(28)]).repeat(len(items), 1)
        return batch

    replayed, run = [], recorded.RecordedSteps.__call__
    monkeypatch.setattr(
        recorded.RecordedSteps, "__call__", lambda self, inputs, *rest: replayed.append(set(inputs)) or run(self, inputs, *rest)
    )
    options = {"sequence_lengths": None, "dataloader_num_workers": 0}
    _, _, expected = trained(tmp_path, tiny_model, adapter_model, False, "logits", options=options, collator=collator)
    assert not replayed
    steps.clear()
    _, _, found = trained(tmp_path, tiny_model, adapter_model, True, "logits", options=options, collator=collator)
    assert replayed == [{"input_ids"}] * 3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=2e-3, atol=2e-5)


def test_what_cannot_be_recorded_is_said(record, tmp_path, tiny_model, adapter_model):
    for options, words in (
        ({"gradient_accumulation_steps": 2}, "gradients are accumulated over several batches"),
        ({"train_level": 2}, "all steps have one level"),
        ({"hidden_weight": 1.0}, "hidden states are compared"),
        ({"torch_compile": True}, "the model is compiled"),
    ):
        with pytest.raises(ValueError, match=f"cuda_graphs=True is not possible here, {words}"):
            trained(tmp_path, tiny_model, adapter_model, True, "logits", steps=1, options=options)


def test_a_run_that_goes_on_equals_one_run(record, tmp_path, tiny_model, adapter_model):
    options = {"save_strategy": "steps", "save_steps": 3, "optim": "adamw_torch"}
    _, _, expected = trained(tmp_path, tiny_model, adapter_model, True, "logits", steps=6, options=options)
    trainer, _, _ = trained(tmp_path / "again", tiny_model, adapter_model, True, "logits", steps=6, options=options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "again" / "True" / "checkpoint-3"))
    found = {name: p.detach().cpu() for name, p in trainer.model.named_parameters() if p.requires_grad}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)


@pytest.mark.parametrize("again", [False, True])
def test_gates_learn_faster_by_their_factor_however_often_training_begins(tmp_path, tiny_model, adapter_model, again):
    options = {"learning_rate": 1e-4, "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer, _, _ = trained(tmp_path, tiny_model, adapter_model, False, "logits", steps=2, options=options)
    groups = len(trainer.optimizer.optimizer.param_groups)
    if again:
        trainer.train()
    assert len(trainer.optimizer.optimizer.param_groups) == groups
    cores = {id(p) for name, p in trainer.model.named_parameters() if "dsla_core" in name and "norm_weight" not in name}
    rates = {id(p): group["lr"] for group in trainer.optimizer.optimizer.param_groups for p in group["params"]}
    assert cores < set(rates)
    assert {rates[i] for i in cores} == {20 * 1e-4} and {rate for i, rate in rates.items() if i not in cores} == {1e-4}


def test_a_loss_that_is_not_finite_changes_nothing(record, tmp_path, tiny_model, adapter_model):
    class Breaks(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    weight = next(p for name, p in model.named_parameters() if "layers.2." in name and p.requires_grad)
                    weight.fill_(float("nan"))

    torch.manual_seed(0)
    model = adapter_model(tiny_model("llama"))
    args = DSLATrainingArguments(
        output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, cuda_graphs=True, use_cpu=not ON_GPU, report_to=[]
    )
    data = [{"input_ids": torch.randint(0, 97, (48,))} for _ in range(8)]
    trainer = DSLATrainer(model, args, train_dataset=data, callbacks=[Breaks()])
    with pytest.raises(FloatingPointError, match=r"step 5 is not finite .* the weights of layer 2"):
        trainer.train()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device")
def test_other_threads_may_call_the_driver_while_steps_are_recorded(record, tmp_path, tiny_model, adapter_model):
    """As a data loader's does that pins memory."""
    failures, done = [], threading.Event()

    def pin():
        while not done.is_set():
            try:
                torch.empty(1 << 22).pin_memory()  # larger than what PyTorch keeps for another time
            except RuntimeError as error:
                failures.append(error)
                return

    other = threading.Thread(target=pin)
    other.start()
    try:
        trainer, _, _ = trained(tmp_path, tiny_model, adapter_model, True, "logits")
    finally:
        done.set()
        other.join()
    assert not failures
    assert trainer.state.global_step == 7
