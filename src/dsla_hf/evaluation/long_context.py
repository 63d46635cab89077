"""Long-context tasks that need no download: facts hidden in a long text, and the loss on the text itself.

`prepare` makes the data of some tasks, the same for every model and level: deterministic by seed, for any tokenizer, and of exactly as
many tokens as asked for. `Task.run` measures a model on it.

| task | what is asked | answered by |
|---|---|---|
| `needle` | a number that the text says once | `generate`, through the cache |
| `needle_several` | one of four such numbers | `generate` |
| `needle_distractors` | one number, beside others of similar names and wordings | `generate` |
| `variable_tracking` | the value that a chain of assignments gives a variable | `generate` |
| `associative_recall` | four of eight numbers that the text begins with (MQAR, arXiv 2312.04927) | argmax, given all before |
| `position_perplexity` | the text itself, by position | loss |
| `far_bigrams` | the text itself, by how far back the pair (token before, token) was last seen | loss |
"""

from __future__ import annotations

import itertools
import math
import pydoc_data.topics
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.progress import bar
from ..inference.batching import halve_until_it_fits
from ..training.text import read_texts
from .next_tokens import next_token_losses

FACT = "\n\nThe special number for {name} is {number}. Remember it.\n\n"
OTHER_FACT = "\n\nThe ordinary number for {name} is {number}. Remember it.\n\n"
QUESTION = "\n\nWhat is the special number for {name}? The special number for {name} is"
ASSIGNMENT = "\n\nSet {name} = {value}.\n\n"
ASKED = "\n\nWhat is the value of {name}? The value of {name} is"
FIRST = ("silver", "golden", "quiet", "amber", "crimson", "hollow", "northern", "velvet", "broken", "distant")
SECOND = ("winter", "river", "garden", "castle", "lantern", "harbour", "meadow", "compass", "feather", "bridge")
NAMES = tuple(f"{first}-{second}" for first in FIRST for second in SECOND)

SEVERAL, DISTRACTORS, HOPS, PAIRS, QUERIES = 4, 8, 4, 8, 4
# A tokenized haystack is cut here: enough for every length, and quick to tokenize.
MOST_HAYSTACK_TOKENS, MOST_HAYSTACK_CHARACTERS = 2_000_000, 8_000_000
# Tokens per batch where no batch size is given.
BATCH_TOKENS = {"cuda": 65_536, "cpu": 8_192}


# --- data -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prompt:
    """input_ids: exactly as long as asked for. answer: what the text after it must begin with. new_tokens: as many as the answer has,
    and one in which a longer number would show. depth: where the fact stands, from 0 to 1."""

    input_ids: list[int]
    answer: str
    new_tokens: int
    depth: float


