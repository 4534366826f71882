"""Numbers for Prometheus: requests, tokens, times, and what the scheduler has to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

#: Upper bounds of the histograms, in seconds.
FIRST_TOKEN = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
BETWEEN_TOKENS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5)
WHOLE = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
#: Of the scheduler's statistics: what there is now, with an explanation; others are counted since the beginning.
GAUGES = {
    "running": "texts that are being written",
    "waiting": "texts that wait",
    "kv_tokens": "tokens that the KV cache holds",
    "kv_tokens_used": "tokens in the KV cache",
}


class SchedulerStatistics(Collector):
    """What the scheduler says at the moment that it is asked."""

    def __init__(self, statistics: Callable[[], dict[str, float]]) -> None:
        self._statistics = statistics

    def collect(self) -> Iterator[Any]:
        for name, value in self._statistics().items():
            if name in GAUGES:
                yield GaugeMetricFamily(f"edgerazor_{name}", GAUGES[name], value=value)
            else:
                yield CounterMetricFamily(f"edgerazor_scheduler_{name}", f"{name} of the scheduler", value=value)

    def describe(self) -> list[Any]:
        return []


class Metrics:
    """The numbers of one server.

    Args:
        statistics: of its scheduler.
    """

    def __init__(self, statistics: Callable[[], dict[str, float]]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "edgerazor_requests", "requests, by path and status", ["path", "status"], registry=registry
        )
        self.seconds = Histogram("edgerazor_request_seconds", "whole requests", buckets=WHOLE, registry=registry)
        self.first_token = Histogram(
            "edgerazor_first_token_seconds", "to the first token of a text", buckets=FIRST_TOKEN, registry=registry
        )
        self.between_tokens = Histogram(
            "edgerazor_inter_token_seconds", "from token to token", buckets=BETWEEN_TOKENS, registry=registry
        )
        self.tokens = Counter("edgerazor_tokens", "tokens of requests, by kind", ["kind"], registry=registry)
        self.ended = Counter(
            "edgerazor_requests_ended_early", "by reason: gone, slow, time", ["reason"], registry=registry
        )
        registry.register(SchedulerStatistics(statistics))

    def count(self, usage: dict[str, Any]) -> None:
        """Count the tokens of a request."""
        self.tokens.labels("prompt").inc(usage["prompt_tokens"])
        self.tokens.labels("cached").inc(usage["prompt_tokens_details"]["cached_tokens"])
        self.tokens.labels("generated").inc(usage["completion_tokens"])

    def page(self) -> bytes:
        """In the format of Prometheus."""
        return generate_latest(self.registry)
