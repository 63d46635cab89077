"""A server whose model is cut over several processes of this machine: how they start, meet and end.

They are started by `dsla serve --tensor-parallel`, or by torchrun.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import distributed

from .engine.plan import OneProcess, SharedProcesses

HOST = "127.0.0.1"
LOOK_SECONDS = 0.5
END_SECONDS = 20.0  # for the others, when the first has ended
NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by which torch.distributed finds the others


def processes_asked(asked: int | None) -> int:
    """How many processes share the model: what was asked for, or those that torchrun has started.

    Raises:
        ValueError: if these differ.
    """
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if asked is not None and asked < 1:
        raise ValueError(f"tensor_parallel must be 1 or more processes, got {asked}")
    if started > 1 and asked not in (None, started):
        raise ValueError(f"tensor_parallel {asked} and the {started} processes that torchrun has started: leave one of them out")
    return started if asked is None else asked


@contextmanager
def shared(asked: int | None, command: list[str]) -> Iterator[tuple[OneProcess, Others | None]]:
    """The processes that share the model of this server, this one among them, and those that were started for it, by `command`, if nobody
    else had. They end with it.

    Raises:
        ValueError: as `processes_asked`, or if there are fewer GPUs.
    """
    count = processes_asked(asked)
    if count == 1:
        yield OneProcess(), None
        return
    if torch.cuda.is_available() and torch.cuda.device_count() < count:
        raise ValueError(f"tensor_parallel {count} needs as many GPUs, and there are {torch.cuda.device_count()}: give fewer processes")
    others = Others(command, count) if "WORLD_SIZE" not in os.environ else None
    try:
        yield join(), others
        if others is not None:
            others.end(END_SECONDS)
    finally:
        if others is not None:
            others.end(0.0)
        if distributed.is_initialized():
            distributed.destroy_process_group()


def join() -> SharedProcesses:
    """Meet the other processes, on a GPU of one's own if there are any."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if not distributed.is_initialized():
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    return SharedProcesses()


class Others:
    """The processes beside the first, which this one is made by what it sets in its environment."""

    def __init__(self, command: list[str], count: int):
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            port = probe.getsockname()[1]
        meeting = {"WORLD_SIZE": str(count), "MASTER_ADDR": HOST, "MASTER_PORT": str(port)}
        self._ending = threading.Event()
        self._before = {name: os.environ.get(name) for name in NAMES}
        self._processes = [
            subprocess.Popen(
                command,
                env={**os.environ, **meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.DEVNULL,
            )
            for rank in range(1, count)
        ]
        os.environ.update(meeting, RANK="0", LOCAL_RANK="0")

    def watch(self, gone: Callable[[Exception], None]) -> None:
        """Have `gone` called with why, from a thread, if one of them ends by itself."""

        def look() -> None:
            while not self._ending.wait(LOOK_SECONDS):
                for rank, process in enumerate(self._processes, 1):
                    if (code := process.poll()) is not None and not self._ending.is_set():
                        gone(RuntimeError(f"process {rank} of {len(self._processes) + 1} ended with {code}"))
                        return

        threading.Thread(target=look, name="dsla-others", daemon=True).start()

    def end(self, seconds: float) -> None:
        """Wait as long for them, which end when the first says so; then they are killed."""
        self._ending.set()
        for process in self._processes:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def heed_no_signal() -> None:
    """The first process serves what runs, and then says that it is over."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
