"""Where a token is and when: rotary tables over (frame, row, column), and sinusoids of the timestep."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_ROPE_THETA = 10000.0
_TIME_PERIOD = 10000.0

RotaryTable = tuple[Tensor, Tensor]  # (cos, sin), each [S, head_dim / 2] float32
Grid = tuple[int, int, int]
"""Tokens along (frames, rows, columns)."""


def sinusoids(timestep: Tensor, width: int) -> Tensor:
    """timestep [B] -> [B, width] float32: cosines, then sines, of width / 2 geometric frequencies from 1."""
    half = width // 2
    # the order of these float32 operations is diffusers': at t = 1000 another order differs by 1e-4
    exponent = (
        -math.log(_TIME_PERIOD) * torch.arange(half, dtype=torch.float32, device=timestep.device) / half
    )
    angles = timestep.float()[:, None] * exponent.exp()[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@lru_cache(maxsize=4)
def rope_table(grid: Grid, head_dim: int, device: torch.device) -> RotaryTable:
    """Rotary cosines and sines of a grid, each [S, head_dim / 2] float32: 17 MB both at 32,760 tokens and 128
    channels.

    "RoFormer" (arXiv 2104.09864) along three axes: rows and columns take 2 * (head_dim // 6) channels each,
    frames the rest. Angles are float64 until after the cosine. They depend on nothing but the arguments, so
    that all networks and tasks share them; nobody may write into them.
    """
    side = 2 * (head_dim // 6)
    widths = (head_dim - 2 * side, side, side)
    angles = []
    for axis, (length, width) in enumerate(zip(grid, widths, strict=True)):
        frequencies = _ROPE_THETA ** (-torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
        # [length, width / 2]
        along = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies)
        view = [1, 1, 1, width // 2]
        view[axis] = length
        angles.append(along.view(view).expand(*grid, -1))
    table = torch.cat(angles, dim=-1).flatten(0, 2)  # [S, head_dim / 2]
    return table.cos().float().to(device), table.sin().float().to(device)
