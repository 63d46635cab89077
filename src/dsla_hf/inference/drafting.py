"""Drafts in recorded steps: what `GraphDecoder(draft_level=...)` does between two forwards of level 0, over static caches.

Level 0 has the keys and values of the text. A draft reads those of layers that stay softmax attention where they lie, and writes its
guesses behind them, over which the check then writes its own. Of converted heads it has states, the fold of level 0's keys and values of
the text: one copy after the text, and one that guesses change. Of layers converted in part it also has the keys and values of kept heads,
as kernels want them side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from ..core.cache import StaticDSLACacheLayer, VisibleStaticLayer, fold_in_pieces
from ..core.partial_cache import PartialCacheLayer
from ..core.past import DualState
from ..levels.acceptance import Rule, Scores
from .decode_attention import run_token
from .draws import Sampler
from .recorder import Recorder, shown_tokens


class Raced:
    """Draws by seed and place, as `GraphDecoder` makes them without drafts, and so the same text. Guess and token of a place race with the
    same noise, so that they are mostly the same where draft and check mostly agree (as in Daliri et al. 2024, arXiv 2408.07978).

    Args:
        processors, draft_processors: as of `acceptance.Greedy`. seed: as of `Sampler`.
        padding: tokens of the prompt that are none: they count for no place.
    """

    def __init__(self, processors: Scores, draft_processors: Scores, seed: int | None, padding: int = 0):
        self.check = Sampler(processors, True, seed)
        self.draft = Sampler(draft_processors, True, self.check.seed)
        self.padding = padding

    def guess(self, ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.draft(logits, ids, [ids.shape[1] - self.padding]), None

    def choose(self, ids: Tensor, logits: Tensor, guess: Tensor | None = None, drawn_from: Tensor | None = None) -> Tensor:
        return self.check(logits, ids, [ids.shape[1] - self.padding])


def is_of_drafts(key: Any) -> bool:
    """Whether a key of a recorder is of a step here."""
    return key[1] in ("follow", "draft", "check")


class DraftSpace:
    """What drafts at one level have beside a `Workspace` at level 0, at addresses that stay.

    Args:
        space: the `Workspace`, after its prompt was read. config: of the model.
        parts: what of each layer is DSLA at the draft's level. attentions: what the layers run at it.
        longest: tokens of a draft at most.
    """

    def __init__(self, space: Any, config: Any, parts: Sequence[Any], attentions: Sequence[Any], longest: int):
        device = space.tokens.device
        self.space, self.parts, self.longest = space, tuple(parts), longest
        self.tokens, self.positions, self.lengths = (torch.zeros_like(x) for x in (space.tokens, space.positions, space.lengths))
        self.logits = torch.zeros_like(space.logits)
        self.checked = torch.zeros(1, longest + 1, dtype=torch.long, device=device)
        self.checked_logits = space.logits.new_zeros(longest + 1, space.logits.shape[1])
        self.count = torch.zeros(1, dtype=torch.long, device=device)  # tokens that are folded next
        self.folded = torch.zeros(1, dtype=torch.long, device=device)  # tokens in the states, for steps; the host's count:
        self.folded_tokens = 0
        memories = space.cache.layers
        self.memory = [memory.keys.data_ptr() for memory in memories]
        self.converted = [
            _Converted(memory, attention, part, space.length)
            for memory, attention, part in zip(memories, attentions, parts, strict=True)
            if part is not False
        ]
        layers = iter(self.converted)
        self.cache = StaticCache(config=config, max_cache_len=space.length)
        self.cache.layers = [memory if part is False else next(layers).layer for memory, part in zip(memories, parts, strict=True)]
        self.shared = [memory for memory, part in zip(memories, parts, strict=True) if part is False]

    def fits(self, parts: Sequence[Any], attentions: Sequence[Any], longest: int) -> bool:
        """Whether this is what such drafts need, as the workspace's memory and the weights lie now."""
        memory = [layer.keys.data_ptr() for layer in self.space.cache.layers]
        cores = [attention.converted_core() for attention, part in zip(attentions, parts, strict=True) if part is not False]
        same = all(mine.core is core for mine, core in zip(self.converted, cores, strict=False))
        return same and (self.parts, self.longest, self.memory) == (tuple(parts), longest, memory)

    def show(self, tokens: int) -> None:
        """As `Workspace.show`; each layer counts for itself."""
        for layer in self.cache.layers:
            for part in getattr(layer, "parts", (layer,)):
                if isinstance(part, VisibleStaticLayer):
                    part.visible, part.places = tokens, None
                else:
                    part.max_length, part.counts = tokens, True

    def read(self, tokens: int, mask: Tensor | None) -> None:
        """Fold the text from where the states are up to so many tokens, of any number; mask `[1, T]`, None without padding."""
        for layer in self.converted:
            layer.read(self.folded_tokens, tokens, mask)
        self.folded_tokens = tokens
        self.folded.fill_(tokens)

    def follow(self) -> None:
        """Fold the next `count` tokens, `longest` + 1 at most: a step that can be recorded."""
        number = torch.arange(self.longest + 1, device=self.count.device)
        new = (number < self.count)[None]
        places = (self.folded + number).clamp_max(self.space.length - 1)
        self.folded.add_(self.count)
        for layer in self.converted:
            layer.follow(places, new, self.folded)

    def after(self, tokens: int) -> None:
        """What guesses may write to is as after so many tokens of the text, where they have not been checked."""
        for memory in self.shared:
            memory.cumulative_length.fill_(tokens)


