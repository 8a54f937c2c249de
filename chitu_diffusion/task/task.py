"""A request on its way to a video, as plain data.

All of a task's state (stage, step, latent, the sampler's history, cache, active expert) lies here, so that
any generator can take the task over at any step, and two tasks can take turns. This file loads no networks
and decides nothing; torch appears only as a type.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chitu_diffusion.errors import UsageError
from chitu_diffusion.task.events import TaskStatus
from chitu_diffusion.task.following import FollowedTask
from chitu_diffusion.task.params import DiffusionUserParams, draw_seed

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Conditioning:
    """What the networks are told beside the latent.

    Attributes:
        text: embeddings [branches, L, D], the prompt's branch first.
        concat_latents: [1, C', T, H, W] float32, put behind the latent's channels in each forward, the same
            in all branches; None for a model that takes none.
        image: rows of an image encoder [1, I, D], which all branches attend to; None likewise.
        first_frame: [1, C, 1, H, W] float32, the clean latent frame that a video begins with, where the
            network is told of it by its tokens' time; None where all is made from noise.
        control_latents: [1, C', T, H, W] float32, of a control stream beside the network; None likewise.
        control_scale: of that stream's hints, for all or for each of its layers.
    """

    text: torch.Tensor
    concat_latents: torch.Tensor | None = None
    image: torch.Tensor | None = None
    first_frame: torch.Tensor | None = None
    control_latents: torch.Tensor | None = None
    control_scale: float | tuple[float, ...] = 1.0


@dataclass
class TaskBuffer:
    """The tensors of a task on its way, and where its video ends up.

    Shapes: `latent` [1, C, T, H, W] float32; `video` [1, T, C, H, W] float32 in [0, 1]. `sampler` is the
    solver's whole state as plain values and tensors; `cache` belongs to the task's cache strategy. All of
    them are None once the task has ended.
    """

    conditioning: Conditioning | None = None
    latent: torch.Tensor | None = None
    sampler: dict[str, Any] | None = None
    cache: dict[str, Any] | None = None
    video: torch.Tensor | None = None
    save_path: str | None = None


@dataclass(frozen=True)
class Resumed:
    """How a task that was saved goes on.

    Attributes:
        step: denoising steps that were done; 0 where it starts over.
        exact: whether the video will be the very one of a run that was never cut short.
        differs: in words, what is not as it was; or why it starts over.
        kernel: name of the attention kernel of the steps before.
    """

    step: int
    exact: bool
    differs: tuple[str, ...] = ()
    kernel: str | None = None


@dataclass(eq=False)
class DiffusionTask(FollowedTask):
    """A request on its way to a video.

    `params` is the request as asked; `resolved` is filled when an engine takes it in, or by
    the first unit: the same with every None replaced by the model's own value. `current_step` counts
    denoising steps done; `num_inference_steps` is their number. `resumed` is set where it went on from a
    checkpoint. `error` is set when `status` is failed. `notes` are the messages of its units. `replaces` is
    what stood at its path when an engine took it in (`files.places.identity`; () before that): what another
    writer put there since is not replaced.
    """

    task_id: str
    params: DiffusionUserParams
    seed: int
    resolved: DiffusionUserParams | None = None
    status: TaskStatus = TaskStatus.PENDING
    num_inference_steps: int = 0
    current_step: int = 0
    cascade_stage: int = 0
    expert: int | None = None
    resumed: Resumed | None = None
    buffer: TaskBuffer = field(default_factory=TaskBuffer)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    error_message: str | None = None
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    finished_at: float | None = None
    replaces: tuple[int, ...] | None = ()

    @classmethod
    def from_user_request(cls, params: DiffusionUserParams) -> DiffusionTask:
        """A new task for a request. The seed is drawn here if none was asked for.

        Raises:
            UsageError: something else than a request.
        """
        if not isinstance(params, DiffusionUserParams):
            raise UsageError(f"{params!r} is no request: use DiffusionUserParams(prompt=...)", field="prompt")
        task_id = params.task_id or uuid.uuid4().hex[:12]
        seed = params.seed if params.seed is not None else draw_seed()
        return cls(
            task_id=task_id, params=params, seed=seed, num_inference_steps=params.num_inference_steps or 0
        )

    def get_elapsed_time(self) -> float:
        """Seconds since the first unit began, up to now or the end; 0 before it."""
        if self.started_at is None:
            return 0.0
        return (self.finished_at or time.time()) - self.started_at

    def commit(self, **fields: Any) -> None:
        """Change several fields at once: a reader, or a signal between, finds all of it or nothing."""
        vars(self).update(fields)

    def end(
        self,
        status: TaskStatus,
        error: Exception | None = None,
        *,
        save_path: str | None = None,
        message: str | None = None,
    ) -> None:
        """Enter an end state and let go of every tensor; the video's path stays. `message` says why, where
        there is no error.
        """
        self.error_message = message
        if error is not None:
            # a traceback would keep the failed stage's tensors alive
            self.error = error.with_traceback(None)
            self.error_message = str(error)
        buffer = TaskBuffer(save_path=save_path or self.buffer.save_path)
        self.commit(status=status, finished_at=time.time(), buffer=buffer)


class DiffusionTaskPool:
    """The tasks of one engine, in order of arrival. Safe to use from several threads.

    Args:
        keep_ended: how many ended tasks stay for whoever asks for them; the oldest go first.
    """

    def __init__(self, keep_ended: int = 100) -> None:
        self.pool: dict[str, DiffusionTask] = {}
        self._keep_ended = keep_ended
        self._lock = threading.Lock()

    def add(self, task: DiffusionTask) -> None:
        """Take a task in.

        Raises:
            UsageError: a task of that id is here already.
        """
        with self._lock:
            if task.task_id in self.pool:
                raise UsageError(
                    f"task_id = {task.task_id!r}: a task of that name is here already", field="task_id"
                )
            self.pool[task.task_id] = task

    def prune(self) -> None:
        """Forget ended tasks beyond those that are kept."""
        with self._lock:
            ended = [task_id for task_id, task in self.pool.items() if task.is_finished()]
            for task_id in ended[: max(0, len(ended) - self._keep_ended)]:
                del self.pool[task_id]

    def get(self, task_id: str) -> DiffusionTask | None:
        return self.pool.get(task_id)

    def remove(self, task_id: str) -> None:
        """Forget a task; silent if it is not here."""
        with self._lock:
            self.pool.pop(task_id, None)

    def __iter__(self) -> Iterator[DiffusionTask]:
        with self._lock:
            return iter(list(self.pool.values()))

    def __len__(self) -> int:
        return len(self.pool)

    def unfinished(self) -> list[DiffusionTask]:
        """Tasks with work left, oldest first."""
        return [task for task in self if not task.is_finished()]

    def all_finished(self) -> bool:
        return not self.unfinished()

    def get_pending_tasks(self) -> list[str]:
        """Ids of tasks that have not begun."""
        return [task.task_id for task in self if task.status is TaskStatus.PENDING]

    def get_statistics(self) -> dict[str, int]:
        """Number of tasks by status, every status named."""
        counts = {str(status): 0 for status in TaskStatus}
        for task in self:
            counts[str(task.status)] += 1
        return counts
