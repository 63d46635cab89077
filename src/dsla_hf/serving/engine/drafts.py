"""Drafts of running texts: when there are any, how long they are, and what came of them.

They cost work to save time, so there are some while few texts run and none waits. What a text says does not hang on them: its tokens are
chosen from the logits of its own level, by its own seed, whatever was guessed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ...core.transfers import received
from ...inference.batching import out_of_memory
from ...inference.recorder import Record
from ...levels.draft_length import Lengths
from ...levels.drafting import lengths_for
from .checks import Checks
from .draft_memory import DraftMemory
from .graphs import FOR_MEMORY, GraphRunner
from .guesses import Guesses, LevelGuesses, LookupGuesses
from .levels import Levels
from .request import Request
from .runner import ModelRunner

if TYPE_CHECKING:
    from .engine import EngineOptions

logger = logging.getLogger(__name__)


class Round:
    """A draft of some texts that was read at their level.

    guesses: gives those of each text; not asked before a token is chosen. drafted: how many there are of each. logits:
    `[R, most + 1, V]`, after its last token and after each guess. counts: tokens of each text that stay and are not in its states yet.
    accepted: guesses that were right.
    """

    def __init__(
        self, checks: Checks, requests: Sequence[Request], guesses: Callable[[], list[list[int]]], drafted: list[int], logits: Tensor
    ):
        self.checks, self.requests, self.drafted, self.logits = checks, requests, drafted, logits
        self.counts, self.accepted = [0] * len(drafted), [0] * len(drafted)
        self._guesses = functools.cache(guesses)

    def took(self, number: int, token: int) -> bool:
        """A token of text `number` has been chosen; whether its next one can be told from here, too, if it goes on."""
        place = self.counts[number]
        self.counts[number] += 1
        right = place < self.drafted[number] and self._guesses()[number][place] == token
        self.accepted[number] += right
        return right

    def settle(self, request: Request | None = None) -> None:
        """The states of a text, or of all, take in the tokens that stay."""
        due = [count if request in (None, text) else 0 for text, count in zip(self.requests, self.counts, strict=True)]
        if any(due):
            self.checks.keep(due)
            self.counts = [count - taken for count, taken in zip(self.counts, due, strict=True)]

    def drop(self, request: Request) -> None:
        """The states of a text take in nothing more: nobody goes on from them."""
        self.counts = [0 if request is text else count for count, text in zip(self.counts, self.requests, strict=True)]


class Drafts:
    """Drafts and checks.

    Args:
        guesses: makes drafts. runner: of the texts.
        rows: texts that may run while there are drafts. lengths: of drafts.
        level: of drafts by level, None where texts at any level have them.
        clock: seconds.

    Attributes:
        rounds: calls that checked drafts. drafted, accepted: tokens guessed, and of them those that were right.
    """

    def __init__(self, guesses: Guesses, runner: ModelRunner, rows: int, lengths: Lengths, level: int | None, clock: Callable[[], float]):
        self.guesses, self.rows, self.level, self.clock = guesses, rows, level, clock
        self.lengths = lengths
        self.checks = Checks(runner, rows, self.lengths.longest + 1)
        self.rounds = self.drafted = self.accepted = 0
        self._times = 0.0, 0.0  # when the last draft began, and its check
        self._ended = False
        self._asked = False  # whether there could have been a draft, when that was last asked

    def most(self, level: int, requests: Sequence[Request], running: int, waiting: int) -> int:
        """Tokens to guess now of texts at a level, while so many texts run and wait; 0: none."""
        off = self._ended or running > self.rows or waiting > 0 or (self.level is not None and level >= self.level)
        self._asked = not off and any(_room(request) for request in requests)
        return self.lengths.next() if self._asked else 0

    def check(self, level: int, requests: Sequence[Request], most: int) -> Round | None:
        """Guess tokens, and read them; None where there is nothing to guess, or no memory for it: then there are no more drafts."""
        begin = self.clock()
        rooms = [min(most, _room(request)) for request in requests]
        try:
            found = self.guesses.guess(level, requests, rooms)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self._ended = True
            logger.warning("memory does not suffice for drafts: from now on there are none; for more memory %s", FOR_MEMORY)
            return None
        on_device = found if isinstance(found, Tensor) else None
        drafted = rooms if isinstance(found, Tensor) else [len(guess) for guess in found]
        if not any(drafted):
            return None
        known = received(found) if isinstance(found, Tensor) else lambda: found
        self._times = begin, self.clock()
        lists = [[0] * count for count in drafted] if isinstance(found, Tensor) else found
        tokens = [[request.tokens[-1], *guess] for request, guess in zip(requests, lists, strict=True)]
        return Round(self.checks, requests, known, drafted, self.checks.read(level, requests, tokens, most + 1, on_device))

    def keep(self, done: Round, most: int) -> None:
        """Texts have taken what they take of what was read last."""
        done.settle()
        self.rounds += 1
        self.drafted += sum(done.drafted)
        self.accepted += sum(done.accepted)
        begin, between = self._times
        each = [(count, right) for count, right in zip(done.drafted, done.accepted, strict=True) if count]
        self.lengths.record_texts(most, each, between - begin, self.clock() - between)

    def plain(self, most: int, seconds: float) -> None:
        """A step without a draft took so long; `most` as `most()` said."""
        if self._asked and most == 0:
            self.lengths.record(0, 0, 0.0, seconds)

    def counts(self) -> dict[str, int]:
        """What came of drafts so far."""
        return {"rounds": self.rounds, "drafted": self.drafted, "accepted": self.accepted}

    @property
    def runners(self) -> list[ModelRunner]:
        """Those that make drafts."""
        return [self.guesses.runner] if isinstance(self.guesses, LevelGuesses) else []

    def prepare(self, levels: Sequence[int]) -> None:
        """Record what drafts of texts at these levels need, where calls are recorded."""
        if isinstance(self.guesses, LevelGuesses):
            self.guesses.prepare()
        for level in levels:
            if self.level is None or level < self.level:
                for rows in range(1, self.rows + 1):
                    for most in self.lengths.lengths:
                        self.checks.prepare(level, rows, most + 1)


def check_draft_level(levels: Levels, draft_level: int | None, level: int) -> None:
    """Raises ValueError if a draft level cannot be had, or is not above the lowest level at which texts will be."""
    if draft_level is None:
        return
    if levels.lowest == levels.highest:
        raise ValueError(
            f"draft_level {draft_level}: this model has level {levels.lowest} and no other; give the original model and an adapter"
        )
    levels.check(draft_level, "draft_level")
    if draft_level <= level:
        raise ValueError(f"draft_level {draft_level} is not above level {level}, at which guesses would be checked: give a higher one")


def drafts_of(options: EngineOptions, runner: ModelRunner, record: Record | None, clock: Callable[[], float]) -> Drafts | None:
    """What an engine's options ask for."""
    if options.draft_level is None and not options.draft_lookup:
        return None
    rows, lengths = min(options.draft_rows, options.slots), lengths_for(options.draft_tokens)
    if options.draft_level is None:
        return Drafts(LookupGuesses(), runner, rows, lengths, None, clock)
    memory = DraftMemory(runner.memory, rows, options.draft_level)
    guesser = ModelRunner(runner.levels, memory) if record is None else GraphRunner(runner.levels, memory, record, 0)
    return Drafts(LevelGuesses(memory, guesser, lengths.longest), runner, rows, lengths, options.draft_level, clock)


def _room(request: Request) -> int:
    """Tokens that may be guessed: the check adds one of its own."""
    return max(request.max_tokens - len(request.tokens) - 1, 0)
