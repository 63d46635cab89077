"""Steps of decoding that are recorded once and replayed, as CUDA graphs are: a launch a step instead of thousands."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..fused_steps import LONG_PROMPT, can_compile, fused
from .levels import Levels
from .request import Request
from .runner import ModelRunner
from .slots import SlotMemory

logger = logging.getLogger(__name__)

SMALLEST_PAST = 256  # tokens
# Makes of a step, and of the memory that recordings share, something with `replay()`; it must not run the step.
Record = Callable[[Callable[[], None], Any], Any]


class GraphRunner(ModelRunner):
    """A recording for each (level, rows, past) in use; rows and past are rounded up to powers of two, so that few are needed. Where
    attention reads keys and values in their blocks, past is 0.

    The first step of a kind runs as it is, which compiles and warms up what it needs; the second is recorded.

    Args:
        record: such as `dsla_hf.graph.CudaRecording`; `PlainRecording` for tests.
    """

    def __init__(self, levels: Levels, memory: SlotMemory, record: Record):
        super().__init__(levels, memory)
        slots, device = memory.num_slots, levels.device
        self.record: Record | None = record
        self.ids, self.lengths = (torch.zeros(slots, dtype=torch.long, device=device) for _ in range(2))
        self.active = torch.zeros(slots, dtype=torch.bool, device=device)
        self.recordings: dict[tuple[int, int, int], Any] = {}  # None after the first step
        self._logits: Tensor | None = None  # [slots, V], made by the first step
        self._pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None

    @torch.no_grad()
    def prepare(self, levels: Iterable[int]) -> None:
        """Record what these levels need with any number of rows, so that no text waits for it. For an idle engine; where recordings are
        for a length too, those of longer texts are left to their first step."""
        slots = self.memory.num_slots
        rows = sorted({min(_power_of_two(count), slots) for count in range(1, slots + 1)})
        for level in tqdm(list(levels), desc="recording steps", unit="level", disable=None):
            for count in rows:
                # Padding alone: it belongs to nobody, and is written nowhere.
                for _ in range(2):  # as it is, then recorded
                    self._run(level, [0] * count, [0] * count, [False] * count)

    @torch.no_grad()
    def prefill(self, request: Request, tokens: int) -> Tensor:
        with self._fused(prompt=True) if tokens >= LONG_PROMPT and self.record is not None else nullcontext():
            return super().prefill(request, tokens)

    def _run(self, level: int, ids: list[int], lengths: list[int], active: list[bool]) -> Tensor:
        rows = min(_power_of_two(len(ids)), self.memory.num_slots)
        past = 0 if self.in_blocks else _power_of_two(max(max(lengths), SMALLEST_PAST))
        rest = rows - len(ids)
        for buffer, values in ((self.ids, ids + [0] * rest), (self.lengths, lengths + [0] * rest), (self.active, active + [False] * rest)):
            buffer[:rows].copy_(torch.tensor(values, dtype=buffer.dtype))

        def step() -> None:
            logits = self._step(level, self.ids[:rows], self.lengths[:rows], self.active[:rows], past)
            if self._logits is None:
                self._logits = logits.new_empty(self.memory.num_slots, logits.shape[1])
            self._logits[:rows].copy_(logits)

        key = (level, rows, past)
        if key in self.recordings and self.recordings[key] is None and self.record is not None:
            try:
                with self._fused():
                    self.recordings[key] = self.record(step, self._pool)
            except Exception:  # nothing has run yet: go on without
                logger.exception("a step cannot be recorded: from now on steps run as they are")
                self.record = None
        recording = self.recordings.setdefault(key, None)
        if recording is None:
            with self._fused() if self.record is not None else nullcontext():
                step()
        else:
            recording.replay()
        assert self._logits is not None
        return self._logits

    def _fused(self, prompt: bool = False) -> Any:
        model = self.levels.causal_lm
        return fused(model, prompt=prompt) if model.device.type == "cuda" and can_compile(model.device) else nullcontext()


def _power_of_two(number: int) -> int:
    """The smallest that is no less."""
    return 1 << (number - 1).bit_length()
