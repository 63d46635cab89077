"""Training text of any size as packed token blocks, through the `datasets` library: tokenised once, kept on disk, read from there.

Sources are local files or datasets of the Hugging Face hub; records are texts or chats. Of a chat, the tokens that the assistant
writes are marked, so that a loss can be taken on those alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .chats import marked_chat
from .data import read_texts

# What `sources` of `token_blocks` may be, for the help of those who read text through it.
SOURCES = (
    "files (.txt with documents separated by NUL, .jsonl, either also as .xz; .json, .parquet, .csv) or names of hub datasets, "
    "'name:configuration'"
)
KINDS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
DOCUMENTS_AT_ONCE = 256  # tokenised together
CACHE_VERSION = 2  # of what `_blocks` makes from the same input


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
    """Documents joined by the end-of-text token and cut into blocks of `length` tokens; a last, shorter one is dropped.

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
    try:
        import datasets
    except ImportError as error:
        raise ImportError("reading training data needs the datasets library: pip install 'dsla-hf[train]'") from error

    sources = tuple(sources)  # a list would be taken for shards, each packed on its own
    for source in sources:
        _check_source(source)
    chats = completion_only and any("messages" in _first_record(source, split, column) for source in sources)
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


def _check_source(source: str) -> None:
    path = Path(source)
    kinds = [*KINDS, ".txt", ".xz"]
    if path.suffix in kinds and not path.is_file():
        raise FileNotFoundError(f"no such file: {source}")
    if path.is_file() and path.suffix not in kinds:
        raise ValueError(f"{source}: expected {', '.join(kinds)}, or the name of a hub dataset")


def _records(source: str, split: str) -> Iterator[dict[str, Any]]:
    """The records of a source, as they come."""
    path = Path(source)
    if not path.is_file():
        import datasets

        name, _, config = source.partition(":")
        yield from datasets.load_dataset(name, config or None, split=split, streaming=True)
    elif path.suffix in (".txt", ".xz") or ".jsonl" in path.suffixes:
        if ".jsonl" in path.suffixes and path.suffix != ".xz":
            with path.open(encoding="utf-8") as file:
                yield from (json.loads(line) for line in file if line.strip())
        else:
            yield from ({"text": text} for text in read_texts(path))
    else:
        import datasets

        yield from datasets.load_dataset(KINDS[path.suffix], data_files=source, split="train", streaming=True)


def _first_record(source: str, split: str, column: str) -> dict[str, Any]:
    """The first record, without its `messages` if it has a text.

    Raises:
        ValueError: if there is none, or it is neither text nor chat.
    """
    record = next(_records(source, split), None)
    if record is None:
        raise ValueError(f"{source} holds no documents")
    if column in record:
        return {column: record[column]}
    if "messages" not in record:
        raise ValueError(
            f"{source}: records have neither {column!r} nor 'messages', only {sorted(record)}: name the column that has the text"
        )
    return record


def _blocks(
    sources: tuple[str, ...], tokenizer: Any, length: int, max_tokens: int | None, split: str, column: str, chats: bool
) -> Iterator[dict[str, list[int]]]:
    """Packed blocks, with the tokens to learn from marked if `chats`."""
    ids: list[int] = []
    learn: list[int] = []
    given = 0
    for batch in _batches((record for source in sources for record in _records(source, split)), DOCUMENTS_AT_ONCE):
        for tokens, marks in _tokenised(batch, tokenizer, column, chats):
            ids += tokens
            learn += marks
            while len(ids) >= length:
                if max_tokens is not None and given + length > max_tokens:
                    return
                yield {"input_ids": ids[:length], **({"loss_mask": learn[:length]} if chats else {})}
                del ids[:length], learn[:length]
                given += length
        if max_tokens is not None and given + length > max_tokens:
            return
    if not given:
        raise ValueError(f"the texts give {len(ids)} tokens, less than one block of {length}: give more text or shorter blocks")


def _tokenised(records: list[dict], tokenizer: Any, column: str, chats: bool) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens of each document with the end-of-text token behind it, and which of them to learn from."""
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    texts = [record[column] for record in records if column in record]
    plain = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else ())
    for record in records:
        if column in record:
            tokens = [*next(plain), *eos]
            yield tokens, [1] * len(tokens)
            continue
        if chats:
            tokens, marks = marked_chat(tokenizer, record["messages"])
        else:
            tokens = tokenizer.apply_chat_template(record["messages"], return_dict=True)["input_ids"]
            marks = [1] * len(tokens)
        yield [*tokens, *eos], [*marks, *[0] * len(eos)]


def _batches(records: Iterator[dict], size: int) -> Iterator[list[dict]]:
    while batch := list(islice(records, size)):
        yield batch


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
