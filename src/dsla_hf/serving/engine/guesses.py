"""What may come next in running texts: by the model itself at a higher level, or by what followed the same tokens before."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ...inference.draws import Row, exactly, sent
from .checks import run_recorded
from .draft_memory import CATCH_UP, PIECES, DraftMemory
from .request import Request
from .runner import ModelRunner

GRAMS = (3, 2)  # tokens that are looked for, the longer ones first


class Guesses(Protocol):
    """Guesses tokens."""

    def guess(self, level: int, requests: Sequence[Request], most: int) -> list[list[int]]:
        """Of each of the texts, which are at `level`, `most` tokens that may come next, or fewer."""


class LookupGuesses:
    """What followed the last tokens of a text where they came before (prompt lookup: Saxena, 2023; in transformers
    `prompt_lookup_num_tokens`)."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[Request, _Grams] = weakref.WeakKeyDictionary()

    def guess(self, level: int, requests: Sequence[Request], most: int) -> list[list[int]]:
        return [self._known.setdefault(request, _Grams()).following(request.text, most) for request in requests]


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
    """A slot for drafts: whose text is in it, how many tokens of that are in its states; and a `runner.Running` for its guesses."""

    slot: int
    request: Request | None = None
    folded: int = 0
    tokens: list[int] = field(default_factory=list)
    cached: int = 0


class LevelGuesses:
    """What the model at a level above that of the texts gives. Draws race with the noise of the check, so that a guess is right where both
    levels mostly agree.

    Args:
        memory, runner: of the drafts. longest: tokens of a draft at most.
    """

    def __init__(self, memory: DraftMemory, runner: ModelRunner, longest: int):
        self.memory, self.runner, self.longest = memory, runner, longest
        self._drafts = [_Draft(slot) for slot in range(memory.num_slots)]
        # Of each draft its slot, that of its text, tokens in its states, and how many come to them.
        self.inputs = torch.zeros(memory.num_slots, 4, dtype=torch.long, device=memory.levels.device)

    @torch.no_grad()
    def guess(self, level: int, requests: Sequence[Request], most: int) -> list[list[int]]:
        drafts = self._placed(requests)
        for draft, request in zip(drafts, requests, strict=True):
            self._come_near(draft, request, level)
        self._follow(level, drafts, [request.cached - draft.folded for draft, request in zip(drafts, requests, strict=True)])
        for draft, request in zip(drafts, requests, strict=True):
            draft.folded, draft.tokens, draft.cached = request.cached, request.tokens[-1:], request.cached
        sampled = [number for number, request in enumerate(requests) if request.sampling.temperature > 0]
        for place in range(most):
            logits = self.runner.decode(self.memory.level, drafts)
            for draft, token in zip(drafts, self._chosen(logits, requests, sampled, place), strict=True):
                draft.tokens.append(token)
                draft.cached += 1
        return [draft.tokens[1:] for draft in drafts]

    def prepare(self) -> None:
        """Record the steps of drafts, where steps are recorded."""
        self.runner.prepare([self.memory.level])

    def _chosen(self, logits: Tensor, requests: Sequence[Request], sampled: list[int], place: int) -> list[int]:
        tokens = logits.argmax(-1)
        if sampled:
            where = sent(torch.tensor(sampled), logits.device)
            rows = [Row(requests[number].sampling, requests[number].seed, requests[number].length + place) for number in sampled]
            tokens[where] = exactly(logits[where], rows)
        return tokens.tolist()

    def _placed(self, requests: Sequence[Request]) -> list[_Draft]:
        """The drafts of these texts, in slots of their own."""
        held = {draft.request: draft for draft in self._drafts if draft.request in requests}
        others = (draft for draft in self._drafts if draft.request not in requests)
        free = iter(sorted(others, key=lambda draft: draft.request is not None and draft.request.finished is None))
        for request in requests:
            if request not in held:
                held[request] = draft = next(free)
                draft.request, draft.folded = request, 0
        return [held[request] for request in requests]

    def _come_near(self, draft: _Draft, request: Request, level: int) -> None:
        """After a pause, or at the beginning: so that a step folds what remains."""
        assert request.slot is not None
        behind = request.cached - draft.folded
        if draft.folded == 0 or behind < 0 or behind > CATCH_UP * PIECES:
            self.memory.begin(draft.slot, request.slot, request.cached, level)
            draft.folded = request.cached
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
        self.inputs[:rows].copy_(torch.tensor(given))

        def step() -> None:
            self.memory.follow(self.inputs[:rows], width, level)

        run_recorded(self.runner, ("follow", level, rows, width), step)
