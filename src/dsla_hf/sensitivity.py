"""In which order to convert layers: `rank_layers` measures what converting each one costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from .adapter import DSLAModel, active_config
from .losses import kl_loss

METRICS = ("kl",)


@dataclass(frozen=True)
class LayerRanking:
    """order: layers, least harmful first. scores: what was measured for each. metric: its name; tokens: on how many."""

    order: list[int]
    scores: dict[int, float]
    metric: str
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> LayerRanking:
        scores = {int(layer): score for layer, score in content["scores"].items()}
        return cls(content["order"], scores, content["metric"], content["tokens"])


@torch.no_grad()
def rank_layers(model: PeftModel, data: Iterable[Any], metric: str = "kl", progress: bool = True) -> LayerRanking:
    """Order the layers of the plan by the harm of converting each one alone.

    Run it after the alignment stage, on text that is not used for evaluation. The model's plan stays as it is; store
    the result with `model.set_conversion_order(ranking.order, ranking.scores)`.

    Args:
        model: a PEFT model with a DSLA adapter.
        data: batches: `input_ids` `[B, T]`, or dicts with them (and `attention_mask`). Read once.
        metric: "kl": mean KL(base || one layer converted) in nats per token.
        progress: show a progress bar.

    Raises:
        ValueError: for an unknown metric, a model without DSLA adapter, or no data.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {list(METRICS)}, got {metric!r}")
    tuner: Any = getattr(model, "base_model", None)
    if not isinstance(tuner, DSLAModel):
        raise ValueError("rank_layers needs a DSLA adapter: get_peft_model(model, DSLAConfig(...))")
    batches = [as_inputs(batch, model.device) for batch in data]
    if not batches:
        raise ValueError("rank_layers got no data: give batches of input_ids")
    plan = sorted(active_config(model).conversion_order or ())
    totals, tokens, training = dict.fromkeys(plan, 0.0), 0, model.training
    model.eval()
    try:
        with tqdm(total=len(batches) * len(plan), desc="ranking layers", disable=not progress) as bar:
            for inputs in batches:
                mask = inputs.get("attention_mask")
                count = inputs["input_ids"].numel() if mask is None else int(mask.sum())
                tokens += count
                with model.disable_adapter():
                    teacher = model(**inputs, use_cache=False).logits
                for layer in plan:
                    with tuner.converted([layer]):
                        student = model(**inputs, use_cache=False).logits
                    totals[layer] += kl_loss(student, teacher, mask).item() * count
                    bar.update()
    finally:
        model.train(training)
    scores = {layer: total / tokens for layer, total in totals.items()}
    return LayerRanking(sorted(plan, key=scores.__getitem__), scores, metric, tokens)


def as_inputs(batch: Any, device: torch.device) -> dict[str, Tensor]:
    """Model inputs on `device` from a batch: `input_ids` `[B, T]` or `[T]`, or a dict with them."""
    inputs = batch if isinstance(batch, Mapping) else {"input_ids": batch}
    inputs = {name: torch.as_tensor(inputs[name]) for name in ("input_ids", "attention_mask") if name in inputs}
    return {name: (x[None] if x.ndim == 1 else x).to(device) for name, x in inputs.items()}
