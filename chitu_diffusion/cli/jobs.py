"""`chitu worker` and `chitu jobs`: running a store's jobs without HTTP, and looking at them.

Knows words and flags; what they ask for is done by `service/`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from chitu_diffusion.cli.console import emit_document, printable, say, table
from chitu_diffusion.cli.info import Document
from chitu_diffusion.cli.store import ConfigFile, Data, StoreFile, StoreUrl, open_jobs, opened, settings_of
from chitu_diffusion.distributed.host import end_with_parent
from chitu_diffusion.errors import UsageError, nearest

if TYPE_CHECKING:
    from chitu_diffusion.service.job_log import LogLine
    from chitu_diffusion.service.jobs import Job

jobs_app = typer.Typer(
    no_args_is_help=True, help="The service's jobs: list, show, logs, cancel, resume, and why they wait."
)
JobId = Annotated[str, typer.Argument(metavar="JOB", help="A job's id.")]
_LOOK_S = 0.5
_NOW = 1
"""The exit code of a second signal."""


def worker(
    store: StoreUrl = None,
    data: Data = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Workers on this machine; 1 by default.")] = None,
    model: Annotated[str | None, typer.Option(help="A name ('chitu models ls'), an id or a folder.")] = None,
    config: ConfigFile = None,
    store_file: StoreFile = None,
    parent: Annotated[
        int | None, typer.Option(min=1, metavar="PID", help="Park and end when it ends, which started this.")
    ] = None,
) -> int:
    """Run a store's jobs on this machine, without HTTP: for systemd, Slurm or Kubernetes.

    SIGTERM or Ctrl+C parks what runs, and any other worker goes on with it; a second one ends at once.
    """
    flags = {"service.store": store, "service.data": data, "service.workers": workers, "models.name": model}
    settings, engine = settings_of({**flags, "service.store_file": store_file}, config)
    if parent is not None:
        end_with_parent("chitu-worker")
        if os.getppid() != parent:
            raise UsageError(f"--parent {parent}: another one started this process", field="--parent")
    with closing(open_jobs(settings)) as jobs, _stopped_by_signals() as stop:
        from chitu_diffusion.service.logs import logs_to_stderr
        from chitu_diffusion.service.supervisor import run

        say(f"running jobs of {engine.models.name}; Ctrl+C parks them")
        with logs_to_stderr(settings.logs):
            run(settings, jobs, stop, engine=engine)
    return 0


@contextmanager
def _stopped_by_signals() -> Iterator[threading.Event]:
    """Set by the first; the second ends this process, and so its workers."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            os._exit(_NOW)
        stop.set()

    before = {each: signal.signal(each, on_signal) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


@jobs_app.command("ls")
def jobs_list(
    state: Annotated[
        str | None, typer.Option(help="Only queued, running, held, completed, failed or cancelled.")
    ] = None,
    owner: Annotated[str | None, typer.Option(help="Only this owner's.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, the newest first.")] = 20,
    json_: Document = False,
    data: Data = None,
    store: StoreUrl = None,
) -> int:
    """List jobs, the newest first."""
    with opened(store, data) as jobs:
        from chitu_diffusion.service.jobs import JobState

        if state is not None and state not in list(JobState):
            raise UsageError(f"--state {state}: there is none.{nearest(state, JobState)}", field="--state")
        states = [JobState(state)] if state else []
        page = jobs.jobs(owner, limit=limit, states=states)
        now = jobs.now()
    if json_:
        emit_document([_plain(job) for job in page.jobs])
        return 0
    rows = [
        (job.id, job.state, _place(job), job.owner, job.model, f"{now - job.created_at:.0f} s")
        for job in page.jobs
    ]
    table(("job", "state", "at", "owner", "model", "age"), rows)
    return 0


@jobs_app.command("show")
def jobs_show(job: JobId, json_: Document = False, data: Data = None, store: StoreUrl = None) -> int:
    """Show a job's row and what happened to it."""
    with opened(store, data) as jobs:
        found = jobs.job(job)
        events = jobs.events(job)
    if json_:
        emit_document({**_plain(found), "happened": [dataclasses.asdict(event) for event in events]})
        return 0
    for name, value in _plain(found).items():
        if value not in (None, "", [], {}, ()):
            print(f"{name:<24}{printable(str(value))}")
    for event in events:
        said = ", ".join(f"{name} {value}" for name, value in event.data.items())
        print(f"{event.at - found.created_at:8.1f} s  {event.kind:<18}{printable(said)}")
    return 0


@jobs_app.command("cancel")
def jobs_cancel(job: JobId, data: Data = None, store: StoreUrl = None) -> int:
    """Cancel a job: at once where it waits, after the step that runs where it runs."""
    with opened(store, data) as jobs:
        state = jobs.cancel(job).state
    say(f"{job} is {state}" + ("" if state.ended else ", and ends after the step that runs"))
    return 0


@jobs_app.command("resume")
def jobs_resume(job: JobId, data: Data = None, store: StoreUrl = None) -> int:
    """Let a held job go on, from the step that it was held at. One that was parked goes on by itself."""
    with opened(store, data) as jobs:
        step = jobs.release(job).step
    say(f"{job} is queued, and goes on from step {step or 0}")
    return 0


@jobs_app.command("logs")
def jobs_logs(
    job: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Each line as a JSON object.")] = False,
    data: Data = None,
    store: StoreUrl = None,
) -> int:
    """Print what happened to a job and what its workers logged, by time."""
    settings, _ = settings_of({"service.store": store, "service.data": data})
    with closing(open_jobs(settings)) as jobs:
        from chitu_diffusion.service.job_log import JobLog

        found = jobs.job(job)
        log = JobLog(jobs, settings.data, job)
        while True:
            ended = found.state.ended
            for line in log.fresh():
                _print_line(line, json_)
            if ended or not follow:
                return 0
            time.sleep(_LOOK_S)
            found = jobs.job(job)


def _print_line(line: LogLine, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(line), ensure_ascii=False), flush=True)
        return
    at = datetime.fromtimestamp(line.at, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    for text in line.text.split("\n"):
        print(f"{at}  {line.source:<10}  {line.kind:<10}  {printable(text)}", flush=True)


@jobs_app.command("why")
def jobs_why(job: JobId, data: Data = None, store: StoreUrl = None) -> int:
    """Say why a job waits, failed, or takes so long."""
    with opened(store, data) as jobs:
        from chitu_diffusion.service.why import reasons

        found = jobs.job(job)
        print(f"{job} is {found.state}")
        for reason in reasons(jobs, found):
            print(printable(reason))
    return 0


def _place(job: Job) -> str:
    return "" if job.stage is None else f"{job.stage} {job.step or 0}/{job.steps or '?'}"


def _plain(job: Job) -> dict[str, Any]:
    return {**vars(job), "checkpoints": [vars(saved) for saved in job.checkpoints]} | {
        "error": None if job.error is None else vars(job.error)
    }
