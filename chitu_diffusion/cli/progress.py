"""What a person sees while videos are being made: a bar, plain lines, or JSON events.

Knows progress events and tasks; does not run anything. A terminal gets a bar with stage, step k
of n, seconds a step and the time left; a pipe or a log file gets a line now and then; `--json`
gets every event.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time

from chitu_diffusion.cli.console import complain, duration, emit, is_quiet, printable, quoted, say, time_left
from chitu_diffusion.task import DiffusionTask, Progress, TaskStatus

LINE_EVERY = 5.0
"""Seconds between two plain lines of the same stage."""


class Reporter:
    """Where the news of a run go; this one says nothing, as ranks other than the first do."""

    def loading(self, model: str) -> None:
        """The model is about to be loaded: the first sign of life."""

    def loaded(self, seconds: float) -> None:
        """The model is there; a task's own time, which its end tells, begins after this."""

    def begin(self, task: DiffusionTask, number: int, total: int) -> None:
        """A task is `number` of `total`; its first unit comes next."""

    def advance(self, event: Progress) -> None:
        """One unit of work was done."""

    def end(self, task: DiffusionTask) -> None:
        """A task has ended, well or not."""

    def saved(self, task: DiffusionTask) -> None:
        """A task was cut short, and the same command goes on with it."""

    def close(self) -> None:
        """Nothing more will come; leave the terminal as it was."""


def make_reporter(*, as_json: bool) -> Reporter:
    """The right reporter for this process's output; of several ranks, the first alone reports."""
    from chitu_diffusion.config import rank_place

    place = rank_place()
    if place is not None and place.rank > 0:
        return Reporter()
    if as_json:
        return JsonReporter()
    if is_quiet():
        return QuietReporter()
    if sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 20:
        return BarReporter()
    return LineReporter()


class Pace:
    """Mean time of a task's denoising steps. The first, which may warm up, counts only while alone."""

    def __init__(self) -> None:
        self._first: float | None = None
        self._total = 0.0
        self._count = 0

    def add(self, event: Progress) -> None:
        """Take in one event; only denoising steps count."""
        if event.stage is not TaskStatus.DENOISING:
            return
        if self._first is None:
            self._first = event.seconds
        else:
            self._total += event.seconds
            self._count += 1

    def __str__(self) -> str:
        seconds = self._total / self._count if self._count else self._first
        return "" if seconds is None else f"{seconds:.3g} s/step"


def _loaded(seconds: float) -> str:
    return f"loaded in {duration(seconds)}, which the videos' times leave out"


def _ending(task: DiffusionTask) -> str:
    spent = duration(task.get_elapsed_time())
    if task.status is TaskStatus.FINISHED:
        return f"done in {spent}"
    if task.status is TaskStatus.CANCELLED:
        return f"cancelled after {spent}"
    return f"failed after {spent}: {task.error_message}"


def _note(event: Progress, seed: int | None) -> str:
    """What a unit has to say; not the seed, which the beginning told, nor an ending, which is told apart."""
    if not event.message or event.status in (TaskStatus.FINISHED, TaskStatus.FAILED):
        return ""
    parts = [part for part in event.message.split("; ") if part != f"seed {seed}"]
    return f"  note: {'; '.join(parts)}" if parts else ""


def _opening(task: DiffusionTask, number: int, total: int) -> str:
    count = f"[{number}/{total}] " if total > 1 else ""
    return "\n".join([f"{count}{quoted(task.params.prompt)}, seed {task.seed}", *_resuming(task)])


def _resuming(task: DiffusionTask) -> list[str]:
    """How a task goes on that an earlier run left unfinished."""
    found = task.resumed
    if found is None:
        return []
    differs = printable("; ".join(found.differs))
    if not found.step:
        return [f"  starting over: {differs}"] if differs else []
    lines = [f"  going on at step {found.step} of {task.num_inference_steps}"]
    return lines if found.exact else [*lines, f"  not exact, it may differ by rounding: {differs}"]


def _saved(task: DiffusionTask) -> str:
    done = f"step {task.current_step} of {task.num_inference_steps}"
    return f"saved at {done}; the same command goes on there"


class QuietReporter(Reporter):
    """What failed, and nothing else."""

    def end(self, task: DiffusionTask) -> None:
        if task.status is TaskStatus.FAILED:
            complain(f"error: {quoted(task.params.prompt)}, seed {task.seed}: {task.error_message}")


