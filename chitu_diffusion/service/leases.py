"""The runners' side of the store: claims, heartbeats and ends of leases, each under its fence."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

from sqlalchemy import Select, and_, case, func, insert, or_, select

from chitu_diffusion.service import schema
from chitu_diffusion.service.database import Database
from chitu_diffusion.service.jobs import (
    Artifact,
    Beat,
    Claimed,
    Job,
    JobCheckpoint,
    JobFailure,
    JobLease,
    JobProgress,
    JobState,
    LeaseLostError,
    is_poison,
    is_progress,
    keep_checkpoints,
    retry_delay,
)
from chitu_diffusion.service.rows import LockedJob, job_of, lock_job


class LeaseTable:
    """Who runs jobs. Every method but `claim` and `held_by` takes a lease, and raises LeaseLostError without
    changing a row where its fence is not the job's, or the job does not run.

    A wish to cancel decides how a lease ends: whatever its holder says (even `complete`), the job is
    cancelled. So each method that ends a lease gives the job as it is after.
    """

    def __init__(self, database: Database, retention_s: float) -> None:
        self._database = database
        self._retention_s = retention_s

    def claim(
        self, worker: str, models: Collection[str], *, lease_s: float = 30.0, gpus: int = 1
    ) -> Claimed | None:
        """The job to run next, or None. By priority; of one priority those begun before, then of the owner
        with the fewest running jobs, then with the least served seconds, then the oldest.

        A job whose lease ran out is taken over; that counts as a death of its worker, with event
        `worker_lost`. Event `started` {worker, attempt, from_step}.

        Args:
            worker: the claimer's id.
            models: those that it can run.
            gpus: that it runs them on, for what its owner is served.
        """
        with self._database.writing(queue=True) as transaction:
            while found := transaction.connection.execute(_next_job(transaction.now, models)).one_or_none():
                locked = LockedJob(transaction, job_of(found), self._retention_s)
                if locked.job.state is JobState.QUEUED or _taken_over(locked):
                    return _claimed(locked, worker, lease_s, gpus)
                locked.save()
        return None

    def held_by(self, worker: str) -> tuple[JobLease, ...]:
        """Leases that a worker of this id still has: a restarted supervisor ends those of its own slot."""
        jobs = schema.jobs.c
        query = select(jobs.id, jobs.fence, jobs.worker, jobs.lease_until).where(
            jobs.state == JobState.RUNNING.value, jobs.worker == worker
        )
        with self._database.reading() as transaction:
            return tuple(JobLease(*row) for row in transaction.connection.execute(query))

    def beat(self, lease: JobLease, *, lease_s: float = 30.0) -> Beat:
        """Keep a lease, and hear what the clients wish."""
        with self._leased(lease) as locked:
            locked.charge()
            until = locked.transaction.now + lease_s
            locked.set(lease_until=until, charged_at=locked.transaction.now)
            job = locked.job
        wish = job.cancel_requested_at is not None
        return Beat(dataclasses.replace(lease, until=until), wish, job.hold_at_step)

    def event(
        self,
        lease: JobLease,
        kind: str,
        data: Mapping[str, object] | None = None,
        progress: JobProgress | None = None,
    ) -> int:
        """Add an event and set the progress; gives its number."""
        with self._leased(lease) as locked:
            if progress is not None:
                values = dataclasses.asdict(progress)
                locked.set(**{name: value for name, value in values.items() if value is not None})
            return locked.add_event(kind, data)

    def checkpoint(self, lease: JobLease, saved: JobCheckpoint) -> Job:
        """A checkpoint is on disk; event `checkpoint` {step}. Beyond the earlier ones, it clears the job of
        its deaths and its retries.
        """
        with self._leased(lease) as locked:
            kept = locked.job.checkpoints
            if is_progress(kept, saved):
                locked.set(deaths_without_progress=0, tries=0)
            locked.set(checkpoints=keep_checkpoints(kept, dataclasses.replace(saved, fence=lease.fence)))
            locked.add_event("checkpoint", {"step": saved.step})
        return locked.job

    def park(self, lease: JobLease) -> Job:
        """Give the job back unharmed (drain, preemption); event `parked`. Save a checkpoint first."""
        with self._leased(lease) as locked:
            if not _cancelled(locked):
                locked.wait(JobState.QUEUED, "parked", {"step": locked.job.step})
        return locked.job

    def worker_lost(
        self, lease: JobLease, *, signal: str = "", stage: str | None = None, step: int | None = None
    ) -> Job:
        """The worker died; event `worker_lost` {signal, stage, step}. Queued again, or failed where the job
        is poison.
        """
        with self._leased(lease) as locked:
            _count_death(locked, {"signal": signal, "stage": stage, "step": step})
            if not _ended_by_death(locked):
                locked.wait(JobState.QUEUED, "queued", {})
        return locked.job

    def retry(self, lease: JobLease, failure: JobFailure) -> Job:
        """A fault that may pass (disk full, rank lost): queued again after 5 s, 30 s, 2 min; then failed.
        Event `queued` {code, message, after_s}.
        """
        with self._leased(lease) as locked:
            tries = locked.job.tries + 1
            delay = retry_delay(tries)
            if not _cancelled(locked) and delay is None:
                _fail(locked, failure)
            elif delay is not None and not locked.job.state.ended:
                data = {"code": failure.code, "message": failure.message, "after_s": delay}
                at = locked.transaction.now + delay
                locked.wait(JobState.QUEUED, "queued", data, tries=tries, not_before=at)
        return locked.job

    def hold(self, lease: JobLease) -> Job:
        """`hold_at_step` was reached: held until it is released; event `held`. Save a checkpoint first."""
        with self._leased(lease) as locked:
            if not _cancelled(locked):
                locked.wait(JobState.HELD, "held", {"step": locked.job.step}, hold_at_step=None)
        return locked.job

    def complete(
        self, lease: JobLease, artifacts: Sequence[Artifact], *, seconds: Mapping[str, float] | None = None
    ) -> Job:
        """Done: artifacts, expiry, webhook and event in one transaction. The files are whole by now."""
        with self._leased(lease) as locked:
            if not _cancelled(locked):
                for artifact in artifacts:
                    row = dataclasses.asdict(artifact) | {"job": lease.job, "fence": lease.fence}
                    locked.transaction.connection.execute(insert(schema.artifacts).values(**row))
                locked.end(JobState.COMPLETED, fraction=1.0, seconds=dict(seconds or {}), checkpoints=())
        return locked.job

    def fail(self, lease: JobLease, failure: JobFailure) -> Job:
        """It cannot be done; event `failed`."""
        with self._leased(lease) as locked:
            if not _cancelled(locked):
                _fail(locked, failure)
        return locked.job

    def cancelled(self, lease: JobLease) -> Job:
        """Work on it has stopped after a wish to cancel; event `cancelled`."""
        with self._leased(lease) as locked:
            locked.end(JobState.CANCELLED)
        return locked.job

    @contextmanager
    def _leased(self, lease: JobLease) -> Iterator[LockedJob]:
        with self._database.writing() as transaction:
            locked = lock_job(transaction, lease.job, self._retention_s)
            if locked is None or locked.job.state is not JobState.RUNNING or locked.job.fence != lease.fence:
                raise LeaseLostError(
                    f"job {lease.job}: lease {lease.fence} of {lease.worker} is over; stop its work"
                )
            yield locked
            locked.save()


def _next_job(now: float, models: Collection[str]) -> Select[tuple[object, ...]]:
    """The one row to claim, locked; on PostgreSQL rows that others have locked are passed over."""
    jobs = schema.jobs.c
    owners = schema.owners.c
    is_running = jobs.state == JobState.RUNNING.value
    running = (
        select(jobs.owner, func.count().label("number")).where(is_running).group_by(jobs.owner).subquery()
    )
    number = func.coalesce(running.c.number, 0)
    is_due = and_(
        jobs.state == JobState.QUEUED.value,
        or_(jobs.not_before.is_(None), jobs.not_before <= now),
        or_(owners.max_running.is_(None), number < owners.max_running),
    )
    joined = schema.jobs.outerjoin(running, running.c.owner == jobs.owner).outerjoin(
        schema.owners, owners.owner == jobs.owner
    )
    return (
        select(schema.jobs)
        .select_from(joined)
        .where(jobs.model.in_(models), or_(is_due, and_(is_running, jobs.lease_until < now)))
        .order_by(
            jobs.priority.desc(),
            case((jobs.attempt > 0, 0), else_=1),
            number,
            func.coalesce(owners.served_s, 0.0),
            jobs.created_at,
            jobs.id,
        )
        .limit(1)
        .with_for_update(skip_locked=True, of=schema.jobs)
    )


def _claimed(locked: LockedJob, worker: str, lease_s: float, gpus: int) -> Claimed:
    """The lease of a job's next attempt."""
    now = locked.transaction.now
    attempt = locked.job.attempt + 1
    fence = locked.job.fence + 1
    locked.set(state=JobState.RUNNING, worker=worker, attempt=attempt, fence=fence, gpus=gpus)
    locked.set(claimed_at=now, charged_at=now, lease_until=now + lease_s, not_before=None)
    saved = locked.job.checkpoint
    from_step = 0 if saved is None else saved.step
    locked.add_event("started", {"worker": worker, "attempt": attempt, "from_step": from_step})
    return Claimed(JobLease(locked.job.id, fence, worker, now + lease_s), locked.save())


