"""`distill`, the whole recipe: alignment, the ranking of the layers or heads, the training of every level; an interrupted run goes on."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import TrainerState

from ..core.files import write_json
from ..core.progress import say
from ..models.adapter import active_config
from ..models.saving import check_adapter_directory
from .arguments import DSLATrainingArguments
from .checkpoints import (
    SETTINGS_FILE,
    checkpoints,
    is_whole,
    last_whole_checkpoint,
    saved_stage,
    stage_folders,
    step_of,
    told_of_full_disk,
)
from .ranking import METRICS, LayerRanking, rank_layers
from .sharding import is_sharded, load_adapter_weights, whole_adapter
from .text_check import check_teaches
from .trainer import DSLATrainer, check_logits, highest_trained, trained_level
from .unit_ranking import PROBE_WEIGHT, UNIT_METRICS, UnitRanking, check_probe_weight, rank_units

METHODS = ("random", "chain")
STAGE_SETTINGS = (
    "seed",
    "learning_rate",
    "gate_learning_rate_factor",
    "train_level",
    "level_draws",
    "highest_share",
    "hidden_weight",
    "alignment_heads",
    "sequence_lengths",
)
# What units are ranked by, the default first, and those that say nothing of the window, so that short texts do.
RANKED_BY = {"layer": METRICS, "head": UNIT_METRICS}
OF_THE_BASE = ("entropy", "random")


def distill(
    model: PeftModel,
    train_dataset: Any,
    args: DSLATrainingArguments,
    *,
    alignment_steps: int,
    logits_steps: int,
    method: str = "random",
    ranking_data: Any = None,
    ranking_metric: str | None = None,
    ranking_probes: Sequence[dict[str, torch.Tensor]] = (),
    probe_weight: float = PROBE_WEIGHT,
    **trainer_options: Any,
) -> LayerRanking | UnitRanking | None:
    """Stage 1, ranking of the layers (or heads, where the plan counts those), stage 2: an adapter whose every level is trained, saved in
    `args.output_dir`.

    Interrupted runs go on where they were: finished parts are read back, the unfinished one resumes from its last
    whole checkpoint, and a line on stderr says from where. The model is then at the highest level that was trained, and saved so.

    Args:
        model: `get_peft_model(base, DSLAConfig(...))`.
        train_dataset: items with `input_ids`, all of one length (packed), used by both stages; may be an iterable one.
        args: for both stages; `stage` and `max_steps` are set here.
        alignment_steps: optimizer steps of stage 1.
        logits_steps: optimizer steps of stage 2.
        method: how stage 2 trains every level. "random": all layers, at a level drawn anew for each step. "chain": one layer after
            the other in conversion order, each for an equal part of `logits_steps`, at the level that it completes; a layer
            is not touched again after its turn, so that level k is part of level k + 1 bit for bit. Of layers alone.
        ranking_data: batches of `input_ids` `[B, T]` for `rank_layers` or `rank_units`; None without probes: the order stays.
        ranking_metric: of `rank_layers` (default "kl") or `rank_units` (default "shares").
        ranking_probes, probe_weight: of `rank_units`, the probes such as `probes.make_probes` gives; for a plan of heads.
        trainer_options: passed to `DSLATrainer`, e.g. callbacks or `eval_dataset`.

    Raises:
        ValueError: if `method` or `ranking_metric` is unknown, a plan of heads is to be a chain, `output_dir` holds something else or a run
            with other settings, or the window reads nearly all of the sequences, so that nothing can be learnt.
        OSError: if the disk is full; see `DSLATrainer`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    tuner: Any = model.base_model
    output = Path(args.output_dir)
    levels = len(active_config(model).conversion_order or ())
    if logits_steps:
        check_logits(model)
    if method == "chain" and 0 < logits_steps < levels:
        raise ValueError(f"a chain over {levels} layers needs {levels} steps or more, got logits_steps {logits_steps}")
    config = active_config(model)
    metric = check_ranking(config.conversion_unit, method, ranking_metric, bool(ranking_probes))
    check_probe_weight(probe_weight)
    trained_level(model, args)
    check_output(model, output)
    check_teaches(train_dataset, config.window_size, config.sink_tokens)
    if args.sequence_lengths:
        shortest = torch.zeros(min(args.sequence_lengths), dtype=torch.long)
        check_teaches([shortest], config.window_size, config.sink_tokens, purpose="cut to the shortest of sequence_lengths")
    ranked = ranking_data is not None or bool(ranking_probes)
    if ranked:
        ranking_data = list(ranking_data or ())
        if metric not in OF_THE_BASE and (ranking_data or not ranking_probes):  # now, not after the first stage
            check_teaches(ranking_data, config.window_size, config.sink_tokens, purpose=f"to rank {config.conversion_unit}s on")
    _run_stage(model, train_dataset, args, output / "alignment", {"stage": "alignment", "max_steps": alignment_steps}, trainer_options)
    ranking = None
    if ranked:
        ranking = _ranked(model, args, output, ranking_data, ranking_probes, metric, probe_weight)
        tuner.set_conversion_order(ranking.order, ranking.scores)
    if method == "random":
        _run_stage(model, train_dataset, args, output / "logits", {"stage": "logits", "max_steps": logits_steps}, trainer_options)
    elif logits_steps:
        _run_chain(model, train_dataset, args, output / "logits", logits_steps, trainer_options)
    weights = {"state_dict": whole_adapter(model)} if is_sharded(model) else {}
    if alignment_steps or logits_steps:
        tuner.set_level(highest_trained(model, args, method))
    if args.process_index == 0:
        with told_of_full_disk(output):
            model.save_pretrained(str(output), **weights)
    PartialState().wait_for_everyone()  # the adapter is there when any process returns
    return ranking


