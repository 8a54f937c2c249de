"""How a job comes into the queue: the earlier one that is meant, quotas, its owner's share, its row."""

from __future__ import annotations

from typing import Any

from sqlalchemy import func, insert, select, update

from chitu_diffusion.service import schema
from chitu_diffusion.service.database import Transaction
from chitu_diffusion.service.jobs import (
    LIVE,
    IdempotencyConflictError,
    JobState,
    NewJob,
    OwnerLimits,
    QueueFullError,
)

_WAITING = (JobState.QUEUED.value, JobState.HELD.value)
_LIVE = tuple(state.value for state in LIVE)


def insert_job(
    transaction: Transaction, job_id: str, new: NewJob, limits: OwnerLimits, most_queued: int
) -> str:
    """Put a job into the queue under an id, in a transaction that holds the queue; the id of the job that is
    meant, which may be an earlier one.

    Raises:
        IdempotencyConflictError, QueueFullError
    """
    if earlier := _earlier(transaction, new):
        return earlier
    _require_room(transaction, new, limits, most_queued)
    _know_owner(transaction, new.owner, limits)
    row: dict[str, Any] = {
        "id": job_id,
        "owner": new.owner,
        "idempotency_key": new.idempotency_key,
        "body_sha256": new.body_sha256,
        "state": JobState.QUEUED.value,
        "priority": new.priority,
        "model": new.model,
        "request": dict(new.request),
        "resolved": dict(new.resolved),
        "notes": list(new.notes),
        "seed": new.seed,
        "cost": new.cost,
        "parent": new.parent,
        "webhook": new.webhook,
        "created_at": transaction.now,
        "queued_at": transaction.now,
        "hold_at_step": new.hold_at_step,
        "checkpoints": [],
        "seconds": {},
        "events": 1,
    }
    zero = ("attempt", "fence", "gpus", "served_s", "deaths_without_progress", "deaths", "tries")
    transaction.connection.execute(insert(schema.jobs).values(**row, **dict.fromkeys(zero, 0)))
    queued = {"job": job_id, "n": 1, "at": transaction.now, "kind": "queued", "data": {}}
    transaction.connection.execute(insert(schema.events).values(**queued))
    return job_id


def _earlier(transaction: Transaction, new: NewJob) -> str | None:
    """The earlier job that a request means: of its idempotency key, or of a retried create."""
    jobs = schema.jobs.c
    if new.idempotency_key is not None:
        same_key = select(jobs.id, jobs.body_sha256).where(
            jobs.owner == new.owner, jobs.idempotency_key == new.idempotency_key
        )
        found = transaction.connection.execute(same_key).one_or_none()
        if found is not None and found.body_sha256 != new.body_sha256:
            raise IdempotencyConflictError(
                f"this idempotency key is that of job {found.id}, whose request was another; use a new key"
            )
        return None if found is None else found.id
    if new.retried_within_s is None:
        return None
    same_body = select(jobs.id).where(
        jobs.owner == new.owner,
        jobs.body_sha256 == new.body_sha256,
        jobs.deleted_at.is_(None),
        jobs.created_at > transaction.now - new.retried_within_s,
    )
    newest = same_body.order_by(jobs.created_at.desc(), jobs.id).limit(1)
    return transaction.connection.execute(newest).scalar_one_or_none()


def _require_room(transaction: Transaction, new: NewJob, limits: OwnerLimits, most_queued: int) -> None:
    jobs = schema.jobs.c
    waiting = select(func.count()).select_from(schema.jobs).where(jobs.state.in_(_WAITING))
    own = waiting.where(jobs.owner == new.owner)
    cost = select(func.coalesce(func.sum(jobs.cost), 0.0)).where(
        jobs.state.in_(_LIVE), jobs.owner == new.owner
    )
    ask = transaction.connection.execute
    if limits.max_queued is not None and ask(own).scalar_one() >= limits.max_queued:
        raise QueueFullError(
            f"{limits.max_queued} jobs of this key wait already; wait until one has ended", "key_queue_full"
        )
    if limits.max_cost is not None and ask(cost).scalar_one() + new.cost > limits.max_cost:
        raise QueueFullError(
            "the jobs of this key are as much work as it may have; wait until one has ended", "key_queue_full"
        )
    if ask(waiting).scalar_one() >= most_queued:
        raise QueueFullError(f"{most_queued} jobs wait already; try again later", "queue_full")


def _know_owner(transaction: Transaction, owner: str, limits: OwnerLimits) -> None:
    """The owner's row. One without live jobs gets no credit for the time it was away: it begins as the least
    served of those that have some.
    """
    owners = schema.owners.c
    jobs = schema.jobs.c
    ask = transaction.connection.execute
    served = ask(select(owners.served_s).where(owners.owner == owner).with_for_update()).scalar_one_or_none()
    live = select(jobs.owner).where(jobs.state.in_(_LIVE))
    least = ask(select(func.min(owners.served_s)).where(owners.owner.in_(live))).scalar_one() or 0.0
    values: dict[str, Any] = {"max_running": limits.max_running}
    if served is None:
        ask(insert(schema.owners).values(owner=owner, served_s=least, **values))
        return
    if not ask(live.where(jobs.owner == owner).limit(1)).first():
        values["served_s"] = max(served, least)
    ask(update(schema.owners).where(owners.owner == owner).values(**values))
