"""Distillation of a DSLA adapter from its own base: a `Trainer` with two stages, and `distill`, which runs them.

Stage "alignment": every DSLA layer learns to give the attention output of the layer it replaces, on the base's own
inputs, all layers in one pass and each on its own. Stage "logits": KL to the base's logits, with a level drawn anew for
every step, so that every level of the plan is trained. The teacher is the same model at level 0.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from .adapter import DSLAModel, active_config, dsla_layers
from .losses import alignment_sums, kl_sums
from .saving import check_adapter_directory
from .sensitivity import LayerRanking, rank_layers

logger = logging.get_logger(__name__)

STAGES = ("alignment", "logits")
SETTINGS_FILE = "stage.json"


@dataclass
class DSLATrainingArguments(TrainingArguments):
    """`TrainingArguments` with what distillation adds."""

    stage: str = field(default="logits", metadata={"help": "'alignment' of attention outputs, or 'logits' (KL at random levels)."})
    train_level: int | None = field(
        default=None,
        metadata={"help": "Train stage 'logits' at this level only. Default: at a random level from 1 on, drawn anew for each step."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the DSLA weights."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule, as in transformers."})

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {list(STAGES)}, got {self.stage!r}")
        super().__post_init__()
        if getattr(self, "ddp_find_unused_parameters", None) is None:
            # Every trained weight gets a gradient at every step (see `_zero_of_idle_weights`), and alignment would confuse the search.
            self.ddp_find_unused_parameters = False
        # transformers 5.18 renamed it; where both names are, both hold the same.
        names = [name for name in ("activation_checkpointing", "gradient_checkpointing") if getattr(self, name, False)]
        for name in names:
            options = dict(getattr(self, f"{name}_kwargs") or {})
            if options.setdefault("use_reentrant", False):
                raise ValueError(
                    f"{name}_kwargs={{'use_reentrant': True}} loses the gradients of DSLA layers over a frozen base: "
                    "use {'use_reentrant': False}"
                )
            setattr(self, f"{name}_kwargs", options)


def draw_level(seed: int, step: int, depth: int) -> int:
    """The level of a training step, uniform from 1 to `depth`: a pure function of seed and global step, so that it is the
    same on every process and after a resume."""
    return random.Random(f"{seed}/{step}").randint(1, depth)


class DSLATrainer(Trainer):
    """Trains the DSLA weights of a PEFT model. Data: `input_ids` (and `attention_mask`), no labels needed.

    Trained weights are held in fp32 whatever the base's dtype. Loss terms and, per layer, the half-lives of both states
    are logged.

    Raises:
        ValueError: if the model has no DSLA adapter.
    """

    # Our losses are means over a batch; the Trainer divides them by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(self, model: PeftModel, args: DSLATrainingArguments, **kwargs: Any):
        if not isinstance(getattr(model, "base_model", None), DSLAModel):
            raise ValueError("DSLATrainer trains a DSLA adapter: give it get_peft_model(model, DSLAConfig(...))")
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self._use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._terms: dict[str, list[Tensor]] = defaultdict(list)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `config.use_cache`, which it turns off, is the base's own and is put back."""
        config: Any = self.accelerator.unwrap_model(self.model).config
        try:
            return super().train(*args, **kwargs)
        finally:
            config.use_cache = self._use_cache

    # --- losses -------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        # The level holds from the forward to the end of the backward pass, whose recomputations need it.
        level = self.step_level()
        with self._at_level(level):
            loss = super().training_step(model, inputs, *args, **kwargs)
        if self.args.stage == "logits":
            self._terms["level"].append(torch.tensor(float(level), device=loss.device))
        return loss

    def step_level(self) -> int:
        """The level of the current step."""
        args: Any = self.args
        depth = len(active_config(self.model).conversion_order or ())
        return args.train_level if args.train_level is not None else draw_level(args.seed, self.state.global_step, depth)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        args: Any = self.args
        sums = self._alignment(model, inputs) if args.stage == "alignment" else self._logits(model, inputs)
        # One denominator for all processes: the mean of their losses is then that of one process with the whole batch.
        weights = self.accelerator.reduce(torch.stack([weight.detach() for _, weight in sums.values()]), reduction="mean")
        losses = {name: total / weight for (name, (total, _)), weight in zip(sums.items(), weights, strict=True)}
        loss = sum(losses.values()) / len(losses)
        if self.model.training:
            for name, term in losses.items():
                self._terms[name].append(term.detach())
            loss = loss + self._zero_of_idle_weights()
        return (loss, {}) if return_outputs else loss

    def _alignment(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        mask = inputs.get("attention_mask")

        def compare(layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
            # Inside the wrapped forward, as DDP and FSDP need.
            prediction = layer.dsla_attention()(*args, **kwargs)[0]
            sums[f"alignment/layer_{layer.layer_idx}"] = alignment_sums(prediction, output[0], mask)

        hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in dsla_layers(model).values() if layer.adapter_name]
        try:
            with self._teacher(model), _without_checkpointing(model):
                model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return sums

    def _logits(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        with torch.no_grad(), self._teacher(model):
            teacher = model(**inputs, use_cache=False).logits
        student = model(**inputs, use_cache=False).logits
        return {"kl": kl_sums(student, teacher, inputs.get("attention_mask"))}

    def _zero_of_idle_weights(self) -> Tensor | float:
        """Zero, but a function of the trained weights of layers that are not DSLA at this level: their gradient is zero, not
        missing, alike on one process and many (DDP waits for every gradient)."""
        args: Any = self.args
        if args.stage == "alignment":
            return 0.0
        idle = [p for layer in dsla_layers(self.model).values() if not layer.converted for p in layer.parameters() if p.requires_grad]
        return sum(((p * 0).sum() for p in idle), start=0.0)

    @contextmanager
    def _at_level(self, level: int) -> Any:
        config = active_config(self.model)
        level, config.level = config.level, config.check_level(level)  # type: ignore[assignment]
        try:
            yield
        finally:
            config.level = level

    def _teacher(self, model: nn.Module) -> Any:
        unwrapped: Any = self.accelerator.unwrap_model(model)
        return unwrapped.disable_adapter()

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    # --- logs ---------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._terms and "loss" in logs:  # not in the logs of an evaluation, or the summary at the end
            names = list(self._terms)
            means = torch.stack([torch.stack(self._terms[name]).mean() for name in names])
            means = self.accelerator.reduce(means, reduction="mean")
            logs.update(zip(names, means.tolist(), strict=True))
            self._terms.clear()
            logs.update(half_lives(self.model))
        super().log(logs, start_time)


@contextmanager
def _without_checkpointing(model: nn.Module) -> Any:
    """Within it no block is recomputed: a recomputation of the teacher's pass would run the student's."""
    blocks = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    for block in blocks:
        block.gradient_checkpointing = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for block in blocks:
            block.gradient_checkpointing = True  # type: ignore[assignment]


def half_lives(model: nn.Module) -> dict[str, float]:
    """Half-life in tokens of each layer's two states, as its gate biases have it (geometric mean over heads and channels)."""
    lives = {}
    for index, layer in dsla_layers(model).items():
        if layer.adapter_name is not None:
            means = layer.dsla_core[layer.adapter_name].bias_half_lives().detach().log().mean((0, 2)).exp()
            for name, life in zip(("history", "recency"), means.tolist(), strict=True):
                lives[f"half_life/{name}/layer_{index}"] = life
    return lives


# --- the whole recipe -------------------------------------------------------------------------------------------


def distill(
    model: PeftModel,
    train_dataset: Any,
    args: DSLATrainingArguments,
    *,
    alignment_steps: int,
    logits_steps: int,
    ranking_data: Any = None,
    **trainer_options: Any,
) -> LayerRanking | None:
    """Stage 1, ranking of the layers, stage 2: an adapter whose every level is trained, saved in `args.output_dir`.

    Interrupted runs go on where they were: finished parts are read back, the unfinished one resumes from its last
    checkpoint.

    Args:
        model: `get_peft_model(base, DSLAConfig(...))`.
        train_dataset: items with `input_ids`, all of one length (packed), used by both stages.
        args: for both stages; `stage` and `max_steps` are set here.
        alignment_steps, logits_steps: optimizer steps of the two stages.
        ranking_data: batches of `input_ids` `[B, T]` for `rank_layers`; None keeps the order of the config.
        trainer_options: passed to `DSLATrainer`, e.g. callbacks or `eval_dataset`.
    """
    tuner: Any = model.base_model
    output = Path(args.output_dir)
    for directory in (output, *(path for stage in STAGES for path in (output / stage, *output.glob(f"{stage}/checkpoint-*")))):
        check_adapter_directory(_saved_stage(directory, model), active_config(model))
    _run_stage(model, train_dataset, args, "alignment", alignment_steps, trainer_options)
    ranking = None
    if ranking_data is not None:
        ranking_file = output / "ranking.json"
        if ranking_file.exists():
            ranking = LayerRanking.from_dict(json.loads(ranking_file.read_text()))
        else:
            ranking = rank_layers(model, ranking_data)
            if args.process_index == 0:
                _write_json(ranking_file, ranking.to_dict())
        tuner.set_conversion_order(ranking.order, ranking.scores)
    _run_stage(model, train_dataset, args, "logits", logits_steps, trainer_options)
    if args.process_index == 0:
        model.save_pretrained(str(output))
    PartialState().wait_for_everyone()  # the adapter is there when any process returns
    return ranking


def _run_stage(model: PeftModel, dataset: Any, args: DSLATrainingArguments, stage: str, steps: int, options: dict[str, Any]) -> None:
    directory = Path(args.output_dir) / stage
    if steps == 0:
        return
    stage_args = copy.copy(args)
    stage_args.output_dir, stage_args.stage, stage_args.max_steps = str(directory), stage, steps
    settings = _stage_settings(stage_args, len(dataset))
    _check_settings(directory, settings)
    trainer = DSLATrainer(model, stage_args, train_dataset=dataset, **options)
    if args.process_index == 0:
        _write_json(directory / SETTINGS_FILE, settings)
    adapter: Any = model.active_adapter
    saved = _saved_stage(directory, model)
    if (saved / "adapter_config.json").exists():
        logger.warning(f"stage {stage!r} is finished: its weights are read from {saved}")
        model.load_adapter(str(saved), adapter, is_trainable=True)
        return
    checkpoint = get_last_checkpoint(str(directory)) if directory.is_dir() else None
    if checkpoint is not None and TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step >= steps:
        # Stopped between the last step and the end; the Trainer would take one step more.
        model.load_adapter(str(_saved_stage(Path(checkpoint), model)), adapter, is_trainable=True)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_state()
    trainer.save_model(str(directory))


def _saved_stage(directory: Path, model: PeftModel) -> Path:
    """Where PEFT saves the active adapter in `directory`."""
    adapter: Any = model.active_adapter
    return directory if adapter == "default" else directory / adapter


def _stage_settings(args: DSLATrainingArguments, items: int) -> dict[str, Any]:
    """What decides the result of a stage, the number of processes left out."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    settings = {"max_steps": args.max_steps, "batch_size": batch, "items": items}
    return settings | {name: getattr(args, name) for name in ("seed", "learning_rate", "train_level")}


def _check_settings(directory: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if the stage in `directory` was begun with other settings."""
    path = directory / SETTINGS_FILE
    begun = json.loads(path.read_text()) if path.exists() else settings
    if changed := [f"{name} {begun.get(name)} (now {value})" for name, value in settings.items() if begun.get(name) != value]:
        raise ValueError(f"{directory} holds a stage with {', '.join(changed)}: give the same settings to go on, or another output_dir")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
