"""wan-tiny from prompt to frames on the CPU, ours beside diffusers' `WanPipeline`: same folder, seed, steps, threads.

Knows both pipelines' faces; writes no file of its own.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.report import Report, ratios
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.spec import ASSETS, TINY
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

PROMPT = "A cat walking on grass"


@dataclass(frozen=True)
class Shape:
    """What is made."""

    size: int = 128
    frames: int = 33
    steps: int = 50
    guidance: float = 5.0


def tiny_on_cpu(report: Report, shape: Shape, rounds: int = 2) -> None:
    """Seconds of both, in turn, the better of each's rounds; and how near the two videos are."""
    from diffusers import WanPipeline

    settings = EngineConfig(models={"name": TINY}, infer={"device": "cpu", "dtype": "float32"})
    backend = DiffusionBackend(settings)
    pipeline = WanPipeline.from_pretrained(ASSETS / TINY, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    warm = Shape(shape.size, shape.frames, 1, shape.guidance)
    seconds: dict[str, list[float]] = {"diffusers_pipeline": [], "ours": []}
    videos: dict[str, Tensor] = {}
    for current in (warm, *[shape] * rounds):
        for name in seconds:
            began = time.perf_counter()
            videos[name] = our_video(backend, current) if name == "ours" else their_video(pipeline, current)
            seconds[name].append(time.perf_counter() - began)
    best = {name: min(times[1:]) for name, times in seconds.items()}
    compared = ratios(best)
    near = psnr(videos["ours"], videos["diffusers_pipeline"])
    for name, value in best.items():
        row = {"variant": name, "steps": shape.steps, "threads": torch.get_num_threads(), "seconds": value}
        row |= {"psnr_of_one_to_the_other_db": near, **compared.get(name, {})}
        report.add("wan-tiny on the CPU, prompt to frames", row)


def our_video(backend: DiffusionBackend, shape: Shape) -> Tensor:
    """[T, 3, H, W] in [0, 1]."""
    params = DiffusionUserParams(
        PROMPT,
        seed=1,
        height=shape.size,
        width=shape.size,
        num_frames=shape.frames,
        num_inference_steps=shape.steps,
        guidance_scale=shape.guidance,
    )
    task, generator = DiffusionTask.from_user_request(params), Generator(backend)
    while task.status is not TaskStatus.SAVING:
        generator.generate_step(task)
        if task.error is not None:
            raise task.error
    assert task.buffer.video is not None
    return task.buffer.video[0]


def their_video(pipeline: object, shape: Shape) -> Tensor:
    """[T, 3, H, W] in [0, 1], by diffusers."""
    assert callable(pipeline)
    noise = torch.Generator("cpu").manual_seed(1)
    found: Tensor = pipeline(
        PROMPT,
        negative_prompt="",
        generator=noise,
        height=shape.size,
        width=shape.size,
        num_frames=shape.frames,
        num_inference_steps=shape.steps,
        guidance_scale=shape.guidance,
        output_type="pt",
    ).frames[0]
    return found


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels between two videos in [0, 1]."""
    error = float(torch.mean((a.float() - b.float()) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)
