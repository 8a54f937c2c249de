"""What a supervisor counts of its workers and their jobs, in Prometheus' types. It keeps them for a moment:
what has grown goes into the store, and fronts show it. Labels are never ids of jobs, nor prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric

from chitu_diffusion.service.counters import JOBS_ENDED, Series, series
from chitu_diffusion.service.jobs import Job, JobEvent, JobState
from chitu_diffusion.service.records import CounterTable

_WAIT_S = (0.5, 2, 10, 60, 300, 1800, 7200, 28800)
_JOB_S = (1, 5, 15, 60, 180, 600, 1800, 7200)
_STEP_S = (0.05, 0.2, 0.5, 1, 2, 5, 15, 60)
_WRITE_S = (0.01, 0.05, 0.2, 1, 5, 30)
_BYTES = (1e6, 1e7, 1e8, 5e8, 2e9)
_RATIO = (0.25, 0.5, 0.8, 0.9, 1.1, 1.25, 2, 4)


class SupervisorFigures:
    """All supervisors' figures by name; one object a process. Of one thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = self.registry

        def counter(name: str, said: str, *labels: str) -> Counter:
            return Counter(name, said, labels, registry=own)

        def histogram(name: str, said: str, buckets: Sequence[float], *labels: str) -> Histogram:
            return Histogram(name, said, labels, buckets=buckets, registry=own)

        counter(JOBS_ENDED, "Jobs that ended; code says why they failed", "state", "code")
        self.queue_wait = histogram(
            "chitu_queue_wait_seconds", "From submit to the first claim", _WAIT_S, "model"
        )
        self.job = histogram("chitu_job_seconds", "From submit to completion", _JOB_S, "model")
        self.stage = histogram(
            "chitu_stage_seconds", "Work on a stage of a completed job", _JOB_S, "model", "stage"
        )
        self.step = histogram("chitu_step_seconds", "A denoising step", _STEP_S, "model")
        self.steps = counter(
            "chitu_steps", "Denoising steps: computed, saved by a cache, or redone after a loss", "kind"
        )
        self.resumes = counter(
            "chitu_resumes", "Attempts that went on, by what ended the one before", "reason", "exact"
        )
        self.steps_lost = counter("chitu_steps_lost", "Steps done again since their checkpoint was older")
        self.deaths = counter("chitu_worker_deaths", "Workers that died or were killed", "signal")
        self.starts = counter("chitu_worker_starts", "Workers started: first, lost or recycled", "reason")
        self.forkservers = counter("chitu_forkserver_starts", "Forkservers started; more than one: one died")
        self.leases_lost = counter("chitu_lease_lost", "Leases that another took while they were held")
        self.checkpoint = histogram(
            "chitu_checkpoint_seconds", "Writing a checkpoint, its hash left out", _WRITE_S, "model"
        )
        self.checkpoint_bytes = histogram("chitu_checkpoint_bytes", "Of a checkpoint", _BYTES, "model")
        self.memory_levels = counter("chitu_memory_level_raised", "After running out of memory", "model")
        self.eta_error = histogram(
            "chitu_eta_error_ratio", "First time left that was promised, over the true one", _RATIO, "model"
        )
        self._stored: dict[Series, float] = {}
        self._forkservers = 0

    def count_forkservers(self, started: int) -> None:
        """How many a launcher has started so far."""
        self.forkservers.inc(started - self._forkservers)
        self._forkservers = started

    def flush(self, counters: CounterTable) -> None:
        """Put what has grown into the store; where that fails, it goes with the next.

        Raises:
            StoreDownError
        """
        now = {
            series(sample.name, sample.labels): sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }
        grown = {key: value - self._stored.get(key, 0.0) for key, value in now.items()}
        if grown := {key: by for key, by in grown.items() if by}:
            counters.add(grown)
            self._stored = now


class AttemptFigures:
    """What is counted of one attempt at a job.

    Args:
        job: as it was claimed.
    """

    def __init__(self, figures: SupervisorFigures, job: Job) -> None:
        self._figures = figures
        self._job = job
        self._began = False
        self._promised: tuple[float, float] | None = None  # when, and the seconds left
        if job.attempt == 1 and job.claimed_at is not None:
            figures.queue_wait.labels(job.model).observe(job.claimed_at - job.created_at)

    def step(self, *, step: int, seconds: float, eta_s: float | None, saved: bool, **_: object) -> None:
        """A denoising step; those that an earlier attempt had done are done again."""
        before = self._job.step or 0
        if not self._began:
            self._figures.steps_lost.inc(max(0, before - (step - 1)))
        self._began = True
        self._figures.step.labels(self._job.model).observe(seconds)
        self._figures.steps.labels("redone" if step <= before else "saved" if saved else "computed").inc()
        if self._promised is None and eta_s:
            self._promised = (time.monotonic(), eta_s)

    def resumed(self, events: Callable[..., Sequence[JobEvent]], exact: bool) -> None:
        """It goes on from a checkpoint.

        Args:
            events: the store's.
        """
        before = events(self._job.id, max(0, self._job.events - 3), limit=2)
        self._figures.resumes.labels(resume_reason(before), str(exact).lower()).inc()

    def completed(self, complete: Callable[[], Job]) -> Job:
        """It is done; `complete` says so to the store, where it may have been cancelled before."""
        job = complete()
        if job.state is not JobState.COMPLETED or job.ended_at is None:
            return job
        for stage, spent in job.seconds.items():
            self._figures.stage.labels(job.model, stage).observe(spent)
        self._figures.job.labels(job.model).observe(job.ended_at - job.created_at)
        if self._promised is not None:
            at, left = self._promised
            self._figures.eta_error.labels(job.model).observe(left / max(0.001, time.monotonic() - at))
        return job


def stored_families(counters: CounterTable) -> Iterator[Metric]:
    """All supervisors' figures as the store has them.

    Raises:
        StoreDownError
    """
    rows = counters.all()
    for family in SupervisorFigures().registry.collect():
        ends = ("_bucket", "_count", "_sum") if family.type == "histogram" else ("_total",)
        found = [(f"{family.name}{end}", *row) for end in ends for row in rows.get(f"{family.name}{end}", ())]
        family.samples = []
        for name, labels, value in sorted(found, key=lambda each: _order(each[1])):
            family.add_sample(name, labels, value)
        yield family


def _order(labels: dict[str, str]) -> tuple[list[tuple[str, str]], float]:
    """Series of one histogram together, their buckets by size."""
    others = sorted((name, value) for name, value in labels.items() if name != "le")
    return others, float(labels.get("le", "inf"))


def resume_reason(before: Sequence[JobEvent]) -> str:
    """Why the attempt before ended.

    Args:
        before: the last events before the new one's `started`, in order.
    """
    for event in reversed(before):
        if event.kind == "worker_lost":
            return "lease_expired" if event.data.get("signal") == "lease_expired" else "worker_lost"
        if event.kind in ("parked", "held"):
            return event.kind
        if event.kind == "queued" and "code" in event.data:
            return "retry"
    return "other"
