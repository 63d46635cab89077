"""What a distillation has achieved: each level beside level 0 and beside the same layers as they were, on text kept apart and in short
chats; printed, written as JSON, and stored in the adapter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..core.files import written_whole
from ..core.results import write_results
from ..levels.table import COLUMNS, measured_kept, measured_levels, table, warnings
from ..models.adapter import active_config
from ..models.cards import adapter_card
from ..models.sizes import unit_sizes
from .levels import add_cache_sizes, evaluate_levels
from .short_answers import ShortAnswers, measure_answers

FILE = "levels.json"
# Multiplications (parameters × tokens × passes) that a CPU may spend on the table: about a minute of two cores.
MOST_ON_CPU = 1e12


@dataclass(frozen=True)
class LevelCheck:
    """rows: of each measured level. tokens: predicted ones, of the text. answers: None without a chat template, and `left_out` says why
    if that is not because there is none."""

    rows: list[dict[str, Any]]
    tokens: int
    answers: ShortAnswers | None
    left_out: str = ""

    def text(self) -> str:
        """For a terminal: the table, an answer of each level, and what is wrong."""
        lines = [f"Levels on {self.tokens:,} tokens kept apart (KL in nats per token):", table(self.rows)]
        if self.answers is not None:
            lines.append(f"Answers to {self.answers.question!r}:")
            lines += [f"{level:>5}  {answer}" for level, answer in self.answers.samples.items()]
        if self.left_out:
            lines.append(f"WARNING: short chats were left out: {self.left_out}")
        lines += [f"WARNING: {line}" for line in warnings(self.rows)]
        return "\n".join(lines)

    def metrics(self) -> dict[str, dict[str, float]]:
        """As `DSLAConfig.level_metrics` has them."""
        return {str(row["level"]): {name: row[name] for name in COLUMNS if name in row} for row in self.rows}

    def save(self, folder: Path) -> None:
        """Write `levels.json`, a table of rows as `dsla report` reads it."""
        rows = [{name: value if math.isfinite(value) else None for name, value in row.items()} for row in self.rows]
        more: dict[str, Any] = {"tokens": self.tokens}
        if self.answers is not None:
            more |= {"question": self.answers.question, "answers": {str(level): text for level, text in self.answers.samples.items()}}
        write_results(folder / FILE, rows, **more)


def check_levels(
    model: Any, sequences: Sequence[Tensor], tokenizer: Any, before: Mapping[str, Tensor], highest: int, before_name: str = "untrained"
) -> LevelCheck:
    """Measure at most nine levels up to `highest`; where levels count heads, those that keep half of them, a quarter, a tenth and so on.

    Every process calls this alike: under FSDP each forward needs all of them.

    Args:
        model: a trained PEFT model with a DSLA adapter, whole or cut by FSDP.
        sequences: token ids `[T]` that were neither trained nor ranked on. On a CPU as many as a minute or so allows, at least one.
        tokenizer: short chats are measured where it has a chat template.
        before: weights to compare with, `sharding.initial_weights` of before the training.
        before_name: "untrained", or "before" if they are those of an adapter that was trained on.
    """
    config = active_config(model)
    units = unit_sizes(model.get_base_model(), config)["num_layers"] if config.conversion_unit == "head" else None
    levels = measured_levels(highest) if units is None else measured_kept(units, highest)
    held_out = list(sequences)[: _affordable(model, sequences, 2 * len(levels) - 1)]
    rows: list[dict[str, Any]] = evaluate_levels(model, held_out, levels, untrained=before)
    tokens = int(rows[0]["tokens"])
    for row in rows:
        del row["tokens"]
        for name in ("perplexity", "kl"):
            if f"untrained_{name}" in row:
                row[f"{before_name}_{name}"] = row.pop(f"untrained_{name}")
    answers, left_out = None, ""
    if getattr(tokenizer, "chat_template", None):
        try:
            answers = measure_answers(model, tokenizer, levels)
        except TemplateErrors as error:
            left_out = f"the chat template does not take a question ({error})"
        else:
            for row in rows:
                row.update(answers.scores[row["level"]])
    add_cache_sizes(model, rows)
    return LevelCheck(rows, tokens, answers, left_out)


def store_in_adapter(model: Any, check: LevelCheck, level: int, folder: Path) -> None:
    """Write the measurements into the configuration and the model card of the adapter in `folder`, and beside them as JSON. The adapter is
    at `level`; its weights stay."""
    config = active_config(model)
    config.level, config.level_metrics = level, check.metrics()
    with written_whole(folder) as temporary:
        config.save_pretrained(str(temporary))
        (temporary / "README.md").write_text(adapter_card(config, model.get_base_model()))
    check.save(folder)


def _affordable(model: Any, sequences: Sequence[Tensor], passes: int) -> int:
    if model.device.type != "cpu":
        return len(sequences)
    parameters = sum(p.numel() for p in model.get_base_model().parameters())
    return max(1, min(len(sequences), int(MOST_ON_CPU / (parameters * len(sequences[0]) * passes))))


def _template_errors() -> tuple[type[Exception], ...]:
    """What rendering a chat template raises."""
    try:
        from jinja2 import TemplateError
    except ImportError:
        return (ImportError, ValueError)
    return (TemplateError, ImportError, ValueError)


TemplateErrors = _template_errors()
