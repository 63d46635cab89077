"""A server as a process: started with its output in a log, awaited, and ended."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from tqdm import tqdm

LOOK_SECONDS = 0.5
END_SECONDS = 30.0  # for a server that was asked to end
TOLD_LINES = 15  # of the log, where a server does not come up


class NotServing(RuntimeError):
    """A server did not come up."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server_process(command: list[str], url: str, log: Path, seconds: float, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Start a command, wait until its /health answers 200, and end it and its children on leaving.

    Args:
        url: where it serves, without /v1. log: file to which its output is added. seconds: that it may take to come up.
        environment: beside that of this process.

    Raises:
        NotServing: if it ends, or is not there in time; with the end of its log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "ab") as written:
        written.write(f"--- {' '.join(command)}\n".encode())
        written.flush()
        process = subprocess.Popen(
            command,
            stdout=written,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        _wait(process, url, log, seconds)
        yield
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float) -> None:
    begin = time.monotonic()
    with tqdm(desc=f"{log.stem} starts", bar_format="{desc}, {elapsed}", disable=None, leave=False) as bar:
        while True:
            if (code := process.poll()) is not None:
                raise NotServing(f"the server ended with {code} before it served; the end of {log.name}:\n{_end_of(log)}")
            if time.monotonic() - begin > seconds:
                raise NotServing(f"the server was not ready after {seconds:.0f} s; the end of {log.name}:\n{_end_of(log)}")
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # it does not listen yet
            bar.update(0)
            time.sleep(LOOK_SECONDS)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process, asked first, and whatever it has started: a GPU must be free for the next."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):  # it is killed below
            process.wait(END_SECONDS)
    with suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_of(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TOLD_LINES:])
