"""One work unit on every rank at once: the driver asks for it, all run it, all report how it went, and all
draw the same conclusion.

A unit that failed anywhere has failed everywhere: the task ends on all ranks, or, when memory ran out or
Ctrl+C came, goes back to where it was. Exchanges that were cut short are dropped and made anew, so the group
outlives a failed task. Knows tasks, the generator and the worker group; not whose turn it is.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from collections.abc import Sequence
from enum import Enum, auto
from pathlib import Path

import torch
import torch.distributed as dist

from chitu_diffusion.errors import RankLostError, TaskError, UsageError, without_frames
from chitu_diffusion.executor import messages
from chitu_diffusion.executor.interrupts import AtOnce, deferred_interrupts
from chitu_diffusion.executor.messages import (
    AddTask,
    EndTask,
    ExecuteUnit,
    Idle,
    Message,
    Outcome,
    SaveTask,
    Shutdown,
    UnitReport,
)
from chitu_diffusion.executor.task_checkpoints import TaskCheckpoints
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.generator import Generator
from chitu_diffusion.memory.device import empty_cache, is_out_of_memory
from chitu_diffusion.pipelines.checkpoint import FoundCheckpoint
from chitu_diffusion.task import DiffusionTask, DiffusionTaskPool, DiffusionUserParams, Progress, TaskStatus

_FAREWELL = 3.0
_EXCHANGE_FAILURES = ("gloo", "NCCL", "process group", "Connection closed")


class _State(Enum):
    """Where this rank is. On the driver, IDLE means that it has told the others so.

    RUNNING      <-> IDLE           there is work, there is none
    RUNNING, IDLE -> INTERRUPTED    a worker has heard Ctrl+C: its next unit tells the others, it waits
                                    for no more than a moment, and only the driver's word ends this
    any          -> DISMISSED       the driver has sent its workers home
    any          -> CLOSED          this rank has left
    """

    RUNNING = auto()
    IDLE = auto()
    INTERRUPTED = auto()
    DISMISSED = auto()
    CLOSED = auto()


class DistributedExecutor:
    """Several ranks. Rank 0 is the driver; on the others `execute_next` does what it says.

    Args:
        generator: of this rank.
        pool: of this rank; it holds the same tasks on all of them.
        workers: the ranks.
    """

    def __init__(self, generator: Generator, pool: DiffusionTaskPool, workers: WorkerGroup) -> None:
        self.is_driver = workers.rank == 0
        self._generator = generator
        self._pool = pool
        self._workers = workers
        self._channel = workers.channel
        self._monitor = workers.monitor
        self._checkpoints = TaskCheckpoints(generator.backend)
        self._state = _State.RUNNING
        self._unit: ExecuteUnit | None = None
        """Received, and not run yet: whoever only asks for work leaves it to whoever does it."""
        self._unclaimed: list[DiffusionTask] = []
        """The driver's, not yet given to this rank by its own script."""
        self._monitor.set_status("waiting for the other ranks to load the model")
        self._channel.gather_status("loaded", {})
        self._monitor.set_status("waiting for work")

    def add_task(self, task: DiffusionTask, checkpoints: Path | None) -> None:
        """The driver tells the others of a task, and all go on from the same checkpoint, or none does."""
        if task.is_finished():
            return
        self._enter(_State.RUNNING)
        self._checkpoints.add(task, checkpoints)
        resolved = None if task.resolved is None else task.resolved.to_mapping()
        folder = None if checkpoints is None else str(checkpoints)
        self._publish(AddTask(task.task_id, task.seed, task.params.to_mapping(), resolved, folder))
        if checkpoints is not None:
            self._restore(task)

    def save_task(self, task: DiffusionTask) -> None:
        """All ranks write a checkpoint, each what it has of the task."""
        with deferred_interrupts():
            self._publish(SaveTask(task.task_id))
            self._checkpoints.save(task)

    def claim_task(self, task: DiffusionTask) -> DiffusionTask:
        """On a worker, which runs the same script: the task becomes the driver's own.

        Tasks that the driver alone is given are taken in by the others when they come to them.

        Raises:
            UsageError: the driver goes on without having been given a task.
        """
        while True:
            for known in self._unclaimed:
                if _same_request(known.params, task.params):
                    self._unclaimed.remove(known)
                    return known
            if isinstance(self._receive(None), ExecuteUnit):
                raise UsageError(
                    f"task {task.task_id}: rank 0 was not given it; give tasks to all ranks, or to rank 0 "
                    "alone"
                )

    def execute(self, task: DiffusionTask) -> Progress:
        """One unit on all ranks.

        Raises:
            torch.OutOfMemoryError: on some rank; the task is where it was, on all.
            KeyboardInterrupt: the same.
            RankLostError: the group is at its end.
        """
        try:
            with deferred_interrupts() as at_once:
                return self._execute(task, at_once)
        except KeyboardInterrupt:
            self._enter(_State.INTERRUPTED)
            raise

    def _execute(self, task: DiffusionTask, at_once: AtOnce) -> Progress:
        """The unit may be cut short, and the ranks' word on it not: else some would be a step ahead."""
        if self.is_driver:
            self._publish(ExecuteUnit(task.task_id, self._generator.backend.low_mem_level))
        self._unit = None
        before = _Snapshot(task)
        stage = task.status
        event, mine, raised = self._run(task, at_once)
        if mine.outcome is not Outcome.DONE:
            self._workers.abort_exchanges()
        reports = self._gather(mine, stage)
        self._monitor.set_status("between two units")
        if all(report.outcome is Outcome.DONE for report in reports):
            assert event is not None
            self._checkpoints.clear_if_finished(task)
            return event
        self._workers.groups.abort()
        for outcome in (Outcome.INTERRUPTED, Outcome.OUT_OF_MEMORY):
            if any(report.outcome is outcome for report in reports):
                before.restore()
                raise raised or _raised_elsewhere(outcome, reports)
        return self._failed(task, stage, reports, event)

    def end_task(self, task: DiffusionTask) -> None:
        """The driver tells the others that a task ended between two units."""
        if self.is_driver:
            self._publish(EndTask(task.task_id, task.status, task.error_message))

    def idle(self) -> None:
        """The driver tells the others, once, that no task has work left."""
        if self.is_driver and self._state is _State.RUNNING:
            self._publish(Idle())
            self._enter(_State.IDLE)

    def has_work(self) -> bool:
        """Whether the driver has a task with work left. Workers wait for its answer, and once that was no,
        keep it until they are given a task, run a unit, or close: so the same script takes the same turns on
        every rank.
        """
        if not self.is_driver:
            return self._state in (_State.RUNNING, _State.INTERRUPTED) and self._next_unit() is not None
        if not self._pool.all_finished():
            return True
        self.idle()
        return False

    def execute_next(self) -> Progress | None:
        """Do what the driver says, up to and including one unit.

        Returns:
            the unit's event; None when the driver has nothing left to do, or memory ran out and the unit
            comes again.
        """
        unit = self._next_unit()
        if unit is None:
            return None
        backend = self._generator.backend
        if backend.low_mem_level != unit.low_mem_level:
            backend.low_mem_level = unit.low_mem_level
        task = self._pool.get(unit.task_id)
        if task is None:
            self._unit = None
            raise TaskError(
                f"rank 0 asked for task {unit.task_id}, which rank {self._workers.rank} does not know"
            )
        try:
            return self.execute(task)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            without_frames(error)
        empty_cache(backend.device)
        return None

    def shutdown(self) -> None:
        """The driver sends its workers home; a worker serves until it does, or, after Ctrl+C, for a moment
        only.

        Raises:
            RankLostError: while this rank served; one that was lost before has been raised already.
        """
        if self._state is _State.CLOSED:
            return
        if isinstance(sys.exception(), KeyboardInterrupt):
            self._enter(_State.INTERRUPTED)  # it came between two units, and this rank closes over it
        known = self._monitor.lost is not None
        lost = None
        in_order = self.is_driver
        try:
            if self.is_driver:
                self._publish(Shutdown())
                self._channel.gather_status("shutdown", {}, 2 * _FAREWELL)
            elif self._worker_loop():
                in_order = True
                self._monitor.leave()
                self._channel.leave("shutdown")
        except RankLostError as error:
            lost = None if known or self.is_driver else error  # the driver has done what it wanted
            in_order = True
        finally:
            self._state = _State.CLOSED
        self._workers.leave(None if in_order else "interrupted")
        if lost is not None:
            raise lost

    # -- workers

    def _worker_loop(self) -> bool:
        """Serve until the driver dismisses; False if it does not within a moment after Ctrl+C."""
        while self._state is not _State.DISMISSED:
            try:
                interrupted = self._state is _State.INTERRUPTED
                message = self._receive(_FAREWELL if interrupted else None)
                if message is None:
                    return False
                if isinstance(message, ExecuteUnit):
                    self.execute_next()
            except KeyboardInterrupt:
                # the driver hears of it with the next unit, and has a moment longer to dismiss
                self._enter(_State.INTERRUPTED)
        return True

    def _enter(self, state: _State) -> None:
        """Change the state as its table says. The driver is never INTERRUPTED: what it raises is enough."""
        if state is _State.INTERRUPTED and self.is_driver:
            return
        if self._state in (_State.DISMISSED, _State.CLOSED):
            return
        if self._state is _State.INTERRUPTED and state is not _State.DISMISSED:
            return
        self._state = state

    def _publish(self, message: Message) -> None:
        with deferred_interrupts():
            self._channel.publish(messages.to_json(message))

    def _receive(self, patience: float | None) -> Message | None:
        """The driver's next message, with what it says done; a unit stays the next until it is run.

        Args:
            patience: as `ControlChannel.receive`.
        """
        if self._unit is not None:
            return self._unit
        try:
            with deferred_interrupts() as at_once:
                with at_once():
                    heard = self._channel.receive(patience)
                if heard is None:
                    return None
                self._channel.acknowledge()
                message = messages.from_json(heard)
                if isinstance(message, ExecuteUnit):
                    self._unit = message
                else:
                    self._apply(message)
                return message
        except KeyboardInterrupt:
            self._enter(_State.INTERRUPTED)
            raise

    def _next_unit(self) -> ExecuteUnit | None:
        """The next unit that the driver asks for; None once it says that it has none."""
        while self._state is not _State.DISMISSED:
            message = self._receive(0 if self._state is _State.IDLE else None)
            if message is None or isinstance(message, ExecuteUnit):
                return message
            if isinstance(message, Idle | Shutdown):
                return None
        return None

    def _apply(self, message: Message) -> None:
        """Whatever is no unit."""
        if isinstance(message, Idle | Shutdown):
            self._enter(_State.IDLE if isinstance(message, Idle) else _State.DISMISSED)
            self._unclaimed.clear()
            for task in self._pool.unfinished() if isinstance(message, Shutdown) else ():
                task.end(TaskStatus.CANCELLED)
            return
        self._enter(_State.RUNNING)
        if isinstance(message, AddTask):
            self._unclaimed = [task for task in self._unclaimed if not task.is_finished()]
            self._pool.prune()
            self._generator.stages.prune()
            self._pool.remove(message.task_id)  # one that ended, which the driver has forgotten
            task = _task_of(message)
            self._pool.add(task)
            self._unclaimed.append(task)
            if message.checkpoints is not None:
                self._checkpoints.add(task, Path(message.checkpoints))
                self._restore(task)
        if isinstance(message, SaveTask) and (kept := self._pool.get(message.task_id)) is not None:
            self._checkpoints.save(kept)
        ended = self._pool.get(message.task_id) if isinstance(message, EndTask) else None
        if isinstance(message, EndTask) and ended is not None and not ended.is_finished():
            ended.end(TaskStatus(message.status), TaskError(message.error) if message.error else None)

    def _restore(self, task: DiffusionTask) -> None:
        """Every rank looks for checkpoints; the newest of rank 0's counts of which all have theirs."""
        notes: list[str] = []
        found: dict[str, FoundCheckpoint] = {}
        for each in self._checkpoints.usable(task, notes):
            found.setdefault(each.digest(), each)
        mine = {"digests": list(found), "notes": notes}
        reports = self._channel.gather_status("checkpoints", mine, self._workers.timeout)
        notes = list(dict.fromkeys(note for report in reports for note in report["notes"]))
        for digest in reports[0]["digests"]:
            if all(digest in report["digests"] for report in reports):
                self._checkpoints.restore(task, found[digest], notes)
                return
        if any(report["digests"] for report in reports):
            notes.append("the ranks have no checkpoint of the same step")
        self._checkpoints.restore(task, None, notes)

    # -- a unit

    def _run(
        self, task: DiffusionTask, at_once: AtOnce
    ) -> tuple[Progress | None, UnitReport, BaseException | None]:
        """The unit on this rank: its event, the report, and what was raised."""
        saves = task.status is TaskStatus.SAVING
        place = f"{task.status}, step {task.current_step} of task {task.task_id}"
        try:
            if self._state is _State.INTERRUPTED:
                raise KeyboardInterrupt
            with at_once():
                with self._monitor.critical(place):
                    self._workers.groups.open()
                    event = None if saves else self._generator.generate_step(task)
                if saves:
                    # the driver's alone: whoever else is lost, its process must not be ended over half a file
                    event = self._generator.generate_step(task)
        except KeyboardInterrupt as error:
            # frames would keep the groups alive, and with them whoever waits in them
            return None, UnitReport(Outcome.INTERRUPTED), without_frames(error)
        except Exception as error:
            outcome = Outcome.OUT_OF_MEMORY if is_out_of_memory(error) else Outcome.FAILED
            report = UnitReport(outcome, f"{type(error).__name__}: {error}", self._is_exchange(error))
            return None, report, without_frames(error)
        if task.status is TaskStatus.FAILED:
            return event, UnitReport(Outcome.FAILED, task.error_message, self._is_exchange(task.error)), None
        if self._workers.groups.broken is not None and not saves:
            # on a GPU a queued exchange that is cut short raises nothing; what came after it was computed
            # from anything
            cut = f"cut short: {self._workers.groups.broken}"
            return None, UnitReport(Outcome.FAILED, cut, in_exchange=True), None
        return event, UnitReport(Outcome.DONE), None

    def _is_exchange(self, error: BaseException | None) -> bool:
        """Whether an error says only that other ranks could not be reached."""
        said = any(word in str(error) for word in _EXCHANGE_FAILURES)
        return said or isinstance(error, dist.DistError) or self._workers.groups.broken is not None

    def _gather(self, mine: UnitReport, stage: TaskStatus) -> list[UnitReport]:
        """Every rank's report. Saving is the driver's alone and takes what it takes."""
        patience = self._workers.timeout
        unlimited = mine.outcome is Outcome.DONE and stage is TaskStatus.SAVING
        report = dataclasses.asdict(mine)
        found = self._channel.gather_status("unit", report, None if unlimited else patience)
        return [UnitReport(**{**said, "outcome": Outcome(said["outcome"])}) for said in found]

    def _failed(
        self, task: DiffusionTask, stage: TaskStatus, reports: Sequence[UnitReport], event: Progress | None
    ) -> Progress:
        """The task fails on every rank with one error: the first that is not just a broken exchange."""
        failed = [rank for rank, report in enumerate(reports) if report.outcome is Outcome.FAILED]
        first = min(failed, key=lambda rank: (reports[rank].in_exchange, rank))
        if first == self._workers.rank and event is not None:
            return event
        message = f"{self._monitor.describe(first)}: {reports[first].error}"
        task.end(TaskStatus.FAILED, TaskError(message))
        task.notes.append(message)
        done = task.current_step
        total = task.num_inference_steps
        return Progress(task.task_id, task.status, stage, done, total, 0.0, None, message)


