"""The store of jobs: what clients, fronts and supervisors ask of the database. No HTTP, no torch.

`open_store(url)` gives a `JobStore`. A method is one transaction; when it returns, what it did is on disk.
Every method may be called from any thread, and raises StoreDownError where the database does not answer.

    store.submit / job / jobs / events / cancel / ...      clients
    store.leases.claim / beat / event / complete / ...     who runs jobs; everything under a fence
    store.keys, store.workers, store.outbox                API keys, workers' rows, webhooks
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from chitu_diffusion.service.jobs import (
    ApiKey,
    Artifact,
    Beat,
    Claimed,
    Delivery,
    Job,
    JobCheckpoint,
    JobEvent,
    JobFailure,
    JobLease,
    JobPage,
    JobProgress,
    JobState,
    NewJob,
    OwnerLimits,
    Submitted,
    Swept,
    WorkerInfo,
)

Clock = Callable[[], float]


def open_store(url: str, *, clock: Clock | None = None, most_queued: int = 1000) -> JobStore:
    """The store at a SQLAlchemy URL: `sqlite:///DATA/chitu.db` or `postgresql+psycopg://USER@HOST/NAME`.

    An SQLite database is made, or migrated after a copy beside it; PostgreSQL's must be migrated already
    (`chitu store migrate`).

    Args:
        clock: gives seconds since 1970, for tests; by default the database's clock on PostgreSQL, and on
            SQLite this process's, which no change of the wall clock turns.
        most_queued: jobs that may wait, of all owners.

    Raises:
        SchemaError: the tables are newer than this program, or (PostgreSQL) older.
        UsageError: a bad URL, a missing driver, SQLite on a network file system.
        StoreDownError: it cannot be reached.
    """
    raise NotImplementedError


class JobStore:
    """The clients' side. An `owner` of None sees everyone's jobs (operators); a foreign job is missing."""

    leases: LeaseTable
    keys: KeyTable
    workers: WorkerTable
    outbox: Outbox

    def submit(self, new: NewJob, limits: OwnerLimits | None = None) -> Submitted:
        """Take a job in; event `queued`. An earlier job is given where it is meant: see `NewJob`.

        Raises:
            IdempotencyConflictError, QueueFullError
        """
        raise NotImplementedError

    def job(self, job_id: str, owner: str | None = None) -> Job:
        """Raises JobMissingError."""
        raise NotImplementedError

    def jobs(
        self,
        owner: str | None = None,
        *,
        after: str | None = None,
        limit: int = 20,
        newest_first: bool = True,
        states: Collection[JobState] = (),
    ) -> JobPage:
        """Jobs in order of creation, those after the one of id `after`.

        Raises:
            JobMissingError: there is no `after`.
        """
        raise NotImplementedError

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> tuple[JobEvent, ...]:
        """Those with numbers above `after`, in order; of any owner: ask for the job first."""
        raise NotImplementedError

    def last_events(self, job_ids: Collection[str]) -> dict[str, tuple[int, JobState]]:
        """The number of each job's last event, and its state, in one query; jobs that are gone are left out."""
        raise NotImplementedError

    def artifacts(self, job_id: str) -> dict[str, Artifact]:
        """A completed job's files by variant."""
        raise NotImplementedError

    def queue_position(self, job_id: str) -> int | None:
        """How many queued jobs come before it by priority and age (0: it is next); None: it is not queued.
        Fair share may reorder them.
        """
        raise NotImplementedError

    def counts(self) -> dict[JobState, int]:
        """Jobs by state."""
        raise NotImplementedError

    def oldest_queued_at(self) -> float | None:
        """When the job that waits longest began to wait."""
        raise NotImplementedError

    def cancel(self, job_id: str, owner: str | None = None) -> Job:
        """Queued and held jobs end at once; a running one gets event `cancel_requested` once, and ends when
        its worker has stopped. A cancelled job is given back as it is.

        Raises:
            JobMissingError, JobEndedError
        """
        raise NotImplementedError

    def release(self, job_id: str, owner: str | None = None) -> Job:
        """Let a held job go on: it is queued, and goes before those never begun.

        Raises:
            JobMissingError, JobEndedError
            JobBusyError: it is not held.
        """
        raise NotImplementedError

    def set_priority(self, job_id: str, priority: int, owner: str | None = None) -> Job:
        """Raises JobMissingError, JobEndedError, JobBusyError (it runs)."""
        raise NotImplementedError

    def delete(self, job_id: str, owner: str | None = None) -> None:
        """A job that does not run goes at once, with its events; a running one is cancelled, is missing from
        now on, and goes when it ends. Its folder is the sweeper's: see `live_folders`.

        Raises:
            JobMissingError
        """
        raise NotImplementedError

    def sweep(self, *, queue_ttl_s: float) -> Swept:
        """End what waited too long (failed: queue_timeout; held: cancelled), and remove rows that expired or
        are to go. Any process may do it, at any time.
        """
        raise NotImplementedError

    def live_folders(self, job_ids: Collection[str]) -> dict[str, frozenset[int]]:
        """For each job, the fences whose folders (`jobs/ID/FENCE`) must stay: the lease's own and those with a
        checkpoint or an artifact. A job left out has no row: its whole folder may go.
        """
        raise NotImplementedError

    def now(self) -> float:
        """The store's clock."""
        raise NotImplementedError

    def close(self) -> None:
        """Give the connections back."""
        raise NotImplementedError


