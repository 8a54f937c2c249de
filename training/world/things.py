"""The five things, facing right, in local units: about two units high, the ground near y = 0.95, y downwards.

Bodywork, hull, petals and so on have the asked colour (`tint`, `[n, 3]`); wheels, windows, sails and leaves
are the same for every colour. Things know how they look and move their parts, not where they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.world.canvas import INK, Canvas, box, capsule, circle, ellipse, mix, polygon, rgb, turned, union
from training.world.poses import Pose

WHITE = rgb(252, 252, 252)
GLASS = rgb(200, 232, 245)
TYRE = rgb(45, 42, 52)
METAL = rgb(170, 176, 188)
LAMP = rgb(255, 244, 170)
WOOD = rgb(120, 74, 40)
LEAF = rgb(60, 170, 60)
SEEDS = rgb(110, 62, 28)


def draw_car(canvas: Canvas, pose: Pose, tint: Tensor) -> None:
    """A car: cabin with two windows, bonnet in front, wheels whose spokes turn as it drives."""
    x = canvas.x
    y = canvas.y
    body = box(x, y, (0.0, 0.24), (1.16, 0.34), 0.22)
    cabin = polygon(x, y, ((-0.86, 0.1), (-0.56, -0.66), (0.26, -0.66), (0.68, 0.1)))
    canvas.outlined(union(body, cabin), tint)
    canvas.outlined(polygon(x, y, ((-0.64, -0.02), (-0.46, -0.47), (-0.18, -0.47), (-0.18, -0.02))), GLASS)
    canvas.outlined(polygon(x, y, ((0.0, -0.02), (0.0, -0.47), (0.18, -0.47), (0.43, -0.02))), GLASS)
    canvas.outlined(circle(x, y, 1.0, 0.18, 0.12), LAMP)
    wheel_x = x - 0.6 * torch.sign(x)
    wheel_y = y - 0.58
    canvas.fill(circle(wheel_x, wheel_y, 0.0, 0.0, 0.36), TYRE)
    hub = circle(wheel_x, wheel_y, 0.0, 0.0, 0.21)
    canvas.fill(hub, WHITE)
    spoke_x, spoke_y = turned(wheel_x, wheel_y, pose.travel / 0.36)
    spokes = torch.minimum(spoke_x.abs(), spoke_y.abs()) - 0.055
    canvas.fill(torch.maximum(spokes, hub), TYRE)


def draw_boat(canvas: Canvas, pose: Pose, tint: Tensor) -> None:
    """A sailing boat that rocks: coloured hull and fore-sail, white main sail."""
    x, y = turned(canvas.x, canvas.y - 0.5, 0.13 * torch.sin(pose.stride * 0.67))
    canvas.fill(box(x, y, (0.0, -0.7), (0.07, 0.85), 0.03), WOOD)
    canvas.outlined(polygon(x, y, ((-0.16, -1.42), (-0.16, -0.3), (-0.98, -0.3))), WHITE)
    canvas.outlined(polygon(x, y, ((0.16, -1.26), (0.8, -0.3), (0.16, -0.3))), tint)
    hull = polygon(x, y, ((-1.1, -0.14), (1.16, -0.14), (0.74, 0.5), (-0.84, 0.5)))
    canvas.outlined(hull, tint)
    canvas.fill(torch.maximum(hull, (y - 0.08).abs() - 0.08), mix(tint, WHITE, 0.7))


def draw_ball(canvas: Canvas, pose: Pose, tint: Tensor) -> None:
    """A beach ball of coloured and white sectors; a dark spot in one of them shows how it rolls."""
    x, y = turned(canvas.x, canvas.y, pose.travel)
    radius = torch.hypot(x, y)
    ball = radius - 0.94
    canvas.outlined(ball, tint)
    third = 2 * math.pi / 3
    # Sectors bend a little, as seams on a round thing do.
    angle = torch.remainder(torch.atan2(y, x) + 0.55 * radius + third / 2, third) - third / 2
    sector = (angle.abs() - 0.42) * radius
    canvas.fill(torch.maximum(ball, sector - 0.06), INK)
    canvas.fill(torch.maximum(ball, sector), WHITE)
    canvas.outlined(radius - 0.14, WHITE)
    canvas.fill(circle(x, y, 0.47, 0.4, 0.16), INK)


def draw_robot(canvas: Canvas, pose: Pose, tint: Tensor) -> None:
    """A robot: square head with an antenna, square body, grey arms that swing and legs that march."""
    x = canvas.x
    y = canvas.y
    step = pose.effort * torch.sin(pose.stride)
    feet = []
    for hip, lift in ((-0.28, step), (0.28, -step)):
        foot_y = 0.84 - 0.16 * lift.clamp(min=0)
        feet.append(
            union(
                capsule(x, y, (hip, 0.5), (hip, foot_y), 0.13),
                box(x, y, (hip + 0.06, foot_y + 0.04), (0.24, 0.12), 0.08),
            )
        )
    canvas.outlined(union(*feet), METAL)
    wave = 0.06 + 0.3 * step
    arms = [capsule(x, y, (0.56 * s, 0.02), (0.84 * s, 0.36 + s * wave), 0.13) for s in (-1, 1)]
    canvas.outlined(union(*arms), METAL)
    canvas.fill(union(box(x, y, (0.0, -1.0), (0.06, 0.16)), circle(x, y, 0.0, -1.12, 0.12)), TYRE)
    trunk = box(x, y, (0.0, 0.24), (0.54, 0.4), 0.1)
    canvas.outlined(union(trunk, box(x, y, (0.0, -0.52), (0.56, 0.38), 0.12)), tint)
    canvas.outlined(box(x, y, (0.0, 0.28), (0.3, 0.18), 0.05), METAL)
    canvas.fill(circle((x.abs() - 0.12), y, 0.0, 0.28, 0.08), TYRE)
    eye_x = (x - 0.1).abs()
    canvas.outlined(circle(eye_x, y, 0.24, -0.6, 0.17), WHITE)
    canvas.fill(circle((x - 0.16).abs(), y, 0.24, -0.6, 0.08), INK)
    canvas.fill(box(x, y, (0.1, -0.27), (0.26, 0.055), 0.04), INK)


def draw_flower(canvas: Canvas, pose: Pose, tint: Tensor) -> None:
    """A flower: six round petals about a brown middle, green stem and two leaves; it sways."""
    x = canvas.x
    y = canvas.y
    lean = 0.12 * torch.sin(pose.stride * 0.67)
    leaf_x, leaf_y = turned(x.abs() - 0.32, y - 0.62, torch.full_like(lean, -0.5))
    canvas.outlined(
        union(
            capsule(x, y, (lean, -0.3), (0.0, 0.98), 0.08), ellipse(leaf_x, leaf_y, (0.0, 0.0), (0.32, 0.14))
        ),
        LEAF,
    )
    head_x = x - lean
    head_y = y + 0.4
    sector = math.pi / 3
    angle = torch.atan2(head_y, head_x) - lean
    radius = torch.hypot(head_x, head_y)
    folded = torch.remainder(angle + sector / 2, sector) - sector / 2
    canvas.outlined(circle(radius * torch.cos(folded), radius * torch.sin(folded), 0.43, 0.0, 0.27), tint)
    canvas.outlined(radius - 0.27, SEEDS)
