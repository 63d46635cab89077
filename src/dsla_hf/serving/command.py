"""What `dsla serve` does: load, serve, and end without losing a request."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from ..core.interrupts import on_interrupt
from ..inference.recorder import CudaRecording
from ..levels.policies import Load, Policy, as_policy
from ..models.architectures import convertible_layers, kv_heads_of
from ..models.configuration import resolve_level
from ..models.loading import (
    device,
    level_to_run_at,
    load_adapter,
    load_config,
    load_model,
    load_tokenizer,
    read_adapter_config,
)
from .engine.engine import Engine, EngineOptions
from .engine.levels import check_served
from .engine.plan import OneProcess
from .engine.request import Event
from .http.api import ApiOptions, build_app
from .http.connections import limited_protocol, most_connections
from .http.traces import exporter_names, provider_from_environment
from .output import lossy_output
from .shared import Others, heed_no_signal, processes_asked, shared
from .usage import address_of, how_to_use, what_is_served

logger = logging.getLogger(__name__)

EXIT_CODE = 70  # of a process whose engine cannot go on: an internal error, as sysexits.h has it
LAST_ANSWERS_SECONDS = 5  # for answers that say so, then the process ends
COOL_DOWN = 5.0  # seconds between two changes of the level under "load"


@dataclass(frozen=True)
class ServeOptions:
    """What to serve, and how; sizes are those of `EngineOptions` and `ApiOptions`.

    policy: a name or a level, see `as_policy`; "load" with the thresholds that are given, `step` units (layers, or KV heads) or a share of
        the model's at a time (an eighth if None). max_level: a number, a share such as "50%", or of heads what is kept, "kept:10%".
    draft_level: likewise. kv_gib: GiB for keys and values. graphs: on a CUDA device, replay model calls from CUDA graphs.
    kv_cache_dtype: "auto" or "fp8", see `EngineOptions`.
    snapshot_gib: GiB for snapshots of states, see `EngineOptions.snapshot_bytes`.
    tensor_parallel: processes that the model is cut over, each with a GPU if there are any; None: as many as torchrun has started, or one.
    """

    model: str
    adapter: str | None = None
    policy: str = "load"
    max_level: int | str | None = None
    queue_depth: int | None = None
    waiting_tokens: int | None = None
    first_token_target: float | None = None
    token_target: float | None = None
    cool_down: float | None = None
    step: int | str | None = None
    slots: int = 32
    max_waiting: int = 256
    max_tokens: int | None = None
    max_new_tokens: int = 4096
    chunk: int = 1024
    prompt_share: float = 0.4
    kv_gib: float | None = None
    kv_cache_dtype: str = "auto"
    name: str | None = None
    api_key: str | None = None
    dtype: str = "auto"
    drain_seconds: float = 30.0
    allow_origins: tuple[str, ...] = ()
    tool_format: str = "auto"
    graphs: bool = True
    batch_invariant: bool = False
    prefix_reuse: bool = True
    snapshot_gib: float | None = None
    lower_prefixes: bool = False
    draft_level: int | str | None = None
    draft_lookup: bool = False
    draft_tokens: int | None = None
    draft_rows: int = 4
    step_timeout: float = 120.0
    tensor_parallel: int | None = None


def load_app(options: ServeOptions) -> FastAPI:
    """The application for a checkpoint, with or without adapter, or a hybrid, in this process alone. Errors as those of `load`, and
    ValueError if the environment asks for traces that cannot be had."""
    if processes_asked(options.tensor_parallel) > 1:
        raise ValueError(f"tensor_parallel {options.tensor_parallel} is for `dsla serve`, which starts the processes: leave it out here")
    traces = provider_from_environment()
    engine, tokenizer, api_options = load(options)
    engine.prepare()
    return build_app(engine, tokenizer, api_options, traces)


def load(options: ServeOptions, processes: OneProcess | None = None) -> tuple[Engine, Any, ApiOptions]:
    """Engine, tokenizer and options of the application, before anything is recorded. processes: those that share the model.

    Raises:
        ValueError: if the options contradict each other, or the adapter is not of this model.
        OSError: if a file is missing.
    """
    base_config = load_config(options.model)
    check_served(base_config)
    level_to_run_at(options.model, base_config, options.adapter, None)
    heads = options.adapter is not None and read_adapter_config(options.adapter).conversion_unit == "head"
    policy = policy_of(options, len(convertible_layers(base_config)) * (kv_heads_of(base_config) if heads else 1))
    limit, draft_level = (
        _level_of(options, flag, value, base_config.num_hidden_layers)
        for flag, value in (("--max-level", options.max_level), ("--draft-level", options.draft_level))
    )
    name = options.name or Path(options.model).name
    api_options = ApiOptions(
        name,
        options.api_key,
        max_new_tokens=options.max_new_tokens,
        drain_seconds=options.drain_seconds,
        allow_origins=tuple(options.allow_origins),
        tool_format=options.tool_format,
    )
    tokenizer = load_tokenizer(options.model)
    cut = processes is not None and processes.size > 1
    model = load_model(options.model, options.dtype, cut)
    if options.adapter is not None:
        model = load_adapter(options.model, options.adapter, options.dtype, base=model)
    engine_options = EngineOptions(
        slots=options.slots,
        max_waiting=options.max_waiting,
        max_tokens=options.max_tokens,
        kv_bytes=None if options.kv_gib is None else int(options.kv_gib * 2**30),
        kv_cache_dtype=options.kv_cache_dtype,
        chunk=options.chunk,
        prompt_share=options.prompt_share,
        max_level=limit,
        step_timeout=options.step_timeout,
        batch_invariant=options.batch_invariant,
        prefix_reuse=None if options.prefix_reuse else False,
        snapshot_bytes=None if options.snapshot_gib is None else int(options.snapshot_gib * 2**30),
        lower_prefixes=options.lower_prefixes,
        draft_level=draft_level,
        draft_lookup=options.draft_lookup,
        draft_tokens=options.draft_tokens,
        draft_rows=options.draft_rows,
    )
    if cut and options.graphs and device() == "cuda":
        logger.info("layers of a model that is cut exchange activations: its steps are not recorded as CUDA graphs")
    record = CudaRecording if options.graphs and device() == "cuda" and not cut else None
    return Engine(model.to(device()).eval(), policy, engine_options, record=record, processes=processes), tokenizer, api_options


def _level_of(options: ServeOptions, flag: str, level: int | str | None, layers: int) -> int | None:
    """The level that an option names, of a model of so many layers."""
    if level is None:
        return None
    if options.adapter is None:
        raise ValueError(f"{flag} needs --adapter: {options.model} alone has one level")
    return resolve_level(level, read_adapter_config(options.adapter), layers)


def policy_of(options: ServeOptions, units: int) -> Policy:
    """The policy that the options name, for a model of so many layers, or KV heads where levels count those.

    Raises:
        ValueError: for a name that is none, or thresholds for another policy than "load".
    """
    thresholds: dict[str, Any] = {
        "queue_depth": options.queue_depth,
        "waiting_tokens": options.waiting_tokens,
        "seconds_to_first_token": options.first_token_target,
        "seconds_per_token": options.token_target,
        "cool_down": options.cool_down,
        "step": options.step,
    }
    given = {name: value for name, value in thresholds.items() if value is not None}
    if options.policy == "load":
        # Memory that runs out makes requests wait, so a server heeds it from the start. Few levels, soon: each has recordings of its own.
        defaults = {"free_share": 0.1, "max_level": "100%" if options.max_level is not None else "75%"}
        return Load(**{**defaults, "step": max(units // 8, 1), "cool_down": COOL_DOWN, **given})
    if given:
        raise ValueError(f"{', '.join(given)} shape the policy 'load', not {options.policy!r}: leave them out, or give --policy load")
    return as_policy(options.policy)


class DrainingServer(uvicorn.Server):
    """Answers newcomers with 503 from SIGTERM or SIGINT on, and ends when the running requests are served; at a second signal at once.

    It ends also when the engine cannot go on, after an error that only a new process gets rid of.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, drain_seconds: float, greeting: str = ""):
        super().__init__(config)
        self.engine, self.drain_seconds, self.greeting = engine, drain_seconds, greeting

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self.greeting:
            print(self.greeting, flush=True)

    async def on_tick(self, counter: int) -> bool:
        if self.engine.health.over.is_set():
            self.config.timeout_graceful_shutdown = LAST_ANSWERS_SECONDS
            self.should_exit = True
        return await super().on_tick(counter)

    def handle_exit(self, sig: int, frame: Any) -> None:
        if self.engine.draining:
            super().handle_exit(sig, frame)
            return
        # A thread: a signal handler may not wait, nor take the lock that the code it interrupts may hold.
        threading.Thread(target=self._drain, args=(sig, frame), daemon=True).start()

    def _drain(self, sig: int, frame: Any) -> None:
        self.engine.drain()
        logger.info("no more requests are taken; %d are still served", len(self.engine.scheduler.running))
        deadline = time.monotonic() + self.drain_seconds
        while self.engine.busy and self.engine.watchdog.problem is None and time.monotonic() < deadline:
            time.sleep(0.05)
        super().handle_exit(sig, frame)


