"""What single tokens stand for, as bytes: pieces of characters among them, which no decoder shows."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerFast

BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")  # as SentencePiece writes a byte
SPACE = "\u2581"  # and a space


def _byte_level() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as: those that can be seen are themselves, others come from 256 on."""
    seen = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {**{chr(byte): byte for byte in seen}, **{chr(256 + number): byte for number, byte in enumerate(hidden)}}


BYTE_LEVEL = _byte_level()


class TokenBytes:
    """Of a tokenizer's tokens."""

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self._known: dict[int, bytes] = {}

    @cached_property
    def added(self) -> dict[int, Any]:
        """Tokens beside the vocabulary proper, by id."""
        return dict(getattr(self.tokenizer, "added_tokens_decoder", {}))

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that are no text."""
        ids = {token for token, content in self.added.items() if getattr(content, "special", False)}
        return frozenset(ids | set(getattr(self.tokenizer, "all_special_ids", ())))

    def of(self, token: int) -> bytes:
        found = self._known.get(token)
        if found is None:
            found = self._known[token] = self._read(token)
        return found

    def text(self, token: int) -> str:
        """As the interface shows it: a piece of a character is `bytes:` and what they are."""
        found = self.of(token)
        try:
            return found.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def decoder(self, shown: Collection[str]) -> Callable[[list[int]], str] | None:
        """From token ids to text with these special tokens, and without the others; None if the vocabulary has none of them."""
        kept = {token for token in self.special if str(self.added.get(token)) in shown}
        if not kept:
            return None
        hidden = self.special - kept

        def decode(tokens: list[int]) -> str:
            visible = [token for token in tokens if token not in hidden]
            return self.tokenizer.decode(visible, skip_special_tokens=False, clean_up_tokenization_spaces=False)

        return decode

    def offsets(self, tokens: list[int], text: str) -> list[int]:
        """Where in `text`, their text, tokens begin, in characters. Special tokens have no length."""
        decoder, at, offsets = codecs.getincrementaldecoder("utf-8")("replace"), 0, []
        plain = [b"" if token in self.special else self.of(token) for token in tokens]
        # Tokenizers with a space in front of every word leave it out of a text's first.
        early = int(b"".join(plain[:2]).startswith(b" ") and not text.startswith(" "))
        for found in plain:
            offsets.append(min(max(at - early, 0), len(text)))
            at += len(decoder.decode(found))
        return offsets

    @cached_property
    def _is_byte_level(self) -> bool:
        if not isinstance(self.tokenizer, PreTrainedTokenizerFast):
            return False
        return "ByteLevel" in json.dumps(json.loads(self.tokenizer.backend_tokenizer.to_str()).get("decoder"))

    def _read(self, token: int) -> bytes:
        if token in self.added:
            return str(self.added[token]).encode()
        piece = self.tokenizer.convert_ids_to_tokens(token)
        if not isinstance(piece, str):  # of no word: models have more rows than tokenizers have tokens
            return b""
        if self._is_byte_level:
            return bytes(BYTE_LEVEL[char] for char in piece) if all(char in BYTE_LEVEL for char in piece) else piece.encode()
        if byte := BYTE.fullmatch(piece):
            return bytes([int(byte[1], 16)])
        return piece.replace(SPACE, " ").encode()
