"""Painting with signed distances: the shapes, and a canvas that fills them with smooth edges.

A distance is negative inside its shape. Coordinates come as two tensors that only have to broadcast together:
as long as nothing is rotated, x is `[n, T, 1, w]` and y is `[n, T, h, 1]`, and most arithmetic happens on
those small tensors. Colours are in [-1, 1]. This file knows shapes and colours, no actor, scene or motion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

Colour = tuple[float, float, float] | Tensor
"""Red, green and blue in [-1, 1]: three numbers for all clips, or `[n, 3]`, one row a clip."""


def rgb(red: int, green: int, blue: int) -> tuple[float, float, float]:
    """A colour from three bytes."""
    return (red / 127.5 - 1, green / 127.5 - 1, blue / 127.5 - 1)


INK = rgb(26, 20, 30)

EDGE = 2.0
"""Width of the ramp from outside to inside a shape, in pixels."""


@dataclass
class Canvas:
    """Pixels being painted over. Edges run over `EDGE` pixels: sharper ones would be beyond an 8x smaller
    latent.

    pixels: `[n, 3, T, h, w]` in [-1, 1], changed in place.
    x, y: the pixel centres in the painter's own units, broadcastable to `[n, T, h, w]`.
    sharpness: pixels a unit, broadcastable like x and y, or a number.
    line: the width of an outline in pixels.
    """

    pixels: Tensor
    x: Tensor
    y: Tensor
    sharpness: Tensor | float
    line: float = 0.0

    def fill(self, distance: Tensor, colour: Colour, strength: Tensor | float = 1.0) -> None:
        """Paints a shape without an outline; `strength` below 1 lets what is behind shine through."""
        cover = (distance * (-self.sharpness / EDGE)).add_(0.5).clamp_(0, 1)
        self._blend(cover * strength if isinstance(strength, Tensor) or strength != 1.0 else cover, colour)

    def outlined(self, distance: Tensor, colour: Colour) -> None:
        """Paints a shape with a dark line around it."""
        depth = (distance * (-self.sharpness / EDGE)).add_(0.5)
        self._blend((depth + self.line / EDGE).clamp_(0, 1), INK)
        self._blend(depth.clamp_(0, 1), colour)

    def glow(self, distance: Tensor, colour: Colour, softness: float) -> None:
        """Paints a shape whose edge fades out over `softness` units."""
        self._blend((distance * (-1 / softness)).add_(0.5).clamp_(0, 1), colour)

    def _blend(self, cover: Tensor, colour: Colour) -> None:
        if not isinstance(colour, Tensor):
            colour = _constant(colour, self.pixels.device)
        self.pixels.lerp_(colour[:, :, None, None, None], cover.unsqueeze(1))


@lru_cache(maxsize=256)
def _constant(colour: tuple[float, float, float], device: torch.device) -> Tensor:
    """A colour as `[1, 3]` on a device, made once: on a GPU each copy from the host would stall the queue."""
    return torch.tensor([colour], device=device)


def mix(colour: Tensor, other: tuple[float, float, float], share: float) -> Tensor:
    """`colour` `[n, 3]` moved towards another by `share`."""
    return torch.lerp(colour, _constant(other, colour.device), share)


def union(*distances: Tensor) -> Tensor:
    """The distance to whichever shape is nearest."""
    nearest = distances[0]
    for distance in distances[1:]:
        nearest = torch.minimum(nearest, distance)
    return nearest


def circle(x: Tensor, y: Tensor, cx: Tensor | float, cy: Tensor | float, radius: Tensor | float) -> Tensor:
    """A disc around (cx, cy)."""
    return torch.hypot(x - cx, y - cy).sub_(radius)


def ellipse(
    x: Tensor, y: Tensor, centre: tuple[Tensor | float, Tensor | float], half: tuple[float, float]
) -> Tensor:
    """An axis-aligned ellipse (distance to first order, exact on the edge)."""
    dx = x - centre[0]
    dy = y - centre[1]
    level = torch.hypot(dx / half[0], dy / half[1])
    slope = torch.hypot(dx / half[0] ** 2, dy / half[1] ** 2).clamp_(min=1e-4)
    return (level - 1).mul_(level).div_(slope)


def capsule(
    x: Tensor,
    y: Tensor,
    start: tuple[Tensor | float, Tensor | float],
    end: tuple[Tensor | float, Tensor | float],
    radius: float,
) -> Tensor:
    """A line with round ends; its end points may move with time (`[n, T, 1, 1]`)."""
    dx = x - start[0]
    dy = y - start[1]
    ex = end[0] - start[0]
    ey = end[1] - start[1]
    length2 = ex * ex + ey * ey
    along = (dx * (ex / length2) + dy * (ey / length2)).clamp_(0, 1)
    return torch.hypot(dx - along * ex, dy - along * ey).sub_(radius)


def box(
    x: Tensor,
    y: Tensor,
    centre: tuple[Tensor | float, Tensor | float],
    half: tuple[float, float],
    round_by: float = 0.0,
) -> Tensor:
    """A rectangle, its corners rounded by `round_by` (which does not make it larger)."""
    qx = (x - centre[0]).abs() - (half[0] - round_by)
    qy = (y - centre[1]).abs() - (half[1] - round_by)
    outside = torch.hypot(qx.clamp(min=0), qy.clamp(min=0))
    return outside.add_(torch.maximum(qx, qy).clamp_(max=0)).sub_(round_by)


def polygon(x: Tensor, y: Tensor, points: Sequence[tuple[float, float]]) -> Tensor:
    """A convex polygon, its corners in order, either way round."""
    edges = list(zip(points, [*points[1:], points[0]], strict=True))
    way_round = math.copysign(1.0, sum(ax * by - bx * ay for (ax, ay), (bx, by) in edges))
    inside: Tensor | None = None
    for (ax, ay), (bx, by) in edges:
        ex = bx - ax
        ey = by - ay
        length = math.hypot(ex, ey) * way_round
        edge = (x - ax) * (ey / length) - (y - ay) * (ex / length)
        inside = edge if inside is None else torch.maximum(inside, edge)
    assert inside is not None
    return inside


def turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """The coordinates as seen by something turned clockwise by `angle` radians."""
    cos = torch.cos(angle)
    sin = torch.sin(angle)
    return x * cos + y * sin, y * cos - x * sin
