"""A whole distillation from options: what `dsla distill` and `examples/distill.py` run. The options are in `distill_options`."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from peft import get_peft_model
from torch import Tensor
from transformers import set_seed

from ..core.files import write_json
from ..core.interrupts import on_interrupt
from ..core.progress import is_first_process, quieten_libraries, say
from ..evaluation.level_check import check_levels, store_in_adapter
from ..models.configuration import DSLAConfig, unit_name
from ..models.loading import (
    check_convertible,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    read_adapter_config,
)
from ..training.arguments import DSLATrainingArguments
from ..training.checkpoints import progress_so_far, told_of_full_disk
from ..training.own_texts import tokens_left, write_own_texts
from ..training.planting import with_planted
from ..training.probes import NoRoom, check_fits_context, make_probes
from ..training.ranking import LayerRanking
from ..training.recipe import STAGE_SETTINGS, check_output, check_ranking, distill
from ..training.sharding import initial_weights
from ..training.text import holds_chats, token_blocks
from ..training.text_check import check_teaches
from ..training.trainer import highest_trained, trained_level
from ..training.unit_ranking import UnitRanking
from .distill_defaults import of_conversion, settle, share_planted, stage_steps
from .distill_options import DEFAULT_UNIT, DistillOptions
from .distill_plan import Plan, plan_text, sequences_per_step

# So many blocks are looked at for tokens that the model does not know, and are all that is known of a text that streams.
CHECKED_BLOCKS = 64
LEAST_TRAINED = 10  # times as many sequences are trained on as are measured on, where there is little text
OF_CONVERSION = ("window_size", "states")  # options of the same name in `DSLAConfig`
NAMED_LAST = 12  # of the heads of an order
OPTIONS_FILE, OWN_FILE = "distill.json", "self.jsonl"
OWN = "self"  # among --data: texts that the checkpoint writes itself
# Options that do not decide the result, or are checked by what is in the folder.
NOT_RECORDED = ("model", "data", "allow_untested")
RECORDED_BEFORE = {"--alignment_share": 0.5}  # what runs had that were begun before there was such an option
BATCH = "--per_device_train_batch_size times --gradient_accumulation_steps times processes"


def distill_job(options: DistillOptions, args: DSLATrainingArguments) -> LayerRanking | UnitRanking | None:
    """Read the text, load the checkpoint, say what will be done, distil, save, measure; the ranking of layers or heads if there was one.

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


