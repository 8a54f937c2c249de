"""How true each kernel and precision stays, on wan-tiny's trained weights, beside exact float32. One command.

    python -m benchmarks.fidelity                             # on the GPU, 8 prompts, about 60 s
    python -m benchmarks.fidelity --prompts 32                # narrower intervals
    python -m benchmarks.fidelity --small --device cpu        # does it work?
    python -m benchmarks.fidelity --device cpu --ways ^fa3_fp8    # 8-bit attention from when on, emulated

For each way of computing: the relative error of one forward's velocity (norm of the difference over norm) on
latents of the reference's own path, PSNR of whole videos against the reference's with the same seed, and
adherence by the judge. One table; its noise floor is the PSNR between two exact 16-bit kernels, neither of
which is the truth: a way of computing that lies no further from float32 than exact kernels lie from each
other cannot be told from them.

On a CPU `fa3_fp8` is emulated: the numbers that it has on a GPU, and all around it in float32, so that
nothing else is between its videos and the reference's.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import mean
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measuring import relative_error
from benchmarks.report import Report, Section, parser, report_for, run_sections
from chitu_diffusion.attention import KERNELS
from chitu_diffusion.attention.requirements import Requirements
from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.config import EngineConfig
from chitu_diffusion.errors import UsageError
from chitu_diffusion.evaluation.adherence import wilson
from chitu_diffusion.evaluation.compare import psnr
from chitu_diffusion.evaluation.judge import CLASSES, Judge, load_judge, name_parts
from chitu_diffusion.evaluation.prompts import Words, held_out_prompts
from chitu_diffusion.generator import Generator
from chitu_diffusion.models.registry import TINY
from chitu_diffusion.pipelines import denoising
from chitu_diffusion.pipelines.conditioning import PreparedConditioning
from chitu_diffusion.task import DiffusionTask, DiffusionUserParams, TaskStatus

EXACT = "exact"
LOSSY = "8 bits"
REFERENCE = "float32 math"
_EMULATED = "fa3_fp8"
_ALL = {"quant": "fp8", "quant_keep": "", "quant_from": 0.0}  # no layer and no step in 16 bits
WAYS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    REFERENCE: (EXACT, {"dtype": "float32", "attn_type": "math", "fused": False}),
    "float32 sdpa, fused": (EXACT, {"dtype": "float32", "attn_type": "sdpa"}),
    "bfloat16 sdpa": (EXACT, {"dtype": "bfloat16", "attn_type": "sdpa", "fused": False}),
    "bfloat16 math, fused": (EXACT, {"dtype": "bfloat16", "attn_type": "math"}),
    "bfloat16 flash, fused": (EXACT, {"dtype": "bfloat16", "attn_type": "flash"}),
    "bfloat16 cudnn, fused": (EXACT, {"dtype": "bfloat16", "attn_type": "cudnn"}),
    "bfloat16 fa3, fused": (EXACT, {"dtype": "bfloat16", "attn_type": "fa3"}),
    "fp8 linears": (LOSSY, {"dtype": "bfloat16", "attn_type": "sdpa", "quant": "fp8"}),
    "fp8 linears, every layer and step": (LOSSY, {"dtype": "bfloat16", "attn_type": "sdpa", **_ALL}),
    "fa3_fp8 attention": (LOSSY, {"dtype": "bfloat16", "attn_type": "fa3_fp8"}),
    "fa3_fp8 attention after 25 % of the steps": (
        LOSSY,
        {"dtype": "bfloat16", "attn_type": "sdpa", "attn_schedule": "fa3_fp8@25%"},
    ),
    "fa3_fp8 attention after 50 % of the steps": (
        LOSSY,
        {"dtype": "bfloat16", "attn_type": "sdpa", "attn_schedule": "fa3_fp8@50%"},
    ),
    "sage attention": (LOSSY, {"dtype": "bfloat16", "attn_type": "sage"}),
    "fp8 linears, fa3_fp8 attention": (LOSSY, {"dtype": "bfloat16", "attn_type": "fa3_fp8", "quant": "fp8"}),
    "fp8 linears, every layer and step, fa3_fp8 attention": (
        LOSSY,
        {"dtype": "bfloat16", "attn_type": "fa3_fp8", **_ALL},
    ),
}
"""Name -> (kind, settings of `infer`). The reference comes first; what this machine or version lacks is noted
as absent.
"""


@dataclass(frozen=True)
class PathPoint:
    """A point of the reference's path: what the network saw, and what it answered."""

    latent: Tensor
    embeddings: Tensor
    timestep: Tensor
    velocity: Tensor
    step: int
    num_steps: int