class LeaseTable:
    """Who runs jobs. Every method but `claim` and `held_by` takes a lease, and raises LeaseLostError without
    changing a row where its fence is not the job's, or the job does not run.

    A wish to cancel decides how a lease ends: whatever its holder says (even `complete`), the job is
    cancelled. So each of these methods gives the job as it is after.
    """

    def claim(
        self, worker: str, models: Collection[str], *, lease_s: float = 30.0, gpus: int = 1
    ) -> Claimed | None:
        """The job to run next, or None. By priority; of one priority those begun before, then of the owner
        with the fewest running jobs, then with the least served seconds, then the oldest.

        A job whose lease ran out is taken over; that counts as a death of its worker. Event `started`, and
        `resumed` at an attempt after the first: {worker, attempt, from_step, reason}.
        """
        raise NotImplementedError

    def held_by(self, worker: str) -> tuple[JobLease, ...]:
        """Leases that a worker of this id still has: a restarted supervisor ends those of its own slot."""
        raise NotImplementedError

    def beat(self, lease: JobLease, *, lease_s: float = 30.0) -> Beat:
        """Keep a lease, and hear what the clients wish."""
        raise NotImplementedError

    def event(
        self,
        lease: JobLease,
        kind: str,
        data: Mapping[str, object] | None = None,
        progress: JobProgress | None = None,
    ) -> int:
        """Add an event and set the progress; gives its number."""
        raise NotImplementedError

    def checkpoint(self, lease: JobLease, saved: JobCheckpoint) -> Job:
        """A checkpoint is on disk; event `checkpoint`. Beyond the earlier ones, it clears the job of deaths."""
        raise NotImplementedError

    def park(self, lease: JobLease) -> Job:
        """Give the job back unharmed (drain, preemption); event `parked`. Save a checkpoint first."""
        raise NotImplementedError

    def worker_lost(
        self, lease: JobLease, *, signal: str = "", stage: str | None = None, step: int | None = None
    ) -> Job:
        """The worker died; event `worker_lost`. Queued again, or failed where the job is poison."""
        raise NotImplementedError

    def retry(self, lease: JobLease, failure: JobFailure) -> Job:
        """A fault that may pass (disk full, rank lost): queued again after 5 s, 30 s, 2 min; then failed."""
        raise NotImplementedError

    def hold(self, lease: JobLease) -> Job:
        """`hold_at_step` was reached: held until it is released; event `held`. Save a checkpoint first."""
        raise NotImplementedError

    def complete(
        self,
        lease: JobLease,
        artifacts: Sequence[Artifact],
        *,
        seconds: Mapping[str, float] | None = None,
        retention_s: float = 604800.0,
    ) -> Job:
        """Done: artifacts, expiry, webhook and event in one transaction. The files are whole by now."""
        raise NotImplementedError

    def fail(self, lease: JobLease, failure: JobFailure, *, retention_s: float = 604800.0) -> Job:
        """It cannot be done; event `failed`."""
        raise NotImplementedError

    def cancelled(self, lease: JobLease, *, retention_s: float = 604800.0) -> Job:
        """Work on it has stopped after a wish to cancel; event `cancelled`."""
        raise NotImplementedError


class KeyTable:
    """API keys."""

    def add(self, key: ApiKey) -> None: ...

    def get(self, key_id: str) -> ApiKey | None:
        """None: there is none. Whether it was revoked is in it."""
        raise NotImplementedError

    def all(self) -> tuple[ApiKey, ...]: ...

    def revoke(self, key_id: str) -> bool:
        """False: there is none."""
        raise NotImplementedError

    def touch(self, key_id: str) -> None:
        """It was used now."""


class WorkerTable:
    """Workers, as they say of themselves."""

    def put(self, worker: WorkerInfo) -> None:
        """Add or replace; `seen_at` is now."""

    def all(self) -> tuple[WorkerInfo, ...]: ...

    def remove(self, worker_id: str) -> None: ...


class Outbox:
    """Webhooks to send; rows come with the transaction that ends a job."""

    def claim(self, limit: int = 10, lease_s: float = 30.0) -> tuple[Delivery, ...]:
        """Deliveries that are due; no other sender gets them for `lease_s`."""
        raise NotImplementedError

    def done(self, delivery: Delivery, status: int) -> None: ...

    def failed(self, delivery: Delivery, status: int | None) -> float | None:
        """Seconds until it is tried again; None: it is given up."""
        raise NotImplementedError
