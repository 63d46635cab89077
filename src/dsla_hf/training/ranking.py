"""In which order to convert layers: `rank_layers` measures what converting each one costs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..compat.attributes import attention_implementation
from ..core.progress import bar as progress_bar
from ..models.adapter import DSLAModel, active_config, dsla_layers
from ..models.level import counts_heads
from .losses import kl_loss
from .text_check import check_teaches

METRICS = ("kl", "greedy", "entropy")


@dataclass(frozen=True)
class LayerRanking:
    """order: layers, least harmful first. scores: what was measured for each. metric: its name. tokens: how many the ranking text
    has; passes: how often the model read them."""

    order: list[int]
    scores: dict[int, float]
    metric: str
    tokens: int
    passes: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LayerRanking:
        scores = {int(layer): score for layer, score in content["scores"].items()}
        return cls(content["order"], scores, content["metric"], content["tokens"], content.get("passes", 0))


@torch.no_grad()
def rank_layers(model: PeftModel, data: Iterable[Any], metric: str = "kl", progress: bool = True) -> LayerRanking:
    """Order the layers of the plan by the harm of converting them.

    Run it after the alignment stage, on text that is not used for evaluation. The model's plan stays as it is; store
    the result with `model.set_conversion_order(ranking.order, ranking.scores)`.

    Args:
        model: a PEFT model with a DSLA adapter.
        data: batches: `input_ids` `[B, T]`, or dicts with them (and `attention_mask`). Read once.
        metric:
            "kl": KL(base || this layer converted alone), nats per token. One pass over the text per layer.
            "greedy": KL(base || this layer and all chosen before it converted); the best is chosen, then the next. For L layers
            L (L + 1) / 2 passes.
            "entropy": entropy in nats of the base's softmax attention at the last token of each row, mean over heads and rows,
            low first, as in the DSLA paper (arXiv 2506.09316). One pass; knows nothing of the trained weights.
        progress: show a progress bar (on a terminal).

    Raises:
        ValueError: for an unknown metric, a model without DSLA adapter, no data, or (but for "entropy", which is of the original
            attention) sequences so short that the window reads nearly all of them, whose ranking would be noise.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {list(METRICS)}, got {metric!r}")
    if not isinstance(getattr(model, "base_model", None), DSLAModel):
        raise ValueError("rank_layers needs a DSLA adapter: get_peft_model(model, DSLAConfig(...))")
    if counts_heads(model.get_base_model()):
        raise NotImplementedError(
            "rank_layers ranks whole layers, and this plan converts heads: rank the layers of a plan with conversion_unit='layer', or give "
            "DSLAConfig an order of pairs of your own"
        )
    batches = [as_inputs(batch, model.device) for batch in data]
    if not batches:
        raise ValueError("rank_layers got no data: give batches of input_ids")
    if metric != "entropy":
        config = active_config(model)
        check_teaches(batches, config.window_size, config.sink_tokens, purpose="to rank layers on")
    plan = sorted(active_config(model).conversion_order or ())
    measure = {"kl": _single_swap, "greedy": _greedy, "entropy": _entropy}[metric]
    passes = {"kl": len(plan), "greedy": len(plan) * (len(plan) + 1) // 2, "entropy": 1}[metric]
    training = model.training
    model.eval()
    try:
        with progress_bar(total=len(batches) * passes, desc=f"ranking layers ({metric})", shown=progress) as bar:
            order, scores = measure(model, batches, plan, bar.update)
    finally:
        model.train(training)
    tokens = sum(
        inputs["input_ids"].numel() if "attention_mask" not in inputs else int(inputs["attention_mask"].sum()) for inputs in batches
    )
    return LayerRanking(order, scores, metric, tokens, passes + (metric != "entropy"))


def _single_swap(
    model: Any, batches: list[dict[str, Tensor]], plan: list[int], tick: Callable[[], Any]
) -> tuple[list[int], dict[int, float]]:
    scores = _kl_of(model, batches, {layer: [layer] for layer in plan}, tick)
    return sorted(plan, key=scores.__getitem__), scores


def _greedy(model: Any, batches: list[dict[str, Tensor]], plan: list[int], tick: Callable[[], Any]) -> tuple[list[int], dict[int, float]]:
    chosen: list[int] = []
    scores: dict[int, float] = {}
    while len(chosen) < len(plan):
        costs = _kl_of(model, batches, {layer: [*chosen, layer] for layer in plan if layer not in chosen}, tick)
        best = min(costs, key=costs.__getitem__)
        chosen.append(best)
        scores[best] = costs[best]
    return chosen, scores


def _kl_of(model: Any, batches: list[dict[str, Tensor]], candidates: dict[int, list[int]], tick: Callable[[], Any]) -> dict[int, float]:
    """KL to the base, in nats per token, with each candidate's layers converted."""
    totals, tokens = dict.fromkeys(candidates, 0.0), 0.0
    for inputs in batches:
        mask = inputs.get("attention_mask")
        count = float(inputs["input_ids"].numel() if mask is None else mask.sum())
        tokens += count
        teacher = base_logits(model, inputs)
        for name, layers in candidates.items():
            with model.base_model.converted(layers):
                student = model(**inputs, use_cache=False).logits
            totals[name] += kl_loss(student, teacher, mask).item() * count
            tick()
    return {name: total / tokens for name, total in totals.items()}


def _entropy(model: Any, batches: list[dict[str, Tensor]], plan: list[int], tick: Callable[[], Any]) -> tuple[list[int], dict[int, float]]:
    entropies = head_entropies(model, batches, plan, lambda rows: tick())
    scores = {layer: values.mean().item() for layer, values in entropies.items()}
    return sorted(plan, key=scores.__getitem__), scores


@torch.no_grad()
def head_entropies(
    model: Any, batches: Sequence[dict[str, Tensor]], layers: Sequence[int], tick: Callable[[int], Any]
) -> dict[int, Tensor]:
    """Entropy in nats of the base's softmax attention at the last real token of each row, mean over all rows, `[Hq]` float64 of each layer.

    tick: called after each batch with its rows."""
    found, totals, rows = dsla_layers(model), dict.fromkeys(layers, torch.zeros((), dtype=torch.float64)), 0
    last = torch.tensor(0)  # of each row, set below

    def measure(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple, output: Any) -> None:
            weights = output[1][torch.arange(len(last)), :, last].float()  # `[B, H, T]`: what the last real token attends to
            totals[layer] = totals[layer] + torch.special.entr(weights).sum(-1).sum(0).double().cpu()

        return hook

    base = model.get_base_model()
    implementation = attention_implementation(base.config)
    hooks = [found[layer].base_layer.register_forward_hook(measure(layer)) for layer in layers]
    try:
        base.set_attn_implementation("eager")  # the only one that returns its weights
        for inputs in batches:
            ids = inputs["input_ids"]
            real = inputs.get("attention_mask", torch.ones_like(ids))
            last = (real * torch.arange(ids.shape[1], device=ids.device)).argmax(1)
            with model.disable_adapter():
                model(**inputs, use_cache=False, logits_to_keep=1)
            rows += len(ids)
            tick(len(ids))
    finally:
        base.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()
    return {layer: total / rows for layer, total in totals.items()}


@torch.no_grad()
def base_logits(model: Any, inputs: dict[str, Tensor], keep: int = 0) -> Tensor:
    """Logits `[B, T, vocabulary]` of the base, of the last `keep` tokens if that is not 0."""
    with model.disable_adapter():
        return model(**inputs, use_cache=False, logits_to_keep=keep).logits


def as_inputs(batch: Any, device: torch.device) -> dict[str, Tensor]:
    """Model inputs on `device` from a batch: `input_ids` `[B, T]` or `[T]`, or a dict with them."""
    inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    inputs = {name: torch.as_tensor(inputs[name]) for name in ("input_ids", "attention_mask") if name in inputs}
    return {name: (x[None] if x.ndim == 1 else x).to(device) for name, x in inputs.items()}
