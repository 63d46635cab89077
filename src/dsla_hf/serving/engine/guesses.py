"""What may come next in running texts: by the model itself at a higher level, or by what followed the same tokens before."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core.past import changes_window_alone
from ...core.transfers import sent
from ...inference.draws import Row, draw
from ...inference.recorder import power_of_two
from .checks import run_recorded
from .draft_memory import CATCH_UP, PIECES, DraftMemory
from .request import Request
from .runner import ModelRunner

GRAMS = (3, 2)  # tokens that are looked for, the longer ones first


class Guesses(Protocol):
    """Guesses tokens."""

    def guess(self, level: int, requests: Sequence[Request], rooms: list[int]) -> list[list[int]] | Tensor:
        """Of each of the texts, which are at `level`, as many tokens that may come next as it has room for, or fewer; `[R, most]` where the
        host does not know them, who then finds as many as there is room for."""


class LookupGuesses:
    """What followed the last tokens of a text where they came before (prompt lookup: Saxena, 2023; in transformers
    `prompt_lookup_num_tokens`)."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Request, _Grams] = weakref.WeakKeyDictionary()

    def guess(self, level: int, requests: Sequence[Request], rooms: list[int]) -> list[list[int]]:
        found = (self._known.setdefault(request, _Grams()) for request in requests)
        return [grams.following(request.text, room) for grams, request, room in zip(found, requests, rooms, strict=True)]


class _Grams:
    """Of a text that grows, where runs of tokens came last, those at its end not counted."""

    def __init__(self) -> None:
        self.places: dict[tuple[int, ...], int] = {}
        self.seen = 0

    def following(self, text: list[int], most: int) -> list[int]:
        for place in range(self.seen, len(text)):
            for size in GRAMS:
                if place >= size:
                    self.places[tuple(text[place - size : place])] = place
        self.seen = len(text)
        found = (self.places.get(tuple(text[-size:])) for size in GRAMS)
        place = next((place for place in found if place is not None), len(text))
        return text[place : place + most]


@dataclass
class _Draft:
    """A slot for drafts: whose text is in it, at which level, and how many tokens of it are in its states; spoilt: whether guesses have
    changed more than places of windows in these, or they were made anew."""

    slot: int
    request: Request | None = None
    level: int = 0
    folded: int = 0
    spoilt: bool = True


