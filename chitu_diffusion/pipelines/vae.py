"""Latents to videos and back, whole, in tiles, or shared by all ranks. Knows a backend; no task."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.sharding import broadcast_from_rank0, gather_strips

_TILE_SIZES = (32, 16, 8)
"""Latent pixels: the largest that still cuts a latent in more than one tile is taken, for larger tiles waste
less overlap.
"""


@torch.no_grad()
def decode(backend: DiffusionBackend, latent: Tensor) -> Tensor:
    """Latent [B, C, T, H, W] -> video [B, T', 3, H', W'], float32 in [0, 1]."""
    backend.offload.use("vae")
    return backend.vae.decode(latent.to(backend.device))


@torch.no_grad()
def decode_tiled(backend: DiffusionBackend, latent: Tensor, tile_size: int | None = None) -> Tensor:
    """`decode` in tiles of `tile_size` latent cells, equal up to rounding: less memory, more time. None takes
    a size that fits the latent.
    """
    backend.offload.use("vae")
    return backend.vae.decode_tiled(latent.to(backend.device), tile_size or tile_size_for(*latent.shape[-2:]))


@torch.no_grad()
def decode_shared(backend: DiffusionBackend, latent: Tensor) -> Tensor | None:
    """`decode` with each rank decoding a strip of the frame: all of it on rank 0, None on the others."""
    backend.offload.use("vae")
    latent = latent.to(backend.device)
    axis = _longer_axis(latent)

    def strip(low: int, high: int) -> Tensor:
        return backend.vae.decode_strip(latent, low, high, axis)

    return gather_strips(strip, latent.shape[axis], axis, backend.groups.world)


@torch.no_grad()
def encode_video(backend: DiffusionBackend, frames: Callable[[], Tensor], content: Hashable) -> Tensor:
    """The normalised latent of a video, [1, C, T, h, w] float32, on every rank.

    What was encoded before is remembered by its content; then nothing is run or moved. Each rank encodes a
    strip of the frame; where memory is short (from memory level 1) rank 0 encodes in tiles.

    Args:
        frames: gives the video on rank 0, [1, T', 3, H, W] in [0, 1], of whole latent cells.
        content: what the video is made of.
    """
    world = backend.groups.world
    vae = backend.vae
    known = vae.recall(content)
    found = torch.empty(0) if known is None else known
    found = broadcast_from_rank0(lambda: found, world, backend.device)
    if found.numel():
        return found.to(backend.device)
    backend.offload.use("vae")
    if world.size == 1 or backend.low_mem_level >= 1:

        def whole() -> Tensor:
            video = frames()
            cells = (size // step for size, step in zip(video.shape[-2:], vae.stride[1:], strict=True))
            return vae.encode(video, tile_size_for(*cells) if backend.low_mem_level >= 1 else None)

        latent = broadcast_from_rank0(whole, world, backend.device)
    else:
        latent = _encoded_by_all(backend, frames)
    vae.remember(content, latent)
    return latent


def _encoded_by_all(backend: DiffusionBackend, frames: Callable[[], Tensor]) -> Tensor:
    vae = backend.vae
    world = backend.groups.world
    video = broadcast_from_rank0(frames, world, backend.device)
    axis = _longer_axis(video)

    def strip(low: int, high: int) -> Tensor:
        return vae.encode_strip(video, low, high, axis).contiguous()

    joined = gather_strips(strip, video.shape[axis] // vae.stride[axis], axis, world)
    return broadcast_from_rank0(
        lambda: vae.latent_of(torch.empty(0) if joined is None else joined), world, backend.device
    )


def _longer_axis(x: Tensor) -> int:
    return -1 if x.shape[-1] >= x.shape[-2] else -2


def tile_size_for(height: int, width: int) -> int:
    """Latent cells of a tile that saves memory on a latent of this size and wastes little overlap."""
    longest = max(height, width)
    return next((size for size in _TILE_SIZES if size < longest), _TILE_SIZES[-1])
