"""The five animals, facing right, in local units: about two units high, the ground near y = 0.95, y
downwards.

Each painter works from the far side to the near side. Fur, feathers and scales have the asked colour, `tint`
`[n, 3]`; eyes, noses and beaks are the same for every colour. Animals know how they look and step, not where
they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from training.world.canvas import INK, Canvas, capsule, circle, ellipse, mix, polygon, rgb, turned, union
from training.world.poses import Pose

WHITE = rgb(252, 252, 252)
ROSE = rgb(240, 130, 140)
BEAK = rgb(245, 150, 30)


def _leg(
    canvas: Canvas, pose: Pose, hip: tuple[float, float], ground: float, late: float, radius: float
) -> Tensor:
    """A leg from the hip to the ground, `late` of a step behind the first."""
    phase = pose.stride + 2 * math.pi * late
    foot_x = hip[0] + 0.26 * pose.effort * torch.sin(phase)
    foot_y = ground - radius - 0.14 * pose.effort * torch.cos(phase).clamp(min=0)
    return capsule(canvas.x, canvas.y, hip, (foot_x, foot_y), radius)


def _eyes(canvas: Canvas, x: Tensor, y: Tensor, at: tuple[float, float], size: float) -> None:
    """White eyes with dark pupils; `x` may be mirrored, and then there are two."""
    canvas.fill(ellipse(x, y, at, (0.85 * size, size)), WHITE)
    canvas.fill(circle(x, y, at[0], at[1] + 0.1 * size, 0.58 * size), INK)


def draw_cat(canvas: Canvas, pose: Pose, tint: Tensor) -> None:
    """A cat: round face with two pointed ears, tail held up."""
    x = canvas.x
    y = canvas.y
    shade = mix(tint, INK, 0.3)
    far = [_leg(canvas, pose, (hip, 0.4), 0.97, late, 0.13) for hip, late in ((-0.5, 0.5), (0.22, 0.0))]
    canvas.outlined(union(*far), shade)
    wag = 0.16 * torch.sin(pose.stride * 0.5)
    bend = (-1.02, -0.2)
    tail = union(capsule(x, y, (-0.66, 0.2), bend, 0.12), capsule(x, y, bend, (-0.86 + wag, -0.76), 0.12))
    near = [_leg(canvas, pose, (hip, 0.4), 0.97, late, 0.14) for hip, late in ((-0.66, 0.0), (0.42, 0.5))]
    canvas.outlined(union(tail, ellipse(x, y, (-0.12, 0.26), (0.74, 0.37)), *near), tint)

    face = (x - 0.52).abs()
    ears = polygon(face, y, ((0.04, -0.62), (0.47, -1.1), (0.57, -0.3)))
    canvas.outlined(union(ellipse(face, y, (0.0, -0.32), (0.54, 0.44)), ears), tint)
    canvas.fill(polygon(face, y, ((0.24, -0.68), (0.42, -0.92), (0.45, -0.58))), ROSE)
    _eyes(canvas, face, y, (0.23, -0.38), 0.19)
    canvas.fill(ellipse(face, y, (0.0, -0.1), (0.2, 0.12)), WHITE)
    canvas.fill(polygon(face, y, ((0.0, -0.2), (0.1, -0.2), (0.0, -0.07), (-0.1, -0.2))), INK)


def draw_dog(canvas: Canvas, pose: Pose, tint: Tensor) -> None:
    """A dog in profile: long snout, hanging ear, wagging tail, tongue out."""
    x = canvas.x
    y = canvas.y
    shade = mix(tint, INK, 0.3)
    far = [_leg(canvas, pose, (hip, 0.3), 0.97, late, 0.13) for hip, late in ((-0.5, 0.5), (0.2, 0.0))]
    canvas.outlined(union(*far), shade)
    wag = 0.2 * torch.sin(2 * pose.stride)
    tail = capsule(x, y, (-0.75, 0.05), (-1.08 + 0.5 * wag, -0.4 + 0.5 * wag), 0.1)
    near = [_leg(canvas, pose, (hip, 0.3), 0.97, late, 0.14) for hip, late in ((-0.66, 0.0), (0.36, 0.5))]
    body = union(
        capsule(x, y, (-0.5, 0.18), (0.22, 0.16), 0.33), capsule(x, y, (0.3, 0.1), (0.5, -0.4), 0.25)
    )
    canvas.outlined(union(tail, body, *near), tint)

    canvas.fill(capsule(x, y, (0.86, -0.18), (0.88, 0.06), 0.1), ROSE)
    canvas.outlined(
        union(circle(x, y, 0.5, -0.5, 0.38), capsule(x, y, (0.6, -0.36), (0.98, -0.32), 0.21)), tint
    )
    canvas.fill(circle(x, y, 1.12, -0.43, 0.12), INK)
    _eyes(canvas, x, y, (0.62, -0.6), 0.17)
    ear_x, ear_y = turned(x - 0.26, y + 0.36, pose.effort.new_tensor(0.25))
    canvas.outlined(ellipse(ear_x, ear_y, (0.0, 0.0), (0.17, 0.4)), mix(tint, INK, 0.4))


def draw_rabbit(canvas: Canvas, pose: Pose, tint: Tensor) -> None:
    """A rabbit: two long upright ears, hunched back, white ball of a tail."""
    x = canvas.x
    y = canvas.y
    shade = mix(tint, INK, 0.3)
    sway = 0.07 * torch.sin(pose.stride)
    canvas.outlined(capsule(x, y, (0.5, -0.3), (0.74 + sway, -1.0), 0.14), shade)
    canvas.outlined(_leg(canvas, pose, (0.16, 0.5), 0.97, 0.0, 0.12), shade)
    canvas.outlined(circle(x, y, -0.84, 0.42, 0.2), WHITE)
    near = _leg(canvas, pose, (0.34, 0.45), 0.97, 0.5, 0.12)
    swing = 0.2 * pose.effort * torch.sin(pose.stride)
    foot = capsule(x, y, (-0.5 + swing, 0.84), (-0.1 + swing, 0.84), 0.13)
    canvas.outlined(union(ellipse(x, y, (-0.24, 0.38), (0.6, 0.5)), near, foot), tint)

    ear = capsule(x, y, (0.3, -0.3), (0.22 + sway, -1.0), 0.15)
    canvas.outlined(union(ellipse(x, y, (0.44, -0.12), (0.44, 0.38)), ear), tint)
    canvas.fill(capsule(x, y, (0.29, -0.5), (0.22 + sway, -0.97), 0.07), ROSE)
    _eyes(canvas, x, y, (0.54, -0.2), 0.18)
    canvas.fill(ellipse(x, y, (0.74, 0.03), (0.17, 0.13)), WHITE)
    canvas.fill(circle(x, y, 0.85, -0.08, 0.09), ROSE)


def draw_bird(canvas: Canvas, pose: Pose, tint: Tensor) -> None:
    """A bird: orange beak, fanned tail, one big wing that beats."""
    x = canvas.x
    y = canvas.y
    shade = mix(tint, INK, 0.25)
    canvas.outlined(polygon(x, y, ((-0.3, 0.0), (-1.12, -0.16), (-1.0, 0.42), (-0.3, 0.4))), shade)
    canvas.outlined(polygon(x, y, ((0.7, -0.42), (1.2, -0.16), (0.7, 0.0))), BEAK)
    canvas.outlined(union(ellipse(x, y, (0.0, 0.28), (0.66, 0.44)), circle(x, y, 0.48, -0.22, 0.38)), tint)
    canvas.fill(ellipse(x, y, (0.14, 0.5), (0.36, 0.18)), mix(tint, WHITE, 0.55))
    _eyes(canvas, x, y, (0.56, -0.3), 0.18)
    beat = -0.25 + 1.05 * torch.sin(pose.stride)
    wing_x, wing_y = turned(x - 0.08, y - 0.12, beat)
    canvas.outlined(ellipse(wing_x, wing_y, (-0.5, -0.06), (0.62, 0.25)), shade)


def draw_fish(canvas: Canvas, pose: Pose, tint: Tensor) -> None:
    """A fish: oval with bands, a big tail fin that swings, fins above and below."""
    x = canvas.x
    y = canvas.y
    shade = mix(tint, INK, 0.28)
    swing = torch.sin(pose.stride)
    tail_x = (x + 0.5) / (0.82 + 0.18 * torch.cos(pose.stride))
    tail_y = y + 0.42 * swing * (x + 0.5)
    canvas.outlined(polygon(tail_x, tail_y, ((0.0, 0.0), (-0.66, -0.58), (-0.5, 0.0), (-0.5, 0.05))), shade)
    canvas.outlined(polygon(tail_x, tail_y, ((0.0, 0.0), (-0.66, 0.58), (-0.5, 0.0), (-0.5, -0.05))), shade)
    back = polygon(x, y, ((-0.4, -0.3), (-0.3, -0.82), (0.1, -0.76), (0.4, -0.4), (0.3, 0.0)))
    belly = polygon(x, y, ((-0.2, 0.3), (-0.32, 0.8), (0.02, 0.74), (0.3, 0.4)))
    canvas.outlined(union(back, belly), shade)
    body = ellipse(x, y, (0.2, 0.0), (0.88, 0.56))
    canvas.outlined(body, tint)
    bands = union((x + 0.28).abs() - 0.1, (x - 0.2).abs() - 0.1)
    canvas.fill(torch.maximum(body, bands), mix(tint, WHITE, 0.6))
    _eyes(canvas, x, y, (0.66, -0.14), 0.22)
    canvas.fill(capsule(x, y, (0.74, 0.16), (0.97, 0.22), 0.045), INK)
    fin_x, fin_y = turned(x - 0.2, y - 0.12, 0.5 * swing)
    canvas.outlined(ellipse(fin_x, fin_y, (-0.16, 0.05), (0.24, 0.14)), shade)
