"""Distil a DSLA adapter for your checkpoint: alignment, ranking of the KV heads, KL at random levels.

    accelerate launch examples/distill.py --model Qwen/Qwen3-0.6B --data my_text.txt --output_dir my-adapter
    accelerate launch examples/distill.py --config examples/configs/distill.yaml --learning_rate 1e-3

The same as `dsla distill`, as a file that `accelerate launch` and `torchrun` can start on several devices; `--help` lists the
options. Any option of transformers' TrainingArguments may follow (`--bf16`, `--save_steps`, ...). An interrupted run goes on
when the same command is given again.
"""

import sys

from dsla_cli import main

if __name__ == "__main__":
    sys.exit(main(["distill", *sys.argv[1:]]))