@dataclass
class WayVideos:
    """What one way of computing gave: videos [T, 3, H, W] on the CPU, in the prompts' order."""

    videos: list[Tensor] = field(default_factory=list)
    found: list[Words] = field(default_factory=list)
    seconds: float = 0.0


class Fidelity:
    """Runs every way over the same prompts and compares.

    Args:
        device: where.
        prompts: how many held-out ones.
        small: three steps of a small video: only to see that it works.
    """

    def __init__(self, device: str, prompts: int, *, small: bool) -> None:
        self.device = device
        self.asked = held_out_prompts(prompts)
        self.shape: dict[str, Any] = (
            {"height": 64, "width": 64, "num_frames": 5, "num_inference_steps": 3} if small else {}
        )
        self.judge: Judge = load_judge()
        self.moments: list[PathPoint] = []
        self.outcomes: dict[str, WayVideos] = {}

    def way(self, name: str, report: Report) -> None:
        """All of one way's videos and its row."""
        kind, settings = WAYS[name]
        if self.device == "cpu" and _EMULATED in name:
            settings = {**settings, "dtype": "float32"}
        try:
            backend = DiffusionBackend(
                EngineConfig(models={"name": TINY}, infer={"device": self.device, **settings})
            )
        except (UsageError, ImportError) as error:
            report.note(f"{name} is absent: {str(error).splitlines()[0]}")
            return
        if name == REFERENCE:
            self.moments = [moment for prompt, _ in self.asked[:2] for moment in self.path(backend, prompt)]
        outcome = self.videos(backend)
        row = {"way": name, "kind": kind, **self.compared(backend, outcome), **self.adherence(outcome.found)}
        report.add("Fidelity", {**row, "seconds_a_video": outcome.seconds / len(self.asked)})
        self.outcomes[name] = outcome
        backend.terminate()

    def task(self, prompt: str, seed: int = 0) -> DiffusionTask:
        """A request at the model's defaults."""
        return DiffusionTask.from_user_request(DiffusionUserParams(prompt, seed=seed, **self.shape))

    def videos(self, backend: DiffusionBackend) -> WayVideos:
        """A video of each prompt, and what the judge sees in it."""
        outcome = WayVideos()
        generator = Generator(backend)
        began = time.perf_counter()
        for prompt, _ in self.asked:
            task = self.task(prompt)
            while task.status is not TaskStatus.SAVING:
                generator.generate_step(task)
                if task.error is not None:
                    raise task.error
            assert task.buffer.video is not None
            outcome.videos.append(task.buffer.video[0].cpu())
        outcome.seconds = time.perf_counter() - began
        outcome.found = [name_parts(self.judge, video[None])[0] for video in outcome.videos]
        return outcome

    def path(self, backend: DiffusionBackend, prompt: str, moments: int = 4) -> list[PathPoint]:
        """Points evenly spread over one denoising, with the velocities of both branches."""
        generator = Generator(backend)
        sampler = backend.sampler
        task = self.task(prompt)
        generator.generate_step(task)
        wanted = {round(place * (task.num_inference_steps - 1) / (moments - 1)) for place in range(moments)}
        found = []
        while task.status is TaskStatus.DENOISING:
            state = task.buffer.sampler
            latent = task.buffer.latent
            if task.current_step in wanted and state is not None and latent is not None:
                embeddings = both_branches(generator, prompt)
                timestep = sampler.timestep(state)
                place = (task.current_step, task.num_inference_steps)
                answer = velocity(backend, latent, embeddings, timestep, *place)
                found.append(PathPoint(latent, embeddings, timestep, answer, *place))
            generator.generate_step(task)
            if task.error is not None:
                raise task.error
        return found

    def compared(self, backend: DiffusionBackend, outcome: WayVideos) -> dict[str, float]:
        """Errors of single forwards, PSNR of whole videos; nothing for the reference against itself."""
        if REFERENCE not in self.outcomes:
            return {}
        errors = []
        for moment in self.moments:
            embeddings = moment.embeddings.to(backend.device)
            latent = moment.latent.to(backend.device)
            place = (moment.step, moment.num_steps)
            answer = velocity(backend, latent, embeddings, moment.timestep, *place)
            errors.append(relative_error(answer, moment.velocity))
        decibels = [psnr(a, b) for a, b in zip(outcome.videos, self.outcomes[REFERENCE].videos, strict=True)]
        return {
            "forward_error_mean": mean(errors),
            "forward_error_max": max(errors),
            "psnr_db_mean": mean(decibels),
            "psnr_db_min": min(decibels),
        }

    def adherence(self, found: Sequence[Words]) -> dict[str, float]:
        """Share of parts (actor, colour, scene, motion) that the judge found as asked, with a 95 %
        interval.
        """
        pairs = [(asdict(words), asdict(asked)) for words, (_, asked) in zip(found, self.asked, strict=True)]
        right = [words[part] == asked[part] for words, asked in pairs for part in CLASSES]
        share = sum(right) / len(right)
        low, high = wilson(share, len(right))
        return {"adherence": share, "adherence_low": low, "adherence_high": high}

    def noise_floor(self, report: Report) -> None:
        """PSNR between each two of the exact 16-bit ways."""
        names = [name for name in self.outcomes if WAYS[name][0] == EXACT and name.startswith("bfloat16")]
        for index, first in enumerate(names):
            for second in names[index + 1 :]:
                pairs = zip(self.outcomes[first].videos, self.outcomes[second].videos, strict=True)
                decibels = [psnr(a, b) for a, b in pairs]
                row = {"way": f"{first} against {second}", "kind": "noise floor"}
                report.add("Fidelity", {**row, "psnr_db_mean": mean(decibels), "psnr_db_min": min(decibels)})
        if len(names) < 2:
            report.note("no noise floor: it takes two exact 16-bit kernels")


