"""One database behind the store: transactions, its clock, and what sets SQLite and PostgreSQL apart.

Knows no table's meaning but that of counters. On SQLite a writer begins with BEGIN IMMEDIATE, so writers
take turns. On PostgreSQL writers lock the rows that they change, and those of the queue (submit, claim) take
turns by an advisory lock, which makes quotas exact.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, func, inspect, select, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import (
    ArgumentError,
    DatabaseError,
    DBAPIError,
    InterfaceError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from chitu_diffusion.errors import UsageError
from chitu_diffusion.service.counters import Series, add_to_counters
from chitu_diffusion.service.jobs import StoreDownError

Clock = Callable[[], float]
Observer = Callable[[str, float], None]
"""(kind of a transaction: read, write or queue; its seconds)"""
NETWORK_FILE_SYSTEMS = frozenset(
    {"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "ceph", "gpfs", "beegfs", "afs", "glusterfs"}
    | {"fuse.glusterfs", "fuse.sshfs"}
)
_QUEUE_LOCK = 0x63686974
"""Any number; PostgreSQL's advisory lock of the queue."""
_BUSY_S = 30.0
_CONNECT_S = 5


@dataclass(frozen=True)
class Transaction:
    """A connection inside a transaction, and the store's time at its begin."""

    connection: Connection
    now: float
    _grown: dict[Series, float] = field(default_factory=dict)

    def count(self, key: Series, by: float = 1.0) -> None:
        """A counter grows. Its row is written last, in order: so transactions wait for each other in turn."""
        self._grown[key] = self._grown.get(key, 0.0) + by

    def write_counters(self) -> None:
        """What was counted."""
        if self._grown:
            add_to_counters(self.connection, self._grown)


class Database:
    """An engine and its clock.

    Args:
        url: SQLAlchemy's, for SQLite or PostgreSQL.
        clock: seconds since 1970, for tests; None is the usual one.

    Raises:
        UsageError: a bad URL, a missing driver, SQLite on a network file system.
    """

    def __init__(self, url: str, clock: Clock | None = None) -> None:
        self.url = _checked(url)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.observer: Observer = _to_nobody
        self._clock = clock or (steady_clock() if self.is_sqlite else None)
        self.engine = _sqlite_engine(self.url) if self.is_sqlite else _postgres_engine(self.url)

    def revision(self) -> str | None:
        """The schema that the tables are of; None: there are none."""
        with self.reading() as now:
            if not inspect(now.connection).has_table("alembic_version"):
                return None
            found = now.connection.execute(text("SELECT version_num FROM alembic_version"))
            return found.scalar_one_or_none()

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """A transaction that changes nothing, and waits for no writer."""
        with self._timed("read"), _down_in_words(), self.engine.connect() as connection, connection.begin():
            yield Transaction(connection, self._now(connection))

    @contextmanager
    def writing(self, *, queue: bool = False) -> Iterator[Transaction]:
        """A transaction that is on disk when the block ends, or leaves nothing after an error.

        Args:
            queue: alone among those that look at the whole queue.
        """
        with self._timed("queue" if queue else "write"), _down_in_words(), self.engine.connect() as plain:
            connection = plain.execution_options(chitu_writes=True)
            with connection.begin():
                if queue and not self.is_sqlite:
                    connection.execute(select(func.pg_advisory_xact_lock(_QUEUE_LOCK)))
                transaction = Transaction(connection, self._now(connection))
                yield transaction
                transaction.write_counters()

    @contextmanager
    def _timed(self, kind: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.observer(kind, time.monotonic() - began)

    def _now(self, connection: Connection) -> float:
        if self._clock is not None:
            return self._clock()
        return float(connection.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


def _to_nobody(kind: str, seconds: float) -> None:
    """Nobody observes."""


def steady_clock() -> Clock:
    """The wall clock as it is now, going on at its own pace whatever is done to the wall clock later."""
    start = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)
    return lambda: start + time.clock_gettime(time.CLOCK_BOOTTIME)


def file_system(folder: Path, mounts: str) -> str:
    """The type of the file system that a folder lies on, "" where that cannot be told.

    Args:
        mounts: the text of /proc/self/mountinfo.
    """
    best = ("", "")
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        fields = before.split()
        if len(fields) < 5 or not after:
            continue
        point = fields[4].encode().decode("unicode_escape")
        if folder.is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, after.split()[0])
    return best[1]


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        parsed = None
    if parsed is None or parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise UsageError(
            "service.store is no URL of a database that is known; use sqlite:///FOLDER/chitu.db or "
            "postgresql+psycopg://USER@HOST/NAME",
            field="service.store",
        )
    if parsed.get_backend_name() == "postgresql":
        return parsed.set(drivername="postgresql+psycopg")
    if not parsed.database or parsed.database == ":memory:":
        raise UsageError(
            "service.store: jobs must outlive the process; name a file: sqlite:///FOLDER/chitu.db",
            field="service.store",
        )
    _require_local(Path(parsed.database).absolute().parent)
    return parsed


def _require_local(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        if not folder.is_dir():
            raise UsageError(
                f"service.store: cannot make {folder}: {error.strerror}; use another folder",
                field="service.store",
            ) from error
        mounts = ""
    kind = file_system(folder.resolve(), mounts)
    if kind in NETWORK_FILE_SYSTEMS:
        raise UsageError(
            f"service.store: {folder} is on a network file system ({kind}), where SQLite loses data; use a "
            "local folder, or postgresql+psycopg://USER@HOST/NAME",
            field="service.store",
        )


def _sqlite_engine(url: URL) -> Engine:
    engine = create_engine(url, connect_args={"timeout": _BUSY_S})

    @event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not by the driver's guess
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("chitu_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgres_engine(url: URL) -> Engine:
    try:
        return create_engine(url, pool_pre_ping=True, connect_args={"connect_timeout": _CONNECT_S})
    except (ImportError, NoSuchModuleError) as error:
        raise UsageError(
            "service.store: PostgreSQL needs its driver; pip install 'chitu_diffusion[serve,postgres]'",
            field="service.store",
        ) from error


@contextmanager
def _down_in_words() -> Iterator[None]:
    """A database that cannot be reached is a StoreDownError, whose words show no URL and no statement."""
    try:
        yield
    except (OperationalError, InterfaceError, PoolTimeoutError) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise StoreDownError(
            f"the database does not answer ({type(cause).__name__}); nothing was changed: look at its log, "
            "and try again"
        ) from error
    except DatabaseError as error:
        if type(error.orig) is not sqlite3.DatabaseError:  # SQLite's for a file that is damaged, or another's
            raise
        raise StoreDownError(
            f"the database's file cannot be used ({error.orig}); restore it from a backup, or name another"
        ) from error


def sqlite_file(url: URL) -> Path:
    """The file of an SQLite database."""
    return Path(os.path.abspath(str(url.database)))
