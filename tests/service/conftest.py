"""A store on each of the two databases."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from databases import MISSING, FakeClock, make_database, postgres_server

from chitu_diffusion.service.database import Database
from chitu_diffusion.service.migrate import bring_up_to_date
from chitu_diffusion.service.store import JobStore, open_store

MakeUrl = Callable[[], str]


@pytest.fixture(scope="session")
def postgres() -> Iterator[str | None]:
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
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def store(fresh_url: MakeUrl, clock: FakeClock) -> Iterator[JobStore]:
    url = fresh_url()
    migrate(url)
    found = open_store(url, clock=clock, most_queued=50, retention_s=1000)
    yield found
    found.close()


def migrate(url: str) -> None:
    database = Database(url)
    bring_up_to_date(database, asked=True)
    database.close()
