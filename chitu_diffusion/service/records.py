"""The store's smaller tables: API keys, workers' rows, counters, and the webhooks to send."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row, insert, select, update
from sqlalchemy import delete as sql_delete

from chitu_diffusion.service import schema
from chitu_diffusion.service.counters import Series
from chitu_diffusion.service.database import Database
from chitu_diffusion.service.jobs import ApiKey, Delivery, OwnerLimits, WorkerInfo, delivery_delay

_LIMITS = tuple(field.name for field in dataclasses.fields(OwnerLimits))


class KeyTable:
    """API keys: their hashes, scopes and limits."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, key: ApiKey) -> ApiKey:
        """A new key; `created_at` is now."""
        with self._database.writing() as transaction:
            key = dataclasses.replace(key, created_at=transaction.now)
            values = {field.name: getattr(key, field.name) for field in dataclasses.fields(key)}
            values |= dataclasses.asdict(values.pop("limits")) | {"scopes": list(key.scopes)}
            transaction.connection.execute(insert(schema.keys).values(**values))
        return key

    def get(self, key_id: str) -> ApiKey | None:
        """None: there is none. Whether it was revoked is in it."""
        with self._database.reading() as transaction:
            found = transaction.connection.execute(
                select(schema.keys).where(schema.keys.c.id == key_id)
            ).one_or_none()
        return None if found is None else _key_of(found)

    def all(self) -> tuple[ApiKey, ...]:
        """The oldest first."""
        query = select(schema.keys).order_by(schema.keys.c.created_at, schema.keys.c.id)
        with self._database.reading() as transaction:
            return tuple(_key_of(row) for row in transaction.connection.execute(query))

    def revoke(self, key_id: str) -> bool:
        """False: there is none. The first revocation's time stays."""
        return self._stamp(key_id, "revoked_at", first=True)

    def touch(self, key_id: str) -> None:
        """It was used now."""
        self._stamp(key_id, "last_used_at", first=False)

    def _stamp(self, key_id: str, column: str, *, first: bool) -> bool:
        keys = schema.keys.c
        with self._database.writing() as transaction:
            there = transaction.connection.execute(
                select(keys[column]).where(keys.id == key_id)
            ).one_or_none()
            if there is not None and (there[0] is None or not first):
                transaction.connection.execute(
                    update(schema.keys).where(keys.id == key_id).values({column: transaction.now})
                )
        return there is not None


class WorkerTable:
    """Workers, as they say of themselves."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, worker: WorkerInfo) -> None:
        """Add or replace; `seen_at` is now."""
        with self._database.writing() as transaction:
            values = {field.name: getattr(worker, field.name) for field in dataclasses.fields(worker)}
            values |= {"fits": dict(worker.fits), "seen_at": transaction.now}
            there = schema.workers.c.id == worker.id
            if (
                transaction.connection.execute(update(schema.workers).where(there).values(**values)).rowcount
                == 0
            ):
                transaction.connection.execute(insert(schema.workers).values(**values))

    def all(self) -> tuple[WorkerInfo, ...]:
        """By id."""
        query = select(schema.workers).order_by(schema.workers.c.id)
        with self._database.reading() as transaction:
            return tuple(WorkerInfo(**row._mapping) for row in transaction.connection.execute(query))

    def remove(self, worker_id: str) -> None:
        """It has gone; nothing where there is none."""
        with self._database.writing() as transaction:
            transaction.connection.execute(sql_delete(schema.workers).where(schema.workers.c.id == worker_id))


class Outbox:
    """Webhooks to send; rows come with the transaction that ends a job."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def claim(self, limit: int = 10, lease_s: float = 30.0) -> tuple[Delivery, ...]:
        """Deliveries that are due, the longest due first; no other sender gets them for `lease_s` seconds."""
        rows = schema.deliveries.c
        with self._database.writing() as transaction:
            due = transaction.connection.execute(
                select(rows.id, rows.job, rows.n, rows.url, rows.body, rows.attempt)
                .where(rows.done_at.is_(None), rows.next_at <= transaction.now)
                .order_by(rows.next_at, rows.id)
                .limit(limit)
                .with_for_update(skip_locked=True)
            ).all()
            taken = tuple(Delivery(*row[:-1], attempt=row.attempt + 1) for row in due)
            for delivery in taken:
                transaction.connection.execute(
                    update(schema.deliveries)
                    .where(rows.id == delivery.id)
                    .values(attempt=delivery.attempt, next_at=transaction.now + lease_s)
                )
        return taken

    def done(self, delivery: Delivery, status: int) -> None:
        """It was taken, with this HTTP status."""
        self._settle(delivery, status, None)

    def failed(self, delivery: Delivery, status: int | None) -> float | None:
        """Seconds until it is tried again; None: it is given up."""
        delay = delivery_delay(delivery.attempt)
        self._settle(delivery, status, delay)
        return delay

    def _settle(self, delivery: Delivery, status: int | None, delay: float | None) -> None:
        """One that another sender has claimed since is left to it."""
        rows = schema.deliveries.c
        with self._database.writing() as transaction:
            now = transaction.now
            again = {"done_at": now} if delay is None else {"next_at": now + delay}
            transaction.connection.execute(
                update(schema.deliveries)
                .where(rows.id == delivery.id, rows.attempt == delivery.attempt)
                .values(last_status=status, **again)
            )


class CounterTable:
    """Counters of all processes together."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, grown: Mapping[Series, float]) -> None:
        """By how much each has grown."""
        with self._database.writing() as transaction:
            for key, by in grown.items():
                transaction.count(key, by)

    def all(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        """(labels, value) by name."""
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        with self._database.reading() as transaction:
            for row in transaction.connection.execute(select(schema.counters)):
                found.setdefault(row.name, []).append((json.loads(row.labels), row.value))
        return found


def _key_of(row: Row[Any]) -> ApiKey:
    values = dict(row._mapping)
    limits = OwnerLimits(**{name: values.pop(name) for name in _LIMITS})
    return ApiKey(**values | {"scopes": tuple(values["scopes"]), "limits": limits})