def _distill_job(options: DistillOptions, args: DSLATrainingArguments, output: Path) -> LayerRanking | UnitRanking | None:
    config = new_config(options, output)
    base_config = load_config(options.model)
    check_convertible(options.model, base_config, config.allow_untested or config.checked_base is not None)
    options = settle(options, args, base_config)
    length = options.length or 0  # which is settled
    heads = config.conversion_unit == "head"
    metric = check_ranking(config.conversion_unit, options.method, options.ranking_metric, probes=False)
    tokenizer = load_tokenizer(options.model)
    # Before any text is read or written.
    shortest = torch.zeros(min(args.sequence_lengths or [length]), dtype=torch.long)
    check_teaches([shortest], config.window_size, config.sink_tokens, purpose="in sequences of --length")
    recorded = _recorded(options, args, config, metric)
    _check_recorded(output, recorded)
    given, base = [source for source in options.data if source != OWN], None
    if len(given) < len(options.data):
        path = output / OWN_FILE
        base = _own_texts(options, args, config, tokenizer, path)
        options = dataclasses.replace(options, data=[str(path) if source == OWN else source for source in options.data])
    with args.main_process_first(desc="tokenizing"):
        text = _read_text(options, tokenizer)
    check_teaches(text.train, config.window_size, config.sink_tokens)
    probes = _probes(options, tokenizer, text, base_config) if heads and text.ranking and metric != "random" else []
    planted = share_planted(options, holds_chats(given, split=options.split, column=options.column))
    train = with_planted(text.train, tokenizer, planted, args.seed, options.answer_weight)

    model = _new_model(options, config, args.seed, base)
    config = model.peft_config["default"]
    trained_level(model, args)
    config.level_metrics = None  # those of an adapter to go on from are not those of the one that is made
    known, highest = model.get_input_embeddings().num_embeddings, max(int(ids.max()) for ids in text.first)
    if highest >= known:
        raise ValueError(
            f"the tokenizer of {options.model} gives token {highest}, and the model knows tokens up to {known - 1}: "
            "the tokenizer belongs to another checkpoint"
        )
    before = initial_weights(model)

    alignment, logits = stage_steps(options, sequences_per_step(args) * length)
    check_output(model, output)
    apart = (len(text.ranking), len(text.held_out), [len(x["input_ids"][0]) for x in probes])
    what = Plan(options.model, length, text.sequences, alignment, logits, *apart, planted, method=options.method, dtype=options.dtype)
    plan = plan_text(what, model, args, output)
    if args.process_index == 0:
        print(plan, flush=True)
        write_json(output / OPTIONS_FILE, recorded)
    ranking = distill(
        model,
        train,
        args,
        alignment_steps=alignment,
        logits_steps=logits,
        method=options.method,
        ranking_metric=metric,
        ranking_data=[ids[: min(args.sequence_lengths or [length])] for ids in text.ranking] or None,
        ranking_probes=probes,
        probe_weight=options.probe_weight,
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
        print(f"adapter saved in {output}; level {level}; {_order_text(config)}; processes {args.world_size}")
    if args.world_size > 1:
        PartialState().destroy_process_group()  # a process that ends with gloo's threads running may abort
    return ranking


def new_config(options: DistillOptions, output: Path) -> DSLAConfig:
    """That of the adapter to make, or to go on from.

    Raises:
        ValueError: if options contradict it, or `output` is no folder to save into.
    """
    if output.is_file():
        raise ValueError(f"{output} is a file: give a folder to save into")
    if options.adapter is None:
        return DSLAConfig(
            **of_conversion(options),
            conversion_unit=options.unit or DEFAULT_UNIT[options.method],
            task_type="CAUSAL_LM",
            allow_untested=options.allow_untested,
        )
    config = read_adapter_config(options.adapter)
    if options.unit not in (None, config.conversion_unit):
        raise ValueError(f"{options.adapter} counts {config.conversion_unit}s: leave --unit {options.unit} out")
    for name in OF_CONVERSION:
        if (value := getattr(options, name)) not in (None, getattr(config, name)):
            raise ValueError(f"{options.adapter} has {name} {getattr(config, name)}: leave --{name} {value} out")
    if Path(options.adapter).resolve() == output.resolve():
        raise ValueError(f"--output_dir {output} is the adapter to go on from: give another folder")
    return config


def _new_model(options: DistillOptions, config: DSLAConfig, seed: int, base: Any = None) -> Any:
    """The checkpoint with the adapter to train, on the CPU. base: the checkpoint, where it is loaded already."""
    set_seed(seed)
    if options.adapter is None:
        return get_peft_model(load_model(options.model, options.dtype) if base is None else base, config)
    return load_adapter(options.model, options.adapter, options.dtype, trainable=True, base=base)


def _order_text(config: DSLAConfig) -> str:
    """The conversion order; of heads, which are many, those that are converted last."""
    order = config.conversion_order or []
    if config.conversion_unit == "layer":
        return f"conversion order {order}"
    return f"of {len(order)} KV heads (layer.head) converted last: {', '.join(map(unit_name, order[: -NAMED_LAST - 1 : -1]))}"


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


def _own_texts(options: DistillOptions, args: DSLATrainingArguments, config: DSLAConfig, tokenizer: Any, path: Path) -> Any:
    """Have the checkpoint write half as many tokens into `path` as a run reads; the first process writes what is not there yet.

    Returns:
        The checkpoint, without an adapter; None if there was nothing to write.

    Raises:
        ValueError: before anything is written, if the folder holds something else than this run.
    """
    length = options.length or 0
    tokens = options.tokens // 2 + (options.ranking_sequences + options.eval_sequences) * length
    settings = {"length": length, "seed": args.seed, "name": options.model}
    if not tokens_left(path, tokens, tokenizer, args.device.type, **settings):
        return None
    model = _new_model(options, copy.deepcopy(config), args.seed)
    check_output(model, path.parent)
    base = model.unload()  # which any decoder takes, however it is quantised
    with args.main_process_first(desc="writing texts"):
        if args.process_index == 0:
            write_own_texts(base.to(args.device), tokenizer, path, tokens, **settings)
            base.to("cpu")
    return base


def _read_text(options: DistillOptions, tokenizer: Any) -> _Text:
    """The text in blocks: the first to rank on, some to measure on, and the others to train on.

    Raises:
        ValueError: if none is left to train on.
    """
    ranked, wanted, length = options.ranking_sequences, options.eval_sequences, options.length or 0
    blocks = token_blocks(
        options.data,
        tokenizer,
        length,
        max_tokens=options.tokens + (ranked + wanted) * length,
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
            f"the text gives {there} sequences of {length} tokens, and {ranked} are for the ranking, so none is left "
            "to train on: give more text, a smaller --length or fewer --ranking_sequences"
        )
    rest = there - ranked
    enough = rest >= wanted + options.tokens // length or (options.streaming and there == looked_at)
    held = wanted if enough else min(wanted, rest - 1, max(1, rest // LEAST_TRAINED))
    if options.streaming:
        return _Text(blocks.skip(ranked + held), None, first[:ranked], first[ranked : ranked + held], first)
    # Spread over the text, which may be of several kinds.
    apart = {ranked + place * rest // held for place in range(held)}
    train = [index for index in range(ranked, there) if index not in apart]
    return _Text(blocks.select(train), len(train), first[:ranked], [blocks[index]["input_ids"] for index in sorted(apart)], first)


def _probes(options: DistillOptions, tokenizer: Any, text: _Text, base_config: Any) -> list[dict[str, Tensor]]:
    """Questions to rank heads on, in text that is not measured on: that which is kept apart for the ranking, and if they are longer than it
    the beginning of what is trained on. None where sequences are too short for them, and nothing says how long they shall be.

    Raises:
        ValueError: if they are longer than the model's context, or than all of that text.
    """
    longest = options.probe_length or options.length or 0
    check_fits_context(options.model, base_config, longest)
    ids = [token for row in text.ranking for token in row.tolist()]
    rows = iter(text.train)
    while len(ids) < longest and (row := next(rows, None)) is not None:
        ids += row["input_ids"].tolist()
    try:
        return make_probes(tokenizer, ids, longest, options.ranking_probes)
    except NoRoom:
        if options.probe_length is not None:
            raise
        say(f"sequences of {longest} tokens have no room for questions: heads are ranked on text alone; --probe_length takes longer ones")
        return []


# --- going on with other options --------------------------------------------------------------------------------


def _recorded(options: DistillOptions, args: DSLATrainingArguments, config: DSLAConfig, metric: str) -> dict[str, Any]:
    """The options that decide what a run gives, as the user spells them."""
    own = {item.name: getattr(options, item.name) for item in dataclasses.fields(DistillOptions) if item.name not in NOT_RECORDED}
    own |= {name: getattr(config, name) for name in OF_CONVERSION} | {"unit": config.conversion_unit, "ranking_metric": metric}
    own |= {"adapter": options.adapter and str(Path(options.adapter).resolve())}
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
    begun = RECORDED_BEFORE | json.loads(path.read_text())
    changed = [
        f"{name} {begun[name]} (now {'not given' if value is None else value})"
        for name, value in recorded.items()
        if name in begun and begun[name] != value
    ]
    if changed:
        raise ValueError(f"{output} holds a run with {', '.join(changed)}: give the same options to go on, or another --output_dir")
