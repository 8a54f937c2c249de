"""The engine: requests in, events out. Owns a backend, a pool of tasks and a policy; the only layer with a
life.

Each step it asks the scheduler whose turn it is, lets the generator run one unit of that task, and hands out
the event.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, overload

from chitu_diffusion.backend import BackendState, DiffusionBackend, checked_args
from chitu_diffusion.config import EngineConfig, RankPlace, rank_place
from chitu_diffusion.errors import (
    RankLostError,
    UsageError,
    names_checked,
    raise_first,
    require_callable,
    require_kind,
)
from chitu_diffusion.executor.distributed import DistributedExecutor
from chitu_diffusion.executor.interrupts import deferred_interrupts
from chitu_diffusion.executor.local import Executor, LocalExecutor
from chitu_diffusion.executor.memory_levels import load_backend, run_unit
from chitu_diffusion.executor.task_checkpoints import SaveTimes, checkpoint_folder
from chitu_diffusion.executor.worker_group import WorkerGroup, join_ranks
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.registry import FoundModel, model_of
from chitu_diffusion.pipelines.admission import Admission
from chitu_diffusion.pipelines.hooks import StepEnd, TaskHooks, step_hook
from chitu_diffusion.pipelines.request import request_of, require_own_paths
from chitu_diffusion.pipelines.result import VideoResult
from chitu_diffusion.scheduler import DiffusionScheduler
from chitu_diffusion.task import DiffusionTask, DiffusionTaskPool, DiffusionUserParams, Progress, TaskStatus
from chitu_diffusion.task.following import TaskFeed

logger = logging.getLogger(__name__)
_CLOSED_EARLY = (
    "cancelled, for the engine was closed before; wait with engine.run_until_idle() or task.wait(), or use "
    "submit(..., checkpoints=FOLDER), from which a later engine goes on"
)
Prompts = list[str] | list[DiffusionUserParams] | tuple[str | DiffusionUserParams, ...]


@names_checked
class Engine:
    """Runs many requests on one model.

    Any thread may call it. Work units run one at a time, in whichever thread calls `step`, or waits for a
    task; `submit` and `cancel` leave a command in an inbox, which is emptied at the start of each unit, or at
    once where none is running. `close` waits for the end of the unit that is running.

    Args:
        args: the settings; None: the shipped model on this machine's best device.
        scheduler: a policy of one's own; None makes the one that `args` names.
        on_event: called with every event, in order.
        backend: a backend that exists already; the engine takes it over. None loads one, at a higher memory
            level than asked for where the weights do not fit otherwise.
        model: which, where `resolve_model` has found it already; None looks for the one that `args` names.
        place: this process among the ranks that share the work, from a caller that started them; None asks
            torchrun, if it started this process. Rank 0 decides and saves; the other ranks' `step` does what
            rank 0 says, so that the same loop is right on every rank, and `run_worker` is all of it.
        workers: the ranks, where they have met already. Ranks and model of a `backend` are its own.

    Raises:
        ModelError, UsageError: as `DiffusionBackend`.
        WillNotFitError: the weights do not fit at any memory level.
        RankLostError: another rank could not do its part.
    """

    def __init__(
        self,
        args: EngineConfig | None = None,
        *,
        scheduler: DiffusionScheduler | None = None,
        on_event: Callable[[Progress], None] | None = None,
        backend: DiffusionBackend | None = None,
        model: FoundModel | None = None,
        place: RankPlace | None = None,
        workers: WorkerGroup | None = None,
    ) -> None:
        try:
            require_kind("scheduler", scheduler, (DiffusionScheduler, NoneType), "DiffusionScheduler(...)")
            require_kind("backend", backend, (DiffusionBackend, NoneType), "DiffusionBackend(...)")
            require_kind("place", place, (RankPlace, NoneType), "RankPlace(rank, world, store=...)")
            require_callable("on_event", on_event)
            if backend is not None and (model is not None or place is not None):
                raise UsageError("backend has its model and ranks: leave model and place out")
            args = backend.args if backend is not None and args is None else checked_args(args, model)
            self.pool = DiffusionTaskPool(keep_ended=args.scheduler.keep_ended)
            self.scheduler = scheduler or DiffusionScheduler(args.scheduler.policy)
            if backend is None:
                model = model or model_of(args.models)
                workers = workers or join_ranks(args, model.spec, place or rank_place())
            self.backend = backend or load_backend(args, model, workers)
            self.generator = Generator(self.backend)
            self._executor: Executor = (
                LocalExecutor(self.generator, self.pool)
                if workers is None
                else DistributedExecutor(self.generator, self.pool, workers)
            )
        except BaseException as error:
            if workers is not None:
                workers.leave(f"{type(error).__name__}: {error}")
            raise
        self._on_event = on_event
        self._turn = threading.RLock()  # a task changes under it; one's own `on_event` may cancel or close
        self._unit_thread: int | None = None
        self._inbox: deque[Callable[[], None]] = deque()
        self._open = True
        self._interrupt = False  # diffusers' callbacks set it: the task that runs is cancelled
        self._admitting = threading.RLock()  # of `_open`, and of what is in both pool and inbox, or in none
        self._admission = Admission(self.backend)
        self._feed = TaskFeed(self._step_if_free, self.cancel)
        self._saves = SaveTimes(self._executor.save_task)

    @property
    def is_driver(self) -> bool:
        """Whether this rank decides and saves; true without ranks."""
        return self._executor.is_driver

    @overload
    def generate(
        self, prompt: str | DiffusionUserParams, *, callback_on_step_end: StepEnd | None = None, **fields: Any
    ) -> VideoResult: ...

    @overload
    def generate(
        self, prompt: Prompts, *, callback_on_step_end: StepEnd | None = None, **fields: Any
    ) -> list[VideoResult]: ...

    def generate(
        self,
        prompt: str | DiffusionUserParams | Prompts,
        *,
        callback_on_step_end: StepEnd | None = None,
        **fields: Any,
    ) -> VideoResult | list[VideoResult]:
        """A video of each prompt, in memory; a file only where `save_path` asks for one.

        Args:
            prompt: a text or a request, or a list of them.
            callback_on_step_end: see `submit`.
            fields: of `DiffusionUserParams`, for all.

        Returns:
            a result, or one for each of the list, in order. One that was cancelled has no frames; nor has any
            on ranks but the first.

        Raises:
            TaskError: a video failed: the first one's error, once the others are done.
            UsageError, WillNotFitError: as `submit`; none is made then.
        """
        prompts = prompt if isinstance(prompt, list | tuple) else (prompt,)
        requests = [request_of(each, fields) for each in prompts]
        require_own_paths(requests)
        results: list[VideoResult] = []
        try:
            for request in requests:
                task = DiffusionTask.from_user_request(request)
                result = VideoResult(task, quality=self.backend.args.output.quality)
                result.task = self._take_in(task, callback_on_step_end, result)
                results.append(result)
            for result in results:
                result.task.wait()
        except BaseException:
            for result in results:
                result.task.cancel()
            raise
        raise_first([result.task.error for result in results])
        return results if prompts is prompt else results[0]

    def submit(
        self,
        prompt: str | DiffusionUserParams | DiffusionTask,
        *,
        checkpoints: str | Path | None = None,
        callback_on_step_end: StepEnd | None = None,
        **fields: Any,
    ) -> DiffusionTask:
        """Take a request in, if the model can do it. Its video goes to a file, named by the task's id where
        `save_path` is None.

        Args:
            prompt: a text, a request, or a task that was made of one.
            checkpoints: a folder for checkpoints of this task alone. Where one lies in it already, the task
                goes on from there (`task.resumed` says how); from then on one is written every
                `checkpoint.every_s` seconds and by `save_tasks`, and all are gone when the video stands.
            callback_on_step_end: called on rank 0 after each denoising step with (engine, step from 0,
                timestep, {"latents": [1, C, T, H, W], a copy, "clean": gives those that the step points at,
                without noise, "task": task}). It may `task.cancel()`, and on one rank give back {"latents":
                tensor} for the next step to start from. What it raises fails the task.
            fields: of `DiffusionUserParams`, beside a text or in place of a request's own.

        Returns:
            the task, pending.

        Raises:
            UsageError: a value that this model cannot do, a task id that is taken, a task that has ended or
                is another engine's, or the engine is closed.
            WillNotFitError: more memory than there is, at every memory level.
        """
        if not isinstance(prompt, DiffusionTask):
            prompt = DiffusionTask.from_user_request(request_of(prompt, fields))
        elif fields:
            raise UsageError(f"task {prompt.task_id} has its request: leave {', '.join(fields)} out")
        return self._take_in(prompt, callback_on_step_end, checkpoints=checkpoints)

    def _take_in(
        self,
        task: DiffusionTask,
        callback: StepEnd | None,
        result: VideoResult | None = None,
        checkpoints: str | Path | None = None,
    ) -> DiffusionTask:
        self._require_open()
        folder = checkpoint_folder(checkpoints)
        self._feed.require_free(task)
        if task.status is not TaskStatus.PENDING and self.backend.groups.plan.world > 1:
            raise UsageError(
                f"task {task.task_id} is {task.status} on this rank alone; use submit(params, "
                "checkpoints=FOLDER)",
                field="checkpoints",
            )
        self._admission.admit(task, in_memory=result is not None)
        if not self.is_driver:
            with self._turn:
                self._require_open()
                task = self._executor.claim_task(task)
                self._feed.add(task)
                return task
        on_video = None if result is None else result.receive
        hooks = TaskHooks(on_step_end=step_hook(callback, self), on_video=on_video)
        with deferred_interrupts(), self._admitting:
            self._require_open()
            self.pool.add(task)
            self._feed.add(task)
            if folder is not None:
                self._saves.begin(task)
            self._inbox.append(partial(self._add, task, hooks, folder))
        self._deliver()
        return task

    def _add(self, task: DiffusionTask, hooks: TaskHooks, checkpoints: Path | None) -> None:
        self.generator.stages.hooks[task] = hooks
        self._executor.add_task(task, checkpoints)

    def step(self) -> Progress | None:
        """One unit of the task whose turn it is; None when no task has work left.

        Raises:
            UsageError: the engine is closed, the scheduler named a task that is not here, or this is inside a
                unit (a callback).
            RankLostError: another rank died or froze.
        """
        done = self._step()
        return None if done is None else done[1]

    def _step(self) -> tuple[DiffusionTask, Progress] | None:
        with self._driving():
            self._require_open()
            done = self._drive() if self.is_driver else self._serve()
            self._prune()
            if done is not None:
                self._feed.publish(*done)
                if self._on_event is not None:
                    self._on_event(done[1])
        return done

    def _step_if_free(self) -> bool:
        """For whoever waits: one unit, unless another thread drives; whether there was one."""
        self._require_between_units()
        if not self._turn.acquire(blocking=False):
            return False
        try:
            return self._step() is not None
        except UsageError:
            if self._open:
                raise
            return False
        finally:
            self._turn.release()

    def has_work(self) -> bool:
        """Whether a task has work left. On ranks but the first: whether rank 0 has, which is waited for."""
        if self.is_driver and not self.pool.all_finished():
            return True
        with self._driving():
            return self._open and self._executor.has_work()

    def _drive(self) -> tuple[DiffusionTask, Progress] | None:
        while True:
            with self._admitting:
                task_id = self.scheduler.schedule(self.pool)
            if task_id is None:
                self._executor.idle()
                return None
            task = self.pool.get(task_id)
            if task is None:
                raise UsageError(
                    f"the scheduler named task {task_id!r}, which is not in the pool", field="scheduler"
                )
            self._drain()  # the task may have come since the unit began, and the other ranks must know it
            if not task.is_finished():
                break
        self._unit_thread = threading.get_ident()
        try:
            event = run_unit(self._executor, self.backend, task)
        finally:
            self._unit_thread = None
        self._save_if_due(task)
        return task, event

    def _serve(self) -> tuple[DiffusionTask, Progress] | None:
        """On a worker: the next unit that rank 0 asks for."""
        self._unit_thread = threading.get_ident()
        try:
            event = self._executor.execute_next()
        finally:
            self._unit_thread = None  # by no context manager: Ctrl+C on the way out of one would leave it set
        task = None if event is None else self.pool.get(event.task_id)
        return None if task is None or event is None else (task, event)

    def run_until_idle(self, *, raise_on_failure: bool = True) -> None:
        """Step until no task has work left, or another thread closes the engine. Ctrl+C leaves the running
        task where it was: call again to go on.

        Args:
            raise_on_failure: whether a task that fails meanwhile is raised, once no other has work left.

        Raises:
            TaskError: the first such task's error.
            UsageError, RankLostError: as `step`.
        """
        errors: list[Exception | None] = []
        while self.has_work():
            try:
                done = self._step()
            except UsageError:
                if self._open:
                    raise
                break
            errors += [] if done is None else [done[0].error]
        if raise_on_failure:
            raise_first(errors)

    def save_tasks(self) -> list[DiffusionTask]:
        """Write a checkpoint of every task that has begun and was submitted with a folder for them; waits for
        the end of the unit that is running.

        Returns:
            these tasks.
        """
        self._require_between_units()
        with self._turn:
            begun = [task for task in self.pool.unfinished() if task in self._saves and task.resolved]
            for task in begun:
                if not self._saves.is_saved(task):
                    self._saves.save(task)
        return [task for task in begun if task.current_step or task.status is TaskStatus.DENOISING]

    def _save_if_due(self, task: DiffusionTask) -> None:
        """A checkpoint, where the last one is old enough; writing takes at most a twentieth of the time."""
        every = self.backend.args.checkpoint.every_s
        if self._saves.is_due(task, every) and self.backend.weights_are_hashed():
            self._saves.save(task)

    def cancel(self, task_id: str) -> bool:
        """End a task as cancelled: at once, or at the end of the unit that is running; waits for neither. On
        ranks but the first nothing is done: rank 0's word counts, and comes.

        Returns:
            False if the task is unknown or has ended. True: it will end as cancelled, unless the unit that
            is running is its last.
        """
        require_kind("task_id", task_id, str, "its task_id, or task.cancel()")
        with self._admitting:
            task = self.pool.get(task_id)
            if task is None or task.is_finished():
                return False
            if self.is_driver:
                self._inbox.append(partial(self._cancel, task))
        self._deliver()
        return True

    def run_worker(self) -> None:
        """On ranks but the first: serve rank 0 until it closes, and let go of the model. This is a worker's
        whole life, however its process was started.

        Raises:
            UsageError: this is rank 0, or the only rank.
            RankLostError: another rank died or froze.
        """
        if self.is_driver:
            raise UsageError("this rank decides and has none to serve: use step() or run_until_idle()")
        self.close()

    def close(self) -> None:
        """Cancel what is unfinished and let go of the model; silent the second time. What was submitted with
        a folder for checkpoints is saved first, by `save_tasks`.

        On ranks but the first it serves rank 0 until that one closes, as `run_worker`.

        Raises:
            UsageError: this is inside a unit (a callback).
            RankLostError: another rank died or froze while this one served.
        """
        self._require_between_units()
        with self._admitting:
            self._open = False
        with self._turn:
            self._inbox.clear()
            with ExitStack() as ending:
                ending.callback(self._end_tasks)
                ending.callback(self._executor.shutdown)
                if self.is_driver and not isinstance(sys.exception(), RankLostError):
                    self.save_tasks()

    def _end_tasks(self) -> None:
        left = self.pool.unfinished()
        for task in left:
            task.end(TaskStatus.CANCELLED, message=_CLOSED_EARLY)
        if left and self.is_driver and sys.exception() is None:
            logger.warning("%s: %s", ", ".join(task.task_id for task in left), _CLOSED_EARLY)
        self._feed.close_ended()
        self._prune()
        self.backend.terminate()

    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.backend.state is BackendState.TERMINATED

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # -- the inbox

    @contextmanager
    def _driving(self) -> Iterator[None]:
        """This thread is the driver: it empties the inbox first, and what came meanwhile at the end."""
        self._require_between_units()
        with self._turn:
            self._drain()
            yield
            self._feed.close_ended()
        self._deliver()

    def _require_between_units(self) -> None:
        """What would begin a unit inside a unit, or wait for its end there."""
        if self._unit_thread == threading.get_ident():
            raise UsageError(
                "a unit is running, and this is inside it: a callback may call submit and cancel; wait, step "
                "or close when it is over"
            )

    def _deliver(self) -> None:
        """Empty the inbox, unless a unit is running: then its thread does."""
        if self._unit_thread == threading.get_ident():
            return
        while self._inbox and self._turn.acquire(blocking=False):
            try:
                self._drain()
                self._feed.close_ended()
            finally:
                self._turn.release()

    def _drain(self) -> None:
        while self._inbox:
            with deferred_interrupts():  # else a command might be lost, or half done on some ranks
                self._inbox.popleft()()

    def _prune(self) -> None:
        self.pool.prune()
        self.generator.stages.prune()

    def _cancel(self, task: DiffusionTask) -> None:
        if not task.is_finished():
            task.end(TaskStatus.CANCELLED)
            self._executor.end_task(task)
        self._prune()

    def _require_open(self) -> None:
        if not self._open:
            raise UsageError(
                "this engine is closed and its model terminated; make another one with Engine(args)"
            )
        self.backend.require_alive()
