"""What KV heads are ranked on, as batches: texts, and probes of which the answers count."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ranking import as_inputs


class Batch(NamedTuple):
    """inputs: of a model, `[B, T]`. weights: of the KL of each token, `[B, keep]`. keep: so many last tokens whose logits are needed."""

    inputs: dict[str, Tensor]
    weights: Tensor
    keep: int

    def repeated(self, times: int) -> tuple[dict[str, Any], Tensor]:
        """Arguments of a model, and weights, with all rows so many times."""
        inputs = {name: x.repeat(times, 1) for name, x in self.inputs.items()}
        return {**inputs, "use_cache": False, "logits_to_keep": self.keep}, self.weights.repeat(times, 1)


def unit_batches(
    model: Any, data: Iterable[Any], probes: Sequence[dict[str, Tensor]], probe_weight: float, batch_tokens: int
) -> list[Batch]:
    """Batches of at most `batch_tokens` tokens (or one row), whose weighted KL is the mean over the tokens of the texts, and
    `probe_weight` times the mean over probes of the mean over the tokens that predict the answer. What has one length goes together, and
    what weighs nothing is left out."""
    alike: dict[Any, list[tuple[dict[str, Tensor], Tensor]]] = defaultdict(list)
    texts = [as_inputs(batch, model.device) for batch in data]
    counted = [inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).float() for inputs in texts]
    total = sum(float(mask.sum()) for mask in counted)
    for inputs, mask in zip(texts, counted, strict=True):
        alike["text", mask.shape[1], *inputs].append((inputs, mask / total))
    for probe in probes if probe_weight else ():
        inputs, answer = as_inputs(probe, model.device), probe["answer_mask"].to(model.device).float()
        predicts = torch.cat([answer[:, 1:], torch.zeros_like(answer[:, :1])], 1)
        alike["probe", answer.shape[1], *inputs].append((inputs, predicts * (probe_weight / len(probes)) / answer.sum().clamp_min(1)))
    batches = []
    for (_, length, *names), rows in alike.items():
        weights = torch.cat([weights for _, weights in rows])
        if not weights.any():
            continue
        keep = length - int(weights.any(0).nonzero()[0])
        batch = Batch({name: torch.cat([inputs[name] for inputs, _ in rows]) for name in names}, weights[:, -keep:], keep)
        batches += _parts(batch, batch_tokens)
    return batches


def _parts(batch: Batch, batch_tokens: int) -> list[Batch]:
    rows = max(1, batch_tokens // batch.inputs["input_ids"].shape[1])
    pieces = [{name: x[begin : begin + rows] for name, x in batch.inputs.items()} for begin in range(0, len(batch.weights), rows)]
    return [Batch(inputs, weights, batch.keep) for inputs, weights in zip(pieces, batch.weights.split(rows), strict=True)]