class LineReporter(Reporter):
    """Plain lines on stderr, sparse enough for a log."""

    def __init__(self) -> None:
        self._pace = Pace()
        self._seed: int | None = None
        self._stage: TaskStatus | None = None
        self._last = 0.0

    def loading(self, model: str) -> None:
        say(f"loading {model} ...")

    def loaded(self, seconds: float) -> None:
        say(_loaded(seconds))

    def begin(self, task: DiffusionTask, number: int, total: int) -> None:
        self._pace = Pace()
        self._seed = task.seed
        self._stage = None
        say(_opening(task, number, total))

    def advance(self, event: Progress) -> None:
        self._pace.add(event)
        if note := _note(event, self._seed):
            say(note)
        last_step = event.stage is TaskStatus.DENOISING and event.step == event.total_steps
        if event.stage is self._stage and not last_step and time.monotonic() - self._last < LINE_EVERY:
            return
        self._stage = event.stage
        self._last = time.monotonic()
        parts = [f"  {event.stage}"]
        if event.stage is TaskStatus.DENOISING:
            parts.append(f"step {event.step} of {event.total_steps}")
            parts.append(str(self._pace))
        else:
            parts.append(duration(event.seconds))
        if event.eta is not None:
            parts.append(time_left(event.eta))
        say(", ".join(parts))

    def end(self, task: DiffusionTask) -> None:
        say(_ending(task))

    def saved(self, task: DiffusionTask) -> None:
        say(_saved(task))

    def close(self) -> None:
        sys.stderr.flush()


class BarReporter(Reporter):
    """A bar on the terminal, drawn by rich; notes and endings stay above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
        from rich.progress import Progress as Bars
        from rich.text import Text

        class TimeLeft(ProgressColumn):
            """Counts down between two events, too."""

            def render(self, task: Task) -> Text:
                end = task.fields["end"]
                return Text("" if end is None else time_left(end - time.monotonic()))

        facts = TextColumn("{task.fields[facts]}")
        bar = BarColumn(bar_width=None)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), bar, facts, TimeLeft())
        self._console = Console(stderr=True, highlight=False)
        self._bars = Bars(*columns, console=self._console, transient=True)
        self._row = self._bars.add_task("", total=None, facts="", end=None, visible=False)
        self._pace = Pace()
        self._seed: int | None = None

    def _note(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)

    def loading(self, model: str) -> None:
        self._bars.start()
        self._bars.update(self._row, description=f"loading {model}", visible=True)

    def loaded(self, seconds: float) -> None:
        self._note(_loaded(seconds))

    def begin(self, task: DiffusionTask, number: int, total: int) -> None:
        self._pace = Pace()
        self._seed = task.seed
        self._note(_opening(task, number, total))
        self._bars.reset(self._row, total=None, description="encoding", facts="", end=None, visible=True)

    def advance(self, event: Progress) -> None:
        self._pace.add(event)
        if note := _note(event, self._seed):
            self._note(note)
        facts = [f"step {event.step} of {event.total_steps}"] if event.total_steps else []
        facts += [str(self._pace)] if str(self._pace) else []
        self._bars.update(
            self._row,
            description=str(event.status),
            # what comes after the last step has no steps: the bar moves to and fro
            total=(event.total_steps or None) if event.status is TaskStatus.DENOISING else None,
            completed=event.step,
            facts=", ".join(facts),
            end=None if event.eta is None else time.monotonic() + event.eta,
        )

    def end(self, task: DiffusionTask) -> None:
        self._note(_ending(task))
        self._bars.update(self._row, visible=False)

    def saved(self, task: DiffusionTask) -> None:
        self._note(_saved(task))

    def close(self) -> None:
        self._bars.stop()


class JsonReporter(Reporter):
    """Every event as one line of JSON on stdout."""

    def loading(self, model: str) -> None:
        emit("loading", model=model)

    def loaded(self, seconds: float) -> None:
        emit("loaded", seconds=round(seconds, 3))

    def begin(self, task: DiffusionTask, number: int, total: int) -> None:
        emit(
            "begin",
            task_id=task.task_id,
            number=number,
            total=total,
            prompt=task.params.prompt,
            seed=task.seed,
        )
        if task.resumed is not None:
            emit("resumed", task_id=task.task_id, **dataclasses.asdict(task.resumed))

    def advance(self, event: Progress) -> None:
        emit(
            "progress",
            event.time,
            task_id=event.task_id,
            status=event.status,
            stage=event.stage,
            step=event.step,
            total_steps=event.total_steps,
            fraction=round(event.fraction, 4),
            seconds=round(event.seconds, 4),
            eta=None if event.eta is None else max(round(event.eta, 3), 0.001),
            message=event.message,
        )

    def end(self, task: DiffusionTask) -> None:
        kind = type(task.error).__name__ if task.error is not None else None
        emit(
            "end",
            task_id=task.task_id,
            status=task.status,
            seed=task.seed,
            path=task.buffer.save_path if task.status is TaskStatus.FINISHED else None,
            seconds=round(task.get_elapsed_time(), 3),
            error={"kind": kind, "message": task.error_message} if kind else None,
        )

    def saved(self, task: DiffusionTask) -> None:
        emit("saved", task_id=task.task_id, step=task.current_step, total_steps=task.num_inference_steps)

    def close(self) -> None:
        sys.stdout.flush()
