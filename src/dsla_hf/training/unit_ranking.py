"""In which order to convert KV heads: `rank_units` measures what each of them is worth, however many there are, by gradients of switches.

Every KV head has a switch between its softmax attention (0) and its DSLA (1). KL to the base, as a function of all switches, is integrated
along the straight way from the base to the model whose heads are all converted: the gradient of a switch, averaged over points of the way,
is the head's share of the harm (Aumann and Shapley's value of a good; integrated gradients, arXiv 1703.01365). Shares add up to the whole
harm, and count what heads do together, such as the two of an induction circuit, where converting one head alone shows nothing.

The heads worth most are then kept, and the others ranked again with these in place, in rounds that double what is kept: retrieval needs few
heads, and which one comes next depends on those that are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..core.progress import bar as progress_bar
from ..models.adapter import DSLAModel
from ..models.level import active_config, dsla_layers
from .losses import kl_sums
from .ranking import base_logits
from .switches import switched
from .unit_batches import Batch, unit_batches
from .unit_orders import Scores, Unit, balanced_order, entropy_scores, random_scores, single_scores

PROBE_WEIGHT = 1.0  # of the KL of answers beside that of text
# Of texts, probes and points that a forward reads at once: with 16,384 a model of 135 M parameters took 22 GB on a CPU.
BATCH_TOKENS = {"cuda": 16_384, "cpu": 2_048}
UNIT_METRICS = ("shares", "single", "entropy", "random")


@dataclass(frozen=True)
class UnitRanking:
    """order: (layer, KV head), least harmful first. scores: what `metric` measured for each; of "shares", its share of the harm in nats,
    from the round that placed it. tokens: read in a pass over text and probes; passes: how often these were read. probe_weight: see
    `rank_units`; None where it is not known."""

    order: list[Unit]
    scores: Scores
    tokens: int
    passes: int
    metric: str = "shares"
    probe_weight: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "order": [list(unit) for unit in self.order],
            "scores": [[*unit, score] for unit, score in self.scores.items()],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> UnitRanking:
        scores = {(layer, head): score for layer, head, score in content["scores"]}
        order = [(layer, head) for layer, head in content["order"]]
        return cls(order, scores, content["tokens"], content["passes"], content.get("metric", "shares"), content.get("probe_weight"))


def rank_units(
    model: PeftModel,
    data: Iterable[Any],
    probes: Sequence[dict[str, Tensor]] = (),
    *,
    metric: str = "shares",
    probe_weight: float = PROBE_WEIGHT,
    points: int = 4,
    first_kept: float = 0.03,
    ranks: int = 1,
    seed: int = 0,
    batch_tokens: int | None = None,
    progress: bool = True,
) -> UnitRanking:
    """Order the KV heads of the plan (all those of its layers, where it counts layers) by the harm of converting them.

    Run it after the alignment stage, on text and probes that are not used for evaluation. The model stays as it is.

    Args:
        model: a PEFT model with a DSLA adapter.
        data: batches: `input_ids` `[B, T]`, or dicts with them (and `attention_mask`). Read once.
        probes: such as `probes.make_probes` gives, as long as the longest texts that count: `input_ids` and `answer_mask` `[B, T]`.
        metric:
            "shares": share of each head in the harm of converting all that are not kept, in rounds; `points` passes a round.
            "single": KL(base || this head converted alone). A pass for every head.
            "entropy": entropy in nats of the base's softmax attention at the last token of each row, mean over rows and the head's
            queries, low first, as in the DSLA paper (arXiv 2506.09316). One pass; knows nothing of the trained weights.
            "random": by chance, of `seed`; reads nothing, and needs no data.
        probe_weight: of the KL of a probe's answer beside the KL of text, both a mean over their tokens: more keeps the heads that find
            something far back, less those that all text needs.
        points: of the way from the base to the converted model at which gradients are taken, in each round.
        first_kept: share of the heads that the first round keeps; each later one keeps twice as many as are kept, to the end.
        ranks: of tensor parallel, over which every level of the order shall be even; see `unit_orders.balanced_order`.
        seed: of "random".
        batch_tokens: that a forward reads at once, texts, probes and points together: more is faster on a GPU, less takes less memory.
            None: 16,384 on a GPU, 2,048 on a CPU, where more is not faster.
        progress: show a progress bar (on a terminal).

    Raises:
        ValueError: for an unknown metric, a model without DSLA adapter, neither data nor probes, or settings without sense.
    """
    if not isinstance(getattr(model, "base_model", None), DSLAModel):
        raise ValueError("rank_units needs a DSLA adapter: get_peft_model(model, DSLAConfig(...))")
    if metric not in UNIT_METRICS:
        raise ValueError(f"metric must be one of {list(UNIT_METRICS)}, got {metric!r}")
    if points < 1 or not 0 < first_kept <= 1:
        raise ValueError(f"points must be 1 or more and first_kept a share from above 0 to 1, got points={points}, first_kept={first_kept}")
    check_probe_weight(probe_weight)
    config = active_config(model)
    balanced_order((), ranks, config.kv_heads)
    if batch_tokens is None:
        batch_tokens = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"])
    batches = unit_batches(model, data, probes, probe_weight, batch_tokens) if metric != "random" else []
    if not batches and metric != "random":
        raise ValueError("rank_units got neither data nor probes: give batches of input_ids")
    layers = [index for index, layer in dsla_layers(model).items() if layer.adapter_name is not None]
    every = [(index, head) for index in sorted(layers) for head in range(config.kv_heads)]
    units: list[Unit] = sorted(config.conversion_order or ()) if config.conversion_unit == "head" else every
    rounds = _rounds(len(units), first_kept)
    passes = {"shares": len(rounds) * points, "single": len(units), "entropy": 1, "random": 0}[metric]
    training, frozen = model.training, {name: p.requires_grad for name, p in model.named_parameters()}
    model.eval().requires_grad_(False)
    try:
        rows = sum(len(batch.weights) for batch in batches)
        with progress_bar(total=passes * rows, desc=f"ranking heads ({metric})", shown=progress) as bar:
            if metric == "shares":
                order, scores = _by_shares(model, every, units, rounds, batches, points, batch_tokens, bar.update)
            else:
                scores = {
                    "single": lambda: single_scores(model, units, batches, config.kv_heads, batch_tokens, bar.update),
                    "entropy": lambda: entropy_scores(model, units, batches, config.kv_heads, bar.update),
                    "random": lambda: random_scores(units, seed),
                }[metric]()
                order = sorted(units, key=scores.__getitem__)
    finally:
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])
    order = balanced_order(order, ranks, config.kv_heads)
    tokens = sum(batch.inputs["input_ids"].numel() for batch in batches)
    return UnitRanking(order, {unit: scores[unit] for unit in order}, tokens, passes, metric, probe_weight if probes else None)


def check_probe_weight(weight: float) -> None:
    """Raises ValueError for a weight that is none."""
    if not 0 <= weight < float("inf"):
        raise ValueError(f"probe_weight must be 0 or more, got {weight}")


def _rounds(units: int, first_kept: float) -> list[int]:
    """How many heads are placed after each round."""
    rounds = [max(1, round(first_kept * units))]
    while rounds[-1] < units:
        rounds.append(min(2 * rounds[-1], units))
    if len(rounds) > 1 and rounds[-1] - rounds[-2] < rounds[-2] / 2:  # no round of its own for few
        rounds[-2:] = [units]
    return rounds


def _by_shares(
    model: Any,
    every: list[Unit],
    units: list[Unit],
    rounds: list[int],
    batches: list[Batch],
    points: int,
    batch_tokens: int,
    tick: Callable[[int], Any],
) -> tuple[list[Unit], Scores]:
    """The order, and the score of each unit."""
    kept: list[Unit] = []  # the most harmful first
    scores: Scores = {}
    outside = sorted(set(every) - set(units))
    for wanted in rounds:
        shares = _shares(model, every, kept + outside, batches, points, batch_tokens, tick)
        left = sorted((unit for unit in units if unit not in scores), key=shares.__getitem__, reverse=True)
        for unit in left[: wanted - len(kept)]:
            scores[unit] = shares[unit]
            kept.append(unit)
    return kept[::-1], scores


def _shares(
    model: Any,
    every: list[Unit],
    kept: list[Unit],
    batches: list[Batch],
    points: int,
    batch_tokens: int,
    tick: Callable[[int], Any],
) -> Scores:
    """Share of each head that is not kept in the harm of converting all of them."""
    heads = active_config(model).kv_heads
    layers, softmax = sorted({index for index, _ in every}), set(kept)
    way = torch.tensor([[float((index, head) not in softmax) for head in range(heads)] for index in layers], device=model.device)
    totals = torch.zeros(len(layers), heads, dtype=torch.float64)
    places = (torch.arange(points, device=model.device) + 0.5) / points
    for batch in batches:
        teacher = base_logits(model, batch.inputs, keep=batch.keep)
        rows = len(batch.weights)
        # Points of the way are rows of one batch: a step of few tokens costs as many launches as one of many.
        for at in places.split(max(1, batch_tokens // batch.inputs["input_ids"].numel())):
            inputs, weights = batch.repeated(len(at))
            values = (at[None, :, None] * way[:, None]).repeat_interleave(rows, 1)
            with switched(model, dict(zip(layers, values, strict=True))) as switches:
                total, _ = kl_sums(model(**inputs).logits, teacher.repeat(len(at), 1, 1), weights, reuse_teacher=True)
                gradients = torch.autograd.grad(total, list(switches.values()))
            totals += torch.stack(gradients).sum(1).double().cpu()
            tick(len(at) * rows)
    totals *= way.double().cpu() / points
    return {(index, head): share for index, values in zip(layers, totals.tolist(), strict=True) for head, share in enumerate(values)}
