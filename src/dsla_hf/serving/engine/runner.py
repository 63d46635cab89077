"""Model calls of the engine: a piece of one prompt, pieces of several, or the next token of many texts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from dsla_kernels import uses_triton

from ...inference.decode_attention import ATTENTION_FUNCTION, CachedTokens, can_attend_where_cached, over_cache
from ...inference.prompt_attention import reads_beginnings
from .levels import Levels
from .pool import Rows
from .request import Request
from .slots import SlotMemory

ROW = 64  # tokens; of several prompts that are read together each begins a row of so many, and may go on in the next


class Running(Protocol):
    """A text that waits for its next token; see `Request`."""

    @property
    def slot(self) -> int | None: ...

    @property
    def tokens(self) -> list[int]: ...

    @property
    def cached(self) -> int: ...


class ModelRunner:
    """Runs the model through its ordinary forward over a `SlotMemory`.

    Whatever a step of decoding reads and writes beside its small inputs lies at fixed addresses (blocks, tables, states), and its
    shapes follow from the number of rows and `past` alone: `GraphRunner` records it.

    Args:
        one_shape: steps have the rows of all slots, and the longest `past`, whatever runs: the same sums in the same order for a text in
            any company.
    """

    def __init__(self, levels: Levels, memory: SlotMemory, one_shape: bool = False):
        self.levels, self.memory, self.one_shape = levels, memory, one_shape
        head = memory.pool.keys.new_empty(0, levels.head_dim, dtype=levels.dtype)
        # Calls then read keys and values where they lie, and need no `past`.
        self.in_blocks = can_attend_where_cached(levels.causal_lm) and uses_triton(head, head)
        self.reads_beginnings = self.in_blocks and reads_beginnings(head)
        if self.in_blocks:
            levels.causal_lm.set_attn_implementation(ATTENTION_FUNCTION)

    @torch.no_grad()
    def prepare(self, levels: Iterable[int], anywhere: bool = False) -> None:
        """Get ready for steps at these levels, and for pieces of prompts; with `anywhere` also for short ones that begin within a window.
        Nothing to do here."""

    @torch.no_grad()
    def prefill(self, request: Request, tokens: int) -> Tensor:
        """Read the next `tokens` of a text; logits `[V]` after them."""
        return self._read(request, tokens, 1)[-1]

    def room_together(self, level: int) -> int:
        """Tokens that `prefill_together` reads at most, each text's rounded up to whole rows; 0 where it does not run: states of DSLA
        layers go from one token of a text to the next, while softmax attention need know no more than where tokens lie."""
        return sys.maxsize if self.in_blocks and not self.levels.converted(level) else 0

    @torch.no_grad()
    def prefill_together(self, pieces: Sequence[tuple[Request, int]]) -> Tensor:
        """Read the next tokens, so many, of each of several texts of one level in a call; logits `[len(pieces), V]` after them."""
        rows, ids, last = in_rows(pieces)
        places = torch.tensor(last, device=self.levels.device)
        slots, starts, counts = torch.tensor(rows, device=self.levels.device).t()
        return self._read_together(pieces[0][0].level, slots, starts, counts, torch.tensor(ids, device=self.levels.device))[places]

    def _read_together(self, level: int, slots: Tensor, starts: Tensor, counts: Tensor, ids: Tensor) -> Tensor:
        """Rows of tokens, ids `[rows * ROW]`: of each the first `counts` ones, behind `starts` others of the text in its slot; logits
        `[rows, V]` after the last of them. Reads no value on the host."""
        inside = torch.arange(ROW, device=ids.device)
        rows = Rows(slots, inside < counts[:, None], starts, 0, in_blocks=True, together=True)
        with self._reading(level, rows, starts + counts, starts):
            cache = self.memory.cache(level, rows, ROW)
            last = torch.arange(len(slots), device=ids.device) * ROW + (counts - 1).clamp_min(0)
            output = self.levels.model(
                input_ids=ids[None],
                position_ids=(starts[:, None] + inside).view(1, -1),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=last,
            )
        return output.logits[0]

    @torch.no_grad()
    def prefill_scored(self, request: Request, tokens: int) -> Tensor:
        """As `prefill`, with logits `[tokens, V]` after each of them."""
        return self._read(request, tokens, tokens)

    def _read(self, request: Request, tokens: int, last: int) -> Tensor:
        device, cached, slot = self.levels.device, request.cached, request.slot
        assert slot is not None
        one, start = torch.ones(1, dtype=torch.bool, device=device), torch.tensor([cached], device=device)
        past = 0 if self.in_blocks else cached
        begins = cached == 0 and self.reads_beginnings
        rows = Rows(slice(slot, slot + 1), one, start, past, seen=cached, in_blocks=self.in_blocks, begins=begins)
        ids = torch.tensor([request.text[cached : cached + tokens]], device=device)
        with self._reading(request.level, rows, start + tokens, start):
            return self._logits_of(request.level, ids, rows, None, last)[0]

    @torch.no_grad()
    def decode(self, level: int, requests: Sequence[Running]) -> Tensor:
        """The next step of texts of one level; logits `[len(requests), V]` in their order.

        The batch spans all slots up to the highest in use: rows in between that do not take part are padding, and states are
        written where they are.
        """
        slots = [request.slot for request in requests if request.slot is not None]
        count = self.memory.num_slots if self.one_shape else max(slots) + 1
        ids, lengths, active = [0] * count, [0] * count, [False] * count
        for request, slot in zip(requests, slots, strict=True):
            ids[slot], lengths[slot], active[slot] = request.tokens[-1], request.cached, True
        places = torch.tensor(slots, device=self.levels.device)  # now: a copy from the host waits for all that has been launched
        return self._run(level, ids, lengths, active)[places]

    def calls(self) -> dict[str, int]:
        """How often steps were replayed from recordings, and how often they ran as they are though they should have been recorded; nothing
        where none are recorded."""
        return {}

    @property
    def preparing(self) -> bool:
        """Whether a call is compiled or recorded now."""
        return False

    def wait(self) -> None:
        """Until all calls have been done."""
        if self.levels.device.type == "cuda":
            torch.cuda.synchronize(self.levels.device)

    def _run(self, level: int, ids: list[int], lengths: list[int], active: list[bool]) -> Tensor:
        device = self.levels.device
        tokens, read, takes_part = (torch.tensor(x, device=device) for x in (ids, lengths, active))
        return self.step(level, tokens, read, takes_part, self.past(lengths))

    def past(self, lengths: list[int]) -> int:
        """Tokens before the new ones that a step is shown, where rows are not read in their blocks."""
        return self.memory.max_tokens if self.one_shape else max(lengths)

    def step(self, level: int, ids: Tensor, lengths: Tensor, active: Tensor, past: int) -> Tensor:
        """One token of every row; all inputs `[B]`, `past` at least the longest length. Reads no value on the host."""
        if self.in_blocks:
            rows = Rows(slice(0, len(ids)), active, lengths, 0, in_blocks=True)
            with self._reading(level, rows, torch.where(active, lengths + 1, 0)):
                return self._call(level, ids[:, None], rows, active[:, None])
        rows = Rows(slice(0, len(ids)), active, lengths, past)
        # Texts end at the right of the batch, as rows padded at the left do.
        position = torch.arange(past + 1, device=ids.device)
        mask = (position >= (past - lengths)[:, None]) & active[:, None]
        return self._call(level, ids[:, None], rows, mask.long())

    def several(self, level: int, slots: Tensor, ids: Tensor, lengths: Tensor, counts: Tensor, past: int) -> Tensor:
        """Of each row the first `counts` `[B]` of ids `[B, T]`, behind the `lengths` `[B]` tokens of the text in its slot `[B]`; logits
        `[B, T, V]`. `past` as in a step. Reads no value on the host."""
        tokens = ids.shape[1]
        active = torch.arange(tokens, device=ids.device) < counts[:, None]
        if self.in_blocks:
            rows = Rows(slots, active, lengths, 0, in_blocks=True)
            with self._reading(level, rows, lengths + counts, lengths):
                return self._logits_of(level, ids, rows, active.long(), tokens)
        rows = Rows(slots, active, lengths, past)
        before = torch.arange(past, device=ids.device) >= (past - lengths)[:, None]
        return self._logits_of(level, ids, rows, torch.cat([before, active], 1).long(), tokens)

    def _reading(self, level: int, rows: Rows, lengths: Tensor, starts: Tensor | None = None, recorded: bool = False) -> Any:
        """For a call at a level on `rows`, which have `lengths` tokens with the new ones and `starts` before them."""
        if not rows.in_blocks:
            return nullcontext()
        self.levels.use(level)
        tables, places = self.memory.pool.tables[:, rows.slots], self.memory.places(level)
        more: dict[str, Any] = {"starts": starts, "places": places, "begins": rows.begins, "recorded": recorded}
        return over_cache(CachedTokens(lengths, block_tables=tables, **more))

    def _call(self, level: int, ids: Tensor, rows: Rows, mask: Tensor | None, last: Tensor | int = 1) -> Tensor:
        """Logits `[B, V]` of the last token of each row, or of the one whose place `last` `[1]` is."""
        return self._logits_of(level, ids, rows, mask, last)[:, -1]

    def _logits_of(self, level: int, ids: Tensor, rows: Rows, mask: Tensor | None, last: Tensor | int) -> Tensor:
        """Logits `[B, last, V]` of so many last tokens, or `[B, 1, V]`."""
        self.levels.use(level)
        positions = rows.lengths[:, None] + torch.arange(ids.shape[1], device=ids.device)
        cache = self.memory.cache(level, rows, ids.shape[1])
        output = self.levels.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=last
        )
        return output.logits


def in_whole_rows(tokens: int) -> int:
    """Of a text that is read together with others, the room that so many of its tokens take."""
    return -(-tokens // ROW) * ROW


def in_rows(pieces: Sequence[tuple[Request, int]]) -> tuple[list[tuple[int, int, int]], list[int], list[int]]:
    """Pieces of texts in rows: of each row (slot, tokens before it, tokens in it); their ids, rows filled up with zeros; and of each text
    the number of its last row."""
    rows: list[tuple[int, int, int]] = []
    ids: list[int] = []
    last: list[int] = []
    for request, tokens in pieces:
        assert request.slot is not None
        start, end = request.cached, request.cached + tokens
        rows += [(request.slot, row, min(ROW, end - row)) for row in range(start, end, ROW)]
        ids += [*request.text[start:end], *[0] * (in_whole_rows(tokens) - tokens)]
        last.append(len(rows) - 1)
    return rows, ids, last
