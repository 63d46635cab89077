"""Several tokens of running texts in one model call, of which the first ones alone may stay: what checks drafts.

Keys and values of all of them go into the texts' blocks, where those that do not stay are written over. States take in those that stay,
afterwards: until then they are as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.attention import DualStateAttention
from ...core.heads import of_heads
from ...core.past import changes_window_alone
from ...core.transfers import sent
from .request import Request
from .runner import ModelRunner
from .slots import SlotStates


class _Layer:
    """The states of a layer at a level, and keys and values of tokens that they may take in, `[rows, tokens, heads, D]`."""

    def __init__(self, states: SlotStates, core: DualStateAttention, heads: tuple[int, ...], rows: int, tokens: int):
        device, all_heads = states.all_slots.lengths.device, core.num_kv_heads
        self.states, self.core = states, of_heads(core, heads)
        self.heads = None if len(heads) == all_heads else torch.tensor(heads, dtype=torch.int32, device=device)
        windows = states.all_slots.window_k, states.all_slots.window_v
        self.scratch = tuple(x.new_zeros(rows, tokens, all_heads, x.shape[-1]) for x in windows)

    def take_in_window(self, slots: Tensor, new: Tensor, before: Tensor) -> None:
        """As `take_in` of tokens that change places of windows alone. before: tokens of each text without them `[rows]`."""
        number = before[:, None] + torch.arange(new.shape[1], device=new.device)
        places = self.core.sink_tokens + number % self.core.window_size
        k, v = (x[: new.shape[0], : new.shape[1]] for x in self.scratch)
        if self.heads is not None:
            k, v = (x.index_select(2, self.heads) for x in (k, v))
        found = zip((self.core.in_halves(k), v), self.states.in_window(slots, places), strict=True)
        both = [torch.where(new[..., None, None], x.to(old.dtype), old) for x, old in found]
        self.states.put_in_window(slots, places, both)
        self.states.all_slots.lengths.index_add_(0, slots, new.sum(1))

    def take_in(self, slots: Tensor, new: Tensor) -> None:
        before = self.states.at(slots)
        if self.states.state_heads is not None:
            before = before.of_heads(self.states.state_heads)
        k, v = (x[: new.shape[0], : new.shape[1]] for x in self.scratch)
        self.states.store(slots, self.core.fold(k, v, new, before, padding_at_end=True, kv_heads=self.heads))


class Checks:
    """Reads tokens of texts, and keeps some.

        logits = checks.read(level, requests, tokens)  # of each text the last token and guesses
        checks.keep(counts)                            # so many of each

    Args:
        runner: of the texts; where it records calls, these are recorded too, by level, texts, tokens and `past`.
        rows: texts at a time at most. tokens: of a text at most.
    """

    def __init__(self, runner: ModelRunner, rows: int, tokens: int):
        self.runner, self.rows, self.tokens = runner, rows, tokens
        device = runner.levels.device
        # Of each text its slot, tokens before, how many there are, and these; and how many are kept.
        self.inputs = torch.zeros(rows, 3 + tokens, dtype=torch.long, device=device)
        self.kept = torch.zeros(rows, dtype=torch.long, device=device)
        self._logits: Tensor | None = None  # [rows, tokens, V]
        self._layers: dict[int, list[_Layer]] = {}  # by level
        self._read_by: dict[Hashable, list[Any]] = {}  # as `GraphRunner` has it
        # Of the last call the level, texts, and tokens of each; tokens of each text before.
        self._last, self._before = (0, 0, 0), [0]

    @torch.no_grad()
    def read(
        self, level: int, requests: Sequence[Request], tokens: Sequence[list[int]], width: int, guesses: Tensor | None = None
    ) -> Tensor:
        """Of each text some tokens, `width` at most, behind those that are cached; logits `[R, width, V]` after each.

        guesses: int64 `[R, G]`, all but the first of the tokens, where the host does not know them; what `tokens` says of these is no more
        than how many there are."""
        slots = [request.slot for request in requests if request.slot is not None]
        lengths = [request.cached for request in requests]
        return self._read(level, slots, lengths, tokens, width, guesses)

    @torch.no_grad()
    def prepare(self, level: int, rows: int, width: int) -> None:
        """Record such a call, where calls are recorded, so that no text waits for it. For an idle engine."""
        for _ in range(2):  # as it is, then recorded
            self._read(level, list(range(rows)), [0] * rows, [[]] * rows, width)  # no tokens: nothing is written

    @torch.no_grad()
    def keep(self, counts: list[int]) -> None:
        """Of the tokens of each text that were read last, the first so many are its own."""
        level, rows, width = self._last
        layers = self._layers[level]
        if not layers:
            return
        self.kept[:rows].copy_(sent(torch.tensor(counts), self.kept.device))
        core = layers[0].core
        shape = core.window_size, core.sink_tokens, core.states
        in_window = all(changes_window_alone(before, count, width, *shape) for before, count in zip(self._before, counts, strict=True))

        def take_in() -> None:
            slots, new = self.inputs[:rows, 0], torch.arange(width, device=self.kept.device) < self.kept[:rows, None]
            for layer in layers:
                if in_window:
                    layer.take_in_window(slots, new, self.inputs[:rows, 1])
                else:
                    layer.take_in(slots, new)

        self._run(("keep", level, rows, width, in_window), take_in)

    def _read(
        self,
        level: int,
        slots: list[int],
        lengths: list[int],
        tokens: Sequence[list[int]],
        width: int,
        guesses: Tensor | None = None,
    ) -> Tensor:
        rows, past = len(slots), self.runner.past(lengths)
        given = [
            [slot, length, len(some), *some, *[0] * (width - len(some))] for slot, length, some in zip(slots, lengths, tokens, strict=True)
        ]
        self.inputs[:rows, : 3 + width].copy_(sent(torch.tensor(given), self.inputs.device))
        if guesses is not None:
            guesses = guesses[:, : width - 1]
            self.inputs[:rows, 4 : 4 + guesses.shape[1]].copy_(guesses)
        layers = self._layers_at(level)
        self._last, self._before = (level, rows, width), lengths
        key = "check", level, rows, width, past

        def step() -> None:
            places, before, counts = self.inputs[:rows, :3].t().contiguous()
            for layer in layers:
                layer.states.scratch = layer.scratch  # type: ignore[assignment]
            try:
                logits = self.runner.several(level, places, self.inputs[:rows, 3 : 3 + width].contiguous(), before, counts, past)
            finally:
                for layer in layers:
                    layer.states.scratch = None
            if self._logits is None:
                self._logits = logits.new_empty(self.rows, self.tokens, logits.shape[2])
            self._logits[:rows, :width].copy_(logits)
            self._read_by[key] = self.runner.levels.attentions_in_part()

        self._run(key, step)
        assert self._logits is not None
        return self._logits[:rows, :width]

    def _layers_at(self, level: int) -> list[_Layer]:
        if level not in self._layers:
            levels = self.runner.levels
            levels.use(level)
            states = self.runner.memory.states(level)
            self._layers[level] = [_Layer(one, levels.cores[number], heads, self.rows, self.tokens) for number, heads, one in states]
        return self._layers[level]

    def _run(self, key: Hashable, step: Callable[[], None]) -> None:
        run_recorded(self.runner, key, step)


def run_recorded(runner: ModelRunner, key: Hashable, step: Callable[[], None]) -> None:
    """A step beside those of a runner: recorded where these are."""
    recorder = getattr(runner, "recorder", None)
    if recorder is None:
        step()
    else:
        recorder.run(key, step)
