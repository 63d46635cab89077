"""Text to packed token blocks, for distillation and evaluation."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm


def read_texts(path: str | Path) -> Iterator[str]:
    """The documents of a file: `.txt` (separated by a NUL byte, or one), `.jsonl` (field `text`), either also as `.xz`.

    Raises:
        ValueError: for another kind of file, or a line without `text`.
        FileNotFoundError: if there is none.
    """
    path = Path(path)
    opened = lzma.open if path.suffix == ".xz" else open
    kind = Path(path.stem).suffix if path.suffix == ".xz" else path.suffix
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: expected .txt or .jsonl (also .xz), got {''.join(path.suffixes) or 'no suffix'}")
    with opened(path, "rt", encoding="utf-8") as file:
        if kind == ".txt":
            yield from (text for text in file.read().split("\0") if text.strip())
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: no JSON ({error})") from None
            if not isinstance(record, dict) or "text" not in record:
                found = sorted(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{path}, line {number}: no field 'text', only {found}")
            yield record["text"]


class PackedTokens(torch.utils.data.Dataset):
    """Blocks of `length` tokens cut from documents joined by the end-of-text token; the last, shorter one is dropped."""

    def __init__(self, blocks: Tensor):
        self.blocks = blocks

    @classmethod
    def from_texts(
        cls, texts: Iterable[str], tokenizer: Any, length: int, max_tokens: int | None = None, progress: bool = True
    ) -> PackedTokens:
        """Tokenise and pack.

        Raises:
            ValueError: if the texts give less than one block.
        """
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        tokens: list[int] = []
        for text in tqdm(texts, desc="tokenizing", unit=" documents", disable=not progress):
            tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] + eos
            if max_tokens is not None and len(tokens) >= max_tokens:
                del tokens[max_tokens:]
                break
        if len(tokens) < length:
            raise ValueError(f"the texts give {len(tokens)} tokens, less than one block of {length}: give more text or shorter blocks")
        blocks = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)
        return cls(blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index].long()}
