"""Which tasks have checkpoints on this rank, and where; the files are `pipelines.checkpoint`'s."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import CannotResumeError, NonFiniteError, UsageError
from chitu_diffusion.executor.interrupts import deferred_interrupts
from chitu_diffusion.files.places import expand_home
from chitu_diffusion.pipelines.checkpoint import CheckpointFolder, FoundCheckpoint
from chitu_diffusion.task import DiffusionTask, Resumed, TaskStatus

logger = logging.getLogger(__name__)

_RESTORED = (
    "status", "num_inference_steps", "current_step", "cascade_stage", "expert", "resumed", "buffer", "notes",
    "seconds", "created_at", "started_at",
)  # fmt: skip
"""The rest is whose task it is, and stays."""


class SaveTimes:
    """When tasks that have a folder for checkpoints were saved last, and how long that took.

    Args:
        write: the checkpoint of a task.
    """

    def __init__(self, write: Callable[[DiffusionTask], None]) -> None:
        self._write = write
        self._last: weakref.WeakKeyDictionary[DiffusionTask, float] = weakref.WeakKeyDictionary()
        self._places: weakref.WeakKeyDictionary[DiffusionTask, tuple[object, ...]] = (
            weakref.WeakKeyDictionary()
        )
        self._seconds = 0.0

    def __contains__(self, task: DiffusionTask) -> bool:
        return task in self._last

    def begin(self, task: DiffusionTask) -> None:
        """A task that has a folder."""
        self._last[task] = time.monotonic()

    def is_due(self, task: DiffusionTask, every: float) -> bool:
        """Whether the last one is older than `every` seconds, and than 20 times what it took."""
        if task.is_finished():
            self._last.pop(task, None)
        if task not in self._last:
            return False
        return time.monotonic() - self._last[task] >= (max(every, 20 * self._seconds) if every else 0.0)

    def is_saved(self, task: DiffusionTask) -> bool:
        """Whether its last checkpoint is of the step where it is."""
        return self._places.get(task) == _place_of(task)

    def save(self, task: DiffusionTask) -> None:
        """Now."""
        began = time.monotonic()
        self._write(task)
        self._places[task] = _place_of(task)
        self._last[task] = time.monotonic()
        self._seconds = time.monotonic() - began


def _place_of(task: DiffusionTask) -> tuple[object, ...]:
    return task.status, task.cascade_stage, task.current_step


class TaskCheckpoints:
    """The checkpoint folders of the tasks of one rank.

    Args:
        backend: on which the tasks run.
    """

    def __init__(self, backend: DiffusionBackend) -> None:
        self._backend = backend
        self._folders: weakref.WeakKeyDictionary[DiffusionTask, CheckpointFolder] = (
            weakref.WeakKeyDictionary()
        )

    def add(self, task: DiffusionTask, folder: Path | None) -> None:
        """A task, and where its checkpoints lie; None for none."""
        if folder is not None:
            self._folders[task] = CheckpointFolder(folder, self._backend.groups.rank)

    def usable(self, task: DiffusionTask, notes: list[str]) -> Iterator[FoundCheckpoint]:
        """The checkpoints from which a task can go on, newest first; `notes` is told why others cannot."""
        folder = self._folders.get(task)
        if folder is not None and self._backend.args.checkpoint.resume == "never":
            folder.clear()
        elif folder is not None:
            yield from folder.usable(self._backend, task, notes)

    def restore(self, task: DiffusionTask, found: FoundCheckpoint | None, notes: list[str]) -> None:
        """Bring a task to where a checkpoint left it, with the seed that was drawn then where nobody asked
        for one; with none, say why it starts over.
        """
        if found is not None:
            self._folders[task].count_try(found)
            seed = found.task.seed
            resolved = task.resolved and dataclasses.replace(task.resolved, seed=seed)
            saved = {name: vars(found.task)[name] for name in _RESTORED}
            task.commit(**saved, seed=seed, resolved=resolved)
        elif notes:
            task.resumed = Resumed(0, True, tuple(notes))

    def save(self, task: DiffusionTask) -> None:
        """Write a checkpoint, if the task has a folder and a state. One that cannot be written, whyever, is
        no reason to stop.
        """
        folder = self._folders.get(task)
        if folder is None:
            return
        try:
            with deferred_interrupts():
                folder.save(task, self._backend)
        except (CannotResumeError, NonFiniteError) as error:
            logger.debug("no checkpoint of task %s: %s", task.task_id, error)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            logger.warning("no checkpoint of task %s could be written: %s", task.task_id, said)

    def clear_if_finished(self, task: DiffusionTask) -> None:
        """Let go of a task's checkpoints once its video stands."""
        if task.status is TaskStatus.FINISHED and (folder := self._folders.pop(task, None)) is not None:
            with deferred_interrupts():
                folder.clear()


def checkpoint_folder(value: str | Path | None) -> Path | None:
    """What a caller gave as a folder for checkpoints, absolute; None for none.

    Raises:
        UsageError: something that can name no folder.
    """
    if value is None:
        return None
    try:
        folder = Path(expand_home(value)).absolute()
        plain = bool(os.fspath(value)) and b"\0" not in os.fsencode(folder)
    except (TypeError, ValueError, OSError):
        plain = False
    if not plain:
        raise UsageError(f"checkpoints = {value!r}: use the name of a folder", field="checkpoints")
    return folder
