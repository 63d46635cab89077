"""Files of results: numbers beside what they were measured with."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .files import write_json

PACKAGES = ("dsla-hf", "torch", "transformers", "peft", "accelerate")


def origin(command: str | None = None, packages: Iterable[str] = PACKAGES, device: str | None = None) -> dict[str, Any]:
    """`command`, `versions` and `device` of a measurement, as `dsla report` shows them.

    Args:
        command: that made it. None: `dsla` with the arguments of this process.
        packages: whose versions are told; None for one that is not installed.
        device: where it ran. None: the GPU's name, or the CPU's kind.
    """
    known = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {
        "command": command or shlex.join(["dsla", *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in packages},
        "device": device or known,
    }


def write_results(path: Path, rows: list[dict[str, Any]], command: str | None = None, **more: Any) -> Path:
    """Write a table of rows as `dsla report` reads it, whole or not at all: `origin`, what else is given, and the rows."""
    write_json(path, {**origin(command), **more, "rows": rows}, indent=1)
    return path


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
