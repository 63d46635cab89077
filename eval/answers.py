"""Levels judged by answers that are generated: agreement with level 0, formats, choices by letter, codes and chains far back.

    python eval/answers.py MODEL DATA --adapter runs/heads --out heads-answers.json --kept 45,22,9,0
    python eval/answers.py page heads-answers.json window-answers.json      # eval/results/answers.json, docs/measured/answers.md

DATA is a folder with some of `novels_val.jsonl.xz`, `wikitext2/valid.txt`, `code_val.jsonl.xz` and `peps_val.jsonl.xz`, all held out;
what is asked is in `asked.py`. Level 0 in float32 answers first, greedily: these answers are the reference. Level 0 in the dtype of the
levels (bfloat16, unless `--dtype` says otherwise) is measured against them as every level is, and is the noise floor: more agreement than
that there is not. An interrupted run goes on behind its last level, or behind the reference.
`--tiny` takes sizes for a small model on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from asked import RULES, Asked, Counts, letter_of, make_asked
from heads import DOCS, TRAINING, cache_bytes, codes_found, how_trained, plan_of_levels, wilson
from reporting import RESULTS, write_results
from torch import Tensor

from dsla_hf import set_level
from dsla_hf.core.files import write_whole
from dsla_hf.core.plots import figure, mark_plain, save
from dsla_hf.core.progress import bar, say
from dsla_hf.core.results import origin
from dsla_hf.core.tables import markdown_table
from dsla_hf.evaluation.long_context import Haystack, Task, prepare, read_haystack
from dsla_hf.inference.batching import halve_until_it_fits
from dsla_hf.inference.graph import GraphDecoder
from dsla_hf.models.adapter import active_config
from dsla_hf.models.loading import check_at_least_one, device, load_adapter, load_config, load_model, load_tokenizer
from dsla_hf.training.losses import kl_loss

NAME = "answers"
KEPT = (45, 22, 9, 0)
PARTS = ("agreement", "formats", "choices", "codes")
ANSWER_TOKENS = 64  # of level 0's answers, along which levels are compared
FORMAT_TOKENS, LETTER_TOKENS = 96, 12
TEMPERATURE = 0.7
CODE_TASKS = {"code": "needle", "tracking": "variable_tracking"}
TOKENS_AT_ONCE = {"cuda": 131_072, "cpu": 8_192}  # of all prompts of a batch
SHORT, MOST_PADDED = 512, 1.25  # tokens of prompts that go into one batch, and the longest beside the shortest of others
WORDS = {
    "agreement": "top-1 agreement",
    "agreement_share": "of the floor's",
    "identical": "identical",
    "first_difference": "first difference",
    "kl": f"KL at {TEMPERATURE}",
}


@dataclass(frozen=True)
class Sizes:
    """How much is asked; `code_lengths` and `answer_tokens` in tokens."""

    counts: Counts = field(default_factory=Counts)
    code_lengths: tuple[int, ...] = (1024, 2048, 4096, 7500)
    answer_tokens: int = ANSWER_TOKENS


TINY = Sizes(Counts(4, 4, 1, 1, 1, (1400, 1600)), (400,), 6)


def sizes_of(options: argparse.Namespace) -> Sizes:
    """For the model: what is longer than its context, answers included, is shortened. `--prompts` is shared out evenly."""
    if options.tiny:
        return TINY
    room = load_config(options.model).max_position_embeddings - FORMAT_TOKENS
    factor = min(1.0, room / max(Counts().lengths))
    counts = Counts().shorter(factor)
    share = options.prompts / (counts.short + counts.long)
    few = {name: max(1, round(share * getattr(counts, name))) for name in ("short", "long", "formats_short", "formats_long", "choices")}
    return Sizes(Counts(**few, lengths=counts.lengths), tuple(round(length * factor) for length in Sizes().code_lengths))


# --- generating -------------------------------------------------------------------------------------------------


def stops_of(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end an answer."""
    own = model.generation_config.eos_token_id
    ends = [] if own is None else [own] if isinstance(own, int) else list(own)
    return sorted({*ends, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])})