class _Converted:
    """A layer of a draft that is converted, whole or in part.

    text: its states after the tokens of the text that are folded. layer: of the cache, which guesses write to."""

    def __init__(self, memory: VisibleStaticLayer, attention: Any, part: Any, length: int):
        self.memory, self.core, self.states = memory, attention.converted_core(), StaticDSLACacheLayer(length)
        self.text: DualState | None = None
        self.heads = self.kept_heads = self.kept = None
        self.layer: Any = self.states
        if part is not True:
            device = memory.keys.device
            self.heads = torch.tensor(part[0], dtype=torch.int32, device=device)
            self.kept_heads = torch.tensor(part[1], device=device)
            self.kept = VisibleStaticLayer(length)
            self.kept.lazy_initialization(*(x[:, : len(part[1])] for x in (memory.keys, memory.values)))
            self.layer = PartialCacheLayer(self.kept, self.states, *part)

    def read(self, start: int, end: int, mask: Tensor | None) -> None:
        k, v = (x[:, :, start:end].transpose(1, 2) for x in (self.memory.keys, self.memory.values))
        part = None if mask is None else mask[:, start:end]
        state = fold_in_pieces(self.core, k, v, part, self.text if start else None, kv_heads=self.heads)
        if self.text is None:
            self.text = DualState(*(x.clone() for x in state))
            self.states.advance(state, k, v)
        else:
            for mine, new in zip(self.text, state, strict=True):
                mine.copy_(new)
        if self.kept is not None:
            for mine, theirs in ((self.kept.keys, self.memory.keys), (self.kept.values, self.memory.values)):
                mine[:, :, start:end] = theirs[:, :, start:end].index_select(1, self.kept_heads)
        self._set(torch.tensor([end], device=k.device))

    def follow(self, places: Tensor, new: Tensor, tokens: Tensor) -> None:
        k, v = (x.index_select(2, places) for x in (self.memory.keys, self.memory.values))
        state = self.core.fold(k.transpose(1, 2), v.transpose(1, 2), new, self.text, padding_at_end=True, kv_heads=self.heads)
        assert self.text is not None
        for mine, theirs in zip(self.text, state, strict=True):
            mine.copy_(theirs)
        if self.kept is not None:  # what lies behind the text is written over before it is seen
            for mine, theirs in ((self.kept.keys, k), (self.kept.values, v)):
                mine.index_copy_(2, places, theirs.index_select(1, self.kept_heads))
        self._set(tokens)

    def _set(self, tokens: Tensor) -> None:
        """Guesses begin after so many tokens `[1]`."""
        assert self.text is not None and self.states.state is not None and isinstance(self.states.tokens, Tensor)
        for mine, theirs in zip(self.states.state, self.text, strict=True):
            mine.copy_(theirs)
        self.states.tokens.copy_(tokens[0])
        if self.kept is not None:
            self.kept.cumulative_length.copy_(tokens.view_as(self.kept.cumulative_length))


