"""What drafts in recorded steps have beside the level that checks them, over static caches at addresses that stay.

The checking level has the keys and values of heads that it keeps, and states of the others. A draft reads the keys and values of heads that
it keeps where they lie, and writes its guesses behind them, over which the check then writes its own; where such heads of a layer do not
lie side by side, it has a copy. Of heads that it converts it has states: those of the checking level, or the fold of that one's keys and
values; one copy after the text, where it is a fold, and one that guesses change. A check leaves the states that it reads as they are, and
takes in what was accepted afterwards. A layer of which the checking level converts nothing, and the draft heads to a window alone, needs
none of this: both read the same memory, the draft less of it (`core.window_view`).

States take in tokens a block at a time. Between two of these a new token changes one place of the window and nothing else, and so does a
guess: whatever follows or is taken back is then a few places (`within_block`), not whole states.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import StaticCache

from ..compat.attributes import versions_of
from ..core.cache import StaticDSLACacheLayer, VisibleStaticLayer, fold_in_pieces
from ..core.heads import of_heads
from ..core.partial_cache import PartialCacheLayer, heads_from, join_states
from ..core.past import DualState, changes_window_alone, clone_state
from ..core.window_view import WindowView
from ..models.architectures import sliding_window_of


def is_of_drafts(key: Any) -> bool:
    """Whether a key of a recorder is of a step here."""
    return key[1] in ("follow", "draft", "check", "commit")


class LayerOfLevels(NamedTuple):
    """What a layer is at a level: its part, as `graph.part_of` says it, and the DSLA attention that it runs, None where there is none."""

    part: Any
    attention: Any

    @property
    def converted(self) -> tuple[int, ...]:
        """The converted KV heads, in the order in which they lie in a cache."""
        if self.part is False:
            return ()
        return tuple(range(self.attention.dsla.num_kv_heads)) if self.part is True else self.part[0]

    @property
    def core(self) -> Any:
        """What is DSLA's own of the converted heads, a `DualStateAttention`; None where there are none."""
        return None if self.attention is None else self.attention.converted_core()