@dataclass(frozen=True)
class Haystack:
    """Token ids of the documents in which things are hidden."""

    documents: list[list[int]]

    @property
    def tokens(self) -> list[int]:
        """All of it as one text."""
        return [token for document in self.documents for token in document]

    def blocks(self, length: int, count: int) -> Tensor:
        """Up to `count` blocks `[N, length]`, taken evenly from documents that are long enough; across documents where none is.

        Raises:
            ValueError: if the text has fewer tokens than that.
        """
        documents = [document for document in self.documents if len(document) >= length] or [self.tokens]
        blocks: list[list[int]] = []
        for part in range(max(len(document) // length for document in documents)):
            blocks += [document[part * length : (part + 1) * length] for document in documents if len(document) >= (part + 1) * length]
            if len(blocks) >= count:
                break
        if not blocks:
            raise ValueError(self._too_short(length))
        return torch.tensor(blocks[:count])

    def check(self, length: int) -> None:
        """Raises ValueError if the text has fewer tokens than `length`."""
        if sum(map(len, self.documents)) < length:
            raise ValueError(self._too_short(length))

    def _too_short(self, length: int) -> str:
        tokens = sum(map(len, self.documents))
        return f"the haystack has {tokens:,} tokens, fewer than the length {length:,}: give a longer text, or shorter lengths"


def read_haystack(tokenizer: Any, path: str | Path | None = None) -> Haystack:
    """The text of a file as in `read_texts` (.txt, .jsonl, also .xz), or by default the help texts that every Python carries.

    Raises:
        ValueError: for another kind of file, or one without text.
        FileNotFoundError: if there is none.
    """
    texts = iter(["\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items()))] if path is None else read_texts(path))
    documents: list[list[int]] = []
    tokens = 0
    for text in texts:
        document = tokenizer(text[:MOST_HAYSTACK_CHARACTERS], add_special_tokens=False, verbose=False)["input_ids"]
        documents.append(document[: MOST_HAYSTACK_TOKENS - tokens])
        tokens += len(documents[-1])
        if tokens == MOST_HAYSTACK_TOKENS:
            break
    if not tokens:
        raise ValueError(f"{path} holds no text")
    return Haystack(documents)


class Writer:
    """Texts as tokens of one tokenizer.

    Raises:
        ValueError: if the tokenizer cannot write numbers.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        beginning = tokenizer("a")["input_ids"][:1]
        # What the tokenizer puts before every text, on which many models depend.
        self.prefix = beginning if beginning == [tokenizer.bos_token_id] else []
        if "12345" not in tokenizer.decode(self.encode(" 12345"), skip_special_tokens=True):
            raise ValueError("the tokenizer cannot write the number 12345, which the long-context tasks ask for")

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def question(self, text: str, answer: str) -> tuple[list[int], list[int]]:
        """Tokens of a question, and of the answer as it is written after it."""
        question, whole = self.encode(text), self.encode(f"{text} {answer}")
        same = next((i for i, (a, b) in enumerate(zip(question, whole, strict=False)) if a != b), min(len(question), len(whole)))
        return whole[:same], whole[same:]


def _hidden(room_text: list[int], facts: Sequence[list[int]], depths: Sequence[float]) -> list[int]:
    """The text with facts put into it, at shares of its length."""
    parts: list[int] = []
    begin = 0
    for depth, fact in sorted(zip(depths, facts, strict=True), key=lambda pair: pair[0]):
        end = int(depth * len(room_text))
        parts += [*room_text[begin:end], *fact]
        begin = end
    return [*parts, *room_text[begin:]]


def _room(task: str, length: int, *taken: Sequence[int]) -> int:
    used = sum(map(len, taken))
    if used > length:
        raise ValueError(f"length {length} is too short for the task {task}, whose facts and question take {used} tokens")
    return length - used


def _prompt(
    task: str,
    writer: Writer,
    haystack: list[int],
    length: int,
    facts: list[str],
    depths: list[float],
    asked: tuple[str, str, float],
    rng: Any,
) -> Prompt:
    """The facts at their depths in text from a random place, and the question (text, answer, depth of its fact) at the end."""
    question, answer = writer.question(asked[0], asked[1])
    hidden = [writer.encode(fact) for fact in facts]
    room = _room(task, length, writer.prefix, question, *hidden)
    start = rng.randrange(len(haystack) - room + 1)
    ids = [*writer.prefix, *_hidden(haystack[start : start + room], hidden, depths), *question]
    return Prompt(ids, asked[1], len(answer) + 1, asked[2])


def _number(rng: random.Random) -> str:
    return str(rng.randint(10000, 99999))


def needle_prompt(writer: Writer, haystack: list[int], length: int, depth: float, rng: random.Random) -> Prompt:
    """One fact at `depth`, asked for."""
    name, number = rng.choice(NAMES), _number(rng)
    asked = (QUESTION.format(name=name), number, depth)
    return _prompt("needle", writer, haystack, length, [FACT.format(name=name, number=number)], [depth], asked, rng)


def needle_several_prompt(writer: Writer, haystack: list[int], length: int, depth: float, rng: random.Random) -> Prompt:
    """Four facts of different names, the one at `depth` asked for."""
    names, numbers = rng.sample(NAMES, SEVERAL), [_number(rng) for _ in range(SEVERAL)]
    facts = [FACT.format(name=name, number=number) for name, number in zip(names, numbers, strict=True)]
    depths = [depth, *(rng.random() for _ in facts[1:])]
    asked = (QUESTION.format(name=names[0]), numbers[0], depth)
    return _prompt("needle_several", writer, haystack, length, facts, depths, asked, rng)


def needle_distractors_prompt(writer: Writer, haystack: list[int], length: int, depth: float, rng: random.Random) -> Prompt:
    """One fact at `depth`, asked for; beside it the same name with an ordinary number, and names that share a word with it."""
    name, number = rng.choice(NAMES), _number(rng)
    first, second = name.split("-")
    near = rng.sample([other for other in NAMES if other != name and (first in other or second in other)], DISTRACTORS - 1)
    facts = [FACT.format(name=name, number=number), OTHER_FACT.format(name=name, number=_number(rng))]
    facts += [FACT.format(name=other, number=_number(rng)) for other in near]
    depths = [depth, *(rng.random() for _ in facts[1:])]
    asked = (QUESTION.format(name=name), number, depth)
    return _prompt("needle_distractors", writer, haystack, length, facts, depths, asked, rng)


def variable_tracking_prompt(writer: Writer, haystack: list[int], length: int, depth: float, rng: random.Random) -> Prompt:
    """`x1 = 12345`, `x2 = x1`, ... over the text, its last variable asked for; beside it another chain. The first fact is at `depth`, the
    others are between it and the end."""
    names = [f"x{i}" for i in rng.sample(range(10, 100), 2 * (HOPS + 1))]
    facts: list[str] = []
    depths: list[float] = []
    answer = ""
    for chain in (names[: HOPS + 1], names[HOPS + 1 :]):
        value = _number(rng)
        answer = answer or value
        begin = rng.random() if facts else depth
        facts += [ASSIGNMENT.format(name=name, value=before) for before, name in itertools.pairwise([value, *chain])]
        depths += [begin, *sorted(begin + (1 - begin) * rng.random() for _ in chain[1:])]
    asked = (ASKED.format(name=names[HOPS]), answer, depth)
    return _prompt("variable_tracking", writer, haystack, length, facts, depths, asked, rng)


def associative_recall(
    writer: Writer, haystack: list[int], length: int, count: int, rng: random.Random, pairs: int = PAIRS, queries: int = QUERIES
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall in sentences: names with a number each, then other text, then some of the names again, each with
    its number.

    Returns:
        ids `[count, length]`, and int `[count, length - 1]` in the places of their predictions: the number of the question that a token
        answers, from 1 on, and 0 elsewhere.

    Raises:
        ValueError: if `length` tokens do not hold facts and questions.
    """
    rows, marks = [], []
    for _ in range(count):
        names, numbers = rng.sample(NAMES, pairs), [_number(rng) for _ in range(pairs)]
        facts = [
            token for name, number in zip(names, numbers, strict=True) for token in writer.encode(FACT.format(name=name, number=number))
        ]
        end: list[int] = []
        marked: list[int] = []
        for query, i in enumerate(rng.sample(range(pairs), min(queries, pairs)), 1):
            question, answer = writer.question(QUESTION.format(name=names[i]), numbers[i])
            end += [*question, *answer]
            marked += [0] * len(question) + [query] * len(answer)
        room = _room("associative_recall", length, writer.prefix, facts, end)
        start = rng.randrange(len(haystack) - room + 1)
        rows.append([*writer.prefix, *facts, *haystack[start : start + room], *end])
        marks.append([0] * (length - len(marked)) + marked)
    return torch.tensor(rows), torch.tensor(marks)[:, 1:]


def last_seen(blocks: Tensor) -> Tensor:
    """How many tokens back the pair (token before, token) was last seen, 0 where never: `[N, T - 1]` for tokens 1 to T - 1."""
    distances = torch.zeros(blocks.shape[0], blocks.shape[1] - 1, dtype=torch.long)
    for n, row in enumerate(blocks.tolist()):
        last: dict[tuple[int, int], int] = {}
        for t in range(1, len(row)):
            bigram = (row[t - 1], row[t])
            distances[n, t - 1] = t - last.get(bigram, t)
            last[bigram] = t
    return distances


# --- measures ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def answers_right(model: Any, tokenizer: Any, prompts: Sequence[Prompt], batch_size: int) -> list[bool]:
    """Whether `generate`, greedily and through the cache, goes on with the number asked for."""
    right = []
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    for first in range(0, len(prompts), batch_size):
        batch = prompts[first : first + batch_size]
        ids = torch.tensor([prompt.input_ids for prompt in batch], device=model.device)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(prompt.new_tokens for prompt in batch),
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=pad,
        )
        for prompt, row in zip(batch, out[:, ids.shape[1] :].tolist(), strict=True):
            right.append(is_answer(tokenizer, prompt, row))
    return right


def is_answer(tokenizer: Any, prompt: Prompt, tokens: list[int]) -> bool:
    """Whether the tokens after a prompt begin with the number asked for, and not a longer one."""
    return re.match(rf"\s*{prompt.answer}(?!\d)", tokenizer.decode(tokens, skip_special_tokens=True)) is not None


@torch.no_grad()
def recalled(model: Any, ids: Tensor, marks: Tensor, batch_size: int) -> float:
    """Share of the answers of `associative_recall` all of whose tokens the model puts first, given all before them."""
    right = total = 0
    for batch, marked in zip(ids.split(batch_size), marks.split(batch_size), strict=True):
        batch = batch.to(model.device)
        wrong = (model(input_ids=batch, use_cache=False).logits[:, :-1].argmax(-1) != batch[:, 1:]).cpu()
        for query in range(1, int(marked.max()) + 1):
            asked = (marked == query).any(1)
            total += int(asked.sum())
            right += int((asked & ~(wrong & (marked == query)).any(1)).sum())
    return right / total


@torch.no_grad()
def token_losses(model: Any, blocks: Tensor, batch_size: int) -> Tensor:
    """Cross-entropy in nats of tokens 1 to T - 1 of each block `[N, T]`: `[N, T - 1]` fp32, on the CPU."""
    losses = []
    for batch in blocks.split(batch_size):
        batch = batch.to(model.device)
        losses.append(next_token_losses(model(input_ids=batch, use_cache=False).logits, batch).cpu())
    return torch.cat(losses)


# --- tasks ------------------------------------------------------------------------------------------------------

PROMPTS: dict[str, Callable[..., Prompt]] = {
    "needle": needle_prompt,
    "needle_several": needle_several_prompt,
    "needle_distractors": needle_distractors_prompt,
    "variable_tracking": variable_tracking_prompt,
}
TASKS = (*PROMPTS, "associative_recall", "position_perplexity", "far_bigrams")


@dataclass(frozen=True)
class Task:
    """One task at one length. `data` is what the task asks: prompts, (ids, marks), or blocks of text."""

    name: str
    length: int
    data: Any
    tokenizer: Any = field(repr=False)

    def run(self, model: Any, batch_size: int | None = None) -> dict[str, float]:
        """Measure a model, which is left in eval mode.

        Args:
            model: a causal LM of transformers, with or without adapter, at its current level.
            batch_size: sequences at a time. Default: by the length. Halved, with a warning, when memory does not suffice.

        Returns:
            Shares from 0 to 1 named `accuracy@LENGTH`; perplexities named `perplexity@LENGTH`, and the same of tokens FROM to TO as
            `perplexity@LENGTH[FROM-TO]`; losses in nats per token named `loss@LENGTH[FROM-TO back]` and `loss@LENGTH[new]`.
        """
        model.eval()
        batch_size = batch_size or max(1, BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]) // self.length)
        return halve_until_it_fits(lambda size: self._measured(model, size), batch_size, f"{self.name} at {self.length} tokens")

    def _measured(self, model: Any, batch_size: int) -> dict[str, float]:
        if self.name in PROMPTS:
            right = answers_right(model, self.tokenizer, self.data, batch_size)
            return {f"accuracy@{self.length}": sum(right) / len(right)}
        if self.name == "associative_recall":
            ids, marks = self.data
            return {f"accuracy@{self.length}": recalled(model, ids, marks, batch_size)}
        losses = token_losses(model, self.data, batch_size)
        if self.name == "position_perplexity":
            return {f"perplexity@{self.length}": math.exp(losses.mean())} | {
                f"perplexity@{self.length}[{begin}-{end - 1}]": math.exp(losses[:, begin - 1 : end - 1].mean())
                for begin, end in _doubling(1, 64, self.length)
            }
        distances = last_seen(self.data)
        groups = {"new": distances == 0}
        groups |= {f"{begin}-{end - 1} back": (distances >= begin) & (distances < end) for begin, end in _doubling(1, 128, self.length)}
        return {f"loss@{self.length}[{name}]": losses[chosen].mean().item() for name, chosen in groups.items() if chosen.any()}


def _doubling(begin: int, end: int, stop: int) -> list[tuple[int, int]]:
    """Ranges from `begin` to `stop`, each ending at twice the end of that before it."""
    ranges = []
    while begin < stop:
        ranges.append((begin, min(end, stop)))
        begin, end = end, 2 * end
    return ranges


def prepare(
    tokenizer: Any,
    tasks: Sequence[str] = TASKS,
    lengths: Sequence[int] = (1024,),
    samples: int = 40,
    seed: int = 0,
    haystack: str | Path | Haystack | None = None,
) -> list[Task]:
    """The data of some tasks at some lengths.

    Args:
        tokenizer: of the model; where it begins texts with a token of its own, so do the tasks.
        tasks: names out of `TASKS`.
        lengths: tokens per sequence, exactly; the answers of `generate` come after them.
        samples: sequences per task and length, fewer where the text has not so many blocks.
        seed: of names, numbers and places.
        haystack: a text file as in `read_texts`, or what `read_haystack` gave. Default: the help texts that every Python carries.

    Raises:
        ValueError: for an unknown task, a length that is too short for it or too long for the text, or a number below 1.
        OSError: if the file is missing.
    """
    if unknown := [name for name in tasks if name not in TASKS]:
        raise ValueError(f"unknown tasks {unknown}; known are {list(TASKS)}")
    if not lengths or min(lengths) < 2:
        raise ValueError(f"lengths must be numbers of tokens, 2 or more, got {list(lengths)}")
    if samples < 1:
        raise ValueError(f"samples must be 1 or more, got {samples}")
    writer = Writer(tokenizer)
    texts = haystack if isinstance(haystack, Haystack) else read_haystack(tokenizer, haystack)
    tokens = texts.tokens
    made = []
    for length in lengths:
        texts.check(length)
        for name in tasks:
            rng = random.Random(f"{seed} {name} {length}")
            data: Any
            if name in PROMPTS:
                depths = [(i + rng.random()) / samples for i in range(samples)]
                data = [PROMPTS[name](writer, tokens, length, depth, rng) for depth in depths]
            elif name == "associative_recall":
                data = associative_recall(writer, tokens, length, samples, rng)
            else:
                data = _with_prefix(texts.blocks(length - len(writer.prefix), samples), writer.prefix)
            made.append(Task(name, length, data, tokenizer))
    return made


def _with_prefix(blocks: Tensor, prefix: list[int]) -> Tensor:
    return torch.cat([torch.tensor(prefix, dtype=blocks.dtype).expand(len(blocks), -1), blocks], 1)


def run_tasks(model: Any, tasks: Sequence[Task], batch_size: int | None = None, progress: bool = True) -> dict[str, dict[str, float]]:
    """`Task.run` of each: metrics by task, of all lengths together."""
    results: dict[str, dict[str, float]] = {}
    for task in bar(tasks, shown=progress, desc="long context"):
        results.setdefault(task.name, {}).update(task.run(model, batch_size))
    return results