class GraphEngine:
    """Both levels in recorded steps, as `levels.drafting.Engine`.

    Args:
        model: of transformers. space: its `Workspace`, begun at level 0. recorder: records steps.
        read: reads a prompt `[1, T]` at level 0 into `space`. step: reads a token `[1]`, likewise.
        drafts: makes or finds the `DraftSpace` of `space`, once its prompt is read. set_level: to draft_level, and back to 0.
    """

    def __init__(
        self,
        model: Any,
        space: Any,
        recorder: Recorder,
        read: Callable[[Tensor], None],
        step: Callable[[Tensor], None],
        drafts: Callable[[], DraftSpace],
        set_level: Callable[[int], None],
        draft_level: int,
    ):
        self.model, self.space, self.recorder, self._read, self._step, self._drafts = model, space, recorder, read, step, drafts
        self.set_level, self.draft_level = set_level, draft_level
        self.drafts: DraftSpace | None = None
        self._checked = 0

    def read(self, ids: Tensor) -> Tensor:
        self._read(ids[:, self.space.read :])
        return self.space.logits.clone()

    def draft(self, ids: Tensor, tokens: int, rule: Rule, ends: Collection[int]) -> tuple[list[Tensor], list[Tensor | None]]:
        """As in the protocol; guesses may lie behind `ends`, which the host would have to wait for."""
        space = self.space
        if self.drafts is None:
            self.drafts = self._drafts()
            self.drafts.folded_tokens = 0
        drafts = self.drafts
        behind = space.read - drafts.folded_tokens
        view = space.length if space.by_length else min(shown_tokens(space.read + tokens + 1), space.length)
        self.set_level(self.draft_level)
        try:
            if drafts.folded_tokens == 0 or behind > drafts.longest + 1:
                drafts.read(space.read, space.mask if space.padded else None)
            else:
                drafts.count.fill_(behind)
                self.recorder.run((drafts.parts, "follow", drafts.longest), drafts.follow)
                drafts.folded_tokens = space.read
            drafts.positions.copy_(space.positions)
            drafts.lengths.copy_(space.lengths)
            guesses: list[Tensor] = []
            drawn_from: list[Tensor | None] = []
            token = ids[:, -1]
            for _ in range(tokens):
                drafts.tokens.copy_(token[:, None])
                self.recorder.run((drafts.parts, "draft", space.padded, view), lambda: self._guess(drafts, view))
                token, needed = rule.guess(ids, drafts.logits.clone())
                guesses.append(token)
                drawn_from.append(needed)
                ids = torch.cat([ids, token[:, None]], 1)
            drafts.after(space.read)
        finally:
            self.set_level(0)
        return guesses, drawn_from

    def check(self, tokens: Tensor) -> Tensor:
        self._checked = count = tokens.shape[1]
        space, drafts = self.space, self.drafts
        if count == 1:
            self._step(tokens[0])
            return space.logits.clone()
        assert drafts is not None
        drafts.checked[:, :count] = tokens
        view = min(shown_tokens(space.read + count), space.length)
        none = (False,) * len(space.cache.layers)
        self.recorder.run((none, "check", space.padded, view, count, drafts.longest), lambda: self._check(drafts, count, view))
        return drafts.checked_logits[:count].clone()

    def keep(self, tokens: int) -> None:
        if self._checked == 1:  # `step` has counted
            return
        space = self.space
        space.read += tokens
        space.positions.add_(tokens)
        space.lengths.add_(tokens)
        for layer in space.layers():
            layer.cumulative_length.fill_(space.read)

    def _guess(self, drafts: DraftSpace, view: int) -> None:
        space = self.space
        drafts.show(view)
        mask = space.mask[:, :view] if space.padded else None
        run_token(self.model, drafts, mask, space.by_length)
        drafts.positions.add_(1)
        drafts.lengths.add_(1)

    def _check(self, drafts: DraftSpace, count: int, view: int) -> None:
        space = self.space
        space.show(view)
        logits = self.model(
            input_ids=drafts.checked[:, :count],
            attention_mask=space.mask[:, :view] if space.padded else None,
            position_ids=space.positions + torch.arange(count, device=space.positions.device),
            past_key_values=space.cache,
            use_cache=True,
        ).logits
        drafts.checked_logits[:count].copy_(logits[0])
