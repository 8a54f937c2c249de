"""How near two videos are: per frame, over time, and as a picture.

PSNR and SSIM ("Image Quality Assessment", Wang et al., IEEE TIP 13, 2004: 11x11 Gaussian window of 1.5
pixels, K1 = 0.01, K2 = 0.03, on each colour) are taken on raw frames: compare .npy or png folders, for an
encoder adds an error of its own. LPIPS (arXiv:1801.03924) is measured where the package `lpips` is installed.
Flicker is the mean difference between neighbouring frames. Knows frames; no prompts or engines.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from chitu_diffusion.errors import UsageError, counted
from chitu_diffusion.files.atomic import write_text
from chitu_diffusion.files.places import make_folder
from chitu_diffusion.files.reading import read_json
from chitu_diffusion.media.reading import read_frames
from chitu_diffusion.media.video import write_video

if TYPE_CHECKING:
    from chitu_diffusion.media.video import Frames

_WINDOW = 11
_DEVIATION = 1.5
_K1 = 0.01
_K2 = 0.03
_SHEET_COLUMNS = 6
_WRITTEN = ("compare.json", "compare.md", "contact.png", "side_by_side.mp4")
_ERROR_GAIN = 4
"""The third row of a contact sheet shows |A - B| times this."""
IDENTICAL = 100.0
"""What stands for the infinite PSNR of equal frames where a mean is taken, in dB."""


@dataclass(frozen=True)
class Comparison:
    """Two videos of one size, frame by frame.

    Attributes:
        psnr: dB a frame, at most `IDENTICAL`.
        ssim: a frame, 1 for equal ones.
        lpips: a frame, 0 for equal ones; None where the package is not installed.
        flicker: mean |difference of neighbouring frames| of A, and of B, in grey levels of 255.
    """

    psnr: tuple[float, ...]
    ssim: tuple[float, ...]
    lpips: tuple[float, ...] | None
    flicker: tuple[float, float]

    def to_mapping(self) -> dict[str, Any]:
        """Plain JSON values: each measure's mean with its 95 % interval, and its frames."""
        measures = {
            "psnr": self.psnr,
            "ssim": self.ssim,
            **({} if self.lpips is None else {"lpips": self.lpips}),
        }
        summary: dict[str, Any] = {
            name: dict(zip(("mean", "low", "high"), mean_interval(frames), strict=True))
            | {"frames": list(frames)}
            for name, frames in measures.items()
        }
        before, after = self.flicker
        return {
            "frames": len(self.psnr),
            **summary,
            "flicker": {"a": before, "b": after, "difference": after - before},
        }

    def table(self) -> str:
        """Markdown."""
        lines = ["| measure | mean | 95 % interval | worst frame |", "|---|---:|---:|---:|"]
        for name, frames, worst in (
            ("PSNR, dB", self.psnr, min),
            ("SSIM", self.ssim, min),
            ("LPIPS", self.lpips, max),
        ):
            if frames is not None:
                mean, low, high = mean_interval(frames)
                lines.append(f"| {name} | {mean:.4g} | {low:.4g} to {high:.4g} | {worst(frames):.4g} |")
        before, after = self.flicker
        lines.append(f"| flicker, of 255 | {before:.3f} and {after:.3f} | {after - before:+.3f} | |")
        return "\n".join(lines)


def compare(a: Frames, b: Frames, device: torch.device | str = "cpu") -> Comparison:
    """Compares frames uint8 [T, H, W, 3].

    Args:
        device: where the arithmetic is done.

    Raises:
        UsageError: shapes that differ.
    """
    if a.shape != b.shape:
        raise UsageError(
            f"the videos are {list(a.shape)} and {list(b.shape)}: use equal frames, height and width"
        )
    # [T, 3, H, W]
    first, second = (torch.from_numpy(frames).to(device).permute(0, 3, 1, 2) for frames in (a, b))

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        # frame by frame: a whole video in float64 takes gigabytes
        return ((x[None].double() / 255, y[None].double() / 255) for x, y in zip(first, second, strict=True))

    return Comparison(
        psnr=tuple(psnr(x, y) for x, y in pairs()),
        ssim=tuple(ssim(x, y) for x, y in pairs()),
        lpips=perceptual(pairs()),
        flicker=(flicker(first), flicker(second)),
    )