class LevelGuesses:
    """What the model at a level above that of the texts gives. Draws race with the noise of the check, so that a guess is right where both
    levels mostly agree.

    A guess is the next token of the step that makes it, on the device: the host waits for none, and knows none before the check.

    Args:
        memory, runner: of the drafts. longest: tokens of a draft at most.
    """

    def __init__(self, memory: DraftMemory, runner: ModelRunner, longest: int):
        self.memory, self.runner, self.longest = memory, runner, longest
        self._drafts = [_Draft(slot) for slot in range(memory.num_slots)]
        slots, device = memory.num_slots, memory.levels.device
        # Of each draft its slot, that of its text, tokens in its states, and how many come to them.
        self.inputs = torch.zeros(slots, 4, dtype=torch.long, device=device)
        # By slot the token that is read next, tokens before it, and guesses that are wanted; how many have been made, and these.
        self.steps = torch.zeros(slots, 3, dtype=torch.long, device=device)
        self.made = torch.zeros(1, dtype=torch.long, device=device)
        self.guesses = torch.zeros(slots, longest, dtype=torch.long, device=device)
        self._logits: Tensor | None = None  # [slots, V]
        self._read_by: dict[Hashable, list[Any]] = {}  # as `GraphRunner` has it

    @torch.no_grad()
    def guess(self, level: int, requests: Sequence[Request], rooms: list[int]) -> Tensor:
        drafts = self._placed(requests)
        for draft, request in zip(drafts, requests, strict=True):
            self._come_near(draft, request, level)
        self._follow(level, drafts, [request.cached - draft.folded for draft, request in zip(drafts, requests, strict=True)])
        most, device = max(rooms), self.steps.device
        count = max(draft.slot for draft in drafts) + 1
        given = [[0, 0, 0] for _ in range(count)]
        for draft, request, room in zip(drafts, requests, rooms, strict=True):
            draft.folded, draft.level = request.cached, level
            draft.spoilt = not self._in_window(request.cached, room)
            given[draft.slot] = [request.tokens[-1], request.cached, room]
        self._begin(given)
        sampled = [number for number, request in enumerate(requests) if request.sampling.temperature > 0]
        slots = sent(torch.tensor([draft.slot for draft in drafts]), device)
        where = slots if len(sampled) == len(drafts) else sent(torch.tensor([drafts[number].slot for number in sampled]), device)
        past = self.runner.past([before + most for _, before, _ in given])
        for place in range(most):
            self.step(count, past)
            if sampled:
                assert self._logits is not None
                rows = [Row(requests[number].sampling, requests[number].seed, requests[number].length + place) for number in sampled]
                tokens, _ = draw(self._logits[where], rows)  # one that is not sure may be wrong, as any guess
                self.steps[where, 0] = self.guesses[where, place] = tokens
        return self.guesses[slots, :most]

    def step(self, count: int, past: int) -> None:
        """One more guess in the first `count` slots, the likeliest; `past` as `ModelRunner.past` has it."""
        rows, level = min(power_of_two(count), self.memory.num_slots), self.memory.level
        key = "guess", level, rows, past

        def step() -> None:
            tokens, read, wanted = self.steps[:rows].t().contiguous()
            active = self.made < wanted  # behind the room of a text there is no place for what it would write
            logits = self.runner.step(level, tokens, read, active, past)
            if self._logits is None:
                self._logits = logits.new_empty(self.memory.num_slots, logits.shape[1])
            self._logits[:rows].copy_(logits)
            guess = logits.argmax(-1)
            self.guesses[:rows].index_copy_(1, self.made, guess[:, None])
            self.steps[:rows, 0].copy_(guess)
            self.steps[:rows, 1].add_(1)
            self.made.add_(1)
            self._read_by[key] = self.memory.levels.attentions_in_part()

        run_recorded(self.runner, key, step)

    @torch.no_grad()
    def prepare(self) -> None:
        """Record the steps of drafts, where steps are recorded. For an idle engine."""
        slots = self.memory.num_slots
        for rows in sorted({min(power_of_two(count), slots) for count in range(1, slots + 1)}):
            for _ in range(2):  # as it is, then recorded
                self._begin([[0, 0, 0]] * rows)  # nobody's
                self.step(rows, self.runner.past([0]))

    def _begin(self, given: list[list[int]]) -> None:
        """given: of the first slots, as `steps` has it."""
        rows = min(power_of_two(len(given)), self.memory.num_slots)
        given = [*given, *[[0, 0, 0]] * (rows - len(given))]
        self.steps[:rows].copy_(sent(torch.tensor(given), self.steps.device))
        self.made.zero_()

    def _in_window(self, before: int, tokens: int) -> bool:
        return changes_window_alone(before, tokens, self.longest + 1, *self.memory.shape)

    def _placed(self, requests: Sequence[Request]) -> list[_Draft]:
        """The drafts of these texts, in slots of their own."""
        held = {draft.request: draft for draft in self._drafts if draft.request in requests}
        others = (draft for draft in self._drafts if draft.request not in requests)
        free = iter(sorted(others, key=lambda draft: draft.request is not None and draft.request.finished is None))
        for request in requests:
            if request not in held:
                held[request] = draft = next(free)
                draft.request, draft.folded, draft.spoilt = request, 0, True
        return [held[request] for request in requests]

    def _come_near(self, draft: _Draft, request: Request, level: int) -> None:
        """After a pause, or at the beginning: so that a step folds what remains."""
        assert request.slot is not None
        behind = request.cached - draft.folded
        if draft.folded == 0 or behind < 0 or behind > CATCH_UP * PIECES:
            self.memory.begin(draft.slot, request.slot, request.cached, level)
            draft.folded, draft.spoilt = request.cached, True
        while (behind := request.cached - draft.folded) > self.longest + 1:
            count = min(behind, CATCH_UP)
            one = torch.tensor([[draft.slot, request.slot, draft.folded, count]], device=self.memory.levels.device)
            self.memory.follow(one, CATCH_UP, level)
            draft.folded += count

    def _follow(self, level: int, drafts: list[_Draft], counts: list[int]) -> None:
        rows, width = len(drafts), self.longest + 1
        given = [
            (draft.slot, draft.request.slot, draft.folded, count) for draft, count in zip(drafts, counts, strict=True) if draft.request
        ]
        in_window = all(
            not draft.spoilt and draft.level == level and self._in_window(draft.folded, count)
            for draft, count in zip(drafts, counts, strict=True)
        )
        self.inputs[:rows].copy_(sent(torch.tensor(given), self.inputs.device))

        def step() -> None:
            self.memory.follow(self.inputs[:rows], width, level, in_window)

        run_recorded(self.runner, ("follow", level, rows, width, in_window), step)
