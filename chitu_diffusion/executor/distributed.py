"""One unit on every rank at once: rank 0 orders it, all run it, all vote how it went, and all draw the same
conclusion.

A unit that failed anywhere has failed everywhere: the task ends on all ranks, or, when memory ran out or
Ctrl+C came, goes back to where it was. Exchanges that were cut short are dropped and made anew, so the group
outlives a failed task. Knows tasks, the generator and the crew; not whose turn it is.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import torch
import torch.distributed as dist

from chitu_diffusion.errors import RankLostError, TaskError, UsageError
from chitu_diffusion.executor.worker_group import Crew
from chitu_diffusion.generator import Generator, without_frames
from chitu_diffusion.memory.estimate import free_memory, is_out_of_memory
from chitu_diffusion.task import DiffusionTask, DiffusionTaskPool, DiffusionUserParams, Progress, TaskStatus

_FAREWELL = 3.0
_EXCHANGE_FAILURES = ("gloo", "NCCL", "process group", "Connection closed")


class Alone:
    """The lockstep of one rank: a unit is a unit, and nobody needs to hear of anything."""

    leads = True

    def __init__(self, generator: Generator, pool: DiffusionTaskPool) -> None:
        self._generator, self._pool = generator, pool

    def admit(self, task: DiffusionTask) -> None:
        """A task that came into the pool."""

    def claim(self, task: DiffusionTask) -> DiffusionTask:
        """A task that this rank's own script was given: the one that rank 0 means by it."""
        return task

    def unit(self, task: DiffusionTask) -> Progress:
        """One unit; see `Generator.generate_step`."""
        return self._generator.generate_step(task)

    def ended(self, task: DiffusionTask) -> None:
        """A task was ended between two units."""

    def rest(self) -> None:
        """No task has work left."""

    def follow(self) -> Progress | None:
        """One unit that rank 0 orders; None when it has nothing to do."""
        return None

    def has_work(self) -> bool:
        """Whether a task has work left."""
        return not self._pool.all_finished()

    def close(self) -> None:
        """Go."""


