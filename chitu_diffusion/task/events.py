"""A task's states, and the event that tells of one unit of its work. Plain values; knows no task."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ClassVar


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


EVENT_SCHEMA = 1
"""Version of events, here and as lines of JSON: rises where a field goes or means another thing, not with a
new one.
"""
END_STATES = frozenset({TaskStatus.FINISHED, TaskStatus.FAILED, TaskStatus.CANCELLED})


@dataclass(frozen=True)
class Progress:
    """One unit of work done: what `generate_step` returns.

    Args:
        task_id, status: whose, and where it is now.
        stage: the stage that this unit belonged to.
        step, total_steps: denoising steps done so far, over all stages of a cascade.
        seconds: time that the unit took.
        eta: seconds until the task ends: steps, decoding and saving; None once it has ended.
        message: anything a person should know (a raised memory level, the path, the error).
        time: when it was done, in seconds since 1970 (UTC).
        schema: the events' version, `EVENT_SCHEMA`.
    """

    task_id: str
    status: TaskStatus
    stage: TaskStatus
    step: int
    total_steps: int
    seconds: float
    eta: float | None = None
    message: str | None = None
    time: float = field(default_factory=time.time)
    schema: ClassVar[int] = EVENT_SCHEMA

    @property
    def fraction(self) -> float:
        """0.0 to 1.0."""
        return 1.0 if self.status is TaskStatus.FINISHED else self.step / max(self.total_steps, 1)
