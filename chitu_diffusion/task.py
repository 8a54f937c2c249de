"""A request and everything that is known about its progress, as plain data.

`DiffusionUserParams` is what a person asks; `DiffusionTask` is that request on its way to a
video. All of a task's state (stage, step, latent, the sampler's history, cache, active expert)
lies here, so that any generator can take the task over at any step, and two tasks can take
turns. This file loads no networks and decides nothing; torch appears only as a type.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chitu_diffusion.errors import UsageError, nearest

if TYPE_CHECKING:
    import torch

MAX_SEED = 2**63 - 1
MAX_PROMPT = 20_000
SIZE_STEP = 16
"""Pixels: the VAE's stride of 8 times the DiT's patch of 2."""
LEAST_STRENGTH = 0.01
"""Of a cascade's stage: its whole schedule has steps / strength steps."""
FRAME_STEP = 4
"""The VAE's stride in time: a video has 4n + 1 frames."""


class TaskStatus(StrEnum):
    """Where a task is. The first five are also the stages, in order."""

    PENDING = "pending"
    ENCODING = "encoding"
    DENOISING = "denoising"
    DECODING = "decoding"
    SAVING = "saving"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


END_STATES = frozenset({TaskStatus.FINISHED, TaskStatus.FAILED, TaskStatus.CANCELLED})


@dataclass(frozen=True)
class CascadeStage:
    """One stage of a cascade (`DiffusionUserParams.cascade`): denoise at a size of its own.

    Args:
        height, width: pixels, multiples of 16.
        num_inference_steps: denoising steps of this stage.
        strength: share of the noise schedule that this stage runs, 0.01 to 1; 1 starts from
            pure noise (the base), less re-noises the upsampled latent to that level (SDEdit,
            arXiv:2108.01073).
        expert: index into the model pool; None leaves it to the timestep, as without a cascade.
    """

    height: int
    width: int
    num_inference_steps: int
    strength: float = 1.0
    expert: int | None = None


@dataclass(frozen=True)
class DiffusionUserParams:
    """What a person asks for. None means the model's own default.

    Args:
        prompt: the text.
        negative_prompt: what the video should not be; None is the model's own.
        height, width: pixels, multiples of 16.
        num_frames: 4n + 1.
        fps: frames per second of the written file.
        num_inference_steps: denoising steps.
        guidance_scale: weight of classifier-free guidance (arXiv:2207.12598); at most 1 runs the
            prompt's branch alone. For a two-expert model a pair (high noise, low noise) may stand.
        seed: of the starting noise, drawn on the CPU; None draws one, and it is kept in the task.
        save_path: .mp4, .gif, .npy or a folder for png frames; None names a file by the task's id.
        flexcache: a cache strategy's name, or {"strategy": name, ...its parameters}.
        role: who asks; the fair policy shares steps over roles.
        priority: larger goes first under the priority policy.
        cascade: stages of rising resolution in place of a single denoising; see `CascadeStage`.
        task_id: a label of the caller's own; letters, digits, '.', '_', '-' only.

    Raises:
        UsageError (a ValueError): naming the field, the value, and what to use.
    """

    prompt: str
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | tuple[float, float] | None = None
    seed: int | None = None
    save_path: str | None = None
    flexcache: str | Mapping[str, Any] | None = None
    role: str = "user"
    priority: int = 0
    cascade: tuple[CascadeStage, ...] | None = None
    task_id: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise UsageError(f"prompt = {self.prompt!r}: must be a sentence", field="prompt")
        for name in ("prompt", "negative_prompt"):
            text = getattr(self, name)
            if text is not None:
                check_text(name, text)
        for name in ("height", "width"):
            _check_size(name, getattr(self, name))
        check_frames(self.num_frames)
        check_integer("fps", self.fps, 1, 240)
        check_integer("num_inference_steps", self.num_inference_steps, 1, 1000)
        check_integer("seed", self.seed, 0, MAX_SEED)
        check_integer("priority", self.priority, -(2**31), 2**31)
        check_guidance(self.guidance_scale)
        _check_save_path(self.save_path)
        _check_label("task_id", self.task_id)
        if not isinstance(self.role, str) or not self.role:
            raise UsageError(f"role = {self.role!r}: must be a name", field="role")
        check_text("role", self.role)
        _check_cascade(self.cascade)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DiffusionUserParams:
        """From a row of a batch file or a recipe; unknown names are refused with the nearest."""
        names = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in names:
                raise UsageError(f"unknown field '{name}'.{nearest(name, names)}", field=name)
        if "prompt" not in values:
            raise UsageError("prompt is missing", field="prompt")
        cascade = values.get("cascade")
        stages = (
            tuple(_cascade_stage(stage) for stage in cascade)
            if isinstance(cascade, list | tuple)
            else cascade
        )
        guidance = values.get("guidance_scale")
        pair = tuple(guidance) if isinstance(guidance, list) else guidance
        return cls(**{**values, "cascade": stages, "guidance_scale": pair})

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values, for the recipe in the file."""
        return dataclasses.asdict(self)


def check_text(name: str, text: object) -> None:
    """Raises UsageError for what is no text, or too long."""
    if not isinstance(text, str):
        raise UsageError(f"{name} = {text!r}: must be text", field=name)
    if len(text) > MAX_PROMPT:
        raise UsageError(f"{name} has {len(text)} characters: use at most {MAX_PROMPT}", field=name)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UsageError(
            f"{name} is not valid text: {error.reason} at character {error.start}", field=name
        ) from None


def check_integer(name: str, value: object, low: int, high: int) -> None:
    """Raises UsageError for what is neither None nor a whole number from `low` to `high`."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} = {value!r}: must be a whole number from {low} to {high}", field=name)