def check_ranking(unit: str, method: str, metric: str | None, probes: bool) -> str:
    """The metric that units are ranked by.

    Raises:
        ValueError: if there is no such metric for them, or another setting does not go with them.
    """
    if unit == "head" and method == "chain":
        raise ValueError(
            "method 'chain' trains one whole layer after the other, and this plan counts heads: take method 'random', or a plan with "
            "conversion_unit 'layer'"
        )
    if unit == "layer" and probes:
        raise ValueError("probes rank heads, and this plan counts layers: leave them out, or take a plan with conversion_unit 'head'")
    if metric not in (None, *RANKED_BY[unit]):
        raise ValueError(f"{unit}s are ranked by one of {list(RANKED_BY[unit])}, got ranking_metric {metric!r}")
    return metric or RANKED_BY[unit][0]


def _ranked(
    model: PeftModel,
    args: DSLATrainingArguments,
    output: Path,
    data: list[Any],
    probes: Sequence[dict[str, torch.Tensor]],
    metric: str,
    probe_weight: float,
) -> LayerRanking | UnitRanking:
    """The ranking, read back if it is there already."""
    heads = active_config(model).conversion_unit == "head"
    kind: type[LayerRanking] | type[UnitRanking] = UnitRanking if heads else LayerRanking
    file = output / "ranking.json"
    if file.exists():
        return kind.from_dict(json.loads(file.read_text()))
    beside = f" and {len(probes)} probes of up to {max(x['input_ids'].shape[1] for x in probes):,} tokens" if probes else ""
    say(f"ranking the {'heads' if heads else 'layers'} on {len(data)} batches{beside}")
    ranking: LayerRanking | UnitRanking
    if heads:
        ranking = rank_units(model, data, probes, metric=metric, probe_weight=probe_weight, seed=args.seed)
        # Gradients may differ between processes in their last digits, and the order must not.
        ranking = UnitRanking.from_dict(broadcast_object_list([ranking.to_dict()])[0])
    else:
        ranking = rank_layers(model, data, metric=metric)
    if args.process_index == 0:
        with told_of_full_disk(output):
            write_json(file, ranking.to_dict())
    return ranking


