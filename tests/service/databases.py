"""SQLite and PostgreSQL for the store's tests. A PostgreSQL server lives in a folder of its own, listens on a
Unix socket alone, and ends with the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, text

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
    engine = create_engine(server.format(name="postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f'CREATE DATABASE "{name}"'))
    engine.dispose()
    return server.format(name=name)
