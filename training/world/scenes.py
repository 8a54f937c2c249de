"""The six scenes behind the actors: few large features, smooth gradients, one dominating colour each.

Scene coordinates: y from 0 at the top to 1 at the bottom, x in the same unit from the middle. Features are
placed as shares of the picture's width and sized by its short side, so that they show in every aspect ratio.
What stands still is painted once for all frames. Scenes know nothing of actors.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from training.world.canvas import Canvas, Colour, capsule, circle, ellipse, polygon, rgb, turned, union
from training.world.poses import FPS

WHITE = rgb(255, 255, 255)
SUN = rgb(255, 236, 130)


class Backdrop:
    """An empty background and its coordinates.

    random: `[n, 8]` in [0, 1), what makes one clip's hills differ from another's.
    x `[1, 1, 1, W]`, y `[1, 1, H, 1]`; half_width is x at the right edge; size is the short side (all in
    heights). seconds: `[1, T, 1, 1]`.
    """

    def __init__(self, random: Tensor, height: int, width: int, num_frames: int) -> None:
        device = random.device
        self.random = random
        self.height = height
        self.width = width
        self.x = ((torch.arange(width, device=device) + 0.5 - width / 2) / height)[None, None, None, :]
        self.y = ((torch.arange(height, device=device) + 0.5) / height)[None, None, :, None]
        self.half_width = width / height / 2
        self.size = min(width, height) / height
        self.seconds = (torch.arange(num_frames, device=device) / FPS)[None, :, None, None]

    def pick(self, number: int, low: float, high: float) -> Tensor:
        """Random number `number` of each clip between two bounds: `[n, 1, 1, 1]`."""
        return (low + (high - low) * self.random[:, number])[:, None, None, None]

    def canvas(self, *stops: tuple[float, Colour]) -> Canvas:
        """One still frame a clip, `[n, 3, 1, H, W]`, shaded from top to bottom through (y, colour) stops."""
        still = Canvas(
            self.x.new_empty(len(self.random), 3, 1, self.height, self.width), self.x, self.y, self.height
        )
        heights = self.y.new_tensor([height for height, _ in stops])
        colours = self.y.new_tensor([colour for _, colour in stops])
        y = self.y.flatten()
        upper = torch.bucketize(y, heights).clamp(1, len(stops) - 1)
        share = ((y - heights[upper - 1]) / (heights[upper] - heights[upper - 1])).clamp(0, 1)
        rows = torch.lerp(colours[upper - 1], colours[upper], share[:, None])
        still.pixels.copy_(rows.T[None, :, None, :, None].expand_as(still.pixels))
        return still

    def moving(self, still: Canvas) -> Canvas:
        """The same picture with its frames apart, `[n, 3, T, H, W]`, for what moves in it."""
        frames = self.seconds.shape[1]
        return Canvas(still.pixels.repeat(1, 1, frames, 1, 1), self.x, self.y, self.height)


def _cloud(canvas: Canvas, cx: Tensor, cy: Tensor, size: float, colour: Colour) -> None:
    """Three bubbles on a line."""
    bubbles = [
        circle(canvas.x, canvas.y, cx + dx * size, cy + dy * size, r * size)
        for dx, dy, r in ((-0.55, 0.06, 0.3), (0.0, -0.08, 0.42), (0.55, 0.06, 0.3))
    ]
    canvas.glow(union(*bubbles), colour, 0.03)


def _wave(
    back: Backdrop, y: float | Tensor, swing: float, length: float, speed: float, number: int
) -> Tensor:
    """Distance to the water below a wavy line that travels: `[n, T, H, W]`."""
    phase = back.pick(number, 0.0, 2 * math.pi)
    line = y + swing * torch.sin(2 * math.pi * back.x / length + speed * back.seconds + phase)
    return line - back.y


def paint_grass(back: Backdrop) -> Tensor:
    """Green hills under a light blue sky with a sun and a cloud."""
    canvas = back.canvas((0.0, rgb(120, 200, 250)), (0.5, rgb(205, 238, 255)))
    side = torch.where(back.pick(0, 0, 1) < 0.5, -1.0, 1.0)
    canvas.fill(
        circle(back.x, back.y, side * 0.62 * back.half_width, back.pick(1, 0.1, 0.18), 0.1 * back.size), SUN
    )
    _cloud(
        canvas,
        -side * back.pick(2, 0.3, 0.7) * back.half_width,
        back.pick(3, 0.13, 0.2),
        0.2 * back.size,
        WHITE,
    )
    far = back.pick(4, 0.42, 0.5) + 0.06 * torch.sin(back.x * 5.0 + back.pick(5, 0.0, 6.28))
    canvas.fill(far - back.y, rgb(132, 204, 96))
    near = back.pick(6, 0.58, 0.66) + 0.04 * torch.sin(back.x * 4.0 + back.pick(7, 0.0, 6.28))
    canvas.fill(near - back.y, rgb(104, 182, 66))
    return canvas.pixels


def paint_beach(back: Backdrop) -> Tensor:
    """Sand with a palm tree, a strip of sea with a moving edge, a big sun."""
    shore = 0.54
    canvas = back.canvas((0.0, rgb(150, 222, 245)), (0.38, rgb(255, 240, 205)))
    side = torch.where(back.pick(0, 0, 1) < 0.5, -1.0, 1.0)
    canvas.fill(
        circle(back.x, back.y, -side * back.pick(1, 0.3, 0.7) * back.half_width, 0.2, 0.12 * back.size), SUN
    )
    canvas.fill(back.pick(2, 0.38, 0.42) - back.y, rgb(40, 165, 190))
    film = back.moving(canvas)
    edge = _wave(back, shore, 0.018, 0.7 * back.size, 1.6, 3)
    film.fill(edge, WHITE)
    film.fill(edge + 0.035, rgb(240, 214, 150))
    _palm(film, back, side * back.pick(4, 0.72, 0.85) * back.half_width, side)
    return film.pixels


def _palm(canvas: Canvas, back: Backdrop, foot: Tensor, side: Tensor) -> None:
    """A palm tree at the side of the picture, leaning inwards."""
    size = back.size
    top_x = foot - side * 0.07 * size
    top_y = 0.24
    trunk = capsule(back.x, back.y, (foot, 0.74), (top_x, top_y), 0.026 * size)
    canvas.fill(trunk, rgb(140, 92, 50))
    for angle in (-2.75, -2.0, -0.4, 0.35, 3.45):
        leaf_x, leaf_y = turned(back.x - top_x, back.y - top_y, foot.new_tensor(angle))
        canvas.fill(ellipse(leaf_x, leaf_y, (0.1 * size, 0.0), (0.12 * size, 0.034 * size)), rgb(50, 140, 70))


def paint_night_sky(back: Backdrop) -> Tensor:
    """Dark blue with a crescent moon and a few stars that twinkle."""
    canvas = back.canvas((0.0, rgb(10, 12, 44)), (1.0, rgb(44, 36, 104)))
    side = torch.where(back.pick(0, 0, 1) < 0.5, -1.0, 1.0)
    moon_x = side * back.pick(1, 0.5, 0.66) * back.half_width
    moon_y = back.pick(2, 0.17, 0.23)
    size = back.size
    moon = circle(back.x, back.y, moon_x, moon_y, 0.12 * size)
    bite = circle(back.x, back.y, moon_x - 0.065 * size, moon_y - 0.03 * size, 0.105 * size)
    canvas.fill(torch.maximum(moon, -bite), rgb(255, 246, 190))
    film = back.moving(canvas)
    for half, places in enumerate(
        (
            (((0.0, 0.1), (-0.9, 0.5), (0.6, 0.48), (0.9, 0.62), (-0.6, 0.74), (0.4, 0.88))),
            (((0.04, 0.34), (-0.45, 0.5), (0.25, 0.6), (0.8, 0.8), (-0.15, 0.68), (-0.9, 0.9))),
        )
    ):
        stars = union(
            *(
                circle(
                    back.x,
                    back.y,
                    px * back.half_width + back.pick(3 + (i + half) % 5, -0.05, 0.05),
                    py + back.pick(3 + (2 * i + half) % 5, -0.05, 0.05),
                    0.018 * size,
                )
                for i, (px, py) in enumerate(places)
            )
        )
        twinkle = 0.7 + 0.3 * torch.sin(3.5 * back.seconds + math.pi * half + back.pick(7, 0.0, 6.28))
        film.fill(stars, rgb(255, 252, 225), twinkle)
    return film.pixels


def paint_city(back: Backdrop) -> Tensor:
    """Grey blocks with lit windows behind a road with a dashed line."""
    canvas = back.canvas((0.0, rgb(176, 170, 190)), (0.6, rgb(232, 214, 200)))
    ground = 0.66
    size = back.size
    tones = (rgb(112, 116, 140), rgb(86, 90, 114), rgb(128, 120, 134), rgb(98, 104, 130))
    for number, (place, half) in enumerate(((-0.78, 0.17), (-0.26, 0.15), (0.3, 0.17), (0.8, 0.16))):
        cx = place * back.half_width * 1.0
        half = half * 2 * back.half_width * 0.92
        tall = back.pick(number, 0.3, 0.58)
        walls = torch.maximum(
            (back.x - cx).abs() - half / 1.35, torch.maximum(ground - tall - back.y, back.y - ground)
        )
        canvas.fill(walls, tones[number])
        window_x = ((back.x - cx).abs() - 0.055 * size).abs() - 0.03 * size
        down = back.y - (ground - tall) - 0.08
        from_middle = torch.remainder(down + 0.065, 0.13) - 0.065
        middle = down - from_middle
        whole = (middle > -0.01) & (middle < tall - 0.13)
        window_y = torch.where(whole, from_middle.abs() - 0.033, 1.0)
        lit = torch.maximum(window_x, window_y)
        canvas.fill(lit, rgb(255, 232, 150))
    canvas.fill(ground - back.y, rgb(190, 186, 184))
    canvas.fill(ground + 0.06 - back.y, rgb(74, 74, 84))
    dash = back.pick(5, 0.0, 0.4)
    dash_x = (torch.remainder(back.x + dash, 0.4) - 0.2).abs() - 0.11
    canvas.fill(torch.maximum(dash_x, (back.y - 0.87).abs() - 0.02), rgb(240, 240, 235))
    return canvas.pixels


def paint_snow(back: Backdrop) -> Tensor:
    """White ground, pale grey sky, a few dark fir trees with snow on them."""
    canvas = back.canvas((0.0, rgb(158, 178, 205)), (0.5, rgb(214, 226, 240)))
    hill = back.pick(0, 0.46, 0.54) + 0.05 * torch.sin(back.x * 4.0 + back.pick(1, 0.0, 6.28))
    canvas.fill(hill - back.y, rgb(226, 236, 250))
    for number, place in enumerate((-0.86, -0.44, 0.44, 0.86)):
        _fir(
            canvas,
            back,
            place * back.half_width + back.pick(2 + number, -0.05, 0.05) * back.size,
            0.3 + 0.03 * number,
        )
    near = back.pick(6, 0.62, 0.68) + 0.03 * torch.sin(back.x * 5.0 + back.pick(7, 0.0, 6.28))
    canvas.fill(near - back.y, rgb(246, 250, 255))
    return canvas.pixels


def _fir(canvas: Canvas, back: Backdrop, cx: Tensor, tall: float) -> None:
    """A fir tree of two tiers with white tips."""
    foot = 0.66
    size = back.size
    x = (back.x - cx) / size
    y = (back.y - foot) / size
    lower = polygon(x, y, ((-0.11, 0.0), (0.0, -0.24), (0.11, 0.0)))
    upper = polygon(x, y, ((-0.085, -0.13), (0.0, -tall - 0.05), (0.085, -0.13)))
    tree = union(lower, upper)
    canvas.fill(tree * size, rgb(44, 92, 84))
    canvas.fill(torch.maximum(upper - 0.008, y + tall * 0.7) * size, WHITE)


def paint_sea(back: Backdrop) -> Tensor:
    """Bands of blue waves that roll under a pale sky."""
    canvas = back.canvas((0.0, rgb(170, 226, 250)), (0.36, rgb(236, 248, 252)))
    _cloud(canvas, back.pick(0, -0.6, 0.6) * back.half_width, back.pick(1, 0.1, 0.16), 0.2 * back.size, WHITE)
    film = back.moving(canvas)
    bands = ((0.34, rgb(70, 168, 216)), (0.52, rgb(40, 132, 192)), (0.74, rgb(22, 98, 164)))
    for number, (line, colour) in enumerate(bands):
        way = 1.8 if number % 2 else -1.4
        crest = _wave(back, line, 0.02 + 0.008 * number, (0.5 + 0.1 * number) * back.size, way, 2 + number)
        film.fill(crest, rgb(206, 238, 250))
        film.fill(crest + 0.028, colour)
    return film.pixels


SCENE_PAINTERS: dict[str, Callable[[Backdrop], Tensor]] = {
    "grass": paint_grass,
    "beach": paint_beach,
    "night sky": paint_night_sky,
    "city": paint_city,
    "snow": paint_snow,
    "sea": paint_sea,
}
