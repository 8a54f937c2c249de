"""One video of a cache setting against full compute, as a row of plain numbers in a file of its own.

Rows are written whole or not at all, under a name made of everything that they depend on, so that a run that
was cut short goes on where it stopped, and a row of other weights is never taken for one of these. Knows one
row; tables are made beside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.errors import ChituError
from chitu_diffusion.evaluation.compare import compare
from chitu_diffusion.evaluation.judge import Judge, load_judge, name_parts
from chitu_diffusion.evaluation.videos import Made, make_video
from chitu_diffusion.files.atomic import new_file, write_text
from chitu_diffusion.files.reading import read_json
from chitu_diffusion.flexcache.registry import parse_setting

FULL = "full"
"""The setting that the others are compared with."""


@dataclass(frozen=True)
class Video:
    """A prompt, its seed, and the words behind the prompt where it comes from the drawn world."""

    prompt: str
    seed: int
    words: Mapping[str, str] | None = None


@dataclass(frozen=True)
class VideoRow:
    """A video of one setting.

    Attributes:
        psnr, ssim: means over raw frames against full compute; None for full compute itself.
        flicker: of full compute, and of this video.
        seconds, forward_seconds, work: see `Made`.
        right: share of the four parts that the judge finds as asked; None where the prompt names none.
        error: why there is no video.
    """

    setting: str
    prompt: str
    seed: int
    psnr: float | None = None
    ssim: float | None = None
    flicker: tuple[float, float] | None = None
    seconds: float = 0.0
    forward_seconds: float = 0.0
    work: float = 0.0
    right: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Place:
    """Where rows and the frames of full compute lie.

    Args:
        folder: it exists.
        identity: everything that all rows depend on: weights, steps, size, device.
        calibration: what the rows of caches depend on besides.
    """

    folder: Path
    identity: str
    calibration: str

    def row(self, setting: str, video: Video) -> Path:
        """A row's file."""
        uncalibrated = setting == FULL or setting.partition("=")[0] in ("steps", "kernel")
        return self._file(setting, video, "" if uncalibrated else self.calibration).with_suffix(".json")

    def frames(self, video: Video) -> Path:
        """Frames of full compute."""
        return self._file(FULL, video, "").with_suffix(".npy")

    def known(self, setting: str, video: Video) -> VideoRow | None:
        """The row, if it is there, whole, and had no error."""
        file = self.row(setting, video)
        if not file.exists() or (setting == FULL and not self.frames(video).exists()):
            return None
        try:
            row = VideoRow(**read_json(file))
        except (ValueError, TypeError):
            return None  # damaged, as by a machine that went off: made anew
        return row if row.error is None else None

    def _file(self, setting: str, video: Video, calibration: str) -> Path:
        said = json.dumps([self.identity, setting, video.prompt, video.seed, calibration])
        return self.folder / hashlib.sha256(said.encode()).hexdigest()[:24]


def make_row(
    backend: DiffusionBackend, setting: str, video: Video, settings: Mapping[str, Any], place: Place
) -> VideoRow:
    """Makes the video, compares it and writes its row. An error becomes the row's; the other rows go on."""
    try:
        _warm(backend, tuple(settings.items()))
        row = _row(setting, video, _made(backend, setting, video, settings), place, backend.device)
    except (ChituError, RuntimeError, ValueError) as error:
        row = VideoRow(setting, video.prompt, video.seed, error=f"{type(error).__name__}: {error}")
    write_text(place.row(setting, video), json.dumps(asdict(row)))
    return row


@cache
def _warm(backend: DiffusionBackend, settings: tuple[tuple[str, Any], ...]) -> None:
    """Once a process, so that no row's seconds hold what a device does at its first forward."""
    make_video(backend, **{"prompt": "-", "seed": 0, **dict(settings), "num_inference_steps": 2})


def _made(backend: DiffusionBackend, setting: str, video: Video, settings: Mapping[str, Any]) -> Made:
    asked: dict[str, Any] = {"prompt": video.prompt, "seed": video.seed, **settings}
    kind, _, value = setting.partition("=")
    if setting == FULL:
        return make_video(backend, **asked)
    if kind == "steps":
        return make_video(backend, **{**asked, "num_inference_steps": int(value)})
    if kind == "kernel":
        return make_video(backend, kernel=value, **asked)
    return make_video(backend, flexcache=parse_setting(setting), **asked)


def _row(setting: str, video: Video, made: Made, place: Place, device: torch.device) -> VideoRow:
    row = VideoRow(
        setting,
        video.prompt,
        video.seed,
        seconds=made.seconds,
        forward_seconds=made.forward_seconds,
        work=made.work,
        right=_share_right(made, video),
    )
    if setting == FULL:
        with new_file(place.frames(video)) as part, part.open("wb") as file:
            np.save(file, made.frames)
        return row
    near = compare(np.load(place.frames(video)), made.frames, device)
    return VideoRow(
        **{
            **asdict(row),
            "psnr": float(np.mean(near.psnr)),
            "ssim": float(np.mean(near.ssim)),
            "flicker": near.flicker,
        }
    )


def _share_right(made: Made, video: Video) -> float | None:
    if video.words is None:
        return None
    clip = torch.from_numpy(made.frames).permute(0, 3, 1, 2)[None].float() / 255
    found = asdict(name_parts(_judge(), clip)[0])
    return sum(found[part] == word for part, word in video.words.items()) / len(video.words)


@cache
def _judge() -> Judge:
    return load_judge()
