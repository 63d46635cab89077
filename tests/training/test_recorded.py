"""Steps that are recorded with a switch for every KV head train what steps train that run as they are."""

import pytest
import torch
from transformers import masking_utils
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


def trained(tmp_path, tiny_model, adapter_model, recorded, stage, masked=False, steps=7, **config):
    """Trainer, and its weights before and after some steps on rows of two lengths."""
    torch.manual_seed(0)
    model = adapter_model(tiny_model("llama"), **config)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    rows = torch.randint(0, 97, (16, 48))
    data = [{"input_ids": row, **({"loss_mask": (row % 3 > 0).float()} if masked else {})} for row in rows]
    args = DSLATrainingArguments(
        output_dir=str(tmp_path / str(recorded)),
        stage=stage,
        per_device_train_batch_size=2,
        sequence_lengths=[24, 48],
        max_steps=steps,
        optim="sgd",  # as far as the gradients are
        learning_rate=0.1,
        cuda_graphs=recorded,
        use_liger_kernel=False,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        use_cpu=not ON_GPU,
    )
    trainer = DSLATrainer(model, args, train_dataset=data)
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
