"""Text to video with Wan-class models.

The names below are imported when they are first used, so that importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chitu_diffusion.api import (
        DiffusionTaskPool,
        chitu_generate,
        chitu_init,
        chitu_is_terminated,
        chitu_start,
        chitu_terminate,
    )
    from chitu_diffusion.backend import BackendState, DiffusionBackend
    from chitu_diffusion.config import EngineConfig, RankPlace, load_config
    from chitu_diffusion.engine import Engine
    from chitu_diffusion.errors import ChituError
    from chitu_diffusion.generator import Generator
    from chitu_diffusion.pipelines.result import VideoResult
    from chitu_diffusion.scheduler import DiffusionScheduler
    from chitu_diffusion.task import CascadeStage, DiffusionTask, DiffusionUserParams, Progress, TaskStatus

__version__ = "0.1.0"

__all__ = [
    "BackendState",
    "CascadeStage",
    "ChituError",
    "DiffusionBackend",
    "DiffusionScheduler",
    "DiffusionTask",
    "DiffusionTaskPool",
    "DiffusionUserParams",
    "Engine",
    "EngineConfig",
    "Generator",
    "Progress",
    "RankPlace",
    "TaskStatus",
    "VideoResult",
    "__version__",
    "chitu_generate",
    "chitu_init",
    "chitu_is_terminated",
    "chitu_start",
    "chitu_terminate",
    "load_config",
]

_HOMES = {
    "backend": ("BackendState", "DiffusionBackend"),
    "config": ("EngineConfig", "RankPlace", "load_config"),
    "engine": ("Engine",),
    "errors": ("ChituError",),
    "api": (
        "DiffusionTaskPool",
        "chitu_generate",
        "chitu_init",
        "chitu_is_terminated",
        "chitu_start",
        "chitu_terminate",
    ),
    "generator": ("Generator",),
    "pipelines.result": ("VideoResult",),
    "scheduler": ("DiffusionScheduler",),
    "task": ("CascadeStage", "DiffusionTask", "DiffusionUserParams", "Progress", "TaskStatus"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'chitu_diffusion' has no attribute {name!r}")
    return getattr(import_module(f"chitu_diffusion.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
