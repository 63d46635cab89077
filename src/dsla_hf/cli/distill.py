"""A whole distillation from options: what `dsla distill` and `examples/distill.py` run."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import yaml
from accelerate import PartialState
from peft import get_peft_model
from transformers import HfArgumentParser, set_seed
from transformers.hf_argparser import string_to_bool

from ..core.files import write_json
from ..core.interrupts import on_interrupt
from ..core.progress import is_first_process, quieten_libraries, say
from ..evaluation.level_check import check_levels, store_in_adapter
from ..models.configuration import DSLAConfig
from ..models.loading import (
    check_at_least_one,
    check_convertible,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    read_adapter_config,
)
from ..training.arguments import DSLATrainingArguments
from ..training.checkpoints import progress_so_far, told_of_full_disk
from ..training.ranking import LayerRanking
from ..training.recipe import STAGE_SETTINGS, check_output, distill
from ..training.sharding import initial_weights
from ..training.text import SOURCES, token_blocks
from ..training.text_check import check_teaches
from ..training.trainer import highest_trained
from .distill_plan import Plan, plan_text, sequences_per_step

DESCRIPTION = """\
Distil a DSLA adapter for a checkpoint from the checkpoint itself. The default recipe:

  1. alignment: every DSLA layer learns the output of the attention that it replaces, all layers in one pass
  2. ranking:   the layers are ordered by the harm of converting each alone
  3. logits:    KL to the original's logits at a random level per step, so that every level is trained (or, with --method chain,
                one layer after the other, each frozen after its turn, as in the DSLA paper)

and the adapter is saved in --output_dir, its levels measured. The same command goes on with a run that was interrupted."""

EPILOG = """\
All other options of transformers' TrainingArguments are accepted too, e.g. --adam_beta2 0.95. Names may be written with
underscores or dashes.

