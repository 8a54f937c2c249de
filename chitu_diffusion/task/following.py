"""Waiting for a task, following it, and ending it from wherever one holds it.

A task stays plain data: it has a weak link to the feed of its engine, which pickles, copies and checkpoints
leave out. No thread runs in the background: whoever waits runs the engine's units himself while no other
thread does, so that nothing has to be started and nobody can wait for one another. Knows events and locks; no
engine and no tensors.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from chitu_diffusion.errors import UsageError, names_checked
from chitu_diffusion.task.events import END_STATES, Progress, TaskStatus

_GLANCE = 0.05
"""Seconds after which whoever waits looks whether the engine is free to be driven."""


class TaskEvents(Iterator[Progress]):
    """Events of a task, for `for` and for `async for`."""

    def __init__(self, events: Iterator[Progress]) -> None:
        self._events = events

    def __next__(self) -> Progress:
        return next(self._events)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Progress:
        event = await asyncio.to_thread(next, self._events, None)
        if event is None:
            raise StopAsyncIteration
        return event


@names_checked
class FollowedTask:
    """What can be asked of a task beside its data.

    Any number of threads may wait for a task and follow it, also while another one drives its engine.
    """

    task_id: str
    status: TaskStatus
    error: Exception | None
    _feed: weakref.ref[TaskFeed] | None = None

    def is_finished(self) -> bool:
        """Whether nothing is left to do: finished, failed or cancelled."""
        return self.status in END_STATES

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the task has ended; where no other thread drives the engine, this one does meanwhile.

        Args:
            timeout: seconds; None waits for as long as it takes. A unit that this thread runs is not cut
                short, so a driver, and a worker that waits for rank 0, may come back later than that.

        Returns:
            whether it has ended: well or not, which `status` and `error` tell.

        Raises:
            UsageError: the task was given to no engine, or this is inside a unit of it (a callback); or a
                timeout that is no number.
            RankLostError: another rank died or froze.
        """
        number = (
            isinstance(timeout, int | float) and not isinstance(timeout, bool) and not math.isnan(timeout)
        )
        if timeout is not None and not number:
            raise UsageError(f"timeout = {timeout!r}: use a number of seconds, or None", field="timeout")
        return self.is_finished() or self._require_feed().wait(self, timeout, threading.Event())

    def cancel(self) -> bool:
        """End the task as cancelled, at once or after the unit that is running, from any thread.

        Returns:
            whether it will end so; False for one that has ended.

        Raises:
            UsageError: the task was given to no engine.
        """
        return not self.is_finished() and self._require_feed().cancel(self.task_id)

    def events(self) -> TaskEvents:
        """Every unit's event since the engine took the task in, whenever one begins to read; ends with the
        task. Whoever reads drives, as in `wait`; `async for` does so in a thread.

        Raises:
            UsageError, RankLostError: as `wait`.
        """
        feed = None if self._feed is None else self._feed()
        if feed is None and self.is_finished():
            return TaskEvents(iter(()))
        return TaskEvents(self._require_feed().events(self))

    def __await__(self) -> Generator[Any, None, Self]:
        """`await task`: waits in a thread, and gives the task back.

        Raises:
            TaskError: the task failed; and as `wait`.
        """
        return self._ended().__await__()

    async def _ended(self) -> Self:
        nobody_waits = threading.Event()
        try:
            if not self.is_finished():
                await asyncio.to_thread(self._require_feed().wait, self, None, nobody_waits)
        finally:
            nobody_waits.set()
        if self.error is not None:
            raise self.error
        return self

    def _require_feed(self) -> TaskFeed:
        feed = None if self._feed is None else self._feed()
        if feed is None:
            why = "was given to no engine" if self._feed is None else "lost its engine, which is gone"
            raise UsageError(f"task {self.task_id} {why}: call engine.submit(task) first")
        return feed

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_feed"}


@dataclass
class _Told:
    """What was told of a task, and whether that is all."""

    events: list[Progress] = field(default_factory=list)
    ended: bool = False


class TaskFeed:
    """What an engine tells whoever holds its tasks. Safe to use from several threads.

    Args:
        step: runs one unit, unless another thread is at it; says whether it did.
        cancel: ends the task of an id.
    """

    def __init__(self, step: Callable[[], bool], cancel: Callable[[str], bool]) -> None:
        self.cancel = cancel
        self._step = step
        self._told: weakref.WeakKeyDictionary[FollowedTask, _Told] = weakref.WeakKeyDictionary()
        self._running: weakref.WeakSet[FollowedTask] = weakref.WeakSet()
        self._news = threading.Condition()

    def require_free(self, task: FollowedTask) -> None:
        """A task that is to be taken in must have work left, and no other engine at it.

        Raises:
            UsageError: it has ended, or is another engine's.
        """
        if task.is_finished():
            raise UsageError(
                f"task {task.task_id} has ended ({task.status}): submit its request, "
                "engine.submit(task.params)",
                field="task_id",
            )
        if (feed := task._feed and task._feed()) is not None and feed is not self:
            raise UsageError(
                f"task {task.task_id} is {task.status} in another engine: submit its request, "
                "engine.submit(task.params), or close that engine",
                field="task_id",
            )

    def add(self, task: FollowedTask) -> None:
        """A task that the engine took in."""
        with self._news:
            self._told[task] = _Told()
            self._running.add(task)
            task._feed = weakref.ref(self)

    def publish(self, task: FollowedTask, event: Progress) -> None:
        """A unit of a task was done."""
        with self._news:
            if task in self._told:
                self._told[task].events.append(event)

    def close_ended(self) -> None:
        """Between two units: of tasks that have ended, nothing more will be told."""
        with self._news:
            for task in [task for task in self._running if task.is_finished()]:
                self._told[task].ended = True
                self._running.discard(task)
            self._news.notify_all()

    def wait(self, task: FollowedTask, timeout: float | None, given_up: threading.Event) -> bool:
        """See `FollowedTask.wait`.

        Args:
            given_up: set when nobody waits any more.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while not task.is_finished():
            left = _GLANCE if deadline is None else min(_GLANCE, deadline - time.monotonic())
            if left <= 0 or given_up.is_set():
                return False
            if not self._step():
                self._sleep(task, left)
        return True

    def events(self, task: FollowedTask) -> Iterator[Progress]:
        """See `FollowedTask.events`."""
        read = 0
        while True:
            with self._news:
                told = self._told[task]
                new = told.events[read:]
                ended = told.ended
            yield from new
            read += len(new)
            if ended:
                return
            if not new and not self._step():
                self._sleep(task, _GLANCE)

    def _sleep(self, task: FollowedTask, seconds: float) -> None:
        with self._news:
            if not task.is_finished():
                self._news.wait(seconds)
