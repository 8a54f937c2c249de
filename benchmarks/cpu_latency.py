"""A video on a CPU, from the prompt to its frames: this engine beside diffusers' own `WanPipeline` on the
same folder.

    python benchmarks/cpu_latency.py [--model wan-tiny] [--steps 20] [--rounds 5] [--threads 1] [--results
    benchmarks/results]

Both run in one process, float32, with the same threads, prompt, noise and steps, by turns, so that whatever
else the machine does meets both; each round takes another prompt. Medians over the rounds, of wall time by
stage and of the process's own CPU time, which other work on the machine disturbs least. What is compared must
be equal: the last latents' relative error and the frames' PSNR stand beside the table, and beyond 1e-3 or
below 50 dB the program fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.registry import resolve_model
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
FARTHEST, LEAST_PSNR = 1e-3, 50.0


@dataclass(frozen=True)
class Run:
    """One video: seconds by `ROWS`, the last latent and the frames [T, 3, H, W] in [0, 1]."""

    seconds: dict[str, float]
    latent: Tensor
    frames: Tensor


class Clock:
    """Adds up the seconds that calls take, by name."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, whose time counts for a stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds[stage] += time.perf_counter() - began

        return run


def ours(backend: DiffusionBackend, prompt: str, seed: int, steps: int) -> Run:
    """The engine's own units, up to the frames in memory."""
    params = DiffusionUserParams(prompt, negative_prompt="", seed=seed, num_inference_steps=steps)
    task, generator = DiffusionTask.from_user_request(params), Generator(backend)
    began, worked, latent = time.perf_counter(), time.process_time(), None
    while task.status is not TaskStatus.SAVING:
        latent = task.buffer.latent if task.status is TaskStatus.DECODING else latent
        generator.generate_step(task)
        if task.error is not None:
            raise SystemExit(task.error_message)
    whole, work = time.perf_counter() - began, time.process_time() - worked
    names = zip(STAGES, (TaskStatus.ENCODING, TaskStatus.DENOISING, TaskStatus.DECODING), strict=True)
    assert latent is not None and task.buffer.video is not None
    seconds = {name: task.seconds[stage] for name, stage in names} | {"whole": whole, "CPU time": work}
    return Run(seconds, latent, task.buffer.video[0])


def theirs(pipeline: Any, backend: DiffusionBackend, prompt: str, seed: int, steps: int) -> Run:
    """`WanPipeline.__call__` with its stages timed."""
    defaults, clock, kept = backend.spec.defaults, Clock(), {}
    encode, decode = pipeline.encode_prompt, pipeline.vae.decode
    pipeline.encode_prompt, pipeline.vae.decode = clock.timed("text", encode), clock.timed("decoding", decode)
    began, worked = time.perf_counter(), time.process_time()
    try:
        frames = pipeline(
            prompt,
            negative_prompt="",
            generator=torch.Generator("cpu").manual_seed(seed),
            height=defaults.height,
            width=defaults.width,
            num_frames=defaults.num_frames,
            num_inference_steps=steps,
            guidance_scale=defaults.guidance[0],
            output_type="pt",
            callback_on_step_end=lambda _pipeline, _step, _time, tensors: kept.update(tensors) or {},
        ).frames
        whole, work = time.perf_counter() - began, time.process_time() - worked
    finally:
        pipeline.encode_prompt, pipeline.vae.decode = encode, decode
    clock.seconds["denoising"] = whole - clock.seconds["text"] - clock.seconds["decoding"]
    return Run(clock.seconds | {"whole": whole, "CPU time": work}, kept["latents"], frames[0])