def both_branches(generator: Generator, prompt: str) -> Tensor:
    """[2, L, D]."""
    return generator.encode_text([prompt, generator.backend.spec.defaults.negative_prompt])


def velocity(
    backend: DiffusionBackend, latent: Tensor, embeddings: Tensor, timestep: Tensor, step: int, num_steps: int
) -> Tensor:
    """Both branches' [2, C, T, H, W], at a step of so many."""
    with torch.no_grad():
        text = PreparedConditioning(embeddings.to(latent.device))
        return denoising.predict_velocity(
            backend, latent, text, timestep, expert=0, step=step, num_steps=num_steps
        )


def main(words: list[str] | None = None) -> Report:
    """Runs every way and writes the table."""
    options = parser(__doc__)
    options.add_argument("--prompts", type=int, default=8, help="held-out ones, 1 to 64")
    options.add_argument(
        "--ways", default="", metavar="REGEX", help="only those in whose name it is, and the reference"
    )
    asked = options.parse_args(words)
    if not any(re.search(asked.ways, name) for name in WAYS if name != REFERENCE):
        raise SystemExit(f"--ways {asked.ways}: in no way's name; there are: {'; '.join(WAYS)}")
    report = report_for("Fidelity of kernels and precisions, wan-tiny", "fidelity", asked)
    torch.backends.cudnn.allow_tf32 = False  # the reference's convolutions too are float32
    try:
        found = Fidelity(asked.device, 1 if asked.small else asked.prompts, small=asked.small)
    except UsageError as error:
        raise SystemExit(str(error)) from None
    # wan-tiny's steps are short of work for a GPU: about 8 ms each by launches alone
    estimate = 0.0 if asked.small or asked.device == "cpu" else 0.7 * asked.prompts + 1
    sections = [
        Section(name, WAYS[name][0], estimate, partial(found.way, name))
        for name in WAYS
        if name == REFERENCE or re.search(asked.ways, name)
    ]
    sections.append(Section("noise floor", "exact kernels against each other", 0.0, found.noise_floor))
    lent = {}
    if asked.device == "cpu":
        lent[_EMULATED] = replace(KERNELS[_EMULATED], requires=Requirements())
        report.note(f"{_EMULATED} is emulated on the CPU, and all around it is float32")
    with patch.dict(KERNELS, lent):
        run_sections(sections, report, budget=asked.budget)
    print(*report.write(), sep="\n")
    return report


if __name__ == "__main__":
    raise SystemExit(main().failed)
