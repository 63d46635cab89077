"""Drafts in recorded steps: what `GraphDecoder(draft_level=...)` does between two forwards of the level that checks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..levels.acceptance import Rule, Scores, keep_nothing, scores_of_all
from .decode_attention import CachedTokens, over_cache, run_token
from .draft_space import DraftSpace
from .draws import Sampler
from .recorder import Recorder, shown_tokens


class Raced:
    """Draws by seed and place, as `GraphDecoder` makes them without drafts, and so the same text. Guess and token of a place race with the
    same noise, so that they are mostly the same where draft and check mostly agree (as in Daliri et al. 2024, arXiv 2408.07978).

    Args:
        processors, draft_processors: as of `acceptance.Greedy`. seed: as of `Sampler`.
        padding: tokens of the prompt that are none: they count for no place.
    """

    likeliest = False

    def __init__(self, processors: Scores, draft_processors: Scores, seed: int | None, padding: int = 0):
        self.check = Sampler(processors, True, seed)
        self.draft = Sampler(draft_processors, True, self.check.seed)
        self.padding = padding
        self._all_at_once = keep_nothing(processors, draft_processors)

    def guess(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.draft(logits, ids, [ids.shape[1] - self.padding], surely=False), None

    def choose(self, ids: Tensor, logits: Tensor, guess: Tensor | None = None, drawn_from: Tensor | None = None) -> Tensor:
        return self.check(logits, ids, [ids.shape[1] - self.padding])

    def choose_all(self, ids: Tensor, logits: Tensor, guesses: Tensor, drawn_from: Sequence[Tensor | None]) -> Tensor | None:
        if not self._all_at_once:
            return None
        scores = scores_of_all(self.check.processors or (), ids, logits, guesses)
        return self.check.behind(scores, ids.shape[1] - self.padding)


class GraphEngine:
    """Both levels in recorded steps, as `levels.drafting.Engine`.

    Args:
        model: of transformers. space: its `Workspace`, begun at the checking level. recorder: records steps.
        read: reads a prompt `[1, T]` at that level into `space`. step: reads a token `[1]`, likewise.
        drafts: makes or finds the `DraftSpace` of `space`, once its prompt is read.
        set_level: to the second of `levels`, which drafts, and back to the first, which checks.
    """

    def __init__(
        self,
        model: Any,
        space: Any,
        recorder: Recorder,
        read: Callable[[Tensor], None],
        step: Callable[[Tensor], None],
        drafts: Callable[[], DraftSpace],
        set_level: Callable[[int], None],
        levels: tuple[int, int],
    ):
        self.model, self.space, self.recorder, self._read, self._step, self._drafts = model, space, recorder, read, step, drafts
        self.set_level, self.levels = set_level, levels
        self.drafts: DraftSpace | None = None
        self._checked = 0

    def read(self, ids: Tensor) -> Tensor:
        self._read(ids[:, self.space.read :])
        return self.space.logits.clone()

    def draft(self, ids: Tensor, tokens: int, rule: Rule, ends: Collection[int]) -> tuple[list[Tensor], list[Tensor | None]]:
        """As in the protocol; guesses may lie behind `ends`, which the host would have to wait for."""
        space = self.space
        if self.drafts is None:
            self.drafts = self._drafts()
            self.drafts.begin(int((~space.mask).sum()) if space.padded else 0)
        drafts = self.drafts
        behind = space.read - drafts.folded_tokens
        view = self._view(tokens + 1)
        self.set_level(self.levels[1])
        try:
            if not drafts.converted:
                drafts.folded_tokens = space.read
            elif drafts.folded_tokens == 0 or behind > drafts.longest + 1:
                drafts.read(space.read, space.mask if space.padded else None)
            else:
                within = not drafts.spoilt and drafts.within_block(behind)
                drafts.count.fill_(behind)
                self.recorder.run((drafts.parts, "follow", drafts.longest, within), lambda: drafts.follow(within))
                drafts.folded_tokens, drafts.spoilt = space.read, False
            drafts.positions.copy_(space.positions)
            drafts.lengths.copy_(space.lengths)
            drawn_from: list[Tensor | None] = [None] * tokens
            if rule.likeliest:
                guesses = self._likeliest(drafts, ids[:, -1:], tokens, view)
            else:
                guesses, drawn_from = self._guessed(drafts, ids, tokens, rule, view)
            drafts.spoilt = not drafts.within_block(tokens)
            drafts.after(space.read)
        finally:
            self.set_level(self.levels[0])
        return guesses, drawn_from

    def draft_ahead(self, chosen: Tensor, guesses: Tensor, tokens: int, rule: Rule) -> list[Tensor] | None:
        """As in the protocol, for drafts that read the memory of the level that checks: nothing of theirs follows the text."""
        space, drafts = self.space, self.drafts
        if drafts is None or drafts.converted or drafts.committed or not rule.likeliest:
            return None
        right = (chosen[:-1] == guesses).long().cumprod(0).sum(0, keepdim=True)
        drafts.positions.copy_(space.positions + (right + 1))
        drafts.lengths.copy_(space.lengths + (right + 1))
        space.cached.copy_((drafts.lengths - 1).expand_as(space.cached))
        self.set_level(self.levels[1])
        try:
            return self._likeliest(drafts, chosen.index_select(0, right)[None], tokens, self._view(len(chosen) + tokens + 1))
        finally:
            self.set_level(self.levels[0])

    def _likeliest(self, drafts: DraftSpace, last: Tensor, tokens: int, view: int) -> list[Tensor]:
        """Guesses of which each is the next token of the step that makes it, behind `last` `[1, 1]`: the host has nothing to do in
        between."""
        drafts.tokens.copy_(last)
        drafts.made.zero_()

        def step() -> None:
            self._guess(drafts, view)
            guess = drafts.logits.argmax(-1)
            drafts.tokens.copy_(guess[:, None])
            drafts.guesses.index_copy_(0, drafts.made, guess)
            drafts.made.add_(1)

        for _ in range(tokens):
            self.recorder.run((drafts.parts, "draft", self.space.padded, view, "likeliest"), step)
        return list(drafts.guesses[:tokens].split(1))

    def _guessed(self, drafts: DraftSpace, ids: Tensor, tokens: int, rule: Rule, view: int) -> tuple[list[Tensor], list[Tensor | None]]:
        guesses: list[Tensor] = []
        drawn_from: list[Tensor | None] = []
        for _ in range(tokens):
            drafts.tokens.copy_(ids[:, -1:])
            self.recorder.run((drafts.parts, "draft", self.space.padded, view), lambda: self._guess(drafts, view))
            token, needed = rule.guess(ids, drafts.logits.clone())
            guesses.append(token)
            drawn_from.append(needed)
            ids = torch.cat([ids, token[:, None]], 1)
        return guesses, drawn_from

    def check(self, tokens: Tensor) -> Tensor:
        self._checked = count = tokens.shape[1]
        space, drafts = self.space, self.drafts
        if count == 1:
            self._step(tokens[0])
            return space.logits.clone()
        assert drafts is not None
        drafts.checked[:, :count] = tokens
        view = self._view(count)
        key = (drafts.checked_parts, "check", space.padded, view, count, drafts.longest)
        self.recorder.run(key, lambda: self._check(drafts, count, view))
        return drafts.checked_logits[:count].clone()

    def keep(self, tokens: int) -> None:
        if self._checked == 1:  # `step` has counted
            return
        space, drafts = self.space, self.drafts
        assert drafts is not None
        space.read += tokens
        space.positions.add_(tokens)
        space.lengths.add_(tokens)
        drafts.after(space.read)
        if drafts.committed:
            within = drafts.within_block(tokens)
            drafts.count.fill_(tokens)
            self.recorder.run((drafts.checked_parts, "commit", drafts.longest, within), lambda: drafts.commit(within))

    def _view(self, tokens: int) -> int:
        """How many places of the cache steps up to so many tokens further need to see."""
        space = self.space
        return space.length if space.by_length else min(shown_tokens(space.read + tokens), space.length)

    def _guess(self, drafts: DraftSpace, view: int) -> None:
        space = self.space
        drafts.show(view, drafts.lengths - 1 if space.by_length else None)
        mask = space.mask[:, :view] if space.padded else None
        run_token(self.model, drafts, mask, space.by_length)
        for count in (drafts.positions, drafts.lengths, *([drafts.counts] if space.by_length else [])):
            count.add_(1)

    def _check(self, drafts: DraftSpace, count: int, view: int) -> None:
        space = self.space
        space.show(view)
        mask = space.mask[:, :view] if space.padded else None
        # Without padding these are the places in the cache. Given, they could mark packed texts, which is seen from values alone.
        positions = space.positions + torch.arange(count, device=space.positions.device) if space.padded else None
        given = {"attention_mask": mask, "position_ids": positions, "past_key_values": space.cache, "use_cache": True}
        drafts.hold_back(True)
        try:
            with over_cache(CachedTokens(space.lengths + (count - 1), mask)) if space.by_length else nullcontext():
                logits = self.model(input_ids=drafts.checked[:, :count], **given).logits
        finally:
            drafts.hold_back(False)
        drafts.checked_logits[:count].copy_(logits[0])
