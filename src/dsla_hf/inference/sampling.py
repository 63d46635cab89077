"""From logits to tokens: the likeliest ones, or such drawn by chance; `GraphDecoder` and the server use the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, TemperatureLogitsWarper

COLDEST = 1e-5  # a temperature below it would divide by next to nothing


class Constraint(Protocol):
    """What the tokens of one text must follow, as a grammar does."""

    def mask(self) -> Tensor:
        """Which tokens may come next: int32 `[ceil(V / 32)]` on the CPU, bit i of word w for token 32 w + i."""

    def accept(self, token: int) -> None:
        """The token that came, end-of-text tokens too."""


@dataclass(frozen=True)
class Sampling:
    """How tokens of a request are drawn.

    temperature: 0 takes the likeliest token. top_k: draw among so many of the likeliest, 0: all. top_p: among the likeliest of this total.
    min_p: among those at least this share as likely as the likeliest. presence_penalty, frequency_penalty: taken from logits of tokens that
    were generated, once and for each time. repetition_penalty: divides logits above 0 and multiplies those below of tokens of the text,
    prompt included. logit_bias: (token, what its logit gains). min_tokens: before so many no end-of-text or stop token comes.
    stop_token_ids: that end the text, beside the model's own. seed: of the draws, int64, None for any. ignore_eos: go on to
    `max_tokens`, whatever comes. logprobs: tell the log-probability of each token and of so many of the likeliest ones (0: its own alone),
    before anything here changed it. prompt_logprobs: the same of the prompt's tokens but the first.

    Raises:
        ValueError: if a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


class Likeliest(LogitsProcessor):
    """Leaves the likeliest tokens whose total reaches `top_p`. transformers' `TopPLogitsWarper` sorts the other way round: of equally
    likely tokens at the end it leaves others, and a seed would mean other texts than it has meant so far."""

    def __init__(self, top_p: float):
        self.top_p = top_p

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Logits `[B, V]`, those of all other tokens at minus infinity."""
        ordered, order = scores.softmax(-1).sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= self.top_p
        beyond[:, 0] = False  # the likeliest stays, however small top_p
        return scores.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), float("-inf"))


class Sampler:
    """Chooses the next tokens.

    Args:
        processors: what changes the logits first, as `generate` has it; None: nothing.
        sample: draw by chance; else the likeliest tokens are taken.
        generator: of the draws, on the device of the logits; None: PyTorch's own there.
    """

    def __init__(self, processors: Callable[..., Any] | None = None, sample: bool = False, generator: torch.Generator | None = None):
        self.processors, self.sample, self.generator = processors, sample, generator

    @classmethod
    def of(cls, sampling: Sampling) -> Sampler:
        """For logits of one text on the CPU, so that a seed means the same on every device and in any company."""
        if sampling.temperature == 0:
            return cls()
        processors = LogitsProcessorList([TemperatureLogitsWarper(float(max(sampling.temperature, COLDEST)))])
        if sampling.top_p < 1:
            processors.append(Likeliest(sampling.top_p))
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        return cls(processors, True, generator)

    def __call__(self, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Tokens int64 `[B]` from logits `[B, V]`; `ids` `[B, T]` are the texts so far, for processors that look at them."""
        scores = logits if self.processors is None else self.processors(ids, logits)
        if not self.sample:
            return scores.argmax(-1)
        return torch.multinomial(scores.softmax(-1), num_samples=1, generator=self.generator).squeeze(1)


def draw(logits: Tensor, samplers: Sequence[Sampler], meanwhile: Callable[[], None] | None = None) -> list[int]:
    """The next tokens of texts from logits `[B, V]`, each by the sampler of its row. `meanwhile` is called before the host waits."""
    best = logits.argmax(-1)
    if meanwhile is not None:
        meanwhile()
    tokens = best.tolist()
    rows = [row for row, sampler in enumerate(samplers) if sampler.sample]
    if rows:
        for row, scores in zip(rows, logits[rows].float().cpu().split(1), strict=True):
            tokens[row] = int(samplers[row](scores))
    return tokens
