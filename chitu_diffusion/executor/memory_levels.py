"""What happens when memory runs out: what can be freed is, the memory level rises, and the same unit, or the
loading, is done again. Knows levels; what each does is `memory.offload`'s.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from chitu_diffusion.backend import DiffusionBackend, pick_device
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import StageError, WillNotFitError, without_frames
from chitu_diffusion.executor.local import Executor
from chitu_diffusion.executor.worker_group import WorkerGroup
from chitu_diffusion.memory.device import empty_cache, is_out_of_memory, top_useful_level
from chitu_diffusion.memory.offload import TOP_LEVEL
from chitu_diffusion.models.registry import FoundModel
from chitu_diffusion.pipelines.admission import smaller
from chitu_diffusion.task import DiffusionTask, Progress, TaskStatus

logger = logging.getLogger(__name__)


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


def run_unit(executor: Executor, backend: DiffusionBackend, task: DiffusionTask) -> Progress:
    """One unit, at as many memory levels as it takes; a task that fits at none fails.

    Raises:
        RankLostError, UsageError: as `Executor.execute`.
    """
    notes: list[str] = []
    while True:
        failure: Exception
        try:
            return _with_notes(executor.execute(task), notes)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = error
            without_frames(error)
        stage = task.status
        empty_cache(backend.device)
        level = backend.low_mem_level + 1
        if level > top_useful_level(backend.device):
            return _give_up(executor, task, stage, failure, notes)
        backend.low_mem_level = level
        notes.append(f"out of memory in {stage}: memory level raised to {level}, trying again")
        task.notes.append(notes[-1])
        logger.warning("task %s: %s", task.task_id, notes[-1])


def _give_up(
    executor: Executor, task: DiffusionTask, stage: TaskStatus, failure: Exception, notes: list[str]
) -> Progress:
    cause = WillNotFitError(f"out of memory at the highest memory level ({failure}); {smaller(task)}")
    error = StageError(str(stage), task.current_step if stage is TaskStatus.DENOISING else None, cause)
    task.end(TaskStatus.FAILED, error)
    task.notes.append(str(error))
    executor.end_task(task)
    message = "; ".join([*notes, str(error)])
    return Progress(
        task.task_id, task.status, stage, task.current_step, task.num_inference_steps, 0.0, None, message
    )


def _with_notes(event: Progress, notes: list[str]) -> Progress:
    if not notes:
        return event
    message = "; ".join([*notes, *([event.message] if event.message else [])])
    return replace(event, message=message)
