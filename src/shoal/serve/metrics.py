"""What `/metrics` tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..engine import EngineStats

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter("shoal_requests", "Answered HTTP requests.", ("path", "status"), registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            return Histogram(f"shoal_{name}_seconds", text, buckets=SECONDS, registry=registry)

        self._first = seconds("time_to_first_token", "From a request to its first token.")
        self._between = seconds("inter_token_latency", "Between tokens of an answer.")
        self._whole = seconds("request", "From a request to the end of its answer.")

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Report an engine's figures too."""
        self._registry.register(_EngineCollector(stats))

    def count_request(self, path: str, status: int) -> None:
        """A request was answered. `path` is that of a route, never what a client made up."""
        self._requests.labels(path, status).inc()

    def clock(self, began: float) -> Clock:
        """For one answer, from the time its request came."""
        return Clock(self._first, self._between, self._whole, began)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class Clock:
    """Times the tokens of one answer."""

    def __init__(self, first: Histogram, between: Histogram, whole: Histogram, began: float) -> None:
        self._first, self._between, self._whole, self._began = first, between, whole, began
        self._last: float | None = None

    def tokens(self, count: int, now: float) -> None:
        """`count` tokens arrived."""
        if not count:
            return
        if self._last is None:
            self._first.observe(now - self._began)
        else:
            # One observation for tokens that came together: the time each took is the same.
            self._between.observe((now - self._last) / count)
        self._last = now

    def finished(self, now: float) -> None:
        self._whole.observe(now - self._began)


class _EngineCollector(Collector):
    """The engine's figures, read when they are asked for."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        gauges = {
            "shoal_requests_waiting": ("Requests that wait for the engine.", stats.waiting),
            "shoal_requests_running": ("Requests that the engine computes.", stats.running),
            "shoal_cache_pages": ("Pages of the cache.", stats.pages),
            "shoal_cache_pages_in_use": ("Pages that requests hold.", stats.pages_in_use),
            "shoal_cache_usage": ("Share of the pages that requests hold.", stats.pages_in_use / max(stats.pages, 1)),
            "shoal_prefix_cache_hit_rate": ("Share of prompt tokens found in the prefix cache.", stats.hit_rate or 0.0),
            "shoal_mtp_acceptance": ("Share of tokens guessed ahead that were right.", stats.acceptance or 0.0),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        counts = {
            "shoal_steps": ("Steps of the engine.", stats.steps),
            "shoal_preemptions": ("Requests that gave way to others.", stats.preemptions),
            "shoal_prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "shoal_cached_prompt_tokens": ("Tokens of prompts found in the prefix cache.", stats.cached_tokens),
            "shoal_generated_tokens": ("Tokens of answers.", stats.generated_tokens),
            "shoal_drafted_tokens": ("Tokens guessed ahead and checked.", stats.drafted_tokens),
            "shoal_accepted_tokens": ("Tokens guessed ahead that were right.", stats.accepted_tokens),
        }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(name, text, value)
        finished = CounterMetricFamily("shoal_answers", "Ended answers.", labels=("reason",))
        for reason, value in sorted(stats.finished.items()):
            finished.add_metric((reason,), value)
        yield finished
        if stats.expert_load is not None:
            load = CounterMetricFamily("shoal_expert_tokens", "Tokens sent to every expert.", labels=("layer", "expert"))
            for layer, row in enumerate(stats.expert_load):
                for expert, value in enumerate(row):
                    load.add_metric((str(layer), str(expert)), float(value))
            yield load
