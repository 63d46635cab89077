"""Answers of /v1/completions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .answers import Piece
from .formats import Format, Gathered
from .logprobs import Entry, completion_logprobs
from .schema import CompletionBody


class Completions(Format):
    """See `Format`."""

    kind, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"
    body: CompletionBody

    def choice(self, gathered: Gathered) -> dict[str, Any]:
        return {"text": gathered.text, "logprobs": self._logprobs(gathered.entries)}

    def chunks(self, piece: Piece) -> Iterator[dict[str, Any]]:
        yield {"text": piece.text, "logprobs": self._logprobs(piece.entries)}

    def _logprobs(self, entries: list[Entry]) -> dict[str, Any] | None:
        return None if self.body.logprobs is None else completion_logprobs(entries, self.tokens)
