"""Whether a text served with `--batch-invariant` is equal to the bit in any company, and what that costs.

    python eval/batch_invariance.py
    python eval/batch_invariance.py --shape llama3-8b --slots 32
    python eval/batch_invariance.py --model BASE --adapter ADAPTER
    python eval/batch_invariance.py --page                          # measures nothing: fills docs/measured/serving.md

An engine without and one with `batch_invariant` serve the same greedy texts: each alone, then in company that comes and goes at random,
several times. Compared are tokens, and the bits of their log-probabilities up to where texts part. At fixed levels, and while the level
rises in mid-text: then a text and one of the same history of levels. A step is timed with one text and with all slots taken. A row for each
engine and level goes to eval/results/batch-invariance.json. It ends with 1 if a text of a `batch_invariant` engine is not equal.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from reporting import RESULTS, fill_page, rows_table, write_results
from serving import SHAPES, make_model
from tqdm import tqdm

from dsla_hf.inference.recorder import CudaRecording
from dsla_hf.levels.policies import Stats
from dsla_hf.models.loading import load_adapter
from dsla_hf.serving.engine.engine import Engine, EngineOptions
from dsla_hf.serving.engine.request import Event, Request, Sampling

COLUMNS = ["invariant", "level", "compared", "parted", "other_bits", "largest_difference", "ms_one", "ms_full"]
TIMED_STEPS = 20
PAGE = Path(__file__).parent.parent / "docs" / "measured" / "serving.md"


@dataclass
class Heard:
    """What came of a text: tokens, and their log-probabilities."""

    request: Request | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    error: Exception | None = None
    ended: bool = False

    def __call__(self, event: Event) -> None:
        if event.token is not None and event.logprob is not None:
            self.tokens.append(event.token)
            self.logprobs.append(event.logprob.logprob)
        self.error = event.error or self.error
        self.ended = self.ended or event.finish is not None or event.error is not None


@dataclass
class Compared:
    """Texts against what each is alone."""

    compared: int = 0
    parted: int = 0
    other_bits: int = 0
    largest_difference: float = 0.0

    def add(self, alone: Heard, other: Heard) -> None:
        self.compared += 1
        same = next((at for at, pair in enumerate(zip(alone.tokens, other.tokens, strict=True)) if pair[0] != pair[1]), len(alone.tokens))
        self.parted += same < len(alone.tokens)
        for one, two in zip(alone.logprobs[:same], other.logprobs[:same], strict=True):
            self.other_bits += struct.pack("d", one) != struct.pack("d", two)
            self.largest_difference = max(self.largest_difference, abs(one - two))


class Measured:
    """An engine whose level is set from here."""

    def __init__(self, model: Any, invariant: bool, options: argparse.Namespace):
        self.level, self.draws, self.options = 0, random.Random(options.seed), options
        sizes = EngineOptions(
            slots=options.slots,
            chunk=options.chunk,
            max_tokens=options.max_tokens,
            hold=0.0,
            busy_hold=0.0,
            cool_down=0.0,
            prompt_share=1.0,
            batch_invariant=invariant,
        )
        record = CudaRecording if model.device.type == "cuda" else None
        self.engine = Engine(model, self.ask, sizes, eos_tokens=set(), record=record)

    def ask(self, stats: Stats) -> int:
        return self.level

    def submit(self, prompt: list[int]) -> Heard:
        heard = Heard()
        heard.request = self.engine.submit(prompt, self.options.tokens, heard, Sampling(temperature=0.0, logprobs=0))
        return heard

    def finish(self) -> None:
        while self.engine.busy:
            self.engine.step()

    def set_level(self, level: int) -> None:
        self.level = level
        while self.engine.control.level != level:
            self.engine.step()

    def alone(self, prompt: list[int], raised: tuple[int, int] | None = None) -> Heard:
        """The text by itself; raised: (level, after how many of its tokens it rises)."""
        heard = self.submit(prompt)
        while not heard.ended:
            if raised is not None and heard.request is not None and len(heard.request.tokens) >= raised[1]:
                self.level = raised[0]
            self.engine.step()
        self.finish()
        return heard

    def in_company(self, prompts: list[list[int]], then: int | None = None) -> list[Heard]:
        """The texts, in an order and at times that are drawn, beside others of other lengths; then: a level that it rises to halfway."""
        draws, heard = self.draws, dict[int, Heard]()
        waiting = [*range(len(prompts)), *[-1] * len(prompts)]  # -1: company
        draws.shuffle(waiting)
        steps = 0
        while waiting or self.engine.busy:
            if waiting and draws.random() < 0.5:
                number = waiting.pop()
                text = self.submit(prompts[number] if number >= 0 else self.prompt())
                if number >= 0:
                    heard[number] = text
            self.engine.step()
            steps += 1
            if then is not None and steps == self.options.tokens:
                self.level = then
        return [heard[number] for number in range(len(prompts))]

    def prompt(self) -> list[int]:
        length = self.draws.choice([1, 5, 17, self.options.chunk // 2, self.options.chunk + 3])
        return [self.draws.randrange(self.engine.vocab_size) for _ in range(min(length, self.options.max_tokens - self.options.tokens))]

    def step_ms(self, texts: int) -> float:
        """Median time of a step with so many texts."""
        every = [self.submit([1] * 8) for _ in range(texts)]
        while not all(text.request is not None and text.request.decoding for text in every):
            self.engine.step()
        times = []
        for _ in range(min(TIMED_STEPS, self.options.tokens - texts - 2) if self.options.tokens > texts + 3 else 1):
            self.engine.runner.wait()
            begin = time.perf_counter()
            self.engine.step()
            self.engine.runner.wait()
            times.append(1000 * (time.perf_counter() - begin))
        for text in every:
            assert text.request is not None
            self.engine.cancel(text.request)
        self.finish()
        return median(times)


def measure(model: Any, invariant: bool, options: argparse.Namespace, bar: Any) -> list[dict[str, Any]]:
    """A row for each level, and one for raises."""
    measured = Measured(model, invariant, options)
    highest = measured.engine.control.highest
    draws = random.Random(options.seed + 1)
    prompts = [
        [draws.randrange(measured.engine.vocab_size) for _ in range(draws.randint(1, 2 * options.chunk))] for _ in range(options.texts)
    ]
    prompts = [prompt[: options.max_tokens - options.tokens] for prompt in prompts]
    levels = sorted({0, highest // 2, highest})
    if model.device.type == "cuda":
        measured.engine.prepare(levels)
    rows = []
    for level in levels:
        measured.set_level(level)
        alone, found = [measured.alone(prompt) for prompt in prompts], Compared()
        for _ in range(options.rounds):
            for one, other in zip(alone, measured.in_company(prompts), strict=True):
                found.add(one, other)
            bar.update()
        times = {"ms_one": measured.step_ms(1), "ms_full": measured.step_ms(options.slots)}
        rows.append({"invariant": invariant, "level": str(level), **vars(found), **times})
    if highest:
        found = Compared()
        for _ in range(options.rounds):
            measured.set_level(0)
            for prompt, other in zip(prompts, measured.in_company(prompts, highest), strict=True):
                assert other.request is not None
                (_, first), *raises = other.request.levels
                if raises and raises[0][0] <= len(prompt):  # while its prompt was read: the history does not say after which tokens
                    continue
                measured.set_level(first)
                found.add(measured.alone(prompt, (raises[0][1], raises[0][0] - len(prompt)) if raises else None), other)
            bar.update()
        rows.append({"invariant": invariant, "level": f"0 -> {highest}", **vars(found)})
    return rows


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="random weights of this shape")
    parser.add_argument("--model", help="a checkpoint, instead of a shape")
    parser.add_argument("--adapter", help="of that checkpoint")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--chunk", type=int, default=64, help="prompt tokens read in a step")
    parser.add_argument("--max-tokens", type=int, default=256, help="longest text")
    parser.add_argument("--texts", type=int, default=12, help="that are compared in a round")
    parser.add_argument("--tokens", type=int, default=40, help="generated in each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of batch-invariance.json")
    parser.add_argument("--page", action="store_true", help="measure nothing; fill docs/measured/serving.md")
    options = parser.parse_args(arguments)
    if (options.model is None) != (options.adapter is None):
        parser.error("--model and --adapter go together")
    if options.tokens >= options.max_tokens:
        parser.error(f"--tokens {options.tokens} must be fewer than --max-tokens {options.max_tokens}")
    return options


def page_part(found: dict[str, Any]) -> str:
    """A table of what was compared and timed, and on what."""
    about = f"{found['model']} with random weights, " if found["model"] in SHAPES else f"{found['model']}, "
    about += f"{found['dtype'].removeprefix('torch.')}, {found['slots']} slots, {found['device']}, torch {found['versions']['torch']}"
    return f"{about}; `{found['command']}`\n\n{rows_table(found['rows'], COLUMNS)}"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.page:
        fill_page(PAGE, {"batch invariance": page_part(json.loads((options.results / "batch-invariance.json").read_text()))})
        return 0
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.model is None:
        model = make_model(options.shape, where)
    else:
        model = load_adapter(options.model, options.adapter, "auto").to(where).eval()
    with tqdm(desc="rounds", disable=None) as bar:
        rows = [row for invariant in (False, True) for row in measure(model, invariant, options, bar)]
    setup = {name: getattr(options, name) for name in ("slots", "chunk", "max_tokens", "texts", "tokens", "rounds", "seed")}
    named = Path(options.model).name if options.model else options.shape
    write_results("batch-invariance", rows, folder=options.results, model=named, dtype=str(model.dtype), **setup)
    print(rows_table(rows, COLUMNS))
    return int(any(row["parted"] or row["other_bits"] for row in rows if row["invariant"]))


if __name__ == "__main__":
    sys.exit(main())
