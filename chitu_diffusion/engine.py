"""The engine: requests in, events out. Owns a backend, a pool of tasks and a policy; the only layer with a
life.

Each step it asks the scheduler whose turn it is, lets the generator run one unit of that task, and hands out
the event. When memory runs out it frees what it can, raises the memory level and runs the same unit again.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from chitu_diffusion.backend import BackendState, DiffusionBackend, pick_device
from chitu_diffusion.config import EngineConfig, rank_place, set_nccl_defaults
from chitu_diffusion.distributed.plan import plan_for
from chitu_diffusion.errors import StageError, UsageError, WillNotFitError, without_frames
from chitu_diffusion.executor.distributed import DistributedExecutor
from chitu_diffusion.executor.local import Executor, LocalExecutor
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.generator import Generator
from chitu_diffusion.memory.device import empty_cache, is_out_of_memory, top_useful_level
from chitu_diffusion.memory.offload import TOP_LEVEL
from chitu_diffusion.models.registry import FoundModel, resolve_model
from chitu_diffusion.models.spec import ModelSpec
from chitu_diffusion.pipelines.admission import Admission, smaller
from chitu_diffusion.scheduler import DiffusionScheduler
from chitu_diffusion.task import DiffusionTask, DiffusionTaskPool, DiffusionUserParams, Progress, TaskStatus

logger = logging.getLogger(__name__)


class Engine:
    """Runs many requests on one model.

    Any thread may call it. Work units run one at a time, in whichever thread calls `step`; `submit` and
    `cancel` leave a command in an inbox, which is emptied at the start of each unit, or at once where none is
    running. `close` waits for the end of the unit that is running.

    Args:
        args: the settings; None: the shipped model on this machine's best device.
        scheduler: a policy of one's own; None makes the one that `args` names.
        on_event: called with every event, in order.
        backend: a backend that exists already; the engine takes it over. None loads one, at a higher memory
            level than asked for where the weights do not fit otherwise.
        model: which, where `resolve_model` has found it already; None looks for the one that `args` names.
        workers: the ranks that share the work; None asks torchrun, if it started this process. Rank 0 decides
            and saves; the other ranks' `step` does what rank 0 says, so that the same loop is right on every
            rank.

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
        workers: WorkerGroup | None = None,
    ) -> None:
        args = args or (backend.args if backend is not None else EngineConfig())
        self.pool = DiffusionTaskPool(keep_ended=args.scheduler.keep_ended)
        self.scheduler = scheduler or DiffusionScheduler(args.scheduler.policy)
        try:
            if backend is None:
                model = model or resolve_model(args.models.name, args.models.ckpt_dir)
                workers = workers or join_ranks(args, model.spec)
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
        self._inbox: deque[Callable[[], None]] = deque()
        self._open = True
        self._admitting = threading.Lock()  # of `_open`: nothing is taken in after `close` has begun
        self._admission = Admission(self.backend)
        self._last_saved: weakref.WeakKeyDictionary[DiffusionTask, float] = weakref.WeakKeyDictionary()
        self._save_seconds = 0.0

    @property
    def is_driver(self) -> bool:
        """Whether this rank decides and saves; true without ranks."""
        return self._executor.is_driver

    def submit(
        self, request: DiffusionUserParams | DiffusionTask, *, checkpoints: str | Path | None = None
    ) -> DiffusionTask:
        """Take a request in, if the model can do it.

        Args:
            request: parameters, or a task that was made of them.
            checkpoints: a folder for checkpoints of this task alone. Where one lies in it already, the task
                goes on from there (`task.resumed` says how); from then on one is written every
                `checkpoint.every_s` seconds and by `save_tasks`, and all are gone when the video stands.

        Returns:
            the task, pending.

        Raises:
            UsageError: a value that this model cannot do, a task id that is taken, or the engine is closed.
            WillNotFitError: more memory than there is, at every memory level.
        """
        task = request if isinstance(request, DiffusionTask) else DiffusionTask.from_user_request(request)
        self._require_open()
        if task.status is not TaskStatus.PENDING and self.backend.groups.plan.world > 1:
            raise UsageError(
                f"task {task.task_id} is {task.status} on this rank alone; use submit(params, "
                "checkpoints=FOLDER)",
                field="checkpoints",
            )
        self._admission.admit(task)
        if not self.is_driver:
            with self._turn:
                self._require_open()
                return self._executor.claim_task(task)
        with self._admitting:
            self._require_open()
            self.pool.add(task)
            folder = None if checkpoints is None else Path(checkpoints).absolute()
            if folder is not None:
                self._last_saved[task] = time.monotonic()
            self._inbox.append(partial(self._executor.add_task, task, folder))
        self._deliver()
        return task

    def step(self) -> Progress | None:
        """One unit of the task whose turn it is; None when no task has work left.

        Raises:
            UsageError: the engine is closed, or the scheduler named a task that is not here.
            RankLostError: another rank died or froze.
        """
        with self._driving():
            self._require_open()
            event = self._drive() if self.is_driver else self._executor.execute_next()
            self._prune()
            if event is not None and self._on_event is not None:
                self._on_event(event)
        return event

    def has_work(self) -> bool:
        """Whether a task has work left. On ranks but the first: whether rank 0 has, which is waited for."""
        if self.is_driver and not self.pool.all_finished():
            return True
        with self._driving():
            return self._open and self._executor.has_work()

    def _drive(self) -> Progress | None:
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
        event = self._advance(task)
        self._save_if_due(task)
        return event

    def run_until_idle(self) -> None:
        """Step until no task has work left, or another thread closes the engine. Ctrl+C leaves the running
        task where it was: call again to go on."""
        while self.has_work():
            try:
                self.step()
            except UsageError:
                if self._open:
                    raise

    def save_tasks(self) -> list[DiffusionTask]:
        """Write a checkpoint of every task that has begun and was submitted with a folder for them; waits for
        the end of the unit that is running.

        Returns:
            these tasks.
        """
        with self._turn:
            begun = [task for task in self.pool.unfinished() if task in self._last_saved and task.resolved]
            for task in begun:
                self._executor.save_task(task)
        return [task for task in begun if task.current_step or task.status is TaskStatus.DENOISING]

    def _save_if_due(self, task: DiffusionTask) -> None:
        """A checkpoint, where the last one is old enough; writing takes at most a twentieth of the time."""
        if task.is_finished():
            self._last_saved.pop(task, None)
        if task not in self._last_saved or not self.backend.weights_are_hashed():
            return
        now = time.monotonic()
        every = self.backend.args.checkpoint.every_s
        if now - self._last_saved[task] >= (max(every, 20 * self._save_seconds) if every else 0.0):
            self._executor.save_task(task)
            self._last_saved[task] = time.monotonic()
            self._save_seconds = time.monotonic() - now

    def cancel(self, task_id: str) -> bool:
        """End a task as cancelled: at once, or at the end of the unit that is running; waits for neither.

        Returns:
            False if the task is unknown or has ended. True: it will end as cancelled, unless the unit that
            is running is its last.
        """
        task = self.pool.get(task_id)
        if task is None or task.is_finished():
            return False
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
        """Cancel what is unfinished and let go of the model; silent the second time.

        On ranks but the first it serves rank 0 until that one closes, as `run_worker`.

        Raises:
            RankLostError: another rank died or froze while this one served.
        """
        with self._admitting:
            self._open = False
        with self._turn:
            self._inbox.clear()
            try:
                self._executor.shutdown()
            finally:
                for task in self.pool.unfinished():
                    task.end(TaskStatus.CANCELLED)
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
        with self._turn:
            self._drain()
            yield
        self._deliver()

    def _deliver(self) -> None:
        """Empty the inbox, unless a unit is running: then its thread does."""
        while self._inbox and self._turn.acquire(blocking=False):
            try:
                self._drain()
            finally:
                self._turn.release()

    def _drain(self) -> None:
        while self._inbox:
            self._inbox[0]()
            self._inbox.popleft()  # not before it is done: Ctrl+C may come in between

    def _prune(self) -> None:
        self.pool.prune()
        self.generator.stages.prune()

    def _cancel(self, task: DiffusionTask) -> None:
        if not task.is_finished():
            task.end(TaskStatus.CANCELLED)
            self._executor.end_task(task)

    def _require_open(self) -> None:
        if not self._open:
            raise UsageError(
                "this engine is closed and its model terminated; make another one with Engine(args)"
            )
        self.backend.require_alive()

    # -- memory

    def _advance(self, task: DiffusionTask) -> Progress:
        """One unit, at as many memory levels as it takes."""
        notes: list[str] = []
        while True:
            failure: Exception
            try:
                return _with_notes(self._executor.execute(task), notes)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                failure = error
                without_frames(error)
            stage = task.status
            empty_cache(self.backend.device)
            level = self.backend.low_mem_level + 1
            if level > top_useful_level(self.backend.device):
                return self._give_up(task, stage, failure, notes)
            self.backend.low_mem_level = level
            notes.append(f"out of memory in {stage}: memory level raised to {level}, trying again")
            task.events.append(notes[-1])
            logger.warning("task %s: %s", task.task_id, notes[-1])

    def _give_up(
        self, task: DiffusionTask, stage: TaskStatus, failure: Exception, notes: list[str]
    ) -> Progress:
        cause = WillNotFitError(f"out of memory at the highest memory level ({failure}); {smaller(task)}")
        error = StageError(str(stage), task.current_step if stage is TaskStatus.DENOISING else None, cause)
        task.end(TaskStatus.FAILED, error)
        task.events.append(str(error))
        self._executor.end_task(task)
        message = "; ".join([*notes, str(error)])
        return Progress(
            task.task_id, task.status, stage, task.current_step, task.num_inference_steps, 0.0, None, message
        )