def psnr(a: Tensor, b: Tensor) -> float:
    """Decibels between images in [0, 1]; `IDENTICAL` for equal ones."""
    error = float((a - b).square().mean())
    return IDENTICAL if error == 0 else min(-10 * math.log10(error), IDENTICAL)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of images [1, 3, H, W] in [0, 1], mean over colours and whole windows."""
    size = min(_WINDOW, a.shape[-1], a.shape[-2])
    places = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    line = torch.exp(-places.square() / (2 * _DEVIATION**2))
    weights = (line / line.sum()).tolist()
    # the window is a product of two lines: sums of shifted images, first along rows, then along columns
    maps = torch.cat([a, b, a * a, b * b, a * b])  # [5, 3, H, W]
    columns = maps.shape[-1] - size + 1
    rows = maps.shape[-2] - size + 1
    along = sum(
        (weight * maps[..., k : k + columns] for k, weight in enumerate(weights)), start=maps.new_zeros(())
    )
    mean_a, mean_b, square_a, square_b, product = sum(
        (weight * along[..., k : k + rows, :] for k, weight in enumerate(weights)), start=maps.new_zeros(())
    )
    variances = square_a - mean_a**2 + square_b - mean_b**2
    covariance = product - mean_a * mean_b
    c1 = _K1**2
    c2 = _K2**2
    found = (
        (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    )
    return float(found.mean())


def perceptual(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, ...] | None:
    """LPIPS (AlexNet) of each pair; None where the package is not installed."""
    if importlib.util.find_spec("lpips") is None:
        return None
    network = importlib.import_module("lpips").LPIPS(net="alex", verbose=False).eval()
    with torch.no_grad():
        return tuple(float(network(a.float() * 2 - 1, b.float() * 2 - 1)) for a, b in pairs)


def flicker(video: Tensor) -> float:
    """Mean |difference of neighbouring frames| of uint8 [T, 3, H, W], in grey levels; 0 for one frame."""
    if len(video) < 2:
        return 0.0
    return float((video[1:].short() - video[:-1].short()).abs().double().mean())


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and its 95 % interval from the spread of the values (normal approximation)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, mean, mean
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    half = 1.96 * spread / math.sqrt(len(values))
    return mean, mean - half, mean + half


def contact_sheet(a: Frames, b: Frames) -> Frames:
    """uint8 [3 H, columns W, 3]: frames of A, the same of B, and their difference, four times as strong."""
    import numpy as np

    picked = np.unique(np.linspace(0, len(a) - 1, _SHEET_COLUMNS).round().astype(int))
    difference = np.abs(a[picked].astype(np.int16) - b[picked].astype(np.int16)) * _ERROR_GAIN
    rows = (a[picked], b[picked], difference.clip(0, 255).astype(np.uint8))
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)


def refuse_other_comparison(a: Path, b: Path, folder: Path) -> None:
    """Whether a folder holds nothing of a comparison, or an older one of the same two files.

    Raises:
        UsageError: it holds another.
    """
    there = [name for name in _WRITTEN if (folder / name).exists()]
    try:
        said = read_json(folder / _WRITTEN[0])
    except (OSError, ValueError):
        said = None
    pair = [said.get("a"), said.get("b")] if isinstance(said, dict) else None
    if there and pair != [str(a), str(b)]:
        of = "" if pair is None else f", of '{pair[0]}' and '{pair[1]}'"
        raise UsageError(
            f"-o {folder}: a comparison is there already{of} ({', '.join(there)}); use another folder, or "
            "add --overwrite",
            field="output",
        )


def compare_files(a: Path, b: Path, folder: Path, *, fps: float = 16) -> Comparison:
    """Compares two videos and writes compare.json, compare.md, contact.png and side_by_side.mp4 into a
    folder.

    Raises:
        UsageError: a file that cannot be read, or sizes that differ.
        OutputError: the folder cannot be written to.
    """
    import numpy as np
    from PIL import Image

    first = read_frames(a)
    second = read_frames(b)
    if first.shape != second.shape:
        t, h, w, _ = first.shape
        t2, h2, w2, _ = second.shape
        raise UsageError(
            f"'{a}' has {counted(t, 'frame')} of {w}x{h}, and '{b}' {counted(t2, 'frame')} of {w2}x{h2}: use "
            "videos of one length and size",
            field="b",
        )
    make_folder("-o", folder)
    found = compare(first, second)
    said = {"a": str(a), "b": str(b), **found.to_mapping()}
    write_text(folder / "compare.json", json.dumps(said, indent=1) + "\n")
    write_text(folder / "compare.md", found.table() + "\n")
    Image.fromarray(contact_sheet(first, second)).save(folder / "contact.png")
    write_video(np.concatenate([first, second], axis=2), folder / "side_by_side.mp4", fps=fps)
    return found
