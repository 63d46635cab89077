"""What `dsla distill` is about to do, in words: text, steps, what is trained, where, and the disk that it will take."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..models.adapter import active_config
from ..models.configuration import DSLAConfig
from ..models.decoder import decoder_layers
from ..training.arguments import DSLATrainingArguments
from ..training.trainer import trained_level

MANY_PASSES = 4  # over the same text, from which on it is said beforehand
BYTES_OF_OTHERS = 2 << 20  # beside tensors: settings, states of random numbers, logs, the tokenizer
GIB = 1 << 30


@dataclass(frozen=True)
class Plan:
    """sequences: to train on, None where the text streams. alignment, logits: steps of these stages. ranked, measured: sequences apart.
    probes: tokens of each that heads are ranked on; planted: share of the sequences that have facts planted in them."""

    model: str
    length: int
    sequences: int | None
    alignment: int
    logits: int
    ranked: int
    measured: int
    probes: list[int]
    planted: float
    method: str
    dtype: str

    def passes(self, args: DSLATrainingArguments) -> float | None:
        """How often both stages together read each sequence."""
        return None if not self.sequences else self.steps * sequences_per_step(args) / self.sequences

    @property
    def steps(self) -> int:
        """Of both stages."""
        return self.alignment + self.logits


def sequences_per_step(args: DSLATrainingArguments) -> int:
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def disk_bytes(trained: int, plan: Plan, args: DSLATrainingArguments, links: int) -> tuple[int, int]:
    """Bytes that a run writes at least and at most, of so many trained parameters; `links` is how many trainings stage 2 has."""
    adapter = 4 * trained + BYTES_OF_OTHERS  # float32
    checkpoint = 3 * adapter  # with the two moments of the optimizer
    most = adapter  # the last save, before it takes its place
    for trainings, steps in ((1, plan.alignment), (links, plan.logits // links)):
        kept = 0
        if str(getattr(args.save_strategy, "value", args.save_strategy)) != "no":
            saves = 1 + (steps // max(1, int(args.save_steps)) if args.save_steps >= 1 else round(1 / args.save_steps))
            # One more than are kept: the oldest goes when the newest is there.
            kept = saves if args.save_total_limit is None else min(saves, args.save_total_limit + 1)
        most += trainings * (adapter + kept * checkpoint)
    least = 3 * adapter  # of the two stages, and the result
    return least, most + adapter


def check_disk(least: int, most: int, output: Path) -> str:
    """What of the disk is needed and free, in words.

    Raises:
        ValueError: if there is less than the least.
    """
    place = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    present = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) if output.is_dir() else 0
    if free + present < least:
        raise ValueError(
            f"{place} has {_gib(free)} free, and this run needs {_gib(least)} or more: make room, or give another --output_dir"
        )
    text = f"at most {_gib(most)} in {output}, where {_gib(free)} are free"
    if free + present < most:
        text += " — WARNING: that may not suffice; --save_total_limit 1 or a larger --save_steps takes less"
    return text


def plan_text(plan: Plan, model: Any, args: DSLATrainingArguments, output: Path) -> str:
    """The plan for a terminal.

    Raises:
        ValueError: if the disk has clearly too little room.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    config = active_config(model)
    units, layers = len(config.conversion_order or ()), len(config.layers_to_transform or ())
    links = units if plan.method == "chain" else 1
    parts = f"{layers} of {len(decoder_layers(model.get_base_model()))} layers"
    if config.conversion_unit == "head":
        parts = f"{units} KV heads of {parts}"
    beside = f" (and {len(plan.probes)} probes of up to {max(plan.probes):,} tokens)" if plan.probes else ""
    disk = check_disk(*disk_bytes(trained, plan, args, links), output)
    how = f"one layer after the other ({links} links)" if plan.method == "chain" else "random levels"
    if plan.method == "random" and args.train_level is not None:
        how = f"level {trained_level(model, args)}"
    batch = sequences_per_step(args)
    lines = [
        f"Distilling an adapter for {plan.model}",
        f"  text      {_text(plan, args)}; apart: {plan.ranked} to rank the {config.conversion_unit}s{beside}, {plan.measured} to measure "
        "the levels",
        f"  steps     {plan.alignment} of alignment, {plan.logits} of logits ({how}); {batch} sequence{'s' if batch > 1 else ''} in each",
        f"  trained   {trained:,} parameters, {100 * trained / everything:.1f} % of all, in {parts}",
        f"  converted {_converted(config)}",
        f"  where     {_where(plan, args)}",
        f"  disk      {disk}",
    ]
    if (passes := plan.passes(args)) is not None and passes >= MANY_PASSES:
        lines.append(
            f"WARNING: each sequence is read {passes:.0f} times, which teaches it by heart: give {passes:.0f} times as much text "
            "(--data), or fewer --tokens"
        )
    if not plan.measured:
        lines.append("WARNING: no text is kept apart to measure the levels on (--eval_sequences): what the adapter is worth stays unknown")
    return "\n".join(lines)


def _text(plan: Plan, args: DSLATrainingArguments) -> str:
    cut = f", in steps of {' and '.join(map(str, args.sequence_lengths))} tokens in turn" if args.sequence_lengths else ""
    facts = f", {100 * plan.planted:.0f} % of them with facts asked for later" if plan.planted else ""
    return _amount(plan, args) + cut + facts


def _amount(plan: Plan, args: DSLATrainingArguments) -> str:
    if plan.sequences is None:
        tokens = plan.steps * sequences_per_step(args) * plan.length
        return f"{tokens:,} tokens to train on, in sequences of {plan.length}, as the text streams"
    passes = plan.passes(args) or 0.0
    there = f"{plan.sequences * plan.length:,} tokens to train on, {plan.sequences:,} sequences of {plan.length}"
    return f"{there}, each read {passes:.1f} times"


def _converted(config: DSLAConfig) -> str:
    """What a converted layer or head has."""
    what = f"{config.conversion_unit}s have"
    if not config.states:
        behind = DSLAConfig().window_size
        return f"{what} a window of {config.window_size:,} tokens alone; --states true adds states behind one of {behind}"
    window = f"a window of {config.window_size:,} tokens and states behind it" if config.window_size else "states and no window"
    return f"{what} {window}"


def _where(plan: Plan, args: DSLATrainingArguments) -> str:
    device = args.device.type
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{device}, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    )
    processes = f"{args.world_size} processes, " if args.world_size > 1 else ""
    slow = "; float32 is faster on most CPUs (--dtype float32)" if device == "cpu" and plan.dtype == "bfloat16" else ""
    return f"{processes}{name}, base in {plan.dtype}{slow}"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.0f} MiB"
