"""Drawn clips in batches. Clips are drawn many at a time, which keeps a GPU busy, and handed out a few at a
time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from training.world import WorldSpecs, draw, sample_pairs, sample_specs

Shape = tuple[int, int, int]
"""(height, width, frames)"""


def drawn(
    shape: Shape,
    batch: int,
    split: str,
    generator: torch.Generator,
    device: torch.device,
    style: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[tuple[Tensor, WorldSpecs]]:
    """Endless (video [batch, 3, T, H, W] float32 in [-1, 1], what it shows) of one shape and split."""
    pool = max(256 // batch, 1) * batch if device.type == "cuda" else batch
    while True:
        specs = sample_specs(pool, generator, split)
        video = draw(specs, *shape, device, style=style)
        for start in range(0, pool, batch):
            yield video[start : start + batch], specs[start : start + batch]


def drawn_pairs(
    shape: Shape, batch: int, generator: torch.Generator, device: torch.device
) -> Iterator[tuple[Tensor, WorldSpecs, WorldSpecs]]:
    """The same of clips with two actors, of the split 'train'."""
    while True:
        first, second = sample_pairs(batch, generator)
        yield draw(first, *shape, device, second=second), first, second
