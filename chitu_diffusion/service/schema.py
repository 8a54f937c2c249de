"""The tables, as SQLAlchemy Core's for SQLite and PostgreSQL; no queries. `migrations/` makes them.

Columns of `jobs` have the names of `Job`'s fields. Times are seconds since 1970.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    UniqueConstraint,
)

REVISIONS = ("0001", "0002", "0003")
"""Every schema that this program knows, oldest first; the last is what it works on."""

metadata = MetaData()
_DATA = JSON(none_as_null=True)


def _job_key() -> Column[str]:
    return Column("job", String, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)


jobs = Table(
    "jobs",
    metadata,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("idempotency_key", String),
    Column("body_sha256", String, nullable=False),
    Column("state", String, nullable=False),
    Column("priority", Integer, nullable=False),
    Column("model", String, nullable=False),
    Column("request", _DATA, nullable=False),
    Column("resolved", _DATA, nullable=False),
    Column("notes", _DATA, nullable=False),
    Column("seed", BigInteger),
    Column("cost", Double, nullable=False),
    Column("parent", String),
    Column("webhook", String),
    Column("created_at", Double, nullable=False),
    Column("queued_at", Double, nullable=False),
    Column("claimed_at", Double),
    Column("ended_at", Double),
    Column("expires_at", Double),
    Column("not_before", Double),
    Column("stage", String),
    Column("step", Integer),
    Column("steps", Integer),
    Column("fraction", Double),
    Column("pace_s", Double),
    Column("eta_at", Double),
    Column("worker", String),
    Column("attempt", Integer, nullable=False),
    Column("fence", Integer, nullable=False),
    Column("lease_until", Double),
    Column("charged_at", Double),
    Column("gpus", Integer, nullable=False),
    Column("served_s", Double, nullable=False),
    Column("deaths_without_progress", Integer, nullable=False),
    Column("deaths", Integer, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("cancel_requested_at", Double),
    Column("deleted_at", Double),
    Column("hold_at_step", Integer),
    Column("checkpoints", _DATA, nullable=False),
    Column("error", _DATA),
    Column("seconds", _DATA, nullable=False),
    Column("events", Integer, nullable=False),
    UniqueConstraint("owner", "idempotency_key", name="uq_jobs_owner_key"),
    Index("ix_jobs_queue", "state", "priority", "created_at"),
    Index("ix_jobs_owner", "owner", "created_at"),
    Index("ix_jobs_lease", "lease_until"),
    Index("ix_jobs_expiry", "expires_at"),
)

events = Table(
    "events",
    metadata,
    _job_key(),
    Column("n", Integer, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("kind", String, nullable=False),
    Column("data", _DATA, nullable=False),
)

artifacts = Table(
    "artifacts",
    metadata,
    _job_key(),
    Column("variant", String, primary_key=True),
    Column("path", String, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String, nullable=False),
    Column("media_type", String, nullable=False),
    Column("fence", Integer, nullable=False),
)

workers = Table(
    "workers",
    metadata,
    Column("id", String, primary_key=True),
    Column("host", String, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("model", String, nullable=False),
    Column("state", String, nullable=False),
    Column("layout", String, nullable=False),
    Column("weights_sha256", String, nullable=False),
    Column("fits", _DATA, nullable=False),
    Column("rss", BigInteger, nullable=False),
    Column("gpu_bytes", BigInteger, nullable=False),
    Column("seen_at", Double, nullable=False),
)

keys = Table(
    "keys",
    metadata,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("name", String, nullable=False),
    Column("sha256", String, nullable=False),
    Column("scopes", _DATA, nullable=False),
    Column("max_queued", Integer),
    Column("max_running", Integer),
    Column("max_cost", Double),
    Column("max_priority", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("last_used_at", Double),
    Column("revoked_at", Double),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", String, primary_key=True),
    Column("job", String, nullable=False),  # no foreign key: it is still sent after its job is deleted
    Column("n", Integer, nullable=False),
    Column("url", String, nullable=False),
    Column("body", _DATA, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("next_at", Double),
    Column("done_at", Double),
    Column("last_status", Integer),
    Index("ix_deliveries_next", "next_at"),
)

owners = Table(
    "owners",
    metadata,
    Column("owner", String, primary_key=True),
    Column("served_s", Double, nullable=False),
    Column("max_running", Integer),
)

counters = Table(
    "counters",
    metadata,
    Column("name", String, primary_key=True),
    Column("labels", String, primary_key=True),
    Column("value", Double, nullable=False),
)
