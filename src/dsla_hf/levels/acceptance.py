"""Which token comes next, where a draft has guessed one: the text follows the checking level alone, whatever was guessed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

# Scores `[1, V]` of the next token from the text so far `[1, T]` and logits `[1, V]`, as logits processors of transformers.
Scores = Callable[[Any, Any], Any]


class Rule(Protocol):
    """How tokens are chosen. `place`: the number of the token in its text."""

    def guess(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """A guess int64 `[1]` behind the text `ids` `[1, T]`, by the draft's logits fp32 `[1, V]`; and what `choose` needs to judge it."""

    def choose(self, ids: Tensor, logits: Tensor, guess: Tensor | None = None, drawn_from: Tensor | None = None) -> Tensor:
        """The token int64 `[1]` behind `ids`, by the checking level's logits. It is the guess if that is accepted, and another otherwise;
        without a guess it is what that level alone would choose."""


class Greedy:
    """The likeliest token.

    Args:
        processors: what changes the checking level's logits; it sees each text once, as without a draft.
        draft_processors: what changes the draft's.
    """

    def __init__(self, processors: Scores, draft_processors: Scores):
        self.processors, self.draft_processors = processors, draft_processors

    def guess(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.draft_processors(ids, logits).argmax(-1), None

    def choose(self, ids: Tensor, logits: Tensor, guess: Tensor | None = None, drawn_from: Tensor | None = None) -> Tensor:
        return self.processors(ids, logits).argmax(-1)


class Rejection:
    """Draws that follow the probabilities p of the checking level, by rejection sampling (Leviathan et al. 2023, arXiv 2211.17192; Chen
    et al. 2023, arXiv 2302.01318): a guess x drawn from q is accepted with probability min(1, p(x) / q(x)), and otherwise a token is drawn
    from max(p - q, 0), which x is not one of. Draws are those of PyTorch's generator.

    Args: as those of `Greedy`.
    """

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
