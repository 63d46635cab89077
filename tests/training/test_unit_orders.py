"""Orders of KV heads to compare with: each is what it says, computed plainly; and an order that is even over ranks."""

import pytest
import torch

from dsla_hf.training.losses import kl_loss
from dsla_hf.training.ranking import rank_layers
from dsla_hf.training.unit_orders import balanced_order
from dsla_hf.training.unit_ranking import UnitRanking, rank_units

IDS = torch.randint(3, 97, (2, 40), generator=torch.Generator().manual_seed(1))
ANSWER = torch.zeros(1, 30, dtype=torch.bool)
ANSWER[:, -2:] = True
PROBES = [{"input_ids": torch.randint(3, 97, (1, 30), generator=torch.Generator().manual_seed(i)), "answer_mask": ANSWER} for i in range(2)]
EVERY = [(layer, head) for layer in range(4) for head in range(2)]


@pytest.fixture(params=["llama", "gpt_oss"])
def model(request, tiny_model, adapter_model):
    return adapter_model(tiny_model(request.param), conversion_unit="head", conversion_order=EVERY[2:], level=2)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_single_is_the_harm_of_a_level_of_one_head(model):
    ranking = rank_units(model, [IDS], PROBES, metric="single", probe_weight=0.5, batch_tokens=100)
    assert ranking.passes == 6 and ranking.tokens == 80 + 60 and ranking.metric == "single" and model.get_level() == 2
    for unit in EVERY[2:]:
        model.set_conversion_order([unit, *(other for other in EVERY[2:] if other != unit)])
        harm = 0.0
        for ids, last, weight in [(IDS, slice(None), 1.0), *((probe["input_ids"], slice(-3, -1), 0.25) for probe in PROBES)]:
            model.set_level(0)
            base = logits(model, ids)[:, last]
            model.set_level(1)
            harm += weight * kl_loss(logits(model, ids)[:, last], base).item()
        assert ranking.scores[unit] == pytest.approx(harm, rel=1e-3)
    assert ranking.order == sorted(EVERY[2:], key=ranking.scores.__getitem__)


def test_entropy_is_that_of_the_last_query_of_the_base(model):
    padded = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    padded["attention_mask"][1, 30:] = 0
    ranking = rank_units(model, [padded], metric="entropy")
    base = model.get_base_model()
    base.set_attn_implementation("eager")
    entropies = {}
    with torch.no_grad(), model.disable_adapter():
        weights = [model(input_ids=ids, use_cache=False, output_attentions=True).attentions for ids in (IDS[:1], IDS[1:, :30])]
    for layer, head in EVERY[2:]:
        last = torch.stack([of_row[layer][0, 2 * head : 2 * head + 2, -1] for of_row in (weights[0],)])
        first = torch.special.entr(last).sum(-1).mean()
        second = torch.special.entr(weights[1][layer][0, 2 * head : 2 * head + 2, -1]).sum(-1).mean()
        entropies[layer, head] = ((first + second) / 2).item()
    assert ranking.scores == pytest.approx(entropies, rel=1e-4)
    assert ranking.order == sorted(EVERY[2:], key=entropies.__getitem__) and ranking.passes == 1


def test_entropies_of_heads_make_that_of_their_layer(tiny_model, adapter_model):
    model = adapter_model(tiny_model("llama"))
    heads, layers = rank_units(model, [IDS], metric="entropy"), rank_layers(model, [IDS], metric="entropy")
    for layer, entropy in layers.scores.items():
        assert (heads.scores[layer, 0] + heads.scores[layer, 1]) / 2 == pytest.approx(entropy, rel=1e-5)


def test_random_is_of_its_seed_and_needs_no_data(model):
    orders = [rank_units(model, [], metric="random", seed=seed) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] and orders[0].order != orders[2].order
    assert all(sorted(ranking.order) == EVERY[2:] and ranking.passes == ranking.tokens == 0 for ranking in orders)
    assert UnitRanking.from_dict(orders[2].to_dict()) == orders[2]


def test_unknown_metric_is_refused(model):
    with pytest.raises(ValueError, match=r"metric must be one of \['shares', 'single', 'entropy', 'random'\], got 'kl'"):
        rank_units(model, [IDS], metric="kl")


# --- ranks ------------------------------------------------------------------------------------------------------


def converted_per_rank(order, ranks, kv_heads):
    counts = [0] * ranks
    for _, head in order:
        counts[head * ranks // kv_heads] += 1
        yield list(counts)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_every_beginning_of_a_balanced_order_is_even(ranks):
    units = [(layer, head) for layer in range(6) for head in range(8)]
    order = [units[i] for i in torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    balanced = balanced_order(order, ranks, 8)
    assert sorted(balanced) == units and all(max(counts) - min(counts) <= 1 for counts in converted_per_rank(balanced, ranks, 8))
    for rank in range(ranks):
        own = [unit for unit in order if unit[1] * ranks // 8 == rank]
        assert [unit for unit in balanced if unit in own] == own, "of a rank the order stays"
    assert ranks > 1 or balanced == order


def test_an_order_that_is_even_stays():
    order = [(0, 1), (0, 0), (3, 0), (2, 1), (1, 1), (1, 0)]
    assert balanced_order(order, 2, 2) == order


def test_a_rank_without_more_heads_is_passed_over():
    assert balanced_order([(0, 0), (1, 0), (2, 0), (0, 3)], 2, 4) == [(0, 0), (0, 3), (1, 0), (2, 0)]


def test_rank_units_balances(model):
    ranking = rank_units(model, [], metric="random", ranks=2, seed=3)
    assert ranking.order == balanced_order(rank_units(model, [], metric="random", seed=3).order, 2, 2)
    assert list(ranking.scores) == ranking.order


@pytest.mark.parametrize(("ranks", "words"), [(3, "divide the 2 KV heads"), (0, "got 0")])
def test_ranks_that_do_not_divide_the_heads_are_refused(ranks, words, model):
    with pytest.raises(ValueError, match=words):
        rank_units(model, [IDS], ranks=ranks)
    with pytest.raises(ValueError, match=r"names \[\(0, 5\)\]"):
        balanced_order([(0, 5)], 2, 2)
