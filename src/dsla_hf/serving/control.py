"""The level that a server runs at: a policy asked at token boundaries, and a record of every change with its reason."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..core.progress import duration
from ..levels.policies import Policy, Stats

logger = logging.getLogger(__name__)

KEPT_CHANGES = 1000


@dataclass(frozen=True)
class Change:
    """At `seconds` of the engine's clock the level went from `old` to `new`."""

    seconds: float
    old: int
    new: int
    reason: str


class LevelControl:
    """Turns what a policy asks for into changes of the level.

    A raise is followed at once. A lower level must have been asked for without a break for `hold` seconds, and comes `cool_down`
    seconds after the last change at the earliest: a level that swings costs folds, and a drain of the old cohort each time. While texts
    run, it must have been asked for `busy_hold` seconds: until the last of them ends, every token then takes two model calls.

    Args:
        ladder: levels that there are, rising; None: all. What a policy asks for between two of them is taken as the lower one, so that no
            more is converted than was asked for, and that is said once.

    Attributes:
        level: that newcomers get.
        changes: the last ones, oldest first; count: of all.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        lowest: int,
        highest: int,
        ladder: Sequence[int] | None = None,
        hold: float = 1.0,
        busy_hold: float = 10.0,
        cool_down: float = 5.0,
        clock: Callable[[], float],
    ):
        for name, seconds in (("hold", hold), ("busy_hold", busy_hold), ("cool_down", cool_down)):
            if not seconds >= 0:
                raise ValueError(f"{name} must be 0 seconds or more, got {seconds}")
        self.policy, self.lowest, self.highest, self.clock = policy, lowest, highest, clock
        self.ladder = list(range(lowest, highest + 1)) if ladder is None else list(ladder)
        self.hold, self.busy_hold, self.cool_down = hold, busy_hold, cool_down
        self.level = lowest
        self.changed = float("-inf")
        self.changes: deque[Change] = deque(maxlen=KEPT_CHANGES)
        self.count = 0
        self._lower_since: float | None = None
        self._rounded = False

    def wanted(self, stats: Stats) -> tuple[int, str]:
        """The level to go to now, and why; the present one if nothing is to change.

        Raises:
            ValueError: if the policy asks for a level that there is not.
        """
        asked = self.policy(stats)
        if not isinstance(asked, int) or not 0 <= asked <= stats.max_level:
            raise ValueError(f"the policy {self.policy!r} asked for level {asked!r}; there are 0 to {stats.max_level}")
        asked = self._on_ladder(min(max(asked, self.lowest), self.highest))
        now = self.clock()
        if asked >= self.level:
            self._lower_since = None
            return asked, self._reason(stats) if asked > self.level else ""
        if self._lower_since is None:
            self._lower_since = now
        hold = self.busy_hold if stats.rows else self.hold
        if now - self._lower_since >= hold and now - self.changed >= self.cool_down:
            return asked, self._reason(stats)
        return self.level, ""

    def from_here(self) -> list[int]:
        """The levels from the present one to the highest."""
        return [level for level in self.ladder if self.level <= level <= self.highest]

    def change(self, level: int, reason: str, note: str = "") -> None:
        """The level is another one now; `note`: what the log says of it beside the number."""
        change = Change(self.clock(), self.level, level, reason)
        self.level, self.changed, self._lower_since = level, change.seconds, None
        self.changes.append(change)
        self.count += 1
        logger.info("level %d -> %d%s: %s", change.old, change.new, note, change.reason)

    def _on_ladder(self, level: int) -> int:
        if level in self.ladder:
            return level
        lower = max(other for other in self.ladder if other <= level)
        if not self._rounded:
            logger.warning("level %d is not among those in use, %s: %d is taken, and so on for others", level, self.ladder, lower)
        self._rounded = True
        return lower

    def _reason(self, stats: Stats) -> str:
        why = getattr(self.policy, "why", None)
        crossed = why(stats) if why is not None else ""
        figures = (
            f"{stats.queue_depth} waiting, {stats.waiting_tokens} prompt tokens unread, longest prompt {stats.prompt_tokens}, "
            f"{stats.rows} running, {stats.free_share:.0%} of blocks free, first token {in_words(stats.seconds_to_first_token)}, "
            f"per token {in_words(stats.seconds_per_token)}"
        )
        name = getattr(self.policy, "__name__", type(self.policy).__name__)
        return f"{name}: {crossed or 'asked for it'} ({figures})"


def in_words(seconds: float | None) -> str:
    """A measured time for people: "8.3 ms", "1.4 s", "12 min"; "unknown" for none."""
    if seconds is None:
        return "unknown"
    if seconds >= 10:
        return duration(seconds)
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.{1 if seconds < 0.1 else 0}f} ms"
