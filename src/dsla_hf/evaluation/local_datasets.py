"""Data sets of the hub read from a folder instead: for machines without the hub, and for data of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


@contextmanager
def local_datasets(folder: str | None) -> Iterator[None]:
    """While it is open, `datasets.load_dataset("OWNER/NAME", "CONFIG")` reads FOLDER/OWNER/NAME where that is a folder.

    It holds what the hub has, as `hf download --repo-type dataset OWNER/NAME --local-dir FOLDER/OWNER/NAME` writes it; or, without a
    README.md, files named after their splits (test.jsonl, train.parquet), those of a configuration in FOLDER/OWNER/NAME/CONFIG.
    """
    if folder is None:
        yield
        return
    import datasets

    load = datasets.load_dataset

    def load_local(path: str, name: str | None = None, **options: Any) -> Any:
        place = Path(folder) / path
        if not path or not place.is_dir():
            return load(path, name, **options)
        options.pop("revision", None)  # of the hub
        if not (place / "README.md").exists():
            splits = _splits(place / name if name is not None and (place / name).is_dir() else place)
            if splits:
                return load(
                    BUILDERS[next(iter(splits.values())).suffix], data_files={k: str(file) for k, file in splits.items()}, **options
                )
        return load(str(place), name, **options)

    datasets.load_dataset = load_local
    try:
        yield
    finally:
        datasets.load_dataset = load


def _splits(folder: Path) -> dict[str, Path]:
    """The files of a folder by split, all of the kind of the first."""
    files = sorted(file for file in folder.iterdir() if file.suffix in BUILDERS)
    return {file.stem: file for file in files if file.suffix == files[0].suffix}
