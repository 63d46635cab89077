"""Text to packed token blocks, for distillation and evaluation."""

from __future__ import annotations

import json
import lzma
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.progress import bar

MASKS = ("attention_mask", "loss_mask")
LEAST_BEYOND = 0.1  # share of the tokens learnt from that the window must not reach
JUDGED_ROWS = 512  # of a data set, evenly spread
JUDGED_STREAM = 64  # rows of one that streams, the first


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
    with opened(path, "rt", encoding="utf-8") as file, _told_of_other_encodings(path):
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


@contextmanager
def _told_of_other_encodings(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start:,} of a part): convert it, or give another file") from None


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
        for text in bar(texts, desc="tokenizing", unit=" documents", shown=progress):
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


# --- whether data can teach --------------------------------------------------------------------------------------


def check_teaches(data: Any, window_size: int, sink_tokens: int, purpose: str = "to train on") -> None:
    """Refuse data of which the window and the sinks read nearly everything: there the states get no gradient, and layers differ by noise.

    Args:
        data: rows or batches: `input_ids` `[T]` or `[B, T]`, or dicts with them, and with `attention_mask` and `loss_mask` where they
            have them. Of a long data set 512 rows are judged, evenly spread, and of one without a length the first 64: short chats
            may be among longer texts.
        window_size, sink_tokens: of the `DSLAConfig`. Without a window only sequences of one token are refused.
        purpose: what the data is for, in the message.

    Raises:
        ValueError: if fewer than a tenth of the tokens that count lie beyond window and sinks.
    """
    reach = window_size + sink_tokens if window_size else 1
    counted = beyond = longest = 0
    for row in _judged(data):
        entries: Any = row if isinstance(row, Mapping) else {"input_ids": row}
        ids = torch.as_tensor(entries["input_ids"])
        masks = {name: torch.as_tensor(entries[name]).reshape(ids.shape) for name in MASKS if entries.get(name) is not None}
        real = masks.get("attention_mask", torch.ones_like(ids)) != 0
        learnt = real & (masks["loss_mask"] != 0) if "loss_mask" in masks else real
        place = real.cumsum(-1)  # of each token in its text, from 1
        counted += int(learnt.sum())
        beyond += int((learnt & (place > reach)).sum())
        longest = max(longest, int(real.sum(-1).max()))
    if counted and beyond >= LEAST_BEYOND * counted:
        return
    if not counted:
        raise ValueError(f"the data {purpose} has no token that counts: its loss_mask or attention_mask is zero everywhere")
    if not window_size:
        raise ValueError(f"the data {purpose} has sequences of {longest} token, from which no state learns: give longer ones")
    raise ValueError(
        f"the data {purpose} has {100 * beyond / counted:.0f} % of its tokens beyond the window, which reads {reach} tokens (window_size "
        f"{window_size} + sink_tokens {sink_tokens}); the longest sequence has {longest}. Less than {100 * LEAST_BEYOND:.0f} % teaches the "
        f"states nothing: give a length of {4 * reach} or more, or a smaller window_size"
    )


def _judged(data: Any) -> Iterator[Any]:
    """The rows that are looked at."""
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        yield from islice(iter(data), JUDGED_STREAM)
        return
    rows = len(data)
    for place in range(min(rows, JUDGED_ROWS)):
        yield data[place * rows // min(rows, JUDGED_ROWS)]