def check_address(host: str, port: int) -> None:
    """Raises OSError if nothing can listen there."""
    if port > 65535:  # the resolver would take its last sixteen bits
        raise OSError(f"cannot listen on port {port}: give a --port up to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen on {host}, port {port} ({reason}): give another --port or --host") from None


def _shared(options: ServeOptions) -> AbstractContextManager[tuple[OneProcess, Others | None]]:
    told = json.dumps(asdict(replace(options, api_key=None)))  # a command line can be read by every user
    return shared(options.tensor_parallel, [sys.executable, "-m", "dsla_hf.serving.follower", told])


def follow(options: ServeOptions, processes: OneProcess) -> None:
    """What a process does that shares the model with a first one, until that is done. It heeds no signal. Errors as those of `load`, and
    RuntimeError if the first is gone or a step fails."""
    heed_no_signal()
    engine, _, _ = load(options, processes)
    engine.prepare()
    engine.follow()


def dry_run(options: ServeOptions, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Load as `serve` does, generate a token, and print what would be served. Errors as those of `load_app`.

    Raises:
        OSError: if nothing can listen at that address.
        RuntimeError: if the model cannot generate.
    """
    check_address(host, port)
    if (traces := provider_from_environment()) is not None:
        traces.shutdown()
    with _shared(options) as (processes, _):
        if not processes.first:
            follow(options, processes)
            return
        engine, tokenizer, api_options = load(options, processes)
        ends: list[Event] = []
        engine.submit([0], 1, ends.append)
        while engine.busy:
            engine.step()
        engine.stop()
    if ends[-1].error is not None:
        raise RuntimeError("the model cannot generate a token") from ends[-1].error
    kinds = {"chats": has_template(tokenizer), "key": api_options.api_key is not None}
    print(what_is_served(engine, api_options.name, traces=exporter_names(os.environ), **kinds))
    print(f"\nA token has been generated. Without --dry-run, {address_of(host, port)} would serve this.")


def has_template(tokenizer: Any) -> bool:
    """Whether chats can be made prompts."""
    return getattr(tokenizer, "chat_template", None) is not None


def serve(options: ServeOptions, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Load and serve until a signal comes, also where nothing can be printed or logged any more. Errors as those of `load_app`, and OSError
    if nothing can listen at that address."""
    with lossy_output():
        _serve(options, host, port)


def _serve(options: ServeOptions, host: str, port: int) -> None:
    check_address(host, port)  # before a model is loaded for minutes
    with _shared(options) as (processes, others):
        if not processes.first:
            follow(options, processes)
            return
        traces = provider_from_environment()
        engine, tokenizer, api_options = load(options, processes)
        if others is not None:
            others.watch(engine.abandon)
        run(engine, tokenizer, api_options, host, port, traces)


def run(engine: Engine, tokenizer: Any, options: ApiOptions, host: str, port: int, traces: Any = None) -> None:
    """Prepare an engine and serve it until a signal comes; the process ends with it where only a new one helps. traces: see `build_app`."""
    engine.prepare()
    app = build_app(engine, tokenizer, options, traces)
    key = options.api_key is not None
    greeting = how_to_use(address_of(host, port), options.name, chats=has_template(tokenizer), key=key)
    if host not in ("127.0.0.1", "localhost", "::1") and options.api_key is None:
        logger.warning("serving on %s without an API key: whoever reaches this machine can use the model", host)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="info",
        timeout_graceful_shutdown=int(options.drain_seconds) + 1,
        http=limited_protocol(most_connections()),
        ws="none",  # else who asks for a WebSocket gets no answer
    )
    with on_interrupt(lambda: "the server has stopped, after what was running was served or its time was up"):
        DrainingServer(config, engine, options.drain_seconds, greeting).run()
        if engine.health.fatal:
            # At once: what Python and CUDA do at the end of a process would fail here, or never end.
            os._exit(EXIT_CODE)
