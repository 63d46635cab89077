"""How many tokens to draft before they are checked: as many as pay, by what was accepted and what drafts and checks took so far."""

from __future__ import annotations

from typing import Protocol

LONGEST_DRAFT = 8  # tokens that `DraftLength` drafts at most
PLAIN_STEPS = 2  # without a draft before the first one, whose times it is measured against; the first may compile something
PAUSE = 32  # tokens without a draft where it did not pay, before another try; doubled each time
LONGEST_PAUSE = 1024
FORGETS = 0.9  # what older rounds weigh, each time there is another
GAIN = 1.02  # how many times faster than without a draft one must be, to be made
PRIOR = 3.0, 4.0  # guesses accepted and looked at before there are any


class Lengths(Protocol):
    """Decides how many tokens are drafted in each round, and is told what came of it."""

    longest: int  # of what `next` says

    def next(self) -> int:
        """How many tokens to draft now; 0: none, the checking level makes a token as usual."""

    def record(self, drafted: int, accepted: int, draft_seconds: float, check_seconds: float) -> None:
        """A round: tokens drafted, and of them those that stayed until the first other one; what the draft and the rest took."""


class FixedLength:
    """So many tokens in each round."""

    def __init__(self, tokens: int):
        self.longest = tokens

    def next(self) -> int:
        return self.longest

    def record(self, drafted: int, accepted: int, draft_seconds: float, check_seconds: float) -> None:
        """Nothing changes."""


class DraftLength:
    """The length that makes most tokens in a second, as rounds so far tell; 0 where none makes more than decoding as usual.

    If a guess is accepted with probability a, a round of k guesses makes (1 - a^(k + 1)) / (1 - a) tokens (Leviathan et al. 2023,
    arXiv 2211.17192, equation 1). It takes k times the time of a guess, and a check, whose time is taken to grow evenly with k from that of
    one token. Where it does not pay, it is tried again after `PAUSE` tokens, with one round, and twice as many each time that fails.

    Args:
        longest: the most tokens to draft.
    """

    def __init__(self, longest: int = LONGEST_DRAFT):
        self.longest = longest
        self._accepted, self._looked_at = PRIOR
        self._plain: float | None = None  # seconds of a token without a draft
        self._guess: float | None = None  # of a guess
        self._more: float | None = None  # what a check takes for each guess
        self._wait, self._pause = PLAIN_STEPS, PAUSE

    @property
    def acceptance(self) -> float:
        """How probably a guess is accepted."""
        return self._accepted / self._looked_at

    def next(self) -> int:
        if self._wait > 0:
            return 0
        if self._guess is None:  # the first draft: as many as would do if a guess cost half of a token
            return min(4, self.longest)
        speeds = [self.speed(k) for k in range(1, self.longest + 1)]
        best = max(speeds)
        if best > GAIN:
            self._pause = PAUSE
            return speeds.index(best) + 1
        self._wait, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self._guess = self._more = None  # the next try measures anew: longer texts gain more
        return 0

    def speed(self, tokens: int) -> float:
        """Tokens a second with so many guesses in a round, as a multiple of what there are without."""
        assert self._plain is not None and self._guess is not None and self._more is not None
        made = sum(self.acceptance**place for place in range(tokens + 1))
        return made * self._plain / max(self._plain + tokens * (self._guess + self._more), 1e-12)

    def record(self, drafted: int, accepted: int, draft_seconds: float, check_seconds: float) -> None:
        if drafted == 0:
            self._plain = _mean(self._plain, check_seconds) if self._wait < PLAIN_STEPS else check_seconds
            self._wait -= 1
            return
        self._accepted = FORGETS * self._accepted + accepted
        self._looked_at = FORGETS * self._looked_at + min(accepted + 1, drafted)
        assert self._plain is not None
        self._guess = _mean(self._guess, draft_seconds / drafted)
        self._more = _mean(self._more, max(check_seconds - self._plain, 0) / drafted)


def _mean(before: float | None, new: float) -> float:
    return new if before is None else FORGETS * before + (1 - FORGETS) * new
