"""`chitu fleet`: words and flags; what they order is done by `service/fleet.py`."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from chitu_diffusion.cli.console import emit_document, printable, say, table
from chitu_diffusion.cli.info import Document
from chitu_diffusion.cli.store import ConfigFile, Data, StoreFile, open_jobs, settings_of
from chitu_diffusion.errors import UsageError, counted

if TYPE_CHECKING:
    from chitu_diffusion.service.fleet import FleetNode, FleetSpec, FleetWorker
    from chitu_diffusion.service.settings import ServiceConfig

fleet_app = typer.Typer(
    no_args_is_help=True, help="Workers on a Ray cluster: up, status, scale, drain and down."
)
Address = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Of Ray's head; by default the Ray that runs here.")
]


@fleet_app.command("up")
def fleet_up(
    workers: Annotated[int, typer.Option(min=1, help="How many are kept running.")],
    model: Annotated[str | None, typer.Option(help="A name ('chitu models ls'), an id or a folder.")] = None,
    cpus: Annotated[int, typer.Option(min=1, help="CPUs that each takes.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say where they have room.")] = False,
    address: Address = None,
    data: Data = None,
    store_file: StoreFile = None,
    config: ConfigFile = None,
) -> int:
    """Keep workers running on a cluster's nodes: one a GPU, or by CPUs where no node has a GPU.

    Paths are the same on each node. Given again, it starts what is missing.
    """
    flags = {"service.data": data, "service.store_file": store_file, "models.name": model}
    settings, engine = settings_of(flags, config)
    check_settings(settings)
    from chitu_diffusion.service.fleet import FleetSpec, connected, plan

    with connected(address) as fleet:
        nodes = fleet.nodes()
        spec = FleetSpec(
            model=engine.models.name,
            data=str(Path(settings.data).absolute()),
            store_file=str(Path(settings.store_file or "").absolute()),
            config=None if config is None else str(config.absolute()),
            gpus=int(any(node.gpus for node in nodes)),
            cpus=cpus,
        )
        if dry_run:
            placed, waiting = plan(nodes, workers, spec.gpus, spec.cpus)
            table(("node", "workers"), [(f"{node.host} {node.id[:8]}", placed[node.id]) for node in nodes])
            _say_waiting(waiting)
            return 0
        with closing(open_jobs(settings)):  # it is there, and its tables are up to date
            found = fleet.up(spec, workers)
    _say_found(found)
    return 0


def check_settings(settings: ServiceConfig) -> None:
    """Raises a UsageError for what no fleet can be made of."""
    if settings.store_file is None:
        raise UsageError(
            "a fleet takes the database's URL from a file that each node has; use --store-file FILE",
            field="--store-file",
        )
    if not settings.store_url().startswith("postgresql"):
        raise UsageError("a fleet needs PostgreSQL; SQLite is for one machine", field="--store-file")
    if settings.gpus_per_worker > 1:
        raise UsageError(
            f"gpus_per_worker = {settings.gpus_per_worker}: use 1; a worker of several GPUs is not there yet",
            field="gpus_per_worker",
        )


def _say_found(workers: list[FleetWorker]) -> None:
    placed = sum(worker.spec is not None for worker in workers)
    say(f"{counted(placed, 'worker')} started; 'chitu fleet status' says how they are")
    _say_waiting(len(workers) - placed)


def _say_waiting(number: int) -> None:
    if number:
        say(f"{counted(number, 'worker')} without a place: more nodes ('ray start --address=HEAD:6379')")


@fleet_app.command("status")
def fleet_status(
    json_: Document = False, address: Address = None, store_file: StoreFile = None, config: ConfigFile = None
) -> int:
    """Say which nodes there are, their workers, the store's jobs, and whether versions differ."""
    settings, _ = settings_of({"service.store_file": store_file}, config)
    from chitu_diffusion.service.fleet import connected, differing

    with connected(address) as fleet:
        nodes = fleet.nodes()
        workers = fleet.workers()
    spec = next((worker.spec for worker in workers if worker.spec is not None), None)
    jobs = _jobs(settings, spec)
    if json_:
        emit_document(
            {
                "nodes": [dataclasses.asdict(node) for node in nodes],
                "workers": [dataclasses.asdict(worker) for worker in workers],
                "jobs": jobs,
            }
        )
        return 0
    table(("node", "host", "CPUs", "GPUs", "workers"), [_row_of_node(node, workers) for node in nodes])
    print()
    table(("worker", "host", "is", "starts", "model"), [_row_of_worker(worker) for worker in workers])
    print()
    print("jobs: " + ("unknown without --store-file" if jobs is None else _in_words(jobs)))
    differ = differing(workers)
    for line in differ:
        print(f"versions differ: {line}")
    if spec is not None and not differ:
        versions = next(worker.versions for worker in workers if worker.versions)
        print("versions: " + ", ".join(f"{name} {has}" for name, has in versions.items()))
    return 0


def _jobs(settings: ServiceConfig, spec: FleetSpec | None) -> dict[str, int] | None:
    if settings.store is None and settings.store_file is None:
        if spec is None or not Path(spec.store_file).exists():
            return None
        settings = settings.model_copy(update={"store_file": spec.store_file})
    with closing(open_jobs(settings)) as jobs:
        return {str(state): number for state, number in jobs.counts().items()}


def _in_words(jobs: dict[str, int]) -> str:
    return ", ".join(f"{number} {state}" for state, number in jobs.items() if number) or "none"


def _row_of_node(node: FleetNode, workers: list[FleetWorker]) -> tuple[object, ...]:
    return (node.id[:8], node.host, node.cpus, node.gpus, sum(each.node == node.id for each in workers))


def _row_of_worker(worker: FleetWorker) -> tuple[object, ...]:
    if worker.spec is None:
        return (worker.name, "", "without a place", "", "")
    ended = printable(f"started again after {worker.ended}")
    state = f"process {worker.pid}" if worker.pid else ended
    return (worker.name, worker.host, state, worker.starts, worker.spec.model)


@fleet_app.command("scale")
def fleet_scale(
    workers: Annotated[int, typer.Argument(min=0, help="How many are kept running.")],
    address: Address = None,
    config: ConfigFile = None,
) -> int:
    """Start more workers like those that run, or park the jobs of some and end them."""
    settings, _ = settings_of({}, config)
    from chitu_diffusion.service.fleet import connected

    with connected(address) as fleet:
        found = fleet.scale(workers, settings.drain_s)
    _say_found(found)
    return 0


@fleet_app.command("drain")
def fleet_drain(
    node: Annotated[
        list[str] | None,
        typer.Argument(help="Ids or hosts, as 'chitu fleet status --json' has them; or all."),
    ] = None,
    address: Address = None,
    config: ConfigFile = None,
) -> int:
    """Park what runs on nodes, and end their workers, so that they can be switched off.

    'chitu fleet scale' starts as many elsewhere.
    """
    settings, _ = settings_of({}, config)
    from chitu_diffusion.service.fleet import connected

    with connected(address) as fleet:
        ended = fleet.drain(node or (), settings.drain_s)
    say(f"{counted(ended, 'worker')} parked and ended")
    return 0


@fleet_app.command("down")
def fleet_down(address: Address = None) -> int:
    """End all workers at once; their jobs wait, and go on at their last checkpoints."""
    from chitu_diffusion.service.fleet import connected

    with connected(address) as fleet:
        ended = fleet.down()
    say(f"{counted(ended, 'worker')} ended")
    return 0
