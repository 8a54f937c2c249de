"""Prometheus figures of a front. Those of queue, jobs, workers and supervisors are read from the store at
each scrape, so that every front says the same; labels are never ids of jobs, nor prompts.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from chitu_diffusion.service.figures import stored_families
from chitu_diffusion.service.store import JobStore

_HTTP_S = (0.005, 0.02, 0.1, 0.5, 2, 10, 60)
_STORE_S = (0.001, 0.005, 0.02, 0.1, 0.5, 2, 10, 30)
HEARD_OF_S = 60.0
"""A worker that was not heard of for longer counts no more."""


class FrontMetrics:
    """One front's registry.

    Args:
        data: folder whose disk is watched.
        model: that this front takes jobs for; without a worker it has none ready.
    """

    def __init__(self, store: JobStore, data: Path, model: str) -> None:
        self._store = store
        self._data = data
        self._model = model
        self._registry = CollectorRegistry()
        own = self._registry
        self._jobs = Gauge("chitu_queue_jobs", "Jobs by state", ["state"], registry=own)
        self._wait = Gauge("chitu_queue_oldest_seconds", "How long the oldest queued job waits", registry=own)
        self._workers = Gauge("chitu_workers", "Heard of lately", ["model", "state"], registry=own)
        self._ready = Gauge("chitu_worker_ready", "Workers that are ready or busy", ["model"], registry=own)
        self._memory = Gauge("chitu_gpu_memory_bytes", "Of a worker", ["worker"], registry=own)
        self._rss = Gauge("chitu_worker_rss_bytes", "Of a worker", ["worker"], registry=own)
        self._disk = Gauge("chitu_disk_free_bytes", "Of the data folder's disk", registry=own)
        self.streams = Gauge("chitu_sse_streams", "Event streams that are open", registry=own)
        self.webhooks = Counter("chitu_webhook", "Webhooks sent", ["result"], registry=own)
        self._http = Histogram(
            "chitu_http_seconds", "Answers", ["route", "code"], buckets=_HTTP_S, registry=own
        )
        queries = Histogram(
            "chitu_store_seconds",
            "This process's transactions: read, write, or queue (submit and claim)",
            ["query"],
            buckets=_STORE_S,
            registry=own,
        )
        store.observe(lambda kind, seconds: queries.labels(kind).observe(seconds))
        own.register(_Stored(store))

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
        for gauge in (self._workers, self._ready, self._memory, self._rss):
            gauge.clear()
        self._ready.labels(self._model)
        now = self._store.now()
        for worker in self._store.workers.all():
            if now - worker.seen_at > HEARD_OF_S:
                continue
            self._workers.labels(worker.model, worker.state).inc()
            self._ready.labels(worker.model).inc(worker.state in ("ready", "busy"))
            self._memory.labels(worker.id).set(worker.gpu_bytes)
            self._rss.labels(worker.id).set(worker.rss)
        self._disk.set(shutil.disk_usage(self._data).free)
        return generate_latest(self._registry)


class _Stored:
    """What supervisors and the store have counted, for a registry."""

    def __init__(self, store: JobStore) -> None:
        self._store = store

    def describe(self) -> Iterable[Metric]:
        """Nothing is asked of the store before a scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Raises StoreDownError."""
        return stored_families(self._store.counters)
