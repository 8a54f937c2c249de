"""Making tasks and running them, and how near two results are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.registry import FoundModel, resolve_model
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, Progress, TaskStatus

CAT = "A cat walking on grass"


def config_for(folder: Path, outputs: Path) -> EngineConfig:
    """Settings for a model folder, on the CPU in float32."""
    return EngineConfig(
        models={"name": str(folder)},
        output={"dir": str(outputs)},
        infer={"device": "cpu", "dtype": "float32"},
    )


def model_of(config: EngineConfig) -> FoundModel:
    """The model that settings name."""
    return resolve_model(config.models.name, config.models.ckpt_dir)


def task_for(**params) -> DiffusionTask:
    return DiffusionTask.from_user_request(DiffusionUserParams(**{"prompt": CAT, "seed": 3, **params}))


def run_to_end(generator: Generator, task: DiffusionTask) -> Iterator[Progress]:
    """The events of a task, unit by unit."""
    while not task.is_finished():
        yield generator.generate_step(task)


def latent_and_video(generator: Generator, task: DiffusionTask) -> tuple[Tensor, Tensor]:
    """Runs a task up to saving; returns its last latent and its frames."""
    while task.status is not TaskStatus.DECODING:
        generator.generate_step(task)
        assert task.error is None, task.error_message
    latent = task.buffer.latent
    generator.generate_step(task)
    assert task.error is None, task.error_message
    return latent, task.buffer.video


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels between two videos in [0, 1]."""
    error = torch.mean((a.float() - b.float()) ** 2).item()
    return math.inf if error == 0 else -10 * math.log10(error)


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    """Of norms."""
    return float((ours - theirs).norm() / theirs.norm())
