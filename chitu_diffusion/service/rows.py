"""A job's row under lock: how it becomes a `Job`, gets events, ends its lease and ends. Queries no lists."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row, insert, select, update

from chitu_diffusion.service import schema
from chitu_diffusion.service.counters import JOBS_ENDED, series
from chitu_diffusion.service.database import Transaction
from chitu_diffusion.service.jobs import Job, JobCheckpoint, JobFailure, JobState, may_follow


def job_of(row: Row[Any]) -> Job:
    """A row of `jobs`."""
    values = dict(row._mapping)
    error = values["error"]
    return Job(
        **values
        | {
            "state": JobState(values["state"]),
            "notes": tuple(values["notes"]),
            "checkpoints": tuple(JobCheckpoint(**saved) for saved in values["checkpoints"]),
            "error": None if error is None else JobFailure(**error),
        }
    )


def columns_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a `Job` as its columns hold them."""
    return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, JobCheckpoint | JobFailure):
        return dataclasses.asdict(value)
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, JobState):
        return value.value
    return dict(value) if isinstance(value, Mapping) else value


class LockedJob:
    """One job's row, which nobody else changes until the transaction ends. `save` writes it."""

    def __init__(self, transaction: Transaction, job: Job, retention_s: float) -> None:
        self.transaction = transaction
        self.job = job
        self._retention_s = retention_s
        self._changed: dict[str, Any] = {}

    def set(self, **values: Any) -> None:
        """Change fields.

        Raises:
            ValueError: a state that cannot follow.
        """
        state = values.get("state", self.job.state)
        if state != self.job.state and not may_follow(self.job.state, state):
            raise ValueError(f"job {self.job.id}: {state} cannot follow {self.job.state}")
        self.job = dataclasses.replace(self.job, **values)
        self._changed |= values

    def add_event(self, kind: str, data: Mapping[str, object] | None = None) -> int:
        """The job's next event; its number."""
        self.set(events=self.job.events + 1)
        row = {"job": self.job.id, "n": self.job.events, "at": self.transaction.now, "kind": kind}
        self.transaction.connection.execute(insert(schema.events).values(**row, data=dict(data or {})))
        return self.job.events

    def charge(self) -> None:
        """Count the time since the last count as served, to the job and to its owner; of a lease that ran out
        no more than it was for."""
        job = self.job
        if job.charged_at is None or job.lease_until is None:
            return
        until = min(self.transaction.now, job.lease_until)
        served = max(0.0, until - job.charged_at) * max(1, job.gpus)
        self.set(served_s=job.served_s + served, charged_at=max(until, job.charged_at))
        owner = schema.owners.c
        self.transaction.connection.execute(
            update(schema.owners).where(owner.owner == job.owner).values(served_s=owner.served_s + served)
        )

    def wait(self, state: JobState, kind: str, data: Mapping[str, object], **values: Any) -> None:
        """The lease is over, and the job waits: queued or held."""
        self._end_lease()
        self.set(state=state, queued_at=self.transaction.now, **values)
        self.add_event(kind, data)

    def end(
        self,
        state: JobState,
        data: Mapping[str, object] | None = None,
        *,
        failure: JobFailure | None = None,
        **values: Any,
    ) -> None:
        """The job is over: event, expiry and webhook. A deleted one expires at once."""
        now = self.transaction.now
        self._end_lease()
        kept_s = 0.0 if self.job.deleted_at is not None else self._retention_s
        self.set(state=state, ended_at=now, expires_at=now + kept_s, error=failure, eta_at=None, **values)
        n = self.add_event(state.value, data)
        labels = {"state": state.value, "code": "" if failure is None else failure.code}
        self.transaction.count(series(JOBS_ENDED, labels))
        if self.job.webhook is not None:
            self._deliver(n)

    def _end_lease(self) -> None:
        self.charge()
        self.set(worker=None, lease_until=None, charged_at=None, gpus=0)

    def _deliver(self, n: int) -> None:
        now = self.transaction.now
        delivery = f"{self.job.id}.{n}"
        body = {
            "id": delivery,
            "object": "event",
            "created_at": int(now),
            "type": f"video.{self.job.state.value}",
            "data": {"id": self.job.id},
        }
        row = {"id": delivery, "job": self.job.id, "n": n, "url": self.job.webhook, "body": body}
        self.transaction.connection.execute(insert(schema.deliveries).values(**row, attempt=0, next_at=now))

    def save(self) -> Job:
        """Write what was changed, if anything was."""
        if self._changed:
            there = schema.jobs.c.id == self.job.id
            values = columns_of(self._changed)
            self.transaction.connection.execute(update(schema.jobs).where(there).values(**values))
        return self.job


def lock_job(transaction: Transaction, job_id: str, retention_s: float) -> LockedJob | None:
    """A job's row, once nobody else has it; None: there is none."""
    found = transaction.connection.execute(
        select(schema.jobs).where(schema.jobs.c.id == job_id).with_for_update()
    ).one_or_none()
    return None if found is None else LockedJob(transaction, job_of(found), retention_s)
