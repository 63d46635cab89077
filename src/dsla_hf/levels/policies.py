"""Policies: which level a request should run at, from one record of what is known.

A policy is any function from `Stats` to a level; those here are small frozen objects, pure functions of the record. A policy
of one's own:

    def long_texts(stats: Stats) -> int:
        return 8 if stats.tokens > 4096 else 0
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..core.plots import plain
from .reading import parse_level, read_level


@dataclass(frozen=True)
class Stats:
    """What a policy sees. Tokens are counted per row, padding included; levels are numbers of units: layers, or KV heads where the plan
    counts those. `num_layers` and the sizes in bytes are then of heads, too."""

    prompt_tokens: int
    tokens: int  # so far, prompt included
    rows: int  # of the batch, beams included
    level: int
    max_level: int  # of the plan
    num_layers: int  # of the model; its KV heads in all layers where these are the unit
    min_level: int = 0  # above 0 for hybrids, which have one level
    softmax_bytes_per_token: int = 0  # cache of one softmax layer, per row and token
    dsla_bytes: int = 0  # cache of one DSLA layer, per row
    seconds_per_token: float | None = None  # of the last steps; None before there are any
    tokens_since_change: int = 0  # of the level
    seconds_since_change: float = float("inf")
    queue_depth: int = 0  # requests that wait
    longest_waiting_prompt: int = 0  # tokens
    waiting_tokens: int = 0  # of all prompts that wait or are being read
    free_share: float = 1.0  # of the memory for keys and values
    seconds_to_first_token: float | None = None  # of a server's last requests, or what one without has waited
    unit: str = "layer"  # or "head": what levels count
    ladder: tuple[int, ...] = ()  # levels that can be had, rising, where these are not all

    def cache_bytes(self, level: int, tokens: int | None = None) -> int:
        """Bytes of the whole cache at a level, now or with that many tokens a row."""
        tokens = self.tokens if tokens is None else tokens
        return self.rows * ((self.num_layers - level) * tokens * self.softmax_bytes_per_token + level * self.dsla_bytes)

    def at_most(self, level: int) -> int:
        """The highest level that can be had and is not above `level`; the lowest of all if none is."""
        return max((other for other in self.ladder if other <= level), default=self.ladder[0]) if self.ladder else level

    def moved(self, rungs: int) -> int:
        """The level so many of those that can be had above the present one, or below it; within them all."""
        if not self.ladder:
            return min(max(self.level + rungs, 0), self.max_level)
        here = self.ladder.index(self.at_most(self.level))
        return self.ladder[min(max(here + rungs, 0), len(self.ladder) - 1)]


Policy = Callable[[Stats], int]


def _levels(level: int | str, stats: Stats) -> int:
    """A level as number, and not above the plan; of those that can be had the one that converts no more than was asked for."""
    return stats.at_most(min(parse_level(level, stats.num_layers, stats.unit), stats.max_level))


@dataclass(frozen=True)
class FixedLevel:
    """One level, whatever comes."""

    level: int | str = 0

    def __call__(self, stats: Stats) -> int:
        return _levels(self.level, stats)


@dataclass(frozen=True)
class PromptLength:
    """A level by the length of the prompt. The default table is the DSLA paper's (arXiv 2506.09316): from these tokens on, this share.

    grow: count generated tokens too, so that the level rises as the text does.
    """

    table: tuple[tuple[int, int | str], ...] = ((0, "12.5%"), (2048, "25%"), (4096, "37.5%"), (8192, "50%"))
    grow: bool = False

    def __post_init__(self) -> None:
        starts = [tokens for tokens, _ in self.table]
        if not starts or starts != sorted(set(starts)):
            raise ValueError(f"table must hold (from tokens, level) with rising tokens, got {self.table}")

    def __call__(self, stats: Stats) -> int:
        tokens = stats.tokens if self.grow else stats.prompt_tokens
        reached = [level for start, level in self.table if tokens >= start]
        return _levels(reached[-1], stats) if reached else 0


@dataclass(frozen=True)
class Saving:
    """A level as soon as it saves memory, 0 before: while a text's keys and values take no more than what would take their place, it is the
    original model's, bit for bit.

    level: "100%" is the whole plan.
    """

    level: int | str = "100%"

    def __call__(self, stats: Stats) -> int:
        saves = stats.tokens * stats.softmax_bytes_per_token > stats.dsla_bytes
        return _levels(self.level, stats) if saves else stats.at_most(0)


@dataclass(frozen=True)
class CacheMemory:
    """The lowest level whose cache fits a budget, with room for some more tokens; the highest if none does.

    budget: bytes for the whole batch. headroom: tokens a row that must fit beside those that are there.
    """

    budget: int
    headroom: int = 128

    def __post_init__(self) -> None:
        if self.budget <= 0:
            raise ValueError(f"budget must be a number of bytes, got {self.budget}")

    def __call__(self, stats: Stats) -> int:
        ahead = stats.tokens + self.headroom
        levels = stats.ladder or range(stats.max_level + 1)
        fitting = (level for level in levels if stats.cache_bytes(level, ahead) <= self.budget)
        return next(fitting, levels[-1])


@dataclass(frozen=True)
class LatencyTarget:
    """One layer more whenever tokens take longer than the target, and some have been measured since the last change. Where levels count
    heads and not all can be had (a server's), one of those that can."""

    seconds_per_token: float
    settle: int = 8  # tokens
    step: int = 1  # layers, or levels that can be had

    def __post_init__(self) -> None:
        if not self.seconds_per_token > 0:
            raise ValueError(f"seconds_per_token must be positive, got {self.seconds_per_token}")

    def __call__(self, stats: Stats) -> int:
        late = stats.seconds_per_token is not None and stats.seconds_per_token > self.seconds_per_token
        return stats.moved(self.step if late and stats.tokens_since_change >= self.settle else 0)


@dataclass(frozen=True)
class Load:
    """A step more while requests pile up or a long one waits, a step less when the pile is gone, with hysteresis and cool-down.

    The defaults are the numbers of the DSLA paper's released server. The level rises when any figure is over its threshold, and falls
    when all are below `release`; it changes once per cool-down at most. Further thresholds, None for none, are for a server that
    knows them.

    queue_depth: requests that wait. waiting_prompt: tokens of the longest of them. waiting_tokens: of all that are not read yet.
    free_share: of the memory for keys and values; the level rises below it, and falls above twice as much.
    seconds_to_first_token, seconds_per_token: of the last requests.
    release: of queue_depth, and of all other thresholds.
    step: units at a time (layers, or KV heads where levels count those), or a share of the model's such as "12.5%"; one of the levels that
        can be had at least.
    """

    queue_depth: int = 50
    waiting_prompt: int = 1024
    release: tuple[float, float] = (0.5, 0.8)
    cool_down: float = 60.0  # seconds
    max_level: int | str = "75%"
    waiting_tokens: int | None = None
    free_share: float | None = None
    seconds_to_first_token: float | None = None
    seconds_per_token: float | None = None
    step: int | str = 1

    def __post_init__(self) -> None:
        try:
            kept, share, units = read_level(self.step)
        except ValueError:
            kept, share, units = False, None, 0
        if kept or not (share or units):
            raise ValueError(f"step must be 1 unit or more, or a share such as '12.5%', got {self.step!r}")

    def __call__(self, stats: Stats) -> int:
        if stats.seconds_since_change < self.cool_down:
            return stats.level
        if self.why(stats):
            return max(stats.level, min(stats.moved(self.rungs(stats)), self.highest(stats)))
        if self._calm(stats):
            return stats.moved(-self.rungs(stats))
        return stats.level

    def rungs(self, stats: Stats) -> int:
        """The step in levels that can be had, at least one."""
        units = parse_level(self.step, stats.num_layers, stats.unit)
        if stats.ladder:
            units = round(units * (len(stats.ladder) - 1) / max(stats.ladder[-1] - stats.ladder[0], 1))
        return max(units, 1)

    def highest(self, stats: Stats) -> int:
        """The level that it never exceeds."""
        return _levels(self.max_level, stats)

    def why(self, stats: Stats) -> str:
        """The thresholds that are crossed, in words; empty if none is."""
        over = [f"{name} {plain(value)} ≥ {plain(limit)}" for name, value, limit in self._figures(stats) if value >= limit]
        if self.free_share is not None and stats.free_share < self.free_share:
            over.append(f"free_share {stats.free_share:.1%} < {self.free_share:.1%}")
        return ", ".join(over)

    def _figures(self, stats: Stats) -> list[tuple[str, float, float]]:
        """(name, value, threshold) of all that are known."""
        names = ("queue_depth", "waiting_tokens", "seconds_to_first_token", "seconds_per_token")
        pairs = [(name, getattr(stats, name), getattr(self, name)) for name in names]
        pairs.insert(1, ("longest_waiting_prompt", stats.longest_waiting_prompt, self.waiting_prompt))
        return [(name, value, limit) for name, value, limit in pairs if value is not None and limit is not None]

    def _calm(self, stats: Stats) -> bool:
        shares = {"queue_depth": self.release[0]}
        below = all(value < shares.get(name, self.release[1]) * limit for name, value, limit in self._figures(stats))
        return below and (self.free_share is None or stats.free_share >= min(2 * self.free_share, 1.0))


NAMED: dict[str, Callable[[], Policy]] = {
    "prompt-length": PromptLength,
    "text-length": lambda: PromptLength(grow=True),
    "saving": Saving,
    "load": Load,
}


def as_policy(policy: Any) -> Policy:
    """A policy from its name (`"prompt-length"`, `"text-length"`, `"saving"`, `"saving:50%"`, `"load"`), from a level (`8`, `"50%"`), or
    itself.

    Raises:
        ValueError: for a name that is none.
    """
    if callable(policy):
        return policy
    if isinstance(policy, str) and policy in NAMED:
        return NAMED[policy]()
    saving = isinstance(policy, str) and policy.startswith("saving:")
    level = policy.removeprefix("saving:") if saving else policy
    try:
        read_level(level)
    except ValueError:
        raise ValueError(
            f"level_policy must be one of {list(NAMED)}, 'saving:50%', a level such as 8 or '50%', or a function from Stats to a level, "
            f"got {policy!r}"
        ) from None
    return Saving(level) if saving else FixedLevel(level)
