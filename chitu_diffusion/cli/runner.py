"""Requests in, ended tasks out: the one place where the command line drives the engine.

Knows the engine's life (load, submit, step until nothing is left, close) and hands every event
to a reporter. Does not know flags or files of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from chitu_diffusion.cli.console import exit_code_of, say
from chitu_diffusion.cli.progress import Reporter
from chitu_diffusion.errors import ChituError, OutputError
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.engine import Engine

OPS_SHOWN = 20


def run_requests(
    config: EngineConfig,
    requests: Sequence[DiffusionUserParams],
    reporter: Reporter,
    *,
    profile: Path | None = None,
) -> list[DiffusionTask]:
    """Make every request's video, in one engine.

    A request that the model cannot take, or whose task fails, ends as failed; the others go on.

    Args:
        profile: folder (it must exist) for a Chrome trace and a table of the longest operations, or None.

    Returns:
        one ended task for each request, in order.

    Raises:
        typer.Exit: this is not rank 0; it did its share, and has nothing to tell.
        ChituError: no model, or it does not fit.
        KeyboardInterrupt: after every task was cancelled and the engine closed.
    """
    reporter.loading(config.models.name)
    try:
        from chitu_diffusion.engine import Engine

        engine = Engine(config)
        try:
            if not engine.is_driver:
                engine.run_worker()
                raise typer.Exit(0)
            tasks = [_submit(engine, params) for params in requests]
            with _profiling(profile):
                _drive(engine, tasks, reporter)
        finally:
            engine.close()
    finally:
        reporter.close()
    return tasks


def _submit(engine: Engine, params: DiffusionUserParams) -> DiffusionTask:
    try:
        return engine.submit(params)
    except ChituError as error:
        refused = DiffusionTask.from_user_request(params)
        refused.end(TaskStatus.FAILED, error)
        return refused


def _drive(engine: Engine, tasks: list[DiffusionTask], reporter: Reporter) -> None:
    numbers = {task.task_id: number for number, task in enumerate(tasks, start=1)}
    by_id = {task.task_id: task for task in tasks}
    begun: set[str] = set()

    def begin(task: DiffusionTask) -> None:
        if task.task_id not in begun:
            begun.add(task.task_id)
            reporter.begin(task, numbers[task.task_id], len(tasks))

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
        (folder / "ops.txt").write_text(ops + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write the profile into '{folder}': {error.strerror or error}; free some space"
        ) from error
    say(ops)
    say(f"profile: {folder / 'trace.json'} (open it in a trace viewer), {folder / 'ops.txt'}")
