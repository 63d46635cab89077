"""What a distillation does where options say nothing: the recipe that was measured best on a real checkpoint (docs/recipe.md)."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..training.arguments import DSLATrainingArguments
from .distill_options import BATCH_SIZE, DistillOptions

LONGEST, SHORTEST = 8192, 2048  # tokens of a step's sequences, in turn
TOKENS_PER_STEP = 16_384
WINDOW_ALONE = 512  # of converted heads without states
PLANTED = 1 / 3  # of the rows of plain text, and of what the checkpoint writes itself


def settle(options: DistillOptions, args: DSLATrainingArguments, base_config: Any) -> DistillOptions:
    """Options with a length, and `args` with `sequence_lengths` and a batch size that make steps of 16,384 tokens.

    base_config: of the checkpoint; its context is the longest sequence.
    """
    if options.length is None:
        context = getattr(base_config.get_text_config(), "max_position_embeddings", None)
        options = dataclasses.replace(options, length=min(LONGEST, context or LONGEST))
        if options.length and options.length > SHORTEST and options.length % SHORTEST == 0:
            args.sequence_lengths = [SHORTEST, options.length]
    if getattr(args, BATCH_SIZE) is None:
        together = (options.length or 0) * args.gradient_accumulation_steps * args.world_size
        setattr(args, BATCH_SIZE, max(1, TOKENS_PER_STEP // together))
    return options


def of_conversion(options: DistillOptions) -> dict[str, Any]:
    """`window_size` and `states` of a new adapter, for `DSLAConfig`, whose own window is that of heads with states.

    A window alone did better than states behind one of as many bytes; a chain is the paper's, and without a window there is nothing else
    than states.
    """
    states = options.states
    if states is None:
        states = options.method == "chain" or options.window_size == 0
    window = WINDOW_ALONE if options.window_size is None and not states else options.window_size
    return {"states": states} | ({} if window is None else {"window_size": window})


def share_planted(options: DistillOptions, chats: bool) -> float:
    """Share of the rows in which facts are planted. chats: whether there are chats among the texts that the user gave; in the middle of
    one they would break its form."""
    if options.probes_in_training is not None:
        return options.probes_in_training
    return 0.0 if chats else PLANTED


def stage_steps(options: DistillOptions, tokens_per_step: int) -> tuple[int, int]:
    """Steps of alignment and of logits, at least one of each stage that is run."""
    steps = options.tokens // tokens_per_step
    if not options.alignment_share:
        return 0, max(1, steps)
    alignment = max(1, min(round(options.alignment_share * steps), steps - 1))
    return alignment, max(1, steps - alignment)
