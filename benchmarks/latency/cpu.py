"""A video on a CPU, from the prompt to its frames: this engine beside diffusers' own `WanPipeline`, on the
shipped model.

Both run in one process, float32, with the same threads, prompt, noise and steps, by turns, so that whatever
else the machine does meets both; each round takes another prompt. Medians over the rounds, of wall time by
stage and of the process's own CPU time, which other work on the machine disturbs least. What is compared must
be equal: beyond 1e-3 of the last latents' relative error or below 50 dB of the frames it is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any

import diffusers
import torch
from torch import Tensor

from benchmarks.measuring import relative_error
from benchmarks.report import Report
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.evaluation.compare import psnr
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.registry import ASSETS, TINY
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

PROMPTS = (
    "A cat walking on grass",
    "A red fish swims left in the sea",
    "Two dogs jump in the snow at night",
    "A small blue bird flies over a green hill",
    "A yellow ball bounces on a table",
)
STAGES = ("text", "denoising", "decoding")
ROWS = (*STAGES, "whole", "CPU time")
FARTHEST = 1e-3
LEAST_PSNR = 50.0
STEPS = 20


@dataclass(frozen=True)
class TimedVideo:
    """One video: seconds by `ROWS`, the last latent and the frames [T, 3, H, W] in [0, 1]."""

    seconds: Mapping[str, float]
    latent: Tensor
    frames: Tensor


class CpuRun:
    """Both sides of the comparison, ready to make videos.

    Args:
        steps: of each video.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.backend = DiffusionBackend(
            EngineConfig(models={"name": TINY}, infer={"device": "cpu", "dtype": "float32"})
        )
        self.pipeline = diffusers.WanPipeline.from_pretrained(ASSETS / TINY, torch_dtype=torch.float32)
        self.pipeline.set_progress_bar_config(disable=True)

    def ours(self, prompt: str, seed: int) -> TimedVideo:
        """The engine's own units, up to the frames in memory."""
        params = DiffusionUserParams(prompt, negative_prompt="", seed=seed, num_inference_steps=self.steps)
        task = DiffusionTask.from_user_request(params)
        generator = Generator(self.backend)
        latent = None
        began = time.perf_counter()
        worked = time.process_time()
        while task.status is not TaskStatus.SAVING:
            latent = task.buffer.latent if task.status is TaskStatus.DECODING else latent
            generator.generate_step(task)
            if task.error is not None:
                raise task.error
        whole = time.perf_counter() - began
        work = time.process_time() - worked
        names = zip(STAGES, (TaskStatus.ENCODING, TaskStatus.DENOISING, TaskStatus.DECODING), strict=True)
        assert latent is not None and task.buffer.video is not None
        seconds = {name: task.seconds[stage] for name, stage in names} | {"whole": whole, "CPU time": work}
        return TimedVideo(seconds, latent, task.buffer.video[0])

    def theirs(self, prompt: str, seed: int) -> TimedVideo:
        """`WanPipeline.__call__` with its stages timed."""
        defaults = self.backend.spec.defaults
        kept: dict[str, Any] = {}
        began = time.perf_counter()
        worked = time.process_time()
        with self._timed_stages() as seconds:
            frames = self.pipeline(
                prompt,
                negative_prompt="",
                generator=torch.Generator("cpu").manual_seed(seed),
                height=defaults.height,
                width=defaults.width,
                num_frames=defaults.num_frames,
                num_inference_steps=self.steps,
                guidance_scale=defaults.guidance[0],
                output_type="pt",
                callback_on_step_end=lambda _pipeline, _step, _time, tensors: kept.update(tensors) or {},
            ).frames
        whole = time.perf_counter() - began
        work = time.process_time() - worked
        seconds["denoising"] = whole - seconds["text"] - seconds["decoding"]
        return TimedVideo(seconds | {"whole": whole, "CPU time": work}, kept["latents"], frames[0])

    @contextmanager
    def _timed_stages(self) -> Iterator[dict[str, float]]:
        """The seconds that diffusers spends in its text encoder and its VAE."""
        seconds = dict.fromkeys(STAGES, 0.0)

        def timed(stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any, **kwargs: Any) -> Any:
                began = time.perf_counter()
                try:
                    return call(*args, **kwargs)
                finally:
                    seconds[stage] += time.perf_counter() - began

            return run

        encode = self.pipeline.encode_prompt
        decode = self.pipeline.vae.decode
        self.pipeline.encode_prompt = timed("text", encode)
        self.pipeline.vae.decode = timed("decoding", decode)
        try:
            yield seconds
        finally:
            self.pipeline.encode_prompt = encode
            self.pipeline.vae.decode = decode


def beside_pipeline(report: Report, rounds: int, *, small: bool) -> None:
    """Rounds by turns after one video each that warms up; a row a stage.

    Raises:
        RuntimeError: the two sides' outputs are not equal.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        run = CpuRun(2 if small else STEPS)
        makers = {"ours": run.ours, "diffusers": run.theirs}
        for make in makers.values():
            make("warm up", 0)
        found: dict[str, list[TimedVideo]] = {name: [] for name in makers}
        for number in range(rounds):
            prompt = PROMPTS[number % len(PROMPTS)] + " again" * (number // len(PROMPTS))
            for name in makers if number % 2 == 0 else reversed(makers):
                found[name].append(makers[name](prompt, number))
    finally:
        torch.set_num_threads(threads)
    for stage in ROWS:
        times = {name: [video.seconds[stage] for video in videos] for name, videos in found.items()}
        row = {f"{name}_s": median(seconds) for name, seconds in times.items()}
        row["ratio_vs_diffusers"] = row["diffusers_s"] / row["ours_s"]
        row["ratio_of_quickest"] = min(times["diffusers"]) / min(times["ours"])
        report.add(f"{TINY} on a CPU, {run.steps} steps, float32, one thread", {"stage": stage, **row})
    pairs = list(zip(found["ours"], found["diffusers"], strict=True))
    farthest = max(relative_error(mine.latent, other.latent) for mine, other in pairs)
    least = min(psnr(mine.frames, other.frames) for mine, other in pairs)
    equal = (
        f"latents within {farthest:.1e} (relative), frames at {least:.0f} dB, the worst of {rounds} prompts"
    )
    if farthest >= FARTHEST or least < LEAST_PSNR:
        raise RuntimeError(f"the outputs are not equal: {equal}")
    report.note(f"equal output on a CPU: {equal}")
