"""Options of a distillation, from the command line and a YAML file: for `dsla distill` and `examples/distill.py`."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from ..models.loading import check_at_least_one
from ..training.arguments import DSLATrainingArguments
from ..training.planting import ANSWER_WEIGHT, check_answer_weight
from ..training.text import SOURCES
from ..training.unit_ranking import PROBE_WEIGHT, check_probe_weight

DESCRIPTION = """\
Distil a DSLA adapter for a checkpoint from the checkpoint itself. The default recipe:

  1. alignment: every converted layer learns the output of the attention that it replaces, all layers in one pass
  2. ranking:   the KV heads are ordered by what each adds to the harm on text and in questions about long texts (with --unit layer the
                layers, by the harm of converting each alone)
  3. logits:    KL to the original's logits at a random level per step, so that every level is trained (or, with --method chain,
                one layer after the other, each frozen after its turn, as in the DSLA paper)

and the adapter is saved in --output_dir, its levels measured. The same command goes on with a run that was interrupted."""

EPILOG = """\
All other options of transformers' TrainingArguments are accepted too, e.g. --adam_beta2 0.95. Names may be written with
underscores or dashes.

examples:
  dsla distill --model Qwen/Qwen3-0.6B --data my_text.txt --output_dir my-adapter
  dsla distill --config distill.yaml --learning_rate 1e-3     (the file's options, one of them overridden)
  accelerate launch examples/distill.py --config distill.yaml (the same on several GPUs)

A file for --config has a line 'name: value' per option; examples/configs/distill.yaml is a commented one."""

# Of some hundred TrainingArguments, those that --help lists.
LISTED = (
    "output_dir",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "gate_learning_rate_factor",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "bf16",
    "activation_checkpointing",
    "gradient_checkpointing",
    "train_level",
    "level_draws",
    "highest_share",
    "sequence_lengths",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "report_to",
    "run_name",
    "seed",
    "use_cpu",
)
# Set by the recipe: a value given for them would have no effect.
SET_BY_RECIPE = {
    "stage": "both stages are run",
    "max_steps": "the steps follow from --tokens, --length and the batch size",
    "num_train_epochs": "the steps follow from --tokens, --length and the batch size",
    "resume_from_checkpoint": "an interrupted run goes on when the same command is given again",
    "eval_strategy": "nothing is measured during training; --eval_sequences are measured at its end",
}
BATCH_SIZE = "per_device_train_batch_size"
DEFAULTS: dict[str, Any] = {
    # The recipe has some hundred steps: transformers' 500 would neither log nor save before the end of a stage.
    "logging_steps": 10,
    "save_steps": 100,
    # The newest, and the one before it should that be damaged.
    "save_total_limit": 2,
    # Not given: `distill_defaults` takes as many as make a step of 16,384 tokens.
    BATCH_SIZE: None,
}


DEFAULT_UNIT = {"random": "head", "chain": "layer"}  # of a new adapter, by method: a chain trains whole layers


@dataclass
class DistillOptions:
    """What is converted, on which text, for how long.

    Raises:
        ValueError: for a number that makes no run.
    """

    _argument_group_name = "conversion"

    model: str = field(metadata={"help": "Checkpoint to convert: a hub name or a folder."})
    data: list[str] = field(
        metadata={
            "help": f"Text: {SOURCES}; 'self': what the checkpoint writes. Chats ('messages') are learnt from where the assistant writes.",
            "metavar": "SOURCE",
        }
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file in that folder or repository; its weights are dequantised.", "metavar": "FILE"}
    )
    split: str = field(default="train", metadata={"help": "Split of hub datasets."})
    column: str = field(default="text", metadata={"help": "Field or column that has the text."})
    completion_only: bool = field(default=True, metadata={"help": "Of chats, learn from what the assistant writes only."})
    streaming: bool = field(default=False, metadata={"help": "Tokenise while training, and keep nothing on disk."})
    length: int | None = field(
        default=None,
        metadata={"help": "Tokens per training sequence. Default: 8192, or the model's context if less, in turn with 2048."},
    )
    tokens: int = field(default=24_000_000, metadata={"help": "Training tokens of both stages."})
    alignment_share: float = field(default=0.13, metadata={"help": "Share of these for stage 'alignment', below 1; 0: no such stage."})
    ranking_sequences: int = field(
        default=16, metadata={"help": "Sequences kept apart to rank the units, cut to the shortest length; 0: keep the order."}
    )
    ranking_probes: int = field(
        default=24, metadata={"help": "Questions about long texts that heads are ranked on beside these sequences; 0: none."}
    )
    probe_length: int | None = field(
        default=None, metadata={"help": "Tokens of the longest of these, at most the model's context. Default: --length."}
    )
    probes_in_training: float | None = field(
        default=None,
        metadata={
            "help": "Share of the sequences in which facts are planted that are asked for later. Default: 1/3, 0 where --data has chats."
        },
    )
    answer_weight: float = field(
        default=ANSWER_WEIGHT, metadata={"help": "Of the tokens that answer what was planted, in the loss, beside 1 of all others."}
    )
    eval_sequences: int = field(
        default=8,
        metadata={"help": "Sequences kept apart to measure the levels on; 0: none."},
    )
    unit: Literal["layer", "head"] | None = field(
        default=None,
        metadata={
            "help": "What a level counts: whole layers, or KV heads. Default: that of --adapter, for a new one head (for a chain layer)."
        },
    )
    method: Literal["random", "chain"] = field(
        default="random", metadata={"help": "How stage 'logits' trains every level: all units at random levels, or layers in a chain."}
    )
    ranking_metric: Literal["kl", "greedy", "entropy", "shares", "single", "random"] | None = field(
        default=None, metadata={"help": "What the units are ranked by; see dsla order --help. Default: kl for layers, shares for heads."}
    )
    probe_weight: float = field(
        default=PROBE_WEIGHT, metadata={"help": "Of what conversion does to answers beside what it does to text, when heads are ranked."}
    )
    window_size: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of the softmax window; 0: none (the paper's layer). Default: that of --adapter; new: 512, with states 128."
        },
    )
    states: bool | None = field(
        default=None,
        metadata={
            "help": "Whether converted heads have states behind their window. Default: as those of --adapter; new: only with "
            "--window_size 0 or a chain."
        },
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "Dtype of the frozen base; trained weights are fp32."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Go on from the weights of this DSLA adapter. Default: a new one."})
    allow_untested: bool = field(
        default=False, metadata={"help": "Convert a model of a type that is not supported, if small models of it pass the checks."}
    )

    def __post_init__(self) -> None:
        if self.gguf_file is not None:  # from here on one name, as `loading.source` takes it apart
            self.model, self.gguf_file = f"{self.model.rstrip('/')}/{self.gguf_file}", None
        if self.length is not None:
            check_at_least_one("length", self.length)
        check_at_least_one("tokens", self.tokens)
        if self.probe_length is not None:
            check_at_least_one("probe_length", self.probe_length)
        check_probe_weight(self.probe_weight)
        check_answer_weight(self.answer_weight)
        if not 0 <= self.alignment_share < 1:
            raise ValueError(f"alignment_share must be a share from 0 to below 1, got {self.alignment_share}")
        if self.probes_in_training is not None and not 0 <= self.probes_in_training <= 1:
            raise ValueError(f"probes_in_training must be a share from 0 to 1, got {self.probes_in_training}")
        for name in ("ranking_sequences", "ranking_probes", "eval_sequences"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if not self.data:
            raise ValueError("data must name at least one file")


# --- options ----------------------------------------------------------------------------------------------------


def parse_options(arguments: list[str] | None = None, prog: str | None = None) -> tuple[DistillOptions, DSLATrainingArguments]:
    """Options from the command line (default: that of the process), and under them those of the file that `--config` names.

    Raises:
        ValueError: if the file has an unknown option or a value that does not fit, or options contradict each other.
        OSError: if there is no such file.
    """
    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    given, arguments = first.parse_known_args(arguments)
    parser = _parser(prog)
    if given.config is not None:  # its options come first: of two values of an option the last one counts
        arguments = [*_read_config(parser, given.config), *arguments]
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        hints = [_nearest(word.split("=")[0], known) for word in unknown if word.startswith("-")]
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{''.join(hints)}")
    values = vars(namespace)
    del values["config"]
    options = DistillOptions(**{item.name: values.pop(item.name) for item in dataclasses.fields(DistillOptions)})
    batch_size = values.pop(BATCH_SIZE)
    args = DSLATrainingArguments(**values)
    setattr(args, BATCH_SIZE, batch_size)  # None until `distill_defaults.settle`, which knows the length
    defaults = {item.name: item.default for item in dataclasses.fields(DSLATrainingArguments)}
    for name, reason in SET_BY_RECIPE.items():
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"leave --{name} out: {reason}")
    if args.sequence_lengths and options.length is None:
        options.length = max(args.sequence_lengths)
    if args.sequence_lengths and options.length and (wrong := [length for length in args.sequence_lengths if options.length % length]):
        raise ValueError(
            f"--sequence_lengths {wrong} do not divide --length {options.length}, of which they are pieces: give --length "
            f"{max(args.sequence_lengths)}, or other lengths"
        )
    return options, args


class _Training(DSLATrainingArguments):
    """Gives these options a heading of their own in --help."""

    _argument_group_name = "training (more below)"


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        # "(default: None)" teaches nothing: the help of such an option says what happens without it.
        return action.help if action.required or action.default is None else super()._get_help_string(action)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # Options with two spellings (--output_dir, --output-dir) are listed with one.
        if action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X", string_to_bool: "true|false"}.get(action.type, "TEXT")


def _parser(prog: str | None = None, **keywords: Any) -> HfArgumentParser:
    parser = HfArgumentParser(
        (DistillOptions, _Training),
        prog=prog,
        usage="%(prog)s --model MODEL --data FILE [FILE ...] --output_dir DIR [options]\n       %(prog)s --config FILE.yaml [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=_Help,
        allow_abbrev=False,
        **keywords,
    )
    parser.add_argument("--config", metavar="FILE.yaml", help="Read options from this file; those on the command line override it.")
    parser.set_defaults(**DEFAULTS)
    training = {item.name for item in dataclasses.fields(DSLATrainingArguments)}
    listed = {*LISTED} - ({"gradient_checkpointing"} if "activation_checkpointing" in training else set())
    for action in parser._actions:
        if action.dest == "output_dir":
            action.required, action.metavar, action.help = True, "DIR", "Folder for the adapter, and below it for what a resumed run needs."
        elif action.dest == BATCH_SIZE:
            action.help = "Sequences of a step and device. Default: as many as make a step of 16,384 tokens, at least 1."
        elif action.dest in training - listed or (action.nargs == 0 and action.dest != "help"):
            action.help = argparse.SUPPRESS
    return parser


def _read_config(parser: HfArgumentParser, file: str) -> list[str]:
    """The options of a YAML file as command-line arguments. Dicts, which the command line cannot say, become defaults.

    Raises:
        ValueError: names the file and the unknown option, or the value that does not fit.
        OSError: if there is no such file.
    """
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{file} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file} must have a line 'name: value' per option, got {type(content).__name__}")
    probe = _parser(exit_on_error=False)
    defaults = {action.dest: action.default for action in probe._actions if action.nargs != 0 and action.dest != "config"}
    for action in probe._actions:
        action.required = False  # here an option is tried alone
    arguments: list[str] = []
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in defaults:
            raise ValueError(f"{file}: unknown option {key!r}{_nearest(name, defaults)}")
        if value is None:
            if defaults[name] is not None:
                raise ValueError(f"{file}: {key} has no value; leave it out for its default, {defaults[name]}")
            continue
        if isinstance(value, dict):
            parser.set_defaults(**{name: value})
            continue
        option = [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
        try:
            _, rest = probe.parse_known_args(option)
        except argparse.ArgumentError as error:
            hint = "; YAML reads yes, no, on and off as true or false: put the word in quotes" if isinstance(value, bool) else ""
            raise ValueError(f"{file}: {key}: {error.message}{hint}") from None
        if rest:
            raise ValueError(f"{file}: {key} takes one value, got {value}")
        arguments += option
    return arguments


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
