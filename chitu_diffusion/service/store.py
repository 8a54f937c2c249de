"""The store of jobs: what clients and fronts ask of the database. No HTTP, no torch.

`open_store(url)` gives a `JobStore`. A method is one transaction; when it returns, what it did is on disk.
Every method may be called from any thread, and raises StoreDownError where the database does not answer.

    store.submit / job / jobs / events / cancel / ...      clients
    store.leases.claim / beat / event / complete / ...     who runs jobs; everything under a fence
    store.keys, store.workers, store.outbox                API keys, workers' rows, webhooks
    store.counters                                         what only grows, for /metrics
"""

from __future__ import annotations

import secrets
from collections.abc import Collection

from sqlalchemy import ColumnElement, and_, case, func, or_, select
from sqlalchemy import delete as sql_delete

from chitu_diffusion.service import schema
from chitu_diffusion.service.database import Clock, Database, Observer, Transaction
from chitu_diffusion.service.jobs import (
    ENDED,
    LIVE,
    Artifact,
    Job,
    JobBusyError,
    JobEndedError,
    JobEvent,
    JobFailure,
    JobMissingError,
    JobPage,
    JobState,
    NewJob,
    OwnerLimits,
    Submitted,
    Swept,
)
from chitu_diffusion.service.leases import LeaseTable
from chitu_diffusion.service.migrate import bring_up_to_date
from chitu_diffusion.service.records import CounterTable, KeyTable, Outbox, WorkerTable
from chitu_diffusion.service.rows import LockedJob, job_of, lock_job
from chitu_diffusion.service.submitting import insert_job

_SWEPT_AT_ONCE = 100
_ARTIFACT = ("variant", "path", "bytes", "sha256", "media_type")


def open_store(
    url: str, *, clock: Clock | None = None, most_queued: int = 1000, retention_s: float = 604800.0
) -> JobStore:
    """The store at a SQLAlchemy URL: `sqlite:///DATA/chitu.db` or `postgresql+psycopg://USER@HOST/NAME`.

    An SQLite database is made, or migrated after a copy beside it; PostgreSQL's must be migrated already
    (`chitu store migrate`).

    Args:
        clock: gives seconds since 1970, for tests; by default the database's clock on PostgreSQL, and on
            SQLite this process's, which no change of the wall clock turns.
        most_queued: jobs that may wait, of all owners.
        retention_s: seconds that an ended job is kept.

    Raises:
        SchemaError: the tables are newer than this program, or (PostgreSQL) older.
        UsageError: a bad URL, a missing driver, SQLite on a network file system.
        StoreDownError: it cannot be reached.
    """
    database = Database(url, clock)
    bring_up_to_date(database, asked=database.is_sqlite)
    return JobStore(database, most_queued=most_queued, retention_s=retention_s)


