"""The memory of drafts at a level above that of running texts: their blocks, and states of its own.

A draft reads the keys and values of heads that it keeps from the text's blocks, and writes its guesses behind them, where the check writes
over them. Of heads that it converts it has states: copies of the text's own, or the fold of keys and values that the text still has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core.attention import DualState, DualStateAttention
from ...core.heads import of_heads
from .pool import HeadPlaces
from .slots import SlotMemory, SlotStates

CATCH_UP = 256  # tokens that are folded at a time where a draft comes after a pause
PIECES = 16  # of such; a text that is further ahead is folded anew


class _Layer(NamedTuple):
    """Of a layer what a draft's states come from, at a level of the text.

    known: the text's states of heads that are converted there already; taken: the draft's states of these. own: the draft's states of the
    other heads, core: their weights, places: where their keys and values are. Each None where there are no such heads.
    """

    known: SlotStates | None
    taken: SlotStates | None
    own: SlotStates | None
    core: DualStateAttention | None
    places: HeadPlaces | None


class DraftMemory(SlotMemory):
    """Slots for drafts.

    Args:
        memory: of the texts. num_slots: drafts at a time. level: of the drafts, above those of the texts.
    """

    def __init__(self, memory: SlotMemory, num_slots: int, level: int):
        self.levels, self.num_slots, self.max_tokens, self._at = memory.levels, num_slots, memory.max_tokens, memory._at
        self.texts, self.level = memory, level
        self.pool = memory.pool.beside(num_slots)
        self._held = self.levels.converted(level)
        self._states = {layer: self._new_states(layer, len(heads)) for layer, heads in self._held.items()}
        self._layers, self._places = {}, {}
        # The states after the tokens of the text; those above are changed by guesses.
        self._after_text = {layer: self._new_states(layer, len(heads)) for layer, heads in self._held.items()}
        self._sources: dict[int, list[_Layer]] = {}  # by level of the text
        core = self.levels.cores[next(iter(self._held))]
        self.shape = core.window_size, core.sink_tokens, core.states

    @torch.no_grad()
    def begin(self, slot: int, text_slot: int, tokens: int, level: int) -> None:
        """For a text at a level, with so many tokens cached: fold them all."""
        self._show(torch.tensor([slot], device=self.levels.device), torch.tensor([text_slot], device=self.levels.device))
        folded = self._raised(level, self.level)
        if tokens:
            self._fold(folded, [slot], [tokens])
        for layer in folded:
            for mine, theirs in zip(self._after_text[layer], self._states[layer], strict=True):
                mine[slot] = theirs[slot]

    def follow(self, texts: Tensor, width: int, level: int, in_window: bool = False) -> None:
        """Be where texts at a level are. texts: int64 `[R, 4]`, of each the slot of its draft, its own, tokens of it in the states, and how
        many more to fold, `width` at most. Reads no value on the host.

        in_window: these change places of windows alone, as `width` guesses before them did: the states stay."""
        slots, text_slots, folded, counts = texts.t().contiguous()
        self._show(slots, text_slots)
        number = torch.arange(width, device=counts.device)
        new, position = number < counts[:, None], folded[:, None] + number
        if in_window:
            self._follow_in_window(slots, text_slots, new, position, level)
            for layer, states in self._states.items():
                for lengths in (states.lengths, self._after_text[layer].lengths):
                    lengths[slots] = folded + counts
            return
        for known, taken, own, core, places in self._sources_at(level):
            if own is not None and core is not None and places is not None:  # first: it goes on from lengths that are those of all heads
                k, v = self.pool.read_at(places, slots, position)
                own.store(slots, core.fold(k, v, new, _of(own, slots), padding_at_end=True))
            if known is not None and taken is not None:
                taken.store(slots, _of(known, text_slots))
        for layer, states in self._states.items():
            for mine, theirs in zip(states, self._after_text[layer], strict=True):
                mine[slots] = theirs[slots]

    def _follow_in_window(self, slots: Tensor, text_slots: Tensor, new: Tensor, position: Tensor, level: int) -> None:
        """All that differs from the texts lies at the places of the tokens `position` `[R, T]`, of which some are `new`."""
        window, sinks = self.shape[:2]
        places = sinks + position % window
        for states, (known, taken, own, core, of_blocks) in zip(self._states.values(), self._sources_at(level), strict=True):
            if own is not None and core is not None and of_blocks is not None:
                k, v = self.pool.read_at(of_blocks, slots, position)
                found = zip((core.in_halves(k), v), own.in_window(slots, places), strict=True)
                both = [torch.where(new[..., None, None], x.to(old.dtype), old) for x, old in found]
                for goal in (own, SlotStates(states, own.state_heads)):
                    goal.put_in_window(slots, places, both)
            if known is not None and taken is not None:
                both = known.in_window(text_slots, places)
                for goal in (taken, SlotStates(states, taken.state_heads)):
                    goal.put_in_window(slots, places, both)

    def _show(self, slots: Tensor, text_slots: Tensor) -> None:
        """Drafts find the blocks of these texts."""
        self.pool.tables[:, slots] = self.texts.pool.tables[:, text_slots]

    def _sources_at(self, level: int) -> list[_Layer]:
        if level not in self._sources:
            before = self.levels.converted(level)
            self._sources[level] = [self._source(layer, heads, before.get(layer, ())) for layer, heads in self._held.items()]
        return self._sources[level]

    def _source(self, layer: int, heads: tuple[int, ...], before: tuple[int, ...]) -> _Layer:
        mine, rest = self._after_text[layer], tuple(head for head in heads if head not in before)
        known = self.texts._states_of(layer, before) if before else None
        taken = self._part(mine, heads, before) if before else None
        if not rest:
            return _Layer(known, taken, None, None, None)
        places = self.pool.places([self._at[layer, head] for head in rest])
        return _Layer(known, taken, self._part(mine, heads, rest), of_heads(self.levels.cores[layer], rest), places)

    def _part(self, states: DualState, heads: tuple[int, ...], some: tuple[int, ...]) -> SlotStates:
        """Of states of `heads` those of some."""
        return SlotStates(states, torch.tensor(list(map(heads.index, some)), dtype=torch.int32, device=self.levels.device))


def _of(states: SlotStates, slots: Tensor) -> DualState:
    """A copy of the states of these slots, of the heads that `states` is of."""
    found = states.at(slots)
    return found if states.state_heads is None else found.of_heads(states.state_heads)
