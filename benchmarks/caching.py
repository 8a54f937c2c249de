"""What each cache saves and what it costs, on one model: share of the transformer's work, seconds, latent PSNR.

    python benchmarks/caching.py [--model NAME] [--steps 50] [--prompts 1] [--cache NAME:KEY=VALUE ...] [--json FILE]

Work is counted where it happens: every call of an attention or a feed-forward, weighted by its multiplications, over what
full compute does, so that a skipped branch, block or module counts for what it is. PSNR is of the last latent against full
compute with the same seed, over that latent's own range. "steps=N" is the control: no cache, N steps.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.cli.options import parse_cache
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.prepared_text import TextKeys
from chitu_diffusion.models.wan_block import WanBlock
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

PROMPTS = ("A cat walking on grass", "A red fish swims left in the sea")
SETTINGS = (
    "steps=30",
    "steps=25",
    "meancache",
    "meancache:predictor=reuse",
    "meancache:predictor=taylor",
    "meancache:fresh=25",
    "meancache:fresh=17",
    "interval:warmup=5,interval=2",
    "teacache:threshold=0.2",
    "teacache:threshold=0.2,level=velocity,predictor=velocity",
    "easycache:threshold=0.05",
    "fbcache:threshold=0.08",
    "dbcache:threshold=0.08",
    "blockdance",
    "pab",
    "taylorseer",
    "taylorseer:level=velocity",
    "cfg_gate",
)


@dataclass(frozen=True)
class Row:
    """One setting: work as a share of full compute, seconds of denoising, PSNR in dB; means over the prompts."""

    setting: str
    work: float
    seconds: float
    psnr: float


@contextmanager
def counted_work(backend: DiffusionBackend) -> Iterator[list[float]]:
    """Adds up the multiplications of every attention and feed-forward that is called inside."""
    total, handles = [0.0], []

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, width = inputs[0], output.shape[-1]
        rows, tokens = x.shape[0], x.shape[1]
        if len(inputs) == 1:  # feed-forward
            total[0] += rows * tokens * sum(weight.numel() for weight in module.parameters() if weight.ndim == 2)
        elif isinstance(inputs[1], TextKeys):  # keys and values are the prompt's, made once
            total[0] += rows * (2 * tokens * width**2 + 2 * tokens * inputs[1].k.shape[1] * width)
        else:
            total[0] += rows * (4 * tokens * width**2 + 2 * tokens**2 * width)

    for network in backend.model_pool:
        for block in network.blocks:
            assert isinstance(block, WanBlock)
            handles += [part.register_forward_hook(count) for part in (block.attn1, block.attn2, block.ffn)]
    try:
        yield total
    finally:
        for handle in handles:
            handle.remove()


def denoised(backend: DiffusionBackend, prompt: str, steps: int, cache: str | None) -> tuple[Tensor, float, float]:
    """The last latent, the work, the seconds of denoising."""
    params = DiffusionUserParams(prompt, seed=1, num_inference_steps=steps, flexcache=parse_cache(cache))
    task, generator = DiffusionTask.from_user_request(params), Generator(backend)
    generator.generate_step(task)
    with counted_work(backend) as work:
        began = time.perf_counter()
        while task.status is TaskStatus.DENOISING:
            generator.generate_step(task)
        seconds = time.perf_counter() - began
    if task.error is not None or task.buffer.latent is None:
        raise SystemExit(f"{cache}: {task.error_message}")
    return task.buffer.latent, work[0], seconds


def latent_psnr(found: Tensor, exact: Tensor) -> float:
    """Decibels over the exact latent's range."""
    error, span = float((found - exact).square().mean()), float(exact.max() - exact.min())
    return math.inf if error == 0 else 10 * math.log10(span**2 / error)


def measure(backend: DiffusionBackend, prompts: Sequence[str], steps: int, settings: Sequence[str]) -> Iterator[Row]:
    """A row for full compute and for each setting, as they come."""
    exact = [denoised(backend, prompt, steps, None) for prompt in prompts]
    whole = sum(work for _, work, _ in exact)
    yield Row("none", 1.0, sum(seconds for *_, seconds in exact) / len(prompts), math.inf)
    for setting in settings:
        fewer = setting.removeprefix("steps=")
        control = fewer != setting
        found = [denoised(backend, prompt, int(fewer) if control else steps, None if control else setting) for prompt in prompts]
        fidelity = [latent_psnr(latent, reference) for (latent, *_), (reference, *_) in zip(found, exact, strict=True)]
        work, seconds = sum(work for _, work, _ in found) / whole, sum(seconds for *_, seconds in found)
        yield Row(setting, work, seconds / len(prompts), sum(fidelity) / len(prompts))


def main() -> None:
    """Measures, prints a Markdown table as it grows, and writes JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan-tiny")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--prompts", type=int, default=1, choices=range(1, len(PROMPTS) + 1))
    parser.add_argument("--cache", action="append", help="a setting; repeatable; else a list of all strategies")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    backend = DiffusionBackend(EngineConfig(models={"name": asked.model}))
    print("| cache | work | work saved | seconds | latent PSNR |\n|---|---:|---:|---:|---:|")
    rows = []
    for row in measure(backend, PROMPTS[: asked.prompts], asked.steps, asked.cache or SETTINGS):
        rows.append(row)
        print(f"| {row.setting} | {row.work:.3f} | {1 / row.work:.2f}x | {row.seconds:.1f} | {row.psnr:.1f} dB |", flush=True)
    if asked.json:
        about = {"model": asked.model, "steps": asked.steps, "prompts": PROMPTS[: asked.prompts], "torch": torch.__version__}
        asked.json.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
    print(f"{len(rows)} settings", file=sys.stderr)


if __name__ == "__main__":
    main()
