"""Which token comes next, where a draft has guessed one: the text follows the checking level alone, whatever was guessed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

# Scores `[1, V]` of the next token from the text so far `[1, T]` and logits `[1, V]`, as logits processors of transformers.
Scores = Callable[[Any, Any], Any]


class Rule(Protocol):
    """How tokens are chosen.

    likeliest: whether a guess is the token of the greatest logit, whatever came before.
    """

    likeliest: bool

    def guess(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A guess int64 `[1]` behind the text `ids` `[1, T]`, by the draft's logits fp32 `[1, V]`; and what `choose` needs to judge it."""

    def choose(self, ids: Tensor, logits: Tensor, guess: Tensor | None = None, drawn_from: Tensor | None = None) -> Tensor:
        """The token int64 `[1]` behind `ids`, by the checking level's logits. It is the guess if that is accepted, and another otherwise;
        without a guess it is what that level alone would choose."""

    def choose_all(self, ids: Tensor, logits: Tensor, guesses: Tensor, drawn_from: Sequence[Tensor | None]) -> Tensor | None:
        """The tokens int64 `[K + 1]` behind `ids` and behind each of the guesses `[K]`, of logits `[K + 1, V]`: what `choose` gives as long
        as guesses are right, behind the first that is not anything. None where each has to be chosen before the next one is asked for."""


class Greedy:
    """The likeliest token.

    Args:
        processors: what changes the checking level's logits; it sees each text once, as without a draft.
        draft_processors: what changes the draft's.
    """

    def __init__(self, processors: Scores, draft_processors: Scores):
        self.processors, self.draft_processors = processors, draft_processors
        self.likeliest = draft_processors == []

    def guess(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.draft_processors(ids, logits).argmax(-1), None

    def choose_all(self, ids: Tensor, logits: Tensor, guesses: Tensor, drawn_from: Sequence[Tensor | None]) -> Tensor | None:
        if not keep_nothing(self.processors, self.draft_processors):
            return None
        return scores_of_all(self.processors, ids, logits, guesses).argmax(-1)

    def choose(self, ids: Tensor, logits: Tensor, guess: Tensor | None = None, drawn_from: Tensor | None = None) -> Tensor:
        return self.processors(ids, logits).argmax(-1)


class Rejection:
    """Draws that follow the probabilities p of the checking level, by rejection sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen
    et al. 2023, arXiv 2302.01318): a guess x drawn from q is accepted with probability min(1, p(x) / q(x)), and otherwise a token is drawn
    from max(p - q, 0), which x is not one of. Draws are those of PyTorch's generator.

    Args: as those of `Greedy`.
    """

    likeliest = False

    def __init__(self, processors: Scores, draft_processors: Scores):
        self.processors, self.draft_processors = processors, draft_processors

    def guess(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        q = self.draft_processors(ids, logits).float().softmax(-1)
        return torch.multinomial(q, 1)[:, 0], q

    def choose(self, ids: Tensor, logits: Tensor, guess: Tensor | None = None, drawn_from: Tensor | None = None) -> Tensor:
        p = self.processors(ids, logits).float().softmax(-1)
        if guess is None:
            return torch.multinomial(p, 1)[:, 0]
        assert drawn_from is not None
        q = drawn_from
        p_guess, q_guess = (x.gather(1, guess[:, None]) for x in (p, q))
        if bool(torch.rand_like(q_guess) * q_guess < p_guess):
            return guess
        rest = (p - q).clamp_min(0)
        # By rounding there may be no rest, where both agree; the guess then is as good as a draw.
        return torch.multinomial(rest, 1)[:, 0] if bool(rest.sum() > 0) else guess

    def choose_all(self, ids: Tensor, logits: Tensor, guesses: Tensor, drawn_from: Sequence[Tensor | None]) -> Tensor | None:
        if not keep_nothing(self.processors, self.draft_processors):
            return None
        p = scores_of_all(self.processors, ids, logits, guesses).float().softmax(-1)
        if not len(guesses):
            return torch.multinomial(p, 1)[:, 0]
        q = torch.cat([x for x in drawn_from if x is not None])
        p_guess, q_guess = (x.gather(1, guesses[:, None])[:, 0] for x in (p[:-1], q))
        rest = (p[:-1] - q).clamp_min(0)
        right = (torch.rand_like(q_guess) * q_guess < p_guess) | (rest.sum(-1) <= 0)
        # Where a guess is right nothing is drawn, but from something it must be.
        drawn = torch.multinomial(torch.cat([torch.where(right[:, None], p[:-1], rest), p[-1:]]), 1)[:, 0]
        return torch.cat([torch.where(right, guesses, drawn[:-1]), drawn[-1:]])


def keep_nothing(processors: Scores, draft_processors: Scores) -> bool:
    """Whether processors may be asked about texts that come to nothing: they keep no count of what they see. Those of drafts do not."""
    return isinstance(processors, list) and processors == draft_processors


def scores_of_all(processors: Any, ids: Tensor, logits: Tensor, guesses: Tensor) -> Tensor:
    """The scores `[K + 1, V]` of the tokens behind `ids` `[1, T]` and behind each of the guesses `[K]`."""
    if not processors:
        return logits
    texts = (torch.cat([ids[0], guesses[:place]])[None] for place in range(len(logits)))
    return torch.cat([processors(text, one) for text, one in zip(texts, logits.split(1), strict=True)])
