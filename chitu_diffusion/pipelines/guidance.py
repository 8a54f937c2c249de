"""Which expert a step belongs to, which guidance branches it runs, and how these are combined.

"Classifier-Free Diffusion Guidance", arXiv:2207.12598. Knows scales and timesteps; no network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from chitu_diffusion.models.wan.config import TRAINED_STEPS

if TYPE_CHECKING:
    from torch import Tensor


def expert_at(timestep: Tensor, boundary: float | None) -> int:
    """Index of the expert for a timestep: 0, high noise, from the boundary upward; 1 below it."""
    return 0 if boundary is None or float(timestep) >= boundary * TRAINED_STEPS else 1


def active_branches(guidance_scale: float) -> tuple[int, ...]:
    """The guidance branches that a scale needs: both, or the prompt's alone for a scale of at most 1."""
    return (0, 1) if guidance_scale > 1 else (0,)


def apply_cfg(velocity: Tensor, guidance_scale: float) -> Tensor:
    """Guided velocity [B, C, T, H, W] float32 from stacked branches [B or 2B, ...]: u + s (c - u).

    A scale of at most 1 takes the prompt's branch as it is.
    """
    if guidance_scale <= 1:
        return velocity.float()
    conditional, unconditional = velocity.float().chunk(2)
    return unconditional + guidance_scale * (conditional - unconditional)