def _check_size(name: str, value: int | None) -> None:
    check_integer(name, value, SIZE_STEP, 8192)
    if value is not None and value % SIZE_STEP:
        low = value - value % SIZE_STEP
        high = value - value % SIZE_STEP + SIZE_STEP
        raise UsageError(
            f"{name} = {value}: must be a multiple of {SIZE_STEP}: {max(low, SIZE_STEP)} or {high}",
            field=name,
        )


def check_frames(value: int | None) -> None:
    """Raises UsageError for what is neither None nor 4n + 1."""
    check_integer("num_frames", value, 1, 4001)
    if value is not None and value % FRAME_STEP != 1:
        low = (value - 1) // FRAME_STEP * FRAME_STEP + 1
        raise UsageError(
            f"num_frames = {value}: frames must be 4n+1: {low} or {low + FRAME_STEP}", field="num_frames"
        )


def check_guidance(value: object) -> None:
    """Raises UsageError for what is neither None, a scale, nor a pair of scales."""
    scales = value if isinstance(value, tuple) else (value,)
    if len(scales) not in (1, 2):
        raise UsageError(
            f"guidance_scale = {value!r}: one number, or two (high noise, low noise)", field="guidance_scale"
        )
    for scale in scales:
        if scale is None and not isinstance(value, tuple):
            continue
        if (
            isinstance(scale, bool)
            or not isinstance(scale, int | float)
            or not math.isfinite(scale)
            or not 0 <= scale <= 100
        ):
            raise UsageError(
                f"guidance_scale = {scale!r}: must be a number from 0 to 100; 3 to 7.5 is usual",
                field="guidance_scale",
            )


def _check_save_path(value: object) -> None:
    if value is None:
        return
    if isinstance(value, Path):
        return
    if not isinstance(value, str) or not value or "\0" in value:
        raise UsageError(f"save_path = {value!r}: must be a file or folder name", field="save_path")


def _check_label(name: str, value: object) -> None:
    if value is None:
        return
    plain = (
        isinstance(value, str)
        and 0 < len(value) <= 100
        and all(c.isascii() and (c.isalnum() or c in "._-") for c in value)
    )
    if not plain or str(value).startswith("."):
        raise UsageError(
            f"{name} = {value!r}: use letters, digits, '.', '_' and '-', not starting with '.'", field=name
        )


