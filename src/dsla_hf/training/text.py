"""Training text as blocks of tokens: read from files or hub datasets, tokenised, and packed, in memory or kept on disk by `datasets`.

Records are texts or chats. Of a chat, the tokens that the assistant writes are marked, so that a loss can be taken on those alone.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.progress import bar
from .chats import marked_chat

# What `sources` of `token_blocks` may be, for the help of those who read text through it.
SOURCES = (
    "files (.txt with documents separated by NUL, .jsonl, either also as .xz; .json, .parquet, .csv) or names of hub datasets, "
    "'name:configuration'"
)
KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
DOCUMENTS_AT_ONCE = 256  # tokenised together
CACHE_VERSION = 2  # of what `_blocks` makes from the same input

Record = tuple[str, dict[str, Any]]  # where it stands, for messages; its fields
Tokens = tuple[list[int], list[int]]  # ids, and of each whether to learn from it (1) or not (0)


# --- reading ----------------------------------------------------------------------------------------------------


def read_texts(path: str | Path) -> Iterator[str]:
    """The documents of a file: `.txt` (separated by a NUL byte, or one), `.jsonl` (field `text`), either also as `.xz`.

    Raises:
        ValueError: for another kind of file, or a line without `text`.
        FileNotFoundError: if there is none.
    """
    for where, record in _file_records(Path(path)):
        if "text" not in record:
            raise ValueError(f"{where}: no field 'text', only {sorted(record)}")
        yield record["text"]


def _file_records(path: Path) -> Iterator[Record]:
    """Of a .txt or .jsonl file, read without `datasets`."""
    opened = lzma.open if path.suffix == ".xz" else open
    kind = Path(path.stem).suffix if path.suffix == ".xz" else path.suffix
    if kind not in (".txt", ".jsonl"):
        raise ValueError(f"{path}: expected .txt or .jsonl (also .xz), got {''.join(path.suffixes) or 'no suffix'}")
    with opened(path, "rt", encoding="utf-8") as file, _told_of_other_encodings(path):
        if kind == ".txt":
            yield from ((str(path), {"text": text}) for text in file.read().split("\0") if text.strip())
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{where}: no JSON ({error})") from None
            if not isinstance(record, dict):
                raise ValueError(f"{where}: expected an object with a field 'text', got {type(record).__name__}")
            yield where, record


@contextmanager
def _told_of_other_encodings(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start:,} of a part): convert it, or give another file") from None


def _records(source: str, split: str) -> Iterator[Record]:
    """The records of a file or a hub dataset, as they come."""
    path = Path(source)
    if path.is_file() and path.suffix in (".txt", ".jsonl", ".xz"):
        yield from _file_records(path)
        return
    if path.is_file():
        records = _datasets().load_dataset(KINDS[path.suffix], data_files=source, split="train", streaming=True)
    else:
        name, _, config = source.partition(":")
        records = _datasets().load_dataset(name, config or None, split=split, streaming=True)
    yield from ((source, record) for record in records)


def _datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("this training data needs the datasets library: pip install 'dsla-hf[train]'") from error
    return datasets


def holds_chats(sources: Iterable[str], *, split: str = "train", column: str = "text") -> bool:
    """Whether the first record of a source is a chat; sources, split and column as in `token_blocks`.

    Raises:
        ValueError: if a source is of an unknown kind, has no records, or its first is neither text nor chat.
        FileNotFoundError: if a file is missing.
    """
    chats = False
    kinds = [*KINDS, ".txt", ".xz"]
    for source in sources:
        path = Path(source)
        if path.suffix in kinds and not path.is_file():
            raise FileNotFoundError(f"no such file: {source}")
        if path.is_file() and path.suffix not in kinds:
            raise ValueError(f"{source}: expected {', '.join(kinds)}, or the name of a hub dataset")
        first = next(_records(source, split), None)
        if first is None:
            raise ValueError(f"{source} holds no documents")
        chats |= not _is_text(first, column)
    return chats


def _is_text(found: Record, column: str) -> bool:
    """Whether a record is a text; else it is a chat."""
    where, record = found
    if column not in record and "messages" not in record:
        raise ValueError(
            f"{where}: records have neither {column!r} nor 'messages', only {sorted(record)}: name the column that has the text"
        )
    return column in record


# --- tokenising and packing -------------------------------------------------------------------------------------


def _tokenised(records: Iterable[Record], tokenizer: Any, column: str, chats: bool, at_once: int) -> Iterator[Tokens]:
    """Each document with the end-of-text token behind it; `at_once` of them are read before the first is given."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    records = iter(records)
    while batch := list(islice(records, at_once)):
        texts = [found[1][column] for found in batch if _is_text(found, column)]
        plain = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
        for _, record in batch:
            if column in record:
                ids = [*next(plain), *eos]
                yield ids, [1] * len(ids)
            elif chats:
                ids, learnt = marked_chat(tokenizer, record["messages"])
                yield [*ids, *eos], [*learnt, *[0] * len(eos)]
            else:
                ids = tokenizer.apply_chat_template(record["messages"], return_dict=True)["input_ids"]
                yield [*ids, *eos], [1] * (len(ids) + len(eos))


