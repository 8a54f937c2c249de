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

import numpy as np
import torch

from chitu_diffusion.config import EngineConfig
from chitu_diffusion.engine import Engine
from chitu_diffusion.evaluation.compare import psnr
from chitu_diffusion.evaluation.judge import CLASSES, Judge, judge_accuracy, load_judge, name_parts
from chitu_diffusion.evaluation.prompts import Words, asked_in, held_out_pictures
from chitu_diffusion.files.atomic import write_text
from chitu_diffusion.media.reading import read_frames
from chitu_diffusion.task import DiffusionUserParams


@dataclass(frozen=True)
class Answer:
    """One video: what was asked, and what the judge found; of one that began with a picture also how near its
    first frame comes to it, in dB of 8-bit values.
    """

    prompt: str
    seed: int
    asked: Words
    found: Words
    first_frame: float | None = None

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
        if near := self._first_frames():
            lines += ["", f"first frame: {sum(near) / len(near):.1f} dB, worst {min(near):.1f}"]
        return "\n".join(lines)

    def _first_frames(self) -> list[float]:
        return [answer.first_frame for answer in self.answers if answer.first_frame is not None]

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
    manner: str = "plain",
    settings: dict[str, Any] | None = None,
    on_video: Callable[[int, int, Answer], None] | None = None,
) -> Scores:
    """Make prompts x seeds videos and score them.

    Args:
        config: which model, where.
        folder: raw frames are kept here; videos that are there already are not made again.
        prompts: held-out prompts, 1 to 64.
        seeds: videos of each, seeds 0, 1, ...
        manner: how they are asked, of `MANNERS`; any but "plain" has a folder of its own within `folder`.
        settings: fields of `DiffusionUserParams` that differ from the model's defaults.
        on_video: called with (videos done, videos in all, answer).

    Raises:
        UsageError: not that many prompts.
        ModelError: no model, or no judge.
        TaskError: a video could not be made.
    """
    judge = load_judge()
    asked = [(*each, seed) for each in asked_in(manner, prompts) for seed in range(seeds)]
    pictures = held_out_pictures(prompts) if manner == "picture" else None
    answers: list[Answer] = []
    folder = folder if manner == "plain" else folder / manner
    folder.mkdir(parents=True, exist_ok=True)
    with Engine(config) as engine:
        for number, (prompt, negative, words, seed) in enumerate(asked):
            path = folder / f"{number // seeds:03d}-seed{seed}.npy"
            picture = None if pictures is None else pictures[number // seeds]
            if not path.exists():
                own = {"negative_prompt": negative or None, "image": picture, **(settings or {})}
                make(engine, DiffusionUserParams(prompt=prompt, seed=seed, save_path=str(path), **own))
            near = None if picture is None else _nearness(read_frames(path)[0], picture)
            answers.append(Answer(prompt, seed, words, judged(judge, path), near))
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


def _nearness(*pictures: np.ndarray) -> float:
    """Decibels between two pictures uint8 [H, W, 3]."""
    return psnr(*(torch.from_numpy(np.array(picture)).float() / 255 for picture in pictures))


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
