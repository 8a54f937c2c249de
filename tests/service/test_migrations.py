"""Old tables become new ones after a copy; newer ones, and stores that cannot be, are refused in words."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from job_stores import MakeUrl, migrate
from sqlalchemy import text

from chitu_diffusion.errors import UsageError
from chitu_diffusion.service.database import Database, file_system, steady_clock
from chitu_diffusion.service.jobs import NewJob, SchemaError, StoreDownError
from chitu_diffusion.service.migrate import bring_up_to_date
from chitu_diffusion.service.schema import REVISIONS, metadata
from chitu_diffusion.service.store import open_store

OLD_JOB = (
    "INSERT INTO jobs (id, owner, body_sha256, state, priority, model, request, resolved, notes, cost, "
    "created_at, queued_at, attempt, fence, gpus, served_s, deaths_without_progress, deaths, tries, "
    "checkpoints, seconds, events) VALUES ('video_old', 'ann', 'b', 'queued', 0, 'wan', '{}', '{}', '[]', 0, "
    "1, 1, 0, 0, 0, 0, 0, 0, 0, '[]', '{}', 0)"
)


def test_the_migrations_make_the_schema(fresh_url: MakeUrl) -> None:
    url = fresh_url()
    migrate(url)
    database = Database(url)
    with database.writing() as transaction:
        context = MigrationContext.configure(transaction.connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []
    database.close()


@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_old_tables(fresh_url: MakeUrl, revision: str) -> None:
    url = fresh_url()
    database = Database(url)
    bring_up_to_date(database, asked=True, revision=revision)
    with database.writing() as transaction:
        transaction.connection.execute(text(OLD_JOB))
    if not database.is_sqlite:
        with pytest.raises(SchemaError, match="run 'chitu store migrate"):
            open_store(url)
        assert database.revision() == revision
        bring_up_to_date(database, asked=True)
    store = open_store(url)
    claimed = store.leases.claim("w", ["wan"])
    assert claimed is not None
    assert claimed.job.id == "video_old"
    store.leases.complete(claimed.lease, [])
    store.close()
    assert database.revision() == REVISIONS[-1]
    if database.is_sqlite:
        copy = Path(str(database.url.database) + f".{revision}.backup")
        with closing(sqlite3.connect(copy)) as connection:
            assert connection.execute("SELECT id, state FROM jobs").fetchall() == [("video_old", "queued")]
            assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [(revision,)]
    database.close()


def test_newer_tables_are_refused(fresh_url: MakeUrl) -> None:
    url = fresh_url()
    migrate(url)
    database = Database(url)
    with database.writing() as transaction:
        transaction.connection.execute(text("UPDATE alembic_version SET version_num = '0999'"))
    for ask in (lambda: open_store(url), lambda: bring_up_to_date(database, asked=True)):
        with pytest.raises(
            SchemaError, match=r"version 0999.* knows up to .* a newer one made them"
        ) as error:
            ask()
        assert error.value.exit_code == 2
    database.close()


def test_a_migration_that_fails_leaves_the_old_tables(fresh_url: MakeUrl) -> None:
    database = Database(fresh_url())
    bring_up_to_date(database, asked=True, revision=REVISIONS[0])
    with database.writing() as transaction:
        transaction.connection.execute(text("CREATE TABLE owners (owner INTEGER)"))
    with pytest.raises(SchemaError, match="could not be migrated .*owners.* are as they were"):
        bring_up_to_date(database, asked=True)
    assert database.revision() == REVISIONS[0]
    database.close()


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("mysql://h/d", "use sqlite:///FOLDER/chitu.db or postgresql"),
        ("nothing", "use sqlite:///FOLDER/chitu.db or postgresql"),
        ("sqlite://", "name a file"),
        ("sqlite:////proc/nowhere/chitu.db", "use another folder"),
    ],
)
def test_stores_that_cannot_be(url: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as error:
        open_store(url)
    assert error.value.field == "service.store"


def test_sqlite_on_a_network_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = (
        "22 1 0:20 / / rw - ext4 /dev/sda1 rw\n"
        "23 22 0:40 / /data rw,relatime shared:1 - nfs4 server:/data rw\n"
        "24 23 0:41 / /data/my\\040disk rw - xfs /dev/sdb rw\n"
    )
    for folder, kind in (
        ("/data/a", "nfs4"),
        ("/data/my disk/a", "xfs"),
        ("/database", "ext4"),
        ("/", "ext4"),
    ):
        assert file_system(Path(folder), mounts) == kind
    monkeypatch.setattr("chitu_diffusion.service.database.file_system", lambda *_: "nfs4")
    with pytest.raises(UsageError, match=r"network file system \(nfs4\), where SQLite loses data"):
        open_store(f"sqlite:///{tmp_path}/chitu.db")


def test_a_database_that_is_away(tmp_path: Path) -> None:
    with pytest.raises(StoreDownError, match="does not answer") as error:
        open_store(f"postgresql://user:secret@/chitu?host={tmp_path}")
    assert "secret" not in str(error.value)


def test_acknowledged_jobs_outlive_the_process(tmp_path: Path) -> None:
    """SIGKILL right after the answer: every job that was told of is there, and the file is whole."""
    code = (
        "import os, signal, sys; from chitu_diffusion.service.store import open_store; "
        "from chitu_diffusion.service.jobs import NewJob; store = open_store(sys.argv[1]); "
        "[print(store.submit(NewJob('a', 'm', {}, {}, 'b')).job.id, flush=True) for _ in range(20)]; "
        "print(*{'torch', 'alembic.op', 'fastapi'} & set(sys.modules)); sys.stdout.flush(); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    url = f"sqlite:///{tmp_path}/chitu.db"
    open_store(url).close()
    ended = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, timeout=60)
    *told, loaded = ended.stdout.split("\n")[:-1]
    assert (ended.returncode, len(told), loaded) == (-9, 20, ""), ended.stderr
    store = open_store(url)
    assert {job.id for job in store.jobs(limit=100).jobs} == set(told)
    store.submit(NewJob("a", "m", {}, {}, "b"))
    store.close()


def test_the_clock_is_not_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = steady_clock()
    before = clock()
    assert abs(before - time.time()) < 1
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0 <= clock() - before < 1


def test_a_file_that_is_no_database_is_said(tmp_path: Path) -> None:
    file = tmp_path / "chitu.db"
    file.write_bytes(b"no database " * 1000)
    with pytest.raises(StoreDownError, match="restore it from a backup"):
        open_store(f"sqlite:///{file}")
    assert file.read_bytes() == b"no database " * 1000
