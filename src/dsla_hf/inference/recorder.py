"""Steps that are recorded once and replayed, as CUDA graphs are: a launch a step instead of thousands.

A step is a function without arguments, whose inputs and outputs lie at fixed addresses, under a key that says what its kernels depend on.
The first step of a key is a rehearsal: it runs as it is, which compiles and warms up what it needs. The second is recorded, all others are
replayed. Sizes in keys are rounded up (`power_of_two`, `shown_tokens`), so that few recordings are needed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any, Protocol

import torch

from .batching import out_of_memory
from .fusion import can_compile, fused
from .joined import join_weights

logger = logging.getLogger(__name__)

SMALLEST_SHOWN = 256  # tokens of a cache that a step is shown at least; more when they are reached, doubled each time
TRIES = 3  # of a recording that finds no memory
PAUSE = 100  # steps that run as they are before the next such try; doubled each time

COST = "runs as it is, a launch for every kernel, which for small batches takes several times as long"

Step = Callable[[], None]


class Recording(Protocol):
    """One step, to be run again and again on whatever its buffers hold then."""

    def replay(self) -> None: ...


# Makes a recording of a step, and of the memory that recordings share; it does not run the step.
Record = Callable[[Step, Any], Recording]


class CudaRecording:
    """A step captured in a CUDA graph, which does not run it."""

    def __init__(self, step: Step, pool: Any):
        self.graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # Calls of other threads, such as a data loader's that pins memory, do not end the capture.
            with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):
                step()
        except BaseException:
            # PyTorch leaves its random numbers as if a capture that broke off went on: one that ends well sets them right.
            with suppress(RuntimeError), torch.cuda.graph(torch.cuda.CUDAGraph()):
                torch.zeros(1, device=stream.device)
            torch.cuda.set_stream(stream)  # nor does it leave the stream of such a capture
            raise

    def replay(self) -> None:
        self.graph.replay()


class PlainRecording:
    """Calls the step: the same logic without a GPU, for tests."""

    def __init__(self, step: Step, pool: Any = None):
        self.replay = step


class Recorder:
    """Records and replays the steps of one model.

    Where a recording fails, steps of that key run as they are, and a line says why and what it costs. Of a lack of memory there are
    `TRIES` tries, the next one after `PAUSE` steps (twice as many each time), or when recordings were dropped, or after `try_again`.

    Args:
        model: a model of transformers, whose layers are fused while a step is rehearsed and recorded.
        record: what records a step: `CudaRecording`, or `PlainRecording` for tests.
        fuse: on a CUDA device, fuse layers (`dsla_hf.inference.fusion`), and lay weights of one x beside each other
            (`dsla_hf.inference.joined`); that is done now, for recordings have the addresses of weights.
        for_memory: how to have more memory, in words, for the line that says it does not suffice.

    Attributes:
        recordings: by key.
        capture_seconds: what each recording took, in order.
        replayed, plain: steps that were replayed, and such that ran as they are though they had been rehearsed.
        reason: why the last recording that failed did so; None if none did.
        preparing: whether a step is rehearsed or recorded now, which may compile what it needs.
    """

    def __init__(self, model: Any, record: Record = CudaRecording, *, fuse: bool = True, for_memory: str = "give smaller batches"):
        self.model, self.record, self.for_memory = model, record, for_memory
        self.recordings: dict[Hashable, Recording] = {}
        self.capture_seconds: list[float] = []
        self.replayed = self.plain = 0
        self.reason: str | None = None
        self.preparing = False
        self._fuse = fuse
        if fuse and model.device.type == "cuda":
            join_weights(model)
        self._rehearsed: set[Hashable] = set()
        self._failures: dict[Hashable, int] = {}  # tries that failed; TRIES: there are no more
        self._said: set[str] = set()
        self._pause, self._resume = PAUSE, 0  # the next try, in steps that ran as they are
        self._pool: Any = None
        self._side: Any = None

    def run(self, key: Hashable, step: Step, prompt: bool = False) -> bool:
        """Run a step: replayed, or recorded and replayed, or as it is. True if it was the rehearsal of this key.

        prompt: the step reads a piece of a prompt; such are fused apart from those of single tokens.
        """
        recording = self.recordings.get(key)
        if recording is None:
            if key not in self._rehearsed:
                with self._prepares():
                    self._rehearse(key, step, prompt)
                return True
            recording = self._recorded(key, step, prompt)
        if recording is None:
            self.plain += 1
            step()
        else:
            self.replayed += 1
            recording.replay()
        return False

    def prepare(self, key: Hashable, step: Step, prompt: bool = False) -> bool:
        """Rehearse and record a step, if need be, so that `run` replays it; whether it will. Counts as a step that runs as it is if not."""
        if key in self.recordings:
            return True
        if self._may_record(key) and (key in self._rehearsed or self._succeeds(key, self._rehearse, step, prompt)):
            self._recorded(key, step, prompt)
        self.plain += key not in self.recordings
        return key in self.recordings

    def drop(self, which: Callable[[Any], bool]) -> None:
        """Forget the keys for which `which` holds, and free their recordings."""
        for kept in (self.recordings, self._failures):
            for key in [key for key in kept if which(key)]:
                del kept[key]
        self._rehearsed = {key for key in self._rehearsed if not which(key)}
        self._resume = self.plain

    def clear(self) -> None:
        """Forget all keys; what is recorded from now on has memory of its own."""
        self.drop(lambda key: True)
        self._pool = None
        self.try_again()

    def try_again(self) -> None:
        """Recordings that failed may be tried again from now on."""
        self._failures.clear()
        self._pause, self._resume = PAUSE, self.plain

    def fused(self, prompt: bool = False) -> AbstractContextManager[None]:
        """Within it the model's layers are fused, where they can be."""
        device = self.model.device
        if not self._fuse or device.type != "cuda":
            return nullcontext()
        if not can_compile(device):
            self._fuse = False
            logger.warning("torch.compile does not work here (dsla_hf.inference.fusion): steps have more launches, and take longer")
            return nullcontext()
        return fused(self.model, prompt=prompt)

    def _rehearse(self, key: Hashable, step: Step, prompt: bool) -> None:
        """Run a step as it is, on another stream than the current one, as libraries that a graph shall capture want it at first."""
        device = self.model.device
        with self.fused(prompt):
            if device.type == "cuda":
                self._side = self._side or torch.cuda.Stream(device)
                self._side.wait_stream(torch.cuda.current_stream(device))
                with torch.cuda.stream(self._side):
                    step()
                torch.cuda.current_stream(device).wait_stream(self._side)
            else:
                step()
        self._rehearsed.add(key)

    def _may_record(self, key: Hashable) -> bool:
        return self.plain >= self._resume and self._failures.get(key, 0) < TRIES

    def _recorded(self, key: Hashable, step: Step, prompt: bool) -> Recording | None:
        if self._may_record(key) and self._succeeds(key, self._capture, step, prompt):
            self._failures.pop(key, None)
            self._pause = PAUSE
        return self.recordings.get(key)

    def _capture(self, key: Hashable, step: Step, prompt: bool) -> None:
        if self._pool is None and self.model.device.type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()  # one for all recordings: no two run at a time
        start = time.perf_counter()
        try:
            with self.fused(prompt):
                self.recordings[key] = self.record(step, self._pool)
        except BaseException:
            self._pool = None  # a capture that broke off leaves its memory as if it went on: later ones have other memory
            raise
        finally:
            self.capture_seconds.append(time.perf_counter() - start)

    @contextmanager
    def _prepares(self) -> Iterator[None]:
        self.preparing = True
        try:
            yield
        finally:
            self.preparing = False

    def _succeeds(self, key: Hashable, attempt: Callable[[Hashable, Step, bool], None], step: Step, prompt: bool) -> bool:
        try:
            with self._prepares():
                attempt(key, step, prompt)
            return True
        except Exception as error:
            self._failed(key, error)
        # Here, outside the handler, nothing holds the memory of the failed attempt any more.
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def _failed(self, key: Hashable, error: Exception) -> None:
        """Note that a key could not be recorded, and say so."""
        self.reason = next(iter(str(error).splitlines()), type(error).__name__)
        logger.debug("a step of kind %s was not recorded", key, exc_info=error)
        if _lacks_memory(error):
            tries = self._failures[key] = self._failures.get(key, 0) + 1
            self._resume = self.plain + self._pause
            logger.warning(
                "memory does not suffice to record a step: it %s. %s; for more memory %s",
                COST,
                f"Tried again after {self._pause} such steps" if tries < TRIES else f"That was try {TRIES} of {TRIES}",
                self.for_memory,
            )
            self._pause *= 2
            return
        self._failures[key] = TRIES
        if self.reason not in self._said:
            self._said.add(self.reason)
            logger.warning("a step of this model cannot be recorded (%s): it %s", self.reason, COST)


def _lacks_memory(error: BaseException | None) -> bool:
    """Whether an error is a lack of memory, or came while one was handled: the end of a capture that failed raises an error of its own."""
    while error is not None:
        if out_of_memory(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def power_of_two(number: int) -> int:
    """The smallest that is no less than `number`, 1 or more."""
    return 1 << (number - 1).bit_length()


def shown_tokens(tokens: int) -> int:
    """How much of a cache a step is shown that needs the first `tokens` of it."""
    return power_of_two(max(tokens, SMALLEST_SHOWN))
