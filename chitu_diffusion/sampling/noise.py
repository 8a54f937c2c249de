"""The noise that a solver starts from, the fresh noise of a step, and latents at another size. Knows tensors
alone.

A task has one stream of noise for each use, and each is drawn from a generator of its own on the CPU, seeded
with (seed + stream x 1 000 003) mod 2^63: stream k is the starting noise of cascade stage k (0 where there is
no cascade), stream (step + 1) x 2^20 + k the fresh noise after step `step` of its schedule. So a step's noise
follows from the seed and the step: the same bits on every machine and rank, and after a pause.

Some models' authors draw all of a task's noise from one generator, one after the other, in the latent's dtype
and with frames before channels (`nth_noise`): the same bits likewise, for the earlier ones are drawn again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NOISE_STREAM_STEP = 1_000_003
"""Distance between the seeds of a task's successive noises; prime, so that neighbouring seeds do not share
them.
"""


_STEP_STREAM = 2**20


def initial_noise(shape: Sequence[int], seed: int, stream: int = 0) -> Tensor:
    """Standard normal noise, float32 on the CPU: the same bits on every machine and for any number of ranks.

    Args:
        shape: of the latent, [B, C, T, H, W].
        seed: of the task. With stream 0 these are the bits that diffusers draws from a CPU generator of this
            seed.
        stream: which noise of the task, see above; 0 the starting one.
    """
    generator = torch.Generator("cpu").manual_seed((seed + stream * NOISE_STREAM_STEP) % 2**63)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def nth_noise(shape: Sequence[int], seed: int, stream: int, number: int, dtype: torch.dtype) -> Tensor:
    """What one generator gives after `number` others of the shape, on the CPU.

    Args:
        shape: of the latent, [B, C, T, H, W]; drawn as [B, T, C, H, W].
        seed, stream: as for `initial_noise`.
        number: 0 is the starting noise.
        dtype: that it is drawn in, which makes other numbers and not only rounded ones.
    """
    generator = torch.Generator("cpu").manual_seed((seed + stream * NOISE_STREAM_STEP) % 2**63)
    batch, channels, *cells = shape
    drawn = (batch, cells[0], channels, *cells[1:])
    for _ in range(number):
        torch.randn(drawn, generator=generator, dtype=dtype)
    return torch.randn(drawn, generator=generator, dtype=dtype).transpose(1, 2).contiguous()


def pad_latent(latent: Tensor, shape: Sequence[int]) -> Tensor:
    """A latent [B, C, T, H, W] with its edge repeated up to the rows and columns of a shape."""
    border = (0, shape[-1] - latent.shape[-1], 0, shape[-2] - latent.shape[-2], 0, 0)
    return torch.nn.functional.pad(latent, border, mode="replicate")


def step_noise(shape: Sequence[int], seed: int, stream: int, step: int) -> Tensor:
    """The fresh noise of a step, float32 on the CPU.

    Args:
        shape: of the latent, [B, C, T, H, W].
        seed: of the task.
        stream: its cascade stage.
        step: of the stage's whole schedule, from 0.
    """
    return initial_noise(shape, seed, (step + 1) * _STEP_STREAM + stream)


def on_device(noise: Tensor, device: torch.device) -> Tensor:
    """Noise [B, C, T, H, W] from the CPU where it is needed, without waiting for the device."""
    return noise if device.type == "cpu" else noise.pin_memory().to(device, non_blocking=True)


def upsample_latent(latent: Tensor, height: int, width: int) -> Tensor:
    """A latent [B, C, T, h, w] at another size [B, C, T, height, width], bicubic by frame; float32."""
    batch, _, frames = latent.shape[:3]
    flat = latent.float().transpose(1, 2).flatten(0, 1)  # [B * T, C, h, w]
    larger = torch.nn.functional.interpolate(flat, size=(height, width), mode="bicubic", antialias=True)
    return larger.unflatten(0, (batch, frames)).transpose(1, 2)
