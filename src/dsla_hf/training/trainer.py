"""Distillation of a DSLA adapter from its own base: a `Trainer` with two stages, and `distill`, which runs them.

Stage "alignment": every DSLA layer learns to give the attention output of the layer it replaces, on the base's own
inputs, all layers in one pass and each on its own. Stage "logits": KL to the base's logits, so that every level of the plan
is trained: either with a level drawn anew for every step, or as a chain (the DSLA paper, arXiv 2506.09316): one layer after
the other in conversion order is trained and then frozen. The teacher is the same model at level 0.
"""

from __future__ import annotations

import copy
import errno
import json
import os
import random
import shutil
import zipfile
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils import logging

from ..core.files import is_disk_full, write_whole
from ..core.progress import TrainingProgress, say
from ..core.tensor_parallel import is_tensor_parallel
from ..models.adapter import DSLAModel, active_config, dsla_layers
from ..models.decoder import decoder_layers, first_layers
from ..models.saving import check_adapter_directory
from .data import check_teaches
from .losses import alignment_sums, half_life_gap_loss, kl_sums
from .ranking import LayerRanking, rank_layers
from .sharding import (
    is_sharded,
    load_adapter_weights,
    load_optimizer_state,
    losses_inside,
    whole,
    whole_adapter,
    whole_optimizer_state,
    with_whole_weights,
)

logger = logging.get_logger(__name__)

STAGES = ("alignment", "logits")
METHODS = ("random", "chain")
SETTINGS_FILE = "stage.json"
NOT_FOR_THE_MODEL = ("labels", "loss_mask")
# transformers 5.18 renamed it; where both names are, both hold the same.
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
# Errors of a disk that takes no more; torch's and safetensors' have numbers of their own or none.
OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"
STAGE_SETTINGS = (
    "seed",
    "learning_rate",
    "gate_learning_rate_factor",
    "train_level",
    "level_draws",
    "hidden_weight",
    "half_life_gap_weight",
    "raise_share",
)