def _task_of(message: AddTask) -> DiffusionTask:
    params = DiffusionUserParams.from_mapping(message.params)
    resolved = None if message.resolved is None else DiffusionUserParams.from_mapping(message.resolved)
    steps = params.num_inference_steps or 0
    return DiffusionTask(message.task_id, params, message.seed, resolved, num_inference_steps=steps)


def _same_request(one: DiffusionUserParams, other: DiffusionUserParams) -> bool:
    """Whether two ranks' scripts mean the same: everything but what each draws or names for itself."""
    bare = [
        {**params.to_mapping(), "seed": None, "task_id": None, "save_path": None} for params in (one, other)
    ]
    return json.dumps(bare[0], default=str) == json.dumps(bare[1], default=str)


class _Snapshot:
    """A task as it was. Units set a task's fields and never change what is in them: references are enough."""

    def __init__(self, task: DiffusionTask) -> None:
        self._task = task
        self._fields = {field.name: vars(task)[field.name] for field in dataclasses.fields(task)}
        self._fields |= {
            "buffer": copy.copy(task.buffer),
            "notes": list(task.notes),
            "seconds": dict(task.seconds),
        }

    def restore(self) -> None:
        """Put it back."""
        for name, value in self._fields.items():
            setattr(self._task, name, value)


def _raised_elsewhere(outcome: Outcome, reports: Sequence[UnitReport]) -> BaseException:
    """What a rank raises for what happened on another."""
    rank = next(rank for rank, report in enumerate(reports) if report.outcome is outcome)
    if outcome is Outcome.INTERRUPTED:
        return KeyboardInterrupt(f"on rank {rank}")
    return torch.OutOfMemoryError(f"on rank {rank}: {reports[rank].error}")
