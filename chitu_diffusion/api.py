"""The module-level face: `chitu_init`, `chitu_start`, `chitu_generate`, `chitu_terminate`, and the pool they
work on.

One engine a process, for scripts that want no objects. Everything here forwards to it; `_face` is the only
module-level object of the package that changes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from chitu_diffusion.errors import UsageError
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, Progress
from chitu_diffusion.task import DiffusionTaskPool as TaskPool

if TYPE_CHECKING:
    from chitu_diffusion.config import EngineConfig
    from chitu_diffusion.engine import Engine


class _Face:
    """The process's engine, once there is one."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.terminated = False

    def require(self) -> Engine:
        """The engine.

        Raises:
            UsageError: `chitu_init` was not called, or `chitu_terminate` was.
        """
        if self.engine is None:
            raise UsageError("there is no engine: call chitu_init(args) first")
        return self.engine


_face = _Face()


class EngineTaskPool:
    """The pool of the process's engine, under the name that scripts use: `DiffusionTaskPool`.

    `add` takes a task or bare parameters and checks them against the model, as `Engine.submit` does.
    """

    @property
    def pool(self) -> dict[str, DiffusionTask]:
        """Tasks by id, in order of arrival."""
        return self._tasks().pool

    def add(self, request: DiffusionTask | DiffusionUserParams) -> DiffusionTask:
        """Take a request in.

        Raises:
            UsageError, WillNotFitError: the model cannot do it.
        """
        return _face.require().submit(request)

    def get(self, task_id: str) -> DiffusionTask | None:
        """The task of that id."""
        return self._tasks().get(task_id)

    def remove(self, task_id: str) -> None:
        """Forget a task; silent if it is not here."""
        self._tasks().remove(task_id)

    def all_finished(self) -> bool:
        """Whether no task has work left; true also before `chitu_init`. Ranks but the first wait for rank 0's
        answer.
        """
        return _face.engine is None or not _face.engine.has_work()

    def unfinished(self) -> list[DiffusionTask]:
        """Tasks with work left, oldest first."""
        return self._tasks().unfinished()

    def get_pending_tasks(self) -> list[str]:
        """Ids of tasks that have not begun."""
        return self._tasks().get_pending_tasks()

    def get_statistics(self) -> dict[str, int]:
        """Number of tasks by status."""
        return self._tasks().get_statistics()

    def __iter__(self) -> Iterator[DiffusionTask]:
        return iter(self._tasks())

    def __len__(self) -> int:
        return 0 if _face.engine is None else len(_face.engine.pool)

    def _tasks(self) -> TaskPool:
        return _face.require().pool


DiffusionTaskPool = EngineTaskPool()


def chitu_init(args: EngineConfig | None = None, logging_level: int | None = None) -> None:
    """Load the model.

    Args:
        args: the settings; None: the shipped model on this machine's best device.
        logging_level: of the package's logger; None leaves it alone.

    Raises:
        UsageError: there is an engine already.
        ModelError, WillNotFitError: no usable model.
    """
    from chitu_diffusion.engine import Engine

    if _face.engine is not None:
        raise UsageError(
            "there is an engine already: call chitu_terminate() first, or make an Engine of your own"
        )
    if logging_level is not None:
        logging.getLogger("chitu_diffusion").setLevel(logging_level)
    _face.engine = Engine(args)
    _face.terminated = False


def chitu_start() -> None:
    """Enter the running state."""
    _face.require().backend.start()


def chitu_generate() -> Progress | None:
    """Run one unit of the task whose turn it is; None when no task has work left."""
    return _face.require().step()


def chitu_terminate() -> None:
    """Cancel what is unfinished and let go of the model; silent the second time."""
    engine = _face.engine
    _face.engine = None
    _face.terminated = True
    if engine is not None:
        engine.close()


def chitu_is_terminated() -> bool:
    """Whether `chitu_terminate` was called after the last `chitu_init`."""
    return _face.terminated
