"""The main job in a few minutes on a CPU: train a small Llama on text that comes with Python, convert and distil it, save
and load it, raise the level in mid-text, and show what each level costs and saves."""

from __future__ import annotations

import pydoc_data.topics
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from ..core.plots import figure, mark_measured, mark_plain, save
from ..core.progress import TrainingProgress, on_terminal
from ..core.results import write_results
from ..evaluation.levels import add_cache_sizes, evaluate_levels
from ..evaluation.report.heads import draw_heads
from ..levels.table import COLUMNS, table
from ..models.configuration import DSLAConfig
from ..training.arguments import DSLATrainingArguments
from ..training.probes import make_probes
from ..training.recipe import distill
from ..training.text import PackedTokens

LAYERS, KV_HEADS, LENGTH, WINDOW = 6, 2, 256, 32
PROBES = 12
NAMES = {"layer": "layer", "head": "KV head"}
PROMPT = "The following example shows how a function"


def run(output: str | Path = "quickstart-output", steps: int = 400, seed: int = 0, unit: str = "head") -> list[dict[str, Any]]:
    """Run the quickstart and return the rows of its table; `steps` optimizer steps for the teacher, half for each stage. `unit`: what
    levels count, layers or KV heads ("head").

    In `output` lie then `adapter`, `hybrid`, `teacher`, the plot `quickstart.png`, and the rows as `quickstart.json`; of heads also
    `heads.png`, which of them the adapter keeps.

    Raises:
        ImportError: if matplotlib, which draws the plot, is missing.
        ValueError: if `output` exists and holds something else than an earlier quickstart.
    """
    import matplotlib  # noqa: F401  # before the work, not after it

    output = Path(output)
    if output.exists() and any(output.iterdir()) and not (output / "teacher").is_dir():
        raise ValueError(f"{output} exists and was not made by the quickstart: give another folder with --output")
    for part in ("adapter", "hybrid", "distillation"):  # of an earlier quickstart, perhaps with other options
        shutil.rmtree(output / part, ignore_errors=True)
    torch.manual_seed(seed)
    start = time.perf_counter()

    print(f"1/5  Training a {LAYERS}-layer Llama on the help texts of this Python")
    texts = [text for _, text in sorted(pydoc_data.topics.topics.items())]
    tokenizer = train_tokenizer(texts)
    blocks = PackedTokens.from_texts(texts, tokenizer, LENGTH, progress=False).blocks
    blocks = blocks[torch.randperm(len(blocks))]
    held_out, train = blocks[:16], PackedTokens(blocks[16:])
    teacher = train_teacher(train, tokenizer, output, steps, seed)

    print(f"2/5  Converting it: DSLA weights for every {NAMES[unit]}, distilled from the model itself")
    order: list[Any] = list(range(LAYERS))
    if unit == "head":
        order = [(layer, head) for layer in order for head in range(KV_HEADS)]
    plan = DSLAConfig(conversion_unit=unit, conversion_order=order, window_size=WINDOW, task_type="CAUSAL_LM")
    model = get_peft_model(teacher, plan)
    arguments = DSLATrainingArguments(**common_arguments(output / "distillation", seed), learning_rate=2e-3, level_draws=2)
    ranking: dict[str, Any] = {"ranking_data": list(train.blocks[:8].split(4))}
    if unit == "head":
        text = train.blocks[:8].flatten().tolist()
        ranking["ranking_probes"] = make_probes(tokenizer, text, LENGTH, PROBES, shortest=3 * LENGTH // 4)
    distill(model, train, arguments, alignment_steps=steps // 2, logits_steps=steps // 2, **ranking)

    print("3/5  Measuring every level on text it has not seen")
    units = len(order)
    rows: list[dict[str, Any]] = evaluate_levels(model, list(held_out.split(8)), range(units + 1))
    add_cache_sizes(model, rows)
    config = model.peft_config["default"]
    stored = ("perplexity", "kl") if unit == "layer" else COLUMNS
    config.level_metrics = {str(row["level"]): {name: row[name] for name in stored if name in row} for row in rows}

    print("4/5  Saving adapter and hybrid, and loading both again")
    level = units // 2 if unit == "layer" else units - units // 4  # of heads it keeps a quarter
    model.set_level(level)
    model.save_pretrained(output / "adapter")
    tokenizer.save_pretrained(output / "hybrid")
    model.merge_and_unload().save_pretrained(output / "hybrid")
    hybrid = AutoModelForCausalLM.from_pretrained(output / "hybrid")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(output / "teacher"), str(output / "adapter"))
    ids = held_out[:1].long()
    difference = (hybrid(ids).logits - model.eval()(ids).logits).abs().max().item()
    print(f"     {type(hybrid).__name__} and the adapter at level {level} differ by {difference:.1e} in their logits")

    print("5/5  Generating, with the level raised in mid-text")
    show_raise(model, AutoTokenizer.from_pretrained(output / "hybrid"), units)

    plot(rows, output / "quickstart.png", f"level ({NAMES[unit]}s converted of {units})")
    pictures = f"Plot: {output / 'quickstart.png'}"
    if unit == "head":
        save(draw_heads(config), output / "heads.png", dpi=120)
        pictures += f"   Heads: {output / 'heads.png'}"
    more = "" if unit == "head" else f" --unit {unit}"
    write_results(output / "quickstart.json", rows, f"dsla quickstart --steps {steps} --seed {seed}{more}")
    print(f"\n{table(rows)}\n")
    print(f"{pictures}   Adapter: {output / 'adapter'}   Hybrid: {output / 'hybrid'}")
    print(f"Done in {time.perf_counter() - start:.0f} s.")
    return rows


def train_tokenizer(texts: list[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def common_arguments(output: Path, seed: int) -> dict[str, Any]:
    """Training arguments that the teacher and both stages share."""
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": 8,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "seed": seed,
        "disable_tqdm": not on_terminal(),
        "use_cpu": True,
    }


def train_teacher(data: PackedTokens, tokenizer: PreTrainedTokenizerFast, output: Path, steps: int, seed: int) -> LlamaForCausalLM:
    """A small Llama, trained from scratch and saved in `output/teacher`, with its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=32,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # Without warm-up this learning rate leaves the teacher at a perplexity of 97 where it reaches 77.
    schedule: dict[str, Any] = {"learning_rate": 3e-3, "lr_scheduler_type": "cosine", "warmup_steps": min(20, steps // 5)}
    arguments = TrainingArguments(**common_arguments(output / "teacher-training", seed), max_steps=steps, **schedule)

    progress = TrainingProgress("training", disable_bar=bool(arguments.disable_tqdm))

    def with_labels(items: list[dict[str, Any]]) -> dict[str, Any]:
        ids = torch.stack([item["input_ids"] for item in items])
        progress.tokens += ids.numel()
        return {"input_ids": ids, "labels": ids}

    trainer = Trainer(model, arguments, train_dataset=data, data_collator=with_labels, callbacks=[progress])
    for callback in (PrinterCallback, DEFAULT_PROGRESS_CALLBACK):  # which would print the last log as a dict
        trainer.remove_callback(callback)
    trainer.train()
    model.save_pretrained(output / "teacher")
    tokenizer.save_pretrained(output / "teacher")
    return LlamaForCausalLM.from_pretrained(output / "teacher")


def show_raise(model: Any, tokenizer: Any, highest: int, tokens: int = 48) -> None:
    """Print a text whose first half is generated at level 0, the second at the highest level, on the same cache."""
    inputs = tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    options = {"do_sample": False, "max_new_tokens": tokens, "return_dict_in_generate": True, "repetition_penalty": 1.3}
    model.set_level(0)
    first = model.generate(**inputs, **options)
    model.set_level(highest)
    second = model.generate(input_ids=first.sequences, past_key_values=first.past_key_values, **options)
    cut = first.sequences.shape[1]
    texts = [tokenizer.decode(ids) for ids in (first.sequences[0], second.sequences[0, cut:])]
    for name, text in zip(("level 0", f"level {highest}"), texts, strict=True):
        print(f"     [{name}] {' '.join(text.split())}")


def plot(rows: list[dict[str, Any]], path: Path, level: str) -> None:
    """Perplexity and cache size against the level."""
    drawn, (quality, memory) = figure(1, 2, size=(9, 3.6))
    levels = [row["level"] for row in rows]
    perplexities = [row["perplexity"] for row in rows]
    quality.plot(levels, perplexities, marker="o")
    quality.set(xlabel=level, ylabel="perplexity of unseen text", ylim=(0, 1.15 * max(perplexities)))
    for name in (name for name in rows[0] if name.startswith("bytes_")):
        label = f"{name.removeprefix('bytes_')} tokens"
        memory.semilogy(levels, [row[name] / 1024 for row in rows], marker="o", label=label)
    memory.set(xlabel=level, ylabel="cache per sequence, KiB")
    memory.legend()
    for axes in (quality, memory):
        mark_measured(axes.xaxis, levels)
        mark_plain(axes.yaxis)
    save(drawn, path, dpi=120)
