"""The engine's figures for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from ..engine.engine import Engine
from ..engine.request import Request

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
SECONDS_PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)


class EngineCollector(Collector):
    """Reads an engine when it is asked."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        now = self.engine.snapshot()
        units = "KV heads" if now["unit"] == "head" else "Layers"
        for name, key, what in (
            ("dsla_level", "level", f"{units} that are DSLA for new requests"),
            ("dsla_kept", "kept", f"{units} that stay softmax attention for them"),
            ("dsla_requests_waiting", "waiting", "Requests in the queue"),
            ("dsla_requests_running", "running", "Requests in slots"),
            ("dsla_waiting_prompt_tokens", "waiting_tokens", "Prompt tokens of requests in the queue"),
            ("dsla_free_blocks", "free_blocks", "Free blocks for keys and values"),
            ("dsla_blocks", "blocks", "Blocks for keys and values"),
        ):
            yield GaugeMetricFamily(name, what, value=now[key])
        yield CounterMetricFamily("dsla_prompt_tokens", "Prompt tokens read", value=now["read_tokens"])
        generated = CounterMetricFamily("dsla_generated_tokens", "Tokens generated, by level", labels=["level"])
        for level, count in enumerate(now["tokens_at_level"]):
            if level in now["ladder"]:
                generated.add_metric([str(level)], count)
        yield generated
        yield CounterMetricFamily("dsla_level_changes", "Changes of the level", value=self.engine.control.count)
        ended = CounterMetricFamily("dsla_requests", "Requests that ended, by how", labels=["finish"])
        for finish, count in now["finished"].items():
            ended.add_metric([finish], count)
        yield ended
        calls = CounterMetricFamily("dsla_recordable_calls", "Calls of the model that CUDA graphs are for, by how they ran", labels=["how"])
        for how, count in now["calls"].items():
            calls.add_metric([how], count)
        yield calls


class Metrics:
    """A registry with the engine's figures and the times of ended requests."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine))
        self._first = Histogram("dsla_seconds_to_first_token", "From arrival", buckets=SECONDS, registry=self.registry)
        self._each = Histogram("dsla_seconds_per_token", "Mean of a request", buckets=SECONDS_PER_TOKEN, registry=self.registry)
        self._whole = Histogram("dsla_request_seconds", "From arrival to the end", buckets=SECONDS, registry=self.registry)

    def ended(self, request: Request) -> None:
        """Count a request that has ended."""
        if request.first_token is None:
            return
        self._first.observe(request.first_token - request.arrived)
        self._whole.observe(request.last_token - request.arrived)
        if len(request.tokens) > 1:
            self._each.observe((request.last_token - request.first_token) / (len(request.tokens) - 1))
