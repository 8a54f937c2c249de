"""Brings a database's tables to the schema that this program works on, and refuses a newer one.

The steps are Alembic's, plain files in `migrations/versions`; Alembic is imported only where there are any
to take. Each revision's steps are one transaction.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from chitu_diffusion.files.atomic import new_file
from chitu_diffusion.service.database import Database, sqlite_file
from chitu_diffusion.service.jobs import SchemaError
from chitu_diffusion.service.schema import REVISIONS

MIGRATIONS = Path(__file__).parent / "migrations"


def bring_up_to_date(database: Database, *, asked: bool, revision: str = REVISIONS[-1]) -> Path | None:
    """Migrate the tables.

    Args:
        asked: False refuses tables that are older, or not there.
        revision: where to, one of `REVISIONS`.

    Returns:
        the copy of an SQLite database that was made before its tables changed, where there were some.

    Raises:
        SchemaError: the tables are newer than this program, or older and it was not asked to.
    """
    found = database.revision()
    if found == revision:
        return None
    if found is not None and found not in REVISIONS:
        raise SchemaError(
            f"the database's tables are of version {found}, and this program knows up to {REVISIONS[-1]}: a "
            "newer one made them; install that, or name another database with --store",
            field="service.store",
        )
    if not asked:
        has = "has no tables yet" if found is None else f"has tables of version {found}, not {revision}"
        raise SchemaError(
            f"the database {has}; run 'chitu store migrate --store URL' once", field="service.store"
        )
    copy = _backup(sqlite_file(database.url), found) if database.is_sqlite and found else None
    _upgrade(database, revision)
    return copy


def _backup(file: Path, revision: str) -> Path:
    """A whole copy of a database that may be in use, beside it."""
    target = file.with_name(f"{file.name}.{revision}.backup")
    with (
        new_file(target) as part,
        closing(sqlite3.connect(file)) as source,
        closing(sqlite3.connect(part)) as copy,
    ):
        source.backup(copy)
    return target


def _upgrade(database: Database, revision: str) -> None:
    from alembic import command
    from alembic.config import Config
    from sqlalchemy.exc import DBAPIError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with database.writing(queue=True) as transaction:
        config.attributes["connection"] = transaction.connection
        try:
            command.upgrade(config, revision)
        except DBAPIError as error:
            raise SchemaError(
                f"the tables could not be migrated ({type(error.orig).__name__}: {error.orig}) and are as "
                "they were; mend that, and run 'chitu store migrate' again",
                field="service.store",
            ) from error