class DraftSpace:
    """What drafts at one level have beside a `Workspace` at the level that checks them, at addresses that stay.

    Args:
        space: the `Workspace`, after its prompt was read. config: of the model.
        draft, check: of each layer what it is at either level.
        longest: tokens of a draft at most.
    """

    def __init__(self, space: Any, config: Any, draft: Sequence[LayerOfLevels], check: Sequence[LayerOfLevels], longest: int):
        device = space.tokens.device
        self.space, self.longest = space, longest
        self.parts, self.checked_parts = (tuple(layer.part for layer in layers) for layers in (draft, check))
        self.tokens, self.positions, self.lengths = (torch.zeros_like(x) for x in (space.tokens, space.positions, space.lengths))
        self.logits = torch.zeros_like(space.logits)
        # Of a draft that takes the likeliest token each time, its guesses, and how many of them there are.
        self.guesses = torch.zeros(longest + 1, dtype=torch.long, device=device)
        self.made = torch.zeros(1, dtype=torch.long, device=device)
        self.checked = torch.zeros(1, longest + 1, dtype=torch.long, device=device)
        self.checked_logits = space.logits.new_zeros(longest + 1, space.logits.shape[1])
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # tokens that are folded next
        self.folded = torch.zeros(1, dtype=torch.long, device=device)  # tokens in the states, for steps; the host's count:
        self.folded_tokens = 0
        self.real = torch.zeros_like(self.folded)  # the same without padding, of which there is
        self.padding = 0
        layers = space.cache.layers
        self._made_for = self._seen(draft, check, longest)
        self._cores = [layer.core for layer in (*draft, *check)]  # as long as they are there, others are not at their addresses
        # Of layers with a copy of keys and values the tokens in it.
        self.kept_counts = torch.zeros(len(layers), dtype=torch.long, device=device)
        self.committed = [_Committed(layer, low, longest + 1) for layer, low in zip(layers, check, strict=True) if low.part is not False]
        of_drafts: list[Any] = list(layers)
        self.converted: list[_Converted] = []
        for index, (layer, high, low) in enumerate(zip(layers, draft, check, strict=True)):
            if high.part is False:
                continue
            if self._views(layer, high, low):
                attention = high.attention
                of_drafts[index] = WindowView(layer, high.core, attention.split, attention.ordered, self.lengths)
            else:
                self.converted.append(_Converted(layer, high, low, space.length, self.kept_counts[index]))
                of_drafts[index] = self.converted[-1].layer
        core = next(level.core for level in draft if level.part is not False)
        self.window, self.sinks, self.has_states = core.window_size, core.sink_tokens, core.states
        self.spoilt = False  # whether guesses have changed more than places of the window
        self.counts_text = True  # whether all states of the checking level begin where the text does
        # Of each converted layer the tokens that its states have seen, without padding and with it.
        self.counts = torch.zeros(len(self.converted), 2, dtype=torch.long, device=device)
        self.cache = StaticCache(config=config, max_cache_len=space.length)
        self.cache.layers = of_drafts

    def fits(self, draft: Sequence[LayerOfLevels], check: Sequence[LayerOfLevels], longest: int) -> bool:
        """Whether this is what such drafts need, as the workspace's memory and the weights lie now."""
        return self._made_for == self._seen(draft, check, longest)

    def _views(self, layer: Any, draft: LayerOfLevels, check: LayerOfLevels) -> bool:
        """Whether the draft finds all that its converted heads see among the keys and values of the checking level."""
        if self.space.padded or draft.part is False or check.part is not False or draft.core.states or not draft.core.window_size:
            return False
        return isinstance(layer, VisibleStaticLayer) and draft.attention.exact_fold and sliding_window_of(draft.attention) is None

    def _seen(self, draft: Sequence[LayerOfLevels], check: Sequence[LayerOfLevels], longest: int) -> list[Any]:
        """What all here rests on."""
        seen: list[Any] = [longest]
        for layer, high, low in zip(self.space.cache.layers, draft, check, strict=True):
            memory, states = _memory(layer), _states(layer)
            tensors = ([] if memory is None else [memory.keys, memory.values]) + ([] if states is None else list(states.state))
            # Heads of a core that are its weights picked out are of these weights: another core, or written anew, makes them others.
            cores = [core for core in (high.core, low.core) if core is not None]
            weights = [versions_of(core.parameters()) for core in cores]
            seen.append(
                (high.part, low.part, self._views(layer, high, low), [x.data_ptr() for x in tensors], list(map(id, cores)), weights)
            )
        return seen

    def show(self, tokens: int, places: Tensor | None = None) -> None:
        """As `Workspace.show`."""
        for layer in self.cache.layers:
            for part in getattr(layer, "parts", (layer,)):
                if isinstance(part, VisibleStaticLayer):
                    part.visible, part.places, part.past = tokens, places, None
                else:
                    part.max_length, part.counts = tokens, places is None

    def begin(self, padding: int) -> None:
        """For a new text, of whose prompt so many tokens are padding."""
        self.folded_tokens, self.padding, self.spoilt = 0, padding, False
        for x in (self.folded, self.real):
            x.zero_()
        # A raise within a text begins the states of a layer that slides with the first token that it still has.
        lengths = [layer.states.state.lengths for layer in self.committed] if self.space.windows else []
        self.counts_text = not lengths or bool((torch.cat(lengths) == self.space.read - padding).all())

    def read(self, tokens: int, mask: Tensor | None) -> None:
        """Fold the text from where the states are up to so many tokens, of any number; mask `[1, T]`, None without padding."""
        known = self.folded_tokens
        self.folded_tokens, self.spoilt = tokens, False
        before = self.real.clone()
        self.folded.fill_(tokens)
        self.real.fill_(tokens - self.padding)
        for layer, counts in zip(self.converted, self.counts, strict=True):
            layer.read(known, tokens, mask, before, counts)
        self._count()

    def follow(self, within_block: bool) -> None:
        """Fold the next `count` tokens, `longest` + 1 at most: a step that can be recorded. within_block: as that says of them."""
        new, places = self._new_tokens(self.folded)
        slots = self._slots()
        for layer in self.converted:
            if within_block:
                layer.follow_in_window(places, new, slots)
            else:
                layer.follow(places, new, self.real)
        self.folded.add_(self.count)
        self.real.add_(self.count)
        self._count()

    def commit(self, within_block: bool) -> None:
        """Of the tokens that were checked take the first `count` into the checking level's states: a step that can be recorded."""
        new, _ = self._new_tokens(self.count)
        slots = self._slots()
        for layer in self.committed:
            if within_block:
                layer.take_in_window(new, slots)
            else:
                layer.take_in(new, self.count)
        if within_block:
            self.space.counts.add_(self.count)

    def within_block(self, tokens: int) -> bool:
        """Whether so many tokens behind those that are folded change nothing but places of the window, which lie as the text counts."""
        before, shape = self.folded_tokens - self.padding, (self.window, self.sinks, self.has_states)
        return self.counts_text and changes_window_alone(before, tokens, self.longest + 1, *shape)

    def _slots(self) -> Tensor:
        """Where `longest` + 1 tokens behind those that are folded lie in a window."""
        number = self.real + torch.arange(self.longest + 1, device=self.count.device)
        return self.sinks + number % max(self.window, 1)

    def _count(self) -> None:
        """Guesses begin behind the tokens that are folded."""
        self.counts[:, 0], self.counts[:, 1] = self.real, self.folded
        self.kept_counts.copy_(self.folded.expand_as(self.kept_counts))

    def _new_tokens(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Of `longest` + 1 tokens from the place `first` on: whether they are among the first `count`, and where they lie."""
        number = torch.arange(self.longest + 1, device=self.count.device)
        return (number < self.count)[None], (first + number).clamp_max(self.space.length - 1)

    def hold_back(self, holds: bool) -> None:
        """Whether tokens that the checking level reads leave its states as they are."""
        for layer in self.committed:
            layer.states.scratch = layer.scratch if holds else None

    def after(self, tokens: int) -> None:
        """What guesses may write to is as after so many tokens of the text, where they have not been checked."""
        self.space.cached.fill_(tokens)


def _memory(layer: Any) -> Any:
    """Of a layer of a cache the `VisibleStaticLayer` of keys and values; None if there is none."""
    softmax = layer.softmax if isinstance(layer, PartialCacheLayer) else layer
    return softmax if isinstance(softmax, VisibleStaticLayer) else None


def _states(layer: Any) -> Any:
    """Of a layer of a cache the `StaticDSLACacheLayer`; None if there is none."""
    states = layer.converted if isinstance(layer, PartialCacheLayer) else layer
    return states if isinstance(states, StaticDSLACacheLayer) else None


class _Committed:
    """States of the checking level in a layer, and the keys and values of the tokens that were checked last."""

    def __init__(self, layer: Any, level: LayerOfLevels, tokens: int):
        self.states, self.core, split = _states(layer), level.core, level.attention.split
        state = self.states.state
        device = state.window_k.device
        self.heads = None if split is None else split.on(device).converted
        heads = self.core.num_kv_heads if split is None else split.num_kv_heads
        self.scratch = tuple(x.new_zeros(1, tokens, heads, x.shape[-1]) for x in (state.window_k, state.window_v))

    def take_in(self, new: Tensor, count: Tensor) -> None:
        k, v = self.scratch
        state = self.core.fold(k, v, new, self.states.state, padding_at_end=True, kv_heads=self.heads)
        for mine, theirs in zip(self.states.state, state, strict=True):
            mine.copy_(theirs)
        self.states.tokens.add_(count[0])

    def take_in_window(self, new: Tensor, slots: Tensor) -> None:
        """The same where the states do not change; counts are left to the caller."""
        k, v = self.scratch if self.heads is None else (x.index_select(2, self.heads) for x in self.scratch)
        for window, x in zip(self.states.state[1:3], (self.core.in_halves(k), v), strict=True):
            window.index_copy_(1, slots, _written(window, slots, x, new))


def _written(window: Tensor, slots: Tensor, x: Tensor, new: Tensor) -> Tensor:
    """What places `[T]` of a window `[1, S + W, H, D]` hold when tokens x `[1, T, H, D]` are there that are new `[1, T]`."""
    return torch.where(new[..., None, None], x.to(window.dtype), window.index_select(1, slots))


class _Converted:
    """A layer of a draft that is converted, whole or in part.

    text: states of heads that the draft alone converts, after the tokens of the text that are folded. layer: of the cache, which guesses
    write to."""

    def __init__(self, checked: Any, draft: LayerOfLevels, check: LayerOfLevels, length: int, kept_count: Tensor):
        self.memory, self.states = _memory(checked), StaticDSLACacheLayer(length)
        self.known = _states(checked)  # of the checking level
        heads, known = draft.converted, check.converted
        own = tuple(head for head in heads if head not in known)
        held = check.part[1] if isinstance(check.part, tuple) else () if check.part else tuple(range(draft.attention.dsla.num_kv_heads))
        device = (self.known.state.window_k if self.memory is None else self.memory.keys).device
        self.order, self.parts = heads, [some for some in (known, own) if some]
        self.core = of_heads(draft.core, map(heads.index, own)) if own else None
        self.heads = None if own == held else torch.tensor([held.index(head) for head in own], dtype=torch.int32, device=device)
        self.places = [torch.tensor(list(map(heads.index, some)), device=device) for some in self.parts]
        self.text: DualState | None = None
        self.kept: VisibleStaticLayer | None = None  # keys and values of kept heads that do not lie side by side, a copy
        self.kept_heads: Any = None
        self.layer: Any = self.states
        if draft.part is not True:
            kept = draft.part[1]
            first, memory = held.index(kept[0]), self.memory
            if held[first : first + len(kept)] == kept:
                softmax = heads_from(memory, first, len(kept))
            else:
                softmax = self.kept = VisibleStaticLayer(length, kept_count, memory.window)
                self.kept_heads = torch.tensor(list(map(held.index, kept)), device=device)
                softmax.lazy_initialization(*(x[:, : len(kept)] for x in (memory.keys, memory.values)))
            self.layer = PartialCacheLayer(softmax, self.states, *draft.part)

    def read(self, start: int, end: int, mask: Tensor | None, before: Tensor, counts: Tensor) -> None:
        """before: real tokens so far `[1]`. counts: what counts for the layer, `[2]`."""
        if self.core is not None:
            k, v = (x[:, :, start:end].transpose(1, 2) for x in (self.memory.keys, self.memory.values))
            part = None if mask is None else mask[:, start:end]
            known = self.text._replace(lengths=before) if start and self.text is not None else None
            state = fold_in_pieces(self.core, k, v, part, known, kv_heads=self.heads)
            if self.text is None:
                self.text = clone_state(state)
            else:
                for mine, new in zip(self.text[:3], state[:3], strict=True):
                    mine.copy_(new)
        if self.states.state is None:
            known_states = [] if self.known is None else [self.known.state]
            state = join_states(known_states + ([] if self.text is None else [self.text]), self.parts, self.order)
            self.states.advance(state, state.window_k, state.window_v)
            self.states.count_in(counts[:1], counts[1])
        if self.kept is not None:
            for mine, theirs in self._pairs():
                mine[:, :, start:end] = theirs[:, :, start:end].index_select(1, self.kept_heads)
        self._set()

    def follow(self, places: Tensor, new: Tensor, before: Tensor) -> None:
        """before: real tokens so far `[1]`."""
        if self.core is not None:
            assert self.text is not None
            k, v = (x.index_select(2, places).transpose(1, 2) for x in (self.memory.keys, self.memory.values))
            state = self.core.fold(k, v, new, self.text._replace(lengths=before), padding_at_end=True, kv_heads=self.heads)
            for mine, theirs in zip(self.text[:3], state[:3], strict=True):
                mine.copy_(theirs)
        self._copy_kept(places)
        self._set()

    def follow_in_window(self, places: Tensor, new: Tensor, slots: Tensor) -> None:
        """The same where no state changes, and guesses have changed none: all that differs from the text are `slots`."""
        state = self.states.state
        assert state is not None
        found = [] if self.known is None else [tuple(x.index_select(1, slots) for x in self.known.state[1:3])]
        if self.core is not None:
            assert self.text is not None
            k, v = (x.index_select(2, places) for x in (self.memory.keys, self.memory.values))
            if self.heads is not None:
                k, v = (x.index_select(1, self.heads) for x in (k, v))
            both = self.core.in_halves(k.transpose(1, 2)), v.transpose(1, 2)
            found.append(tuple(_written(window, slots, x, new) for window, x in zip(self.text[1:3], both, strict=True)))
            for window, x in zip(self.text[1:3], found[-1], strict=True):
                window.index_copy_(1, slots, x)
        for some, heads in zip(found, self.places, strict=True):
            for window, x in zip(state[1:3], some, strict=True):
                if len(self.places) == 1:  # they are all heads, in their order
                    window.index_copy_(1, slots, x)
                else:
                    window[:, slots[:, None], heads] = x
        self._copy_kept(places)

    def _copy_kept(self, places: Tensor) -> None:
        if self.kept is not None:  # what lies behind the text is written over before it is seen
            for mine, theirs in self._pairs():
                mine.index_copy_(2, places, theirs.index_select(2, places).index_select(1, self.kept_heads))

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of kept heads, and those that they are copies of."""
        assert self.kept is not None
        return [(self.kept.keys, self.memory.keys), (self.kept.values, self.memory.values)]

    def _set(self) -> None:
        """What guesses change is as after the text."""
        mine = self.states.state
        assert mine is not None
        known = [] if self.known is None else [self.known.state]
        for theirs, places in zip(known + ([] if self.text is None else [self.text]), self.places, strict=True):
            mine.recurrent.index_copy_(1, places, theirs.recurrent)
            mine.window_k.index_copy_(2, places, theirs.window_k)
            mine.window_v.index_copy_(2, places, theirs.window_v)
