"""The engine: many texts at a time, which come and go between two tokens.

Each step of it: forget what was cancelled, ask for the level, let the queue in, read a piece of the prompts, generate one token for
every running text. Texts are independent of each other: each is what `generate` alone gives at its level.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.cache import FOLDED_AT_ONCE
from ...core.tensor_parallel import is_tensor_parallel
from ...core.transfers import sent
from ...inference.batching import out_of_memory
from ...inference.recorder import Record
from ...inference.sampling import Constraint
from ...levels.policies import FixedLevel, Load, Policy, Stats, as_policy
from ..control import LevelControl
from .buckets import TOKEN_SECONDS, Buckets
from .drafts import Drafts, Round, check_draft_level, drafts_of
from .graphs import GraphRunner
from .health import Health, is_sticky
from .kv_dtype import KV_CACHE_DTYPES, kv_dtype
from .levels import Levels
from .plan import Arrival, OneProcess, Plan
from .pool import OutOfBlocks
from .recent import RecentMean
from .request import Event, Request, Sampling
from .reuse import Match, PrefixReuse
from .runner import ModelRunner, in_whole_rows
from .scheduler import QueueFull, Scheduler
from .slots import SlotMemory
from .tokens import NextToken, NextTokens, logprobs_of, scored
from .watchdog import Watchdog

logger = logging.getLogger(__name__)

# Times to the first token and per token are averages of as long, and of so many tokens at most.
MEASURED_SECONDS, MEASURED = 10.0, 2048
IDLE_SECONDS = 0.25  # how often an idle engine asks for the level
MIN_CHUNK = 16
LOGITS_BYTES = 2**28  # of a piece of a prompt whose log-probabilities are asked for: such pieces are shorter
# In configs of mixtures of experts: what an expert multiplies depends on which tokens come to it, and so on company.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
SNAPSHOT_SHARE = 1 / 8  # of the memory for keys and values, for snapshots beside it, where nobody says how much
CHUNK_RECOVERY_SECONDS = 60.0  # after a lack of memory, until chunks are twice as long again


class Draining(RuntimeError):
    """The engine takes no more requests: it ends when the running ones have."""


class TooLong(ValueError):
    """A text that cannot fit."""


class NotChosen(RuntimeError):
    """The first process could not choose a token."""


class ShedForMemory(RuntimeError):
    """A request was given up because memory did not suffice."""


class Piece(NamedTuple):
    """What is read next of a prompt: so many tokens. first: whether they are the first of it that are read, behind what others have left.
    keeps: whether states are kept behind them, and the text is read on at once."""

    request: Request
    tokens: int
    first: bool
    keeps: bool


@dataclass(frozen=True)
class EngineOptions:
    """Sizes of an engine.

    slots: texts that run at a time. max_waiting: requests that may wait.
    max_tokens: longest text, prompt included; None: what the model was made for.
    kv_bytes: memory for keys and values; None: what is free on a GPU but for a tenth, half a GiB on a CPU.
    kv_cache_dtype: "auto", the model's, or "fp8": keys and values of heads that are softmax attention lie in e4m3, see `kv_dtype`.
    block_size: tokens in a block. chunk: prompt tokens read in a step.
    prompt_share: largest share of the time that prompts may take from texts that are being generated: with 0.5 a token takes twice as long
        while prompts are read as without them; with 1 a chunk is read before every token.
    prompt_patience: seconds; a prompt that has waited longer is read with every token, for a queue is worse than slow tokens.
    max_level: highest level that control may choose; None: the whole plan. Where levels count heads, those in use are a ladder up to it,
        see `Levels.cut`.
    hold, busy_hold, cool_down: of `LevelControl`.
    step_timeout: seconds after which a step that has not ended makes the engine unhealthy, what it compiles and records not counted; 0:
        never.
    batch_invariant: each text has the same sums in the same order in any company, so that it is equal to the bit. Every step then costs
        what one with all slots taken costs (and gathers keys and values of `max_tokens`, where they are not read in their blocks), and a
        prompt shares its chunk with no other.
    prefix_reuse: texts begin with what others have left, where they begin with the same tokens: keys and values, block by block, and above
        level 0 snapshots of states. None: yes, but for `batch_invariant`, for what a text's beginning was read with changes its sums.
    snapshot_bytes: memory for snapshots, those used least recently go first; 0: texts above level 0 are read whole. None: an eighth of
        `kv_bytes`, where that holds one.
    lower_prefixes: texts may begin with what others have read at lower levels, and are raised behind it; otherwise only with what was read
        at their own level.
    draft_level: while few texts run, the model guesses tokens at this level, above that of the texts, and several are checked in one call:
        texts stay what they are. None: it does not. draft_lookup: what followed the same tokens before is guessed.
    draft_tokens: guesses in a call; None: as many as pay, by measured times. draft_rows: texts that may run while tokens are guessed.
    """

    slots: int = 32
    max_waiting: int = 256
    max_tokens: int | None = None
    kv_bytes: int | None = None
    block_size: int = 64
    chunk: int = 1024
    prompt_share: float = 0.4
    prompt_patience: float = 1.0
    max_level: int | None = None
    hold: float = 1.0
    busy_hold: float = 10.0
    cool_down: float = 5.0
    step_timeout: float = 120.0
    batch_invariant: bool = False
    prefix_reuse: bool | None = None
    snapshot_bytes: int | None = None
    lower_prefixes: bool = False
    draft_level: int | None = None
    draft_lookup: bool = False
    draft_tokens: int | None = None
    draft_rows: int = 4
    kv_cache_dtype: str = "auto"

    def __post_init__(self) -> None:
        if not self.reuses and (self.snapshot_bytes or self.lower_prefixes):
            named = f"snapshot_bytes {self.snapshot_bytes}" if self.snapshot_bytes else "lower_prefixes True"
            raise ValueError(f"{named} is for prefix_reuse, which is off here: leave one of them out")
        if self.snapshot_bytes is not None and self.snapshot_bytes < 0:
            raise ValueError(f"snapshot_bytes must be 0 or more, got {self.snapshot_bytes}")
        if self.draft_level is not None and self.draft_lookup:
            raise ValueError(f"draft_level {self.draft_level} beside draft_lookup: one thing drafts; leave one of them out")
        if self.draft_tokens is not None and self.draft_level is None and not self.draft_lookup:
            raise ValueError(f"draft_tokens {self.draft_tokens} without draft_level or draft_lookup: nothing drafts; give one of them")
        if self.batch_invariant and (self.draft_level is not None or self.draft_lookup):
            raise ValueError("drafts are not for batch_invariant: how many tokens a call reads hangs on the load; leave one of them out")
        if self.prefix_reuse and self.batch_invariant:
            raise ValueError("prefix_reuse True is not for batch_invariant: sums depend on what was read before; leave one of them out")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            raise ValueError(f"kv_cache_dtype must be one of {', '.join(KV_CACHE_DTYPES)}, got {self.kv_cache_dtype!r}")
        for name in ("slots", "max_waiting", "block_size", "chunk", "draft_rows", "draft_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if not 0 < self.prompt_share <= 1:
            raise ValueError(f"prompt_share must be above 0 and at most 1, got {self.prompt_share}")
        if not self.prompt_patience >= 0:
            raise ValueError(f"prompt_patience must be a number of seconds, got {self.prompt_patience}")
        if not 0 <= self.step_timeout < math.inf:
            raise ValueError(f"step_timeout must be a number of seconds, or 0 for none, got {self.step_timeout}")

    @property
    def reuses(self) -> bool:
        """Whether texts begin with what others have left."""
        return not self.batch_invariant if self.prefix_reuse is None else self.prefix_reuse


class Engine:
    """Serves a causal LM with or without DSLA layers.

    `step()` does one step; `start()` has a thread of the engine's own call it. `submit` and `cancel` may be called from any thread,
    listeners are called from the one that steps.

    Args:
        model: a causal LM, a `PeftModel` with a DSLA adapter, or a hybrid; in eval mode, on its device.
        policy: what `as_policy` takes.
        eos_tokens: ids that end a text; None: those of the model's generation config.
        record: what records model calls, see `GraphRunner`; None: they run as they are.
        processes: of a model that is cut over several, all of them: each has an engine of the same options, the first serves, and the
            others `follow`. An error in a model call then ends all of them.
    """

    def __init__(
        self,
        model: Any,
        policy: Policy | str | int = 0,
        options: EngineOptions | None = None,
        *,
        eos_tokens: set[int] | None = None,
        record: Record | None = None,
        clock: Callable[[], float] = time.monotonic,
        processes: OneProcess | None = None,
    ):
        self.options = options = options or EngineOptions()
        self.clock = clock
        self.processes = processes = processes or OneProcess()
        self._check_processes(model, record)
        self.levels = levels = Levels(model)
        self.kv_dtype = kv_dtype(options.kv_cache_dtype, levels)
        config = model.config
        self.vocab_size = int(config.vocab_size)
        self.max_tokens = options.max_tokens or int(config.max_position_embeddings)
        if self.max_tokens > config.max_position_embeddings:
            raise ValueError(f"max_tokens {self.max_tokens} is more than the {config.max_position_embeddings} positions of the model")
        if eos_tokens is None:
            ids = model.generation_config.eos_token_id
            eos_tokens = set() if ids is None else {ids} if isinstance(ids, int) else set(ids)
        self.eos_tokens = eos_tokens

        policy = as_policy(policy)
        highest = levels.highest if options.max_level is None else levels.check(options.max_level, "max_level")
        self._stats_of_levels: dict[str, Any] = {
            "max_level": levels.highest,
            "min_level": levels.lowest,
            "num_layers": levels.num_units,
            "unit": levels.unit,
            **levels.unit_bytes(self.kv_dtype),
        }
        if isinstance(policy, FixedLevel):
            highest = policy(Stats(1, 1, 1, 0, **self._stats_of_levels))
            highest = max(highest, levels.lowest)
        levels.cut(highest)
        if levels.unit == "head":
            self._stats_of_levels["ladder"] = tuple(levels.ladder)
            logger.info("levels in use, in KV heads of %d that are DSLA: %s", levels.num_units, levels.ladder)
        check_draft_level(levels, options.draft_level, highest if isinstance(policy, FixedLevel) else levels.lowest)
        self.control = LevelControl(
            policy,
            lowest=levels.lowest,
            highest=highest,
            ladder=levels.ladder,
            hold=options.hold,
            busy_hold=options.busy_hold,
            cool_down=options.cool_down,
            clock=clock,
        )
        if options.lower_prefixes and not levels.exact_fold:
            raise ValueError(
                "lower_prefixes True folds keys and values, which this adapter's own projections make approximate: leave it out"
            )
        num_blocks, snapshot_bytes = processes.least(*self._memory_sizes(highest))
        self.memory = SlotMemory(
            levels,
            num_slots=options.slots,
            num_blocks=num_blocks,
            block_size=options.block_size,
            max_tokens=self.max_tokens,
            max_level=highest,
            kv_dtype=self.kv_dtype,
        )
        one = options.batch_invariant
        if one and (name := next((name for name in EXPERTS if getattr(config, name, None)), None)):
            raise ValueError(f"batch_invariant is not for mixtures of experts ({name} {getattr(config, name)}): leave it out")
        self.runner = (
            ModelRunner(levels, self.memory, one) if record is None else GraphRunner(levels, self.memory, record, options.chunk, one)
        )
        self.next_tokens = NextTokens(options.slots, self.vocab_size, eos_tokens, levels.device, one)
        self.scheduler = Scheduler(options.slots, options.max_waiting)
        self.drafts = drafts_of(options, self.runner, record, clock)
        self.chunk = options.chunk
        self.health = Health()
        runners = [self.runner] if self.drafts is None else [self.runner, *self.drafts.runners]
        self.watchdog = Watchdog(options.step_timeout, lambda: any(runner.preparing for runner in runners), clock)
        self.finished: dict[str, int] = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
        self.reuse = PrefixReuse(self.memory, self._snapshots_fit(snapshot_bytes), options.lower_prefixes)
        self.reuses = options.reuses
        self.generated_tokens = self.read_tokens = 0
        self.prefix_queries = self.prefix_hits = 0  # prompt tokens that were looked for, and found
        self.tokens_at_level = [0] * (highest + 1)  # generated, by the level they were generated at
        self.first_tokens, self.token_times = (RecentMean(MEASURED_SECONDS, MEASURED) for _ in range(2))
        self.token_intervals = Buckets(TOKEN_SECONDS)
        self._chunk_changed = 0.0
        self._alone = True  # whether no cohort of another level runs: else what a token takes says nothing of the level
        self._owed = 0.0  # seconds of generation before prompts are read again
        self._round: Round | None = None  # of drafts, while its tokens are told
        self._untold: list[tuple[Request, Event]] = []
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._inbox: list[Request] = []
        self._unsettled: set[Request] = set()  # got all their tokens, and may have ended at a stop string in the last
        self._draining = self._stopped = self._told_all_over = False
        self._thread: threading.Thread | None = None
        level, reason = processes.tell(self._wanted_level())  # a fixed level holds from the first request on
        if level != self.control.level:
            self._change_level(level, reason)
        self.pinnable = tuple(self.expected_levels())  # those that calls are recorded for

    # --- from any thread ------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: list[int],
        max_tokens: int,
        listener: Callable[[Event], None],
        sampling: Sampling | None = None,
        constraint: Constraint | None = None,
        level: int | None = None,
        stop_strings: bool = False,
    ) -> Request:
        """Queue a text. `listener` is called with each `Event`, first tokens, then the end.

        constraint: what its tokens must follow; it is asked and told of them on the engine's thread, and an error of it ends the request.
        level: that the text has from its first token to its last, whatever that of the server; one of `pinnable`. None: the server's.
        stop_strings: the listener looks for such, and says by `cancel` when it is done. A text that got all its tokens is counted then, for
            it may have ended at a string in the last of them.

        Raises:
            ValueError: if the request can never be served: an empty prompt, ids out of range, a level that is not to be had; TooLong for
                more tokens than fit.
            QueueFull: if too many wait.
            Draining: if the engine takes no more.
        """
        sampling = sampling or Sampling()
        self.check(prompt, max_tokens, sampling, level)
        request = Request(list(prompt), max_tokens, sampling, listener, self.clock(), constraint, level, stop_strings)
        with self._lock:
            if self._draining or self._stopped:
                raise Draining("the server is about to stop and takes no more requests")
            waiting = len(self.scheduler.waiting) + len(self._inbox)
            if waiting >= self.scheduler.max_waiting:
                raise QueueFull(f"{waiting} requests wait already, which is the limit: try again later")
            self._inbox.append(request)
            self._arrived.notify_all()
        return request

    def check(self, prompt: list[int], max_tokens: int, sampling: Sampling | None = None, level: int | None = None) -> None:
        """Raises ValueError if a request can never be served."""
        if sampling is not None:
            sampling.check_tokens(self.vocab_size)
            if sampling.min_tokens > max_tokens:
                raise ValueError(f"min_tokens {sampling.min_tokens} is more than max_tokens {max_tokens}")
        if level is not None and level not in self.pinnable:
            levels = ", ".join(map(str, self.pinnable))
            raise ValueError(f"level {level} cannot be kept: this server runs at {levels}; give one of these, or none")
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be 1 or more, got {max_tokens}")
        if not all(0 <= token < self.vocab_size for token in prompt):
            raise ValueError(f"the prompt holds token ids that are not from 0 to {self.vocab_size - 1}")
        if len(prompt) + max_tokens > self.max_tokens:
            raise TooLong(
                f"{len(prompt)} prompt tokens and max_tokens {max_tokens} are more than the {self.max_tokens} tokens a text may have"
            )
        needed = self.memory.blocks_for(len(prompt) + max_tokens - 1, self.control.highest if level is None else level)
        if needed > self.memory.pool.num_blocks:
            raise TooLong(
                f"{len(prompt)} prompt tokens and max_tokens {max_tokens} need {needed} blocks of memory, there are "
                f"{self.memory.pool.num_blocks}: ask for less, or give the server more memory for keys and values"
            )

    def cancel(self, request: Request, *, stopped: bool = False) -> None:
        """Forget a request before the next token; its listener is told the end. Of no effect on one that has ended, but for what is
        counted, see `submit`.

        stopped: its text is whole, at a string where it had to end: its end is "stop", not "cancelled".
        """
        with self._lock:
            request.stopped = request.stopped or (stopped and not request.cancelled)
            request.cancelled = True
            if request in self._unsettled:
                self._unsettled.remove(request)
                self.finished["stop" if request.stopped else "length"] += 1
            self._arrived.notify_all()

    def start(self) -> None:
        """Serve from a thread of its own, until `stop`."""
        if self._thread is not None:
            raise RuntimeError("the engine runs already")
        self._thread = threading.Thread(target=self._serve, name="dsla-engine", daemon=True)
        self._thread.start()
        self.watchdog.start()

    def drain(self) -> None:
        """Take no more requests; those that are here are served."""
        with self._lock:
            self._draining = True
            self._arrived.notify_all()

    def stop(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """End the thread: with `drain` after the requests that are here (for at most `timeout` seconds), else at once, with their
        cancellation. A thread that hangs is left behind, and the engine is unhealthy for good."""
        self.drain()
        deadline = None if timeout is None else time.monotonic() + timeout
        while drain and self.busy and self._thread is not None and (deadline is None or time.monotonic() < deadline):
            if self.watchdog.problem is not None:
                break
            time.sleep(0.01)
        with self._lock:
            self._stopped = True
            self._arrived.notify_all()
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(0.1)
                if (problem := self.watchdog.problem) is not None:
                    self.health.end(RuntimeError(problem))
                    self._give_up()
                    break
            self._thread = None
        self.watchdog.stop()
        if self.health.fatal:
            return
        self._open_inbox()
        for request in [*self.scheduler.waiting, *self.scheduler.running]:
            self._end(request, "cancelled")
        self._tell_all()
        if self.processes.size > 1 and self.processes.first and not self._told_all_over:
            self._told_all_over = True
            self.processes.tell(Plan(over=True))

    @property
    def draining(self) -> bool:
        return self._draining

    @property
    def busy(self) -> bool:
        """Whether any request is here, or its end has not been told."""
        return bool(self._inbox or self.scheduler.waiting or self.scheduler.running or self._untold)

    @property
    def problem(self) -> str | None:
        """Why requests are not served, None while they are."""
        if self._thread is not None and not self._thread.is_alive() and not self._stopped and not self.health.fatal:
            return "the engine's thread has ended"
        return self.health.problem or self.watchdog.problem

    def snapshot(self) -> dict[str, Any]:
        """Figures of this moment, for pages and metrics."""
        # Slots change in the other thread: what is counted here may be a step old.
        waiting, running = len(self.scheduler.waiting) + len(self._inbox), self.scheduler.running
        pool = self.memory.pool
        return {
            "level": self.control.level,
            "old_level": self.old_level,
            "max_level": self.control.highest,
            "layers": self.levels.num_layers,
            "unit": self.levels.unit,
            "units": self.levels.num_units,
            "ladder": list(self.levels.ladder),
            "kept": self.levels.num_units - self.control.level,
            "waiting": waiting,
            "running": len(running),
            "slots": self.options.slots,
            "oldest_wait": self._oldest_wait(),
            "waiting_tokens": sum(len(request.prompt) for request in list(self.scheduler.waiting)),
            "free_blocks": pool.free_blocks,
            "blocks": pool.num_blocks,
            "bytes_per_token": self.bytes_per_token(self.control.level),
            "seconds_to_first_token": self.first_tokens.mean(self.clock()),
            "seconds_per_token": self.token_times.mean(self.clock()),
            "read_tokens": self.read_tokens,
            "prefix_queries": self.prefix_queries,
            "prefix_hits": self.prefix_hits,
            "prefix_texts": dict(self.reuse.hits),
            "snapshots": self.reuse.snapshots.figures(),
            "generated_tokens": self.generated_tokens,
            "tokens_at_level": list(self.tokens_at_level),
            "finished": dict(self.finished),
            "calls": self.runner.calls(),
            "drafts": None if self.drafts is None else self.drafts.counts(),
            "draining": self._draining,
            "problem": self.problem,
            "failed_steps": self.health.failed_steps,
            "step_seconds": self.watchdog.elapsed,
            "changes": [asdict(change) for change in list(self.control.changes)[-20:]],
        }

    def _oldest_wait(self) -> float | None:
        """Seconds that the oldest request without a first token has waited; None without such a one."""
        here = [*list(self._inbox), *list(self.scheduler.waiting), *self.scheduler.running]
        arrived = min((request.arrived for request in here if request.first_token is None), default=None)
        return None if arrived is None else max(self.clock() - arrived, 0.0)

    def prepare(self, levels: Iterable[int] | None = None) -> None:
        """Record calls at these levels, or at those that the policy goes through, and compile what raises need, before requests come. Not
        while the engine steps."""
        if self.levels.device.type == "cuda":
            self.memory.rehearse_folds(self.expected_levels())
            self.next_tokens.rehearse(self.levels.dtype)
        levels = self.expected_levels() if levels is None else list(levels)
        self.runner.prepare(levels, anywhere=self.reuse.snapshots.budget > 0)
        if self.drafts is not None:
            self.drafts.prepare(levels)

    def forget_prefixes(self) -> None:
        """Let no text begin with what was read until now: for weights that were changed in place. Another adapter needs none of that.

        Raises:
            RuntimeError: while requests are here, for they were begun with the old weights.
        """
        if self.busy:
            raise RuntimeError("requests are running or waiting: let them end before forget_prefixes()")
        self.reuse.forget()

    def expected_levels(self) -> list[int]:
        """The levels that the policy goes through, as far as it tells: all, if it does not."""
        control, policy = self.control, self.control.policy
        if isinstance(policy, FixedLevel):
            return [control.level]
        highest, step, stats = control.highest, 1, self.stats()
        if isinstance(policy, Load):
            highest, step = max(min(highest, policy.highest(stats)), control.lowest), policy.rungs(stats)
        levels = [level for level in self.levels.ladder if level <= highest]
        return sorted({*levels[::step], levels[-1]})

    # --- the thread that steps ------------------------------------------------------------------------------------

    def step(self) -> bool:
        """One step; whether there was anything to do."""
        plan = self._decide()
        if self.processes.size > 1:
            self.processes.tell(plan)
        return self._carry_out(plan)

    def follow(self) -> None:
        """In a process that is not the first: do each step that the first decides, until it stops.

        Raises:
            RuntimeError: if the first is gone, or a step failed.
        """
        while not (plan := self.processes.tell()).over:
            arrived = [text.request() for text in plan.arrived]
            self._take_in(arrived)
            here = {request.number: request for request in [*self.scheduler.waiting, *self.scheduler.running]}
            for number, finish in plan.ended:
                self._end(here[number], finish)
            self._carry_out(plan)
            self._tell_all()

    def abandon(self, error: Exception) -> None:
        """Nothing can be served any more, for a reason from outside: everyone who waits is told."""
        self.health.end(error)
        self._give_up()

    def _decide(self) -> Plan:
        """Let arrivals in and what was cancelled go, and say what the step is to do."""
        now, arrived = self.clock(), self._open_inbox()
        ended = []
        for request in [*self.scheduler.waiting, *self.scheduler.running]:
            if request.cancelled:
                ended.append((request.number, "stop" if request.stopped else "cancelled"))
                self._end(request, ended[-1][1])
        level, reason = self._wanted_level()
        texts = tuple(map(Arrival.of, arrived)) if self.processes.size > 1 else ()
        return Plan(now, texts, tuple(ended), level, reason, self._owed > 0)

    def _carry_out(self, plan: Plan) -> bool:
        """The rest of a step, which follows from the plan and the texts alone; whether there was anything to do."""
        if plan.level != self.control.level:
            self._change_level(plan.level, plan.reason)
        self._admit()
        decoding = self.scheduler.generates
        worked = False
        if not decoding or not plan.owes or self._prompt_is_late(plan.now):
            begin = self.clock()
            worked = self._read_prompts(plan.now)
            if worked and decoding:
                self.runner.wait()
                self._owed = (self.clock() - begin) * (1 / self.options.prompt_share - 1)
        begin = self.clock()
        self._alone = all(request.level == self.control.level for request in self.scheduler.running)
        for level, requests in self.scheduler.decoding().items():
            worked = True
            self._generate(level, requests)
        self._owed -= self.clock() - begin
        if not self.scheduler.generates:  # else while the next tokens are computed
            self._tell_all()
        return worked

    @property
    def old_level(self) -> int | None:
        """The level of the old cohort, None if all run at the same one. Texts that keep a level of their own do not count."""
        return next((text.level for text in self.scheduler.running if text.pinned is None and text.level != self.control.level), None)

    def stats(self) -> Stats:
        """What the policy sees: the running texts as one batch, and what waits."""
        waiting, running = self.scheduler.waiting, self.scheduler.running
        here = [*waiting, *running]
        now = self.clock()
        # Averages come late when nothing moves: who waits for a first token counts with what it has waited.
        first = [now - request.arrived for request in here if request.first_token is None]
        if (recent := self.first_tokens.mean(self.clock())) is not None:
            first.append(recent)
        return Stats(
            prompt_tokens=max((len(request.prompt) for request in here), default=0),
            tokens=max((request.length for request in here), default=0),
            rows=len(running),
            level=self.control.level,
            seconds_per_token=self.token_times.mean(self.clock()),
            seconds_since_change=now - self.control.changed,
            queue_depth=len(waiting),
            longest_waiting_prompt=max((len(request.prompt) for request in waiting), default=0),
            waiting_tokens=sum(request.unread for request in here if not request.decoding),
            free_share=self.memory.pool.free_blocks / self.memory.pool.num_blocks,
            seconds_to_first_token=max(first, default=None),
            **self._stats_of_levels,
        )

    def _serve(self) -> None:
        try:
            while not (self._stopped or self.health.fatal):
                self._serve_once()
        except BaseException as error:  # the thread ends, and all know it
            self.health.end(error)
        if self.health.fatal:
            self._give_up()

    def _serve_once(self) -> None:
        try:
            with self.watchdog.step():
                worked = self.step()
            if worked:
                self.health.succeeded("step")
        except Exception as error:  # whatever it is, the server goes on, and nobody waits for ever
            logger.exception("a step failed outside the model")
            self.health.failed("step", error)
            if self.health.fatal:
                return
            for request in [*self.scheduler.running, *self.scheduler.waiting]:
                self._end(request, error=error)
            self._tell_all()
            worked = False
        if not worked:
            with self._arrived:
                if not (self._stopped or self._inbox):
                    self._arrived.wait(IDLE_SECONDS)

    def _give_up(self) -> None:
        """Nothing works any more: everyone who waits is told, without a touch of the device."""
        self.drain()
        self._open_inbox()
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            if request.finished is None:
                request.finished = self.clock()
                with self._lock:
                    self.finished["error"] += 1
                self._tell(request, Event(error=RuntimeError(self.health.problem)))
            self.scheduler.remove(request)
        self._tell_all()
        self.health.over.set()

    def _open_inbox(self) -> list[Request]:
        """What has arrived waits now."""
        with self._lock:
            arrived = list(self._inbox)
            self._take_in(arrived)
            self._inbox.clear()
        return arrived

    def _take_in(self, arrived: list[Request]) -> None:
        self.scheduler.waiting.extend(arrived)
        for request in arrived if self.reuses else ():
            self.reuse.arrived(request)

    # --- levels ---------------------------------------------------------------------------------------------------

    def _wanted_level(self) -> tuple[int, str]:
        """The level to go to now, and why."""
        if self.old_level is not None:  # one change at a time: the old cohort drains first
            return self.control.level, ""
        try:
            return self.control.wanted(self.stats())
        except Exception:
            logger.exception("the policy failed: the level stays at %d from now on", self.control.level)
            self.control.policy = FixedLevel(self.control.level)
            return self.control.level, ""

    def _change_level(self, level: int, reason: str) -> None:
        """Raise all running texts, exactly; or lower newcomers only, for keys and values of converted layers are gone."""
        if level > self.control.level and self.levels.exact_fold:
            if not self.options.lower_prefixes:
                for request in self.scheduler.running:
                    if request.pinned is None and request.given and request.cached == request.given:
                        self.reuse.leave(request, level)  # of what it begins with nothing was read at the new level
            for group in self._folded_together():
                self._raise(group, level)
        self.control.change(level, reason, self.levels.note(level))
        for times in (self.first_tokens, self.token_times):
            times.clear()  # of another level

    def _folded_together(self) -> list[list[Request]]:
        """Running texts that follow the level, in groups of about the same length, of no more tokens than a fold has memory for."""
        groups: list[list[Request]] = []
        follow = (request for request in self.scheduler.running if request.pinned is None)
        for request in sorted(follow, key=lambda request: -request.cached):
            if not groups or self.options.batch_invariant or (len(groups[-1]) + 1) * groups[-1][0].cached > FOLDED_AT_ONCE:
                groups.append([])
            groups[-1].append(request)
        return groups

    def _raise(self, requests: list[Request], level: int) -> None:
        slots = [request.slot for request in requests if request.slot is not None]
        try:
            self.memory.fold(slots, [request.cached for request in requests], requests[0].level, level)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            self.memory.fold(slots, [0] * len(slots), requests[0].level, level)
            for request in requests:
                self._begin_anew(request)  # at the level that needs less
        for request in requests:
            request.reads_at(level)
            if self.options.lower_prefixes:
                request.published = 0  # what it keeps of its blocks can be found at this level
            request.note_level(self.clock())

    # --- the queue ------------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let the queue in while there are slots and blocks, in order of arrival."""
        waiting = self.scheduler.waiting
        while waiting and (slot := self.scheduler.free_slot()) is not None:
            request, pool = waiting[0], self.memory.pool
            level = self.control.level if request.pinned is None else request.pinned
            match = self.reuse.match(request, level) if self.reuses else Match()
            # Blocks that others hold are not needed again.
            if self.memory.blocks_for(request.most_tokens, level) - pool.prefixes.blocks_in_use(match.columns) > pool.free_blocks:
                if self.scheduler.running or request.pinned is not None:
                    return
                level = next(
                    higher for higher in self.control.from_here() if self.memory.blocks_for(request.most_tokens, higher) <= pool.free_blocks
                )
                self._change_level(level, f"a text of {request.most_tokens} tokens does not fit into memory at a lower level")
                match = self.reuse.match(request, level) if self.reuses else Match()
            self.memory.allocate(slot, request.most_tokens, level, match.columns)
            self.scheduler.place(request, slot)
            request.reads_at(level)
            request.note_level(self.clock())
            self.reuse.begin(request, match)

    # --- model calls ----------------------------------------------------------------------------------------------

    def _prompt_is_late(self, now: float) -> bool:
        unread = self.scheduler.to_read()
        return bool(unread) and now - unread[0].arrived >= self.options.prompt_patience

    def _read_prompts(self, now: float) -> bool:
        """Read up to a chunk of prompt tokens, oldest requests first, so that running texts wait for no more than that."""
        if self.chunk < self.options.chunk and now - self._chunk_changed >= CHUNK_RECOVERY_SECONDS:
            self._set_chunk(self.chunk * 2)
        budget = self.chunk
        unread = deque(self.scheduler.to_read())
        while unread and budget:
            pieces = self._next_pieces(unread, budget)
            budget -= sum(piece.tokens for piece in pieces)
            if not pieces:
                break
            if not self._read_pieces(pieces):
                return True
        return budget < self.chunk

    def _next_pieces(self, unread: deque[Request], budget: int) -> list[Piece]:
        """What the next call reads, of the oldest prompt or of several; what is not to be read further in this step leaves `unread`."""
        piece = self._next_piece(unread[0], budget)
        if piece is None:
            return []
        if not piece.keeps or piece.tokens == piece.request.unread:
            unread.popleft()
        level, pieces = piece.request.level, [piece]
        room = self.runner.room_together(level) if self._may_share(piece.request) else 0
        room, budget = room - in_whole_rows(piece.tokens), budget - piece.tokens
        known = set(self._blocks_of(piece))
        while unread and room > 0 and budget > 0 and unread[0].level == level and self._may_share(unread[0]):
            piece = self._next_piece(unread[0], min(budget, room))
            # What begins with a block that this very call reads is read after it, and finds it.
            if piece is None or not known.isdisjoint(self._blocks_of(piece)):
                break
            pieces.append(piece)
            known.update(self._blocks_of(piece))
            room, budget = room - in_whole_rows(piece.tokens), budget - piece.tokens
            unread.popleft()
        return pieces

    def _may_share(self, request: Request) -> bool:
        """Whether a call that reads a prompt may read others, too."""
        return not (self.options.batch_invariant or request.scores_prompt or request.reads_alone)

    def _next_piece(self, request: Request, budget: int) -> Piece | None:
        """What to read of a prompt now; None if of so many tokens nothing can be."""
        if first := request.cached == request.given and self.reuses:  # others may have left more since it was admitted
            self.reuse.begin(request, self.reuse.match(request, request.level, lower=request.cached == 0))
        tokens = self._piece(request, self.chunk if self.options.batch_invariant else budget)
        if not 0 < tokens <= budget:
            return None
        keeps = False
        if self.reuses:
            if tokens == request.unread and not first:
                self.reuse.keep(request)
            tokens, keeps = self.reuse.piece(request, tokens)
        return Piece(request, tokens, first, keeps)

    def _blocks_of(self, piece: Piece) -> list[bytes]:
        """Hashes of the whole blocks that others can find behind a piece."""
        request, size = piece.request, self.options.block_size
        return request.keys[request.cached // size : (request.cached + piece.tokens) // size] if self.reuses else []

    def _read_pieces(self, pieces: list[Piece]) -> bool:
        """Read pieces of prompts in a call, and choose the first tokens of the texts that they end; False if that failed."""
        requests = [piece.request for piece in pieces]
        done = [number for number, piece in enumerate(pieces) if piece.tokens == piece.request.unread]
        try:
            if len(pieces) > 1:
                logits = self.runner.prefill_together([(piece.request, piece.tokens) for piece in pieces])
            else:
                read = self._read_scored if requests[0].scores_prompt else self.runner.prefill
                logits = read(requests[0], pieces[0].tokens)[None]
            chosen: dict[int, NextToken] = {}
            if done:
                if len(done) < len(pieces):
                    logits = torch.stack([logits[number] for number in done])
                chosen = dict(zip(done, self._chosen(logits, [requests[number] for number in done]), strict=True))
        except Exception as error:
            if len(pieces) > 1 and self.processes.size == 1 and not (out_of_memory(error) or is_sticky(error)):
                self._try_alone(requests, error)
            else:
                self._failed(requests, error)
            return False
        self.health.succeeded("prefill")
        for number, (request, tokens, first, keeps) in enumerate(pieces):
            request.cached += tokens
            self.read_tokens += tokens
            token = chosen.get(number)
            if self.reuses:
                if first and not request.tokens and not request.scores_prompt:
                    self.prefix_queries += request.length
                    self.prefix_hits += request.given
                if first and request.given:
                    self.reuse.count(request)
                (self.reuse.keep if keeps or token is not None else self.reuse.publish)(request)
            if token is not None:
                self._accept(request, token)
        return True

    def _piece(self, request: Request, budget: int) -> int:
        """How many tokens of a prompt to read now. What comes behind whole windows is less work, so all pieces but the last end with one,
        if a chunk has any. 0: of this chunk no window is left."""
        most, window = self.chunk, self.levels.window
        if request.scores_prompt:
            most = min(most, max(LOGITS_BYTES // (self.vocab_size * self.levels.dtype.itemsize), MIN_CHUNK))
        tokens = min(budget, most, request.unread)
        if tokens == request.unread and tokens <= window:
            return tokens
        if window and most >= window and request.level and (within := request.cached % window):
            # Behind a snapshot: what begins within a window is more work, and so ends with it.
            return window - within if budget >= window - within else 0
        if tokens == request.unread or not window or most < window or request.cached % window:
            return tokens
        return tokens - tokens % window

    def _read_scored(self, request: Request, tokens: int) -> Tensor:
        """Read a piece of a prompt, and note how likely its tokens are; logits `[V]` after it."""
        logits = self.runner.prefill_scored(request, tokens)
        most, start = request.sampling.prompt_logprobs or 0, request.cached
        request.scored = [(end, lines) for end, lines in request.scored if end <= start]  # what was read before the text began anew
        if following := request.prompt[start + 1 : start + tokens + 1]:
            ids = sent(torch.tensor(following), self.levels.device)
            request.scored.append((start + tokens, scored(logits[: len(following)], ids, most, self.next_tokens.at_once)))
        if tokens == request.unread:
            tokens_there = request.prompt[1:]
            lines = torch.cat([lines for _, lines in request.scored], 1).cpu() if tokens_there else torch.empty(0, 0, dtype=torch.int32)
            found = logprobs_of(lines, tokens_there, [most] * len(tokens_there))
            request.prompt_logprobs, request.scored = tuple(one for one in found if one is not None), []
        return logits[-1]

    def _generate(self, level: int, requests: list[Request]) -> None:
        scheduler, drafts = self.scheduler, self.drafts
        most = 0 if drafts is None else drafts.most(level, requests, len(scheduler.running), len(scheduler.waiting))
        if drafts is not None and most and self._generate_drafted(drafts, level, requests, most):
            return
        begin = self.clock()
        try:
            logits = self.runner.decode(level, requests)
            # A GPU is at work now: the host has time to tell, also for what listeners set off in other threads.
            tokens = self._chosen(logits, requests, self._tell_all)
        except Exception as error:
            self._failed(requests, error)
            return
        self.health.succeeded("decode")
        if drafts is not None:
            drafts.plain(most, self.clock() - begin)
        for request, token in zip(requests, tokens, strict=True):
            request.cached += 1
            self._accept(request, token)

    def _generate_drafted(self, drafts: Drafts, level: int, requests: list[Request], most: int) -> bool:
        """As `_generate`, up to `most` + 1 tokens of each text in one call; whether there was a draft."""
        try:
            done = drafts.check(level, requests, most)
            if done is None:
                return False
            self._round = done
            # Of several processes the first chooses, token by token.
            chosen = self.next_tokens.several(done.logits, requests, self._tell_all) if self.processes.size == 1 else None
            going, place = list(range(len(requests))), 0
            while going:  # token by token, as without drafts: what is asked of a token may hang on those before it
                texts = [requests[number] for number in going]
                if chosen is not None:
                    tokens = [chosen[number][place] for number in going]
                else:
                    tokens = self._chosen(done.logits[going, place], texts, self._tell_all if place == 0 else None)
                went_on = []
                for number, request, token in zip(going, texts, tokens, strict=True):
                    request.cached += 1
                    right = done.took(number, token.token)
                    self._accept(request, token)
                    if right and request.finished is None and not request.cancelled:
                        went_on.append(number)
                going, place = went_on, place + 1
            drafts.keep(done, most)
        except Exception as error:
            if not (running := [request for request in requests if request.finished is None]):
                raise
            self._failed(running, error)
            return True
        finally:
            self._round = None
        self.health.succeeded("decode")
        return True

    def _chosen(self, logits: Tensor, requests: list[Request], meanwhile: Callable[[], None] | None = None) -> list[NextToken]:
        """The next tokens of texts, which their constraints have taken; of several processes the first chooses."""
        if not self.processes.first:
            return [NextToken(token, None, NotChosen() if failed else None) for token, failed in self.processes.tell()]
        chosen = []
        for request, drawn in zip(requests, self.next_tokens(logits, requests, meanwhile), strict=True):
            if request.constraint is not None and drawn.error is None:
                try:
                    request.constraint.accept(drawn.token)
                except Exception as failure:  # whatever it is, it is of this text alone
                    drawn = drawn._replace(error=failure)
            chosen.append(drawn)
        if self.processes.size > 1:
            self.processes.tell([(drawn.token, drawn.error is not None) for drawn in chosen])
        return chosen

    def _accept(self, request: Request, drawn: NextToken) -> None:
        """A new token of a text."""
        token, error = drawn.token, drawn.error
        if error is not None:
            logger.warning("the constraint of request %d failed: %r", request.number, error)
            self._end(request, error=error)
            return
        now = self.clock()
        if request.first_token is None:
            request.first_token = now
            self.first_tokens.add(now, now - request.arrived)
        else:
            self.token_intervals.add(now - request.last_token)
            if self._alone:
                self.token_times.add(now, now - request.last_token)
        request.last_token = now
        if token in request.sampling.stop_token_ids or (token in self.eos_tokens and not request.sampling.ignore_eos):
            self._end(request, "stop")
            return
        request.tokens.append(token)
        self.generated_tokens += 1
        self.tokens_at_level[request.level] += 1
        self._tell(request, Event(token=token, logprob=drawn.logprob))
        if len(request.tokens) >= request.max_tokens:
            self._end(request, "length")

    # --- ends -----------------------------------------------------------------------------------------------------

    def _failed(self, requests: list[Request], error: Exception) -> None:
        """A model call went wrong. What it had begun to write is worthless: texts begin anew, or end.

        After any error but a lack of memory they end. Without memory the newest is given up, the level rises if it can, and prompts
        are read in smaller pieces, which grow again in time.
        """
        self.health.failed("decode" if requests[0].decoding else "prefill", error)
        if self.processes.size > 1:  # the others wait in the middle of a layer
            self.health.end(error)
            raise error
        if not out_of_memory(error):
            logger.error("a step with %d requests failed", len(requests), exc_info=error)
            for request in requests:
                self._end(request, error=error)
            return
        self.reuse.snapshots.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._set_chunk(self.chunk // 2)
        newest = max(requests, key=lambda request: request.number)
        logger.warning("out of memory with %d requests: request %d is given up", len(requests), newest.number)
        self._end(newest, error=ShedForMemory("memory does not suffice for this request now: try again later, or with fewer tokens"))
        for request in requests:
            if request is not newest:
                self._begin_anew(request)
        if (higher := self.control.from_here()[1:]) and self.old_level is None:
            self._change_level(higher[0], "out of memory")

    def _try_alone(self, requests: list[Request], error: Exception) -> None:
        """A call that read pieces of several prompts went wrong, and does not say because of which: from now on each is read alone, where
        an error is its own."""
        self.health.failed("prefill", error)
        logger.error("a call with pieces of %d prompts failed: each is read alone now", len(requests), exc_info=error)
        for request in requests:
            request.reads_alone = True

    def _begin_anew(self, request: Request) -> None:
        """What is cached of a text is worthless: it is read again, into blocks that no other text sees."""
        assert request.slot is not None
        request.cached = request.published = request.given = 0
        request.reads_at(request.level)
        try:
            self.memory.pool.unshare(request.slot)
        except OutOfBlocks as error:
            logger.warning("request %d is given up: %s", request.number, error)
            self._end(request, error=ShedForMemory("memory does not suffice for this request now: try again later, or with fewer tokens"))

    def _set_chunk(self, tokens: int) -> None:
        self.chunk = min(max(tokens, MIN_CHUNK), self.options.chunk)
        self._chunk_changed = self.clock()

    def _end(self, request: Request, finish: str | None = None, error: Exception | None = None) -> None:
        """A request is over: its slot and blocks are free at once."""
        if request.finished is not None:
            return
        if request.slot is not None:
            if error is None and self._settled(request) and self.reuses:
                self.reuse.keep(request)  # a chat goes on from its answer
            self.memory.release(request.slot)
        if self.reuses:
            self.reuse.gone(request)
        self.scheduler.remove(request)
        request.finished = self.clock()
        with self._lock:  # other threads count what they read
            if finish == "length" and request.stop_strings and not request.cancelled:
                self._unsettled.add(request)
            else:
                self.finished["stop" if finish == "length" and request.stopped else finish or "error"] += 1
        self._tell(request, Event(finish=finish, error=error))

    def _settled(self, request: Request) -> bool:
        """Whether what others go on from is whole. A text that lacks memory for that ends all the same: begun anew it would go on."""
        if self._round is None:
            return True
        try:
            self._round.settle(request)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            logger.warning("memory does not suffice for the states of request %d: nothing is kept of it", request.number)
            self._round.drop(request)
            self.reuse.snapshots.clear()
            return False
        return True

    def _tell(self, request: Request, event: Event) -> None:
        """Note what the listener of a request is to be told."""
        if request.prompt_logprobs is not None:
            event, request.prompt_logprobs = replace(event, prompt_logprobs=request.prompt_logprobs), None
        self._untold.append((request, event))

    def _tell_all(self) -> None:
        events, self._untold = self._untold, []
        for request, event in events:
            try:
                request.listener(event)
            except Exception:
                logger.exception("the listener of request %d failed", request.number)
                request.cancelled = True

    def _check_processes(self, model: Any, record: Record | None) -> None:
        """Raises ValueError for what a model that is cut over processes cannot have."""
        count = self.processes.size
        if is_tensor_parallel(model) != (count > 1):
            cut = "cut over processes" if is_tensor_parallel(model) else "whole in this process"
            raise ValueError(
                f"the model is {cut}, and processes has {count}: give SharedProcesses() to a model that is cut, and to no other"
            )
        if count == 1:
            return
        if record is not None:
            raise ValueError("record is not for tensor parallelism: layers exchange activations in the middle of a step; leave it out")
        if self.options.draft_level is not None or self.options.draft_lookup:
            raise ValueError("drafts are not for tensor parallelism: how many there are hangs on the clock of each process; leave them out")

    # --- sizes and times ------------------------------------------------------------------------------------------

    @property
    def bytes_per_block(self) -> int:
        """Of keys and values."""
        levels = self.levels
        return 2 * self.options.block_size * levels.columns * levels.head_dim * self.kv_dtype.itemsize

    def bytes_per_token(self, level: int) -> int:
        """Of keys and values of a text at a level, in this process; what DSLA keeps of it does not grow."""
        levels = self.levels
        kept = levels.num_layers * levels.kv_heads - sum(map(len, levels.converted(level).values()))
        return 2 * kept * levels.head_dim * self.kv_dtype.itemsize

    def _memory_sizes(self, max_level: int) -> tuple[int, int]:
        """Blocks, and bytes for snapshots."""
        levels, options = self.levels, self.options
        free, limit = None, physical_memory()
        if levels.device.type == "cuda":
            heads = levels.converted(levels.highest).items()
            rows = options.slots + (0 if options.draft_level is None else 2 * options.draft_rows)
            states = sum(4 * 2 * len(some) * levels.cores[i].key_dim * levels.cores[i].value_dim for i, some in heads) * rows
            free = limit = int(0.9 * torch.cuda.mem_get_info(levels.device)[0]) - states
        room, snapshots = options.kv_bytes, options.snapshot_bytes
        if snapshots is not None and snapshots > limit:
            raise ValueError(f"snapshot_bytes {snapshots} are more than the {limit} bytes of memory that there are: give less")
        share = SNAPSHOT_SHARE if snapshots is None and options.reuses and max_level else 0.0
        if room is None:
            room = 2**29 if free is None else int((free - (snapshots or 0)) * (1 - share))
        if snapshots is None:
            snapshots = int(share * room) if free is None else max(min(int(share * room), free - room), 0)
        # More than all slots can fill is of no use.
        useful = options.slots * max(len(levels.groups), 1) * -(-self.max_tokens // options.block_size)
        blocks = min(room // self.bytes_per_block, useful)
        if blocks < 1:
            raise ValueError(f"kv_bytes {room} hold no block of {self.bytes_per_block} bytes: give more memory for keys and values")
        return blocks, snapshots

    def _snapshots_fit(self, budget: int) -> int:
        """The bytes for snapshots, if they hold one of any level in use; none are kept where an engine that was told nothing of them has
        less."""
        levels = (level for level in self.levels.ladder if 0 < level <= self.control.highest)
        largest = max(map(self.memory.snapshot_bytes, levels), default=0)
        if budget >= largest > 0 or budget == 0:
            return budget
        if self.options.snapshot_bytes is None:
            logger.info("a snapshot of states takes %d bytes, %d are there: texts above level 0 are read whole", largest, budget)
            return 0
        if not largest:
            raise ValueError(f"snapshot_bytes {budget} are of no use: this engine runs at level 0 alone, where texts share blocks; give 0")
        raise ValueError(f"snapshot_bytes {budget} hold no snapshot, which takes {largest} bytes: give as much or more, or 0 for none")


def physical_memory() -> int:
    """Bytes of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
