"""Prometheus figures of a front. Those of the queue are read from the store at each scrape, so that every
front says the same; labels are never ids or prompts.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from chitu_diffusion.service.store import JobStore

_HTTP_S = (0.005, 0.02, 0.1, 0.5, 2, 10, 60)


class FrontMetrics:
    """One front's registry.

    Args:
        data: folder whose disk is watched.
    """

    def __init__(self, store: JobStore, data: Path) -> None:
        self._store = store
        self._data = data
        self._registry = CollectorRegistry()
        own = self._registry
        self._jobs = Gauge("chitu_queue_jobs", "Jobs by state", ["state"], registry=own)
        self._wait = Gauge("chitu_queue_oldest_seconds", "How long the oldest queued job waits", registry=own)
        self._ready = Gauge(
            "chitu_worker_ready", "Workers by model and state", ["model", "state"], registry=own
        )
        self._memory = Gauge("chitu_gpu_memory_bytes", "Of a worker", ["worker"], registry=own)
        self._rss = Gauge("chitu_worker_rss_bytes", "Of a worker", ["worker"], registry=own)
        self._disk = Gauge("chitu_disk_free_bytes", "Of the data folder's disk", registry=own)
        self.streams = Gauge("chitu_sse_streams", "Event streams that are open", registry=own)
        self.webhooks = Counter("chitu_webhook", "Webhooks sent", ["result"], registry=own)
        self._http = Histogram(
            "chitu_http_seconds", "Answers", ["route", "code"], buckets=_HTTP_S, registry=own
        )

    def observe(self, route: str, status: int, seconds: float) -> None:
        """An answer was given."""
        self._http.labels(route, str(status)).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' format.

        Raises:
            StoreDownError
        """
        for state, number in self._store.counts().items():
            self._jobs.labels(state.value).set(number)
        oldest = self._store.oldest_queued_at()
        self._wait.set(0 if oldest is None else max(0.0, self._store.now() - oldest))
        for gauge in (self._ready, self._memory, self._rss):
            gauge.clear()
        for worker in self._store.workers.all():
            self._ready.labels(worker.model, worker.state).inc()
            self._memory.labels(worker.id).set(worker.gpu_bytes)
            self._rss.labels(worker.id).set(worker.rss)
        self._disk.set(shutil.disk_usage(self._data).free)
        return generate_latest(self._registry)
