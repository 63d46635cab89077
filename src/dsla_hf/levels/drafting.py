"""Drafting with one's own level: `generate(..., draft_level=...)`, whose text is that of the level it runs at, several tokens a forward.

The model at a high level guesses some tokens, one forward at the lower level checks them all, and those up to the first that it would not
have chosen stay, with the one that it chooses instead. No second model, and no second cache (see `core.draft_cache`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    LogitsProcessorList,
    MaxLengthCriteria,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteriaList,
    StopStringCriteria,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation import GenerateDecoderOnlyOutput

from ..core.draft_cache import DraftCache, LayerPart, end_recording, records, take_back
from ..core.tensor_parallel import is_tensor_parallel
from ..core.transfers import received
from .acceptance import Greedy, Rejection, Rule
from .draft_length import DraftLength, FixedLength, Lengths

# Processors that hang on nothing but the text given: they change guesses, too. Others see what the checking level says alone, as some keep
# count of the texts they see.
PURE_PROCESSORS = (
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
ONE_ROW = (
    "drafts are checked for one text at a time, as texts of a batch would go on by different numbers of tokens: give each its own call, or "
    "leave draft_level out"
)


class Drafts(Protocol):
    """What of a model with levels is needed beside `HasLevels`."""

    def get_level(self) -> int: ...

    def set_level(self, level: int | str) -> None: ...

    def level_sizes(self) -> dict[str, Any]: ...

    def layer_parts(self) -> list[LayerPart]:
        """What of each layer is DSLA at the level of now."""
        ...


@dataclass
class DraftedOutput(GenerateDecoderOnlyOutput):
    """The result of `generate(..., draft_level=..., return_dict_in_generate=True)`.

    drafted: tokens guessed. compared: of them those that the checking level was asked about, up to the first of each round that it did not
    choose. accepted: of them those that are in the text. checks: forwards of the checking level behind the prompt.
    """

    drafted: int | None = None
    compared: int | None = None
    accepted: int | None = None
    checks: int | None = None


class Engine(Protocol):
    """A model at two levels, and what it remembers of one text."""

    def read(self, ids: Tensor) -> Tensor:
        """Read the prompt `[1, T]`, or what of it has not been read; logits fp32 `[1, V]` behind it, at the checking level."""

    def draft(self, ids: Tensor, tokens: int, rule: Rule, ends: Collection[int]) -> tuple[list[Tensor], list[Tensor | None]]:
        """Up to so many guesses int64 `[1]` behind the text `ids` `[1, T]`, of which all but the last token is read, and what `rule` wants
        of each; none behind one of the tokens `ends`."""

    def check(self, tokens: Tensor) -> Tensor:
        """Read tokens `[1, K + 1]`, the last one of the text and guesses; logits fp32 `[K + 1, V]` behind each, at the checking level."""

    def draft_ahead(self, chosen: Tensor, guesses: Tensor, tokens: int, rule: Rule) -> list[Tensor] | None:
        """Begin the draft of the next round, before the host knows how much of this one stays: up to so many guesses int64 `[1]` behind the
        text with those `guesses` `[K]` that stay and the token after them, of what `rule` has `chosen` `[K + 1]`. None where that is not
        possible. `keep` comes afterwards, and then `check`."""

    def keep(self, tokens: int) -> None:
        """Of the tokens that were just checked the first so many are those of the text."""


class DynamicEngine:
    """Both levels as they are, over a `DynamicCache`.

    Args:
        model: of transformers. leveled: what has its levels, now at the checking one.
        cache: empty, or of the beginning of the text.
        mask: `[1, T]` of the prompt, None without padding.
        draft_level: a level above. chunk: tokens of the prompt that are read at a time, None: all.
    """

    def __init__(self, model: Any, leveled: Drafts, cache: Any, mask: Tensor | None, draft_level: int, chunk: int | None = None):
        self.model, self.leveled, self.cache, self.mask, self.chunk = model, leveled, cache, mask, chunk
        self.levels = leveled.get_level(), draft_level
        self._drafts: DraftCache | None = None
        self._checked = 0
        self._ends_recording = False

    def read(self, ids: Tensor) -> Tensor:
        past = self._read_so_far()
        for part in ids[:, past:].split(self.chunk or ids.shape[1], 1):
            logits = self._forward(part, self.cache, logits_to_keep=1)
        # Only now: what is recorded from the first token on would be all of the prompt.
        self._ends_recording = not records(self.cache)
        self.cache.activate_past_recording()
        return logits[:, -1].float()

    def draft(self, ids: Tensor, tokens: int, rule: Rule, ends: Collection[int]) -> tuple[list[Tensor], list[Tensor | None]]:
        if self._drafts is None:
            check, draft = (self._parts_at(level) for level in self.levels)
            mask = None if self.mask is None else self.mask.bool()
            self._drafts = DraftCache(self.cache, draft, check, mask)
        cache = self._drafts.begin()
        guesses: list[Tensor] = []
        drawn_from: list[Tensor | None] = []
        self.leveled.set_level(self.levels[1])
        try:
            for _ in range(tokens):
                guess, needed = rule.guess(ids, self._forward(ids[:, -1:], cache)[:, -1].float())
                guesses.append(guess)
                drawn_from.append(needed)
                if ends and int(guess) in ends:
                    break
                ids = torch.cat([ids, guess[:, None]], 1)
        finally:
            self.leveled.set_level(self.levels[0])
        return guesses, drawn_from

    def check(self, tokens: Tensor) -> Tensor:
        self._checked = tokens.shape[1]
        return self._forward(tokens, self.cache)[0].float()

    def draft_ahead(self, chosen: Tensor, guesses: Tensor, tokens: int, rule: Rule) -> list[Tensor] | None:
        return None

    def keep(self, tokens: int) -> None:
        take_back(self.cache, self._checked - tokens)
        self._checked = 0

    def end(self) -> None:
        """The cache records no more, unless it did before."""
        if self._ends_recording:
            end_recording(self.cache)

    def _parts_at(self, level: int) -> list[LayerPart]:
        self.leveled.set_level(level)
        try:
            return self.leveled.layer_parts()
        finally:
            self.leveled.set_level(self.levels[0])

    def _read_so_far(self) -> int:
        return int(self.cache.get_seq_length())

    def _forward(self, ids: Tensor, cache: Any, **options: Any) -> Tensor:
        past, tokens = int(cache.get_seq_length()), ids.shape[1]
        positions, mask = torch.arange(past, past + tokens, device=ids.device)[None], None
        if self.mask is not None:
            mask = self.mask[:, : past + tokens]
            mask = torch.cat([mask, mask.new_ones(1, past + tokens - mask.shape[1])], 1)
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, past:]
        options |= {"attention_mask": mask, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        return self.model(input_ids=ids, **options).logits


class Counts:
    """Of one text: those of `DraftedOutput`."""

    def __init__(self) -> None:
        self.drafted = self.compared = self.accepted = self.checks = 0

    def add(self, drafted: int, compared: int, accepted: int) -> None:
        """Those of a round."""
        self.drafted, self.compared, self.accepted = self.drafted + drafted, self.compared + compared, self.accepted + accepted
        self.checks += 1


class Ends:
    """Whether a text is over.

    Args:
        criteria: of transformers.

    known: whether the length of a text and its last token tell.
    """

    def __init__(self, criteria: StoppingCriteriaList):
        self.criteria = criteria
        # Beside these, all that is asked of a text are its length and its last token: then nothing is read from its device.
        lengths = [one.max_length for one in criteria if type(one) is MaxLengthCriteria]
        self.known = len(lengths) + sum(type(one) is EosTokenCriteria for one in criteria) == len(criteria)
        self._length = min(lengths, default=math.inf)
        self.tokens = ends_of(criteria)

    def knows(self, length: int, token: int) -> bool | None:
        """Whether a text of so many tokens, of which this is the last, is over; None where that does not tell."""
        if not self.known:
            return None
        return token in self.tokens or length >= self._length

    def __call__(self, ids: Tensor) -> bool:
        """The same of the text `[1, T]` itself."""
        return bool(self.criteria(ids, None).all())


class Text:
    """A text that grows.

    Args:
        ids: the prompt `[1, T]`. ends: says whether it is over. show: is given each new token `[1]`.
    """

    def __init__(self, ids: Tensor, ends: Ends, show: Callable[[Tensor], None]):
        self.ids, self._ends, self._show = ids, ends, show
        self.ended = False

    def add(self, token: Tensor) -> None:
        """A token `[1]` that the host has not seen."""
        self.ids = torch.cat([self.ids, token[:, None]], 1)
        self._show(token)
        self.ended = self._ends(self.ids)

    def add_chosen(self, chosen: Tensor, values: list[int], guessed: list[int]) -> tuple[int, int]:
        """The tokens `chosen` `[K + 1]`, of these values, up to the first that is not as `guessed` (K of them), or to the end of the text;
        how many, and how many of them were guessed."""
        length, accepted = self.ids.shape[1], 0
        for kept, (value, guess) in enumerate(zip(values, [*guessed, None], strict=True), 1):
            self._show(torch.tensor([value]))
            over = self._ends.knows(length + kept, value)
            self.ended = self._ends(torch.cat([self.ids, chosen[None, :kept]], 1)) if over is None else over
            accepted += value == guess
            if self.ended or value != guess:
                break
        self.ids = torch.cat([self.ids, chosen[None, :kept]], 1)
        return kept, accepted


def draft_and_check(
    engine: Engine,
    ids: Tensor,
    rule: Rule,
    lengths: Lengths,
    ends: Ends,
    *,
    max_length: int,
    show: Callable[[Tensor], None] = lambda token: None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Tensor, Counts]:
    """The decoding loop, for one text.

    Args:
        engine: has read nothing of the text, or its beginning.
        ids: the prompt `[1, T]`.
        rule: chooses tokens. lengths: how many to draft.
        ends: asked once behind each new token. Behind its `tokens` no guess makes sense.
        max_length: of the text, which `ends` keeps; no draft goes beyond.
        show: is given each token `[1]` of the text when it is settled.
        clock: seconds; for tests.

    Returns:
        The text `[1, T]`, and counts.
    """
    counts, text = Counts(), Text(ids, ends, show)
    text.add(rule.choose(ids, engine.read(ids)))
    planned: int | None = None
    ahead: list[Tensor] | None = None  # guesses that are made already
    while not text.ended:
        start = clock()
        room = max_length - text.ids.shape[1] - 1  # the checking level adds a token of its own
        drawn_from: list[Tensor | None]
        if ahead is not None:
            guesses, drawn_from = ahead, [None] * len(ahead)
        else:
            planned = lengths.next() if planned is None else planned
            # At the end of a text no length that there was not before: where steps are recorded each is a recording of its own.
            tokens = max((length for length in lengths.lengths if length <= min(planned, room)), default=0)
            guesses, drawn_from = engine.draft(text.ids, tokens, rule, ends.tokens) if tokens > 0 else ([], [])
        checked = torch.cat([text.ids[0, -1:], *guesses])
        between = clock()
        logits = engine.check(checked[None])
        chosen = rule.choose_all(text.ids, logits, checked[1:], drawn_from)
        planned = ahead = None
        if chosen is None:
            kept, accepted = _choose_each(text, rule, logits, guesses, drawn_from)
        else:
            # All that the host reads of a round, in one; while it does, the next draft may be under way.
            values = received(torch.cat([chosen, checked[1:]]))
            if guesses:
                planned = lengths.next()
                if 0 < planned <= room - len(checked):
                    ahead = engine.draft_ahead(chosen, checked[1:], planned, rule)
            found = values()
            kept, accepted = text.add_chosen(chosen, found[: len(checked)], found[len(checked) :])
        engine.keep(kept)
        counts.add(len(guesses), min(kept, len(guesses)), accepted)
        lengths.record(len(guesses), accepted, between - start, clock() - between)
    return text.ids, counts


def _choose_each(text: Text, rule: Rule, logits: Tensor, guesses: Sequence[Tensor], drawn_from: Sequence[Tensor | None]) -> tuple[int, int]:
    """As `Text.add_chosen`, where what is chosen may hang on the text before it; logits `[K + 1, V]`."""
    accepted = 0
    for place, one in enumerate(logits.split(1)):
        guess = guesses[place] if place < len(guesses) else None
        token = rule.choose(text.ids, one, guess, None if guess is None else drawn_from[place])
        hit = guess is not None and bool(token == guess)
        text.add(token)
        accepted += hit
        if text.ended or not hit:
            break
    return place + 1, accepted


def rule_for(processors: LogitsProcessorList, sample: bool) -> Rule:
    """How tokens are chosen that `generate` changes with these processors."""
    pure = pure_processors(processors)
    return Rejection(processors, pure) if sample else Greedy(processors, pure)


def pure_processors(processors: LogitsProcessorList) -> LogitsProcessorList:
    """Those that change guesses, too."""
    return LogitsProcessorList([one for one in processors if type(one) in PURE_PROCESSORS])


def lengths_for(tokens: int | None) -> Lengths:
    """`draft_tokens` of a call."""
    return DraftLength() if tokens is None else FixedLength(tokens)


def ends_of(stopping_criteria: Any) -> set[int]:
    """The end-of-text tokens among what ends a text."""
    return {int(token) for criterion in stopping_criteria for token in getattr(criterion, "eos_token_id", ())}


def check_draft_options(leveled: Drafts, draft_level: int | str, draft_tokens: int | None, option: Callable[[str], Any]) -> int:
    """The level that drafts, as a number, if a call can be drafted; before anything runs. option: what a call says, by name.

    Raises:
        ValueError: says what to change.
    """
    level, sizes = leveled.get_level(), leveled.level_sizes()
    if sizes["min_level"] == sizes["max_level"]:
        raise ValueError(
            f"draft_level: this model has level {level} and no other: load the original model with the adapter, whose higher levels draft"
        )
    leveled.set_level(draft_level)  # refuses what the plan has not
    resolved = leveled.get_level()
    leveled.set_level(level)
    if resolved <= level:
        raise ValueError(
            f"draft_level must be above the level that checks, got {draft_level!r} (level {resolved}) at level {level}: give a higher one, "
            "or set_level() to a lower level before"
        )
    if draft_tokens is not None and (isinstance(draft_tokens, bool) or not isinstance(draft_tokens, int) or draft_tokens < 1):
        raise ValueError(f"draft_tokens must be 1 or more, or None to let it adapt, got {draft_tokens!r}")
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"):
        if option(name):
            raise ValueError(f"{name} beside draft_level: one thing drafts; leave one of them out")
    if option("level_policy") is not None:
        raise ValueError("level_policy beside draft_level: the level of the text must stay; set_level() before the call")
    if (option("num_beams") or 1) > 1 or (option("num_return_sequences") or 1) > 1:
        raise ValueError(f"num_beams and num_return_sequences beside draft_level: {ONE_ROW}")
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if option(name):
            raise ValueError(
                f"{name} beside draft_level: forwards read several tokens, of which some are taken back; leave one of them out"
            )
    if option("use_cache") is False:
        raise ValueError("use_cache=False beside draft_level: a draft reads the cache of the level that checks it; leave use_cache out")
    for name in ("inputs_embeds", "custom_generate"):
        if option(name) is not None:
            raise ValueError(f"{name} beside draft_level: it has a decoding loop of its own; leave one of them out")
    ids, mask = _text(option), option("attention_mask")
    if ids is not None and ids.shape[0] > 1:
        raise ValueError(f"draft_level with {ids.shape[0]} texts in a batch: {ONE_ROW}")
    if ids is not None and mask is not None and mask.shape != ids.shape:
        raise ValueError(
            f"attention_mask is {list(mask.shape)} and the text {list(ids.shape)}: with draft_level give the whole text, also where "
            "past_key_values holds its beginning"
        )
    return resolved


def _text(option: Callable[[str], Any]) -> Tensor | None:
    return next((option(name) for name in ("inputs", "input_ids") if option(name) is not None), None)


def stop_by_criterion(options: dict[str, Any], option: Callable[[str], Any]) -> None:
    """Make a criterion of `stop_strings` in the options of `generate`: transformers keeps the tokenizer, which it needs for that, from
    custom loops. option: what the call says, by name. Without a tokenizer transformers says what is missing."""
    tokenizer = options.pop("tokenizer", None)
    if (stop_strings := option("stop_strings")) is not None and tokenizer is not None:
        options["stop_strings"] = None
        ends = StopStringCriteria(tokenizer, stop_strings)
        options["stopping_criteria"] = StoppingCriteriaList([*(options.get("stopping_criteria") or ()), ends])


def generate_drafted(
    generate: Callable[..., Any],
    model: Any,
    leveled: Any,
    options: dict[str, Any],
    draft_level: int | str,
    draft_tokens: int | None,
    option: Callable[[str], Any],
) -> Any:
    """`generate` of transformers with drafts; arguments as in `generation.generate_with_levels`. option: what the call says, by name.
    leveled: `Drafts`, or a hybrid, which is refused.

    Raises:
        ValueError: for options that do not go together, before anything runs.
    """
    draft_level = check_draft_options(leveled, draft_level, draft_tokens, option)
    if is_tensor_parallel(model):
        raise ValueError("draft_level: the model is divided by tensor parallel, whose processes do not draft; leave it out")
    options.pop("level_policy", None)
    cache, kind = option("past_key_values"), option("cache_implementation")
    if kind not in (None, "dynamic") or (cache is not None and (type(cache) is not DynamicCache or getattr(cache, "offloading", False))):
        raise ValueError(
            f"draft_level with a cache that is {kind or type(cache).__name__}: what is guessed wrong must be taken back, which a "
            "DynamicCache in the model's memory can (the default); GraphDecoder(draft_level=...) drafts over static ones"
        )
    ids = _text(option)
    if cache is not None and ids is not None and cache.get_seq_length() >= ids.shape[1]:
        raise ValueError(f"past_key_values holds {cache.get_seq_length()} tokens, the text has {ids.shape[1]}: give the whole text")
    streamer = options.pop("streamer", None)  # transformers keeps it from custom loops
    stop_by_criterion(options, option)

    def decode(model: Any, input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, generation_config: Any, **inputs: Any) -> Any:
        engine = DynamicEngine(
            model,
            leveled,
            inputs["past_key_values"],
            inputs.get("attention_mask"),
            draft_level,
            generation_config.prefill_chunk_size,
        )
        if streamer is not None:
            streamer.put(input_ids.cpu())
        try:
            ids, counts = draft_and_check(
                engine,
                input_ids,
                rule_for(logits_processor, generation_config.do_sample),
                lengths_for(draft_tokens),
                Ends(stopping_criteria),
                max_length=generation_config.max_length,
                show=(lambda token: None) if streamer is None else (lambda token: streamer.put(token.cpu())),
            )
        finally:
            engine.end()
        if streamer is not None:
            streamer.end()
        if not generation_config.return_dict_in_generate:
            return ids
        return DraftedOutput(sequences=ids, past_key_values=engine.cache, **vars(counts))

    with torch.no_grad():
        return generate(**options, custom_generate=decode)
