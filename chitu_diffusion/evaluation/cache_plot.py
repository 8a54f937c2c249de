"""Speed against fidelity as a picture. Knows lines of a table and Pillow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chitu_diffusion.evaluation.cache_line import Line

_SCALE = 2
"""Pixels drawn for one that is kept: Pillow's circles and slanted lines have no soft edges of their own."""
_WIDTH = 1200 * _SCALE
_HEIGHT = 760 * _SCALE
_LEFT = 90 * _SCALE
_RIGHT = 40 * _SCALE
_TOP = 70 * _SCALE
_BOTTOM = 80 * _SCALE
_DOT = 5 * _SCALE
_TEXT = 14 * _SCALE
_INK = (40, 40, 40)
_GRID = (225, 225, 225)
_PLAN = (200, 40, 40)
_FEWER = (60, 110, 190)
_OTHER = (110, 110, 110)
_KERNEL = (40, 140, 80)

Point = tuple[float, float]
Box = tuple[float, float, float, float]


def draw(lines: Sequence[Line], title: str, path: Path) -> None:
    """Times fewer forwards to the right, mean PSNR upwards; plans and fewer steps as curves, the rest as
    named dots.

    The noise floor lies far above everything; it is drawn at the top, with its figure.
    """
    from PIL import Image, ImageDraw, ImageFont

    found = [(line.setting, line.fewer, line.psnr[0]) for line in lines if line.psnr is not None]
    top = max((psnr for name, _, psnr in found if not name.startswith("kernel=")), default=100.0) + 3
    shown = [
        (name, fewer, psnr) if psnr <= top else (f"{name}: {psnr:.0f} dB", fewer, top)
        for name, fewer, psnr in found
    ]
    image = Image.new("RGB", (_WIDTH, _HEIGHT), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    font = ImageFont.load_default(20 * _SCALE)
    small = ImageFont.load_default(_TEXT)
    pen.text((_LEFT, 20 * _SCALE), title, fill=_INK, font=font)
    if shown:
        place = _axes(pen, small, [(fewer, psnr) for _, fewer, psnr in shown])
        for start, colour in (("plan", _PLAN), ("steps=", _FEWER)):
            curve = sorted((fewer, psnr) for name, fewer, psnr in shown if name.startswith(start))
            pen.line([place(*point) for point in curve], fill=colour, width=2 * _SCALE, joint="curve")
        dots = [place(fewer, psnr) for _, fewer, psnr in shown]
        taken = [(x - _DOT, y - _DOT, x + _DOT, y + _DOT) for x, y in dots]
        for (name, _, _), (x, y) in zip(shown, dots, strict=True):
            pen.ellipse((x - _DOT, y - _DOT, x + _DOT, y + _DOT), fill=_colour(name))
            box = _free((x, y), small.getlength(name), taken)
            taken.append(box)
            pen.text(box[:2], name, fill=_colour(name), font=small)
    image.resize((_WIDTH // _SCALE, _HEIGHT // _SCALE), Image.Resampling.LANCZOS).save(path)


def _colour(name: str) -> tuple[int, int, int]:
    kinds = (("plan", _PLAN), ("steps=", _FEWER), ("kernel=", _KERNEL))
    return next((colour for start, colour in kinds if name.startswith(start)), _OTHER)


def _free(dot: Point, width: float, taken: Sequence[Box]) -> Box:
    """Where a label stands free beside its dot: right of it, left, above or below, then ever lower."""
    (x, y) = dot
    height = _TEXT * 1.15
    gap = _DOT * 1.6
    beside = y - height / 2
    above = y - height * 1.3
    below = y + height * 0.3
    sides = [(x + gap, beside), (x - gap - width, beside), (x + gap, above), (x + gap, below)]
    lower = [(x + gap, y + height * (0.3 + step)) for step in range(1, 40)]
    boxes = [(left, top, left + width, top + height) for left, top in sides + lower]
    return next(
        (box for box in boxes if box[0] > _LEFT and not any(_overlap(box, other) for other in taken)),
        boxes[-1],
    )


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


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
        pen.line((x, _TOP, x, y), fill=_GRID, width=_SCALE)
        pen.text((x - 12 * _SCALE, y + 8 * _SCALE), f"{half / 2:g}x", fill=_INK, font=font)
    for decibels in range(low, high + 1, 5):
        x, y = place(1, decibels)
        pen.line((x, y, _WIDTH - _RIGHT, y), fill=_GRID, width=_SCALE)
        pen.text((x - 34 * _SCALE, y - 9 * _SCALE), str(decibels), fill=_INK, font=font)
    pen.text(
        (_WIDTH / 2 - 120 * _SCALE, _HEIGHT - 36 * _SCALE),
        "times fewer transformer forwards",
        fill=_INK,
        font=font,
    )
    pen.text((12 * _SCALE, _TOP - 24 * _SCALE), "PSNR against full compute, dB", fill=_INK, font=font)
    return place
