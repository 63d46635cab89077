"""Beyond one machine: the server as a Ray Serve application, one engine a replica. Routing and autoscaling are Ray's.

serve run dsla_hf.serving.ray_app:build model=BASE adapter=ADAPTER max_level=50% replicas=2 routing=session

What was read of a text lies in the replica that read it. With `routing=session` requests with the same header `x-session-id` go to the
same one.
"""

from __future__ import annotations

import importlib.util
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import RequestRouterConfig

from .command import ServeOptions, load_app
from .engine.engine import Engine

# By the name of the argument `routing`; None: Ray's own, the shorter of two queues.
ROUTERS = {"load": None, "session": "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"}
_engines: list[Engine] = []  # of this process, which is one replica


class Replica:
    """What Ray asks a replica beside its routes."""

    def check_health(self) -> None:
        """Raises RuntimeError when only a new process can serve, or a step hangs: Ray then starts another replica."""
        for engine in _engines:
            if engine.health.fatal or engine.watchdog.problem is not None:
                raise RuntimeError(engine.watchdog.problem or engine.problem)


def build(args: dict[str, Any]) -> serve.Application:
    """A Ray Serve application builder.

    Args:
        args: `ServeOptions` by name; besides `replicas` (1; "auto" for Ray's autoscaling), `gpus` (of a replica: 1 if there is a GPU, a
            part of one to share it), `cpus` (1) and `routing`: "load" (to the replica with fewer requests, of two), or "session" (by the
            header `x-session-id`, those without one evenly; the next replica takes over where one is full or gone).

    Raises:
        ValueError: for an argument that there is not, or a routing that this release of Ray has not.
    """
    args = dict(args)
    replicas = args.pop("replicas", 1)
    actor = {"num_cpus": float(args.pop("cpus", 1)), "num_gpus": float(args.pop("gpus", _gpus()))}
    routing = args.pop("routing", "load")
    known = ServeOptions.__dataclass_fields__
    if unknown := sorted(set(args) - set(known)):
        raise ValueError(f"there are no arguments {unknown}; known are replicas, gpus, cpus, routing and {sorted(known)}")
    if "model" not in args:
        raise ValueError("an argument is missing: model=BASE")
    router = _router(routing)
    options = ServeOptions(**{name: _read(str(known[name].type), value) for name, value in args.items()})
    # Ray's own limit on requests of a replica is far above the engine's queue, which answers 503.
    limit = 2 * (options.slots + options.max_waiting)
    deployment: Any = serve.deployment(serve.ingress(lambda: _app(options))(Replica))  # the model is loaded in each replica
    return deployment.options(
        name="dsla",
        num_replicas=replicas if replicas == "auto" else int(replicas),
        ray_actor_options=actor,
        max_ongoing_requests=limit,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=options.drain_seconds,
        **router,
    ).bind()


def _router(routing: str) -> dict[str, Any]:
    """Options of the deployment for a kind of routing."""
    if routing not in ROUTERS:
        raise ValueError(f"routing must be one of {', '.join(ROUTERS)}, got {routing!r}")
    path = ROUTERS[routing]
    if path is None:
        return {}
    if importlib.util.find_spec(path.rpartition(".")[0]) is None:
        raise ValueError(f"routing={routing} needs a Ray that has {path}, such as 2.60: update it, or take routing=load")
    config: Any = RequestRouterConfig  # its annotation is of what it makes of the path
    return {"request_router_config": config(request_router_class=path)}


def _app(options: ServeOptions) -> FastAPI:
    app = load_app(options)
    _engines.append(app.state.engine)
    return app


def _gpus() -> int:
    import torch

    return int(torch.cuda.is_available())


def _read(kind: str, value: Any) -> Any:
    """A value of the command line, which knows text alone, as the kind that a field is annotated with."""
    if not isinstance(value, str) or "str" in kind:
        return value
    if kind == "bool":
        return value.lower() in ("1", "true", "yes")
    return int(value) if "int" in kind else float(value)
