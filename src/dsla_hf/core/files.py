"""Files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FULL_DISK_WORDS = ("os error 28", "No space left on device", "unexpected pos", "PytorchStreamWriter")


def write_whole(file: str | Path, content: str | bytes) -> None:
    """Write a file (text as UTF-8) under a temporary name beside it, then rename it; the folder is made if need be. After an error nothing
    of it is left, and what was there before stays.

    Raises:
        OSError: with the file's name, if it cannot be written.
    """
    file = Path(file)
    partial = file.with_name(f".{file.name}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(partial, file)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(file: str | Path, content: Any, indent: int = 2) -> None:
    """Write a file of JSON, as `write_whole` does."""
    write_whole(file, json.dumps(content, indent=indent) + "\n")


def is_disk_full(error: BaseException) -> bool:
    """Whether something could not be written for want of room. safetensors and torch say so in words only."""
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    return any(words in str(error) for words in FULL_DISK_WORDS)
