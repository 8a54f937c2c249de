"""What an engine asks of its ranks, and the answer where there is one."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from chitu_diffusion.executor.task_checkpoints import TaskCheckpoints
from chitu_diffusion.generator import Generator
from chitu_diffusion.task import DiffusionTask, DiffusionTaskPool, Progress


class Executor(Protocol):
    """Runs work units on this rank and on those that it drives."""

    @property
    def is_driver(self) -> bool:
        """Whether this rank decides and saves."""
        ...

    def add_task(self, task: DiffusionTask, checkpoints: Path | None) -> None:
        """On the driver: a task that came into the pool; it goes on where its checkpoint leaves it."""
        ...

    def save_task(self, task: DiffusionTask) -> None:
        """On the driver: write a checkpoint of a task that was added with a folder for them."""
        ...

    def claim_task(self, task: DiffusionTask) -> DiffusionTask:
        """On a worker whose own script was given a task: the one that the driver means by it."""
        ...

    def execute(self, task: DiffusionTask) -> Progress:
        """One work unit, on all ranks; see `Generator.generate_step`."""
        ...

    def execute_next(self) -> Progress | None:
        """On a worker: the next unit that the driver asks for; None when it has nothing to do."""
        ...

    def end_task(self, task: DiffusionTask) -> None:
        """On the driver: a task was ended between two units."""
        ...

    def idle(self) -> None:
        """On the driver: no task has work left."""
        ...

    def has_work(self) -> bool:
        """Whether a task has work left; a worker waits for the driver's answer."""
        ...

    def shutdown(self) -> None:
        """The driver sends its workers home; a worker serves until it does."""
        ...


class LocalExecutor:
    """One rank: a unit is a unit, and nobody else needs to know."""

    is_driver = True

    def __init__(self, generator: Generator, pool: DiffusionTaskPool) -> None:
        self._generator = generator
        self._pool = pool
        self._checkpoints = TaskCheckpoints(generator.backend)

    def add_task(self, task: DiffusionTask, checkpoints: Path | None) -> None:
        """Nobody else needs to know."""
        if task.is_finished():
            return
        self._checkpoints.add(task, checkpoints)
        notes: list[str] = []
        found = next(self._checkpoints.usable(task, notes), None)
        self._checkpoints.restore(task, found, notes)

    def save_task(self, task: DiffusionTask) -> None:
        """Writes it."""
        self._checkpoints.save(task)

    def claim_task(self, task: DiffusionTask) -> DiffusionTask:
        """The task itself."""
        return task

    def execute(self, task: DiffusionTask) -> Progress:
        """The unit."""
        try:
            return self._generator.generate_step(task)
        finally:  # Ctrl+C may come when the task is at its end
            self._checkpoints.clear_if_finished(task)

    def execute_next(self) -> Progress | None:
        """There is no driver but this rank."""
        return None

    def end_task(self, task: DiffusionTask) -> None:
        """Nobody else needs to know."""

    def idle(self) -> None:
        """Nobody else needs to know."""

    def has_work(self) -> bool:
        """Whether the pool has."""
        return not self._pool.all_finished()

    def shutdown(self) -> None:
        """Nobody else is there."""
