"""Clips of the world drawn in another manner, for adapters to learn."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from training.world.canvas import INK, rgb

_PAPER = rgb(248, 250, 254)


def sketch(scenery: Tensor) -> Tensor:
    """Scenes without their actors, clips [B, 3, T, H, W] in [-1, 1], as ink lines on white paper: a line
    where the colour changes.
    """
    flat = scenery.transpose(1, 2).flatten(0, 1)
    wide = F.pad(flat, (1, 1, 1, 1), mode="replicate")
    across = wide[..., 1:-1, 2:] - wide[..., 1:-1, :-2]
    upright = wide[..., 2:, 1:-1] - wide[..., :-2, 1:-1]
    change = torch.hypot(across, upright).amax(dim=1, keepdim=True)
    lines = (change * 4.0 - 0.6).clamp(0, 1)
    paper = flat.new_tensor(_PAPER).view(1, 3, 1, 1)
    ink = flat.new_tensor(INK).view(1, 3, 1, 1)
    drawn = torch.lerp(paper, ink, lines)
    return drawn.unflatten(0, (scenery.shape[0], scenery.shape[2])).transpose(1, 2).contiguous()
