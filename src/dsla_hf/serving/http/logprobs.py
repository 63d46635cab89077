"""Log-probabilities of tokens, in the shapes of OpenAI's two interfaces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.request import Logprob
from .token_bytes import TokenBytes

LEAST = -9999.0  # JSON has no infinity; OpenAI's interface has this


@dataclass(frozen=True)
class Entry:
    """Of one token: what is told of it, None of a text's first; where in the text it begins, in characters."""

    token: int
    told: Logprob | None
    offset: int


def completion_logprobs(entries: Sequence[Entry], tokens: TokenBytes) -> dict[str, Any]:
    """The `logprobs` of a choice of /v1/completions. Of tokens that read the same the likeliest counts."""
    top: list[dict[str, float] | None] = []
    for entry in entries:
        words: dict[str, float] | None = None
        if entry.told is not None:
            words = {}
            for token, logprob in (*entry.told.top, (entry.token, entry.told.logprob)):
                words.setdefault(tokens.text(token), max(logprob, LEAST))
        top.append(words)
    return {
        "tokens": [tokens.text(entry.token) for entry in entries],
        "token_logprobs": [None if entry.told is None else max(entry.told.logprob, LEAST) for entry in entries],
        "top_logprobs": top,
        "text_offset": [entry.offset for entry in entries],
    }


def chat_logprobs(entries: Sequence[Entry], tokens: TokenBytes) -> dict[str, Any]:
    """The `logprobs` of a choice of /v1/chat/completions."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        return {"token": tokens.text(token), "logprob": max(logprob, LEAST), "bytes": list(tokens.of(token))}

    content = []
    for entry in entries:
        assert entry.told is not None
        top = [one(token, logprob) for token, logprob in entry.told.top]
        content.append({**one(entry.token, entry.told.logprob), "top_logprobs": top})
    return {"content": content, "refusal": None}