@dataclass
class DSLATrainingArguments(TrainingArguments):
    """`TrainingArguments` with what distillation adds."""

    stage: str = field(default="logits", metadata={"help": "'alignment' of attention outputs, or 'logits' (KL at random levels)."})
    train_level: int | None = field(
        default=None,
        metadata={"help": "Train stage 'logits' at this level only. Default: at a random level from 1 on, drawn anew for each step."},
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Peak learning rate of the projections."})
    gate_learning_rate_factor: float = field(
        default=20.0,
        metadata={"help": "Peak learning rate of gates, mix and norm, over that of the projections: they have far to go from their start."},
    )
    level_draws: int = field(
        default=2,
        metadata={"help": "Stage 'logits': the level of a step is the highest of so many draws; 1 treats all levels alike."},
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Stage 'logits': weight of the alignment of the hidden states after each block."}
    )
    half_life_gap_weight: float = field(
        default=0.0, metadata={"help": "Stage 'logits': weight of a term that keeps the half-lives of the two states apart."}
    )
    raise_share: float = field(
        default=0.0,
        metadata={"help": "Stage 'logits': share of steps whose text begins at a lower level than it ends, as in a raise in mid-text."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep `loss_mask`, which no model takes."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning-rate schedule, as in transformers."})
    warmup_steps: float = field(
        default=20, metadata={"help": "Steps of linear warm-up, at most a fifth of a stage; below 1 a share of it."}
    )

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage must be one of {list(STAGES)}, got {self.stage!r}")
        if self.level_draws < 1:
            raise ValueError(f"level_draws must be 1 or more, got {self.level_draws}")
        if not 0 <= self.raise_share <= 1:
            raise ValueError(f"raise_share must be a share from 0 to 1, got {self.raise_share}")
        for name in ("gate_learning_rate_factor", "hidden_weight", "half_life_gap_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        _refuse_deepspeed(self.deepspeed)
        super().__post_init__()
        if self.n_gpu > 1:  # transformers would copy the model to each at every step (DataParallel), and the losses stay in the copies
            logger.warning(f"one of {self.n_gpu} GPUs is used; for all: accelerate launch --config_file examples/configs/ddp.yaml")
            self._n_gpu = 1
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # it would have no effect, and a warning
        if getattr(self, "ddp_find_unused_parameters", None) is None:
            # Every trained weight gets a gradient at every step (see `_zero_of_idle_weights`), and alignment would confuse the search.
            self.ddp_find_unused_parameters = False
        names = [name for name in CHECKPOINTING if getattr(self, name, False)]
        for name in names:
            options = dict(getattr(self, f"{name}_kwargs") or {})
            if options.setdefault("use_reentrant", False):
                raise ValueError(
                    f"{name}_kwargs={{'use_reentrant': True}} loses the gradients of DSLA layers over a frozen base: "
                    "use {'use_reentrant': False}"
                )
            setattr(self, f"{name}_kwargs", options)
        if names and self.raise_share:
            raise ValueError(f"raise_share needs the cache, which {names[0]} turns off: use one of them")


def _refuse_deepspeed(setting: Any) -> None:
    """Raises ValueError where the Trainer or accelerate would start DeepSpeed."""
    if setting or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        raise ValueError(
            "DeepSpeed is not supported: two models run in one step here, teacher and student with the same weights, and that has not "
            "been tried with ZeRO. FSDP2 cuts the weights the same way: accelerate launch --config_file examples/configs/fsdp2.yaml"
        )


def draw_level(seed: int, step: int, depth: int, draws: int = 1) -> int:
    """The level of a training step: the highest of some draws, each uniform from 1 to `depth`. A pure function of its arguments,
    so that it is the same on every process and after a resume."""
    rng = random.Random(f"{seed}/{step}")
    return max(rng.randint(1, depth) for _ in range(draws))


def draw_raise(seed: int, step: int, share: float, level: int, tokens: int) -> tuple[int, int] | None:
    """For a share of the steps a lower level and the number of tokens that are read at it: a pure function of its arguments."""
    rng = random.Random(f"raise/{seed}/{step}")
    if rng.random() >= share or level == 0 or tokens < 4:
        return None
    return rng.randrange(level), rng.randint(tokens // 4, 3 * tokens // 4)


class DSLATrainer(Trainer):
    """Trains the DSLA weights of a PEFT model. Data: `input_ids` `[B, T]`, and optionally `attention_mask` and `loss_mask`, which
    is nonzero at the tokens that count (of chats, those that the assistant writes); no labels needed.

    Trained weights are held in fp32 whatever the base's dtype. Loss terms and, per layer, the half-lives of both states
    are logged.

    Raises:
        ValueError: if the model has no DSLA adapter or was loaded with a tp_plan, or FSDP is set up in another way than
            examples/configs/fsdp2.yaml has it.
        FloatingPointError: while training, if a loss is not finite; names the layer. No weight was changed by that step.
        OSError: while training, if the disk is full; names the folder and the last checkpoint that is whole. One that was being written,
            then or at an interrupt, is removed.

    What it saves is at the highest level that is trained, `train_level` or the whole plan. The console shows one line per logging step, or
    a bar on a terminal; what is logged per layer goes to `log_history` and trackers.

    With FSDP2, checkpoints are those of one process: any number of processes goes on from them, with FSDP2 or without.
    """

    # Our losses are means over a batch; the Trainer divides them by the accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(self, model: PeftModel, args: DSLATrainingArguments, **kwargs: Any):
        if not isinstance(getattr(model, "base_model", None), DSLAModel):
            raise ValueError("DSLATrainer trains a DSLA adapter: give it get_peft_model(model, DSLAConfig(...))")
        if args.stage == "logits":
            _check_logits(model)
        if is_tensor_parallel(model):
            raise ValueError(
                "training under tensor parallelism is not supported: load the base without tp_plan, and train with FSDP2 "
                "(examples/configs/fsdp2.yaml) if it does not fit on one device"
            )
        quantiser = getattr(model.get_base_model(), "hf_quantizer", None)
        if quantiser is not None and not quantiser.is_trainable:
            method = quantiser.quantization_config.quant_method
            raise ValueError(
                f"transformers trains nothing over a base that it marks as quantised by {getattr(method, 'value', method)}; if the weights "
                "are dequantised, as those from a GGUF file are, call base.hf_quantizer.remove_quantization_config(base) first"
            )
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        self._use_cache = getattr(model.config, "use_cache", None)
        super().__init__(model=model, args=args, **kwargs)
        self.model_accepts_loss_kwargs = False
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self._cut_parameters: list[list[nn.Parameter]] | None = None
        self.add_callback(_NoInputGradients)
        for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # which would show every layer's values
            self.remove_callback(callback)
        part = "" if args.train_level is None else f" at level {args.train_level}"
        self.progress = TrainingProgress(f"{args.stage}{part}", args.world_size, bool(args.disable_tqdm))
        self.add_callback(self.progress)
        self._check_fsdp()

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `config.use_cache`, which it turns off, is the base's own and is put back."""
        config: Any = self.accelerator.unwrap_model(self.model).config
        try:
            with told_of_full_disk(Path(str(self.args.output_dir))):
                return super().train(*args, **kwargs)
        finally:
            config.use_cache = self._use_cache
            self.progress.close()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in transformers, with a learning rate of their own for gates, mix and norm."""
        optimizer = super().create_optimizer(*args, **kwargs)
        cores = {id(p) for layer in dsla_layers(self.model).values() for p in layer.dsla_core.parameters()}
        factor: float = self.args.gate_learning_rate_factor
        for group in list(optimizer.param_groups):
            own = [p for p in group["params"] if id(p) in cores]
            if own and factor != 1:
                group["params"] = [p for p in group["params"] if id(p) not in cores]
                optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * factor})
        if is_sharded(self.model):  # by an earlier stage: nothing is left for accelerate to cut
            self.accelerator.state.fsdp_plugin.auto_wrap_policy = None
            self._cut_parameters = [list(group["params"]) for group in optimizer.param_groups]
        return optimizer

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. Comes right after accelerate has prepared the optimizer, for which it finds each weight again by its
        address; of weights that an earlier stage has cut, the empty parts of small ones have none."""
        for group, parameters in zip(self.optimizer.param_groups, self._cut_parameters or (), strict=False):
            group["params"] = parameters
        return super().create_scheduler(*args, **kwargs)

    # --- losses -------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        # The level holds from the forward to the end of the backward pass, whose recomputations need it.
        level = self.step_level()
        with self._at_level(level):
            loss = super().training_step(model, inputs, *args, **kwargs)
            if is_sharded(self.model):
                for parameter in self._idle_weights():  # as `_zero_of_idle_weights` does for whole ones
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            finite = self.accelerator.reduce(torch.isfinite(loss).float(), reduction="mean")
            if finite.item() < 1:
                self._stop_for(self._prepare_inputs(inputs), level)
        self.progress.tokens += inputs["input_ids"].numel()
        if self.args.stage == "logits":
            self._terms["level"].append(torch.tensor(float(level), device=loss.device))
        return loss

    def step_level(self) -> int:
        """The level of the current step."""
        args: Any = self.args
        depth = len(active_config(self.model).conversion_order or ())
        return args.train_level if args.train_level is not None else draw_level(args.seed, self.state.global_step, depth, args.level_draws)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        mask = _counted(inputs)
        inputs = {name: value for name, value in inputs.items() if name not in NOT_FOR_THE_MODEL}
        args: Any = self.args
        sums = self._alignment(model, inputs, mask) if args.stage == "alignment" else self._logits(model, inputs, mask)
        # One denominator for all processes: the mean of their losses is then that of one process with the whole batch.
        weights = self.accelerator.reduce(torch.stack([weight.detach() for _, weight in sums.values()]), reduction="mean")
        losses = {name: total / weight for (name, (total, _)), weight in zip(sums.items(), weights, strict=True)}
        if args.stage == "alignment":
            loss = sum(losses.values()) / len(losses)
        else:
            factors = {"kl": 1.0, "hidden": args.hidden_weight, "half_life_gap": args.half_life_gap_weight}
            loss = sum(factors[name] * term for name, term in losses.items())
        if self.model.training:
            for name, term in losses.items():
                self._terms[name].append(term.detach())
            loss = loss + self._zero_of_idle_weights()
        return (loss, {}) if return_outputs else loss

    def _alignment(self, model: nn.Module, inputs: dict[str, Any], mask: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        base = self.accelerator.unwrap_model(model).get_base_model()
        layers = {i: layer for i, layer in dsla_layers(base).items() if layer.adapter_name}
        trained = {i: layer for i, layer in layers.items() if any(p.requires_grad for p in layer.parameters())}
        chosen = trained or layers
        recompute = self.model.training and any(getattr(self.args, name, False) for name in CHECKPOINTING)
        losses: dict[int, Tensor] = {}
        sums: dict[str, tuple[Tensor, Tensor]] = {}

        def compare(layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
            # Inside the wrapped forward, as DDP and FSDP need.
            def student() -> tuple[Tensor, Tensor]:
                return alignment_sums(layer.dsla_attention()(*args, **kwargs)[0], output[0], mask)

            error, energy = checkpoint(student, use_reentrant=False) if recompute else student()
            index = layer.layer_idx
            losses[index] = error + losses[index] if index in losses else error
            sums[f"alignment/layer_{index}"] = losses[index], energy

        hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in chosen.values()]
        blocks = decoder_layers(base)
        try:
            with (
                self._teacher(model),
                _without_checkpointing(model),
                first_layers(base, max(chosen) + 1),
                losses_inside({i: blocks[i] for i in chosen}, losses),
            ):
                model(**inputs, use_cache=False, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        return sums

    def _logits(self, model: nn.Module, inputs: dict[str, Any], mask: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        args: Any = self.args
        hidden = bool(args.hidden_weight)
        ids, real = inputs["input_ids"], inputs.get("attention_mask")
        config = active_config(self.model)
        level = config.level or 0
        raised = draw_raise(args.seed, self.state.global_step, args.raise_share, level, ids.shape[1]) if self.model.training else None
        with torch.no_grad(), self._teacher(model):
            teacher = model(**inputs, use_cache=False, output_hidden_states=hidden)
        # Blocks below the first DSLA layer give student and teacher the same (after a raise up to rounding, in pieces).
        depth = len(decoder_layers(self.model.get_base_model()))
        first = min(config.converted_layers, default=depth) if raised is None else 0
        teacher_logits, teacher_states = teacher.logits, teacher.hidden_states[first + 1 :] if hidden else ()
        del teacher
        if raised is None:
            cut = 0
            student = model(**inputs, use_cache=False, output_hidden_states=hidden)
        else:
            below, cut = raised
            cache = DynamicCache(config=self.accelerator.unwrap_model(model).config)
            begin = {"input_ids": ids[:, :cut]} | ({} if real is None else {"attention_mask": real[:, :cut]})
            with torch.no_grad(), self._at_level(below):
                model(**begin, past_key_values=cache, logits_to_keep=1)
            rest = inputs | {"input_ids": ids[:, cut:]}  # a mask covers the beginning too
            student = model(**rest, past_key_values=cache, output_hidden_states=hidden)
        mask = None if mask is None else mask[:, cut:]
        sums = {"kl": kl_sums(student.logits, teacher_logits[:, cut:], mask, reuse_teacher=True)}
        if hidden:
            pairs = zip(student.hidden_states[first + 1 :], teacher_states, strict=True)
            measured = [alignment_sums(s, t[:, cut:], mask) for s, t in pairs]
            zero = sums["kl"][1].new_zeros(())
            errors = torch.stack([zero] * first + [error for error, _ in measured])
            energies = torch.stack([zero + 1] * first + [energy for _, energy in measured])
            sums["hidden"] = (errors / self.accelerator.reduce(energies, reduction="mean")).sum(), zero + len(errors)
        if args.half_life_gap_weight:
            active = [layer for layer in dsla_layers(self.model).values() if layer.converted]
            gaps = [half_life_gap_loss(with_whole_weights(layer.dsla_core[layer.adapter_name]).bias_half_lives()) for layer in active]
            sums["half_life_gap"] = torch.stack(gaps).sum(), gaps[0].new_tensor(len(gaps))
        return sums

    @torch.no_grad()
    def _stop_for(self, inputs: dict[str, Any], level: int) -> None:
        """Raises FloatingPointError that says where a loss that is not finite comes from."""
        layers = dsla_layers(self.model)
        bad = [
            f"the weights of layer {i}"
            for i, layer in layers.items()
            if not all([whole(p).isfinite().all() for p in layer.parameters() if p.requires_grad])  # noqa: C419, all of them: FSDP gathers
        ]
        if not bad:
            found: list[int] = []
            hooks = [
                layer.register_forward_hook(lambda m, _, out: None if out[0].isfinite().all() else found.append(m.layer_idx))
                for layer in layers.values()
            ]
            for hooked_level in (0, level):  # the base first: with it broken, no layer of ours is to blame
                with self._at_level(hooked_level):
                    self.model(
                        **{name: x for name, x in inputs.items() if name not in NOT_FOR_THE_MODEL}, use_cache=False, logits_to_keep=1
                    )
                anywhere = self.accelerator.reduce(torch.tensor(float(len(found)), device=self.args.device))
                if anywhere.item():  # all processes stop here: FSDP would wait for those that do not
                    what = "the original model's attention" if hooked_level == 0 else "the output"
                    bad = [f"{what} in layer {found[0]}" if found else f"{what} of a layer on another process"]
                    break
            for hook in hooks:
                hook.remove()
        where = bad[0] if bad else "nothing that one layer gives: the gradients before, or the logits"
        raise FloatingPointError(
            f"the loss of step {self.state.global_step + 1} is not finite at level {level}; not finite is {where}. "
            f"{_what_is_kept(str(self.args.output_dir))}; a lower learning_rate or max_grad_norm helps most often"
        )

    def _zero_of_idle_weights(self) -> Tensor | float:
        """Zero, but a function of the trained weights of layers that are not DSLA at this level: their gradient is zero, not
        missing, alike on one process and many (DDP waits for every gradient)."""
        return 0.0 if is_sharded(self.model) else sum(((p * 0).sum() for p in self._idle_weights()), start=0.0)

    def _idle_weights(self) -> list[nn.Parameter]:
        args: Any = self.args
        if args.stage == "alignment":
            return []
        return [p for layer in dsla_layers(self.model).values() if not layer.converted for p in layer.parameters() if p.requires_grad]

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

    # --- checkpoints --------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with self._at_level(highest_trained(self.model, self.args)):
            if not is_sharded(self.model):
                super().save_model(output_dir, _internal_call)
                return
            weights = whole_adapter(self.model)
            if self.args.should_save:
                self._save(output_dir, state_dict=weights)
            PartialState().wait_for_everyone()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:  # an interrupt, too
            if self.args.should_save and not _is_whole(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not is_sharded(self.model):
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_FILE))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_FILE))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not is_sharded(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        peft_model: Any = self.model
        load_adapter_weights(peft_model, _saved_stage(Path(resume_from_checkpoint), peft_model), peft_model.active_adapter)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not os.path.exists(os.path.join(checkpoint, OPTIMIZER_FILE)):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # Not onto the device of each process: transformers 5.17 calls the CPU of the second one "cpu:1", which torch cannot read.
        content = torch.load(os.path.join(checkpoint, OPTIMIZER_FILE), map_location="cpu", weights_only=True)
        load_optimizer_state(self.optimizer, content)
        self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, SCHEDULER_FILE), weights_only=True))

    def _load_best_model(self) -> None:
        if not is_sharded(self.model):
            super()._load_best_model()
            return
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _check_fsdp(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None:
            if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
                logger.warning_once("accelerate knows FSDP on accelerators only: on the CPU every process holds the whole model")
            return
        if getattr(plugin, "fsdp_version", 1) != 2:
            raise ValueError("fsdp_version 1 wants the weights of a block all trained or all frozen, in one dtype: set fsdp_version: 2")
        if self.accelerator.mixed_precision != "no":
            raise ValueError(
                f"mixed precision {self.accelerator.mixed_precision} with FSDP would round the gates, which are float32: leave it out, "
                "the base computes in its own dtype (--dtype bfloat16)"
            )
        if plugin.activation_checkpointing:
            raise ValueError(
                "fsdp_activation_checkpointing would run alignment's losses twice: set it to false and give --gradient_checkpointing true"
            )

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


class _NoInputGradients(TrainerCallback):
    """Takes back what transformers does to the embeddings for activation checkpointing. That is needed with `use_reentrant=True`
    only; the backward pass would go on below the first DSLA layer, and through the teacher of the alignment, for nothing."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if any(getattr(args, name, False) for name in CHECKPOINTING):
            model.get_base_model().disable_input_require_grads()


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
            means = with_whole_weights(layer.dsla_core[layer.adapter_name]).bias_half_lives().detach().log().mean((0, 2)).exp()
            for name, life in zip(("history", "recency"), means.tolist(), strict=True):
                lives[f"half_life/{name}/layer_{index}"] = life
    return lives


def _counted(inputs: dict[str, Any]) -> Tensor | None:
    """The tokens `[B, T]` that count for a loss: real ones, and of those the marked ones; None: all."""
    masks = [inputs[name] for name in ("attention_mask", "loss_mask") if inputs.get(name) is not None]
    return masks[0] * masks[1] if len(masks) == 2 else masks[0] if masks else None


def _what_is_kept(directory: str) -> str:
    if so_far := progress_so_far(Path(directory)):  # of a whole run
        return f"Kept: {so_far}"
    checkpoint = _last_whole_checkpoint(directory)
    return "No checkpoint has been written yet" if checkpoint is None else f"The last whole checkpoint is {checkpoint}"


def _last_whole_checkpoint(directory: str) -> str | None:
    """The newest checkpoint that is whole: a full disk or a kill leaves others."""
    whole = [path for path in _checkpoints(directory) if _is_whole(path)]
    return str(whole[-1]) if whole else None


def _checkpoints(directory: str) -> list[Path]:
    """All checkpoints, the newest last."""
    steps = {path: path.name.partition("-")[2] for path in Path(directory).glob("checkpoint-*")}
    return sorted((path for path, step in steps.items() if step.isdigit()), key=lambda path: int(steps[path]))


def _is_whole(checkpoint: Path) -> bool:
    """Whether the Trainer's state, written last, can be read, and each file of tensors is as long as it says."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for file in checkpoint.rglob("*.safetensors"):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(file) for file in checkpoint.glob("*.pt"))


class FullDisk(OSError):
    """The disk takes no more; says where, what is kept, and what to do."""


@contextmanager
def told_of_full_disk(directory: Path) -> Any:
    """Within it the many errors that a full disk gives are one.

    Raises:
        FullDisk: with the folder, what is kept there, and what to do.
    """
    try:
        yield
    except FullDisk:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        number = error.errno if isinstance(error, OSError) else errno.ENOSPC
        where = getattr(error, "filename", None) or directory
        raise FullDisk(
            number,
            f"{os.strerror(number or errno.ENOSPC)} while writing to {where}. {_what_is_kept(str(directory))}; make room and give the same "
            "command again",
        ) from error


# --- the whole recipe -------------------------------------------------------------------------------------------


def distill(
    model: PeftModel,
    train_dataset: Any,
    args: DSLATrainingArguments,
    *,
    alignment_steps: int,
    logits_steps: int,
    method: str = "random",
    ranking_data: Any = None,
    ranking_metric: str = "kl",
    **trainer_options: Any,
) -> LayerRanking | None:
    """Stage 1, ranking of the layers, stage 2: an adapter whose every level is trained, saved in `args.output_dir`.

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
            is not touched again after its turn, so that level k is part of level k + 1 bit for bit.
        ranking_data: batches of `input_ids` `[B, T]` for `rank_layers`; None keeps the order of the config.
        ranking_metric: of `rank_layers`.
        trainer_options: passed to `DSLATrainer`, e.g. callbacks or `eval_dataset`.

    Raises:
        ValueError: if `method` is unknown, `output_dir` holds something else or a run with other settings, or the window reads nearly
            all of the sequences, so that nothing can be learnt.
        OSError: if the disk is full; see `DSLATrainer`.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    tuner: Any = model.base_model
    output = Path(args.output_dir)
    levels = len(active_config(model).conversion_order or ())
    if logits_steps:
        _check_logits(model)
    if method == "chain" and 0 < logits_steps < levels:
        raise ValueError(f"a chain over {levels} layers needs {levels} steps or more, got logits_steps {logits_steps}")
    config = active_config(model)
    check_output(model, output)
    check_teaches(train_dataset, config.window_size, config.sink_tokens)
    if ranking_data is not None:
        ranking_data = list(ranking_data)
        if ranking_metric != "entropy":  # now, not after the first stage
            check_teaches(ranking_data, config.window_size, config.sink_tokens, purpose="to rank layers on")
    _run_stage(model, train_dataset, args, output / "alignment", {"stage": "alignment", "max_steps": alignment_steps}, trainer_options)
    ranking = None
    if ranking_data is not None:
        ranking_file = output / "ranking.json"
        if ranking_file.exists():
            ranking = LayerRanking.from_dict(json.loads(ranking_file.read_text()))
        else:
            say(f"ranking the layers on {len(ranking_data)} batches")
            ranking = rank_layers(model, ranking_data, metric=ranking_metric)
            if args.process_index == 0:
                with told_of_full_disk(output):
                    write_json(ranking_file, ranking.to_dict())
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


def highest_trained(model: Any, args: DSLATrainingArguments, method: str = "random") -> int:
    """The highest level that is trained: at which an adapter is saved."""
    depth = len(active_config(model).conversion_order or ())
    return depth if args.train_level is None or method == "chain" or args.stage == "alignment" else args.train_level


def check_output(model: PeftModel, output: Path) -> None:
    """Raises ValueError if `output`, or the folder of a stage below it, holds something else than states of this adapter."""
    folders = [path for stage in STAGES for path in (output / stage, *sorted(output.glob(f"{stage}/level_*")))]
    for directory in (output, *(path for folder in folders for path in (folder, *folder.glob("checkpoint-*")))):
        check_adapter_directory(_saved_stage(directory, model), active_config(model))


def progress_so_far(output: Path) -> str:
    """What of a distillation lies in `output`, in words: 'alignment is finished; the last checkpoint is step 200 of 340 of logits (DIR)';
    nothing if there is nothing to go on from."""
    finished, last = [], ""
    for stage in STAGES:
        for folder in (output / stage, *sorted(output.glob(f"{stage}/level_*"))):
            name = str(folder.relative_to(output))
            if (folder / "adapter_config.json").exists():
                finished.append(name)
            elif (checkpoint := _last_whole_checkpoint(str(folder))) is not None:
                last = f"the last checkpoint is step {_step_of(checkpoint)}{_of_all(folder)} of {name} ({checkpoint})"
    parts = [f"{', '.join(finished)} {'is' if len(finished) == 1 else 'are'} finished"] if finished else []
    return "; ".join([*parts, last] if last else parts)


def _step_of(checkpoint: str) -> str:
    return Path(checkpoint).name.partition("-")[2]


def _of_all(folder: Path) -> str:
    settings = folder / SETTINGS_FILE
    return f" of {json.loads(settings.read_text())['max_steps']}" if settings.exists() else ""


def _check_logits(model: Any) -> None:
    """Raises ValueError if `model` is no causal LM, whose logits stage 2 is about."""
    base = model.get_base_model()
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"stage 'logits' needs a causal LM, and {type(base).__name__} is none: distil over AutoModelForCausalLM, and load the adapter "
            'over the other model with PeftModel.from_pretrained(model, adapter, task_type="FEATURE_EXTRACTION")'
        )


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
    saved = _saved_stage(directory, model)
    if (saved / "adapter_config.json").exists():
        say(f"{name}: finished, read from {saved}")
        load_adapter_weights(model, saved, adapter)
        return
    checkpoint = _last_whole_checkpoint(str(directory))
    for path in _checkpoints(str(directory)):
        if not _is_whole(path):
            say(f"{name}: {path} is damaged or half-written, and passed over")
    if checkpoint is not None:
        say(f"{name}: goes on from step {_step_of(checkpoint)} of {steps} ({checkpoint})")
    if checkpoint is not None and TrainerState.load_from_json(str(Path(checkpoint) / "trainer_state.json")).global_step >= steps:
        # Stopped between the last step and the end; the Trainer would take one step more.
        load_adapter_weights(model, _saved_stage(Path(checkpoint), model), adapter)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_state()
    trainer.save_model(str(directory))


def _saved_stage(directory: Path, model: PeftModel) -> Path:
    """Where PEFT saves the active adapter in `directory`."""
    adapter: Any = model.active_adapter
    return directory if adapter == "default" else directory / adapter


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


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file of JSON whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")
