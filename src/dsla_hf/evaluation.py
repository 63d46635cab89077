"""Quality by level: perplexity of a text and KL to the original model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from tqdm.auto import tqdm

from .adapter import get_level, set_level
from .losses import kl_loss
from .policies import Stats
from .sensitivity import as_inputs


@torch.no_grad()
def evaluate_levels(model: PeftModel, data: Iterable[Any], levels: Iterable[int], progress: bool = True) -> list[dict[str, float]]:
    """Perplexity and KL(level 0 || level) in nats per token, for each level, over the same batches.

    Args:
        model: a PEFT model with a DSLA adapter.
        data: batches as for `rank_layers`; read once.
        levels: levels of the plan.

    Returns:
        A row per level: `level`, `perplexity`, `kl`, `tokens` (predicted ones).

    Raises:
        ValueError: if there is no data, or the plan has no such level.
    """
    batches, levels = [as_inputs(batch, model.device) for batch in data], list(levels)
    if not batches:
        raise ValueError("evaluate_levels got no data: give batches of input_ids")
    before, training = get_level(model), model.training
    totals = {level: {"loss": 0.0, "kl": 0.0} for level in levels}
    predicted = tokens = 0.0
    model.eval()
    try:
        with tqdm(total=len(batches) * len(levels), desc="evaluating levels", disable=not progress) as bar:
            for inputs in batches:
                ids, mask = inputs["input_ids"], inputs.get("attention_mask")
                real = torch.ones_like(ids) if mask is None else mask
                target_weight = (real[:, 1:] * real[:, :-1]).flatten().float()
                predicted += target_weight.sum().item()
                tokens += real.sum().item()
                with model.disable_adapter():
                    teacher = model(**inputs, use_cache=False).logits
                for level in levels:
                    set_level(model, level)
                    logits = model(**inputs, use_cache=False).logits
                    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
                    totals[level]["loss"] += (losses * target_weight).sum().item()
                    totals[level]["kl"] += kl_loss(logits, teacher, mask).item() * real.sum().item()
                    bar.update()
    finally:
        set_level(model, before)
        model.train(training)
    if not predicted:
        raise ValueError("evaluate_levels got no token with another before it: give sequences of two tokens or more")
    return [
        {
            "level": level,
            "perplexity": math.exp(totals[level]["loss"] / predicted),
            "kl": totals[level]["kl"] / tokens,
            "tokens": predicted,
        }
        for level in levels
    ]


def cache_bytes_per_sequence(model: PeftModel, tokens: int) -> int:
    """Bytes that the cache of one sequence of `tokens` tokens takes at the current level, in the model's dtype."""
    stats = Stats(prompt_tokens=tokens, tokens=tokens, rows=1, level=get_level(model), **model.base_model.level_sizes())
    return stats.cache_bytes(stats.level)
