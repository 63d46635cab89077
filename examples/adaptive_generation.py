"""Stream a text while its level rises: prints the text, says at each change what level, cache and speed are, and ends with a plot.

dsla quickstart                                   (makes the small model that is used without arguments)
python examples/adaptive_generation.py
python examples/adaptive_generation.py --model BASE --adapter ADAPTER --prompt-file long.txt --policy text-length
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import pairwise
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, TextStreamer

from dsla_hf import LevelProcessor, Stats, cache_bytes
from dsla_hf.core.plots import figure, mark_plain, save


class Recorder(TextStreamer):
    """Prints the text as it comes, and notes time, level and cache bytes of every token."""

    def __init__(self, tokenizer, processor: LevelProcessor, cache: DynamicCache):
        super().__init__(tokenizer, skip_prompt=True)
        self.processor, self.cache = processor, cache
        self.rows: list[tuple[int, int, int, float]] = []  # tokens, level, bytes, seconds

    def put(self, value: torch.Tensor) -> None:
        super().put(value)
        tokens, level = self.cache.get_seq_length(), self.processor.model.get_level()
        if tokens and self.rows and self.rows[-1][1] != level:
            print(f"\n    [level {level} from token {tokens}, cache {cache_bytes(self.cache) / 2**10:,.0f} KiB]", file=sys.stderr)
        if tokens:
            self.rows.append((tokens, level, cache_bytes(self.cache), time.perf_counter()))


def rising(levels: int, start: int, end: int):
    """A policy for short demonstrations: from no layer to all of them between two lengths."""

    def policy(stats: Stats) -> int:
        return max(0, min(levels, round(levels * (stats.tokens - start) / (end - start))))

    return policy


def plot(rows: list[tuple[int, int, int, float]], path: Path) -> None:
    from matplotlib.ticker import MaxNLocator

    tokens = [row[0] for row in rows]
    rates = [1 / (b[3] - a[3]) for a, b in pairwise(rows)]
    columns = {
        "level": [row[1] for row in rows],
        "cache, KiB": [row[2] / 2**10 for row in rows],
        "tokens per second": [rates[0], *rates],
    }
    drawn, axes = figure(3, 1, size=(8, 7), sharex=True)
    for axis, (label, values) in zip(axes, columns.items(), strict=True):
        axis.plot(tokens, values)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        mark_plain(axis.yaxis)
        axis.grid(alpha=0.3)
    axes[0].yaxis.set_major_locator(MaxNLocator(integer=True))  # half a layer is none
    axes[-1].set_xlabel("tokens, prompt included")
    save(drawn, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="quickstart-output/teacher", help="original checkpoint (default: %(default)s)")
    parser.add_argument("--adapter", default="quickstart-output/adapter", help="DSLA adapter (default: %(default)s)")
    parser.add_argument("--tokenizer", help="default: that of the model")
    parser.add_argument("--prompt", default="The following example shows how a function")
    parser.add_argument("--prompt-file", type=Path, help="read the prompt from this file")
    parser.add_argument(
        "--policy", help="prompt-length, text-length, or a level. Default: from none to all layers while the text is written"
    )
    parser.add_argument("--max-new-tokens", type=int, default=240)
    parser.add_argument("--plot", type=Path, default=Path("adaptive_generation.png"), help="where to draw (default: %(default)s)")
    args = parser.parse_args()

    for folder in (args.model, args.adapter):
        if folder.startswith("quickstart-output") and not Path(folder).is_dir():
            sys.exit(f"there is no {folder} here: run `dsla quickstart` in this folder first, or give --model and --adapter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.model), args.adapter).to(device).eval()
    prompt = args.prompt_file.read_text(encoding="utf-8") if args.prompt_file else args.prompt
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(device)
    start = inputs["input_ids"].shape[1]
    levels = model.base_model.level_sizes()["max_level"]
    policy = args.policy or rising(levels, start + args.max_new_tokens // 8, start + args.max_new_tokens * 7 // 8)

    processor, cache = LevelProcessor(model, policy), DynamicCache(config=model.config)
    recorder = Recorder(tokenizer, processor, cache)
    model.generate(
        **inputs,
        past_key_values=cache,
        streamer=recorder,
        level_policy=processor,
        max_new_tokens=args.max_new_tokens,
        do_sample=True,
        top_p=0.9,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    print(f"\nlevels (from token, level): {processor.history}", file=sys.stderr)
    plot(recorder.rows, args.plot)
    print(f"plot: {args.plot}", file=sys.stderr)


if __name__ == "__main__":
    main()
