"""Speed against fidelity as a picture. Knows lines of a table and Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chitu_diffusion.evaluation.cache_table import Line

_WIDTH, _HEIGHT = 1200, 760
_LEFT, _RIGHT, _TOP, _BOTTOM = 90, 40, 70, 80
_INK, _GRID = (40, 40, 40), (225, 225, 225)
_PLAN, _FEWER, _OTHER, _KERNEL = (200, 40, 40), (60, 110, 190), (110, 110, 110), (40, 140, 80)

Point = tuple[float, float]


def draw(lines: Sequence[Line], title: str, path: Path) -> None:
    """Times fewer forwards to the right, mean PSNR upwards; plans and fewer steps as curves, the rest as named dots.

    The noise floor lies far above everything; it is drawn at the top, with its figure.
    """
    from PIL import Image, ImageDraw, ImageFont

    found = [(line.setting, line.fewer, line.psnr[0]) for line in lines if line.psnr is not None]
    top = max((psnr for name, _, psnr in found if not name.startswith("kernel=")), default=100.0) + 3
    shown = [(name, fewer, psnr) if psnr <= top else (f"{name}: {psnr:.0f} dB", fewer, top) for name, fewer, psnr in found]
    image = Image.new("RGB", (_WIDTH, _HEIGHT), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    font, small = ImageFont.load_default(20), ImageFont.load_default(14)
    pen.text((_LEFT, 20), title, fill=_INK, font=font)
    if shown:
        place = _axes(pen, small, [(fewer, psnr) for _, fewer, psnr in shown])
        for start, colour in (("plan", _PLAN), ("steps=", _FEWER)):
            curve = sorted((fewer, psnr) for name, fewer, psnr in shown if name.startswith(start))
            pen.line([place(*point) for point in curve], fill=colour, width=3)
        taken: list[Point] = []
        for name, fewer, psnr in shown:
            x, y = place(fewer, psnr)
            pen.ellipse((x - 5, y - 5, x + 5, y + 5), fill=_colour(name))
            label = _free((x + 8, y - 8), taken)
            taken.append(label)
            pen.text(label, name, fill=_colour(name), font=small)
    image.save(path)


def _colour(name: str) -> tuple[int, int, int]:
    kinds = (("plan", _PLAN), ("steps=", _FEWER), ("kernel=", _KERNEL))
    return next((colour for start, colour in kinds if name.startswith(start)), _OTHER)


def _free(wanted: Point, taken: Sequence[Point]) -> Point:
    """The nearest place below where no label stands yet."""
    x, y = wanted
    while any(abs(x - a) < 130 and abs(y - b) < 15 for a, b in taken):
        y += 15
    return x, y


def _axes(pen: Any, font: Any, points: Sequence[Point]) -> Callable[[float, float], Point]:
    """Grid and numbers; returns the way from values to pixels."""
    most = max(2.0, *(fewer for fewer, _ in points)) * 1.12
    low = math.floor(min(psnr for _, psnr in points) / 5) * 5
    high = max(low + 5, math.ceil(max(psnr for _, psnr in points) / 5) * 5)

    def place(fewer: float, psnr: float) -> Point:
        x = _LEFT + (fewer - 1) / (most - 1) * (_WIDTH - _LEFT - _RIGHT)
        return x, _HEIGHT - _BOTTOM - (psnr - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    for half in range(2, int(most * 2) + 1):
        x, y = place(half / 2, low)
        pen.line((x, _TOP, x, y), fill=_GRID)
        pen.text((x - 12, y + 8), f"{half / 2:g}x", fill=_INK, font=font)
    for decibels in range(low, high + 1, 5):
        x, y = place(1, decibels)
        pen.line((x, y, _WIDTH - _RIGHT, y), fill=_GRID)
        pen.text((x - 34, y - 9), str(decibels), fill=_INK, font=font)
    pen.text((_WIDTH // 2 - 120, _HEIGHT - 36), "times fewer transformer forwards", fill=_INK, font=font)
    pen.text((12, _TOP - 24), "PSNR against full compute, dB", fill=_INK, font=font)
    return place
