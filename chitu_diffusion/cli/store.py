"""`chitu store`: the database of the service's jobs.

Knows the command; tables and migrations are known by `service/`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from chitu_diffusion.cli.console import say
from chitu_diffusion.errors import UsageError

store_app = typer.Typer(no_args_is_help=True, help="The service's database of jobs: migrate its tables.")
StoreUrl = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="sqlite:///FOLDER/chitu.db or postgresql+psycopg://USER@HOST/NAME; by default service.store.",
    ),
]


@store_app.callback()
def _store() -> None:
    """The service's database of jobs."""


@store_app.command("migrate")
def store_migrate(store: StoreUrl = None) -> int:
    """Bring a database's tables up to date; run it once for a new PostgreSQL database, and after an update.

    SQLite's are copied beside it first. Tables that are up to date stay as they are.
    """
    try:
        from chitu_diffusion.service.database import Database
        from chitu_diffusion.service.migrate import bring_up_to_date
        from chitu_diffusion.service.settings import ServiceConfig
    except ModuleNotFoundError as error:
        raise UsageError(
            f"the service needs {error.name}, which is not installed; pip install 'chitu_diffusion[serve]'"
        ) from error
    database = Database(store or ServiceConfig().store_url())
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
