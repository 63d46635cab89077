"""How many guesses of one's own high level the lower one accepts, by KV heads (or layers) kept, kind of text and temperature.

    python eval/drafting.py measure MODEL DATA --adapter ADAPTER --name smollm2 --out smollm2.json
    python eval/drafting.py measure MODEL DATA --name teacher --out teacher.json     # without an adapter: an untrained conversion
    python eval/drafting.py time --shape llama2-7b --prompt-tokens 8192 32768 --out time.json  # a GPU: acceptance is imposed
    python eval/drafting.py page smollm2.json teacher.json time.json     # eval/results/drafting.json, docs/measured/drafting.md

Prompts are held-out novels and code, and chats that ask about a held-out document where the tokenizer has a chat template; each is read
once. An interrupted measurement goes on behind its last row. What is counted does not hang on the machine, so a CPU does. `time` fills a
shape with random weights and accepts guesses by chance, as often as it is told: tokens a second of one text with drafts and, right behind
them, without.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from measures import held_out_blocks
from peft import get_peft_model
from reporting import RESULTS, rows_table, write_results
from transformers import DynamicCache

from dsla_hf import DSLAConfig
from dsla_hf.core.files import write_json, write_whole
from dsla_hf.core.progress import bar
from dsla_hf.core.results import origin
from dsla_hf.inference import graph
from dsla_hf.inference.bench.models import PRESETS, collect, preset_config, random_model, ready
from dsla_hf.inference.recorder import PlainRecording
from dsla_hf.levels.draft_length import DraftLength
from dsla_hf.models.adapter import active_config
from dsla_hf.models.loading import device, load_adapter, load_config, load_model, load_tokenizer
from dsla_hf.training.unit_ranking import rank_units

PAGE = Path(__file__).parent.parent / "docs" / "measured" / "drafting.md"
KEPT = (0.5, 0.25, 0.1, 0.03, 0.0)  # shares of the model's units
TEMPERATURES = (0.0, 0.7)
WINDOW = 512  # of an untrained conversion
ARM = ("share", "draft_tokens", "acceptance")  # what tells rows of times of one length apart
ROUNDS_EACH = 3  # of each length of drafts before times count: one as it is, one recorded, one replayed
QUESTION = "Read this text:\n\n{text}\n\nIn a few sentences, what is it about?"
HEAD = """# Drafting, measured

