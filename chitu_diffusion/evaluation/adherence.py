"""Does the video show what was asked? Held-out prompts through the whole product, scored by the judge.

The prompts name combinations of actor, colour, scene and motion that training never saw. Every video is made
by an `Engine` at the model's default settings, from prompt to frames, and the judge, which has seen drawn
clips only, names its four parts. Knows the engine's face and the judge; no command line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.engine import Engine
from chitu_diffusion.evaluation.judge import CLASSES, Judge, judge_accuracy, load_judge, name_parts
from chitu_diffusion.evaluation.prompts import Words, held_out_prompts
from chitu_diffusion.files.atomic import write_text
from chitu_diffusion.media.reading import read_frames
from chitu_diffusion.task import DiffusionUserParams


@dataclass(frozen=True)
class Answer:
    """One video: what was asked, and what the judge found."""

    prompt: str
    seed: int
    asked: Words
    found: Words

    def right(self, part: str) -> bool:
        """Whether the judge found what was asked ("actor", "colour", "scene" or "motion")."""
        return bool(asdict(self.asked)[part] == asdict(self.found)[part])


@dataclass(frozen=True)
class Scores:
    """What `adherence` measured: shares from 0 to 1 by part, and what they rest on."""

    answers: Sequence[Answer]
    judge: dict[str, float]
    judge_clips: int

    def share(self, part: str) -> float:
        """Share of videos whose part was found as asked."""
        return sum(answer.right(part) for answer in self.answers) / max(len(self.answers), 1)

    def table(self) -> str:
        """Markdown: part, share with its 95 % interval, the judge's own accuracy."""
        lines = ["| part | as asked | 95 % interval | judge on fresh drawn clips |", "|---|---:|---:|---:|"]
        for part in CLASSES:
            low, high = wilson(self.share(part), len(self.answers))
            lines.append(
                f"| {part} | {self.share(part):.1%} | {low:.1%} to {high:.1%} | {self.judge[part]:.1%} |"
            )
        return "\n".join(lines)

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "videos": len(self.answers),
            "scores": {part: self.share(part) for part in CLASSES},
            "judge": self.judge,
            "judge_clips": self.judge_clips,
            "answers": [asdict(answer) for answer in self.answers],
        }


def adherence(
    config: EngineConfig,
    folder: Path,
    *,
    prompts: int = 64,
    seeds: int = 2,
    settings: dict[str, Any] | None = None,
    on_video: Callable[[int, int, Answer], None] | None = None,
) -> Scores:
    """Make prompts x seeds videos and score them.

    Args:
        config: which model, where.
        folder: raw frames are kept here; videos that are there already are not made again.
        prompts: held-out prompts, 1 to 64.
        seeds: videos of each, seeds 0, 1, ...
        settings: fields of `DiffusionUserParams` that differ from the model's defaults.
        on_video: called with (videos done, videos in all, answer).

    Raises:
        UsageError: not that many prompts.
        ModelError: no model, or no judge.
        TaskError: a video could not be made.
    """
    judge = load_judge()
    asked = [(prompt, words, seed) for prompt, words in held_out_prompts(prompts) for seed in range(seeds)]
    answers: list[Answer] = []
    folder.mkdir(parents=True, exist_ok=True)
    with Engine(config) as engine:
        for number, (prompt, words, seed) in enumerate(asked):
            path = folder / f"{number // seeds:03d}-seed{seed}.npy"
            if not path.exists():
                params = DiffusionUserParams(
                    prompt=prompt, seed=seed, save_path=str(path), **(settings or {})
                )
                make(engine, params)
            answers.append(Answer(prompt, seed, words, judged(judge, path)))
            if on_video is not None:
                on_video(number + 1, len(asked), answers[-1])
    return Scores(answers, *judge_accuracy())


def make(engine: Engine, params: DiffusionUserParams) -> None:
    """One video, from prompt to file.

    Raises:
        TaskError: it failed.
    """
    task = engine.submit(params)
    engine.run_until_idle()
    engine.pool.remove(task.task_id)


def judged(judge: Judge, path: Path) -> Words:
    """What the judge sees in a file of frames."""
    frames = torch.from_numpy(read_frames(path))  # uint8 [T, H, W, 3]
    return name_parts(judge, frames.permute(0, 3, 1, 2)[None].float() / 255)[0]


def wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a share of `count` trials (E. B. Wilson, JASA 22, 1927)."""
    if count == 0:
        return 0.0, 1.0
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)


def write_scores(scores: Scores, folder: Path) -> None:
    """`adherence.json` and `adherence.md` in a folder."""
    write_text(folder / "adherence.json", json.dumps(scores.to_mapping(), indent=1) + "\n")
    write_text(folder / "adherence.md", scores.table() + "\n")