class JobStore:
    """The clients' side. An `owner` of None sees everyone's jobs (operators); a foreign job is missing."""

    def __init__(self, database: Database, *, most_queued: int, retention_s: float) -> None:
        self._database = database
        self._most_queued = most_queued
        self._retention_s = retention_s
        self.leases = LeaseTable(database, retention_s)
        self.keys = KeyTable(database)
        self.workers = WorkerTable(database)
        self.outbox = Outbox(database)
        self.counters = CounterTable(database)

    def observe(self, take: Observer) -> None:
        """Have each transaction's kind (read, write, or queue: alone in the queue) and seconds taken."""
        self._database.observer = take

    def submit(self, new: NewJob, limits: OwnerLimits | None = None) -> Submitted:
        """Take a job in; event `queued`. An earlier job is given where it is meant: see `NewJob`.

        Args:
            limits: the owner's, from now on; None is none.

        Raises:
            IdempotencyConflictError, QueueFullError
        """
        job_id = f"video_{secrets.token_hex(12)}"
        with self._database.writing(queue=True) as transaction:
            meant = insert_job(transaction, job_id, new, limits or OwnerLimits(), self._most_queued)
            row = transaction.connection.execute(select(schema.jobs).where(schema.jobs.c.id == meant)).one()
        return Submitted(job_of(row), created=meant == job_id)

    def job(self, job_id: str, owner: str | None = None) -> Job:
        """Raises JobMissingError."""
        query = select(schema.jobs).where(schema.jobs.c.id == job_id, *_visible(owner))
        with self._database.reading() as transaction:
            found = transaction.connection.execute(query).one_or_none()
        if found is None:
            raise _missing(job_id)
        return job_of(found)

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
        jobs = schema.jobs.c
        query = select(schema.jobs).where(*_visible(owner))
        if states:
            query = query.where(jobs.state.in_([state.value for state in states]))
        if after is not None:
            last = self.job(after, owner)
            tie = jobs.id < last.id if newest_first else jobs.id > last.id
            beyond = jobs.created_at < last.created_at if newest_first else jobs.created_at > last.created_at
            query = query.where(or_(beyond, and_(jobs.created_at == last.created_at, tie)))
        order = (jobs.created_at.desc(), jobs.id.desc()) if newest_first else (jobs.created_at, jobs.id)
        with self._database.reading() as transaction:
            rows = transaction.connection.execute(query.order_by(*order).limit(limit + 1)).all()
        return JobPage(tuple(job_of(row) for row in rows[:limit]), has_more=len(rows) > limit)

    def events(self, job_id: str, after: int = 0, limit: int = 1000) -> tuple[JobEvent, ...]:
        """Those with numbers above `after`, in order; of any owner: ask for the job first."""
        events = schema.events.c
        query = select(schema.events).where(events.job == job_id, events.n > after)
        with self._database.reading() as transaction:
            rows = transaction.connection.execute(query.order_by(events.n).limit(limit)).all()
        return tuple(JobEvent(**row._mapping) for row in rows)

    def last_events(self, job_ids: Collection[str]) -> dict[str, tuple[int, JobState]]:
        """The number of each job's last event, and its state, in one query; those gone are left out."""
        jobs = schema.jobs.c
        query = select(jobs.id, jobs.events, jobs.state).where(jobs.id.in_(job_ids), *_visible(None))
        with self._database.reading() as transaction:
            rows = transaction.connection.execute(query).all()
        return {job: (number, JobState(state)) for job, number, state in rows}

    def artifacts(self, job_id: str) -> dict[str, Artifact]:
        """A completed job's files by variant."""
        columns = [schema.artifacts.c[name] for name in _ARTIFACT]
        query = select(*columns).where(schema.artifacts.c.job == job_id)
        with self._database.reading() as transaction:
            return {row.variant: Artifact(*row) for row in transaction.connection.execute(query)}

    def queue_position(self, job_id: str) -> int | None:
        """How many queued jobs come before it by priority, begun or not, and age (0: it is next); None: it is
        not queued. Fair share may reorder them.
        """
        jobs = schema.jobs.c
        queued = jobs.state == JobState.QUEUED.value
        begun = case((jobs.attempt > 0, 0), else_=1)
        own = select(jobs.priority, begun, jobs.created_at).where(jobs.id == job_id, queued)
        with self._database.reading() as transaction:
            found = transaction.connection.execute(own).one_or_none()
            if found is None:
                return None
            priority, kind, created_at = found
            older = and_(begun == kind, or_(jobs.created_at < created_at, _tie(created_at, job_id)))
            before = or_(jobs.priority > priority, and_(jobs.priority == priority, or_(begun < kind, older)))
            count = select(func.count()).select_from(schema.jobs).where(queued, before)
            return int(transaction.connection.execute(count).scalar_one())

    def counts(self) -> dict[JobState, int]:
        """Jobs by state; 0 where there are none."""
        state = schema.jobs.c.state
        with self._database.reading() as transaction:
            found = transaction.connection.execute(select(state, func.count()).group_by(state)).all()
        return dict.fromkeys(JobState, 0) | {JobState(name): number for name, number in found}

    def oldest_queued_at(self) -> float | None:
        """When the job that waits longest began to wait; None: none waits."""
        jobs = schema.jobs.c
        query = select(func.min(jobs.queued_at)).where(jobs.state == JobState.QUEUED.value)
        with self._database.reading() as transaction:
            return transaction.connection.execute(query).scalar_one()

    def cancel(self, job_id: str, owner: str | None = None) -> Job:
        """Queued and held jobs end at once; a running one gets event `cancel_requested` once, and ends when
        its worker has stopped. A cancelled job is given back as it is.

        Raises:
            JobMissingError, JobEndedError
        """
        with self._database.writing() as transaction:
            locked = self._locked(transaction, job_id, owner)
            if locked.job.state is not JobState.CANCELLED:
                _require_live(locked.job)
                _wish_to_cancel(locked)
            return locked.save()

    def release(self, job_id: str, owner: str | None = None) -> Job:
        """Let a held job go on: it is queued, and goes before those never begun.

        Raises:
            JobMissingError, JobEndedError
            JobBusyError: it is not held.
        """
        with self._database.writing() as transaction:
            locked = self._locked(transaction, job_id, owner)
            _require_live(locked.job)
            if locked.job.state is not JobState.HELD:
                raise JobBusyError(f"job {job_id} is {locked.job.state}; only a held job can be continued")
            locked.wait(JobState.QUEUED, "queued", {})
            return locked.save()

    def set_priority(self, job_id: str, priority: int, owner: str | None = None) -> Job:
        """Raises JobMissingError, JobEndedError, JobBusyError (it runs)."""
        with self._database.writing() as transaction:
            locked = self._locked(transaction, job_id, owner)
            _require_live(locked.job)
            if locked.job.state is JobState.RUNNING:
                raise JobBusyError(f"job {job_id} runs already; set the priority of a job that waits")
            locked.set(priority=priority)
            return locked.save()

    def delete(self, job_id: str, owner: str | None = None) -> None:
        """A job that does not run goes at once, with its events; a running one is cancelled, is missing from
        now on, and goes when it ends. Its folder is the sweeper's: see `live_folders`.

        Raises:
            JobMissingError
        """
        with self._database.writing() as transaction:
            locked = self._locked(transaction, job_id, owner)
            if locked.job.state is JobState.RUNNING:
                locked.set(deleted_at=transaction.now)
                _wish_to_cancel(locked)
                locked.save()
            else:
                _remove(transaction, [job_id])

    def sweep(self, *, queue_ttl_s: float) -> Swept:
        """End what waited longer than this many seconds (queued: failed with queue_timeout; held: cancelled),
        and remove rows that expired. Any process may do it, at any time.
        """
        jobs = schema.jobs.c
        with self._database.writing() as transaction:
            late = jobs.queued_at < transaction.now - queue_ttl_s
            timed_out = self._lock_some(transaction, and_(jobs.state == JobState.QUEUED.value, late))
            for locked in timed_out:
                failure = JobFailure(
                    "queue_timeout", f"no worker took it for {queue_ttl_s:g} s", next="submit it again"
                )
                locked.end(JobState.FAILED, {"code": failure.code}, failure=failure)
                locked.save()
            held = self._lock_some(transaction, and_(jobs.state == JobState.HELD.value, late))
            for locked in held:
                locked.end(JobState.CANCELLED)
                locked.save()
            expired = self._lock_some(
                transaction,
                and_(jobs.state.in_([state.value for state in ENDED]), jobs.expires_at <= transaction.now),
            )
            _remove(transaction, [locked.job.id for locked in expired])
            sent = schema.deliveries.c.done_at < transaction.now - self._retention_s
            transaction.connection.execute(sql_delete(schema.deliveries).where(sent))
        return Swept(*(tuple(locked.job.id for locked in some) for some in (timed_out, held, expired)))

    def live_folders(self, job_ids: Collection[str]) -> dict[str, frozenset[int]]:
        """For each job, the fences whose folders (`jobs/ID/FENCE`) must stay: the newest of a job that has
        not ended, and those with a checkpoint or an artifact. A job left out has no row: its whole folder may
        go.
        List the folders first, then ask: what is claimed in between is not among those listed.
        """
        jobs = schema.jobs.c
        artifacts = schema.artifacts.c
        with self._database.reading() as transaction:
            rows = transaction.connection.execute(
                select(jobs.id, jobs.state, jobs.fence, jobs.checkpoints).where(jobs.id.in_(job_ids))
            ).all()
            files = transaction.connection.execute(
                select(artifacts.job, artifacts.fence).where(artifacts.job.in_(job_ids))
            ).all()
        fences = {
            row.id: {saved["fence"] for saved in row.checkpoints}
            | ({row.fence} if row.state in LIVE else set())
            for row in rows
        }
        for job_id, fence in files:
            fences[job_id].add(fence)
        return {job_id: frozenset(found) for job_id, found in fences.items()}

    def now(self) -> float:
        """The store's clock."""
        with self._database.reading() as transaction:
            return transaction.now

    def close(self) -> None:
        """Give the connections back."""
        self._database.close()

    def _locked(self, transaction: Transaction, job_id: str, owner: str | None) -> LockedJob:
        locked = lock_job(transaction, job_id, self._retention_s)
        if locked is None or locked.job.deleted_at is not None or owner not in (None, locked.job.owner):
            raise _missing(job_id)
        return locked

    def _lock_some(self, transaction: Transaction, which: ColumnElement[bool]) -> list[LockedJob]:
        query = select(schema.jobs).where(which).order_by(schema.jobs.c.id).limit(_SWEPT_AT_ONCE)
        rows = transaction.connection.execute(query.with_for_update(skip_locked=True)).all()
        return [LockedJob(transaction, job_of(row), self._retention_s) for row in rows]


def _visible(owner: str | None) -> list[ColumnElement[bool]]:
    there = schema.jobs.c.deleted_at.is_(None)
    return [there] if owner is None else [there, schema.jobs.c.owner == owner]


def _tie(created_at: float, job_id: str) -> ColumnElement[bool]:
    return and_(schema.jobs.c.created_at == created_at, schema.jobs.c.id < job_id)


def _missing(job_id: str) -> JobMissingError:
    return JobMissingError(f"there is no job {job_id}")


def _require_live(job: Job) -> None:
    if job.state.ended:
        raise JobEndedError(f"job {job.id} is {job.state} already; retry makes a new job of it")


def _wish_to_cancel(locked: LockedJob) -> None:
    if locked.job.state is not JobState.RUNNING:
        locked.end(JobState.CANCELLED)
    elif locked.job.cancel_requested_at is None:
        locked.set(cancel_requested_at=locked.transaction.now)
        locked.add_event("cancel_requested")


def _remove(transaction: Transaction, job_ids: list[str]) -> None:
    """Rows of jobs, and by cascade their events and artifacts."""
    transaction.connection.execute(sql_delete(schema.jobs).where(schema.jobs.c.id.in_(job_ids)))
