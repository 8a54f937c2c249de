"""A request, and the task that it becomes: plain data, a file at any moment."""

from chitu_diffusion.task.events import EVENT_SCHEMA, Progress, TaskStatus
from chitu_diffusion.task.params import CascadeStage, DiffusionUserParams, draw_seed
from chitu_diffusion.task.task import Conditioning, DiffusionTask, DiffusionTaskPool, Resumed, TaskBuffer

__all__ = [
    "EVENT_SCHEMA",
    "CascadeStage",
    "Conditioning",
    "DiffusionTask",
    "DiffusionTaskPool",
    "DiffusionUserParams",
    "Progress",
    "Resumed",
    "TaskBuffer",
    "TaskStatus",
    "draw_seed",
]
