"""`DSLATrainer`: a `Trainer` for the two stages of a distillation of a DSLA adapter from its own base.

Stage "alignment": every DSLA layer learns to give the attention output of the layer it replaces, on the base's own
inputs, all layers in one pass and each on its own; where heads are converted, subsets of them (`alignment`). Stage "logits": KL to
the base's logits, so that every level of the plan is trained: either with a level drawn anew for every step, or as a chain (the DSLA
paper, arXiv 2506.09316): one layer after the other in conversion order is trained and then frozen. The teacher is the same model at
level 0.
"""

from __future__ import annotations

import os
import random
import shutil
from collections import defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PrinterCallback, Trainer, TrainerCallback, default_data_collator
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from ..core.progress import TrainingProgress
from ..core.tensor_parallel import is_tensor_parallel
from ..models.adapter import DSLAModel, active_config, dsla_layers
from ..models.configuration import resolve_level
from ..models.decoder import decoder_layers, first_layers
from .alignment import align_each, align_subset, align_whole, draw_heads
from .arguments import CHECKPOINTING, DSLATrainingArguments
from .calibration import match_outputs
from .checkpoints import is_whole, saved_stage, told_of_full_disk, what_is_kept
from .head_kl import head_kl_sums, hidden_for_logits, plain_head
from .liger import fused_by_liger, wants_liger
from .losses import alignment_sums, kl_sums
from .recorded import RecordedSteps, is_plain, is_small, why_not_recorded
from .sharding import (
    check_fsdp,
    is_sharded,
    load_adapter_weights,
    load_optimizer_state,
    losses_inside,
    whole,
    whole_adapter,
    whole_optimizer_state,
    with_whole_weights,
)
from .switches import output_projections, switched

NOT_FOR_THE_MODEL = ("labels", "loss_mask")
OPTIMIZER_FILE, SCHEDULER_FILE = "optimizer.pt", "scheduler.pt"


def draw_level(seed: int, step: int, depth: int, draws: int = 1, highest_share: float = 0.0) -> int:
    """The level of a training step: the highest of some draws, each uniform from 1 to `depth`; of a share of the steps `depth`. A pure
    function of its arguments, so that it is the same on every process and after a resume."""
    rng = random.Random(f"{seed}/{step}")
    if highest_share and rng.random() < highest_share:
        return depth
    return max(rng.randint(1, depth) for _ in range(draws))


