"""The engine's figures for Prometheus: ours, and under vLLM's names those that vLLM has too.

So dashboards and autoscalers that are made for vLLM work. Its counts and times have the label `model_name`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..engine.engine import Engine
from ..engine.request import Request

SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
SECONDS_PER_TOKEN = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
FINISHED_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}  # ours: vLLM's


class EngineCollector(Collector):
    """Reads an engine when it is asked."""

    def __init__(self, engine: Engine, model_name: str):
        self.engine, self.model_name = engine, model_name

    def collect(self) -> Iterator[Any]:
        now = self.engine.snapshot()
        yield from self._ours(now)
        yield from self._vllms(now)

    def _ours(self, now: dict[str, Any]) -> Iterator[Any]:
        units = "KV heads" if now["unit"] == "head" else "Layers"
        for name, key, what in (
            ("dsla_level", "level", f"{units} that are DSLA for new requests"),
            ("dsla_kept", "kept", f"{units} that stay softmax attention for them"),
            ("dsla_requests_waiting", "waiting", "Requests in the queue"),
            ("dsla_requests_running", "running", "Requests in slots"),
            ("dsla_waiting_prompt_tokens", "waiting_tokens", "Prompt tokens of requests in the queue"),
            ("dsla_free_blocks", "free_blocks", "Free blocks for keys and values"),
            ("dsla_blocks", "blocks", "Blocks for keys and values"),
            ("dsla_kv_bytes_per_token", "bytes_per_token", "Of keys and values of a new request"),
        ):
            yield GaugeMetricFamily(name, what, value=now[key])
        yield GaugeMetricFamily("dsla_oldest_wait_seconds", "Of the oldest request without a first token", value=now["oldest_wait"] or 0.0)
        yield GaugeMetricFamily("dsla_healthy", "1 while /health answers 200, 0 while it answers 503", self._healthy(now))
        yield CounterMetricFamily("dsla_failed_steps", "Steps of the engine that failed", value=now["failed_steps"])
        yield GaugeMetricFamily("dsla_step_seconds", "That the step which runs has taken so far; 0 between two", value=now["step_seconds"])
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
        begun = CounterMetricFamily(
            "dsla_reused_prefixes", "Requests that began with what others had read, by what it was", labels=["what"]
        )
        for what, count in now["prefix_texts"].items():
            begun.add_metric([what], count)
        yield begun
        snapshots = now["snapshots"]
        for name, key, what in (
            ("dsla_snapshots", "kept", "Snapshots of states"),
            ("dsla_snapshot_bytes", "bytes", "Memory that they take"),
            ("dsla_snapshot_budget_bytes", "budget", "Memory that they may take"),
        ):
            yield GaugeMetricFamily(name, what, value=snapshots[key])
        yield CounterMetricFamily("dsla_snapshots_taken", "Snapshots of states, with those that are gone", value=snapshots["taken"])
        yield CounterMetricFamily("dsla_snapshots_evicted", "Snapshots that others took the place of", value=snapshots["evicted"])
        calls = CounterMetricFamily("dsla_recordable_calls", "Calls of the model that CUDA graphs are for, by how they ran", labels=["how"])
        for how, count in now["calls"].items():
            calls.add_metric([how], count)
        yield calls

    def _vllms(self, now: dict[str, Any]) -> Iterator[Any]:
        labels = [self.model_name]
        for name, value, what in (
            ("vllm:num_requests_running", now["running"], "Requests in slots"),
            ("vllm:num_requests_waiting", now["waiting"], "Requests in the queue"),
            ("vllm:kv_cache_usage_perc", 1 - now["free_blocks"] / now["blocks"], "Share of the blocks in use, from 0 to 1"),
        ):
            gauge = GaugeMetricFamily(name, what, labels=["model_name"])
            gauge.add_metric(labels, value)
            yield gauge
        for name, value, what in (
            ("vllm:prompt_tokens", now["read_tokens"], "Prompt tokens read"),
            ("vllm:prefix_cache_queries", now["prefix_queries"], "Prompt tokens looked for among those that other texts have left"),
            ("vllm:prefix_cache_hits", now["prefix_hits"], "Prompt tokens found there, and so not read"),
            ("vllm:generation_tokens", now["generated_tokens"], "Tokens generated"),
            *self._drafts(now),
        ):
            counter = CounterMetricFamily(name, what, labels=["model_name"])
            counter.add_metric(labels, value)
            yield counter
        ended = CounterMetricFamily("vllm:request_success", "Requests that ended, by how", labels=["model_name", "finished_reason"])
        for finish, count in now["finished"].items():
            ended.add_metric([self.model_name, FINISHED_REASONS[finish]], count)
        yield ended
        intervals = self.engine.token_intervals
        between = HistogramMetricFamily("vllm:inter_token_latency_seconds", "Between two tokens of a request", labels=["model_name"])
        between.add_metric(labels, [(floatToGoString(limit), count) for limit, count in intervals.cumulated()], intervals.sum)
        yield between

    @staticmethod
    def _drafts(now: dict[str, Any]) -> list[tuple[str, int, str]]:
        """Of a server that drafts."""
        if now["drafts"] is None:
            return []
        return [
            ("vllm:spec_decode_num_drafts", now["drafts"]["rounds"], "Calls that checked drafts"),
            ("vllm:spec_decode_num_draft_tokens", now["drafts"]["drafted"], "Tokens guessed"),
            ("vllm:spec_decode_num_accepted_tokens", now["drafts"]["accepted"], "Guesses that are in the text"),
        ]

    @staticmethod
    def _healthy(now: dict[str, Any]) -> float:
        return float(now["problem"] is None and not now["draining"])


class Metrics:
    """A registry with the engine's figures and the times of ended requests."""

    def __init__(self, engine: Engine, model_name: str):
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(engine, model_name))

        def times(name: str, vllms: str, what: str, buckets: tuple[float, ...]) -> tuple[Histogram, Histogram]:
            ours = Histogram(name, what, buckets=buckets, registry=self.registry)
            return ours, Histogram(vllms, what, ["model_name"], buckets=buckets, registry=self.registry).labels(model_name)

        self._first = times("dsla_seconds_to_first_token", "vllm:time_to_first_token_seconds", "From arrival", SECONDS)
        self._each = times("dsla_seconds_per_token", "vllm:request_time_per_output_token_seconds", "Mean of a request", SECONDS_PER_TOKEN)
        self._whole = times("dsla_request_seconds", "vllm:e2e_request_latency_seconds", "From arrival to the end", SECONDS)

    def ended(self, request: Request) -> None:
        """Count a request that has ended."""
        if request.first_token is None:
            return
        _observe(self._first, request.first_token - request.arrived)
        _observe(self._whole, request.last_token - request.arrived)
        if len(request.tokens) > 1:
            _observe(self._each, (request.last_token - request.first_token) / (len(request.tokens) - 1))


def _observe(histograms: tuple[Histogram, Histogram], value: float) -> None:
    for histogram in histograms:
        histogram.observe(value)