def check_output(model: PeftModel, output: Path) -> None:
    """Raises ValueError if `output`, or the folder of a stage below it, holds something else than states of this adapter."""
    for directory in (output, *(path for folder in stage_folders(output) for path in (folder, *folder.glob("checkpoint-*")))):
        check_adapter_directory(saved_stage(directory, model), active_config(model))


def _run_chain(model: PeftModel, dataset: Any, args: DSLATrainingArguments, directory: Path, steps: int, options: dict[str, Any]) -> None:
    tuner: Any = model.base_model
    order = list(active_config(model).conversion_order or ())
    settings = {"method": "chain", "max_steps": steps}
    _check_settings(directory, settings)
    if args.process_index == 0:
        with told_of_full_disk(directory):
            write_json(directory / SETTINGS_FILE, settings)
    try:
        for level, layer in enumerate(order, 1):
            tuner.set_trainable_layers([layer])
            own = steps * level // len(order) - steps * (level - 1) // len(order)
            # Each link sees other text first.
            changes = {"stage": "logits", "train_level": level, "max_steps": own, "data_seed": args.seed + level}
            _run_stage(model, dataset, args, directory / f"level_{level:02d}", changes, options)
    finally:
        tuner.set_trainable_layers(None)


def _run_stage(
    model: PeftModel, dataset: Any, args: DSLATrainingArguments, directory: Path, changes: dict[str, Any], options: dict[str, Any]
) -> None:
    steps = changes["max_steps"]
    if steps == 0:
        return
    stage_args = copy.copy(args)
    for name, value in {**changes, "output_dir": str(directory)}.items():
        setattr(stage_args, name, value)
    if args.warmup_steps >= 1:  # below 1 it is a share
        stage_args.warmup_steps = min(args.warmup_steps, steps // 5)
    settings = {"method": "random", **_stage_settings(stage_args, len(dataset) if hasattr(dataset, "__len__") else None)}
    _check_settings(directory, settings)
    trainer = DSLATrainer(model, stage_args, train_dataset=dataset, **options)
    with told_of_full_disk(directory):
        if args.process_index == 0:
            write_json(directory / SETTINGS_FILE, settings)
        _train_or_read(trainer, model, directory, steps)


def _train_or_read(trainer: DSLATrainer, model: PeftModel, directory: Path, steps: int) -> None:
    """Do what of a stage is still to do, and say where it begins if that is not the start."""
    adapter: Any = model.active_adapter
    name = trainer.progress.name
    saved = saved_stage(directory, model)
    if (saved / "adapter_config.json").exists():
        say(f"{name}: finished, read from {saved}")
        load_adapter_weights(model, saved, adapter)
        return
    checkpoint = last_whole_checkpoint(directory)
    for path in checkpoints(directory):
        if not is_whole(path):
            say(f"{name}: {path} is damaged or half-written, and passed over")
    if checkpoint is not None:
        say(f"{name}: goes on from step {step_of(checkpoint)} of {steps} ({checkpoint})")
    if checkpoint is not None and TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step >= steps:
        # Stopped between the last step and the end; the Trainer would take one step more.
        load_adapter_weights(model, saved_stage(checkpoint, model), adapter)
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_state()
    trainer.save_model(str(directory))


def _stage_settings(args: DSLATrainingArguments, items: int | None) -> dict[str, Any]:
    """What decides the result of a stage, the number of processes left out."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings = {"max_steps": args.max_steps, "batch_size": batch, "items": items}
    return settings | {name: getattr(args, name) for name in STAGE_SETTINGS}


def _check_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if the stage in `directory` was begun with other settings, and there is something of it to go on from."""
    path = directory / SETTINGS_FILE
    if not any(directory.glob("**/adapter_config.json")):
        return
    begun = json.loads(path.read_text()) if path.exists() else settings
    if changed := [f"{name} {begun.get(name)} (now {value})" for name, value in settings.items() if begun.get(name) != value]:
        raise ValueError(f"{directory} holds a stage with {', '.join(changed)}: give the same settings to go on, or another output_dir")