def psnr(found: Tensor, expected: Tensor) -> float:
    """Decibels between frames in [0, 1]."""
    error = float((found.double() - expected.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def measure(backend: DiffusionBackend, pipeline: Any, steps: int, rounds: int) -> dict[str, Any]:
    """Medians, ratios and equality over rounds, the first (which warms both up) left out."""
    ours(backend, "warm up", 0, 1), theirs(pipeline, backend, "warm up", 0, 1)
    seconds: dict[str, list[dict[str, float]]] = {"ours": [], "diffusers": []}
    errors, decibels = [], []
    for number in range(rounds):
        prompt = PROMPTS[number % len(PROMPTS)] + " again" * (number // len(PROMPTS))
        found: dict[str, Run] = {}
        for name in ("ours", "diffusers") if number % 2 == 0 else ("diffusers", "ours"):
            one = (backend, prompt, number, steps)
            found[name] = ours(*one) if name == "ours" else theirs(pipeline, *one)
        for name, run in found.items():
            seconds[name].append(run.seconds)
        mine, other = found["ours"], found["diffusers"]
        errors.append(float((mine.latent - other.latent).norm() / other.latent.norm()))
        decibels.append(psnr(mine.frames, other.frames))
        print(
            f"round {number + 1}: {mine.seconds['whole']:.1f} s, diffusers {other.seconds['whole']:.1f} s",
            file=sys.stderr,
        )
    median = {
        name: {s: statistics.median(run[s] for run in runs) for s in ROWS} for name, runs in seconds.items()
    }
    least = {name: {s: min(run[s] for run in runs) for s in ROWS} for name, runs in seconds.items()}
    return {
        "seconds_median": median,
        "seconds_least": least,
        "ratio_vs_diffusers": {stage: median["diffusers"][stage] / median["ours"][stage] for stage in ROWS},
        "ratio_vs_diffusers_least": {
            stage: least["diffusers"][stage] / least["ours"][stage] for stage in ROWS
        },
        "latent_relative_error_most": max(errors),
        "frames_psnr_least": min(decibels),
        "rounds": seconds,
    }


def about(asked: argparse.Namespace) -> dict[str, Any]:
    """Where and how this was measured."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
            platform.processor(),
        ),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "versions": {
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "python": platform.python_version(),
        },
        "commit": commit,
        "command": f"python benchmarks/cpu_latency.py --model {asked.model} --steps {asked.steps} "
        f"--rounds {asked.rounds}",
        "model": asked.model,
        "steps": asked.steps,
    }


def table(facts: dict[str, Any], found: dict[str, Any]) -> str:
    """The result in Markdown."""
    median, ratio, least = (
        found["seconds_median"],
        found["ratio_vs_diffusers"],
        found["ratio_vs_diffusers_least"],
    )
    rows = [
        f"| {stage} | {median['ours'][stage]:.2f} | {median['diffusers'][stage]:.2f} | {ratio[stage]:.2f} | "
        f"{least[stage]:.2f} |"
        for stage in ROWS
    ]
    head = [
        f"# {facts['model']} on a CPU beside diffusers, {facts['date']}",
        "",
        f"{facts['steps']} steps, float32, {facts['threads']} thread(s), {facts['machine']}, "
        f"{facts['cores']} cores under a load of {facts['load']}; "
        + ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        + f"; commit {facts['commit']}. `{facts['command']}`",
        "",
        "| stage | ours, s | diffusers, s | ratio_vs_diffusers | of the quickest rounds |",
        "|---|---:|---:|---:|---:|",
    ]
    equal = (
        f"Equal output: latents within {found['latent_relative_error_most']:.1e} (relative), frames at "
        f"{found['frames_psnr_least']:.0f} dB, the worst of {len(found['rounds']['ours'])} prompts."
    )
    return "\n".join([*head, *rows, "", equal, ""])


def main() -> None:
    """Measures, prints the table, writes JSON and Markdown; fails if the outputs are not equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="wan-tiny")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, help="folder for the JSON and Markdown files")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    backend = DiffusionBackend(
        EngineConfig(models={"name": asked.model}, infer={"device": "cpu", "dtype": "float32"})
    )
    _, folder = resolve_model(asked.model)
    pipeline = diffusers.WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    found, facts = measure(backend, pipeline, asked.steps, asked.rounds), about(asked)
    text = table(facts, found)
    print(text)
    if asked.results:
        name = asked.results / f"{facts['date']}-cpu-latency-{Path(asked.model).name}"
        name.with_suffix(".json").write_text(json.dumps(facts | found, indent=1) + "\n", encoding="utf-8")
        name.with_suffix(".md").write_text(text, encoding="utf-8")
    if found["latent_relative_error_most"] >= FARTHEST or found["frames_psnr_least"] < LEAST_PSNR:
        raise SystemExit("the outputs are not equal")


if __name__ == "__main__":
    main()