def join_ranks(args: EngineConfig, spec: ModelSpec) -> WorkerGroup | None:
    """The ranks that torchrun started, laid out as the settings say; None for a process that was started
    alone.

    Raises:
        UsageError: a layout that cannot be; names one that would fit.
    """
    place = rank_place()
    if place is None:
        return None
    asked = args.infer.diffusion
    plan = plan_for(
        place.world,
        spec.transformers[0].num_attention_heads,
        cfg=asked.cfg_size,
        cp=asked.cp_size,
        ulysses=asked.ulysses_degree,
        ranks_per_node=place.local_world,
    )
    device = pick_device(args.infer.device)
    device = pick_device(f"cuda:{place.local_rank}") if device.type == "cuda" else device
    set_nccl_defaults()
    ranks = args.ranks
    return WorkerGroup(
        plan,
        place.rank,
        device=device,
        timeout=ranks.timeout,
        heartbeat_timeout=ranks.heartbeat_timeout,
        copies=ranks.copies,
    )


def load_backend(
    args: EngineConfig, model: FoundModel | None = None, workers: WorkerGroup | None = None
) -> DiffusionBackend:
    """A backend at the asked memory level, or at the first higher one at which the weights fit.

    Raises:
        WillNotFitError: they fit at none.
    """
    wanted = args.frozen_copy()
    if workers is not None:
        wanted.infer.device = str(workers.groups.device)
    while True:
        try:
            groups = None if workers is None else workers.groups
            return DiffusionBackend(wanted, groups=groups, model=model)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            message = str(without_frames(error))
        empty_cache(pick_device(args.infer.device))
        if wanted.infer.diffusion.low_mem_level == TOP_LEVEL:
            raise WillNotFitError(
                f"the weights of {args.models.name} do not fit at any memory level ({message})"
            )
        wanted.infer.diffusion.low_mem_level += 1
        logger.warning(
            "out of memory while loading: trying memory level %d", wanted.infer.diffusion.low_mem_level
        )


def _with_notes(event: Progress, notes: list[str]) -> Progress:
    if not notes:
        return event
    message = "; ".join([*notes, *([event.message] if event.message else [])])
    return Progress(
        event.task_id,
        event.status,
        event.stage,
        event.step,
        event.total_steps,
        event.seconds,
        event.eta,
        message,
    )