examples:
  dsla distill --model Qwen/Qwen3-0.6B --data my_text.txt --output_dir my-adapter
  dsla distill --config distill.yaml --learning_rate 5e-4     (the file's options, one of them overridden)
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
# So many blocks are looked at for tokens that the model does not know, and are all that is known of a text that streams.
CHECKED_BLOCKS = 64
LEAST_TRAINED = 10  # times as many sequences are trained on as are measured on, where there is little text
OPTIONS_FILE = "distill.json"
# Options that do not decide the result, or are checked by what is in the folder.
NOT_RECORDED = ("model", "data")
BATCH = "--per_device_train_batch_size times --gradient_accumulation_steps times processes"
DEFAULTS = {
    # The recipe has some hundred steps: transformers' 500 would neither log nor save before the end of a stage.
    "logging_steps": 10,
    "save_steps": 100,
    # The newest, and the one before it should that be damaged.
    "save_total_limit": 2,
    # Every trained weight gets a gradient in every step. DDP's search for unused ones starts from the model's output, to which
    # the layers in alignment do not lead, and fails.
}


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
            "help": f"Text: {SOURCES}. Chats ('messages') are learnt from where the assistant writes.",
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
    length: int = field(default=2048, metadata={"help": "Tokens per training sequence."})
    tokens: int = field(default=12_000_000, metadata={"help": "Training tokens, half for each stage."})
    ranking_sequences: int = field(default=16, metadata={"help": "Sequences kept apart to rank the layers; 0: keep the order."})
    eval_sequences: int = field(
        default=8,
        metadata={"help": "Sequences kept apart to measure the levels on; 0: none."},
    )
    method: Literal["random", "chain"] = field(
        default="random", metadata={"help": "How stage 3 trains every level: all layers at random levels, or a chain."}
    )
    ranking_metric: Literal["kl", "greedy", "entropy"] = field(
        default="kl", metadata={"help": "What the layers are ranked by; see dsla order --help."}
    )
    window_size: int | None = field(
        default=None, metadata={"help": "Tokens of the softmax window; 0: none (the paper's layer). Default: 128, or that of --adapter."}
    )
    dtype: Literal["bfloat16", "float16", "float32"] = field(
        default="bfloat16", metadata={"help": "Dtype of the frozen base; trained weights are fp32."}
    )
    adapter: str | None = field(default=None, metadata={"help": "Go on from the weights of this DSLA adapter. Default: a new one."})

    def __post_init__(self) -> None:
        if self.gguf_file is not None:  # from here on one name, as `loading.source` takes it apart
            self.model, self.gguf_file = f"{self.model.rstrip('/')}/{self.gguf_file}", None
        check_at_least_one("length", self.length)
        check_at_least_one("tokens", self.tokens)
        for name in ("ranking_sequences", "eval_sequences"):
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
    args = DSLATrainingArguments(**values)
    defaults = {item.name: item.default for item in dataclasses.fields(DSLATrainingArguments)}
    for name, reason in SET_BY_RECIPE.items():
        if getattr(args, name) != defaults[name]:
            raise ValueError(f"leave --{name} out: {reason}")
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


# --- the job ----------------------------------------------------------------------------------------------------


def distill_job(options: DistillOptions, args: DSLATrainingArguments) -> LayerRanking | None:
    """Read the text, load the checkpoint, say what will be done, distil, save, measure; the ranking of the layers if there was one.

    Everything that can be wrong in `options` is found before training begins, and before anything is written.

    Raises:
        ValueError: if there is too little text, options contradict the adapter, `output_dir` holds something else or a run with other
            options, or its disk has too little room.
        OSError: if a file is missing, or the disk is full.
        KeyboardInterrupt: with a line of what is kept; of several processes the first one's has words.
    """
    output = Path(str(args.output_dir))
    quieten_libraries()
    with on_interrupt(lambda: _what_is_kept(output) if is_first_process() else ""), told_of_full_disk(output):
        return _distill_job(options, args, output)


def _distill_job(options: DistillOptions, args: DSLATrainingArguments, output: Path) -> LayerRanking | None:
    config = _config_of(options, output)
    check_convertible(options.model, load_config(options.model))
    tokenizer = load_tokenizer(options.model)
    with args.main_process_first(desc="tokenizing"):
        text = _read_text(options, tokenizer)
    check_teaches(text.train, config.window_size, config.sink_tokens)

    set_seed(args.seed)
    if options.adapter is None:
        model = get_peft_model(load_model(options.model, options.dtype), config)
    else:
        model = load_adapter(options.model, options.adapter, options.dtype, trainable=True)
    config = model.peft_config["default"]
    config.check_level(args.train_level)
    config.level_metrics = None  # those of an adapter to go on from are not those of the one that is made
    known, highest = model.get_input_embeddings().num_embeddings, max(int(ids.max()) for ids in text.first)
    if highest >= known:
        raise ValueError(
            f"the tokenizer of {options.model} gives token {highest}, and the model knows tokens up to {known - 1}: "
            "the tokenizer belongs to another checkpoint"
        )
    before = initial_weights(model)

    steps = max(1, options.tokens // 2 // (sequences_per_step(args) * options.length))
    recorded = _recorded(options, args, config.window_size)
    _check_recorded(output, recorded)
    check_output(model, output)
    sizes = (options.length, text.sequences, steps, len(text.ranking), len(text.held_out))
    plan = plan_text(Plan(options.model, *sizes, method=options.method, dtype=options.dtype), model, args, output)
    if args.process_index == 0:
        print(plan, flush=True)
        write_json(output / OPTIONS_FILE, recorded)
    ranking = distill(
        model,
        text.train,
        args,
        alignment_steps=steps,
        logits_steps=steps,
        method=options.method,
        ranking_metric=options.ranking_metric,
        ranking_data=text.ranking or None,
        processing_class=tokenizer,
    )
    level = highest_trained(model, args, options.method)
    if text.held_out:
        say("measuring the levels")
        check = check_levels(model, text.held_out, tokenizer, before, level, "untrained" if options.adapter is None else "before")
        if args.process_index == 0:
            store_in_adapter(model, check, level, output)
            print(check.text())
    PartialState().wait_for_everyone()  # what was measured is there when any process returns
    if args.process_index == 0:
        config = model.peft_config["default"]
        print(f"adapter saved in {output}; level {level}; conversion order {config.conversion_order}; processes {args.world_size}")
    if args.world_size > 1:
        PartialState().destroy_process_group()  # a process that ends with gloo's threads running may abort
    return ranking


def _config_of(options: DistillOptions, output: Path) -> DSLAConfig:
    """That of the adapter to make, or to go on from.

    Raises:
        ValueError: if options contradict it, or `output` is no folder to save into.
    """
    if output.is_file():
        raise ValueError(f"{output} is a file: give a folder to save into")
    if options.adapter is None:
        given: dict[str, Any] = {} if options.window_size is None else {"window_size": options.window_size}
        return DSLAConfig(**given, task_type="CAUSAL_LM")
    config = read_adapter_config(options.adapter)
    if options.window_size not in (None, config.window_size):
        raise ValueError(f"{options.adapter} has window_size {config.window_size}: leave --window_size {options.window_size} out")
    if Path(options.adapter).resolve() == output.resolve():
        raise ValueError(f"--output_dir {output} is the adapter to go on from: give another folder")
    return config


def _what_is_kept(output: Path) -> str:
    kept = progress_so_far(output)
    if not kept:
        return "there was no checkpoint yet, so nothing is kept"
    return kept


# --- the text ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Text:
    """train: what is trained on, `sequences` of them (None: as the text streams). ranking, held_out: token ids `[T]`, no part of it.
    first: token ids of the first sequences, whatever their use."""

    train: Any
    sequences: int | None
    ranking: list[Any]
    held_out: list[Any]
    first: list[Any]


def _read_text(options: DistillOptions, tokenizer: Any) -> _Text:
    """The text in blocks: the first to rank on, some to measure on, and the others to train on.

    Raises:
        ValueError: if none is left to train on.
    """
    ranked, wanted = options.ranking_sequences, options.eval_sequences
    blocks = token_blocks(
        options.data,
        tokenizer,
        options.length,
        max_tokens=options.tokens + (ranked + wanted) * options.length,
        split=options.split,
        column=options.column,
        completion_only=options.completion_only,
        streaming=options.streaming,
    )
    looked_at = max(CHECKED_BLOCKS, ranked + LEAST_TRAINED * wanted)
    first = [row["input_ids"] for row in islice(blocks, looked_at)]
    there = len(first) if options.streaming else len(blocks)
    if there <= ranked:
        raise ValueError(
            f"the text gives {there} sequences of {options.length} tokens, and {ranked} are for the ranking, so none is left "
            "to train on: give more text, a smaller --length or fewer --ranking_sequences"
        )
    rest = there - ranked
    enough = rest >= wanted + options.tokens // options.length or (options.streaming and there == looked_at)
    held = wanted if enough else min(wanted, rest - 1, max(1, rest // LEAST_TRAINED))
    if options.streaming:
        return _Text(blocks.skip(ranked + held), None, first[:ranked], first[ranked : ranked + held], first)
    # Spread over the text, which may be of several kinds.
    apart = {ranked + place * rest // held for place in range(held)}
    train = [index for index in range(ranked, there) if index not in apart]
    return _Text(blocks.select(train), len(train), first[:ranked], [blocks[index]["input_ids"] for index in sorted(apart)], first)


# --- going on with other options --------------------------------------------------------------------------------


def _recorded(options: DistillOptions, args: DSLATrainingArguments, window_size: int) -> dict[str, Any]:
    """The options that decide what a run gives, as the user spells them."""
    own = {item.name: getattr(options, item.name) for item in dataclasses.fields(DistillOptions) if item.name not in NOT_RECORDED}
    own |= {"window_size": window_size, "adapter": options.adapter and str(Path(options.adapter).resolve())}
    own |= {"model": Path(options.model).name, "data": " ".join(map(_named_with_size, options.data))}  # folders may be moved
    of_stages = {name: getattr(args, name) for name in STAGE_SETTINGS}
    return {f"--{name}": value for name, value in (own | of_stages).items()} | {BATCH: sequences_per_step(args)}


def _named_with_size(source: str) -> str:
    path = Path(source)
    return f"{path.name} ({path.stat().st_size:,} bytes)" if path.is_file() else source


def _check_recorded(output: Path, recorded: dict[str, Any]) -> None:
    """Raises ValueError if `output` holds a run that was begun with other options, and there is something of it to go on from."""
    path = output / OPTIONS_FILE
    if not path.exists() or not progress_so_far(output):
        return
    begun = json.loads(path.read_text())
    changed = [f"{name} {begun[name]} (now {value})" for name, value in recorded.items() if name in begun and begun[name] != value]
    if changed:
        raise ValueError(f"{output} holds a run with {', '.join(changed)}: give the same options to go on, or another --output_dir")
