"""Distil a DSLA adapter for your checkpoint: alignment, ranking of the layers, KL at random levels.

    accelerate launch examples/distill.py --model Qwen/Qwen3-0.6B --data my_text.txt --output_dir my-adapter

Any option of transformers' TrainingArguments may follow (`--bf16`, `--learning_rate`, `--save_steps`, ...). An interrupted run
goes on when the same command is given again.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

from dsla_hf import DSLAConfig
from dsla_hf.data import PackedTokens, read_texts
from dsla_hf.distillation import DSLATrainingArguments, distill


@dataclass
class DistillArguments:
    """What is converted, on which text, for how long."""

    model: str = field(metadata={"help": "Checkpoint to convert: a hub name or a folder."})
    data: str = field(metadata={"help": "Text file: .txt (documents separated by NUL) or .jsonl with a field 'text'; also .xz."})
    length: int = field(default=2048, metadata={"help": "Tokens per training sequence."})
    tokens: int = field(default=12_000_000, metadata={"help": "Training tokens, half for each stage."})
    ranking_sequences: int = field(default=16, metadata={"help": "Sequences kept apart to rank the layers; 0: convert in order of number."})
    window_size: int = field(default=64, metadata={"help": "Block size of the softmax window; 0: none (the paper's layer)."})
    dtype: str = field(default="bfloat16", metadata={"help": "Dtype of the frozen base; trained weights are fp32."})


def main() -> None:
    options, args = HfArgumentParser((DistillArguments, DSLATrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    model = get_peft_model(base, DSLAConfig(window_size=options.window_size, task_type="CAUSAL_LM"))

    budget = options.tokens + options.ranking_sequences * options.length
    with args.main_process_first(desc="tokenizing"):
        blocks = PackedTokens.from_texts(read_texts(options.data), tokenizer, options.length, max_tokens=budget).blocks
    ranking, train = blocks[: options.ranking_sequences], PackedTokens(blocks[options.ranking_sequences :])
    per_step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * options.length
    steps = max(1, options.tokens // 2 // per_step)

    distill(
        model,
        train,
        args,
        alignment_steps=steps,
        logits_steps=steps,
        ranking_data=list(ranking.to(args.device).split(1)) if len(ranking) else None,
        processing_class=tokenizer,
    )
    if args.process_index == 0:
        print(f"adapter saved in {args.output_dir}; conversion order {model.peft_config['default'].conversion_order}")


if __name__ == "__main__":
    main()
