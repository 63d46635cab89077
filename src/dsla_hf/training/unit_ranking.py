"""In which order to convert KV heads: `rank_units` measures what each of them is worth, however many there are, by gradients of switches.

Every KV head has a switch between its softmax attention (0) and its DSLA (1). KL to the base, as a function of all switches, is integrated
along the straight way from the base to the model whose heads are all converted: the gradient of a switch, averaged over points of the way,
is the head's share of the harm (Aumann and Shapley's value of a good; integrated gradients, arXiv 1703.01365). Shares add up to the whole
harm, and count what heads do together, such as the two of an induction circuit, where converting one head alone shows nothing.

The heads worth most are then kept, and the others ranked again with these in place, in rounds that double what is kept: retrieval needs few
heads, and which one comes next depends on those that are there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from ..core.progress import bar as progress_bar
from ..models.adapter import DSLAModel
from ..models.architectures import fused_into
from ..models.level import active_config, dsla_layers
from .losses import kl_sums
from .ranking import as_inputs, base_logits

Unit = tuple[int, int]  # layer, KV head
Item = tuple[dict[str, Tensor], Tensor | None, float]  # inputs of a model, the tokens that count, and the weight of their mean


@dataclass(frozen=True)
class UnitRanking:
    """order: (layer, KV head), least harmful first. scores: share of the harm of each, in nats, from the round that placed it. tokens: read
    in a pass over text and probes; passes: how often these were read, with gradients."""

    order: list[Unit]
    scores: dict[Unit, float]
    tokens: int
    passes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "order": [list(unit) for unit in self.order],
            "scores": [[*unit, score] for unit, score in self.scores.items()],
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> UnitRanking:
        scores = {(layer, head): score for layer, head, score in content["scores"]}
        return cls([(layer, head) for layer, head in content["order"]], scores, content["tokens"], content["passes"])


def rank_units(
    model: PeftModel,
    data: Iterable[Any],
    probes: Sequence[dict[str, Tensor]] = (),
    *,
    probe_weight: float = 0.3,
    points: int = 4,
    first_kept: float = 0.03,
    progress: bool = True,
) -> UnitRanking:
    """Order the KV heads of the plan (all those of its layers, where it counts layers) by the harm of converting them.

    Run it after the alignment stage, on text and probes that are not used for evaluation. The model stays as it is.

    Args:
        model: a PEFT model with a DSLA adapter.
        data: batches: `input_ids` `[B, T]`, or dicts with them (and `attention_mask`). Read once.
        probes: such as `probes.make_probes` gives, as long as the longest texts that count: `input_ids` and `answer_mask` `[B, T]`.
        probe_weight: of the KL of a probe's answer beside the KL of text, both a mean over their tokens.
        points: of the way from the base to the converted model at which gradients are taken, in each round.
        first_kept: share of the heads that the first round keeps; each later one keeps twice as many as are kept, to the end.
        progress: show a progress bar (on a terminal).

    Raises:
        ValueError: for a model without DSLA adapter, neither data nor probes, or settings without sense.
    """
    if not isinstance(getattr(model, "base_model", None), DSLAModel):
        raise ValueError("rank_units needs a DSLA adapter: get_peft_model(model, DSLAConfig(...))")
    if points < 1 or not 0 < first_kept <= 1:
        raise ValueError(f"points must be 1 or more and first_kept a share from above 0 to 1, got points={points}, first_kept={first_kept}")
    items = _items(model, data, probes, probe_weight)
    if not items:
        raise ValueError("rank_units got neither data nor probes: give batches of input_ids")
    config = active_config(model)
    layers = [index for index, layer in dsla_layers(model).items() if layer.adapter_name is not None]
    every = [(index, head) for index in sorted(layers) for head in range(config.kv_heads)]
    units: list[Unit] = sorted(config.conversion_order or ()) if config.conversion_unit == "head" else every
    outside = sorted(set(every) - set(units))
    rounds = _rounds(len(units), first_kept)
    tokens = sum(inputs["input_ids"].numel() for inputs, _, _ in items)
    kept: list[Unit] = []  # the most harmful first
    scores: dict[Unit, float] = {}
    training, frozen = model.training, {name: p.requires_grad for name, p in model.named_parameters()}
    model.eval().requires_grad_(False)
    try:
        with progress_bar(total=len(rounds) * points * len(items), desc="ranking heads", shown=progress) as bar:
            for wanted in rounds:
                shares = _shares(model, every, kept + outside, items, points, bar.update)
                left = sorted((unit for unit in units if unit not in scores), key=shares.__getitem__, reverse=True)
                for unit in left[: wanted - len(kept)]:
                    scores[unit] = shares[unit]
                    kept.append(unit)
    finally:
        model.train(training)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])
    return UnitRanking(kept[::-1], {unit: scores[unit] for unit in kept[::-1]}, tokens, len(rounds) * points)


def _items(model: Any, data: Iterable[Any], probes: Sequence[dict[str, Tensor]], probe_weight: float) -> list[Item]:
    """Texts, and probes of which the tokens that predict the answer count."""
    texts = [as_inputs(batch, model.device) for batch in data]
    items: list[Item] = [(inputs, inputs.get("attention_mask"), 1 / len(texts)) for inputs in texts]
    for probe in probes:
        answer = probe["answer_mask"].to(model.device)
        predicts = torch.zeros_like(answer)
        predicts[:, :-1] = answer[:, 1:]
        items.append((as_inputs(probe, model.device), predicts, probe_weight / len(probes)))
    return items


def _rounds(units: int, first_kept: float) -> list[int]:
    """How many heads are placed after each round."""
    rounds = [max(1, round(first_kept * units))]
    while rounds[-1] < units:
        rounds.append(min(2 * rounds[-1], units))
    if len(rounds) > 1 and rounds[-1] - rounds[-2] < rounds[-2] / 2:  # no round of its own for few
        rounds[-2:] = [units]
    return rounds


def _shares(
    model: Any,
    every: list[Unit],
    kept: list[Unit],
    items: list[Item],
    points: int,
    tick: Any,
) -> dict[Unit, float]:
    """Share of each head that is not kept in the harm of converting all of them."""
    heads = active_config(model).kv_heads
    ways = {index: torch.ones(heads, device=model.device) for index, _ in every}
    for index, head in kept:
        ways[index][head] = 0
    totals = {index: torch.zeros(heads, dtype=torch.float64) for index in ways}
    for inputs, mask, weight in items:
        teacher = base_logits(model, inputs)
        for point in range(points):
            at = (point + 0.5) / points
            with switched(model, {index: at * way for index, way in ways.items()}) as switches:
                total, count = kl_sums(model(**inputs, use_cache=False).logits, teacher, mask)
                gradients = torch.autograd.grad(weight * total / count, list(switches.values()))
            for index, gradient in zip(switches, gradients, strict=True):
                totals[index] += gradient.double().cpu() * ways[index].double().cpu() / points
            tick()
    return {(index, head): float(total) for index, values in totals.items() for head, total in enumerate(values)}


@contextmanager
def switched(model: Any, values: dict[int, Tensor]) -> Iterator[dict[int, Tensor]]:
    """Within it each layer of `values` adds up the outputs of its softmax attention and of its DSLA, each KV head by its switch `[Hkv]`: 0
    is the base's, 1 the DSLA head. Yields the switches, of which gradients can be taken."""
    layers = dsla_layers(model)
    switches = {index: value.detach().clone().requires_grad_() for index, value in values.items()}
    config = active_config(model)
    order, level = config.conversion_order, config.level
    heads = [(index, head) for index in sorted(values) for head in range(len(values[index]))]
    try:
        # Whole layers are DSLA beside their softmax attention, whatever the plan: there are weights for all their heads.
        config.conversion_order = heads if config.conversion_unit == "head" else sorted(values)
        config.level = len(config.conversion_order)
        for index, switch in switches.items():
            layer: Any = layers[index]
            layer.forward = _switched_forward(layer, switch)
        yield switches
    finally:
        config.conversion_order, config.level = order, level
        for index in switches:
            layers[index].__dict__.pop("forward", None)


def _switched_forward(layer: Any, switch: Tensor) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        view = layer.dsla_attention()
        name = fused_into(layer.base_layer, "o_proj")[0]
        base_o, own_o = getattr(layer.base_layer, name), getattr(view, name)
        with _scaled(base_o, 1 - switch):
            softmax, *rest = layer.base_layer(*args, **{key: value for key, value in kwargs.items() if key != "dsla_layout"})
        with _scaled(own_o, switch):
            linear = view(*args, **kwargs)[0]
        if own_o.bias is not None:  # it is there once
            linear = linear - own_o.bias.to(linear.dtype)
        return (softmax + linear, *rest)

    return forward


@contextmanager
def _scaled(projection: nn.Module, switch: Tensor) -> Iterator[None]:
    """Within it a projection takes the output of each KV head's queries times its switch."""

    def scale(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        heads = args[0].unflatten(-1, (len(switch), -1)) * switch.to(args[0].dtype)[:, None]
        return (heads.flatten(-2), *args[1:])

    handle = projection.register_forward_pre_hook(scale)
    try:
        yield
    finally:
        handle.remove()
