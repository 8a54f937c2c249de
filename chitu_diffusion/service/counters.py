"""Figures that only grow, kept in the store so that every front says the same of all processes, dead ones
included: a row has a series' name, its labels as JSON, and its value. No Prometheus, no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from sqlalchemy import Connection
from sqlalchemy.dialects import postgresql, sqlite

from chitu_diffusion.service import schema

JOBS_ENDED = "chitu_jobs_total"
"""Counted where a job ends, in its transaction."""
Series = tuple[str, str]
"""(name, labels as JSON with sorted names)."""


def series(name: str, labels: Mapping[str, str]) -> Series:
    """The key of a row."""
    return name, json.dumps(dict(labels), sort_keys=True, ensure_ascii=False)


def add_to_counters(connection: Connection, grown: Mapping[Series, float]) -> None:
    """In the transaction that runs. Rows are taken in order, so that no two wait for each other."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    new = insert(schema.counters)
    value = schema.counters.c.value + new.excluded.value
    adding = new.on_conflict_do_update(index_elements=["name", "labels"], set_={"value": value})
    rows = [{"name": name, "labels": labels, "value": by} for (name, labels), by in sorted(grown.items())]
    connection.execute(adding, rows)
