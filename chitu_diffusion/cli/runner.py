"""Requests in, ended tasks out: the one place where the command line drives the engine.

Knows the engine's life (load, submit, step until nothing is left, close) and hands every event
to a reporter. Does not know flags or files of rows.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from chitu_diffusion.cli.console import exit_code_of, say
from chitu_diffusion.cli.options import default_path
from chitu_diffusion.cli.progress import Reporter
from chitu_diffusion.cli.resume import VideoJob, checkpoint_root
from chitu_diffusion.errors import ChituError, OutputError
from chitu_diffusion.files.atomic import write_text
from chitu_diffusion.task import DiffusionTask, TaskStatus

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.engine import Engine
    from chitu_diffusion.models.registry import FoundModel

OPS_SHOWN = 20


def run_jobs(
    config: EngineConfig,
    model: FoundModel,
    jobs: Sequence[VideoJob],
    reporter: Reporter,
    *,
    key: str | None = None,
    profile: Path | None = None,
) -> list[DiffusionTask]:
    """Make every job's video, in one engine.

    A request that the model cannot take, or whose task fails, ends as failed; the others go on. One that an
    earlier run left unfinished goes on where that left it.

    Args:
        key: of this command, by which the same one finds what an earlier run left; None: it does not look.
        profile: folder (it must exist) for a Chrome trace and a table of the longest operations, or None.

    Returns:
        one ended task for each job, in order.

    Raises:
        typer.Exit: this is not rank 0; it did its share, and has nothing to tell.
        ChituError: no model, or it does not fit.
        KeyboardInterrupt: after every task was saved and cancelled and the engine closed.
    """
    reporter.loading(config.models.name)
    began = time.monotonic()
    tasks = [job.task for job in jobs]
    try:
        from chitu_diffusion.config import cache_dir, rank_place
        from chitu_diffusion.engine import Engine

        gc.freeze()  # what was imported stays: letting go of memory looks at the rest alone
        place = rank_place()
        own_key = key if place is None or place.rank == 0 else None  # rank 0 tells the others its folder

        with ExitStack() as stack:
            root = stack.enter_context(checkpoint_root(own_key, cache_dir()))
            engine = Engine(config, model=model)
            stack.callback(engine.close)
            if not engine.is_driver:
                engine.run_worker()
                raise typer.Exit(0)
            reporter.loaded(time.monotonic() - began)
            for job in jobs:
                _submit(engine, job, None if root is None else root / job.key)
            stack.enter_context(_profiling(profile))
            _drive(engine, jobs, reporter)
    finally:
        reporter.close()
    return tasks


def _submit(engine: Engine, job: VideoJob, folder: Path | None) -> None:
    task = job.task
    seed = task.seed
    try:
        engine.submit(task, checkpoints=folder)
    except ChituError as error:
        task.end(TaskStatus.FAILED, error)
    if task.seed != seed and job.named_in is not None and task.resolved is not None:
        task.resolved = replace(task.resolved, save_path=default_path(job.named_in, task.seed))


def _drive(engine: Engine, jobs: Sequence[VideoJob], reporter: Reporter) -> None:
    places = {job.task.task_id: job.place or (n, len(jobs)) for n, job in enumerate(jobs, start=1)}
    tasks = [job.task for job in jobs]
    by_id = {task.task_id: task for task in tasks}
    begun: set[str] = set()

    def begin(task: DiffusionTask) -> None:
        if task.task_id not in begun:
            begun.add(task.task_id)
            reporter.begin(task, *places[task.task_id])

    for task in tasks:
        if task.is_finished():
            begin(task)
            reporter.end(task)
    try:
        while True:
            waiting = [task for task in tasks if not task.is_finished()]
            if waiting and not any(task.task_id in begun for task in waiting):
                begin(waiting[0])
            event = engine.step()
            if event is None:
                return
            task = by_id[event.task_id]
            begin(task)
            reporter.advance(event)
            if task.is_finished():
                reporter.end(task)
    except KeyboardInterrupt:
        for task in engine.save_tasks():
            reporter.saved(task)
        for task in tasks:
            if not task.is_finished():
                engine.cancel(task.task_id)
        raise


def exit_code_for(tasks: Sequence[DiffusionTask]) -> int:
    """0 if every task has its video; the one code that all failures share, else 1."""
    failed = [task for task in tasks if task.status is not TaskStatus.FINISHED]
    codes = {exit_code_of(task.error) if task.error is not None else 1 for task in failed}
    if not codes:
        return 0
    return codes.pop() if len(codes) == 1 else 1


@contextmanager
def _profiling(folder: Path | None) -> Iterator[None]:
    """torch.profiler around the work: FOLDER/trace.json for a trace viewer, FOLDER/ops.txt as a table."""
    if folder is None:
        yield
        return
    import torch
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as profiler:
        yield
    order = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    ops = profiler.key_averages().table(sort_by=order, row_limit=OPS_SHOWN)
    try:
        profiler.export_chrome_trace(str(folder / "trace.json"))
        write_text(folder / "ops.txt", ops + "\n")
    except OSError as error:
        raise OutputError(
            f"cannot write the profile into '{folder}': {error.strerror or error}; free some space"
        ) from error
    say(ops)
    say(f"profile: {folder / 'trace.json'} (open it in a trace viewer), {folder / 'ops.txt'}")
