"""Text from tokens as they come: whole characters only, and nothing after a stop string."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerFast

UNFINISHED = "\ufffd"  # what a decoder shows of a character whose bytes are not all there


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """From token ids to text, without special tokens. A server decodes twice for every token of every text, and around the decoder of a
    fast tokenizer transformers takes many times as long as in it."""
    if isinstance(tokenizer, PreTrainedTokenizerFast) and type(tokenizer).decode is PreTrainedTokenizerFast.decode:
        return tokenizer.backend_tokenizer.decode  # skips special tokens unless told
    return lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class TextStream:
    """Turns the tokens of one text into pieces whose join is the decoded text, up to the first stop string.

    Args:
        decode: from token ids to text; None: the tokenizer's, without special tokens.

    Attributes:
        stopped: whether a stop string was found; what comes after it, and itself, is left out.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = (), decode: Callable[[list[int]], str] | None = None):
        self.stop, self.stopped = stop, False
        self._decode = decode or decoder(tokenizer)
        self._beginnings = frozenset(string[:n] for string in stop for n in range(1, len(string)))
        self._tokens: list[int] = []
        self._start = self._shown = 0  # tokens from `_start` are decoded; those before `_shown` are in the text already
        self._held = ""  # may be the beginning of a stop string

    @property
    def held(self) -> str:
        """Text that may be the beginning of a stop string, and so has not come."""
        return self._held

    def add(self, token: int) -> str:
        """The text that is certain now, often empty."""
        self._tokens.append(token)
        return self._release(self._decoded(last=False))

    def end(self) -> str:
        """What is left when no more tokens come."""
        piece = self._release(self._decoded(last=True))
        held, self._held = self._held, ""
        return piece if self.stopped else piece + held

    def _decoded(self, last: bool) -> str:
        # A few tokens before the new ones are decoded with them: some tokenizers drop a space in front of the first.
        before = self._decode(self._tokens[self._start : self._shown])
        now = self._decode(self._tokens[self._start :])
        if not last and (now.endswith(UNFINISHED) or len(now) <= len(before)):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def _release(self, piece: str) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(string) for string in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        longest = max((len(string) for string in self.stop), default=1) - 1
        keep = next((n for n in range(min(longest, len(text)), 0, -1) if text[-n:] in self._beginnings), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]