class DSLATrainer(Trainer):
    """Trains the DSLA weights of a PEFT model. Data: `input_ids` `[B, T]`, and optionally `attention_mask` and `loss_mask`, which
    is nonzero at the tokens that count (of chats, those that the assistant writes); no labels needed.

    Trained weights are held in fp32 whatever the base's dtype. Loss terms and, per layer, the half-lives of both states
    are logged.

    Raises:
        ValueError: if the model has no DSLA adapter or was loaded with a tp_plan, or FSDP is set up in another way than
            examples/configs/fsdp2.yaml has it.
        FloatingPointError: while training, if a loss or gradient is not finite; names the layer. No weight was changed by that step.
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
            check_logits(model)
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
        tokenizer = kwargs.get("processing_class")
        if kwargs.get("data_collator") is None and getattr(tokenizer, "pad_token", "") is None:
            kwargs["data_collator"] = default_data_collator  # many tokenizers cannot pad, and blocks of one length need none
        self._use_cache = getattr(model.config, "use_cache", None)
        self._liger = wants_liger(args.use_liger_kernel, model.get_base_model(), args.device)
        asked, args.use_liger_kernel = args.use_liger_kernel, False  # transformers would patch the model for good
        try:
            super().__init__(model=model, args=args, **kwargs)
        finally:
            args.use_liger_kernel = asked
        self.model_accepts_loss_kwargs = False
        self._terms: dict[str, list[Tensor]] = defaultdict(list)
        self._cut_parameters: list[list[nn.Parameter]] | None = None
        self._grouped: torch.optim.Optimizer | None = None
        self._head: tuple[nn.Linear | None] | None = None
        self._may_record: bool | None = None  # decided at the first step, whose batch is there
        self._recorded: RecordedSteps | None = None
        # While the losses of a step are recorded: of each layer [Hkv], and what lasts until its backward pass is over.
        self._switches: dict[int, Tensor] | None = None
        self._until_backward = ExitStack()
        self._current: tuple[dict[str, Any], int] | None = None  # batch and level of the step whose gradients are there
        self._first_batches: list[dict[str, Any]] = []  # of the first step, until they are read
        self.add_callback(_NoInputGradients)
        self.add_callback(_FiniteGradients(self))
        for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # which would show every layer's values
            self.remove_callback(callback)
        level = trained_level(model, args)
        part = "" if level is None else f" at level {level}"
        self.progress = TrainingProgress(f"{args.stage}{part}", args.world_size, bool(args.disable_tqdm))
        self.add_callback(self.progress)
        check_fsdp(self.accelerator)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; `config.use_cache`, which it turns off, is the base's own and is put back."""
        config: Any = self.accelerator.unwrap_model(self.model).config
        try:
            with ExitStack() as within:
                within.enter_context(told_of_full_disk(Path(str(self.args.output_dir))))
                if self._liger:
                    within.enter_context(fused_by_liger(self.model.get_base_model(), self.args.liger_kernel_config))
                return super().train(*args, **kwargs)
        finally:
            self._recorded, self._may_record = None, None
            config.use_cache = self._use_cache
            self.progress.close()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """As in transformers, with a learning rate of their own for gates and mix. The norm, whose start `match_outputs` gives, is of the
        size of the model's values, so it has that of the projections."""
        optimizer = super().create_optimizer(*args, **kwargs)
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if inner is self._grouped:  # by an earlier `train`
            return optimizer
        self._grouped = inner
        parameters = [item for layer in dsla_layers(self.model).values() for item in layer.dsla_core.named_parameters()]
        cores = {id(p) for name, p in parameters if not name.endswith("norm_weight")}
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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers: the batches of a step, whose gradients are accumulated. Of the first step all of them are kept."""
        found = super().get_batch_samples(*args, **kwargs)
        if self._current is None and self.state.global_step == 0:
            self._first_batches = list(found[0])
        return found

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        # The level holds from the forward to the end of the backward pass, whose recomputations need it.
        level, inputs = self.step_level(), self._of_step_length(inputs)
        if self._current is None and self.args.stage == "alignment" and self.state.global_step == 0:
            batches = [self._of_step_length(batch) for batch in self._first_batches] or [inputs]
            self._first_batches = []
            match_outputs(self.model, [_for_the_model(self._prepare_inputs(batch)) for batch in batches], self.accelerator.reduce)
        with self._at_level(level):
            recorded = self._recorded_step(inputs)
            loss = super().training_step(model, inputs, *args, **kwargs) if recorded is None else recorded
            if is_sharded(self.model):
                for parameter in self._idle_weights():  # as `_zero_of_idle_weights` does for whole ones
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            finite = self.accelerator.reduce(torch.isfinite(loss).float(), reduction="mean")
            if finite.item() < 1:
                self._stop_for("loss", self._prepare_inputs(inputs), level)
        self._current = inputs, level
        self.progress.tokens += inputs["input_ids"].numel()
        if self.args.stage == "logits":
            self._terms["level"].append(torch.tensor(float(level), device=loss.device))
        return loss

    def _recorded_step(self, inputs: dict[str, Any]) -> Tensor | None:
        """The loss of a step whose passes are recorded; None where they run as they are."""
        args: Any = self.args
        if self._may_record is None:
            reason = why_not_recorded(args, self.model, inputs)
            if reason and args.cuda_graphs:
                raise ValueError(f"cuda_graphs=True is not possible here, {reason}: leave it out")
            self._may_record = not reason and (args.cuda_graphs or (args.cuda_graphs is None and is_small(self.model, inputs)))
        if not self._may_record or not is_plain(inputs):
            return None
        self.model.train()
        inputs, layers = self._prepare_inputs(inputs), self._layers_in_training()
        if self._recorded is None:
            heads = active_config(self.model).kv_heads
            rows = torch.ones(len(layers), heads, device=args.device)
            self._recorded = RecordedSteps(self.model, self._losses_by_switches(dict(zip(layers, rows, strict=True))), rows)
        loss, terms = self._recorded(inputs, self._converted_rows(list(layers)))
        self._may_record = self._recorded.failed is None
        for name, term in terms.items():
            self._terms[name].append(term)
        return loss

    def _losses_by_switches(self, switches: dict[int, Tensor]) -> Any:
        def losses(inputs: dict[str, Any], until_backward: ExitStack) -> tuple[Tensor, dict[str, Tensor]]:
            self._switches, self._until_backward = switches, until_backward
            try:
                return self._losses(self.model, inputs)
            finally:
                self._switches = None

        return losses

    def _converted_rows(self, layers: list[int]) -> Tensor:
        """Which KV heads are converted in the current step, `[layers, Hkv]` of 1 and 0."""
        args: Any = self.args
        config = active_config(self.model)
        if args.stage == "alignment":
            drawn = self._drawn_heads(layers)
            return torch.tensor([drawn.get(layer, [1.0] * config.kv_heads) for layer in layers])
        if config.conversion_unit == "layer":
            return torch.tensor([[float(layer in config.converted_layers)] * config.kv_heads for layer in layers])
        return torch.tensor([[float(head in config.heads_of(layer)) for head in range(config.kv_heads)] for layer in layers])

    def step_level(self) -> int:
        """The level of the current step."""
        args: Any = self.args
        depth, level = len(active_config(self.model).conversion_order or ()), trained_level(self.model, args)
        return draw_level(args.seed, self.state.global_step, depth, args.level_draws, args.highest_share) if level is None else level

    def _of_step_length(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with its rows cut to the length of the current step."""
        args: Any = self.args
        if not args.sequence_lengths:
            return inputs
        length, there = args.sequence_lengths[self.state.global_step % len(args.sequence_lengths)], inputs["input_ids"].shape[1]
        if unfit := [x for x in args.sequence_lengths if there % x]:  # all of them, before the first step
            raise ValueError(f"sequence_lengths {args.sequence_lengths}: rows of {there} tokens are no multiple of {unfit[0]}")
        mask = inputs.get("attention_mask")
        if mask is not None and not mask.all():
            raise ValueError("sequence_lengths cuts packed rows, and these are padded: pack them, or leave it out")
        return {name: x.reshape(-1, length) for name, x in inputs.items()}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss, losses = self._losses(model, inputs)
        if self.model.training:
            for name, term in losses.items():
                self._terms[name].append(term.detach())
            loss = loss + self._zero_of_idle_weights()
        return (loss, {}) if return_outputs else loss

    def _losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """What is trained for, and its terms."""
        mask = _counted(inputs)
        inputs = _for_the_model(inputs)
        args: Any = self.args
        sums = self._alignment(model, inputs, mask) if args.stage == "alignment" else self._logits(model, inputs, mask)
        # One denominator for all processes: the mean of their losses is then that of one process with the whole batch.
        weights = self.accelerator.reduce(torch.stack([weight.detach() for _, weight in sums.values()]), reduction="mean")
        losses = {name: total / weight for (name, (total, _)), weight in zip(sums.items(), weights, strict=True)}
        if args.stage == "alignment":
            return sum(losses.values(), start=torch.zeros((), device=weights.device)) / len(losses), losses
        factors = {"kl": 1.0, "hidden": args.hidden_weight}
        return sum((factors[name] * term for name, term in losses.items()), start=torch.zeros((), device=weights.device)), losses

    def _layers_in_training(self) -> dict[int, Any]:
        """The layers that have weights which are trained; all that have weights, where none are."""
        layers = {i: layer for i, layer in dsla_layers(self.model).items() if layer.adapter_name}
        return {i: layer for i, layer in layers.items() if any(p.requires_grad for p in layer.parameters())} or layers

    def _alignment(self, model: nn.Module, inputs: dict[str, Any], mask: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        base = self.accelerator.unwrap_model(model).get_base_model()
        chosen = self._layers_in_training()
        recompute = self.model.training and any(getattr(self.args, name, False) for name in CHECKPOINTING)
        converted = self._aligned_heads(list(chosen))
        align = align_each if getattr(self.args, "alignment_heads", None) == "each" else align_subset
        losses: dict[int, Tensor] = {}
        sums: dict[str, tuple[Tensor, Tensor]] = {}
        softmax: dict[int, Tensor] = {}  # what the base's output projections took, of layers that are aligned in part

        def compare(layer: Any, args: tuple, kwargs: dict, output: Any) -> None:
            # Inside the wrapped forward, as DDP and FSDP need.
            index = layer.layer_idx
            heads = () if index not in converted else (softmax.pop(index), converted[index])

            def student() -> tuple[Tensor, Tensor]:
                return (align if heads else align_whole)(layer, args, kwargs, output[0], mask, *heads)

            error, energy = checkpoint(student, use_reentrant=False) if recompute else student()
            softmax.pop(index, None)  # what the projection took within
            losses[index] = error + losses[index] if index in losses else error
            sums[f"alignment/layer_{index}"] = losses[index], energy

        def keep(index: int) -> Any:
            return lambda projection, args: softmax.update({index: args[0].detach()})

        hooks = [layer.register_forward_hook(compare, with_kwargs=True) for layer in chosen.values()]
        hooks += [output_projections(layer)[0].register_forward_pre_hook(keep(i)) for i, layer in chosen.items() if i in converted]
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

    def _aligned_heads(self, layers: list[int]) -> dict[int, Tensor]:
        """Of layers that are aligned in part, or by heads, in the current step: which KV heads are converted, `[Hkv]` of 1 and 0."""
        if self._switches is not None:
            subsets = self._drawn_heads(layers, whole=True)
            return {layer: switch for layer, switch in self._switches.items() if layer in subsets}
        drawn = self._drawn_heads(layers)
        # On the device all at once: each copy would wait for what runs there.
        return dict(zip(drawn, torch.tensor(list(drawn.values())).to(self.args.device), strict=True)) if drawn else {}

    def _drawn_heads(self, layers: list[int], whole: bool = False) -> dict[int, list[float]]:
        """The same as numbers. whole: with layers of which all heads were drawn in this step."""
        args: Any = self.args
        config = active_config(self.model)
        way = args.alignment_heads or ("subsets" if config.conversion_unit == "head" else "all")
        every = list(range(config.kv_heads))
        drawn: dict[int, list[float]] = {}
        for layer in layers:
            heads = sorted(config.planned_heads(layer)) or every
            if way == "subsets" and self.model.training:
                heads = list(draw_heads(args.seed, self.state.global_step, layer, heads))
            if heads != every or way == "each" or (whole and way == "subsets"):
                drawn[layer] = [float(head in heads) for head in every]
        return drawn

    def _logits(self, model: nn.Module, inputs: dict[str, Any], mask: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        hidden, head = bool(self.args.hidden_weight), self._plain_head(inputs)
        outputs = nullcontext if head is None else partial(hidden_for_logits, head)
        with torch.no_grad(), self._teacher(model), outputs():
            teacher = model(**inputs, use_cache=False, output_hidden_states=hidden)
        # Blocks below the first DSLA layer give student and teacher the same.
        depth = len(decoder_layers(self.model.get_base_model()))
        first = min((i for i, layer in dsla_layers(self.model).items() if layer.converted), default=depth)
        teacher_logits, teacher_states = teacher.logits, teacher.hidden_states[first + 1 :] if hidden else ()
        del teacher
        if self._switches is not None:
            self._until_backward.enter_context(switched(self.model, self._switches, gradients=False))
        with outputs():
            student = model(**inputs, use_cache=False, output_hidden_states=hidden)
        if head is None:
            sums = {"kl": kl_sums(student.logits, teacher_logits, mask, reuse_teacher=True)}
        else:
            sums = {"kl": head_kl_sums(student.logits, teacher_logits, head, mask)}
        if hidden:
            measured = [alignment_sums(s, t, mask) for s, t in zip(student.hidden_states[first + 1 :], teacher_states, strict=True)]
            zero = sums["kl"][1].new_zeros(())
            errors = torch.stack([zero] * first + [error for error, _ in measured])
            energies = torch.stack([zero + 1] * first + [energy for _, energy in measured])
            sums["hidden"] = (errors / self.accelerator.reduce(energies, reduction="mean")).sum(), zero + len(errors)
        return sums

    def _plain_head(self, inputs: dict[str, Any]) -> nn.Linear | None:
        """What makes logits of hidden states, and nothing else; None where that is not known to be so."""
        args: Any = self.args
        if self._head is None:  # looked for once, outside of what is recorded
            self._head = (None,)
            if not (is_sharded(self.model) or args.fp16 or args.bf16):
                base = self.accelerator.unwrap_model(self.model).get_base_model()
                with self._teacher(self.model):
                    self._head = (plain_head(base, inputs["input_ids"][:1, :4]),)
        return self._head[0]

    @torch.no_grad()
    def check_gradients(self) -> None:
        """Raises FloatingPointError if a gradient of the step is not finite: its optimizer would spoil all weights."""
        if self.args.fp16 or self._current is None:  # a scaler of the loss looks itself, and leaves such steps out
            return
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if gradients and not whole(torch.nn.utils.get_total_norm(gradients)).isfinite():
            self._stop_for("gradient", self._prepare_inputs(self._current[0]), self._current[1])

    @torch.no_grad()
    def _stop_for(self, what_is: str, inputs: dict[str, Any], level: int) -> None:
        """Raises FloatingPointError that says where a loss, or gradient, that is not finite comes from."""
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
                    self.model(**_for_the_model(inputs), use_cache=False, logits_to_keep=1)
                anywhere = self.accelerator.reduce(torch.tensor(float(len(found)), device=self.args.device))
                if anywhere.item():  # all processes stop here: FSDP would wait for those that do not
                    what = "the original model's attention" if hooked_level == 0 else "the output"
                    bad = [f"{what} in layer {found[0]}" if found else f"{what} of a layer on another process"]
                    break
            for hook in hooks:
                hook.remove()
        where = bad[0] if bad else "nothing that one layer gives: the gradients before, or the logits"
        raise FloatingPointError(
            f"the {what_is} of step {self.state.global_step + 1} is not finite at level {level}; not finite is {where}. "
            f"{what_is_kept(Path(str(self.args.output_dir)))}; a lower learning_rate or max_grad_norm helps most often"
        )

    def _zero_of_idle_weights(self) -> Tensor | float:
        """Zero, but a function of the trained weights of layers that are not DSLA at this level: their gradient is zero, not
        missing, alike on one process and many (DDP waits for every gradient)."""
        return 0.0 if is_sharded(self.model) else sum(((p * 0).sum() for p in self._idle_weights()), start=0.0)

    def _idle_weights(self) -> list[nn.Parameter]:
        args: Any = self.args
        if args.stage == "alignment":
            return []
        idle = [p for layer in dsla_layers(self.model).values() if not layer.converted for p in layer.parameters()]
        for layer in dsla_layers(self.model).values():
            if isinstance(layer.converted_part, tuple):  # the bias of its output projection is the base's
                idle += [p for name, p in layer.named_parameters() if name.startswith("dsla_o_proj") and name.endswith("bias")]
        return [p for p in idle if p.requires_grad]

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
            if self.args.should_save and not is_whole(folder):
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
        load_adapter_weights(peft_model, saved_stage(Path(resume_from_checkpoint), peft_model), peft_model.active_adapter)

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


def _for_the_model(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch without what is for the loss alone."""
    return {name: x for name, x in inputs.items() if name not in NOT_FOR_THE_MODEL}


class _FiniteGradients(TrainerCallback):
    """Looks at the gradients before the optimizer takes them."""

    def __init__(self, trainer: DSLATrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.check_gradients()


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
        if layer.adapter_name is not None and layer.dsla_core[layer.adapter_name].states:
            means = with_whole_weights(layer.dsla_core[layer.adapter_name]).bias_half_lives().detach().log().mean((0, 2)).exp()
            for name, life in zip(("history", "recency"), means.tolist(), strict=True):
                lives[f"half_life/{name}/layer_{index}"] = life
    return lives


def _counted(inputs: dict[str, Any]) -> Tensor | None:
    """The tokens `[B, T]` that count for a loss: real ones, and of those the marked ones; None: all."""
    masks = [inputs[name] for name in ("attention_mask", "loss_mask") if inputs.get(name) is not None]
    return masks[0] * masks[1] if len(masks) == 2 else masks[0] if masks else None


def check_logits(model: Any) -> None:
    """Raises ValueError if `model` is no causal LM, whose logits stage 2 is about."""
    base = model.get_base_model()
    if base.get_output_embeddings() is None:
        raise ValueError(
            f"stage 'logits' needs a causal LM, and {type(base).__name__} is none: distil over AutoModelForCausalLM, and load the adapter "
            'over the other model with PeftModel.from_pretrained(model, adapter, task_type="FEATURE_EXTRACTION")'
        )


def trained_level(model: Any, args: DSLATrainingArguments) -> int | None:
    """The level that all steps are trained at, as a number; None: one is drawn for each.

    Raises:
        ValueError: if the plan has no such level, or it is 0.
    """
    level, config = args.train_level, active_config(model)
    if isinstance(level, str):
        level = resolve_level(level, config, len(decoder_layers(model.get_base_model())))
    if level is not None and config.check_level(level) == 0:
        raise ValueError(f"train_level {args.train_level!r} is level 0, the original model, where nothing is trained: give a higher one")
    return level


def highest_trained(model: Any, args: DSLATrainingArguments, method: str = "random") -> int:
    """The highest level that is trained: at which an adapter is saved."""
    depth, level = len(active_config(model).conversion_order or ()), trained_level(model, args)
    return depth if level is None or method == "chain" or args.stage == "alignment" else level
