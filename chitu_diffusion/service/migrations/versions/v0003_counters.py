"""What supervisors and the store count, for /metrics."""

from alembic import op
from sqlalchemy import Column, Double, String

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "counters",
        Column("name", String, primary_key=True),
        Column("labels", String, primary_key=True),
        Column("value", Double, nullable=False),
    )
