"""`dsla env`."""

from __future__ import annotations

import argparse
from typing import Any

from ..options import add_command

GOES_ON = False


def add_to(commands: Any, name: str) -> None:
    add_command(commands, name, "versions, device, and which kernels run", "What a bug report needs: versions, device, kernels.")


def run(args: argparse.Namespace) -> None:
    from dsla_hf.cli.env import environment

    print(environment())


def kept(args: argparse.Namespace) -> str:
    return "nothing was printed"
