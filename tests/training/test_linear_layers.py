"""Bases with linear layers are ranked and trained as others are: their softmax attention."""

import math

import pytest
import torch
from peft import get_peft_model
from tiny import tiny_model_of

from dsla_hf import DSLAConfig
from dsla_hf.models.architectures import convertible_layers
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.ranking import rank_layers
from dsla_hf.training.trainer import DSLATrainer
from dsla_hf.training.unit_ranking import rank_units


@pytest.mark.parametrize("unit", ["layer", "head"])
@pytest.mark.parametrize("kind", ["lfm2", "falcon_h1"])
def test_ranking_and_both_stages(kind, unit, tmp_path):
    torch.manual_seed(0)
    base = tiny_model_of(kind)
    layers = convertible_layers(base.config)
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", window_size=8, sink_tokens=2, conversion_unit=unit))
    texts = list(torch.randint(3, 97, (12, 40)))
    order = (rank_layers if unit == "layer" else rank_units)(model, texts[:3]).order
    units = layers if unit == "layer" else [(layer, head) for layer in layers for head in (0, 1)]
    assert sorted(order) == sorted(units)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for stage in ("alignment", "logits"):
        args = DSLATrainingArguments(
            output_dir=str(tmp_path / stage),
            stage=stage,
            per_device_train_batch_size=2,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = DSLATrainer(model=model, args=args, train_dataset=[{"input_ids": ids} for ids in texts])
        trainer.train()
        assert all(math.isfinite(row["loss"]) for row in trainer.state.log_history if "loss" in row)
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("dsla_" in name for name in changed)
