"""Jobs, their events and files, workers, keys, webhooks."""

from alembic import op
from sqlalchemy import JSON, BigInteger, Column, Double, ForeignKey, Integer, String, UniqueConstraint

revision = "0001"
down_revision = None
_DATA = JSON(none_as_null=True)


def upgrade() -> None:
    _jobs()
    _of_jobs()
    _others()


def _jobs() -> None:
    op.create_table(
        "jobs",
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
    )
    op.create_index("ix_jobs_queue", "jobs", ["state", "priority", "created_at"])
    op.create_index("ix_jobs_owner", "jobs", ["owner", "created_at"])
    op.create_index("ix_jobs_lease", "jobs", ["lease_until"])
    op.create_index("ix_jobs_expiry", "jobs", ["expires_at"])


def _of_jobs() -> None:
    op.create_table(
        "events",
        Column("job", String, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        Column("n", Integer, primary_key=True, autoincrement=False),
        Column("at", Double, nullable=False),
        Column("kind", String, nullable=False),
        Column("data", _DATA, nullable=False),
    )
    op.create_table(
        "artifacts",
        Column("job", String, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
        Column("variant", String, primary_key=True),
        Column("path", String, nullable=False),
        Column("bytes", BigInteger, nullable=False),
        Column("sha256", String, nullable=False),
        Column("media_type", String, nullable=False),
        Column("fence", Integer, nullable=False),
    )


def _others() -> None:
    op.create_table(
        "workers",
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
    op.create_table(
        "keys",
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
    op.create_table(
        "deliveries",
        Column("id", String, primary_key=True),
        Column("job", String, nullable=False),
        Column("n", Integer, nullable=False),
        Column("url", String, nullable=False),
        Column("body", _DATA, nullable=False),
        Column("attempt", Integer, nullable=False),
        Column("next_at", Double),
        Column("done_at", Double),
        Column("last_status", Integer),
    )
    op.create_index("ix_deliveries_next", "deliveries", ["next_at"])
