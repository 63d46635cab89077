"""Arguments of a distillation: those of `Trainer`, and what a stage adds."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments
from transformers.utils import logging

from ..levels.reading import is_whole
from .alignment import WAYS

logger = logging.get_logger(__name__)

STAGES = ("alignment", "logits")
# transformers 5.18 renamed it; where both names are, both hold the same.
CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")


@dataclass
class DSLATrainingArguments(TrainingArguments):
    """`TrainingArguments` with what distillation adds."""

    stage: str = field(default="logits", metadata={"help": "'alignment' of attention outputs, or 'logits' (KL at random levels)."})
    train_level: int | str | None = field(
        default=None,
        metadata={
            "help": "Train stage 'logits' at this level only: a number, a share ('50%%'), or what is kept of the KV heads ('kept:10%%'). "
            "Default: at a random level from 1 on, drawn anew for each step."
        },
    )
    alignment_heads: str | None = field(
        default=None,
        metadata={
            "help": "Stage 'alignment': 'all' heads of a layer together, 'subsets' of them that are drawn anew for each step, or 'each' by "
            "itself. Default: 'subsets' for a plan of heads, 'all' for one of layers."
        },
    )
    sequence_lengths: list[int] | None = field(
        default=None,
        metadata={
            "help": "Lengths that the steps have in turn, divisors of that of the rows: rows are cut into pieces, so that every step has "
            "the same tokens. Default: the rows as they are."
        },
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of the projections."})
    gate_learning_rate_factor: float = field(
        default=20.0,
        metadata={"help": "Peak learning rate of gates and mix, over that of the projections: they have far to go from their start."},
    )
    level_draws: int = field(
        default=1,
        metadata={"help": "Stage 'logits': the level of a step is the highest of so many draws; 1 treats all levels alike."},
    )
    highest_share: float = field(
        default=0.0,
        metadata={"help": "Stage 'logits': share of the steps at the highest level, whatever is drawn for the others."},
    )
    hidden_weight: float = field(
        default=0.0, metadata={"help": "Stage 'logits': weight of the alignment of the hidden states after each block."}
    )
    use_liger_kernel: bool | None = field(
        default=None,
        metadata={
            "help": "Norms, rotary embedding and activations by Liger Kernel while a stage is trained. Default: on a CUDA device, if "
            "it is installed, for types of models that are tested with it."
        },
    )
    cuda_graphs: bool | None = field(
        default=None,
        metadata={
            "help": "Record the passes of a step in CUDA graphs, where every layer runs its softmax attention and its DSLA, and switches "
            "choose. Default: for small models and batches on one CUDA device, where that is several times as fast."
        },
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
        if not 0 <= self.highest_share <= 1:
            raise ValueError(f"highest_share must be from 0 to 1, got {self.highest_share}")
        if isinstance(self.train_level, str) and self.train_level.strip().isdigit():
            self.train_level = int(self.train_level)
        if self.alignment_heads not in (None, *WAYS):
            raise ValueError(f"alignment_heads must be one of {list(WAYS)}, got {self.alignment_heads!r}")
        lengths: Any = self.sequence_lengths
        if lengths is not None and not (isinstance(lengths, (list, tuple)) and lengths and all(is_whole(x) and x >= 1 for x in lengths)):
            raise ValueError(f"sequence_lengths must be a list of lengths of 1 or more, got {lengths!r}")
        for name in ("gate_learning_rate_factor", "hidden_weight"):
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
        for name in (name for name in CHECKPOINTING if getattr(self, name, False)):
            options = dict(getattr(self, f"{name}_kwargs") or {})
            if options.setdefault("use_reentrant", False):
                raise ValueError(
                    f"{name}_kwargs={{'use_reentrant': True}} loses the gradients of DSLA layers over a frozen base: "
                    "use {'use_reentrant': False}"
                )
            setattr(self, f"{name}_kwargs", options)


def _refuse_deepspeed(setting: Any) -> None:
    """Raises ValueError where the Trainer or accelerate would start DeepSpeed."""
    if setting or os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        raise ValueError(
            "DeepSpeed is not supported: two models run in one step here, teacher and student with the same weights, and that has not "
            "been tried with ZeRO. FSDP2 cuts the weights the same way: accelerate launch --config_file examples/configs/fsdp2.yaml"
        )
