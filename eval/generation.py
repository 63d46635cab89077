"""What a raise in mid-text costs: quality of texts whose level rises on the way, time of a raise, and memory that it frees.

    python eval/generation.py --teacher ../shared/teacher --adapter ADAPTER --data ../shared/data

writes eval/results/generation.json. The quality part needs a distilled adapter (eval/distillation.py keeps them under --output);
the cost part uses layers of the shapes of 7B models with random weights, and needs a GPU.
"""

from __future__ import annotations

import argparse
import gc
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from measures import held_out_blocks, raised_losses
from peft import PeftModel
from planting import make_needles
from reporting import rows_table, write_results
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from dsla_hf import DualStateAttention, cache_bytes, set_level
from dsla_hf.core.fold import dsla_cache_layer
from dsla_hf.core.layout import TokenLayout
from dsla_hf.evaluation.long_context import Prompt, is_answer
from dsla_hf.training.text import read_texts

# Levels, and the share of the text until which they hold.
WAYS = {"never raised": ((0, 1.0),), "level 8 from the start": ((8, 1.0),), "raised 0, 4, 8": ((0, 1 / 3), (4, 2 / 3), (8, 1.0))}
SHAPES = {"llama2-7b": (32, 32, 128), "llama3-8b": (32, 8, 128)}  # query heads, KV heads, head size
LENGTHS = (4096, 32768)
REPEATS = 20


def plan_for(way: str, tokens: int) -> tuple[tuple[int, int], ...]:
    return tuple((level, round(share * tokens)) for level, share in WAYS[way])


@torch.no_grad()
def needles_found(model: Any, tokenizer: Any, needles: list[Prompt], way: str, batch_size: int = 50) -> float:
    """Share of needles whose number `generate` gives, after a prompt that was read while the level rose."""
    right = 0
    for first in tqdm(range(0, len(needles), batch_size), desc=way):
        batch = needles[first : first + batch_size]
        ids = torch.tensor([needle.input_ids for needle in batch], device=model.device)
        cache, begin = DynamicCache(config=model.config), 0
        for level, end in plan_for(way, ids.shape[1] - 1):
            set_level(model, level)
            model(input_ids=ids[:, begin:end], past_key_values=cache, logits_to_keep=1)
            begin = end
        new = max(needle.new_tokens for needle in batch)
        options = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0}
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **options)[:, ids.shape[1] :]
        right += sum(is_answer(tokenizer, needle, row) for row, needle in zip(out.tolist(), batch, strict=True))
    return right / len(needles)


def quality(teacher: str, adapter: str, data: Path) -> list[dict[str, Any]]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    base = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.bfloat16).to(device)
    model = PeftModel.from_pretrained(base, adapter).eval()
    ends = [text[-400_000:] for text in read_texts(data / "novels_val.jsonl.xz")][:2]
    haystack = [token for text in ends for token in tokenizer(text, verbose=False)["input_ids"]]
    rows = []
    for way in WAYS:
        row: dict[str, Any] = {"what": "quality", "way": way}
        for kind, count in (("novels", 48), ("code", 24)):
            blocks, _ = held_out_blocks(data / f"{kind}_val.jsonl.xz", tokenizer, 4096, count)
            losses = raised_losses(model, blocks, plan_for(way, 4096), set_level)
            row[kind] = math.exp(losses.mean())
            row[f"{kind}_last_third"] = math.exp(losses[:, 2731:].mean())
        for length in (1984, 3900):
            row[f"needle_{length}"] = needles_found(model, tokenizer, make_needles(tokenizer, haystack, length, 200, seed=0), way)
        rows.append(row)
    return rows


@torch.no_grad()
def cost(shape: str, tokens: int, batch: int = 1) -> dict[str, Any]:
    """Time to turn one layer's cache into states, and bytes of GPU memory before and after."""
    heads, kv_heads, size = SHAPES[shape]
    attention = DualStateAttention(heads, kv_heads, size).to("cuda", torch.bfloat16)
    times = []
    for _ in range(REPEATS + 3):
        cache = DynamicCache()
        cache.update(*(torch.randn(batch, kv_heads, tokens, size, device="cuda", dtype=torch.bfloat16) for _ in range(2)), 0)
        before_reckoned = cache_bytes(cache)
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        dsla_cache_layer(cache, 0, attention, TokenLayout())
        end.record()
        torch.cuda.synchronize()
        gc.collect()
        after = torch.cuda.memory_allocated()
        times.append(start.elapsed_time(end))
    return {
        "what": "cost of one layer",
        "shape": shape,
        "tokens": tokens,
        "milliseconds": statistics.median(times[3:]),
        "bytes_freed": before - after,
        "bytes_freed_reckoned": before_reckoned - cache_bytes(cache),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="the original checkpoint")
    parser.add_argument("--adapter", required=True, help="a distilled adapter for it")
    parser.add_argument("--data", type=Path, required=True, help="folder with the held-out texts")
    args = parser.parse_args()
    rows = quality(args.teacher, args.adapter, args.data)
    if torch.cuda.is_available():
        rows += [cost(shape, tokens) for shape in SHAPES for tokens in LENGTHS]
    write_results("generation", rows, "python eval/generation.py --teacher teacher --adapter adapter --data data")
    costs = [row for row in rows if row["what"] != "quality"]
    print(rows_table(rows[: len(WAYS)], list(rows[0])))
    print(rows_table(costs, ["shape", "tokens", "milliseconds", "bytes_freed", "bytes_freed_reckoned"]))


if __name__ == "__main__":
    main()
