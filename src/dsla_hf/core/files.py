"""Files and folders that are whole or as they were, and how a full disk is told."""

from __future__ import annotations

import errno
import json
import os
import re
import tempfile
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


class written_whole:
    """A temporary directory whose files are renamed into `directory` at the end, or dropped after an error.

    Files of `directory` whose whole name matches `replaced` and that are not written anew are removed: an earlier save may have
    cut the weights into other files, which would be loaded first. Without it nothing is removed.

    Raises:
        OSError: on leaving, with the directory, where the disk is full.
    """

    def __init__(self, directory: Path, replaced: re.Pattern[str] | None = None):
        self.directory, self.replaced = directory, replaced

    def __enter__(self) -> Path:
        if self.directory.is_file():
            raise ValueError(f"{self.directory} is a file: give a directory to save into")
        self._made = not self.directory.exists()
        self.directory.mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(dir=self.directory, prefix=".saving-")
        return Path(self._temporary.name)

    def __exit__(self, kind: Any, error: BaseException | None, *_: Any) -> None:
        try:
            self._move(error)
        finally:
            if self._made and not any(self.directory.iterdir()):
                self.directory.rmdir()
        if error is not None and is_disk_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.directory)) from error

    def _move(self, error: BaseException | None) -> None:
        with self._temporary as name:
            if error is not None:
                return
            source = Path(name)
            # Weights first, configuration last: a directory with a configuration has its weights.
            files = sorted((f for f in source.rglob("*") if f.is_file()), key=lambda f: f.suffix == ".json")
            targets = [self.directory / file.relative_to(source) for file in files]
            for file, target in zip(files, targets, strict=True):
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(file, target)
            for file in {*self.directory.iterdir()} - {*targets}:
                if self.replaced is not None and self.replaced.fullmatch(file.name):
                    file.unlink()


def is_disk_full(error: BaseException) -> bool:
    """Whether something could not be written for want of room. safetensors and torch say so in words only."""
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    return any(words in str(error) for words in FULL_DISK_WORDS)
