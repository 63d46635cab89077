"""What a layer remembers of a text, and how new tokens go on from it: which of the window come before them, what the states hold already.

Shape legend as in `dsla_kernels.reference`: B batch, Hkv key-value heads, K key size, V value size, W window size, S sink tokens;
L are the places of a row that begins with tokens from the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Blocks of half a window that a continued row takes over from the state: the last W tokens reach into three.
PAST_BLOCKS = 3


class DualState(NamedTuple):
    """What a layer remembers of a sequence; its size does not depend on the length.

    recurrent: `[B, Hkv, 2, K, V]` fp32, history and recency. With a window they hold the blocks (of W / 2 tokens) before the
        last full one. Of a window alone `[B, Hkv, 0, K, V]`.
    window_k, window_v: `[B, S + W, Hkv, K or V]`, the sinks, then the last W tokens; token j lies at slot S + j % W.
        Channels of keys, here and in `recurrent`, lie so that i and i + K/2 are a rotary pair, whatever the base's layout.
    lengths: int64 `[B]`, tokens seen per row, padding not counted.
    """

    recurrent: Tensor
    window_k: Tensor
    window_v: Tensor
    lengths: Tensor

    def of_heads(self, heads: Tensor) -> DualState:
        """A copy of these heads `[Hkv]`, by number; `lengths` is that of all."""
        window_k, window_v = (x.index_select(2, heads) for x in (self.window_k, self.window_v))
        return DualState(self.recurrent.index_select(1, heads), window_k, window_v, self.lengths)


def clone_state(state: DualState) -> DualState:
    """The same in memory of its own."""
    return DualState(*(x.clone() for x in state))


def changes_window_alone(before: int, tokens: int, written: int, window_size: int, sink_tokens: int, states: bool = True) -> bool:
    """Whether so many tokens behind `before` real ones change places of the window and nothing else: no sinks, and no block for the states,
    if there are any.

    written: places of the window that are written, `tokens` or more, as they were where no token comes: one each, so that a window has as
        many at least.
    """
    if written > window_size or before < sink_tokens:
        return False
    block = window_size // 2  # as in `Past.held`
    return not states or max((before + tokens) // block, 1) == max(before // block, 1)


@dataclass(frozen=True, slots=True)
class Past:
    """What is known of the tokens before those of a call, with a window.

    state: of these tokens, None at the start of a text.
    seen: what every entry of `state.lengths` is, where the host knows it: tokens of the window then are slices of it, and rows are alike.
    whole_windows: every entry of `state.lengths` is a multiple of W, and not 0: the window lies in order then, whatever the entries are.
    kv_heads: int32 `[Hkv]`, where the rows' k and v are of all heads of a layer: those that states are of.
    """

    window_size: int
    sink_tokens: int
    state: DualState | None = None
    seen: int | None = None
    whole_windows: bool = False
    kv_heads: Tensor | None = None

    def own(self, x: Tensor) -> Tensor:
        """Of keys or values `[B, L, heads, D]` those that go into a state."""
        return x if self.kv_heads is None else x.index_select(2, self.kv_heads)

    @property
    def block_size(self) -> int:
        """Tokens that go into the states at a time."""
        return self.window_size // 2

    @property
    def _seen(self) -> int | None:
        """`seen` as the places in the window tell it: whole windows lie as the first one did, two blocks in their order."""
        return self.window_size if self.whole_windows else self.seen

    def row_start(self) -> Tensor | int | None:
        """Number of the first token of the rows that go on: that of the last block in the states, 0 before there is one. `[B]` where rows
        differ; None at the start of a text."""
        if self.state is None:
            return None
        if self.whole_windows:
            return self.state.lengths - self.window_size
        if self.seen is not None:
            return max(self.seen // self.block_size - 2, 0) * self.block_size
        return (self.state.lengths // self.block_size - 2).clamp_min(0) * self.block_size

    def after_window(self, k: Tensor, v: Tensor, start: Tensor | int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """k, v `[B, L, Hkv, D]` with tokens from the window before them, from the number `start` on: rows that begin at a block boundary,
        whose first block is in the states. And which of the places before hold a token, bool `[B, 3 W / 2]`; None where all of them do.

        Of the first block the window has what the next token sees, and something else in the other places. Where it is not known how
        many tokens a row has, there are three blocks of places."""
        if self.state is None:
            return k, v, None
        size, sinks, seen = self.block_size, self.sink_tokens, self._seen
        windows = self.state.window_k, self.state.window_v
        if seen is not None:
            starts = [sinks + block % 2 * size for block in range(max(seen // size - 2, 0), -(-seen // size))]
            ends = [start + size for start in starts]
            if ends and seen % size:
                ends[-1] = starts[-1] + seen % size
            window_k, window_v = ([w[:, a:b] for a, b in zip(starts, ends, strict=True)] for w in windows)
            return torch.cat([*window_k, k], 1), torch.cat([*window_v, v], 1), None
        assert isinstance(start, Tensor)
        token = start[:, None] + torch.arange(PAST_BLOCKS * size, device=start.device)
        place = sinks + token % self.window_size
        k, v = (torch.cat([_gathered(w, place), x], 1) for w, x in zip(windows, (k, v), strict=True))
        return k, v, token < self.state.lengths[:, None]

    def sinks(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The first tokens of each text `[B, S, ...]`, where k and v are rows that go on; what has not been read yet is anything."""
        state, count, seen = self.state, self.sink_tokens, self._seen
        if state is not None and seen is not None and seen >= count:
            return state.window_k[:, :count], state.window_v[:, :count]
        short = max(count - k.shape[1], 0)
        new_k, new_v = (self.own(x[:, :count]) for x in (k, v))
        if short:
            new_k, new_v = (F.pad(x, (0, 0, 0, 0, 0, short)) for x in (new_k, new_v))
        if state is None:
            return new_k, new_v
        known = (torch.arange(count, device=k.device) < state.lengths[:, None])[..., None, None]
        return torch.where(known, state.window_k[:, :count], new_k), torch.where(known, state.window_v[:, :count], new_v)

    def taken_in(self, k: Tensor) -> Tensor | None:
        """Which tokens of rows that go on the states take in, bool `[B, L]`: no sinks, and nothing that they hold already. None: all."""
        if self.state is None and not self.sink_tokens:
            return None
        position, seen = torch.arange(k.shape[1], device=k.device)[None], self._seen
        if self.state is None:
            taken_in = (position >= self.sink_tokens).expand(k.shape[0], -1)
        elif seen is not None:
            held = self.block_size if seen >= self.window_size else 0
            taken_in = (position >= max(held, self.sink_tokens)).expand(k.shape[0], -1)
        else:
            held_of_each = torch.where(self.state.lengths >= self.window_size, self.block_size, 0)
            # A row that starts later skips a whole block.
            taken_in = (position >= held_of_each[:, None]) & (position >= self.sink_tokens)
        return taken_in

    def state_after(
        self,
        k: Tensor,
        v: Tensor,
        real: Tensor | None,
        recurrent: Tensor,
        sinks: tuple[Tensor, Tensor],
        start: Tensor | int | None,
        places: Tensor | None = None,
    ) -> DualState:
        """The state after rows k, v `[B, L, Hkv, D]`.

        real: tokens of each row `[B]`; None: L of each.
        recurrent, sinks: of the new state.
        start: number of the first token, a multiple of the block size; see `row_start`.
        places: `newest` of these, where it is known."""
        length, window, device = k.shape[1], self.window_size, k.device
        start = 0 if start is None else start
        if real is None and not isinstance(start, Tensor):  # every row has the same tokens, so they are slices
            end = start + length
            turn, oldest = length - end % window, max(length - window, 0)  # where slot 0 is written anew, and the first that is kept
            window_k, window_v = (
                torch.cat([sink, self.own(x[:, turn:]), self.own(x[:, oldest:turn])], 1) for sink, x in zip(sinks, (k, v), strict=True)
            )
            if end < window:
                window_k, window_v = (F.pad(x, (0, 0, 0, 0, 0, window - end)) for x in (window_k, window_v))
            return DualState(recurrent, window_k, window_v, torch.full((k.shape[0],), end, device=device))
        real = torch.full((k.shape[0],), length, device=device) if real is None else real
        places = self.newest(start, real, length) if places is None else places
        window_k, window_v = (torch.cat([sink, self.own(_gathered(x, places))], 1) for sink, x in zip(sinks, (k, v), strict=True))
        return DualState(recurrent, window_k, window_v, real + start)

    def held(self, lengths: Tensor) -> Tensor:
        """Of so many tokens those that the states hold, beside the sinks: whole blocks that another whole block follows."""
        return (lengths // self.block_size - 1).clamp_min(0) * self.block_size

    def not_held(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of `state` keys and values `[B, W, Hkv, D]` of the tokens that its states do not hold, in their order, and the numbers of these
        in their texts `[B, W]`. What has not come yet is zero."""
        assert self.state is not None
        lengths = self.state.lengths
        number = self.held(lengths)[:, None] + torch.arange(self.window_size, device=lengths.device)
        places, absent = self.sink_tokens + number % self.window_size, (number >= lengths[:, None])[..., None, None]
        window_k, window_v = (_gathered(x, places).masked_fill(absent, 0) for x in (self.state.window_k, self.state.window_v))
        return window_k, window_v, number

    def state_behind(self, k: Tensor, v: Tensor, lengths: Tensor, recurrent: Tensor, order: Tensor | None) -> DualState:
        """The state after tokens k, v `[B, T, Hkv, D]` that follow those of `state`.

        lengths: tokens of each text with them `[B]`. order: `[B, T]`, where the real tokens lie, if they are not the first ones."""
        slot = torch.arange(self.window_size, device=k.device)
        newest = lengths[:, None] - 1 - (lengths[:, None] - 1 - slot) % self.window_size
        number = torch.cat([slot[: self.sink_tokens].expand(len(lengths), -1), newest], 1)
        place = number if self.state is None else number - self.state.lengths[:, None]
        found = place.clamp(0, k.shape[1] - 1)  # where there is none yet: anything, the count hides it
        if order is not None:
            found = order.gather(1, found)
        window_k, window_v = (self.own(_gathered(x, found)) for x in (k, v))
        if self.state is not None:
            new = ((place >= 0) & (number < lengths[:, None]))[..., None, None]
            window_k, window_v = torch.where(new, window_k, self.state.window_k), torch.where(new, window_v, self.state.window_v)
        return DualState(recurrent, window_k, window_v, lengths)

    def newest(self, start: Tensor | int, real: Tensor, length: int) -> Tensor:
        """Where in rows of `length` places the newest token of each slot of the window lies, `[B, W]`. Before there is one, it is
        anywhere: the count hides it. start: number of the first token; real: tokens of each row `[B]`."""
        last = real[:, None] - 1
        number = last + (start[:, None] if isinstance(start, Tensor) else start)
        behind_slot = (number - torch.arange(self.window_size, device=real.device)) % self.window_size
        return (last - behind_slot).clamp(0, length - 1)


def _gathered(x: Tensor, places: Tensor) -> Tensor:
    """`[B, P, H, D]`, what lies in x `[B, L, H, D]` at places `[B, P]`."""
    return x.gather(1, places[..., None, None].expand(-1, -1, *x.shape[2:]))
