"""Model calls that are recorded once and replayed, as CUDA graphs are: a launch a call instead of thousands."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...core.layout import padding_at_end
from ...inference.fusion import LONG_PROMPT
from ...inference.recorder import Record, Recorder, Step, power_of_two, shown_tokens
from .levels import Levels
from .pool import Rows
from .request import Request
from .runner import ROW, ModelRunner, in_rows, in_whole_rows
from .slots import SlotMemory

SMALLEST_PIECE, FINE_PIECES = 64, 512  # tokens of a prompt that a recording reads; above the second there are four sizes an octave
FOR_MEMORY = "give less to keys and values (kv_bytes, --kv-gib)"


class GraphRunner(ModelRunner):
    """A recording for each (level, rows, past) in use; rows and past are rounded up to powers of two, so that few are needed. Where
    attention reads keys and values in their blocks, past is 0.

    Where attention reads keys and values in their blocks, pieces of prompts are recorded too, for each (level, size, kind of place): a host
    needs as long for the launches of a prompt as a GPU for two thousand of its tokens. A shorter piece is padded at its end. Pieces with
    which a text begins, and such as come behind whole windows, are less work in DSLA layers than pieces anywhere. Where there are no DSLA
    layers, pieces of several texts are one call, too.

    Args:
        record: such as `dsla_hf.inference.recorder.CudaRecording`; `PlainRecording` for tests.
        chunk: tokens of the largest piece; 0: it reads no prompts. one_shape: of `ModelRunner`.
    """

    def __init__(self, levels: Levels, memory: SlotMemory, record: Record, chunk: int, one_shape: bool = False):
        super().__init__(levels, memory, one_shape)
        slots, device = memory.num_slots, levels.device
        # By (level, rows, past) steps, by (level, size, place) pieces of prompts.
        self.recorder = Recorder(levels.causal_lm, record, for_memory=FOR_MEMORY)
        # Of each row the token, tokens before it, and whether it takes part.
        self.inputs = torch.zeros(slots, 3, dtype=torch.long, device=device)
        self._logits: Tensor | None = None  # [slots, V], made by the first step
        self.sizes = piece_sizes(chunk) if self.in_blocks and chunk else []
        self.piece = torch.zeros(3 + chunk, dtype=torch.long, device=device)  # slot, tokens before, tokens, and these
        # Of pieces of several texts the same of each row of `ROW` tokens, and then all of these.
        self.sizes_together = [size for size in self.sizes if size % ROW == 0 and size > ROW]
        self.pieces = torch.zeros((3 + ROW) * (max(self.sizes_together, default=0) // ROW), dtype=torch.long, device=device)
        self._piece_logits: Tensor | None = None  # [1, V]
        self._pieces_logits: Tensor | None = None  # [rows, V]
        # By key, what a recording reads: a layer of an adapter may compose weights for one level at a time, and these stay.
        self._read_by: dict[Hashable, list[Any]] = {}

    @torch.no_grad()
    def prepare(self, levels: Iterable[int], anywhere: bool = False) -> None:
        """Record what these levels need with any number of rows, so that no text waits for it. For an idle engine; where recordings are
        for a length too, those of longer texts are left to their first step."""
        self.recorder.try_again()
        slots = self.memory.num_slots
        rows = [slots] if self.one_shape else sorted({min(power_of_two(count), slots) for count in range(1, slots + 1)})
        for level in tqdm(list(levels), desc="recording steps", unit="level", disable=None):
            for count in rows:
                # Padding alone: it belongs to nobody, and is written nowhere.
                for _ in range(2):  # as it is, then recorded
                    self._run(level, [0] * count, [0] * count, [False] * count)
            for size, start in itertools.product(self.sizes, (0, self.levels.window or 1)):
                self._prepare_piece(level, size, 0, start)
            for size in self.sizes if anywhere and level and self.levels.window else ():
                self._prepare_piece(level, size, 0, 1)
                if size >= self.levels.window:
                    break
            for size in self.sizes_together if self.room_together(level) else ():
                self._prepare_together(level, size)

    @torch.no_grad()
    def prefill(self, request: Request, tokens: int) -> Tensor:
        size = next((size for size in self.sizes if size >= tokens), None)
        if size is not None and request.slot is not None:
            cached, slot = request.cached, request.slot
            key, read, ready = self._prepare_piece(request.level, size, slot, cached)
            if ready:
                self._set_piece(slot, cached, request.text[cached : cached + tokens])
                self.recorder.run(key, read)
                assert self._piece_logits is not None
                return self._piece_logits[0]
        with self.recorder.fused(prompt=True) if tokens >= LONG_PROMPT else nullcontext():
            return super().prefill(request, tokens)

    def room_together(self, level: int) -> int:
        return min(super().room_together(level), max(self.sizes_together, default=0))

    @torch.no_grad()
    def prefill_together(self, pieces: Sequence[tuple[Request, int]]) -> Tensor:
        wanted = sum(in_whole_rows(tokens) for _, tokens in pieces)
        key, read, ready = self._prepare_together(pieces[0][0].level, next(size for size in self.sizes_together if size >= wanted))
        if not ready:
            with self.recorder.fused(prompt=True) if wanted >= LONG_PROMPT else nullcontext():
                return super().prefill_together(pieces)
        rows, ids, last = in_rows(pieces)
        places = torch.tensor(last, device=self.piece.device)  # now: a copy from the host waits for all that has been launched
        self._set_pieces(key[1], rows, ids)
        self.recorder.run(key, read)
        assert self._pieces_logits is not None
        return self._pieces_logits[places]

    @torch.no_grad()
    def prefill_scored(self, request: Request, tokens: int) -> Tensor:
        with self.recorder.fused(prompt=True) if tokens >= LONG_PROMPT else nullcontext():
            return super().prefill_scored(request, tokens)

    def calls(self) -> dict[str, int]:
        return {"replayed": self.recorder.replayed, "plain": self.recorder.plain}

    @property
    def preparing(self) -> bool:
        return self.recorder.preparing

    def _set_piece(self, slot: int, start: int, ids: list[int]) -> None:
        self.piece[: 3 + len(ids)].copy_(torch.tensor([slot, start, len(ids), *ids]))

    def _prepare_piece(self, level: int, size: int, slot: int, start: int) -> tuple[Hashable, Step, bool]:
        """What reads pieces of up to `size` tokens at a level, first ones or such behind others: its key, the step, and whether it is
        recorded; that is done now if need be.

        Before that a call runs as it is, on a piece without tokens behind the `start` ones in `slot`, which changes nothing there.
        """
        place = self._place(level, start)
        key = level, size, place
        slots, starts, counts = self.piece[:3].split(1)

        def read() -> None:
            active = (torch.arange(size, device=self.piece.device) < counts)[None]
            seen = 0 if place == "first" else None
            rows = Rows(slots, active, starts, 0, seen=seen, whole_windows=place == "behind windows", in_blocks=True)
            with self._reading(level, rows, starts + counts, starts, recorded=True), padding_at_end():
                logits = self._call(level, self.piece[None, 3 : 3 + size], rows, active.long(), (counts - 1).clamp_min(0))
            if self._piece_logits is None:
                self._piece_logits = torch.empty_like(logits)
            self._piece_logits.copy_(logits)
            self._read_by[key] = self.levels.attentions_in_part()

        if key not in self.recorder.recordings:
            self._set_piece(slot, start, [])
        return key, read, self.recorder.prepare(key, read, prompt=True)

    def _set_pieces(self, size: int, rows: list[tuple[int, int, int]], ids: list[int]) -> None:
        """As `_prepare_together` reads them: slots, tokens before, and tokens of all rows, and their ids."""
        count = size // ROW
        filled = [*rows, *[(0, 0, 0)] * (count - len(rows))]
        given = [*itertools.chain(*zip(*filled, strict=True)), *ids, *[0] * (size - len(ids))]
        self.pieces[: len(given)].copy_(torch.tensor(given))  # in one: the host waits for every copy

    def _prepare_together(self, level: int, size: int) -> tuple[tuple[int, int, str], Step, bool]:
        """As `_prepare_piece`, for pieces of several texts; the call as it is reads rows without tokens."""
        key, count = (level, size, "together"), size // ROW

        def read() -> None:
            slots, starts, counts = self.pieces[: 3 * count].view(3, count)
            logits = self._read_together(level, slots, starts, counts, self.pieces[3 * count : 3 * count + size])
            if self._pieces_logits is None:
                self._pieces_logits = logits.new_empty(max(self.sizes_together) // ROW, logits.shape[1])
            self._pieces_logits[:count].copy_(logits)
            self._read_by[key] = self.levels.attentions_in_part()

        if key not in self.recorder.recordings:
            self._set_pieces(size, [], [])
        return key, read, self.recorder.prepare(key, read, prompt=True)

    def _run(self, level: int, ids: list[int], lengths: list[int], active: list[bool]) -> Tensor:
        rows = min(power_of_two(len(ids)), self.memory.num_slots)
        past = self.past(lengths)
        key = level, rows, past
        given = [*zip(ids, lengths, active, strict=True), *[(0, 0, False)] * (rows - len(ids))]
        self.inputs[:rows].copy_(torch.tensor(given, dtype=torch.long))  # in one: the host waits for every copy

        def step() -> None:
            tokens, read, takes_part = self.inputs[:rows].t().contiguous()
            logits = self.step(level, tokens, read, takes_part.bool(), past)
            if self._logits is None:
                self._logits = logits.new_empty(self.memory.num_slots, logits.shape[1])
            self._logits[:rows].copy_(logits)
            self._read_by[key] = self.levels.attentions_in_part()

        self.recorder.run(key, step)
        assert self._logits is not None
        return self._logits

    def past(self, lengths: list[int]) -> int:
        return 0 if self.in_blocks else shown_tokens(super().past(lengths))

    def _place(self, level: int, start: int) -> str:
        """What kind of piece begins behind `start` tokens. Without DSLA layers it is the same behind any."""
        if start == 0:
            return "first"
        window = self.levels.window
        return "behind windows" if window and (level == 0 or start % window == 0) else "anywhere"


def piece_sizes(chunk: int) -> list[int]:
    """Tokens of the recordings that read prompts, up to `chunk`, rising."""
    sizes, size = {chunk}, SMALLEST_PIECE
    while size < chunk:
        sizes |= {size * quarter // 4 for quarter in ((4, 5, 6, 7) if size >= FINE_PIECES else (4,))}
        size *= 2
    return sorted(size for size in sizes if size <= chunk)
