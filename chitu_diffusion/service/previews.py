"""Pictures of a video that is being made: a strip of frames from the clean latent that a step points at.

A latent cell becomes a colour by a linear map of its channels, fitted to the VAE when a worker starts. Knows
latents, a decoder and files; no jobs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from chitu_diffusion.files.atomic import new_file
from chitu_diffusion.models.spec import LatentGeometry
from chitu_diffusion.service.settings import PreviewSettings
from chitu_diffusion.task import DiffusionTask

Pixels = NDArray[np.uint8]
logger = logging.getLogger(__name__)
_SIDE = 2
"""Latent cells along a side of the flat pictures that the map is fitted on: one cell has no neighbours, as no
cell of a video is, and was worse by 1 dB on the shipped model.
"""
_DEVIATION = 1.3
_SEED = 2024
_WIDTH = 160
_QUALITY = 80
_EFFORT = 2  # of 0 to 6: 3.4 times as fast as the usual 4, and files 3 % larger
_COST = 100
"""A preview comes this many times as late as the last one took: together they take at most a hundredth."""
_KEPT = 2
"""Files of a job; whoever was told of the last but one may still be reading it."""
Image.init()  # formats, once for all workers: else the first preview of each takes three times as long


@torch.no_grad()
def fit_colours(decode: Callable[[Tensor], Tensor], geometry: LatentGeometry, device: torch.device) -> Tensor:
    """The linear map of latent channels to colours that is nearest to a decoder's, by least squares.

    Args:
        decode: latent [B, C, 1, H, W] -> video [B, 1, 3, s H, s W] in [0, 1].

    Returns:
        [C + 1, 3] float32 on the device; the last row is the constant.
    """
    count = 2 * geometry.channels
    generator = torch.Generator().manual_seed(_SEED)
    rows = _DEVIATION * torch.randn(count, geometry.channels, generator=generator)
    flat = rows[:, :, None, None, None].expand(-1, -1, 1, _SIDE, _SIDE).contiguous()
    wanted = decode(flat.to(device)).float().mean(dim=(1, 3, 4)).cpu()
    solved = torch.linalg.lstsq(_with_one(rows).double(), wanted.double(), driver="gelsd").solution
    return solved.float().to(device)


def _with_one(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], dim=-1)


def frames_of(latent: Tensor, colours: Tensor, most: int) -> Pixels:
    """Frames of a latent, evenly spread, a pixel a cell: uint8 [frames, rows, columns, 3] in main memory.

    Args:
        latent: [C, T, H, W], without noise.
        colours: of `fit_colours`.
        most: frames.
    """
    some = min(most, latent.shape[1])
    places = [place * (latent.shape[1] - 1) // max(1, some - 1) for place in range(some)]
    cells = _with_one(latent[:, places].float().permute(1, 2, 3, 0)) @ colours.to(latent.device)
    pixels: Pixels = cells.clamp(0, 1).mul(255).round().to(torch.uint8).cpu().numpy()
    return pixels


def strip_of(frames: Pixels, scale: int) -> Image.Image:
    """Frames of `frames_of` side by side, each as wide as the video, at most 160 pixels.

    Args:
        scale: pixels of the video along a side of a cell.
    """
    count, rows, columns, _ = frames.shape
    width = min(_WIDTH, columns * scale)
    size = (width, max(1, round(width * rows / columns)))
    strip = Image.new("RGB", (width * count, size[1]))
    for place, frame in enumerate(frames):
        strip.paste(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC), (place * width, 0))
    return strip


class PreviewWriter:
    """Writes `preview-STEP.webp` into a job's folder, now and then; a `callback_on_step_end`.

    Args:
        colours: of `fit_colours`.
        scale: as for `strip_of`.
        settings: how often, and how many frames.
        folder: of the job's attempt.
    """

    def __init__(self, colours: Tensor, scale: int, settings: PreviewSettings, folder: Path) -> None:
        self._colours = colours
        self._scale = scale
        self._settings = settings
        self._folder = folder
        self._due = time.monotonic() + settings.every_s
        self._fresh: int | None = None
        self._files: list[Path] = []

    def __call__(self, engine: object, step: int, timestep: float, values: Mapping[str, Any]) -> None:
        """After a step, counted from 0."""
        if time.monotonic() < self._due:
            return
        task: DiffusionTask = values["task"]
        references = 0 if task.resolved is None else len(task.resolved.reference_images or ())
        latent: Tensor = values["clean"]()[0, :, references:]
        frames = frames_of(latent, self._colours, self._settings.frames)
        began = time.monotonic()  # a GPU has ended the step by now, which is no cost of this
        strip = strip_of(frames, self._scale)
        file = self._folder / f"preview-{step + 1}.webp"
        try:
            with new_file(file) as part:
                strip.save(part, "WEBP", quality=_QUALITY, method=_EFFORT)
        except OSError as error:  # the video goes on
            logger.warning("%s cannot be written: %s", file.name, error.strerror or error)
        else:
            self._fresh = step + 1
            self._files.append(file)
            for old in self._files[:-_KEPT]:
                old.unlink(missing_ok=True)
            self._files = self._files[-_KEPT:]
        ended = time.monotonic()
        self._due = ended + max(self._settings.every_s, _COST * (ended - began))

    def take_fresh(self) -> int | None:
        """The step of a preview that has come since the last call; None: none has."""
        fresh = self._fresh
        self._fresh = None
        return fresh

    def clear(self) -> None:
        """Remove what was written."""
        for file in self._files:
            file.unlink(missing_ok=True)
        self._files = []