class Together(Alone):
    """The lockstep of several ranks. Rank 0 leads; on the others `follow` does what it says.

    Args:
        generator: of this rank.
        pool: of this rank; it holds the same tasks on all of them.
        crew: the ranks.
    """

    def __init__(self, generator: Generator, pool: DiffusionTaskPool, crew: Crew) -> None:
        super().__init__(generator, pool)
        self.leads = crew.rank == 0
        self._crew, self._orders, self._watch = crew, crew.orders, crew.watch
        self._resting = self._stopped = self._interrupted = self._closed = False
        self._held: dict[str, Any] | None = None
        self._unclaimed: list[DiffusionTask] = []  # of rank 0, not yet given to this rank by its own script
        self._watch.at("waiting for the other ranks to load the model")
        self._orders.vote({})
        self._watch.at("waiting for work")

    def admit(self, task: DiffusionTask) -> None:
        """Rank 0 tells the others of a task."""
        self._resting = False
        self._orders.say(
            {"do": "task", "id": task.task_id, "seed": task.seed, "params": task.params.to_mapping()}
        )

    def claim(self, task: DiffusionTask) -> DiffusionTask:
        """On ranks but the first, which run the same script: the task becomes rank 0's own.

        Tasks that rank 0 alone is given are taken in by the others when they come to them.

        Raises:
            UsageError: rank 0 goes on without having been given a task.
        """
        while True:
            for adopted in self._unclaimed:
                if _same_request(adopted.params, task.params):
                    self._unclaimed.remove(adopted)
                    return adopted
            order = self._held or self._hear(None)
            if order is None or order["do"] == "unit":
                self._held = order
                raise UsageError(
                    f"task {task.task_id}: rank 0 was not given it; give tasks to all ranks, or to rank 0 "
                    "alone"
                )
            self._apply(order)

    def unit(self, task: DiffusionTask) -> Progress:
        """One unit on all ranks.

        Raises:
            torch.OutOfMemoryError: on some rank; the task is where it was, on all.
            KeyboardInterrupt: the same.
            RankLostError: the group is at its end.
        """
        if self.leads:
            self._orders.say(
                {"do": "unit", "id": task.task_id, "level": self._generator.backend.low_mem_level}
            )
        before, status = _Snapshot(task), task.status
        event, outcome, raised = self._run(task)
        if outcome["how"] != "done":
            self._crew.fall()
        try:
            votes = self._orders.vote(outcome, self._patience(outcome, status))
        except KeyboardInterrupt:
            self._interrupted = True
            raise
        self._watch.at("between two units")
        if all(vote["how"] == "done" for vote in votes):
            assert event is not None
            return event
        self._crew.groups.abandon()
        for how in ("interrupted", "memory"):
            if any(vote["how"] == how for vote in votes):
                before.restore()
                self._interrupted |= how == "interrupted"
                raise raised or _stand_in(how, votes)
        return self._failed(task, status, votes, event)

    def ended(self, task: DiffusionTask) -> None:
        """Rank 0 tells the others that a task ended between two units."""
        if self.leads:
            self._orders.say(
                {"do": "end", "id": task.task_id, "status": task.status, "error": task.error_message}
            )

    def rest(self) -> None:
        """Rank 0 tells the others, once, that no task has work left."""
        if self.leads and not self._resting:
            self._resting = True
            self._orders.say({"do": "rest"})

    def has_work(self) -> bool:
        """Whether rank 0 has a task with work left. The others wait for its answer, and once that was no,
        keep it until they are given a task, follow, or close: so the same script takes the same turns on
        every rank.
        """
        if not self.leads:
            return not self._resting and self._next_unit() is not None
        if super().has_work():
            return True
        self.rest()
        return False

    def follow(self) -> Progress | None:
        """Do what rank 0 says, up to and including one unit.

        Returns:
            the unit's event; None when rank 0 has nothing left to do, or memory ran out and the unit comes
            again.
        """
        order = self._next_unit()
        if order is None:
            return None
        self._held = None
        backend = self._generator.backend
        if backend.low_mem_level != order["level"]:
            backend.low_mem_level = order["level"]
        task = self._pool.get(order["id"])
        if task is None:
            raise TaskError(f"rank 0 ordered task {order['id']}, which rank {self._crew.rank} does not know")
        try:
            return self.unit(task)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            without_frames(error)
        free_memory(backend.device)
        return None

    def close(self) -> None:
        """Rank 0 sends all home; the others serve until it does, or, after Ctrl+C, for a moment only.

        Raises:
            RankLostError: while this rank served; one that was lost before has been raised already.
        """
        if self._closed:
            return
        self._closed, known, lost = True, self._watch.lost is not None, None
        try:
            if self.leads:
                self._orders.say({"do": "stop"})
                self._orders.vote({}, 2 * _FAREWELL)
            elif self._serve():
                self._watch.leave()
                self._orders.depart({})
        except RankLostError as error:
            lost = None if known or self.leads else error  # rank 0 has done what it wanted
            self._stopped = True
        self._crew.leave(None if self._stopped or self.leads else "interrupted")
        if lost is not None:
            raise lost

    # -- followers

    def _serve(self) -> bool:
        """Follow until rank 0 says stop; False if it does not within a moment after Ctrl+C."""
        while not self._stopped:
            try:
                order = self._held or self._hear(_FAREWELL if self._interrupted else None)
            except KeyboardInterrupt:
                continue  # rank 0 hears of it with the next unit, or when this rank leaves
            if order is None:
                return False
            if order["do"] == "unit":
                self._held = order
                self._follow_to_the_end()
            else:
                self._apply(order)
        return True

    def _follow_to_the_end(self) -> None:
        try:
            self.follow()
        except KeyboardInterrupt:
            self._interrupted = True  # the loop in `_serve` waits a moment longer for rank 0 to say stop

    def _hear(self, patience: float | None) -> dict[str, Any] | None:
        try:
            return self._orders.hear(patience)
        except KeyboardInterrupt:
            self._interrupted = True
            raise

    def _next_unit(self) -> dict[str, Any] | None:
        """The next unit that rank 0 orders; None once it says that it has none."""
        while not self._stopped:
            order = self._held or self._hear(0 if self._resting else None)
            if order is None:
                return None
            if order["do"] == "unit":
                self._held = order
                return order
            self._apply(order)
            if self._resting:
                return None
        return None

    def _apply(self, order: dict[str, Any]) -> None:
        self._held = None
        self._resting = order["do"] in ("rest", "stop")
        self._stopped = order["do"] == "stop"
        if self._resting:
            self._unclaimed.clear()
        if order["do"] == "task":
            params = DiffusionUserParams.from_mapping(order["params"])
            adopted = DiffusionTask(
                order["id"], params, order["seed"], num_inference_steps=params.num_inference_steps or 0
            )
            self._unclaimed = [task for task in self._unclaimed if not task.is_finished()]
            if self._pool.get(adopted.task_id) is None:  # Ctrl+C may make rank 0 say it twice
                self._pool.add(adopted)
                self._unclaimed.append(adopted)
        task = self._pool.get(order["id"]) if order["do"] == "end" else None
        if task is not None and not task.is_finished():
            task.end(TaskStatus(order["status"]), TaskError(order["error"]) if order["error"] else None)

    # -- a unit

    def _run(self, task: DiffusionTask) -> tuple[Progress | None, dict[str, Any], BaseException | None]:
        """The unit on this rank: its event, the vote, and what was raised."""
        place, saves = (
            f"{task.status}, step {task.current_step} of task {task.task_id}",
            task.status is TaskStatus.SAVING,
        )
        try:
            if self._interrupted and not self.leads:
                raise KeyboardInterrupt
            with self._watch.busy(place):
                self._crew.groups.open()
                event = None if saves else self._generator.generate_step(task)
            if saves:
                # rank 0's alone: whoever else is lost, its process must not be ended over half a file
                event = self._generator.generate_step(task)
        except KeyboardInterrupt as error:
            # frames would keep the groups alive, and with them whoever waits in them
            return None, {"how": "interrupted"}, without_frames(error)
        except Exception as error:
            how = "memory" if is_out_of_memory(error) else "failed"
            vote = {
                "how": how,
                "error": f"{type(error).__name__}: {error}",
                "exchange": self._is_exchange(error),
            }
            return None, vote, without_frames(error)
        if task.status is TaskStatus.FAILED:
            return (
                event,
                {"how": "failed", "error": task.error_message, "exchange": self._is_exchange(task.error)},
                None,
            )
        if self._crew.groups.broken is not None and not saves:
            # on a GPU a queued exchange that is cut short raises nothing; what came after it was computed
            # from anything
            return (
                None,
                {"how": "failed", "error": f"cut short: {self._crew.groups.broken}", "exchange": True},
                None,
            )
        return event, {"how": "done"}, None

    def _is_exchange(self, error: BaseException | None) -> bool:
        """Whether an error says only that the other ranks could not be reached: somebody else's failure, most
        likely.
        """
        words = any(word in str(error) for word in _EXCHANGE_FAILURES)
        return words or isinstance(error, dist.DistError) or self._crew.groups.broken is not None

    def _patience(self, outcome: dict[str, Any], status: TaskStatus) -> float | None:
        """How long the others may take from here; saving is rank 0's alone and takes what it takes."""
        if outcome["how"] == "done" and status is TaskStatus.SAVING:
            return None
        return self._crew.timeout

    def _failed(
        self, task: DiffusionTask, stage: TaskStatus, votes: list[dict[str, Any]], event: Progress | None
    ) -> Progress:
        """The task fails on every rank with one and the same error: the first that is not just a broken
        exchange.
        """
        failed = [rank for rank, vote in enumerate(votes) if vote["how"] == "failed"]
        first = min(failed, key=lambda rank: (votes[rank]["exchange"], rank))
        if first == self._crew.rank and event is not None:
            return event
        message = f"{self._watch.describe(first)}: {votes[first]['error']}"
        task.end(TaskStatus.FAILED, TaskError(message))
        task.events.append(message)
        return Progress(
            task.task_id, task.status, stage, task.current_step, task.num_inference_steps, 0.0, None, message
        )


