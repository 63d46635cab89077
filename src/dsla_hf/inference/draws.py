"""Draws of tokens from logits, for many rows at once on their device; `GraphDecoder` and the server use the same.

A row draws by a race: each token's logit gets a noise that its seed, the place in the text and the token's id determine, and the greatest
wins. So a text depends on neither its company nor its row, and a token that is not in question changes nothing for those that are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from dsla_kernels import draw as draw_in_kernels
from dsla_kernels import draws_logits

from ..core.transfers import sent
from .noise import gumbel, key_of, token_ids
from .sampling import Sampling

COLDEST = 1e-5  # a temperature below it would divide by next to nothing
# Of so many tokens, the likeliest, top_p is found without a sort of the others, if it is among them.
CANDIDATES, TIES = 1024, 64  # TIES: beyond top_k, of equally likely tokens
TOKENS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}  # of a race of all tokens: what a CPU's cache and a GPU's memory hold of noise


class Row(NamedTuple):
    """A draw: how, with which seed (int64), and for which place of the text (from 0)."""

    sampling: Sampling
    seed: int
    position: int


class Sampler:
    """Chooses the next tokens of a batch of texts, as `generate` is told to.

    Args:
        processors: what changes the logits first, as `generate` has it; None: nothing. Temperature, top_k, top_p and min_p at its end are
            left to the draws.
        sample: draw by chance; else the likeliest tokens are taken.
        seed: of the first text; that of text i is `seed + i`. None: one from PyTorch's generator (`torch.manual_seed`).
    """

    def __init__(self, processors: Callable[..., Any] | None = None, sample: bool = False, seed: int | None = None):
        self.processors, self.sample = processors, sample
        self.sampling = Sampling(temperature=1.0)
        if sample:
            self.processors, self.sampling = _without_warpers(processors)
            self.seed = int(torch.randint(-(2**63), 2**63 - 1, ())) if seed is None else seed

    def __call__(self, logits: Tensor, ids: Tensor | None = None, positions: Sequence[int] = (), surely: bool = True) -> Tensor:
        """Tokens int64 `[B]` from logits `[B, V]`; `ids` `[B, T]` are the texts so far, for processors that look at them, `positions` the
        places of the new tokens in their texts, for draws. surely: otherwise a token may be another one, and nothing is waited for."""
        scores = logits if self.processors is None else self.processors(ids, logits)
        if not self.sample:
            return scores.argmax(-1)
        rows = [Row(self.sampling, following(self.seed, number), place) for number, place in enumerate(positions)]
        return exactly(scores, rows) if surely else draw(scores, rows)[0]

    def behind(self, scores: Tensor, position: int) -> Tensor:
        """Tokens int64 `[T]` of one text, which follow one another from the place `position` on, from scores `[T, V]` that processors have
        seen already."""
        return exactly(scores, [Row(self.sampling, self.seed, position + place) for place in range(len(scores))])


def following(seed: int, number: int) -> int:
    """The seed of text `number` of several, int64."""
    return (seed + number + 2**63) % 2**64 - 2**63


def _without_warpers(processors: Any) -> tuple[Any, Sampling]:
    """What of processors comes before temperature, top_k, top_p and min_p, and these; all of it, where they do not come last, in this
    order."""
    known = {TemperatureLogitsWarper: "temperature", TopKLogitsWarper: "top_k", TopPLogitsWarper: "top_p", MinPLogitsWarper: "min_p"}
    if not isinstance(processors, LogitsProcessorList):
        return processors, Sampling(temperature=1.0)
    first = next((number for number, one in enumerate(processors) if type(one) in known), len(processors))
    last = [(list(known).index(type(one)) if type(one) in known else -1, one) for one in processors[first:]]
    ranks = [rank for rank, _ in last]
    if -1 in ranks or sorted(set(ranks)) != ranks or any(getattr(one, "min_tokens_to_keep", 1) != 1 for _, one in last):
        return processors, Sampling(temperature=1.0)
    values = {known[type(one)]: getattr(one, known[type(one)]) for _, one in last}
    if values.get("top_p") == 0:  # the likeliest alone
        values["top_p"] = COLDEST
    return LogitsProcessorList(processors[:first]), Sampling(**{"temperature": 1.0, **values})


class _Table(NamedTuple):
    """What rows `[R]` are drawn by, on their device."""

    top_k: Tensor
    keys: Tensor
    temperature: Tensor
    top_p: Tensor
    log_min_p: Tensor

    def of(self, rows: slice) -> _Table:
        return _Table(*(x[rows] for x in self))


def draw(scores: Tensor, rows: Sequence[Row], candidates: int = CANDIDATES) -> tuple[Tensor, Tensor]:
    """The next tokens int64 `[R]` of rows whose temperature is above 0, and bool `[R]`, which of them are sure: others have to be drawn
    `exactly`. Nothing is waited for.

    Args:
        scores: logits `[R, V]`. rows: R of them. candidates: looked at for top_p, where no kernels run.
    """
    device, vocabulary = scores.device, scores.shape[1]
    sure = torch.ones(len(rows), dtype=torch.bool, device=device)
    if draws_logits(scores):
        table, _ = _table(rows, list(range(len(rows))), device)
        filtered = any(_is_filtered(row.sampling, vocabulary) or row.sampling.min_p > 0 for row in rows)
        return draw_in_kernels(scores, table.temperature, table.top_k, table.top_p, table.log_min_p, table.keys, filtered), sure
    scores = scores.float()
    filtered_rows = [number for number, row in enumerate(rows) if _is_filtered(row.sampling, vocabulary)]
    others = [number for number, row in enumerate(rows) if not _is_filtered(row.sampling, vocabulary)]
    order = [*filtered_rows, *others]
    table, places = _table([rows[number] for number in order], order, device)
    count, mixed = len(filtered_rows), bool(filtered_rows and others)
    tokens = torch.empty(len(rows), dtype=torch.long, device=device)
    if filtered_rows:
        how = [rows[number].sampling for number in filtered_rows]
        found = _among_likeliest(scores[places[:count]] if mixed else scores, table.of(slice(count)), how, candidates)
        if not mixed:
            return found
        tokens[places[:count]], sure[places[:count]] = found
    at_once = max(TOKENS_AT_ONCE.get(device.type, 2**24) // vocabulary, 1)
    for start in range(count, len(rows), at_once):
        some = slice(start, start + at_once)
        at = places[some] if mixed else some
        tokens[at] = _among_all(scores[at], table.of(some), any(rows[number].sampling.min_p > 0 for number in order[some]))
    return tokens, sure


def _is_filtered(sampling: Sampling, vocabulary: int) -> bool:
    return 0 < sampling.top_k < vocabulary or sampling.top_p < 1


def exactly(scores: Tensor, rows: Sequence[Row]) -> Tensor:
    """The tokens of `draw`, all of them sure."""
    tokens, sure = draw(scores, rows)
    if not bool(sure.all()):
        again = (~sure).nonzero()[:, 0]
        tokens[again] = draw(scores[again], [rows[number] for number in again.tolist()], scores.shape[1])[0]
    return tokens


def _table(rows: Sequence[Row], order: list[int], device: torch.device) -> tuple[_Table, Tensor]:
    """Of rows, and their places `[R]`, in one copy."""
    whole = torch.tensor(
        [(number, min(row.sampling.top_k, 2**31 - 1), *key_of(row.seed, row.position)) for number, row in zip(order, rows, strict=True)]
    )
    real = torch.tensor(
        [
            (
                max(row.sampling.temperature, COLDEST),
                row.sampling.top_p if row.sampling.top_p < 1 else math.inf,
                math.log(row.sampling.min_p) if row.sampling.min_p > 0 else -math.inf,
            )
            for row in rows
        ]
    )
    # A column lies whole, as kernels read it; keys last, a pair for each row.
    columns = torch.cat([whole[:, :2].int().t().flatten(), real.view(torch.int32).t().flatten(), whole[:, 2:].int().flatten()])
    packed, count = sent(columns, device), len(rows)
    places, top_k, temperature, top_p, log_min_p = packed[: 5 * count].view(5, count)
    reals = [x.view(torch.float32) for x in (temperature, top_p, log_min_p)]
    return _Table(top_k.long(), packed[5 * count :].view(count, 2), *reals), places.long()


def _among_all(scores: Tensor, table: _Table, some_min_p: bool) -> Tensor:
    """Draws by temperature and min_p."""
    scores = scores / table.temperature[:, None]
    noisy = gumbel(table.keys, token_ids(scores.shape[1], scores.device)).add_(scores)
    if some_min_p:
        least = scores.amax(-1, keepdim=True) + table.log_min_p[:, None]
        noisy.masked_fill_(scores < least, -math.inf)
    return noisy.argmax(-1)


def _among_likeliest(scores: Tensor, table: _Table, how: Sequence[Sampling], candidates: int) -> tuple[Tensor, Tensor]:
    """Draws by all that there is: top_k, of what it leaves top_p, then min_p; and whether so many candidates were enough."""
    vocabulary, some_top_p = scores.shape[1], any(sampling.top_p < 1 for sampling in how)
    at_most = max(sampling.top_k if 0 < sampling.top_k < vocabulary else candidates for sampling in how)
    count = min(at_most + TIES, vocabulary) if candidates < vocabulary else vocabulary
    values, ids = scores.topk(count, -1) if count < vocabulary else scores.sort(-1, descending=True)
    values = values / table.temperature[:, None]
    limited = (table.top_k > 0) & (table.top_k < vocabulary)
    last = values.gather(1, (table.top_k.clamp(1, count) - 1)[:, None])
    last = torch.where(limited[:, None], last, -math.inf)
    kept = values >= last
    if some_top_p:
        total = values.masked_fill(~kept, -math.inf).logsumexp(-1)
        if any(not 0 < sampling.top_k < vocabulary for sampling in how):
            total = torch.where(limited, total, (scores / table.temperature[:, None]).logsumexp(-1))
        share = (values - total[:, None]).exp_().masked_fill_(~kept, 0)
        beyond = share.cumsum(-1) - share >= table.top_p[:, None]
        beyond[:, 0] = False  # the likeliest stays, however small top_p
        kept &= ~beyond
    least = values.masked_fill(~kept, math.inf).amin(-1, keepdim=True)
    lowest = values[:, -1:]
    sure = (lowest < least) & ~(limited[:, None] & (lowest >= last)) | lowest.isneginf()
    if count == vocabulary:
        sure = torch.ones_like(sure)
    least = torch.maximum(least, values[:, :1] + table.log_min_p[:, None])
    noisy = gumbel(table.keys, ids.int()).add_(values).masked_fill_(values < least, -math.inf)
    return ids.gather(1, noisy.argmax(-1, keepdim=True))[:, 0], sure[:, 0]
