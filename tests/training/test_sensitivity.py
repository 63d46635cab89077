"""Ranking the layers by what converting each one costs."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BatchEncoding

from dsla_hf import DSLAConfig, DSLALayer
from dsla_hf.training.ranking import LayerRanking, rank_layers

ORDER = [2, 0, 3, 1]  # the plan of the fixture `adapter_model`


def token_ids(batch=2, tokens=37):
    return torch.randint(3, 97, (batch, tokens))


def layers_of(model):
    return {module.layer_idx: module for module in model.modules() if isinstance(module, DSLALayer)}


def ranked(model, data, **options):
    return rank_layers(model, data, progress=False, **options)


def kl_of_one_layer(model, layer, batches):
    """Mean KL(base || base with one layer converted) over real tokens, in fp64."""
    model.eval()
    model.set_conversion_order([layer, *(i for i in ORDER if i != layer)])
    total, tokens = 0.0, 0
    for batch in batches:
        log_probabilities = []
        for level in (0, 1):
            model.set_level(level)
            with torch.no_grad():
                log_probabilities.append(model(**batch).logits.double().log_softmax(-1))
        teacher, student = log_probabilities
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        total += (teacher.exp() * (teacher - student)).sum(-1)[real].sum().item()
        tokens += int(real.sum())
    model.set_conversion_order(ORDER)
    return total / tokens


@pytest.fixture
def base(base_kind, tiny_model):
    return tiny_model(base_kind)


@pytest.fixture
def model(base, adapter_model):
    return adapter_model(base, level=3)


@pytest.fixture
def llama(tiny_model, adapter_model):
    """An adapter on a small Llama."""
    return adapter_model(tiny_model("llama"), level=3)


# --- the ranking ------------------------------------------------------------------------------------------------


def test_scores_are_the_kl_of_converting_each_layer_alone(model):
    batches = [{"input_ids": token_ids(2, 37)}, {"input_ids": token_ids(1, 11)}]
    ranking = ranked(model, [batch["input_ids"] for batch in batches])
    assert ranking.metric == "kl" and ranking.tokens == 2 * 37 + 11
    assert set(ranking.scores) == set(ORDER)
    for layer, score in ranking.scores.items():
        assert score == pytest.approx(kl_of_one_layer(model, layer, batches), rel=1e-4)
    assert ranking.order == sorted(ORDER, key=lambda layer: ranking.scores[layer])


def test_masked_positions_do_not_count(model):
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :7], mask[1, 15:] = 0, 0
    batches = [{"input_ids": token_ids(2, 20), "attention_mask": mask}, {"input_ids": token_ids(1, 30)}]
    ranking = ranked(model, batches)
    assert ranking.tokens == 13 + 15 + 30
    for layer, score in ranking.scores.items():
        assert score == pytest.approx(kl_of_one_layer(model, layer, batches), rel=1e-4)
    changed = {**batches[0], "input_ids": torch.where(mask.bool(), batches[0]["input_ids"], 50)}
    assert ranked(model, [changed, batches[1]]).scores == pytest.approx(ranking.scores, rel=1e-5)


@pytest.mark.parametrize("harm", ["zero", "noise"])
def test_ruined_layer_ranks_last_and_untouched_one_first(base, harm):
    """With a window of nearly the whole text, untouched layers are close to the softmax attention that they replace."""
    model = get_peft_model(base, DSLAConfig(task_type="CAUSAL_LM", window_size=64))
    untouched, ruined = 1, 0
    with torch.no_grad():
        for index, layer in layers_of(model).items():
            weight = layer.dsla_o_proj["default"].weight
            if index == ruined:
                weight.copy_(torch.zeros_like(weight) if harm == "zero" else weight + torch.randn_like(weight))
            elif index != untouched:
                weight.mul_(0.7)
    ranking = ranked(model, [token_ids(4, 76)])
    assert (ranking.order[0], ranking.order[-1]) == (untouched, ruined)
    assert ranking.scores[untouched] < 0.1 * ranking.scores[ruined]


def test_layers_outside_the_plan_are_not_ranked(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"), conversion_order=[3, 1])
    ranking = ranked(model, [token_ids()])
    assert sorted(ranking.order) == sorted(ranking.scores) == [1, 3]


def test_ranking_does_not_depend_on_plan_or_level(llama):
    data = [token_ids()]
    expected = ranked(llama, data)
    for order, level in (([0, 1, 2, 3], 0), ([3, 2, 1, 0], 4)):
        llama.set_conversion_order(order)
        llama.set_level(level)
        assert ranked(llama, data) == expected


@pytest.mark.parametrize(
    "kind",
    [
        lambda ids: ids,
        lambda ids: ids.tolist(),
        lambda ids: {"input_ids": ids},
        lambda ids: {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()},
        lambda ids: {"input_ids": ids, "labels": torch.full_like(ids, -100), "text": "not for the model"},
        lambda ids: BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)}),
    ],
    ids=["tensor", "lists", "dict", "dict of lists", "dict with more in it", "what a tokenizer gives"],
)
def test_kinds_of_batches(llama, kind):
    ids = token_ids(2, 24)
    expected = ranked(llama, [ids])
    assert ranked(llama, [kind(ids)]).scores == pytest.approx(expected.scores, rel=1e-5)


def test_single_sequences_are_batches_of_one(llama):
    ids = token_ids(2, 24)
    found = ranked(llama, [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids])
    assert found.tokens == 48 and found.scores == pytest.approx(ranked(llama, [ids]).scores, rel=1e-4)


def test_data_is_read_once(llama):
    batches = [token_ids(1, 24), token_ids(2, 19)]
    assert ranked(llama, iter(batches)) == ranked(llama, batches)


# --- the model afterwards ---------------------------------------------------------------------------------------


def state_of(model):
    config = model.peft_config["default"]
    flags = {name: module.training for name, module in model.named_modules()}
    weights = {name: (p.detach().clone(), p.requires_grad, p.grad) for name, p in model.named_parameters()}
    return (list(config.conversion_order), config.level, config.order_scores, flags), weights


def assert_state(model, expected):
    state, weights = state_of(model)
    assert state == expected[0]
    for name, (weight, requires_grad, grad) in weights.items():
        before = expected[1][name]
        assert torch.equal(weight, before[0]) and requires_grad == before[1] and grad is before[2], name


@pytest.mark.parametrize("training", [True, False])
def test_model_is_afterwards_what_it_was(llama, training):
    before = state_of(llama.train(training))
    ranked(llama, [token_ids()])
    assert_state(llama, before)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fault", ["reading", "running"])
def test_model_is_what_it_was_after_an_error_too(llama, fault, training):
    def data():
        yield token_ids()
        if fault == "reading":
            raise OSError("the disk is gone")
        yield torch.full((1, 5), 1000)  # no such token

    before = state_of(llama.train(training))
    with pytest.raises((OSError, IndexError)):
        ranked(llama, data())
    assert_state(llama, before)


def test_dropout_plays_no_part(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama", attention_dropout=0.5)).train()
    data = [token_ids()]
    assert ranked(model, data) == ranked(model, data) and model.training


# --- errors -----------------------------------------------------------------------------------------------------


def test_unknown_metric_is_refused(llama):
    with pytest.raises(ValueError, match=r"metric must be one of \['kl', 'greedy', 'entropy'\], got 'accuracy'"):
        ranked(llama, [token_ids()], metric="accuracy")


def test_text_that_the_window_reads_alone_is_refused(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"))  # window_size 8 and sink_tokens 4
    with pytest.raises(ValueError, match=r"to rank layers on has 8 % of its tokens beyond the window, which reads 12 tokens"):
        ranked(model, [token_ids(2, 13)])
    ranked(model, [token_ids(2, 13), token_ids(1, 20)])  # some short texts among longer ones
    ranked(model, [token_ids(2, 12)], metric="entropy")
    ranked(adapter_model(tiny_model("llama"), window_size=0), [token_ids(2, 2)])


@pytest.mark.parametrize("data", [[], iter(())], ids=["list", "iterator"])
def test_no_data_is_refused(llama, data):
    with pytest.raises(ValueError, match="rank_layers got no data"):
        ranked(llama, data)


def test_model_without_a_dsla_adapter_is_refused(tiny_model):
    lora = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for model in (lora, tiny_model("llama")):
        with pytest.raises(ValueError, match=r"needs a DSLA adapter: get_peft_model\(model, DSLAConfig"):
            ranked(model, [token_ids()])


# --- storing it -------------------------------------------------------------------------------------------------


def test_ranking_survives_json():
    ranking = LayerRanking([11, 2, 0], {0: 0.5, 2: 0.25, 11: 1e-7}, "kl", 12)
    assert LayerRanking.from_dict(json.loads(json.dumps(ranking.to_dict()))) == ranking


def test_measured_ranking_survives_json(llama):
    ranking = ranked(llama, [token_ids()])
    assert LayerRanking.from_dict(json.loads(json.dumps(ranking.to_dict()))) == ranking


def test_ranking_is_stored_in_the_plan_and_saved(llama, tmp_path):
    ranking = ranked(llama, [token_ids()])
    llama.set_conversion_order(ranking.order, ranking.scores)
    llama.save_pretrained(tmp_path)
    config = DSLAConfig.from_pretrained(tmp_path)
    assert config.conversion_order == ranking.order and config.level == 3
    assert {int(layer): score for layer, score in config.order_scores.items()} == ranking.scores
    loaded = PeftModel.from_pretrained(llama.unload(), tmp_path)
    assert sorted(index for index, layer in layers_of(loaded).items() if layer.converted) == sorted(ranking.order[:3])


# --- the other metrics ------------------------------------------------------------------------------------------


def test_greedy_takes_the_best_next_layer_each_time(model):
    batches = [{"input_ids": token_ids(2, 37)}]

    def kl_of(layers):
        model.set_conversion_order([*layers, *(i for i in ORDER if i not in layers)])
        with torch.no_grad():
            model.set_level(0)
            teacher = model(**batches[0]).logits.double().log_softmax(-1)
            model.set_level(len(layers))
            student = model(**batches[0]).logits.double().log_softmax(-1)
        model.set_conversion_order(ORDER)
        return (teacher.exp() * (teacher - student)).sum(-1).mean().item()

    ranking = ranked(model.eval(), batches, metric="greedy")
    chosen = []
    for layer in ranking.order:
        costs = {other: kl_of([*chosen, other]) for other in ORDER if other not in chosen}
        assert layer == min(costs, key=costs.__getitem__)
        assert ranking.scores[layer] == pytest.approx(costs[layer], rel=1e-3)
        chosen.append(layer)
    assert ranking.metric == "greedy" and ranking.passes == 4 + 3 + 2 + 1 + 1


def test_greedy_starts_with_the_best_single_layer(llama):
    batches = [token_ids(2, 20)]
    greedy, single = (ranked(llama, batches, metric=metric) for metric in ("greedy", "kl"))
    assert greedy.order[0] == single.order[0] and greedy.scores[greedy.order[0]] == pytest.approx(single.scores[single.order[0]])


def entropy_by_hand(base, rows):
    """Entropy in nats of each layer's attention at the last token of each row, mean over heads and rows."""
    implementation = base.config._attn_implementation
    base.set_attn_implementation("eager")
    totals = torch.zeros(base.config.num_hidden_layers, dtype=torch.float64)
    with torch.no_grad():
        for row in rows:
            weights = base(input_ids=row[None], output_attentions=True).attentions
            totals += torch.stack([-(w[0, :, -1].double() * w[0, :, -1].double().clamp_min(1e-300).log()).sum(-1).mean() for w in weights])
    base.set_attn_implementation(implementation)
    return (totals / len(rows)).tolist()


