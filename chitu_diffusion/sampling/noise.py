"""The noise that a solver starts from, and latents at another size. Knows tensors alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NOISE_STREAM_STEP = 1_000_003
"""Distance between the seeds of a task's successive noises; prime, so that neighbouring seeds do not share
them.
"""


def initial_noise(shape: Sequence[int], seed: int, stream: int = 0) -> Tensor:
    """Standard normal noise, float32 on the CPU: the same bits on every machine and for any number of ranks.

    Args:
        shape: of the latent, [B, C, T, H, W].
        seed: of the task. With stream 0 these are the bits that diffusers draws from a CPU generator of this
            seed.
        stream: which noise of the task: 0 the starting one, k the one of cascade stage k.
    """
    generator = torch.Generator("cpu").manual_seed((seed + stream * NOISE_STREAM_STEP) % 2**63)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def pad_latent(latent: Tensor, shape: Sequence[int]) -> Tensor:
    """A latent [B, C, T, H, W] with its edge repeated up to the rows and columns of a shape."""
    border = (0, shape[-1] - latent.shape[-1], 0, shape[-2] - latent.shape[-2], 0, 0)
    return torch.nn.functional.pad(latent, border, mode="replicate")


def upsample_latent(latent: Tensor, height: int, width: int) -> Tensor:
    """A latent [B, C, T, h, w] at another size [B, C, T, height, width], bicubic by frame; float32."""
    batch, _, frames = latent.shape[:3]
    flat = latent.float().transpose(1, 2).flatten(0, 1)  # [B * T, C, h, w]
    larger = torch.nn.functional.interpolate(flat, size=(height, width), mode="bicubic", antialias=True)
    return larger.unflatten(0, (batch, frames)).transpose(1, 2)
