"""What Prometheus reads: the engine's numbers when it asks, under our names and those that dashboards of
vLLM read (its docs/design/metrics.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from fastapi import APIRouter
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.responses import PlainTextResponse, Response

from partita.serve.http.replies import Service
from partita.serve.stats import Histogram, Stats

# (name, what it is, how it is read, vLLM's name)
GAUGES = (
    ("requests_running", "Requests that take part in steps.", lambda s: s.running,
     "num_requests_running"),
    ("requests_waiting", "Requests that wait for their first step.", lambda s: s.waiting,
     "num_requests_waiting"),
    ("pages", "Pages of keys and values.", lambda s: s.pages, None),
    ("pages_free", "Pages that no request holds.", lambda s: s.pages_free, None),
    ("pages_used_ratio", "Share of pages that requests hold.", lambda s: 1 - s.pages_free / s.pages,
     "kv_cache_usage_perc"),
    ("idle_seconds", "Since the last step, or since work came after none.", lambda s: s.idle_s, None),
)  # fmt: skip
COUNTERS = (
    ("steps", "Steps of the model.", lambda s: s.steps, None),
    ("requests", "Requests taken.", lambda s: s.requests, None),
    ("preemptions", "Requests that gave their pages up for others.", lambda s: s.preemptions,
     "num_preemptions"),
    ("prompt_tokens", "Tokens of prompts.", lambda s: s.prompt_tokens, "prompt_tokens"),
    ("generated_tokens", "Tokens chosen.", lambda s: s.generated_tokens, "generation_tokens"),
    ("prefix_queried_tokens", "Tokens of prompts that were looked up.",
     lambda s: s.prefix_queried_tokens, "prefix_cache_queries"),
    ("prefix_hit_tokens", "Tokens of prompts whose keys and values were there.",
     lambda s: s.prefix_hit_tokens, "prefix_cache_hits"),
    ("drafted_tokens", "Tokens guessed ahead.", lambda s: s.drafted_tokens,
     "spec_decode_num_draft_tokens"),
    ("accepted_tokens", "Tokens guessed right.", lambda s: s.accepted_tokens,
     "spec_decode_num_accepted_tokens"),
)  # fmt: skip
HISTOGRAMS = (
    ("time_to_first_token_seconds", "From a request to its first token.",
     lambda s: s.time_to_first_token, "time_to_first_token_seconds"),
    ("between_tokens_seconds", "Between two tokens of a choice.", lambda s: s.between_tokens,
     "inter_token_latency_seconds"),
    ("request_seconds", "From a request to its end.", lambda s: s.request_time,
     "e2e_request_latency_seconds"),
)  # fmt: skip


class Numbers(Collector):
    """Reads the engine once for each scrape."""

    def __init__(self, service: Service, replies: Counter[tuple[str, int]]) -> None:
        self._service, self._replies = service, replies

    def collect(self) -> Iterator[Metric]:
        """All families."""
        stats = self._service.engine.stats()
        yield from _gauges(stats, self._service.name)
        yield from _counters(stats, self._service.name)
        yield from _histograms(stats, self._service.name)
        yield from self._http()

    def _http(self) -> Iterator[Metric]:
        live = len(self._service.live)
        yield GaugeMetricFamily(
            "partita_http_open", "Requests that a client waits for.", value=live
        )
        family = CounterMetricFamily(
            "partita_http_replies", "Replies by route and status.", labels=("path", "status")
        )
        for (path, status), count in self._replies.copy().items():
            family.add_metric((path, str(status)), count)
        yield family


def _names(own: str, other: str | None) -> list[tuple[str, tuple[str, ...]]]:
    """(name, its labels): ours, and vLLM's with the model's name."""
    shared = [] if other is None else [(f"vllm:{other}", ("model_name",))]
    return [(f"partita_{own}", ()), *shared]


def _gauges(stats: Stats, model: str) -> Iterator[Metric]:
    for own, text, read, other in GAUGES:
        for name, labels in _names(own, other):
            family = GaugeMetricFamily(name, text, labels=labels)
            family.add_metric((model,) * len(labels), read(stats))
            yield family
    family = GaugeMetricFamily("partita_failed", "1 once the model failed.")
    family.add_metric((), float(stats.failed is not None))
    yield family


def _counters(stats: Stats, model: str) -> Iterator[Metric]:
    for own, text, read, other in COUNTERS:
        for name, labels in _names(own, other):
            family = CounterMetricFamily(name, text, labels=labels)
            family.add_metric((model,) * len(labels), read(stats))
            yield family
    ours = CounterMetricFamily("partita_finished", "Choices by how they ended.", labels=("reason",))
    shared = CounterMetricFamily(
        "vllm:request_success",
        "Choices by how they ended.",
        labels=("model_name", "finished_reason"),
    )
    for reason, count in stats.finished.items():
        ours.add_metric((reason,), count)
        shared.add_metric((model, reason), count)
    yield from (ours, shared)


def _histograms(stats: Stats, model: str) -> Iterator[Metric]:
    for own, text, read, other in HISTOGRAMS:
        for name, labels in _names(own, other):
            family = HistogramMetricFamily(name, text, labels=labels)
            seen = read(stats)
            family.add_metric((model,) * len(labels), _buckets(seen), seen.sum)
            yield family


def _buckets(seen: Histogram) -> list[tuple[str, float]]:
    """Cumulative, as Prometheus has them."""
    total, found = 0, []
    for bound, count in zip((*map(str, seen.bounds), "+Inf"), seen.counts, strict=True):
        total += count
        found.append((bound, float(total)))
    return found


def router(service: Service, replies: Counter[tuple[str, int]]) -> APIRouter:
    """GET /metrics."""
    made = APIRouter(tags=["metrics"])
    registry = CollectorRegistry()
    registry.register(Numbers(service, replies))

    @made.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Numbers in Prometheus' text form."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return made
