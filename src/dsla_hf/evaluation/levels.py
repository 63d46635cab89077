"""Quality by level: perplexity of a text and KL to the original model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from ..core.progress import bar as progress_bar
from ..levels.table import CACHE_LENGTHS
from ..models.adapter import active_config, get_level, set_level
from ..models.sizes import text_bytes, unit_sizes
from ..training.losses import kl_loss
from ..training.ranking import as_inputs
from ..training.sharding import adapter_weights
from .next_tokens import next_token_losses


@torch.no_grad()
def evaluate_levels(
    model: PeftModel,
    data: Iterable[Any],
    levels: Iterable[int],
    progress: bool = True,
    untrained: Mapping[str, Tensor] | None = None,
) -> list[dict[str, float]]:
    """Perplexity and KL(level 0 || level) in nats per token, for each level, over the same batches.

    Args:
        model: a PEFT model with a DSLA adapter.
        data: batches as for `rank_layers`; read once.
        levels: levels of the plan.
        progress: show a progress bar (on a terminal).
        untrained: other weights of the adapter, as `initial_weights` gives them: every level from 1 on is measured with them too. The
            model has its own again afterwards, bit for bit.

    Returns:
        A row per level: `level`, `perplexity`, `kl`, `tokens` (predicted ones), and with `untrained`, from level 1 on,
        `untrained_perplexity` and `untrained_kl`. Where levels count heads also `kept`, the KV heads that stay softmax attention.

    Raises:
        ValueError: if there is no data, or the plan has no such level.
    """
    batches, levels = [as_inputs(batch, model.device) for batch in data], list(levels)
    if not batches:
        raise ValueError("evaluate_levels got no data: give batches of input_ids")
    before, training = get_level(model), model.training
    totals = {level: {"loss": 0.0, "kl": 0.0} for level in levels}
    others = {level: {"loss": 0.0, "kl": 0.0} for level in levels if level and untrained is not None}
    predicted = tokens = 0.0
    model.eval()
    try:
        with progress_bar(total=len(batches) * (len(totals) + len(others)), desc="evaluating levels", shown=progress) as bar:
            for inputs in batches:
                real = _real(inputs)
                tokens += real.sum().item()
                predicted += (real[:, 1:] * real[:, :-1]).sum().item()
                with model.disable_adapter():
                    teacher = model(**inputs, use_cache=False).logits
                _measure(model, inputs, teacher, totals, bar.update)
                if others:
                    with adapter_weights(model, untrained or {}):
                        _measure(model, inputs, teacher, others, bar.update)
    finally:
        set_level(model, before)
        model.train(training)
    if not predicted:
        raise ValueError("evaluate_levels got no token with another before it: give sequences of two tokens or more")

    def row(sums: dict[str, float], prefix: str = "") -> dict[str, float]:
        return {f"{prefix}perplexity": _exp(sums["loss"] / predicted), f"{prefix}kl": sums["kl"] / tokens}

    rows = []
    for level, sums in totals.items():
        more = row(others[level], "untrained_") if level in others else {}
        rows.append({"level": level, **_kept(model, level), **row(sums), "tokens": predicted, **more})
    return rows


def _measure(model: Any, inputs: dict[str, Tensor], teacher: Tensor, sums: dict[int, dict[str, float]], tick: Callable[[], Any]) -> None:
    """Add to the sums of each level what one batch gives."""
    ids, mask, real = inputs["input_ids"], inputs.get("attention_mask"), _real(inputs)
    targets = (real[:, 1:] * real[:, :-1]).float()
    for level, total in sums.items():
        set_level(model, level)
        logits = teacher if level == 0 else model(**inputs, use_cache=False).logits
        total["loss"] += (next_token_losses(logits, ids) * targets).sum().item()
        if level:
            total["kl"] += kl_loss(logits, teacher, mask).item() * real.sum().item()
        tick()


def _real(inputs: dict[str, Tensor]) -> Tensor:
    """`[B, T]`, 1 at real tokens."""
    return torch.ones_like(inputs["input_ids"]) if "attention_mask" not in inputs else inputs["attention_mask"]


def _exp(loss: float) -> float:
    """Perplexity of a mean loss; infinite where it is too high for a number."""
    return math.exp(loss) if loss < 700 else math.inf


def cache_bytes_per_sequence(model: PeftModel, tokens: int) -> int:
    """Bytes that the cache of one sequence of `tokens` tokens takes at the current level, in the model's dtype."""
    return text_bytes(model.get_base_model(), active_config(model), tokens, get_level(model))


def add_cache_sizes(model: PeftModel, rows: Iterable[dict[str, Any]]) -> None:
    """Give each row what the cache of one text takes at its level: `bytes_1k` and `bytes_32k` are those of 1024 and of 32768 tokens; where
    levels count heads `bytes_2k`, `bytes_8k` and `bytes_32k`, for what a head saves is a matter of the length."""
    config = active_config(model)
    for row in rows:
        for tokens in (1024, 32768) if config.conversion_unit == "layer" else CACHE_LENGTHS:
            row[f"bytes_{tokens // 1024}k"] = text_bytes(model.get_base_model(), config, tokens, int(row["level"]))


def _kept(model: PeftModel, level: int) -> dict[str, int]:
    config = active_config(model)
    return {} if config.conversion_unit == "layer" else {"kept": unit_sizes(model.get_base_model(), config)["num_layers"] - level}