def in_batches(prompts: Sequence[Sequence[int]], at_once: int) -> list[list[int]]:
    """Places of prompts, in batches of at most `at_once` tokens, those of like lengths together: little is read that is padding."""
    places = sorted(range(len(prompts)), key=lambda place: (len(prompts[place]), place))
    batches: list[list[int]] = []
    for place in places:
        length = len(prompts[place])
        last = batches[-1] if batches else []
        alike = last and (length <= SHORT or length <= MOST_PADDED * len(prompts[last[0]]))
        if alike and length * (len(last) + 1) <= at_once:
            last.append(place)
        else:
            batches.append([place])
    return batches


def padded(rows: Sequence[Sequence[int]], pad: int, on: Any) -> tuple[Tensor, Tensor]:
    """Token ids `[B, T]` with padding in front, and the mask of real tokens."""
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=on)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=on)
    return ids, mask


class Speaker:
    """A model at its current level, that answers prompts."""

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer, self.stops = model.eval(), tokenizer, stops_of(model, tokenizer)
        self.decoder = GraphDecoder(model) if model.device.type == "cuda" else model
        self.pad = next((token for token in (tokenizer.pad_token_id, *self.stops) if token is not None), 0)
        self.at_once = TOKENS_AT_ONCE.get(model.device.type, TOKENS_AT_ONCE["cpu"])

    @torch.no_grad()
    def answers(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, temperature: float | None = None, seed: int = 0, what: str = "answers"
    ) -> list[list[int]]:
        """Tokens of each answer up to its end, that included; greedy without a temperature, and with one drawn with the same seeds at
        every level."""
        draws: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature is not None:
            draws = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        answers: list[list[int]] = [[] for _ in prompts]
        for number, places in enumerate(bar(in_batches(prompts, self.at_once), desc=what, unit=" batches")):

            def run(size: int, places: list[int] = places, number: int = number) -> list[list[int]]:
                rows: list[list[int]] = []
                for begin in range(0, len(places), size):
                    ids, mask = padded([prompts[place] for place in places[begin : begin + size]], self.pad, self.model.device)
                    torch.manual_seed(10_000 * seed + number)
                    more: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_token_id": self.stops or None, "pad_token_id": self.pad}
                    out = self.decoder.generate(input_ids=ids, attention_mask=mask, repetition_penalty=1.0, **draws, **more)
                    rows += [self._ended(row) for row in out[:, ids.shape[1] :].tolist()]
                return rows

            for place, row in zip(places, halve_until_it_fits(run, len(places), what), strict=True):
                answers[place] = row
        return answers

    def texts(self, answers: Sequence[Sequence[int]]) -> list[str]:
        return [self.tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]

    def _ended(self, tokens: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(tokens) if token in self.stops), len(tokens) - 1)
        return tokens[: end + 1]


# --- measuring --------------------------------------------------------------------------------------------------


