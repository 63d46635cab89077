"""How many tokens to draft before they are checked: as many as pay, by what was accepted and what drafts and checks took so far."""

from __future__ import annotations

from collections import deque
from typing import Protocol

LENGTHS = (1, 2, 4, 8)  # of drafts that adapt: few, as each may be a recording of its own
FIRST = 2  # of the first drafts, and of those that try again: what is lost where they do not pay is little
TRIES = 3  # rounds before it is judged whether they pay; where steps are recorded, the first ones take longer
PLAIN_STEPS = 4  # tokens without a draft before the first one, against whose times it is measured
REFRESH = 64  # rounds after which one token is made without a draft, for its time: texts grow
PAUSE = 32  # tokens without a draft where it did not pay, before another try, at least; doubled each time
LONGEST_PAUSE = 1024
LOSS = 0.01  # of the time of the tokens of a pause, what the try before it may have cost
TIMES = 8  # of the last so many times the shortest counts
FORGETS = 0.9  # what older rounds weigh in the acceptance, each time there is another
GAIN = 1.02  # how many times faster than without a draft one must be, to be made
PRIOR = 3.0, 4.0  # guesses accepted and compared before there are any


class Lengths(Protocol):
    """Decides how many tokens are drafted in each round, and is told what came of it."""

    longest: int  # of what `next` says
    lengths: list[int]  # that it may say, beside 0

    def next(self) -> int:
        """How many tokens to draft now; 0: none, the checking level makes a token as usual."""

    def record(self, drafted: int, accepted: int, draft_seconds: float, check_seconds: float) -> None:
        """A round: tokens drafted, and of them those that stayed until the first other one; what the draft and the rest took."""

    def record_texts(self, drafted: int, texts: list[tuple[int, int]], draft_seconds: float, check_seconds: float) -> None:
        """A round of several texts: of each that had a draft its length, which may be below `drafted`, and the tokens that stayed."""


class FixedLength:
    """So many tokens in each round."""

    def __init__(self, tokens: int):
        self.longest, self.lengths = tokens, [tokens]

    def next(self) -> int:
        return self.longest

    def record(self, drafted: int, accepted: int, draft_seconds: float, check_seconds: float) -> None:
        """Nothing changes."""

    def record_texts(self, drafted: int, texts: list[tuple[int, int]], draft_seconds: float, check_seconds: float) -> None:
        """Nothing changes."""


class DraftLength:
    """The length that makes most tokens in a second, as rounds so far tell; 0 where none makes more than decoding as usual.

    If a guess is accepted with probability a, a round of k guesses makes (1 - a^(k + 1)) / (1 - a) tokens (Leviathan et al. 2023,
    arXiv 2211.17192, equation 1). It takes k times the time of a guess, and a check, whose time is taken to grow evenly with k from that of
    one token. Where it does not pay, it is tried again after `PAUSE` tokens or more, and after twice as many each time that fails; after so
    many that what the try cost is `LOSS` of their time.

    Args:
        longest: the most tokens to draft.
    """

    def __init__(self, longest: int = LENGTHS[-1]):
        self.longest = longest
        self.lengths = [length for length in LENGTHS if length <= longest]
        self._accepted, self._compared = PRIOR
        # Seconds of tokens without a draft, and what rounds took beyond that, for each guess.
        self._plain: deque[float] = deque(maxlen=TIMES)
        self._guess: deque[float] = deque(maxlen=TIMES)
        self._wait, self._pause, self._rounds = PLAIN_STEPS, PAUSE, 0
        self._since: list[tuple[int, float]] = []  # of the rounds since the last pause the guesses, and the tokens made

    @property
    def acceptance(self) -> float:
        """How probably a guess is accepted."""
        return self._accepted / self._compared

    def next(self) -> int:
        if self._wait > 0:
            return 0
        if len(self._guess) < TRIES:
            return min(FIRST, self.lengths[-1])
        best = max(self.lengths, key=self.speed)
        if self.speed(best) > GAIN:
            self._pause = PAUSE
            self._since.clear()
            return best
        self._wait = min(max(self._pause, round(self._lost() / LOSS)), LONGEST_PAUSE)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)
        self._since.clear()
        self._guess.clear()  # the next try measures anew: longer texts gain more
        return 0

    def speed(self, tokens: int) -> float:
        """Tokens a second with so many guesses in a round, as a multiple of what there are without."""
        made, plain = sum(self.acceptance**place for place in range(tokens + 1)), min(self._plain)
        return made * plain / max(plain + tokens * min(self._guess), 1e-12)

    def record(self, drafted: int, accepted: int, draft_seconds: float, check_seconds: float) -> None:
        if drafted == 0:
            self._plain.append(check_seconds)
            self._wait = max(self._wait - 1, 0)
            return
        self.record_texts(drafted, [(drafted, accepted)], draft_seconds, check_seconds)

    def record_texts(self, drafted: int, texts: list[tuple[int, int]], draft_seconds: float, check_seconds: float) -> None:
        self._accepted = FORGETS * self._accepted + sum(accepted for _, accepted in texts)
        self._compared = FORGETS * self._compared + sum(min(accepted + 1, guessed) for guessed, accepted in texts)
        self._guess.append(max(draft_seconds + check_seconds - min(self._plain), 0) / drafted)
        self._since.append((drafted, 1 + sum(accepted for _, accepted in texts) / max(len(texts), 1)))
        self._rounds += 1
        if self._rounds % REFRESH == 0:
            self._plain.clear()
            self._wait = 1

    def _lost(self) -> float:
        """How many tokens more decoding as usual would have made in the time of the rounds since the last pause."""
        guess = min(self._guess) / max(min(self._plain), 1e-12)
        return sum(1 + drafted * guess - made for drafted, made in self._since)
