"""Stores of jobs for the tests, on SQLite and on PostgreSQL: fixtures that every test may use.

A PostgreSQL server lives in a folder of its own, listens on a Unix socket alone, and ends with the tests.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from chitu_diffusion.service.store import JobStore

MakeUrl = Callable[[], str]
MISSING = (
    "PostgreSQL is not installed: the store's tests on it are LEFT OUT; 'apt-get install postgresql' as root"
)


@dataclass
class FakeClock:
    """Seconds since 1970, as a test sets them."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> float:
        self.now += seconds
        return self.now


def postgres_folder() -> Path | None:
    """Where the server's programs are, the newest first; None: nowhere."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next(
        (place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None
    )


@contextmanager
def postgres_server() -> Iterator[str | None]:
    """The URL of a fresh server's socket, with `{name}` for a database; None, said loudly, without one."""
    programs = postgres_folder()
    if programs is None:
        warnings.warn(MISSING, stacklevel=2)
        print(f"\n*** {MISSING} ***", file=sys.__stderr__)
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="chitu-pg-", dir="/tmp"))  # a socket's path has 107 characters
    as_user: list[str] = []
    if os.geteuid() == 0:  # the server refuses to run as root
        as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        shutil.chown(folder, "nobody", "nogroup")
    data = folder / "data"
    quick = "-c fsync=off -c full_page_writes=off -c synchronous_commit=off"
    options = f"-c listen_addresses='' -c unix_socket_directories={folder} {quick}"
    run(
        [*as_user, programs / "initdb", "-D", data, "--no-sync", "-A", "trust", "-U", "chitu", "-E", "UTF8"],
        folder,
    )
    control = [*as_user, programs / "pg_ctl", "-D", data, "-w", "-s"]
    run([*control, "-l", folder / "log", "-o", options, "start"], folder)
    try:
        yield f"postgresql+psycopg://chitu@/{{name}}?host={folder}"
    finally:
        with suppress(subprocess.CalledProcessError):
            run([*control, "-m", "immediate", "stop"], folder)
        shutil.rmtree(folder, ignore_errors=True)


def run(command: list[object], folder: Path) -> None:
    subprocess.run(
        [str(part) for part in command], cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60
    )


def make_database(server: str, name: str) -> str:
    """A new, empty database's URL."""
    from sqlalchemy import create_engine, text

    engine = create_engine(server.format(name="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    engine.dispose()
    return server.format(name=name)


@pytest.fixture(scope="session")
def postgres() -> Iterator[str | None]:
    """A server of this test process, or None."""
    with postgres_server() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgres"])
def fresh_url(request: pytest.FixtureRequest, tmp_path: Path) -> MakeUrl:
    """Makes the URL of a new, empty database."""
    if request.param == "sqlite":
        return lambda: f"sqlite:///{tmp_path}/{secrets.token_hex(4)}/chitu.db"
    server = request.getfixturevalue("postgres")
    if server is None:
        pytest.skip(MISSING)
    return lambda: make_database(server, f"t{secrets.token_hex(4)}")


@pytest.fixture
def fake_clock() -> FakeClock:
    """Stands still until a test moves it."""
    return FakeClock()


@pytest.fixture
def job_store(fresh_url: MakeUrl, fake_clock: FakeClock) -> Iterator[JobStore]:
    """An empty store on each database, whose time is the clock's."""
    from chitu_diffusion.service.store import open_store

    url = fresh_url()
    migrate(url)
    found = open_store(url, clock=fake_clock, most_queued=50, retention_s=1000)
    yield found
    found.close()


def migrate(url: str) -> None:
    """What `chitu store migrate` does."""
    from chitu_diffusion.service.database import Database
    from chitu_diffusion.service.migrate import bring_up_to_date

    database = Database(url)
    bring_up_to_date(database, asked=True)
    database.close()
