"""Updates that need nothing but the present step: what makes the next latent of this one and its velocity.

A latent is x = (1 - sigma) data + sigma noise, its velocity v = noise - data. Sums are float32. Knows tensors
alone, and imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Update = Callable[["Tensor", "Tensor", float, float, Callable[[], "Tensor"]], "Tensor"]
"""(latent, velocity, sigma now, sigma after the step, gives fresh noise of the latent's shape) -> the next
latent.
"""


def euler(
    latent: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Callable[[], Tensor]
) -> Tensor:
    """Along the velocity: x' = x + (sigma' - sigma) v."""
    return latent + (next_sigma - sigma) * velocity


def renoise(
    latent: Tensor, velocity: Tensor, sigma: float, next_sigma: float, noise: Callable[[], Tensor]
) -> Tensor:
    """To the data that the velocity points at, and back with fresh noise: x0 = x - sigma v, x' = (1 - sigma')
    x0 + sigma' noise.

    How consistency models ("Latent Consistency Models", arXiv:2310.04378) and distribution matching
    distillation (DMD2, arXiv:2405.14867) are sampled.
    """
    data = latent - sigma * velocity
    return data if next_sigma == 0 else (1 - next_sigma) * data + next_sigma * noise()
