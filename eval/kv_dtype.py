"""What keys and values in fp8 cost: the server's engine with and without `kv_cache_dtype="fp8"`, on texts and on numbers hidden in them.

    python eval/kv_dtype.py CHECKPOINT valid.txt novels_val.jsonl.xz code_val.jsonl.xz
    python eval/kv_dtype.py CHECKPOINT valid.txt --adapter ADAPTER --levels kept:50%,kept:10%
    python eval/kv_dtype.py --page

Of each text the first blocks of `--length` tokens are read as prompts whose log-probabilities are asked for, in chunks, as a server reads
them; numbers (`needle` of dsla_hf.evaluation) are answered greedily. Rows go to eval/results/kv-dtype.json: perplexity, numbers found, and
the largest keys and values, for e4m3 ends at 448. Those of other checkpoints, adapters and dtypes that are there stay. `--page` measures
nothing: it writes the table of docs/serve.md from that file.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from reporting import RESULTS, fill_page, rows_table, write_results
from tqdm import tqdm

from dsla_hf.evaluation.long_context import Prompt, is_answer, prepare, read_haystack
from dsla_hf.models.configuration import resolve_level
from dsla_hf.models.loading import device, load_adapter, load_config, load_model, load_tokenizer, read_adapter_config
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.engine.kv_dtype import KV_CACHE_DTYPES
from dsla_hf.serving.engine.request import Event, Sampling

NAME = "kv-dtype"
PAGE = Path(__file__).parents[1] / "docs" / "serve.md"
KEY = ("model", "adapter", "level", "dtype", "kv_cache_dtype", "what", "length")


def events_of(engine: Engine, prompt: list[int], tokens: int, sampling: Sampling | None = None) -> list[Event]:
    """What a request alone is told.

    Raises:
        RuntimeError: if it fails.
    """
    events: list[Event] = []
    engine.submit(prompt, tokens, events.append, sampling)
    while engine.busy:
        engine.step()
    if events[-1].error is not None:
        raise RuntimeError("a text could not be read") from events[-1].error
    return events


def perplexity(engine: Engine, blocks: list[list[int]], bar: Any) -> dict[str, Any]:
    """Of all tokens of blocks but the first of each; and the largest keys and values."""
    losses: list[float] = []
    largest = [0.0, 0.0]
    pool = engine.memory.pool
    for block in blocks:
        pool.keys.zero_()
        pool.values.zero_()
        scored = events_of(engine, block, 1, Sampling(prompt_logprobs=0))[0].prompt_logprobs or ()
        losses += [-one.logprob for one in scored]
        largest = [max(before, float(x.float().abs().max())) for before, x in zip(largest, (pool.keys, pool.values), strict=True)]
        bar.update()
    return {
        "tokens": len(losses),
        "perplexity": math.exp(sum(losses) / len(losses)),
        "largest_key": largest[0],
        "largest_value": largest[1],
    }


def found(engine: Engine, tokenizer: Any, prompts: list[Prompt], bar: Any) -> dict[str, Any]:
    """How many numbers are found."""
    right = 0
    for prompt in prompts:
        tokens = [event.token for event in events_of(engine, prompt.input_ids, prompt.new_tokens) if event.token is not None]
        right += is_answer(tokenizer, prompt, tokens)
        bar.update()
    return {"found": right, "asked": len(prompts)}


def table(rows: list[dict[str, Any]]) -> str:
    """A line for each text and length of a model: what it gives with keys and values in its own dtype, and in fp8."""
    lines: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        numbers = "found" in row
        line = lines.setdefault(
            tuple(row[name] for name in KEY if name != "kv_cache_dtype"),
            {
                "model": ", ".join(str(row[name]) for name in ("model", "adapter", "dtype") if row[name]),
                "level": row["level"],
                "what": f"numbers found, of {row['asked']}" if numbers else f"perplexity of {row['what']}, {row['tokens']:,} tokens",
                "length": row["length"],
            },
        )
        line[row["kv_cache_dtype"]] = row["found" if numbers else "perplexity"]
        if row["kv_cache_dtype"] == "auto" and not numbers:
            line["largest key, value"] = f"{row['largest_key']:.3g}, {row['largest_value']:.3g}"
    return rows_table(list(lines.values()), ["model", "level", "what", "length", *KV_CACHE_DTYPES, "largest key, value"])


def stored(folder: Path) -> list[dict[str, Any]]:
    path = folder / f"{NAME}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    def listed(kind: Any) -> Any:
        return lambda text: [kind(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", help="a checkpoint")
    parser.add_argument("texts", nargs="*", help=".txt or .jsonl, also .xz; in the first of them numbers are hidden")
    parser.add_argument("--adapter", help="of that checkpoint")
    parser.add_argument("--levels", type=listed(str), default=["0"], help="such as 0,kept:50%%")
    parser.add_argument("--dtypes", type=listed(str), default=["float32"], help="of the weights, such as float32,bfloat16")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a block")
    parser.add_argument("--blocks", type=int, default=4, help="of each text")
    parser.add_argument("--numbers", type=int, default=20, help="hidden numbers for each of --number-lengths; 0: none")
    parser.add_argument("--number-lengths", type=listed(int), default=[512, 2048], help="tokens of their prompts")
    parser.add_argument("--chunk", type=int, default=1024, help="tokens that are read at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="measure nothing, and write the table of docs/serve.md")
    options = parser.parse_args(arguments)
    if options.page != (not options.texts):
        parser.error("give a checkpoint and texts, or --page alone")
    if options.levels != ["0"] and options.adapter is None:
        parser.error(f"--levels {','.join(options.levels)} are of an adapter: give --adapter, or leave them out")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.page:
        fill_page(PAGE, {NAME: table(stored(options.results))})
        return
    tokenizer, config = load_tokenizer(options.model), load_config(options.model)
    haystacks = {Path(text).name: read_haystack(tokenizer, text) for text in options.texts}
    blocks = {
        name: prepare(tokenizer, ["position_perplexity"], [options.length], options.blocks, haystack=haystack)[0].data.tolist()
        for name, haystack in haystacks.items()
    }
    hidden, lengths = next(iter(haystacks.values())), options.number_lengths if options.numbers else []
    numbers = {length: prepare(tokenizer, ["needle"], [length], options.numbers, haystack=hidden)[0].data for length in lengths}
    levels = [0] * len(options.levels)
    if options.adapter is not None:
        plan = read_adapter_config(options.adapter)
        levels = [resolve_level(level, plan, config.num_hidden_layers) for level in options.levels]
    named = {"model": Path(options.model).name, "adapter": None if options.adapter is None else Path(options.adapter).name}
    rows: list[dict[str, Any]] = []
    runs = len(options.dtypes) * len(levels) * len(KV_CACHE_DTYPES)
    with tqdm(total=runs * (sum(map(len, blocks.values())) + sum(map(len, numbers.values()))), unit="text", disable=None) as bar:
        for dtype in options.dtypes:
            for level in levels:
                model = load_model(options.model, dtype)
                if options.adapter is not None:
                    model = load_adapter(options.model, options.adapter, dtype, base=model)
                model = model.to(device()).eval()
                for kept in KV_CACHE_DTYPES:
                    longest = max(options.length, *options.number_lengths) + 64
                    sizes = {"slots": 1, "chunk": options.chunk, "max_tokens": longest, "prefix_reuse": False, "kv_cache_dtype": kept}
                    engine = Engine(model, level, EngineOptions(**sizes), eos_tokens=set())
                    key = {**named, "level": level, "dtype": dtype, "kv_cache_dtype": kept}
                    key |= {"bytes_per_token": engine.bytes_per_token(level)}
                    for name, texts in blocks.items():
                        rows.append({**key, "what": name, "length": options.length, **perplexity(engine, texts, bar)})
                    for length, prompts in numbers.items():
                        rows.append({**key, "what": "numbers", "length": length, **found(engine, tokenizer, prompts, bar)})
    new = {tuple(row[name] for name in KEY) for row in rows}
    kept_rows = [row for row in stored(options.results) if tuple(row[name] for name in KEY) not in new]
    write_results(NAME, kept_rows + rows, folder=options.results)
    for row in rows:
        figure = f"perplexity {row['perplexity']:.4f}" if "perplexity" in row else f"{row['found']} of {row['asked']} found"
        print(f"level {row['level']}, {row['dtype']}, {row['kv_cache_dtype']}: {row['what']} at {row['length']}: {figure}")


if __name__ == "__main__":
    main()
