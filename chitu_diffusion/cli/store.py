"""`chitu store`: the database of the service's jobs; and its settings and the store for other commands.

Knows words and flags; tables and migrations are known by `service/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chitu_diffusion.cli.console import say
from chitu_diffusion.errors import UsageError

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.service.settings import ServiceConfig
    from chitu_diffusion.service.store import JobStore

store_app = typer.Typer(no_args_is_help=True, help="The service's database of jobs: migrate its tables.")
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="sqlite:///FOLDER/chitu.db or postgresql+psycopg://USER@HOST/NAME; by default service.store.",
    ),
]
StoreFile = Annotated[
    str | None, typer.Option("--store-file", metavar="FILE", help="Holds the URL, in place of --store.")
]

Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DIR", help="Folder of jobs' files and the database; chitu-data by default."
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="Settings in TOML: [service] and the engine's."),
]


def settings_of(
    flags: Mapping[str, object], config: Path | None = None
) -> tuple[ServiceConfig, EngineConfig]:
    """The settings of the service and of its engine, from file, environment and flags (dotted names)."""
    from chitu_diffusion.service.settings import load_service

    return load_service(config, flags)


def open_jobs(settings: ServiceConfig) -> JobStore:
    """The store of settings.

    Raises:
        UsageError: the extra `serve` is not installed; see `store_of`.
    """
    from chitu_diffusion.service.settings import store_of

    with extra_installed():
        return store_of(settings)


def opened(
    store: str | None, data: str | None, config: Path | None = None, *, new: bool = False
) -> closing[JobStore]:
    """The store that flags name, closed at the end.

    Args:
        new: SQLite's database may be made; else it must be there, for a wrong folder looks like an empty one.

    Raises:
        UsageError: there is none; see `open_jobs`.
    """
    from chitu_diffusion.service.settings import DATABASE_FILE

    settings, _ = settings_of({"service.store": store, "service.data": data}, config)
    file = Path(settings.data) / DATABASE_FILE
    if not new and settings.store is None and not file.exists():
        raise UsageError(
            f"there is no {file}; name the server's folder with --data, or its database with --store",
            field="service.data",
        )
    return closing(open_jobs(settings))


@contextmanager
def extra_installed() -> Iterator[None]:
    """Around imports of what the extra `serve` brings.

    Raises:
        UsageError: it is not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the service needs {error.name}, which is not installed; pip install 'chitu_diffusion[serve]'"
        ) from error


@store_app.callback()
def _store() -> None:
    """The service's database of jobs."""


@store_app.command("migrate")
def store_migrate(store: StoreUrl = None) -> int:
    """Bring a database's tables up to date; run it once for a new PostgreSQL database, and after an update.

    SQLite's are copied beside it first. Tables that are up to date stay as they are.
    """
    with extra_installed():
        from chitu_diffusion.service.database import Database
        from chitu_diffusion.service.migrate import bring_up_to_date
    settings, _ = settings_of({"service.store": store})
    database = Database(settings.store_url())
    before = database.revision()
    copy = bring_up_to_date(database, asked=True)
    after = database.revision()
    database.close()
    say(
        f"tables of version {after}" + (", as before" if before == after else f", before: {before or 'none'}")
    )
    if copy is not None:
        say(f"the database as it was: {copy}")
    return 0