def _cascade_stage(value: Any) -> Any:
    """A stage from a table of its fields; anything else is left for the check of the whole."""
    if not isinstance(value, Mapping):
        return value
    known = dataclasses.fields(CascadeStage)
    for name in value:
        if name not in {f.name for f in known}:
            raise UsageError(
                f"cascade has no field '{name}'.{nearest(str(name), [f.name for f in known])}",
                field="cascade",
            )
    for f in known:
        if f.name not in value and f.default is dataclasses.MISSING:
            raise UsageError(f"cascade: a stage lacks {f.name}", field="cascade")
    return CascadeStage(**value)


def _check_cascade(stages: object) -> None:
    if stages is None:
        return
    if not isinstance(stages, list | tuple) or not all(isinstance(stage, CascadeStage) for stage in stages):
        raise UsageError(
            f"cascade = {stages!r}: use stages, each with height, width and num_inference_steps",
            field="cascade",
        )
    for stage in stages:
        _check_cascade_stage(stage)


def _check_cascade_stage(stage: CascadeStage) -> None:
    if None in (stage.height, stage.width, stage.num_inference_steps):
        raise UsageError(
            f"cascade = {stage}: each stage needs height, width and num_inference_steps", field="cascade"
        )
    _check_size("cascade height", stage.height)
    _check_size("cascade width", stage.width)
    check_integer("cascade num_inference_steps", stage.num_inference_steps, 1, 1000)
    check_integer("cascade expert", stage.expert, 0, 1)
    number = isinstance(stage.strength, int | float) and not isinstance(stage.strength, bool)
    if not number or not LEAST_STRENGTH <= stage.strength <= 1:
        raise UsageError(
            f"cascade strength = {stage.strength!r}: must be from {LEAST_STRENGTH} to 1", field="cascade"
        )


def draw_seed() -> int:
    """A fresh seed, small enough to be typed."""
    return secrets.randbelow(2**31)


@dataclass
class TaskBuffer:
    """The tensors of a task on its way, and where its video ends up.

    Shapes: `embeddings` [branches, L, D], the prompt's branch first; `latent` [1, C, T, H, W] float32;
    `video` [1, T, C, H, W] float32 in [0, 1]. `sampler` is the solver's whole state as plain values and
    tensors; `cache` belongs to the task's cache strategy. All of them are None once the task has ended.
    """

    embeddings: torch.Tensor | None = None
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


@dataclass(frozen=True)
class Progress:
    """One unit of work done: what `generate_step` returns.

    Args:
        task_id, status: whose, and where it is now.
        stage: the stage that this unit belonged to.
        step, total_steps: denoising steps done so far, over all stages of a cascade.
        seconds: time that the unit took.
        eta: seconds until the task ends, from its own pace; None before the first step.
        message: anything a person should know (a raised memory level, the path, the error).
    """

    task_id: str
    status: TaskStatus
    stage: TaskStatus
    step: int
    total_steps: int
    seconds: float
    eta: float | None = None
    message: str | None = None

    @property
    def fraction(self) -> float:
        """0.0 to 1.0."""
        return 1.0 if self.status is TaskStatus.FINISHED else self.step / max(self.total_steps, 1)


@dataclass(eq=False)
class DiffusionTask:
    """A request on its way to a video.

    `params` is the request as asked; `resolved` is filled when an engine takes it in, or by
    the first unit: the same with every None replaced by the model's own value. `current_step` counts
    denoising steps done; `num_inference_steps` is their number. `resumed` is set where it went on from a
    checkpoint. `error` is set when `status` is failed.
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
    events: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    error: Exception | None = None
    error_message: str | None = None
    created_at: float = field(default_factory=time.time)
    started_at: float | None = None
    finished_at: float | None = None

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

    def is_finished(self) -> bool:
        """Whether nothing is left to do: finished, failed or cancelled."""
        return self.status in END_STATES

    def get_elapsed_time(self) -> float:
        """Seconds since the first unit began, up to now or the end; 0 before it."""
        if self.started_at is None:
            return 0.0
        return (self.finished_at or time.time()) - self.started_at

    def commit(self, **fields: Any) -> None:
        """Change several fields at once: a reader, or a signal between, finds all of it or nothing."""
        vars(self).update(fields)

    def end(
        self, status: TaskStatus, error: Exception | None = None, *, save_path: str | None = None
    ) -> None:
        """Enter an end state and let go of every tensor; the video's path stays."""
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
