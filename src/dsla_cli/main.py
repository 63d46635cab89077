"""From arguments to a command, and from what goes wrong to one line and an exit status.

Exit statuses: 0; 1 for an error that a user can mend, told in one line; 2 for arguments that cannot be read; 130 after Ctrl-C and 143 after
SIGTERM, with one line of what is kept.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from types import ModuleType
from typing import Any

from .commands import COMMANDS, distill
from .quiet import quiet_libraries

EPILOG = """\
A base checkpoint becomes a hybrid in these steps; `dsla COMMAND --help` tells more about each:

  dsla distill  --model BASE --data TEXT.txt --output_dir ADAPTER   train DSLA weights for its heads
  dsla generate --model BASE --adapter ADAPTER --level 50% --prompt "Once upon a time"
  dsla merge    --model BASE --adapter ADAPTER --level 50% --output HYBRID
  dsla generate --model HYBRID --prompt "Once upon a time"
"""


class Terminated(KeyboardInterrupt):
    """SIGTERM, on its way out as Ctrl-C is."""


def main(arguments: list[str] | None = None) -> int:
    """Run `dsla` with these arguments (default: those of the process); returns the exit status.

    Raises:
        SystemExit: after help, `--version`, or arguments that cannot be read.
    """
    arguments = sys.argv[1:] if arguments is None else [str(argument) for argument in arguments]
    if not arguments:
        build_parser().print_help()
        return 0
    # `distill` has the options of transformers' TrainingArguments, which its own parser knows; it imports torch.
    if arguments[0] == distill.NAME:
        command: ModuleType = distill
        args = argparse.Namespace(command=distill.NAME, arguments=arguments[1:])
    else:
        args = build_parser().parse_args(arguments)
        command = COMMANDS[args.command]
    try:
        with _sigterm_as_interrupt():
            quiet_libraries()
            # Before torch is there: threads that spin while they wait starve each other where cores are busy, and steps take five times as
            # long.
            os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
            command.run(args)
    except KeyboardInterrupt as interrupt:
        with _deaf():
            said = str(interrupt.args[0]) if interrupt.args else command.kept(args)
            again = f"; to go on: {shlex.join(['dsla', *arguments])}" if command.GOES_ON else ""
            if said:  # of several processes only the first one has words
                print(f"\ndsla {args.command}: interrupted; {said}{again}", file=sys.stderr)
        return 128 + (signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT)
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor does Python, at its end, write what is left
        return 128 + signal.SIGPIPE
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)) and not _is_disk_full(error):
            raise
        print(f"dsla {args.command}: {' '.join(_words(error).split())}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands but `distill`, which is listed."""
    parser = argparse.ArgumentParser(
        prog="dsla",
        description="Turn a pretrained transformer into a fast hybrid, head by head or layer by layer.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dsla {version('dsla-hf')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        command.add_to(commands, name)
    return parser


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Within it SIGTERM ends a command as Ctrl-C does. Only a process's main thread can have it so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _deaf() -> Iterator[None]:
    """Within it a second Ctrl-C does not cut the last words off."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _words(error: BaseException) -> str:
    """What an error says, with the path that the operating system named."""
    if _is_disk_full(error):
        path = getattr(error, "filename", None)
        return f"the disk is full ({path or error}): make room and give the same command again"
    if isinstance(error, OSError) and error.strerror:  # without its number
        return error.strerror + (f": {error.filename}" if error.filename else "")
    return str(error) or type(error).__name__


def _is_disk_full(error: BaseException) -> bool:
    """Whether it is an error of a full disk that has no better words of its own."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC and error.strerror == os.strerror(errno.ENOSPC)
    files = sys.modules.get("dsla_hf.core.files")  # what writes otherwise, safetensors and torch, comes with it
    return files is not None and files.is_disk_full(error)