def _taken_over(locked: LockedJob) -> bool:
    """A job whose lease ran out: whether it may run again; else it has ended."""
    locked.charge()
    _count_death(locked, {"signal": "lease_expired", "stage": locked.job.stage, "step": locked.job.step})
    return not _ended_by_death(locked)


def _count_death(locked: LockedJob, data: Mapping[str, object]) -> None:
    job = locked.job
    locked.set(deaths_without_progress=job.deaths_without_progress + 1, deaths=job.deaths + 1)
    locked.add_event("worker_lost", data)


def _ended_by_death(locked: LockedJob) -> bool:
    """Ends a job that is to be cancelled, or is poison; whether it did."""
    job = locked.job
    if not _cancelled(locked) and is_poison(job.deaths_without_progress, job.deaths):
        _fail(locked, _poison(job))
    return locked.job.state.ended


def _cancelled(locked: LockedJob) -> bool:
    """Ends a job that is to be cancelled; whether it did."""
    if locked.job.cancel_requested_at is None:
        return False
    locked.end(JobState.CANCELLED)
    return True


def _poison(job: Job) -> JobFailure:
    return JobFailure(
        code="worker_lost",
        message=f"its worker died {job.deaths} times, {job.deaths_without_progress} without progress",
        stage=job.stage,
        step=job.step,
        next="try it smaller, or look at the workers' logs",
    )


def _fail(locked: LockedJob, failure: JobFailure) -> None:
    locked.end(JobState.FAILED, {"code": failure.code, "message": failure.message}, failure=failure)
