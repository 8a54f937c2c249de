"""From specs to pixels: the scene behind, the actor in front.

The batch is sorted by scene and then by actor, so that a clip pays only for what it shows, and worked through
in pieces, so that temporaries stay small. An actor is painted in a window around it, not over the whole
frame. This file knows the order of painting; looks are in `scenes`, `animals` and `things`, motions in
`poses`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from chitu_diffusion.evaluation.prompts import ACTORS, COLOURS, MOTIONS, SCENES
from training.world.animals import draw_bird, draw_cat, draw_dog, draw_fish, draw_rabbit
from training.world.canvas import Canvas, rgb, turned
from training.world.poses import GROWN, LARGEST, Pose, pose_of
from training.world.scenes import SCENE_PAINTERS, Backdrop
from training.world.things import draw_ball, draw_boat, draw_car, draw_flower, draw_robot
from training.world.vocabulary import WorldSpecs

ACTOR_PAINTERS = {
    "cat": draw_cat,
    "dog": draw_dog,
    "rabbit": draw_rabbit,
    "bird": draw_bird,
    "fish": draw_fish,
    "car": draw_car,
    "boat": draw_boat,
    "ball": draw_ball,
    "robot": draw_robot,
    "flower": draw_flower,
}

PALETTE = {
    "red": rgb(222, 30, 34),
    "orange": rgb(255, 138, 10),
    "yellow": rgb(255, 226, 30),
    "green": rgb(16, 140, 50),
    "blue": rgb(30, 90, 245),
    "purple": rgb(140, 50, 200),
    "pink": rgb(255, 140, 190),
    "white": rgb(248, 248, 248),
}

REACH = 1.3
"""No actor reaches further than this from its centre along x or y, outline included, in local units."""

_LINE_SHARE = 0.018
_THINNEST_LINE = 1.25
_PIXELS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}


def draw(
    specs: WorldSpecs,
    height: int,
    width: int,
    num_frames: int,
    device: torch.device | str = "cpu",
    *,
    with_actor: bool = True,
    second: WorldSpecs | None = None,
    style: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The clips: float32 `[B, 3, T, H, W]` in [-1, 1] at 16 frames a second.

    The same specs and size give the same clips. `with_actor=False` leaves the scenes empty; `second` is
    another actor of each clip, beside the first and before it; `style` redraws the scenes.
    """
    device = torch.device(device)
    clips = torch.empty(len(specs), 3, num_frames, height, width, device=device)
    at_once = max(1, _PIXELS_AT_ONCE.get(device.type, 2**22) // (num_frames * height * width))
    for name, rows in _groups(specs.scene, len(SCENES), at_once):
        backdrop = Backdrop(specs.variation[rows, 8:].to(device), height, width, num_frames)
        clips[rows.to(device)] = SCENE_PAINTERS[SCENES[name]](backdrop)
    if style is not None:
        clips = style(clips)
    if second is not None:
        _draw_actors(clips, specs, at_once, beside=-1)
        _draw_actors(clips, second, at_once, beside=1)
    elif with_actor:
        _draw_actors(clips, specs, at_once, beside=0)
    return clips


def _draw_actors(clips: Tensor, specs: WorldSpecs, at_once: int, beside: int) -> None:
    """Paints one actor into each clip; `beside` as in `pose_of`."""
    # Sorted by window as well: only what grows needs a large one, only what spins a square one.
    growing = MOTIONS.index("growing")
    spinning = MOTIONS.index("spinning")
    kind = specs.actor * 3 + (specs.motion == growing).long() + 2 * (specs.motion == spinning).long()
    for number, rows in _groups(kind, 3 * len(ACTORS), at_once):
        there = clips.device
        _draw_actor(clips, specs[rows].to(there), rows.to(there), ACTORS[number // 3], number % 3, beside)


def _groups(numbers: Tensor, count: int, at_once: int) -> Iterator[tuple[int, Tensor]]:
    """Each number with the rows that have it, at most `at_once` rows together."""
    numbers = numbers.cpu()
    for number in range(count):
        rows = torch.nonzero(numbers == number).flatten()
        for piece in torch.split(rows, at_once):
            if len(piece):
                yield number, piece


def _draw_actor(clips: Tensor, specs: WorldSpecs, rows: Tensor, actor: str, kind: int, beside: int) -> None:
    """Paints one actor into the clips of `rows`; `kind` is 0, or 1 for growing, or 2 for spinning."""
    num_frames, height, width = clips.shape[2:]
    unit = min(height, width)
    pose = pose_of(specs, num_frames, width / (2 * unit), height / (2 * unit), beside)
    half = REACH * LARGEST * unit * (1.0, GROWN, 1.15)[kind]
    side_y = min(height, 2 * math.ceil(half))
    side_x = min(width, 2 * math.ceil(half))
    row = _window(pose.y * unit + height / 2, side_y, height)[..., :, None]
    column = _window(pose.x * unit + width / 2, side_x, width)[..., None, :]

    x = ((column + 0.5 - width / 2) / unit - pose.x[..., None, None]) / pose.scale[..., None, None]
    y = ((row + 0.5 - height / 2) / unit - pose.y[..., None, None]) / pose.scale[..., None, None]
    if kind == 2:
        x, y = turned(x, y, pose.angle[..., None, None])
    x = x * pose.facing[..., None, None]
    y = y / pose.stretch[..., None, None]

    clip = rows[:, None, None, None, None]
    channel = torch.arange(3, device=rows.device)[:, None, None, None]
    frame = torch.arange(num_frames, device=rows.device)[:, None, None]
    place = (clip, channel, frame, row[:, None], column[:, None])
    sharpness = pose.scale[..., None, None] * unit
    canvas = Canvas(clips[place], x, y, sharpness, line=max(_THINNEST_LINE, _LINE_SHARE * unit))
    tints = torch.tensor([PALETTE[name] for name in COLOURS], device=rows.device)
    ACTOR_PAINTERS[actor](canvas, _spread(pose), tints[specs.colour])
    clips[place] = canvas.pixels


def _window(centre: Tensor, side: int, limit: int) -> Tensor:
    """`[n, T, side]`: the pixel numbers of a window around `centre` `[n, T]`, pushed inside the frame."""
    first = (centre - side / 2).round().long().clamp(0, limit - side)
    return first[..., None] + torch.arange(side, device=centre.device)


def _spread(pose: Pose) -> Pose:
    """The pose with two more axes, to go with pixels."""
    return Pose(**{name: value[..., None, None] for name, value in vars(pose).items()})
