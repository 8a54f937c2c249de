"""Where an actor is at each frame, and how it holds itself.

Lengths are in short sides of the frame, from its centre, y downwards. A motion is a function of the time as a
share of the clip, so it is complete at the last frame of any clip of 17 frames or more; a shorter clip shows
its middle part. What repeats (steps, wing beats) runs in seconds. This file knows motions; it knows no pixels
and no actor's looks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from chitu_diffusion.evaluation.prompts import MOTIONS
from training.world.vocabulary import WorldSpecs

FPS = 16
WHOLE_MOTION_FRAMES = 17
GROWN = 1.4
LARGEST = 0.235
"""An actor's half-height at most, before it grows, in short sides of the frame."""

_SMALLEST = 0.195
_STEPS_PER_SECOND = 1.5


@dataclass(frozen=True)
class Pose:
    """Everything that changes with time, `[n, T]` each.

    x, y: the actor's centre. scale: short sides a local unit (an actor is about two units high).
    angle: radians clockwise. facing: 1 right, -1 left. stride: the phase of steps and wing beats in radians.
    effort: how wide the steps are, 0 to 1. stretch: breathing, a factor on the height.
    travel: the way gone forwards in local units.
    """

    x: Tensor
    y: Tensor
    scale: Tensor
    angle: Tensor
    facing: Tensor
    stride: Tensor
    effort: Tensor
    stretch: Tensor
    travel: Tensor


def pose_of(
    specs: WorldSpecs, num_frames: int, half_width: float, half_height: float, beside: int = 0
) -> Pose:
    """The poses of a batch over `num_frames` frames of a picture of 2 `half_width` x 2 `half_height` short
    sides. Of two actors in one picture one is on the left or above (`beside` -1), one on the right or below
    (1).
    """
    frame = torch.arange(num_frames, device=specs.motion.device, dtype=torch.float32)[None]
    whole = max(num_frames, WHOLE_MOTION_FRAMES) - 1
    share = (frame + (whole - (num_frames - 1)) / 2) / whole
    centred = share - 0.5
    along, across, size, reach, side, phase, turn, _ = specs.variation[:, :8, None].unbind(dim=1)
    side = (side >= 0.5).float() * 2 - 1
    turn = (turn >= 0.5).float() * 2 - 1

    def doing(*names: str) -> Tensor:
        chosen = sum(specs.motion == MOTIONS.index(name) for name in names)
        return torch.as_tensor(chosen, dtype=torch.float32)[:, None]

    sideways = doing("right") - doing("left")
    upright = doing("down") - doing("up")
    hopping = doing("jumping")
    circling = doing("circling")
    growing = doing("growing")

    facing = torch.where(sideways == 0, side, sideways)
    scale = _SMALLEST + (LARGEST - _SMALLEST) * size
    scale = scale * torch.where(growing > 0, 0.5 + (GROWN - 0.5) * share * (0.93 + 0.07 * reach), 1.0)

    round_angle = 2 * math.pi * (phase + turn * share)
    hop = (2 * share) % 1.0
    sideways_way = half_width * (0.96 + 0.2 * reach)
    vertical_way = half_height * (0.84 + 0.2 * reach)
    roaming = 1 - sideways.abs()
    settled = 1 - upright.abs() - hopping - circling
    x = sideways * sideways_way * centred
    x = x + roaming * (1 - 0.6 * circling) * half_width * 0.4 * (along - 0.5)
    x = x + circling * 0.21 * torch.cos(round_angle)
    y = upright * vertical_way * centred + 0.05 * half_height * (across - 0.5)
    y = y + settled * half_height * (0.1 + 0.3 * across) * (1 - 0.6 * growing)
    y = y + hopping * half_height * (0.42 - 0.68 * 4 * hop * (1 - hop))
    y = y + circling * (0.03 + 0.21 * torch.sin(round_angle))

    if beside:
        scale = 0.8 * scale
        x = torch.where(sideways == 0, 0.5 * x + 0.46 * beside * half_width, x)
        y = torch.where(sideways == 0, 0.9 * y, y + 0.22 * beside * half_height)

    seconds = frame / FPS
    stride = 2 * math.pi * (_STEPS_PER_SECOND * seconds + phase)
    still = doing("staying", "growing", "spinning")
    effort = (sideways.abs() + 0.55 * (1 - sideways.abs()) * (1 - still)).expand_as(stride)
    stretch = 1 + 0.035 * doing("staying") * torch.sin(2 * math.pi * (0.75 * seconds + phase))
    angle = 2 * math.pi * turn * doing("spinning") * share
    shape = stride.shape
    return Pose(
        x=x.expand(shape),
        y=y.expand(shape),
        scale=scale.expand(shape),
        angle=angle.expand(shape),
        facing=facing.expand(shape),
        stride=stride,
        effort=effort,
        stretch=stretch.expand(shape),
        travel=(facing * (x - x[:, :1]) / scale).expand(shape),
    )