def _same_request(one: DiffusionUserParams, other: DiffusionUserParams) -> bool:
    """Whether two ranks' scripts mean the same: everything but what each draws or names for itself."""
    bare = [
        {**params.to_mapping(), "seed": None, "task_id": None, "save_path": None} for params in (one, other)
    ]
    return json.dumps(bare[0], default=str) == json.dumps(bare[1], default=str)


class _Snapshot:
    """A task as it was. Units change a task's fields and never what lies in them, so references will do."""

    def __init__(self, task: DiffusionTask) -> None:
        self._task = task
        self._fields = {field.name: vars(task)[field.name] for field in dataclasses.fields(task)}
        self._fields |= {
            "buffer": copy.copy(task.buffer),
            "events": list(task.events),
            "seconds": dict(task.seconds),
        }

    def restore(self) -> None:
        """Put it back."""
        for name, value in self._fields.items():
            setattr(self._task, name, value)


def _stand_in(how: str, votes: list[dict[str, Any]]) -> BaseException:
    """What a rank raises for what happened on another."""
    rank = next(rank for rank, vote in enumerate(votes) if vote["how"] == how)
    if how == "interrupted":
        return KeyboardInterrupt(f"on rank {rank}")
    return torch.OutOfMemoryError(f"on rank {rank}: {votes[rank]['error']}")