Made by `python eval/drafting.py`, whose result is `eval/results/drafting.json`. What drafting is, and how it is asked for:
[generate](../generate.md#draft-with-ones-own-level).

Level 0 checks, a level above it drafts {draft_tokens} tokens at a time. Acceptance: of the guesses that were compared (up to the first
wrong one of a round) the share that stayed. Tokens a check: what one forward of the checking level adds to the text. Prompts of
{prompt_tokens} tokens, {new_tokens} new ones each, {prompts} prompts of a kind; {dtype}. These are counts on few texts, and no times:
small differences between cells say nothing.

"""


def prompts_of(kind: str, tokenizer: Any, data: Path, tokens: int, count: int) -> list[torch.Tensor]:
    """Prompts `[1, T]` of a kind; none where the tokenizer cannot make them."""
    if kind == "chat":
        if tokenizer.chat_template is None:
            return []
        texts, _ = held_out_blocks(data / "novels_val.jsonl.xz", tokenizer, tokens - 64, count)
        chats = [[{"role": "user", "content": QUESTION.format(text=tokenizer.decode(text))}] for text in texts]
        options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
        return [tokenizer.apply_chat_template(chat, **options)["input_ids"] for chat in chats]
    blocks, _ = held_out_blocks(data / f"{kind}_val.jsonl.xz", tokenizer, tokens, count)
    return list(blocks.split(1))


def untrained(model: Any, tokenizer: Any, data: Path, window: int) -> Any:
    """A conversion by heads to a window alone, as it is before training, least entropy first."""
    config = DSLAConfig(task_type="CAUSAL_LM", conversion_unit="head", window_size=window, states=False, trained_projections=[])
    model = get_peft_model(model, config).eval().requires_grad_(False)
    blocks, _ = held_out_blocks(data / "novels_val.jsonl.xz", tokenizer, 1024, 6)
    ranking = rank_units(model, [blocks[-2:].to(model.device)], metric="entropy")
    model.base_model.set_conversion_order(ranking.order)
    return model


@torch.no_grad()
def measure(options: argparse.Namespace) -> None:
    """Writes rows as they come."""
    settings = {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new, "prompts": options.prompts}
    settings |= {"draft_tokens": options.draft, "dtype": options.dtype}
    done = json.loads(options.out.read_text()) if options.out.exists() else {**origin(" "), "settings": settings, "rows": []}
    if done["settings"] != settings:
        raise SystemExit(f"{options.out} was measured with {done['settings']}, not {settings}: give another --out")
    tokenizer, base = load_tokenizer(options.model), load_model(options.model, options.dtype).to(device())
    if options.adapter is None:
        model = untrained(base, tokenizer, options.data, options.window)
    else:
        model = load_adapter(options.model, options.adapter, options.dtype, base=base)
    model = model.to(device()).eval()
    config = active_config(model)
    units, unit = len(config.conversion_order or ()), config.conversion_unit
    for kind in ("novels", "code", "chat"):
        prompts = prompts_of(kind, tokenizer, options.data, options.prompt_tokens, options.prompts)
        known = {(row["kept"], row["temperature"]) for row in done["rows"] if row["kind"] == kind}
        cells = [(round(share * units), t) for share in options.kept for t in TEMPERATURES]
        cells = [cell for cell in cells if cell not in known]
        if not prompts or not cells:
            continue
        model.set_level(0)
        read = [(ids.to(device()), DynamicCache(config=model.config)) for ids in prompts]
        for ids, cache in read:
            model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        for kept, temperature in bar(cells, total=len(cells), desc=kind, unit=" rows"):
            counts = dict.fromkeys(("drafted", "compared", "accepted", "checks"), 0)
            made = 0
            for number, (ids, cache) in enumerate(read):
                torch.manual_seed(number)
                how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
                out = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    past_key_values=copy.deepcopy(cache),
                    draft_level=units - kept,
                    draft_tokens=options.draft,
                    min_new_tokens=options.new,
                    max_new_tokens=options.new,
                    return_dict_in_generate=True,
                    pad_token_id=0,
                    **how,
                )
                made += out.sequences.shape[1] - ids.shape[1] - 1
                counts = {name: counts[name] + out[name] for name in counts}
            done["rows"].append(
                {"model": options.name, "trained": options.adapter is not None, "unit": unit, "window": config.window_size}
                | {"states": config.states, "kind": kind, "units": units, "kept": kept, "temperature": temperature}
                | {"acceptance": counts["accepted"] / counts["compared"], "tokens_per_check": made / counts["checks"], **counts}
            )
            write_json(options.out, done, indent=1)


class Imposed:
    """Guesses by the draft, of which this share is accepted, by chance."""

    likeliest = True

    def __init__(self, acceptance: float):
        self.acceptance, self._random = acceptance, random.Random(0)

    def guess(self, ids: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, None]:
        return logits.argmax(-1), None

    def choose(self, ids: torch.Tensor, logits: torch.Tensor, guess: Any = None, drawn_from: Any = None) -> torch.Tensor:
        if guess is None:
            return logits.argmax(-1)
        return guess if self._random.random() < self.acceptance else (guess + 1) % logits.shape[-1]

    def choose_all(self, ids: torch.Tensor, logits: torch.Tensor, guesses: torch.Tensor, drawn_from: Any) -> torch.Tensor:
        likeliest = logits.argmax(-1)  # as if it counted
        wrong = sum(1 << place for place in range(len(guesses)) if self._random.random() >= self.acceptance)
        places = torch.arange(len(guesses), device=guesses.device)
        return torch.cat([(guesses + (wrong >> places & 1)) % logits.shape[-1], likeliest[len(guesses) :]])


class Each:
    """Lengths of drafts one after the other, several rounds each: all that `adapts` may come to choose has run then."""

    def __init__(self, adapts: DraftLength):
        self.longest, self.lengths = adapts.longest, adapts.lengths
        self._rounds = itertools.cycle([0, *(length for length in self.lengths for _ in range(ROUNDS_EACH))])

    def next(self) -> int:
        return next(self._rounds)

    def record(self, *args: Any) -> None:
        """Nothing changes."""

    record_texts = record


class Clock:
    """A streamer that keeps when tokens came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.times += [time.perf_counter()] * (tokens.numel() if self.times else 1)  # the prompt comes first, as one

    def end(self) -> None:
        """Nothing is open."""

    def rate(self) -> float:
        """Tokens a second behind the first one."""
        return (len(self.times) - 2) / (self.times[-1] - self.times[1])


@contextmanager
def imposed(acceptance: float, lengths: Any = None) -> Iterator[None]:
    """Within it drafts are accepted so often; lengths: in place of those of the call."""
    known = graph.rule_for, graph.lengths_for
    graph.rule_for = lambda *args: Imposed(acceptance)
    if lengths is not None:
        graph.lengths_for = lambda tokens: lengths
    try:
        yield
    finally:
        graph.rule_for, graph.lengths_for = known


class Timer:
    """Tokens a second of one text that goes on from call to call: its prompt is read once.

    Args:
        ids: the prompt `[1, T]`. new: tokens a call. calls: at most. chunk: tokens of the prompt read at a time.
    """

    def __init__(self, model: Any, ids: torch.Tensor, new: int, calls: int, chunk: int):
        record = {} if ids.device.type == "cuda" else {"record": PlainRecording}
        self.decoder = graph.GraphDecoder(model, max_length=ids.shape[1] + new * (calls + 1), **record)
        self.ids, self.cache, self.new, self.chunk = ids, None, new, chunk
        self.run()  # the prompt, and what is compiled and recorded for tokens without a draft

    def run(self, draft_level: int | None = None, draft_tokens: int | None = None) -> float:
        """Go on by `new` tokens; their rate, but for the first of them."""
        self.decoder.draft_level, self.decoder.draft_tokens = draft_level, draft_tokens
        clock = Clock()
        out = self.decoder.generate(
            input_ids=self.ids,
            attention_mask=torch.ones_like(self.ids),
            past_key_values=self.cache,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            max_new_tokens=self.new,
            prefill_chunk_size=self.chunk,
            return_dict_in_generate=True,
            streamer=clock,
        )
        self.ids, self.cache = out.sequences, out.past_key_values
        return clock.rate()


@torch.no_grad()
def time_drafts(options: argparse.Namespace) -> None:
    """Writes a row for each length, share of KV heads kept, length of drafts and acceptance, as it comes; those in the file stay."""
    where = torch.device(device())
    done = json.loads(options.out.read_text()) if options.out.exists() else {**origin(" "), "settings": None, "rows": []}
    if done["device"] != origin(" ")["device"]:
        raise SystemExit(f"{options.out} was measured on {done['device']}: give another --out")
    config = preset_config(options.shape) if options.shape in PRESETS else load_config(options.shape)
    name = options.shape if options.shape in PRESETS else Path(options.shape).name
    settings = DSLAConfig(
        task_type="CAUSAL_LM", conversion_unit="head", window_size=options.window, states=options.states, trained_projections=[]
    )
    model = None
    for tokens in options.prompt_tokens:
        same = {"what": "time", "model": name, "prompt_tokens": tokens, "window": options.window, "states": options.states}
        same |= {"dtype": options.dtype, "new_tokens": options.new}
        known = {tuple(row[key] for key in ARM) for row in done["rows"] if all(row.get(key) == value for key, value in same.items())}
        arms = [arm for arm in itertools.product(options.kept, options.draft, options.acceptance) if arm not in known]
        if not arms:
            continue
        if model is None:
            model = get_peft_model(ready(random_model(config, getattr(torch, options.dtype), where), where), settings).to(where)
            model = model.eval().requires_grad_(False)
            model.base_model.set_conversion_order(rank_units(model, [], metric="random").order)
        units = len(active_config(model).conversion_order or ())
        ids = torch.randint(config.vocab_size, (1, tokens), device=where)
        timer = Timer(model, ids, options.new, 3 * len(arms), options.chunk)
        for share, draft, acceptance in bar(arms, total=len(arms), desc=f"{tokens} tokens", unit=" rows"):
            kept, draft_tokens = round(share * units), draft or None
            with imposed(acceptance, None if draft else Each(DraftLength())):
                timer.run(units - kept, draft_tokens)  # compiles and records
            with imposed(acceptance):
                drafted = timer.run(units - kept, draft_tokens)
            plain = timer.run()
            done["rows"].append(
                {**same, "share": share, "draft_tokens": draft, "acceptance": acceptance, "units": units, "kept": kept}
                | {"tokens_per_second": plain, "drafted_tokens_per_second": drafted, "ratio": drafted / plain}
            )
            write_json(options.out, done, indent=1)
        del timer
        collect()


def table(rows: list[dict[str, Any]]) -> str:
    """Acceptance and tokens a check, a line for each level and a column for each kind of text and temperature."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    lines = []
    for kept in dict.fromkeys(row["kept"] for row in rows):
        line: dict[str, Any] = {f"{rows[0]['unit']}s kept": f"{kept} of {rows[0]['units']}"}
        for row in rows:
            if row["kept"] == kept:
                how = "greedy" if row["temperature"] == 0 else f"T = {row['temperature']}"
                line[f"{row['kind']}, {how}"] = f"{row['acceptance']:.2f} ({row['tokens_per_check']:.2f})"
        lines.append(line)
    return rows_table(lines, list(lines[0])) if kinds else ""


def page(options: argparse.Namespace) -> None:
    """Writes the result and the page."""
    parts = [json.loads(path.read_text()) for path in options.rows]
    counted = [part["settings"] for part in parts if part["settings"] is not None]
    if not counted or any(settings != counted[0] for settings in counted):
        raise SystemExit(f"counts of acceptance are needed, all with the same settings, not {counted}")
    settings = counted[0]
    every = [row | ({"device": part["device"]} if part["settings"] is None else {}) for part in parts for row in part["rows"]]
    rows, times = [row for row in every if "what" not in row], [row for row in every if "what" in row]
    versions = {"device": parts[0]["device"], "versions": parts[0]["versions"]}
    write_results(
        "drafting", every, "python eval/drafting.py page smollm2.json teacher.json", options.results, settings=settings, **versions
    )
    text = HEAD.format(**settings)
    for name in dict.fromkeys((row["model"], row["trained"]) for row in rows):
        some = [row for row in rows if (row["model"], row["trained"]) == name]
        how = "A distilled adapter" if name[1] else "An **untrained** conversion, heads in order of attention entropy"
        states = "two states beside their window" if some[0]["states"] else "a window alone"
        text += f"## {name[0]}\n\n{how}; converted units have {states} of {some[0]['window']} tokens. "
        text += f"Acceptance, and in brackets tokens a check:\n\n{table(some)}\n\n"
    if times:
        names = ["model", "prompt_tokens", "kept", "draft_tokens", "acceptance", "tokens_per_second", "drafted_tokens_per_second", "ratio"]
        text += f"## Time, with an acceptance that is imposed\n\nRandom weights, one text, {', '.join({row['device'] for row in times})}; "
        text += f"converted heads have a window of {times[0]['window']} tokens:\n\n{rows_table(times, names)}\n"
    write_whole(options.page, text.rstrip() + "\n")


def check_arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with an error, before anything is loaded, where a number cannot be one or there is nothing to run on."""
    asked = vars(options)
    for name, least in (("prompt_tokens", 1), ("new", 2), ("draft", 0 if options.run is time_drafts else 1), ("chunk", 1), ("prompts", 1)):
        numbers = asked.get(name, least)
        if (number := min(numbers if isinstance(numbers, list) else [numbers])) < least:
            parser.error(f"--{name.replace('_', '-')} must be {least} or more, got {number}")
    for name in ("kept", "acceptance"):
        for share in asked.get(name, ()):
            if not 0 <= share <= 1:
                parser.error(f"--{name} must be shares from 0 to 1, got {share}")
    if not isinstance(getattr(torch, options.dtype, None), torch.dtype):
        parser.error(f"--dtype must be one of torch's, such as bfloat16, got {options.dtype}")
    if asked.get("shape") in PRESETS and not torch.cuda.is_available():
        parser.error(f"--shape {options.shape} needs a CUDA device, and there is none; a small model's folder runs without one")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("measure")
    one.add_argument("model")
    one.add_argument("data", type=Path)
    one.add_argument("--adapter", help="None: an untrained conversion by heads, to a window alone")
    one.add_argument("--name", required=True, help="of the model, in tables")
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--dtype", default="bfloat16")
    one.add_argument("--prompt-tokens", type=int, default=2048)
    one.add_argument("--prompts", type=int, default=4)
    one.add_argument("--new", type=int, default=64)
    one.add_argument("--draft", type=int, default=4, help="tokens in a round")
    one.add_argument("--kept", type=float, nargs="+", default=KEPT, help="shares of the model's units")
    one.add_argument("--window", type=int, default=WINDOW, help="of an untrained conversion")
    one.set_defaults(run=measure)
    clocked = commands.add_parser("time")
    clocked.add_argument("--shape", required=True, help=f"one of {sorted(PRESETS)}, or a model's folder")
    clocked.add_argument("--out", type=Path, required=True)
    clocked.add_argument("--dtype", default="bfloat16")
    clocked.add_argument("--prompt-tokens", type=int, nargs="+", required=True)
    clocked.add_argument("--new", type=int, default=128, help="tokens that are timed")
    clocked.add_argument("--draft", type=int, nargs="+", default=[4], help="tokens in a round; 0: adapts")
    clocked.add_argument("--acceptance", type=float, nargs="+", default=[0.9])
    clocked.add_argument("--kept", type=float, nargs="+", default=(0.1,), help="shares of the KV heads")
    clocked.add_argument("--chunk", type=int, default=4096, help="tokens of the prompt that are read at a time")
    clocked.add_argument("--window", type=int, default=WINDOW)
    clocked.add_argument("--states", action="store_true", help="beside the window")
    clocked.set_defaults(run=time_drafts)
    other = commands.add_parser("page")
    other.add_argument("rows", type=Path, nargs="+")
    other.add_argument("--results", type=Path, default=RESULTS)
    other.add_argument("--page", type=Path, default=PAGE)
    other.set_defaults(run=page)
    options = parser.parse_args(arguments)
    if options.run is not page:
        check_arguments(one if options.run is measure else clocked, options)
    options.run(options)


if __name__ == "__main__":
    main()
