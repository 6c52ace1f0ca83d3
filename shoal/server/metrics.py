"""Prometheus: what came in, what went out, how long it took, how the engine stands. One registry a server."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.engine.request import Stats
from shoal.server.ledger import UsageRow

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
GAUGES = {
    "running": "requests in the batch",
    "waiting": "requests queued",
    "pages": "cache pages",
    "pages_used": "",
    "draft_speedup": "tokens a second with drafts over those without, at the latest batch size",
    "disk_pages": "pages of the prefix cache in files",
}
COUNTERS = {
    "tokens_in": "prompt tokens read",
    "tokens_cached": "prompt tokens found in the prefix cache",
    "tokens_out": "tokens generated",
    "drafted": "tokens drafted by the multi-token module",
    "accepted": "drafted tokens that stood",
    "steps": "engine steps",
    "disk_hits": "pages read from files",
    "experts_chosen": "experts that layers chose, once a layer and step",
    "experts_found": "of them, in memory already",
    "experts_foretold": "of them, read ahead",
    "experts_read_ahead": "experts read before they were chosen",
    "experts_guessed": "experts foretold",
    "experts_right": "of them, chosen",
    "experts_bytes_read": "from the disk",
    "experts_seconds_reading": "with a read going on",
}


class Metrics:
    def __init__(self, stats: Callable[[], Stats | None]):
        self.registry = CollectorRegistry()
        self.requests = Counter("shoal_requests", "answers sent", ["route", "status"], registry=self.registry)
        self.tokens = Counter("shoal_billed_tokens", "tokens billed", ["kind"], registry=self.registry)
        self.finishes = Counter("shoal_finishes", "how generations ended", ["finish"], registry=self.registry)
        self.first = Histogram(
            "shoal_first_token_seconds", "from admission to the first token", registry=self.registry, buckets=SECONDS
        )
        self.whole = Histogram(
            "shoal_generation_seconds", "from admission to the end", registry=self.registry, buckets=SECONDS
        )
        self.registry.register(EngineStats(stats))

    def observe(self, row: UsageRow) -> None:
        for kind, n in (("hit", row.cached), ("miss", row.prompt - row.cached), ("out", row.completion)):
            self.tokens.labels(kind).inc(n)
        self.finishes.labels(row.finish).inc()
        if row.first_token_ms is not None:
            self.first.observe(row.first_token_ms / 1000)
        self.whole.observe((row.ms or 0) / 1000)

    def text(self) -> bytes:
        return generate_latest(self.registry)


class EngineStats(Collector):
    def __init__(self, stats: Callable[[], Stats | None]):
        self.stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self.stats()
        if stats is None:
            return
        for name, says in GAUGES.items():
            yield GaugeMetricFamily(f"shoal_engine_{name}", says, value=getattr(stats, name))
        for name, says in COUNTERS.items():
            yield CounterMetricFamily(f"shoal_engine_{name}", says, value=getattr(stats, name))
