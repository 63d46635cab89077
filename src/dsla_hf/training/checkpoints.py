"""Checkpoints of a distillation: which are whole, what is kept of a run, and full disks told."""

from __future__ import annotations

import errno
import json
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError, safe_open

from ..core.files import is_disk_full
from .arguments import STAGES

SETTINGS_FILE = "stage.json"


def saved_stage(directory: Path, model: PeftModel) -> Path:
    """Where PEFT saves the active adapter in `directory`."""
    adapter: Any = model.active_adapter
    return directory if adapter == "default" else directory / adapter


def stage_folders(output: Path) -> list[Path]:
    """Where the stages of a run in `output` are, or would be, with those of the links of a chain."""
    return [path for stage in STAGES for path in (output / stage, *sorted(output.glob(f"{stage}/level_*")))]


def progress_so_far(output: Path) -> str:
    """What of a distillation lies in `output`, in words: 'alignment is finished; the last checkpoint is step 200 of 340 of logits (DIR)';
    nothing if there is nothing to go on from."""
    finished, last = [], ""
    for folder in stage_folders(output):
        name = str(folder.relative_to(output))
        if (folder / "adapter_config.json").exists():
            finished.append(name)
        elif (checkpoint := last_whole_checkpoint(folder)) is not None:
            last = f"the last checkpoint is step {step_of(checkpoint)}{_of_all(folder)} of {name} ({checkpoint})"
    parts = [f"{', '.join(finished)} {'is' if len(finished) == 1 else 'are'} finished"] if finished else []
    return "; ".join([*parts, last] if last else parts)


def step_of(checkpoint: Path) -> str:
    return checkpoint.name.partition("-")[2]


def _of_all(folder: Path) -> str:
    settings = folder / SETTINGS_FILE
    return f" of {json.loads(settings.read_text())['max_steps']}" if settings.exists() else ""


def what_is_kept(directory: Path) -> str:
    """Of a run, or of one stage, in words."""
    if so_far := progress_so_far(directory):
        return f"Kept: {so_far}"
    checkpoint = last_whole_checkpoint(directory)
    return "No checkpoint has been written yet" if checkpoint is None else f"The last whole checkpoint is {checkpoint}"


def last_whole_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that is whole: a full disk or a kill leaves others."""
    return next((path for path in reversed(checkpoints(directory)) if is_whole(path)), None)


def checkpoints(directory: Path) -> list[Path]:
    """All checkpoints, the newest last."""
    return sorted((path for path in directory.glob("checkpoint-*") if step_of(path).isdigit()), key=lambda path: int(step_of(path)))


def is_whole(checkpoint: Path) -> bool:
    """Whether the Trainer's state, written last, can be read, and each file of tensors is as long as it says."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        for file in checkpoint.rglob("*.safetensors"):
            with safe_open(file, "pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(file) for file in checkpoint.glob("*.pt"))


class FullDisk(OSError):
    """The disk takes no more; says where, what is kept, and what to do."""


@contextmanager
def told_of_full_disk(directory: Path) -> Iterator[None]:
    """Within it the many errors that a full disk gives are one.

    Raises:
        FullDisk: with the folder, what is kept there, and what to do.
    """
    try:
        yield
    except FullDisk:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        number = error.errno if isinstance(error, OSError) else errno.ENOSPC
        where = getattr(error, "filename", None) or directory
        raise FullDisk(
            number,
            f"{os.strerror(number or errno.ENOSPC)} while writing to {where}. {what_is_kept(directory)}; make room and give the same "
            "command again",
        ) from error
