"""What each owner was served, for fair shares; owners that are there begin alike."""

from alembic import op
from sqlalchemy import Column, Double, Integer, String

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "owners",
        Column("owner", String, primary_key=True),
        Column("served_s", Double, nullable=False),
        Column("max_running", Integer),
    )
    op.execute("INSERT INTO owners (owner, served_s) SELECT DISTINCT owner, 0.0 FROM jobs")
