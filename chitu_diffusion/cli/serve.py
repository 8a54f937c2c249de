"""`chitu serve` and `chitu keys`: words and flags; what they order is done by `service/`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from chitu_diffusion.cli.console import emit_document, say, table
from chitu_diffusion.cli.info import Document
from chitu_diffusion.cli.store import ConfigFile, Data, StoreUrl, extra_installed, opened, settings_of
from chitu_diffusion.errors import UsageError

keys_app = typer.Typer(no_args_is_help=True, help="The service's API keys: add, list and revoke them.")


def serve(
    host: Annotated[str | None, typer.Option(help="Address; others than 127.0.0.1 need a key.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 8000 by default, 0 picks one.")] = None,
    data: Data = None,
    store: StoreUrl = None,
    workers: Annotated[
        str | None,
        typer.Option(metavar="N | none", help="Workers on this machine; none: they run elsewhere."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of each worker.")] = None,
    model: Annotated[str | None, typer.Option(help="A name ('chitu models ls'), an id or a folder.")] = None,
    key_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keys (ck_...), one a line, that are taken in.")
    ] = None,
    config: ConfigFile = None,
) -> int:
    """Serve videos over HTTP: OpenAI's /v1/videos, a page, a queue that outlives restarts.

    Ctrl+C or SIGTERM parks the jobs that run; the next start goes on with them.
    """
    flags = {
        "service.host": host,
        "service.port": port,
        "service.data": data,
        "service.store": store,
        "service.workers": "0" if workers == "none" else workers,
        "service.gpus_per_worker": gpus,
        "models.name": model,
    }
    service, engine = settings_of(flags, config)
    with extra_installed():
        from chitu_diffusion.service import serving
        from chitu_diffusion.service.logs import logs_to_stderr

    front = serving.open_front(service, engine)
    if key_file is not None:
        serving.add_key_file(front.store, key_file)
    try:
        with logs_to_stderr(service.logs):
            serving.serve(front, engine, on_bound=lambda url: say(f"{front.planner.spec.name} at {url}"))
    finally:
        front.store.close()
    return 0


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    owner: Annotated[str | None, typer.Option(help="Whose jobs it sees; NAME by default.")] = None,
    scopes: Annotated[str, typer.Option(help="Of read, submit, metrics, admin.")] = "read,submit",
    max_queued: Annotated[int | None, typer.Option(min=1, help="Jobs that may wait.")] = None,
    max_running: Annotated[int | None, typer.Option(min=1, help="Jobs that may run at a time.")] = None,
    max_cost: Annotated[float | None, typer.Option(min=0, help="Tokens x steps in all live jobs.")] = None,
    max_priority: Annotated[int, typer.Option(help="The highest priority of its jobs.")] = 0,
    data: Data = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> int:
    """Make a key and print it, this once; the database has a hash of it.

    With a first key, every request needs one.
    """
    with opened(store, data, config, new=True) as jobs:
        from chitu_diffusion.service.auth import make_key
        from chitu_diffusion.service.jobs import OwnerLimits

        limits = OwnerLimits(max_queued, max_running, max_cost)
        wanted = [scope.strip() for scope in scopes.split(",") if scope.strip()]
        row, key = make_key(owner or name, name, wanted, limits, max_priority)
        jobs.keys.add(row)
    print(key)
    say(f"key {row.id} of {row.owner} may {', '.join(row.scopes)}; it is not shown again")
    return 0


@keys_app.command("list")
def keys_list(
    json_: Document = False, data: Data = None, store: StoreUrl = None, config: ConfigFile = None
) -> int:
    """List keys: whose they are, what they may, when they were used."""
    with opened(store, data, config) as jobs:
        keys = jobs.keys.all()
    rows = [
        {
            "id": key.id,
            "name": key.name,
            "owner": key.owner,
            "scopes": ",".join(key.scopes),
            "created": int(key.created_at),
            "used": None if key.last_used_at is None else int(key.last_used_at),
            "revoked": key.revoked_at is not None,
        }
        for key in keys
    ]
    if json_:
        emit_document(rows)
    else:
        shown = ("id", "name", "owner", "scopes", "revoked")
        table(shown, [[row[name] for name in shown] for row in rows])
    return 0


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As 'chitu keys list' has it.")],
    data: Data = None,
    store: StoreUrl = None,
    config: ConfigFile = None,
) -> int:
    """Revoke a key: from now on it opens nothing."""
    with opened(store, data, config) as jobs:
        found = jobs.keys.revoke(key_id)
    if not found:
        raise UsageError(f"there is no key {key_id}; 'chitu keys list' lists them", field="id")
    say(f"key {key_id} is revoked")
    return 0
