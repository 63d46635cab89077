"""`distill` of a plan of heads: alignment of subsets, ranking of heads on text and probes, random levels."""

import json

import pytest
import torch
from transformers import TrainerCallback

from dsla_hf.models.level import dsla_layers
from dsla_hf.training import recipe
from dsla_hf.training.arguments import DSLATrainingArguments
from dsla_hf.training.recipe import distill
from dsla_hf.training.unit_ranking import UnitRanking, rank_units

TEXTS = [torch.randint(3, 97, (1, 32), generator=torch.Generator().manual_seed(i)) for i in range(2)]
DATA = [{"input_ids": ids} for ids in torch.randint(3, 97, (8, 32), generator=torch.Generator().manual_seed(9))]
MASK = torch.zeros(1, 32, dtype=torch.bool)
MASK[:, -2:] = True
PROBES = [{"input_ids": TEXTS[0], "answer_mask": MASK}]


def arguments(folder, **options):
    settings = {
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return DSLATrainingArguments(output_dir=str(folder), **{"seed": 5, "learning_rate": 1e-2, **settings, **options})


@pytest.fixture
def fresh(tiny_model, adapter_model):
    def make(**config):
        torch.manual_seed(0)
        return adapter_model(tiny_model("llama"), **{"conversion_unit": "head", "conversion_order": None, "level": 0, **config})

    return make


def run(model, folder, steps=3, probes=PROBES, metric=None, callbacks=(), **options):
    settings = {"alignment_steps": steps, "logits_steps": steps, "ranking_data": TEXTS, "ranking_probes": probes}
    return distill(model, DATA, arguments(folder, **options), ranking_metric=metric, callbacks=list(callbacks), **settings)


class Stop(TrainerCallback):
    """Interrupts a stage after a step."""

    def __init__(self, stage, step):
        self.stage, self.step = stage, step

    def on_step_begin(self, args, state, control, **kwargs):
        if args.stage == self.stage and state.global_step == self.step:
            raise KeyboardInterrupt


def test_heads_are_ranked_after_the_alignment_and_the_order_is_stored(fresh, tmp_path):
    model = fresh()
    ranking = run(model, tmp_path, seed=6)
    config = model.peft_config["default"]
    assert config.conversion_order == ranking.order and len(ranking.order) == 8 and config.level == 8
    content = json.loads((tmp_path / "ranking.json").read_text())
    assert UnitRanking.from_dict(content) == ranking
    assert content["metric"] == "shares" and content["tokens"] == 96 and content["passes"] > 0 and len(content["scores"]) == 8
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored["conversion_order"] == [list(unit) for unit in ranking.order] and len(stored["order_scores"]) == 8


@pytest.mark.parametrize(("stage", "step"), [("alignment", 2), ("logits", 1)])
def test_an_interrupted_run_gives_what_one_run_gives(stage, step, fresh, tmp_path, monkeypatch):
    options = {"sequence_lengths": [16, 32]}
    whole = fresh()
    expected = run(whole, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        run(fresh(), tmp_path / "again", callbacks=[Stop(stage, step)], **options)
    if stage == "logits":
        monkeypatch.setattr(recipe, "rank_units", lambda *a, **k: pytest.fail("the ranking is there"))
    model = fresh()
    assert run(model, tmp_path / "again", **options) == expected
    weights = dict(whole.named_parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_the_metric_is_the_one_asked_for(fresh, tmp_path):
    model = fresh()
    ranking = run(model, tmp_path, steps=0, metric="entropy")
    assert ranking == rank_units(fresh(), TEXTS, PROBES, metric="entropy")


@pytest.mark.parametrize(
    ("options", "config", "words"),
    [
        ({"metric": "greedy"}, {}, "heads are ranked by one of"),
        ({"metric": "shares", "probes": ()}, {"conversion_unit": "layer"}, "layers are ranked by one of"),
        ({}, {"conversion_unit": "layer"}, "probes rank heads"),
        ({"train_level": "kept:90"}, {}, "keeps more KV heads than the 8"),
        ({"sequence_lengths": [8, 32]}, {}, "cut to the shortest of sequence_lengths"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_trained(options, config, words, fresh, tmp_path):
    with pytest.raises(ValueError, match=words):
        run(fresh(**config), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_a_chain_of_heads_is_refused(fresh, tmp_path):
    with pytest.raises(ValueError, match="trains one whole layer after the other, and this plan counts heads"):
        distill(fresh(), DATA, arguments(tmp_path), alignment_steps=1, logits_steps=8, method="chain")


def test_biases_that_a_split_layer_does_not_use_have_a_gradient_of_zero(tiny_model, adapter_model, tmp_path):
    """As DDP needs, which waits for every gradient."""
    model = adapter_model(tiny_model("gpt_oss"), conversion_unit="head", conversion_order=[[1, 0], [3, 1]], level=0)
    found = {}

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({n: p.grad for n, p in model.named_parameters() if p.requires_grad})

    distill(model, DATA, arguments(tmp_path, train_level=1), alignment_steps=0, logits_steps=1, callbacks=[Gradients()])
    assert found and all(gradient is not None for gradient in found.values())
    biases = {name: gradient for name, gradient in found.items() if "dsla_o_proj" in name and "bias" in name}
    assert len(biases) == 2 and not any(gradient.any() for gradient in biases.values())
    assert len(dsla_layers(model)) == 2
