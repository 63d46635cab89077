"""The next tokens of running texts: what each asks of its logits, and what is told of them, for all rows at once on their device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.transfers import sent
from ...inference.draws import Row, draw, exactly
from ...inference.sampling import Sampling
from .request import Logprob, Request

LOGITS_AT_ONCE = 2**23  # in fp32, of a prompt whose log-probabilities are asked for


class NextToken(NamedTuple):
    """Of a text; with an `error` it has none: its constraint failed."""

    token: int
    logprob: Logprob | None = None
    error: Exception | None = None


class NextTokens:
    """Chooses them. The host waits once, for what was chosen; rows that ask for nothing cost nothing.

    Logits are changed in this order: penalties, bias, end-of-text tokens that come too early, the constraint.

    Args:
        num_slots: of texts; vocabulary: of the logits. eos_tokens: ids that end a text.
        one_by_one: log-probabilities are summed row by row, so that their last bits do not depend on how many texts ask for them.
    """

    def __init__(self, num_slots: int, vocabulary: int, eos_tokens: set[int], device: torch.device, one_by_one: bool = False):
        self.num_slots, self.vocabulary, self.eos_tokens, self.device = num_slots, vocabulary, eos_tokens, device
        self.at_once = 1 if one_by_one else LOGITS_AT_ONCE
        # [slots, V], once a text is penalised: how often it has generated each token, and whether its prompt has it.
        self._counts: Tensor | None = None
        self._prompted: Tensor | None = None
        self._counted: dict[int, tuple[int, int]] = {}  # by slot: number of the text, tokens of it that are counted
        self._bits = torch.arange(32, dtype=torch.int32, device=device)

    def __call__(self, logits: Tensor, requests: Sequence[Request], meanwhile: Callable[[], None] | None = None) -> list[NextToken]:
        """One for each text from its logits `[R, V]`. `meanwhile` is called before the host waits."""
        masks, errors = self._masks(requests)
        sampled = [number for number, request in enumerate(requests) if request.sampling.temperature > 0]
        changed = [number for number, request in enumerate(requests) if number in masks or self._changes(request)]
        touched = sorted({*sampled, *changed})
        asking = [number for number, request in enumerate(requests) if request.sampling.logprobs is not None]
        if not touched and not asking:
            tokens = logits.argmax(-1)
            if meanwhile is not None:
                meanwhile()
            return [NextToken(token, error=errors.get(number)) for number, token in enumerate(tokens.tolist())]

        rows = [Row(requests[number].sampling, requests[number].seed, requests[number].length) for number in sampled]
        scores, where = logits, None  # where: rows that are drawn, if not all are
        if len(sampled) == len(requests) and not changed:
            tokens, sure = draw(scores, rows)
        else:
            tokens, sure = logits.argmax(-1), torch.ones(len(requests), dtype=torch.bool, device=self.device)
            if touched:
                places = self._sent(touched)
                scores = logits[places]
                if changed:
                    scores = scores.float()
                    self._change(scores, [(at, requests[number]) for at, number in enumerate(touched)], masks, touched)
                    tokens[places] = scores.argmax(-1)
            if sampled:
                if len(sampled) < len(touched):
                    scores = scores[self._sent([at for at, number in enumerate(touched) if requests[number].sampling.temperature > 0])]
                where = self._sent(sampled)
                tokens[where], sure[where] = draw(scores, rows)
        whole = self._packed(logits, tokens, sure, requests, asking)
        counted = self._count(tokens, requests)
        if meanwhile is not None:
            meanwhile()
        found = whole.cpu()
        if not bool(found[1].all()):
            again = exactly(scores, rows)
            tokens = again if where is None else tokens.index_copy_(0, where, again)
            found = self._packed(logits, tokens, sure, requests, asking).cpu()
            for slot in counted:
                self._counted.pop(slot)  # of other tokens
        tokens_there = found[0].tolist()
        told = logprobs_of(found[2:], tokens_there, [request.sampling.logprobs for request in requests])
        return [NextToken(token, told[number], errors.get(number)) for number, token in enumerate(tokens_there)]

    def several(
        self, logits: Tensor, requests: Sequence[Request], meanwhile: Callable[[], None] | None = None
    ) -> list[list[NextToken]] | None:
        """Of each text the tokens that follow one another, from logits `[R, T, V]` behind its last one and behind guesses, as a call for
        each would give them while guesses are right. None where a text asks for what hangs on the tokens before."""
        if any(x.constraint is not None or x.sampling.logprobs is not None or self._changes(x) for x in requests):
            return None
        places, scores = logits.shape[1], logits.flatten(0, 1)
        tokens = scores.argmax(-1)
        sampled = [number for number, request in enumerate(requests) if request.sampling.temperature > 0]
        rows = [Row(requests[n].sampling, requests[n].seed, requests[n].length + place) for n in sampled for place in range(places)]
        sure = tokens.new_ones(0)
        if sampled:
            where = self._sent([number * places + place for number in sampled for place in range(places)])
            scores = scores[where]
            tokens[where], sure = draw(scores, rows)
        if meanwhile is not None:
            meanwhile()
        found = torch.cat([tokens, sure.long()]).tolist()
        if not all(found[len(tokens) :]):
            found = tokens.index_copy_(0, where, exactly(scores, rows)).tolist()
        each = [NextToken(token) for token in found[: len(tokens)]]
        return [each[start : start + places] for start in range(0, len(each), places)]

    def rehearse(self, dtype: torch.dtype) -> None:
        """Compile what draws from a model's logits of this dtype, so that the first text does not wait for it."""
        for kind in {dtype, torch.float32}:  # as they come, and changed
            for count in (1, 2):
                logits = torch.zeros(count, self.vocabulary, dtype=kind, device=self.device)
                for sampling in (Sampling(1.0), Sampling(1.0, top_k=2, top_p=0.5)):
                    draw(logits, [Row(sampling, 0, 0)] * count)

    # --- what changes logits --------------------------------------------------------------------------------------

    def _changes(self, request: Request) -> bool:
        sampling = request.sampling
        return sampling.penalises or bool(sampling.logit_bias) or bool(self._too_early(request))

    def _too_early(self, request: Request) -> list[int]:
        """Tokens that would end a text before its time."""
        if len(request.tokens) >= request.sampling.min_tokens:
            return []
        return sorted({*self.eos_tokens, *request.sampling.stop_token_ids})

    def _masks(self, requests: Sequence[Request]) -> tuple[dict[int, Tensor], dict[int, Exception]]:
        """Of the rows that have a constraint what it allows, int32 `[ceil(V / 32)]`; or what it failed with."""
        found, errors = dict[int, Tensor](), dict[int, Exception]()
        for number, request in enumerate(requests):
            if request.constraint is None:
                continue
            try:
                found[number] = checked(request.constraint.mask())
            except Exception as error:  # whatever it is, it is of this text alone
                errors[number] = error
        if not found:
            return found, errors
        # All rows at once: an operation for each would take the host longer than the constraints themselves.
        words = torch.zeros(len(found), -(-self.vocabulary // 32), dtype=torch.int32)  # words that are not there allow nothing
        for row, mask in zip(words, found.values(), strict=True):
            row[: len(mask)] = mask[: len(row)]
        if self.vocabulary % 32:
            words[:, -1] &= (1 << self.vocabulary % 32) - 1
        masks = dict[int, Tensor]()
        for number, row, some in zip(found, words, words.any(1).tolist(), strict=True):
            if some:
                masks[number] = _later(row, self._too_early(requests[number]))
            else:
                errors[number] = ValueError("the constraint allows no token here")
        return masks, errors

    def _change(self, scores: Tensor, rows: list[tuple[int, Request]], masks: dict[int, Tensor], touched: list[int]) -> None:
        """Change the logits `[N, V]` of rows, in place."""
        self._penalise(scores, [(at, request) for at, request in rows if request.sampling.penalises])
        biased = [(at, *_bias(request.sampling.logit_bias)) for at, request in rows if request.sampling.logit_bias]
        if biased:
            places = torch.cat([torch.stack([torch.full_like(tokens, at), tokens]) for at, tokens, _ in biased], 1)
            where = sent(places, self.device)
            scores[where[0], where[1]] += sent(torch.cat([gains for _, _, gains in biased]), self.device)
        early = [(at, token) for at, request in rows if request.constraint is None for token in self._too_early(request)]
        if early:
            where = self._sent(early)
            scores[where[:, 0], where[:, 1]] = -math.inf
        constrained = [(at, masks[number]) for at, number in enumerate(touched) if number in masks]
        if constrained:
            words = sent(torch.stack([mask for _, mask in constrained]), self.device)
            allowed = ((words[:, :, None] >> self._bits) & 1).bool().flatten(1)[:, : self.vocabulary]
            at_rows = self._sent([at for at, _ in constrained])
            scores[at_rows] = scores[at_rows].masked_fill(~allowed, -math.inf)

    # --- penalties ------------------------------------------------------------------------------------------------

    def _penalise(self, scores: Tensor, rows: list[tuple[int, Request]]) -> None:
        if not rows:
            return
        counts, prompted = self._prepared([request for _, request in rows])
        settings = [(x.sampling.repetition_penalty, x.sampling.frequency_penalty, x.sampling.presence_penalty) for _, x in rows]
        repetition, frequency, presence = self._sent(settings, torch.float32).unsqueeze(-1).unbind(1)
        at, slots = self._sent([[at for at, _ in rows], [request.slot for _, request in rows]])
        times, mine = counts[slots], scores[at]
        repeated = torch.where(mine > 0, mine / repetition, mine * repetition)
        mine = torch.where((times > 0) | prompted[slots], repeated, mine)
        scores[at] = mine - frequency * times - presence * (times > 0)

    def _prepared(self, requests: list[Request]) -> tuple[Tensor, Tensor]:
        """The counts of all slots, those of these texts right."""
        if self._counts is None or self._prompted is None:
            self._counts, self._prompted = (
                torch.zeros(self.num_slots, self.vocabulary, dtype=dtype, device=self.device) for dtype in (torch.int32, torch.bool)
            )
        for request in requests:
            assert request.slot is not None
            if self._counted.get(request.slot) != (request.number, len(request.tokens)):
                times = torch.bincount(torch.tensor(request.tokens, dtype=torch.long), minlength=self.vocabulary).int()
                there = torch.zeros(self.vocabulary, dtype=torch.bool)
                there[request.prompt] = True
                self._counts[request.slot], self._prompted[request.slot] = sent(times, self.device), sent(there, self.device)
                self._counted[request.slot] = request.number, len(request.tokens)
        return self._counts, self._prompted

    def _count(self, tokens: Tensor, requests: Sequence[Request]) -> list[int]:
        """The tokens of texts that are penalised; their slots."""
        rows = [(number, request) for number, request in enumerate(requests) if request.sampling.penalises]
        if not rows:
            return []
        assert self._counts is not None
        at, slots = self._sent([[number for number, _ in rows], [request.slot for _, request in rows]])
        self._counts[slots, tokens[at]] += 1
        for _, request in rows:
            assert request.slot is not None
            self._counted[request.slot] = request.number, len(request.tokens) + 1
        return [request.slot for _, request in rows if request.slot is not None]

    # --- what is told ---------------------------------------------------------------------------------------------

    def _packed(self, logits: Tensor, tokens: Tensor, sure: Tensor, requests: Sequence[Request], asking: list[int]) -> Tensor:
        """For one copy to the host, int32 `[2, R]`: tokens, and whether they are sure; below what `scored` gives, where any row asks."""
        lines = torch.stack([tokens, sure.long()]).int()
        if not asking:
            return lines
        where, most = self._sent(asking), max(requests[number].sampling.logprobs or 0 for number in asking)
        raw = logits if len(asking) == len(requests) else logits[where]
        mine = scored(raw, tokens[where], most, self.at_once)
        return torch.cat([lines, mine.new_zeros(len(mine), len(requests)).index_copy_(1, where, mine)])

    def _sent(self, values: Sequence[object], dtype: torch.dtype = torch.long) -> Tensor:
        return sent(torch.tensor(values, dtype=dtype), self.device)


def checked(mask: object) -> Tensor:
    """A constraint's mask.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.int32 or mask.ndim != 1:
        raise ValueError("a constraint's mask must be an int32 tensor with 32 tokens a word")
    return mask


def _later(words: Tensor, too_early: list[int]) -> Tensor:
    """A mask without ends that come too early; with them, where nothing else may come."""
    if not too_early:
        return words
    later = words.clone()
    for token in too_early:
        bit = 1 << token % 32
        later[token // 32] &= ~(bit - (bit >> 31 << 32))
    return later if later.any() else words


@functools.lru_cache(maxsize=256)
def _bias(pairs: tuple[tuple[int, float], ...]) -> tuple[Tensor, Tensor]:
    """Tokens, and what their logits gain: a long list is made into tensors once, not at every token."""
    tokens, gains = zip(*pairs, strict=True)
    return torch.tensor(tokens), torch.tensor(gains, dtype=torch.float32)


def scored(logits: Tensor, tokens: Tensor, most: int, at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """Log-probabilities of tokens `[N]` by logits `[N, V]` and those of the `most` likeliest, as int32 `[1 + 2 most, N]`: the bits of that
    of the token, ids, bits of theirs. Of `at_once` logits or a row's at a time, in fp32."""
    parts = []
    step = max(at_once // logits.shape[1], 1)
    for start in range(0, len(logits), step):
        raw = logits[start : start + step].float()
        total = raw.logsumexp(-1, keepdim=True)
        mine = raw.gather(1, tokens[start : start + step, None]) - total
        values, ids = raw.topk(min(most, raw.shape[1]), -1)
        parts.append(torch.cat([mine.view(torch.int32), ids.int(), (values - total).view(torch.int32)], 1))
    return torch.cat(parts).t()


def logprobs_of(lines: Tensor, tokens: Sequence[int], most: Sequence[int | None]) -> list[Logprob | None]:
    """What `scored` gave, on the CPU, for tokens of which some number of likeliest ones is to be told each; None: nothing."""
    if not len(lines):
        return [None] * len(tokens)
    real, count = lines.contiguous().view(torch.float32), len(lines) // 2
    mine, ids, values = real[0].tolist(), lines[1 : 1 + count].t().tolist(), real[1 + count :].t().tolist()
    return [
        None if many is None else Logprob(token, mine[number], tuple(zip(ids[number][:many], values[number][:many], strict=True)))
        for number, (token, many) in enumerate(zip(tokens, most, strict=True))
    ]
