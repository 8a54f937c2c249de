"""Prompts and pictures to what the networks take; rank 0 encodes for all."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.sharding import broadcast_from_rank0
from chitu_diffusion.media.image import InputImage
from chitu_diffusion.models.image_preprocessing import bicubic
from chitu_diffusion.task import DiffusionUserParams


@torch.no_grad()
def encode_text(backend: DiffusionBackend, prompts: list[str]) -> Tensor:
    """Text embeddings [B, seq_len, hidden] of prompts; rank 0 encodes for all.

    What was encoded before is remembered by its content, the negative prompt first of all; then nothing is
    run or moved. Autocast is off here: T5's activations do not fit float16's range.
    """

    def encode() -> Tensor:
        encoder = backend.text_encoder
        known = encoder.recall(prompts, backend.device)
        if known is not None:
            return known
        backend.offload.use("text_encoder")
        with torch.autocast(device_type=backend.device.type, enabled=False):
            return encoder.encode(prompts)

    return broadcast_from_rank0(encode, backend.groups.world, backend.device)


@torch.no_grad()
def encode_keyframes(backend: DiffusionBackend, request: DiffusionUserParams) -> Tensor:
    """What an image-to-video network is told of the first and the last frame, [1, 4 + C, T, H, W] float32.

    A mask of which frames are known, then the normalised latent of a video of these frames, grey in between
    (Wan2.1, wan/image2video.py): one of whole patches, whose border beyond the size asked for repeats the
    picture's edge.

    Args:
        request: resolved, with an image.

    Raises:
        UsageError: an image's file has changed, or is not there any more.
    """
    frames = request.num_frames or 1
    _, *cells = backend.spec.latent_shape(frames, request.height or 0, request.width or 0)
    stride, rows, columns = backend.spec.geometry.stride
    known = {0: "image"} | ({frames - 1: "last_image"} if request.last_image else {})

    def pixels_of(name: str) -> Tensor:
        """[1, 3, height, width]."""
        image: InputImage = vars(request)[name]
        if request.image_preprocessing == "official":
            return bicubic(image.original(name), request.height or 0, request.width or 0)
        return torch.from_numpy(image.resized(request.height or 0, request.width or 0, name)).permute(
            2, 0, 1
        )[None]

    def encode() -> Tensor:
        backend.offload.use("vae")
        device = backend.device
        video = torch.full((1, frames, 3, cells[1] * rows, cells[2] * columns), 0.5, device=device)
        for frame, name in known.items():
            pixels = pixels_of(name)
            border = (0, video.shape[-1] - pixels.shape[-1], 0, video.shape[-2] - pixels.shape[-2])
            video[:, frame] = torch.nn.functional.pad(pixels, border, mode="replicate").to(device)
        mask = torch.zeros(frames, device=device)
        mask[list(known)] = 1
        # the first frame stands alone in its latent frame, and for `stride` frames in the mask
        mask = torch.cat([mask[:1].expand(stride), mask[1:]]).view(-1, stride).t()  # [stride, T]
        mask = mask[None, :, :, None, None].expand(-1, -1, -1, *cells[1:])
        return torch.cat([mask, backend.vae.encode(video)], dim=1)

    return broadcast_from_rank0(encode, backend.groups.world, backend.device)


@torch.no_grad()
def encode_pictures(backend: DiffusionBackend, request: DiffusionUserParams) -> Tensor:
    """What an image encoder makes of a request's pictures, [1, I, D] float32: of the first, and where the
    network tells two apart by their places, of the last behind it. Remembered by content, as texts are.

    Args:
        request: resolved, with an image.

    Raises:
        UsageError: an image's file has changed, or is not there any more.
    """
    names = ["image"]
    if backend.spec.transformers[0].pos_embed_seq_len is not None:
        names.append("last_image")
    official = request.image_preprocessing == "official"
    images: dict[str, InputImage] = {name: vars(request)[name] for name in names}
    keys = [f"{image.sha256} {official}" for image in images.values()]

    def pixels_of(name: str) -> Tensor:
        preprocessing = backend.image_encoder.preprocessing
        picture = images[name].original(name)
        return preprocessing.squashed(picture) if official else preprocessing.cropped(picture)

    def encode() -> Tensor:
        encoder = backend.image_encoder
        known = encoder.recall(keys, backend.device)
        if known is not None:
            return known
        backend.offload.use("image_encoder")
        return encoder.encode(
            [(key, partial(pixels_of, name)) for key, name in zip(keys, names, strict=True)]
        )

    return broadcast_from_rank0(encode, backend.groups.world, backend.device)


@torch.no_grad()
def encode_clip(backend: DiffusionBackend, request: DiffusionUserParams) -> Tensor:
    """The normalised latent of a request's video, [1, C, T, H, W] float32, of whole patches, whose border
    beyond the size asked for repeats the frames' edge.

    Args:
        request: resolved, with a video.

    Raises:
        UsageError: the video's file has changed, or is not there any more.
    """
    frames = request.num_frames or 1
    height = request.height or 0
    width = request.width or 0
    _, *cells = backend.spec.latent_shape(frames, height, width)
    rows, columns = backend.spec.geometry.stride[1:]

    def encode() -> Tensor:
        backend.offload.use("vae")
        clip = np.stack(list(request.video.resized(frames, height, width)))  # [T, height, width, 3]
        border = (0, cells[2] * columns - width, 0, cells[1] * rows - height)
        pixels = torch.nn.functional.pad(torch.from_numpy(clip).permute(0, 3, 1, 2), border, mode="replicate")
        return backend.vae.encode(pixels[None].to(backend.device))

    return broadcast_from_rank0(encode, backend.groups.world, backend.device)