@torch.no_grad()
def along(
    speaker: Speaker, teacher: Callable[..., Tensor], prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[list[list[bool]], list[float]]:
    """Along given answers, all before each token of them given: whether the model puts that token first, and for each answer the mean
    KL(teacher || model) in nats per token, both at `TEMPERATURE`.

    Args:
        teacher: logits `[B, N, vocabulary]` of the last N - 1 tokens' predictions, from `ids, mask, N`.
    """
    agreed: list[list[bool]] = [[] for _ in prompts]
    kl = [0.0] * len(prompts)
    # Behind short answers comes padding that nothing before it sees, so that all answers of a batch begin at one place.
    for places in bar(in_batches(prompts, speaker.at_once), desc="agreement", unit=" batches"):

        def run(size: int, places: list[int] = places) -> None:
            for begin in range(0, len(places), size):
                part = places[begin : begin + size]
                ids, mask = padded([prompts[place] for place in part], speaker.pad, speaker.model.device)
                longest = max(len(answers[place]) for place in part)
                said = torch.tensor([[*answers[place], *[speaker.pad] * (longest - len(answers[place]))] for place in part])
                real = torch.tensor([[1] * len(answers[place]) + [0] * (longest - len(answers[place])) for place in part])
                said, real = said.to(ids.device), real.to(ids.device)
                ids, mask = torch.cat([ids, said], 1), torch.cat([mask, torch.ones_like(said)], 1)
                own = last_logits(speaker.model, ids, mask, longest + 1)[:, :-1]
                of_teacher = teacher(ids, mask, longest + 1)[:, :-1]
                same = own.argmax(-1) == said
                for row, place in enumerate(part):
                    seen = real[row].bool()
                    agreed[place] = same[row][seen].tolist()
                    kl[place] = kl_loss(own[row : row + 1, seen] / TEMPERATURE, of_teacher[row : row + 1, seen] / TEMPERATURE).item()

        halve_until_it_fits(run, len(places), "agreement")
    return agreed, kl


def last_logits(model: Any, ids: Tensor, mask: Tensor, count: int) -> Tensor:
    """fp32 `[B, count, vocabulary]`: those of the last `count` tokens."""
    given = {} if bool(mask.all()) else {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
    return model(input_ids=ids, use_cache=False, logits_to_keep=count, **given).logits.float()


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """Place of the first token in which two answers differ, 0 that of their first token; None if they are the same."""
    if list(one) == list(other):
        return None
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def share(name: str, right: Sequence[bool]) -> dict[str, Any]:
    """A share, its interval of 95 %, and which were right (`1`, in order)."""
    low_high = wilson(sum(right), len(right))
    return {name: sum(right) / len(right), f"{name}_interval": low_high, f"{name}_found": "".join("01"[bool(x)] for x in right)}


def agreement(
    speaker: Speaker, teacher: Callable[..., Tensor], asked: Sequence[Asked], reference: Sequence[Sequence[int]], new_tokens: int
) -> dict[str, Any]:
    """A level beside the reference, for short and for long prompts."""
    row: dict[str, Any] = {}
    for kind in ("short", "long"):
        chosen = [i for i, one in enumerate(asked) if one.kind == kind]
        prompts, given = [asked[i].input_ids for i in chosen], [reference[i] for i in chosen]
        agreed, kl = along(speaker, teacher, prompts, given)
        answers = speaker.answers(prompts, new_tokens, what=f"answers, {kind}")
        places = [first_difference(one, other) for one, other in zip(answers, given, strict=True)]
        tokens = [token for one in agreed for token in one]
        row |= {
            f"agreement_{kind}": sum(tokens) / len(tokens),
            **share(f"identical_{kind}", [place is None for place in places]),
            f"first_difference_{kind}": mean([place for place in places if place is not None]),
            f"kl_{kind}": sum(x * len(one) for x, one in zip(kl, agreed, strict=True)) / len(tokens),
            f"tokens_{kind}": len(tokens),
        }
    return row


def formats(speaker: Speaker, asked: Sequence[Asked], seed: int) -> dict[str, Any]:
    """Shares of answers that have the format asked for, by rule and altogether, greedily and at `TEMPERATURE`, and their lengths."""
    chosen = [one for one in asked if one.kind == "format"]
    prompts, row = [one.input_ids for one in chosen], {}
    for name, temperature in (("format", None), ("format_drawn", TEMPERATURE)):
        answers = speaker.answers(prompts, FORMAT_TOKENS, temperature, seed, what=name.replace("_", "s, "))
        texts = speaker.texts(answers)
        right = [RULES[one.rule].holds(text) for one, text in zip(chosen, texts, strict=True) if one.rule is not None]
        row |= share(name, right) | {f"{name}_tokens": mean([len(answer) for answer in answers])}
        for length in (False, True):
            its = [x for x, one in zip(right, chosen, strict=True) if bool(one.length) == length]
            row[f"{name}_{('short', 'long')[length]}"] = mean(its)
        if temperature is None:
            row |= {f"format of {rule}": mean([x for x, one in zip(right, chosen, strict=True) if one.rule == rule]) for rule in RULES}
    return row


def choices(speaker: Speaker, asked: Sequence[Asked]) -> dict[str, Any]:
    """Choices by letter: right ones over all rotations, questions right in all four, and answers that name a letter at all."""
    chosen = [one for one in asked if one.kind == "choice"]
    named = [letter_of(text) for text in speaker.texts(speaker.answers([one.input_ids for one in chosen], LETTER_TOKENS, what="choices"))]
    right = [letter == one.letter for letter, one in zip(named, chosen, strict=True)]
    by_question: dict[int, list[bool]] = {}
    for one, found in zip(chosen, right, strict=True):
        by_question.setdefault(one.question, []).append(found)
    everywhere = [all(found) for found in by_question.values()]
    return (
        share("choice", right)
        | share("choice_all", everywhere)
        | {"choice_named": sum(letter is not None for letter in named) / len(named), "choice_letters": "".join(x or "-" for x in named)}
    )


def codes(model: Any, tasks: dict[str, Task]) -> dict[str, Any]:
    return {name: value for label, task in tasks.items() for name, value in share(label, codes_found(model, task)).items()}


def make_codes(tokenizer: Any, data: Path, sizes: Sizes, probes: int, seed: int) -> dict[str, Task]:
    """Codes and chains of assignments in held-out novels, or in the help texts of Python where there are none."""
    path = data / "novels_val.jsonl.xz"
    hay: Haystack = read_haystack(tokenizer, path if path.exists() else None)
    tasks = prepare(tokenizer, list(CODE_TASKS.values()), sizes.code_lengths, probes, seed, hay)
    labels = {task: label for label, task in CODE_TASKS.items()}
    return {f"{labels[task.name]}_{task.length}": task for task in tasks}


class Reference:
    """Level 0 in float32: its greedy answers, and its logits along them."""

    def __init__(self, model_name: str, tokenizer: Any):
        self.model = load_model(model_name, "float32").to(device()).eval()
        self.speaker = Speaker(self.model, tokenizer)

    def answers(self, asked: Sequence[Asked], new_tokens: int) -> list[list[int]]:
        return self.speaker.answers([one.input_ids for one in asked], new_tokens, what="reference")

    def logits(self, ids: Tensor, mask: Tensor, count: int) -> Tensor:
        return last_logits(self.model, ids, mask, count)


def measure(options: argparse.Namespace) -> None:
    """The noise floor and the levels of an adapter, a row each, written after each; rows that are there stay.

    Raises:
        ValueError: for a level that the adapter does not have, or a file with rows that were measured otherwise.
    """
    tokenizer, sizes = load_tokenizer(options.model), sizes_of(options)
    training = options.adapter / TRAINING
    how = json.loads(training.read_text()) if training.exists() else None
    arm = options.arm or (how["arm"] if how else options.adapter.name)
    about: dict[str, Any] = {"arm": arm, "model": Path(options.model).name, "seed": options.seed, "parts": options.parts, "training": how}
    about |= {"dtype": options.dtype, "probes": options.probes, "sizes": sizes_in_words(sizes)}
    rows: list[dict[str, Any]] = []
    reference: list[list[int]] | None = None
    if options.out.exists():
        before = json.loads(options.out.read_text())
        if changed := [name for name, value in about.items() if before.get(name) != json.loads(json.dumps(value))]:
            raise ValueError(f"{options.out} was measured with another {', '.join(changed)}: name another --out")
        rows, reference = before["rows"], before["reference"]
    model = load_adapter(options.model, str(options.adapter), options.dtype).to(device()).eval()
    config, layers = active_config(model), model.config.num_hidden_layers
    all_heads = layers * config.kv_heads
    levels = plan_of_levels(options.kept, config.conversion_unit, layers, config.kv_heads)
    wanted: dict[int, int] = {all_heads: 0} | {kept: config.check_level(level) for kept, level in levels.items()}
    left = {kept: level for kept, level in wanted.items() if kept not in {row["kept"] for row in rows}}
    if not left:
        say(f"{options.out} has all levels")
        return
    asked = make_asked(tokenizer, options.data, sizes.counts, options.seed)
    tasks = make_codes(tokenizer, options.data, sizes, options.probes, options.seed) if "codes" in options.parts else {}
    chats = [one for one in asked if one.kind in ("short", "long")]

    def write() -> None:
        # What each prompt was answered at level 0 is needed to go on with other levels.
        write_results(options.out.stem, rows, command_of(options), folder=options.out.parent, **about, reference=reference)

    teacher = Reference(options.model, tokenizer) if "agreement" in options.parts else None
    if teacher is not None and reference is None:
        start = time.perf_counter()
        reference = teacher.answers(chats, sizes.answer_tokens)
        write()
        say(f"level 0 in float32 has answered {len(chats)} prompts ({time.perf_counter() - start:.0f} s)")
    for kept, level in left.items():
        set_level(model, level)
        start = time.perf_counter()
        speaker = Speaker(model, tokenizer)
        row: dict[str, Any] = {"arm": arm, "kept": kept, "of": all_heads, "level": level, "window": config.window_size}
        if teacher is not None and reference is not None:
            row |= agreement(speaker, teacher.logits, chats, reference, sizes.answer_tokens)
        if "formats" in options.parts:
            row |= formats(speaker, asked, options.seed)
        if "choices" in options.parts:
            row |= choices(speaker, asked)
        row |= codes(model, tasks) | cache_bytes(model, level)
        row |= {"device": origin()["device"], "seconds": round(time.perf_counter() - start, 1)}
        rows.append(row)
        write()
        told = [f"{name} {row[name]:.3f}" for name in ("agreement_short", "agreement_long", "format", "choice") if name in row]
        told += [f"{name} {row[name]:.3f}" for name in tasks]
        say(f"{arm}, {kept} kept: {', '.join(told)} ({row['seconds']:.0f} s)")


def sizes_in_words(sizes: Sizes) -> dict[str, Any]:
    counts = sizes.counts
    return {
        **{name: getattr(counts, name) for name in ("short", "long", "formats_short", "formats_long", "choices")},
        "lengths": list(counts.lengths),
        "code_lengths": list(sizes.code_lengths),
        "answer_tokens": sizes.answer_tokens,
    }


# --- page -------------------------------------------------------------------------------------------------------


def join(files: Sequence[Path]) -> dict[str, Any]:
    """Rows of all files, the floor's first, each with its share of the floor's agreement and, of what level 0 got right, what it keeps.

    Raises:
        ValueError: if arms come twice, or files were measured otherwise.
    """
    parts = [json.loads(file.read_text()) for file in files]
    arms = [part["arm"] for part in parts]
    if len(set(arms)) < len(arms):
        raise ValueError(f"each arm needs one file, got {arms}: --arm names them")
    for name in ("model", "versions", "seed", "parts", "dtype", "probes", "sizes", "reference"):
        if len({json.dumps(part[name], sort_keys=True) for part in parts}) > 1:
            raise ValueError(f"files differ in {name}, so they do not compare")
    floor = next((row for part in parts for row in part["rows"] if row["level"] == 0), None)
    if floor is None:
        raise ValueError("no file has level 0: measure one of them to its end")
    rows = [{**floor, "arm": "floor", "window": None}]
    rows += [{**row, "arm": part["arm"]} for part in parts for row in part["rows"] if row["level"] > 0]
    for row in rows:
        for kind in ("short", "long"):
            if f"agreement_{kind}" in row:
                row[f"agreement_share_{kind}"] = row[f"agreement_{kind}"] / floor[f"agreement_{kind}"]
        for name in [name.removesuffix("_found") for name in row if name.endswith("_found") and not name.startswith("identical")]:
            pairs = list(zip(floor[f"{name}_found"], row[f"{name}_found"], strict=True))
            row[f"{name}_lost"], row[f"{name}_gained"] = pairs.count(("1", "0")), pairs.count(("0", "1"))
            held = pairs.count(("1", "1")) + row[f"{name}_lost"]
            row[f"{name}_kept"] = pairs.count(("1", "1")) / held if held else None
    shared = {name: parts[0][name] for name in ("model", "versions", "seed", "parts", "dtype", "probes", "sizes")}
    shared["device"] = ", ".join(sorted({row["device"] for row in rows}))
    commands = {part["arm"]: part["command"] for part in parts}
    return {**shared, "training": {part["arm"]: part["training"] for part in parts}, "commands": commands, "rows": rows}


def number(value: Any, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def with_interval(row: dict[str, Any], name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} ({low:.2f} to {high:.2f})"


def agreement_table(rows: Sequence[dict[str, Any]], kind: str) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        values = [number(row[f"{name}_{kind}"], 4) for name in ("agreement", "agreement_share")]
        identical = f"{row[f'identical_{kind}_found'].count('1')} of {len(row[f'identical_{kind}_found'])}"
        return [row["arm"], str(row["kept"]), *values, identical, number(row[f"first_difference_{kind}"], 1), number(row[f"kl_{kind}"], 4)]

    return markdown_table(["arm", "kept", *WORDS.values()], map(cells, rows))


def formats_table(rows: Sequence[dict[str, Any]]) -> str:
    names = {"format_short": "short", "format_long": "long", "format_drawn": f"at {TEMPERATURE}", "format_kept": "kept of level 0's"}

    def cells(row: dict[str, Any]) -> list[str]:
        lengths = [number(row[f"{name}_tokens"], 1) for name in ("format", "format_drawn")]
        return [row["arm"], str(row["kept"]), with_interval(row, "format"), *(number(row[name]) for name in names), *lengths]

    return markdown_table(["arm", "kept", "format met", *names.values(), "tokens", f"tokens at {TEMPERATURE}"], map(cells, rows))


def rules_table(rows: Sequence[dict[str, Any]]) -> str:
    return markdown_table(
        ["arm", "kept", *RULES], ([row["arm"], str(row["kept"]), *(number(row[f"format of {rule}"], 2) for rule in RULES)] for row in rows)
    )


def choices_table(rows: Sequence[dict[str, Any]]) -> str:
    def cells(row: dict[str, Any]) -> list[str]:
        return [row["arm"], str(row["kept"]), with_interval(row, "choice"), with_interval(row, "choice_all"), number(row["choice_named"])]

    return markdown_table(["arm", "kept", "right", "in all four rotations", "answers with a letter"], map(cells, rows))


def codes_table(rows: Sequence[dict[str, Any]]) -> str:
    labels = code_labels(rows[0])
    head = [f"{label.split('_')[0]}, {int(label.split('_')[1]):,}" for label in labels]
    return markdown_table(
        ["arm", "kept", *head], ([row["arm"], str(row["kept"]), *(with_interval(row, label) for label in labels)] for row in rows)
    )


def code_labels(row: dict[str, Any]) -> list[str]:
    """Names such as `code_1024`."""
    return [name for name in row if name.split("_")[0] in CODE_TASKS and name.split("_")[-1].isdecimal()]


def trained(training: dict[str, dict[str, Any] | None]) -> str:
    """How the arms were trained that `eval/heads.py` trained."""
    known = {arm: how for arm, how in training.items() if how}
    return f"{how_trained(known)}\n\n" if known else ""


def page_text(joined: dict[str, Any], name: str) -> str:
    rows, sizes, parts = joined["rows"], joined["sizes"], joined["parts"]
    lengths = f"{min(sizes['lengths']):,} to {max(sizes['lengths']):,} tokens"
    text = f"""# Answers, measured on {joined["model"]}

Made by `python eval/answers.py`, whose result is `eval/results/{name}.json`: {joined["model"]}, {joined["device"]},
torch {joined["versions"]["torch"]}, transformers {joined["versions"]["transformers"]}; levels in {joined["dtype"]}.
Everything here is generated and then judged. Arms are adapters, `kept` the KV heads that stay softmax attention
([levels](../levels.md#heads)). Tasks scored by the likelihood of choices are not here: where their texts fit into the window, it alone
reads them, whatever the states do ([evaluate](../evaluate.md#texts-that-the-window-holds)).

{trained(joined["training"])}`floor` is level 0 in {joined["dtype"]} beside level 0 in float32, measured as the
levels are: what rounding alone changes.

![agreement, formats, choices and codes against KV heads kept](../images/{name}.png)
"""
    if "agreement" in parts:
        text += f"""
## Agreement with level 0

Level 0 in float32 answers {sizes["short"]} short questions and {sizes["long"]} documents of {lengths} with an instruction
behind them, greedily, by at most {sizes["answer_tokens"]} tokens. Top-1 agreement: the share of these tokens that a level puts first
where all before them are given, and that as a share of the floor's. Identical: its own greedy answers that are the same to the last
token; of the others, the mean place of the first token that differs. KL: of level 0 in float32 to the level along these answers, both at
temperature {TEMPERATURE}, in nats per token.

Short questions:

{agreement_table(rows, "short")}

Long documents:

{agreement_table(rows, "long")}
"""
    if "formats" in parts:
        count = len(rows[0]["format_found"])
        text += f"""
## Formats

{count} instructions whose outcome a rule checks ({", ".join(RULES)}), about a topic (short) or a document of {lengths}
before them (long): the share met greedily, with an interval of 95 % (Wilson), and drawn at temperature {TEMPERATURE} with the same
seeds; of what level 0 met greedily the share that a level meets too; tokens of an answer, at most {FORMAT_TOKENS}.

{formats_table(rows)}

By rule, greedily:

{rules_table(rows)}
"""
    if "choices" in parts:
        text += f"""
## Choices by letter

{sizes["choices"]} documents of {lengths}, each with four sentences of which one stands in its first half and three in other
documents, asked four times with the right one as A, B, C and D. The letter is what the model writes. Chance is 0.25; a model that always
writes the same letter has it too.

{choices_table(rows)}
"""
    if "codes" in parts:
        text += f"""
## Codes and chains

{joined["probes"]} prompts of each length: a number that the text says once, and the value that a chain of assignments gives a variable
(`tracking`), through `generate`.

{codes_table(rows)}
"""
    return text


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """What was measured against KV heads kept, a line an arm; dotted the floor."""
    floor = rows[0]
    names = {
        "agreement_short": "top-1 agreement, short",
        "agreement_long": "top-1 agreement, long",
        "format": "format met",
        "choice": "choices by letter",
        **{label: f"{label.split('_')[0]} in {int(label.split('_')[1]):,} tokens" for label in code_labels(floor)},
    }
    names = {name: title for name, title in names.items() if name in floor}
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    drawn, axes = figure(lines, columns, size=(3.6 * columns, 3.0 * lines))
    arms = list(dict.fromkeys(row["arm"] for row in rows[1:]))
    kept = sorted({row["kept"] for row in rows[1:]})
    for axis, (name, title) in zip(axes, names.items(), strict=False):
        axis.axhline(floor[name], color="grey", linewidth=0.8, linestyle=":", label="floor")
        for place, arm in enumerate(arms):
            own = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["kept"])
            x = [row["kept"] for row in own]
            axis.plot(x, [row[name] for row in own], marker="o", markersize=3, color=f"C{place % 10}", label=arm)
            if f"{name}_interval" in own[0]:
                low, high = zip(*(row[f"{name}_interval"] for row in own), strict=True)
                axis.fill_between(x, low, high, color=f"C{place % 10}", alpha=0.12, linewidth=0)
        axis.set_xscale("symlog", linthresh=3)  # 0 is a value
        axis.set_xticks(kept, labels=[str(value) for value in kept])
        axis.minorticks_off()
        axis.set(title=title, xlabel="KV heads kept")
        mark_plain(axis.yaxis)
    for axis in axes[len(names) :]:
        axis.set_visible(False)
    axes[0].legend()
    save(drawn, path)


def put_in_nav(site: Path, written: str) -> None:
    """Name a page in the site's navigation, behind the other measurements; the site is not built with pages that it does not name."""
    lines = site.read_text().splitlines() if site.exists() else []
    measured = [place for place, line in enumerate(lines) if line.strip().startswith("- measured/")]
    if measured and not any(line.strip() == f"- {written}" for line in lines):
        indent = lines[measured[-1]].partition("-")[0]
        lines.insert(measured[-1] + 1, f"{indent}- {written}")
        write_whole(site, "\n".join(lines) + "\n")


def page(options: argparse.Namespace) -> None:
    """Join files of levels into results, a page of the docs, and its plot."""
    joined = join(options.files)
    rest = {name: value for name, value in joined.items() if name != "rows"}
    file = write_results(options.name, joined["rows"], command_of(options), folder=options.results, **rest)
    plot, written = options.docs / "images" / f"{options.name}.png", options.docs / "measured" / f"{options.name}.md"
    draw(joined["rows"], plot)
    write_whole(written, page_text(joined, options.name))
    put_in_nav(options.docs.parent / "mkdocs.yml", f"measured/{options.name}.md")
    say(f"written: {file}, {written}, {plot}")


# --- command ----------------------------------------------------------------------------------------------------


def command_of(options: argparse.Namespace) -> str:
    """The call, with names of files in place of their paths."""
    return " ".join(["python eval/answers.py", *(Path(word).name if os.sep in word else word for word in options.words)])


def parse(words: Sequence[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    if words[:1] == ["page"]:
        parser = argparse.ArgumentParser(prog="answers.py page", description=__doc__, formatter_class=raw)
        parser.add_argument("files", type=Path, nargs="+")
        parser.add_argument("--results", type=Path, default=RESULTS)
        parser.add_argument("--docs", type=Path, default=DOCS)
        parser.add_argument("--name", default=NAME, help="of the result and the page (default: %(default)s)")
        return argparse.Namespace(part="page", **vars(parser.parse_args(words[1:])))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", help="folder of the checkpoint and its tokenizer; or `page`, to join results")
    parser.add_argument("data", type=Path, help="folder with held-out texts")
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help=".json")
    parser.add_argument("--arm", help="name of the adapter in tables (default: that of its training, or of its folder)")
    parser.add_argument("--kept", type=lambda text: [int(part) for part in text.split(",")], default=list(KEPT), help="KV heads")
    parser.add_argument("--prompts", type=int, default=200, help="short and long ones together; formats and choices in proportion")
    parser.add_argument("--probes", type=int, default=100, help="prompts with a code, of each length and task")
    parser.add_argument("--without", nargs="+", choices=PARTS, default=[], help="parts to leave out")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the levels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a random model on a CPU")
    options = parser.parse_args(words)
    if options.out.suffix != ".json":
        parser.error(f"--out {options.out} must end in .json")
    options.parts = [part for part in PARTS if part not in options.without]
    if not options.parts:
        parser.error("--without leaves nothing to measure")
    for name in ("prompts", "probes"):
        try:
            check_at_least_one(f"--{name}", getattr(options, name))
        except ValueError as error:
            parser.error(str(error))
    options.part = "measure"
    return options


def main(words: list[str] | None = None) -> None:
    given = list(sys.argv[1:] if words is None else words)
    options = parse(given)
    options.words = given
    {"measure": measure, "page": page}[options.part](options)


if __name__ == "__main__":
    main()