def _packed(documents: Iterable[Tokens], length: int, max_tokens: int | None) -> Iterator[Tokens]:
    """Documents joined and cut into blocks of `length`; a last, shorter one is dropped, and no more is read than `max_tokens` needs.

    Raises:
        ValueError: if there is less than one block.
    """
    ids: list[int] = []
    learnt: list[int] = []
    given, room = False, math.inf if max_tokens is None else max_tokens
    for more_ids, more_learnt in documents:
        ids += more_ids
        learnt += more_learnt
        end = int(min(len(ids), room)) // length * length
        for begin in range(0, end, length):
            yield ids[begin : begin + length], learnt[begin : begin + length]
        del ids[:end], learnt[:end]
        given, room = given or end > 0, room - end
        if room < length:
            break
    if not given:
        there = int(min(len(ids), room))
        raise ValueError(f"the texts give {there} tokens, less than one block of {length}: give more text or shorter blocks (--length)")


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
        records = (("texts", {"text": text}) for text in bar(texts, desc="tokenizing", unit=" documents", shown=progress))
        documents = _tokenised(records, tokenizer, "text", chats=False, at_once=1)
        return cls(torch.stack([torch.tensor(ids) for ids, _ in _packed(documents, length, max_tokens)]))

    @classmethod
    def from_sources(cls, sources: Iterable[str], tokenizer: Any, length: int, max_tokens: int | None = None) -> PackedTokens:
        """Read, tokenise and pack what `token_blocks` reads, all tokens of chats too; without `datasets` for .txt and .jsonl files.

        Raises:
            as `token_blocks`.
        """
        sources = tuple(sources)
        holds_chats(sources)
        rows = _blocks(sources, tokenizer, length, max_tokens, "train", "text", chats=False)
        return cls(torch.stack([torch.tensor(row["input_ids"]) for row in rows]))

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.blocks[index].long()}


# --- kept on disk -----------------------------------------------------------------------------------------------


def token_blocks(
    sources: Iterable[str],
    tokenizer: Any,
    length: int,
    *,
    max_tokens: int | None = None,
    split: str = "train",
    column: str = "text",
    completion_only: bool = True,
    streaming: bool = False,
) -> Any:
    """Documents joined by the end-of-text token and cut into blocks of `length` tokens; a last, shorter one is dropped. Tokenised once,
    kept on disk by `datasets`, and read from there.

    Args:
        sources: local files (`.txt` with documents separated by NUL, also `.xz`; `.jsonl`, `.json`, `.parquet`, `.csv`), or names of hub
            datasets, with a configuration behind a colon: `"wikitext:wikitext-103-raw-v1"`.
        tokenizer: of transformers; its chat template is used for chats.
        max_tokens: stop reading when there are so many.
        split: of hub datasets.
        column: with the text. Records without it that have `messages` are chats.
        completion_only: of chats, mark what the assistant writes as `loss_mask`; see `chats.marked_chat`.
        streaming: an `IterableDataset` that tokenises while it is read, with nothing kept on disk.

    Returns:
        a `datasets.Dataset` in torch format: `input_ids` int64 `[length]`, and `loss_mask` int64 `[length]` for chats.

    Raises:
        ValueError: if there is less than one block, a record has neither text nor messages, or a chat template does not tell what the
            assistant writes.
        FileNotFoundError: if a file is missing.
        ImportError: without the `datasets` library.
    """
    datasets = _datasets()
    sources = tuple(sources)  # a list would be taken for shards, each packed on its own
    chats = holds_chats(sources, split=split, column=column) and completion_only
    options = {
        "sources": sources,
        "tokenizer": tokenizer,
        "length": length,
        "max_tokens": max_tokens,
        "split": split,
        "column": column,
        "chats": chats,
    }
    ids = datasets.List(datasets.Value("int64"), length=length)
    features = datasets.Features({"input_ids": ids, "loss_mask": ids} if chats else {"input_ids": ids})
    if streaming:
        return datasets.IterableDataset.from_generator(_blocks, gen_kwargs=options, features=features).with_format("torch")
    try:
        made = datasets.Dataset.from_generator(_blocks, gen_kwargs=options, features=features, fingerprint=_fingerprint(options))
    except datasets.exceptions.DatasetGenerationError as error:
        # Also a full disk or a missing file, which the library's own words hide.
        raise (error.__cause__ if isinstance(error.__cause__, ValueError | OSError) else error) from None
    return made.with_format("torch")


def _blocks(
    sources: tuple[str, ...], tokenizer: Any, length: int, max_tokens: int | None, split: str, column: str, chats: bool
) -> Iterator[dict[str, list[int]]]:
    """Packed blocks, with the tokens to learn from marked if `chats`."""
    records = (record for source in sources for record in _records(source, split))
    documents = _tokenised(records, tokenizer, column, chats, DOCUMENTS_AT_ONCE)
    for ids, learnt in _packed(documents, length, max_tokens):
        yield {"input_ids": ids, "loss_mask": learnt} if chats else {"input_ids": ids}


def _fingerprint(options: dict[str, Any]) -> str:
    """Changes when anything does that decides the blocks: files by size and time, the tokenizer by its content."""

    def state(source: str) -> Any:
        path = Path(source)
        return [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] if path.is_file() else source

    tokenizer = options["tokenizer"]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = [
        CACHE_VERSION,
        [state(source) for source in options["sources"]],
        backend.to_str() if backend is not None else [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())],
        [tokenizer.eos_token_id, tokenizer.chat_template],
        [options[name] for name in ("length", "max_tokens", "split", "column", "chats")],
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]