def test_entropy_is_that_of_the_last_real_token(base, adapter_model):
    rows = [token_ids(1, tokens)[0] for tokens in (12, 20, 7)]
    expected = entropy_by_hand(base, rows)
    ids, mask = torch.full((3, 20), 5), torch.zeros(3, 20, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    model = adapter_model(base, level=3)
    before = model.get_base_model().config._attn_implementation
    ranking = ranked(
        model, [{"input_ids": ids[:2], "attention_mask": mask[:2]}, {"input_ids": ids[2:], "attention_mask": mask[2:]}], metric="entropy"
    )
    assert [ranking.scores[layer] for layer in sorted(ranking.scores)] == pytest.approx(expected, rel=1e-5)
    assert ranking.order == sorted(range(4), key=expected.__getitem__) and ranking.passes == 1
    assert model.get_base_model().config._attn_implementation == before


def test_entropy_is_that_of_the_original_whatever_the_level(llama):
    batches = [token_ids(2, 20)]
    llama.set_level(0)
    expected = ranked(llama, batches, metric="entropy")
    llama.set_level(4)
    assert ranked(llama, batches, metric="entropy") == expected


@pytest.mark.parametrize("metric", ["greedy", "entropy"])
def test_other_metrics_leave_the_model_as_it_was(llama, metric):
    before = state_of(llama.train())
    ranked(llama, [token_ids()], metric=metric)
    assert_state(llama, before)
