"""The order of KV heads: shares of the harm add up to it, and a head that is ruined is converted last."""

import pytest
import torch

from dsla_hf.models.level import dsla_layers
from dsla_hf.training.losses import kl_loss
from dsla_hf.training.switches import switched
from dsla_hf.training.unit_ranking import UnitRanking, _rounds, rank_units

IDS = torch.randint(3, 97, (2, 60), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["llama", "qwen3", "gemma2", "phi3"])
def model(request, tiny_model, adapter_model):
    return adapter_model(tiny_model(request.param), level=2)


@pytest.fixture
def llama(tiny_model, adapter_model):
    return adapter_model(tiny_model("llama"), level=1)


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_switches_lead_from_the_base_to_the_whole_plan(model):
    with model.disable_adapter():
        base = logits(model)
    model.set_level(4)
    whole = logits(model)
    for value, expected in ((0.0, base), (1.0, whole)):
        with switched(model, {index: torch.full((2,), value) for index in range(4)}):
            torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=0)
    assert torch.equal(logits(model), whole), "the model stays as it is"


def test_shares_add_up_to_the_harm(llama):
    with llama.disable_adapter():
        base = logits(llama)
    llama.set_level(4)
    harm = kl_loss(logits(llama), base).item()
    llama.set_level(1)
    ranking = rank_units(llama, [IDS], points=32, first_kept=1.0)
    assert sum(ranking.scores.values()) == pytest.approx(harm, rel=1e-3)
    assert llama.get_level() == 1 and ranking.passes == 32 and ranking.tokens == 120
    assert sorted(ranking.order) == [(layer, head) for layer in range(4) for head in range(2)]
    assert [ranking.scores[unit] for unit in ranking.order] == sorted(ranking.scores.values())


@pytest.mark.parametrize("unit", [(0, 1), (3, 0)])
def test_a_ruined_head_is_converted_last(llama, unit):
    layer, head = unit
    core = dsla_layers(llama)[layer].dsla_core["default"]
    with torch.no_grad():
        core.norm_weight[2 * head : 2 * head + 2] *= 40
        core.state_bias[2 * head : 2 * head + 2] += 30
    trained = {name: p.requires_grad for name, p in llama.named_parameters()}
    ranking = rank_units(llama.train(), [IDS[:1], {"input_ids": IDS[1:]}], points=4)
    assert ranking.order[-1] == unit
    assert llama.training and trained == {name: p.requires_grad for name, p in llama.named_parameters()}


def test_probes_count_where_their_answers_are(llama):
    mask = torch.zeros_like(IDS, dtype=torch.bool)
    mask[:, -3:] = True
    ranking = rank_units(llama, [], [{"input_ids": IDS, "answer_mask": mask}], probe_weight=1.0, points=32, first_kept=1.0)
    with llama.disable_adapter():
        base = logits(llama)
    llama.set_level(4)
    harm = kl_loss(logits(llama)[:, -4:-1], base[:, -4:-1]).item()
    assert sum(ranking.scores.values()) == pytest.approx(harm, rel=5e-3)


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_what_is_read_at_once_changes_nothing(batch_tokens, llama):
    """Texts with and without padding, probes of two lengths."""
    padded = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    padded["attention_mask"][0, 40:] = 0
    probes = [{"input_ids": IDS[i % 2 :][:1, : 20 + 10 * (i // 2)]} for i in range(4)]
    for probe in probes:
        probe["answer_mask"] = torch.zeros_like(probe["input_ids"], dtype=torch.bool)
        probe["answer_mask"][:, -2:] = True
    options = {"points": 3, "first_kept": 0.5, "probe_weight": 0.7}
    ranking = rank_units(llama, [padded, IDS[:1]], probes, batch_tokens=batch_tokens, **options)
    expected = rank_units(llama, [padded, IDS[:1]], probes, **options)
    assert ranking.scores == pytest.approx(expected.scores, rel=1e-3, abs=1e-6) and ranking.tokens == 120 + 60 + 2 * 50


def test_rounds_double_and_end_with_all():
    assert _rounds(90, 0.03) == [3, 6, 12, 24, 48, 90]
    assert _rounds(8, 1.0) == [8] and _rounds(8, 0.01) == [1, 2, 4, 8]
    assert _rounds(1024, 0.03)[-1] == 1024 and len(_rounds(1024, 0.03)) == 6


def test_a_ranking_is_stored_and_read():
    ranking = UnitRanking([(1, 0), (0, 1)], {(1, 0): 0.25, (0, 1): 1.5}, 64, 8)
    assert UnitRanking.from_dict(ranking.to_dict()) == ranking


def test_a_plan_of_heads_is_ranked_and_takes_the_order(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), conversion_unit="head", conversion_order=None, level=3)
    ranking = rank_units(model, [IDS])
    assert model.get_level() == 3 and sorted(ranking.order) == [(layer, head) for layer in range(4) for head in range(2)]
    model.set_conversion_order(ranking.order, ranking.scores)
    config = model.peft_config["default"]
    assert config.conversion_order == ranking.order and config.level == 3


def test_heads_that_the_plan_has_not_stay_softmax_attention(tiny_model, adapter_model):
    plan = [(2, 1), (0, 0), (0, 1)]
    model = adapter_model(tiny_model("llama"), conversion_unit="head", conversion_order=plan, level=0)
    with model.disable_adapter():
        base = logits(model)
    model.set_level(3)
    harm = kl_loss(logits(model), base).item()
    ranking = rank_units(model, [IDS], points=32, first_kept=1.0)
    assert sorted(ranking.order) == sorted(plan) and sum(ranking.scores.values()) == pytest.approx(harm, rel=1e-3)


def test_what_makes_no_sense_is_refused(llama, tiny_model):
    with pytest.raises(ValueError, match="neither data nor probes"):
        rank_units(llama, [])
    with pytest.raises(ValueError, match="points must be 1 or more"):
        rank_units(llama, [IDS], points=0)
    with pytest.raises(ValueError, match="needs a DSLA adapter"):
        rank_units(tiny_model("llama"), [IDS])


def test_probes_without_weight_are_left_out(llama):
    probe = {"input_ids": IDS, "answer_mask": torch.ones_like(IDS, dtype=torch.bool)}
    found, expected = (rank_units(llama, [IDS], probes, probe_weight=0.0, points=2) for probes in ([probe], []))
    assert found.scores == expected.scores and found.tokens == expected.tokens
    with pytest.raises(ValueError, match="neither data nor probes"):
        rank_units(llama, [], [probe], probe_weight=0.0)
