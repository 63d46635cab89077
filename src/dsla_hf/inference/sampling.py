"""What may be asked of the tokens of a text: how they are drawn, and what they must follow."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

MOST_LOGPROBS = 20  # tokens in each place whose log-probabilities can be asked for


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

    Of tokens that are equally likely all are kept or none: which they are does not hang on their order.

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
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be from 0 to 1, got {self.min_p}")
        for name in ("presence_penalty", "frequency_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise ValueError(f"{name} must be from -2 to 2, got {getattr(self, name)}")
        if not 0 < self.repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        for name in ("top_k", "min_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed must be from -2^63 to 2^63 - 1, got {self.seed}")
        for name in ("logprobs", "prompt_logprobs"):
            if (number := getattr(self, name)) is not None and not 0 <= number <= MOST_LOGPROBS:
                raise ValueError(f"{name} must be from 0 to {MOST_LOGPROBS}, got {number}")
        for token, gain in self.logit_bias:
            if not -100 <= gain <= 100:
                raise ValueError(f"logit_bias must be from -100 to 100, got {gain} for token {token}")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            raise ValueError("logit_bias names a token twice: give each token one value")

    @property
    def penalises(self) -> bool:
        """Whether logits hang on the tokens that are there."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1

    def check_tokens(self, vocabulary: int) -> None:
        """Raises ValueError if a token id is none of so many."""
        for name, tokens in (("logit_bias", (token for token, _ in self.logit_bias)), ("stop_token_ids", self.stop_token_ids)):
            for token in tokens:
                if not 0 <= token < vocabulary:
                    raise ValueError(f"{name} has token {token}: ids go from 0 to {vocabulary - 1}")
