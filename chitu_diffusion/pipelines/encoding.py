"""Prompts, pictures and clips to what the networks take; files and encoders are rank 0's alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.sharding import broadcast_from_rank0
from chitu_diffusion.media.image import InputImage
from chitu_diffusion.media.input_video import InputVideo
from chitu_diffusion.models.image_preprocessing import bicubic, covering
from chitu_diffusion.pipelines.request import is_cut
from chitu_diffusion.pipelines.vae import encode_video
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
    height = request.height or 0
    width = request.width or 0
    cells = backend.spec.latent_shape(frames, height, width)[2:]
    stride = backend.spec.geometry.stride[0]
    known = {0: "image"} | ({frames - 1: "last_image"} if request.last_image else {})

    def video() -> Tensor:
        found = torch.full((1, frames, 3, *pixel_size(backend, request)), 0.5)
        for frame, name in known.items():
            found[:, frame] = _pixels(backend, request, name)
        return found

    if backend.groups.rank == 0:
        for name in known.values():
            require_unchanged(vars(request)[name], name)
    hashes = tuple(vars(request)[name].sha256 for name in known.values())
    latent = encode_video(
        backend, video, ("keyframes", hashes, frames, height, width, request.image_preprocessing)
    )
    mask = torch.zeros(frames, device=latent.device)
    mask[list(known)] = 1
    # the first frame stands alone in its latent frame, and for `stride` frames in the mask
    mask = torch.cat([mask[:1].expand(stride), mask[1:]]).view(-1, stride).t()  # [stride, T]
    return torch.cat([mask[None, :, :, None, None].expand(-1, -1, -1, *cells), latent], dim=1)


@torch.no_grad()
def encode_first_frame(backend: DiffusionBackend, request: DiffusionUserParams) -> Tensor:
    """The normalised latent of a request's image, one frame [1, C, 1, H, W] float32, of whole patches.

    Args:
        request: resolved, with an image.

    Raises:
        UsageError: the image's file has changed, or is not there any more.
    """

    if backend.groups.rank == 0:
        require_unchanged(request.image, "image")
    content = (
        "first frame",
        request.image.sha256,
        request.height,
        request.width,
        request.image_preprocessing,
    )
    return encode_video(backend, lambda: _pixels(backend, request, "image")[:, None], content)


def _pixels(backend: DiffusionBackend, request: DiffusionUserParams, name: str) -> Tensor:
    """A picture [1, 3, H, W] in [0, 1] at the request's size, and on to whole patches by its edge."""
    height = request.height or 0
    width = request.width or 0
    image: InputImage = vars(request)[name]
    if is_cut(backend.spec, request):
        pixels = covering(image.original(name), height, width).permute(0, 2, 3, 1)
    elif request.image_preprocessing == "official":
        pixels = bicubic(image.original(name), height, width).permute(0, 2, 3, 1)
    else:
        pixels = torch.from_numpy(image.resized(height, width, name))[None]
    return edged(pixels, pixel_size(backend, request))


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
    if backend.groups.rank == 0:
        require_unchanged(request.video, "video")
    content = ("clip", request.video.sha256, request.num_frames, request.height, request.width)
    return encode_video(backend, lambda: clip_pixels(backend, request)[None], content)


def clip_pixels(backend: DiffusionBackend, request: DiffusionUserParams) -> Tensor:
    """The first frames of a request's video, [T, 3, H, W] in [0, 1], as `encode_clip` takes them."""
    frames = request.video.resized(request.num_frames or 1, request.height or 0, request.width or 0)
    return edged(torch.from_numpy(np.stack(list(frames))), pixel_size(backend, request))


def pixel_size(backend: DiffusionBackend, request: DiffusionUserParams) -> tuple[int, int]:
    """(height, width) of a resolved request's latent in pixels: whole patches."""
    spec = backend.spec
    rows, columns = spec.latent_shape(1, request.height or 0, request.width or 0)[2:]
    return rows * spec.geometry.stride[1], columns * spec.geometry.stride[2]


def require_unchanged(given: InputImage | InputVideo, name: str) -> None:
    """What is in a file is still there, though its latent may be remembered."""
    if given.pixels is None:
        given.require_unchanged(name)


def edged(pixels: Tensor, size: Sequence[int]) -> Tensor:
    """Frames [T, H, W, 3] as [T, 3, *size], with their edge repeated beyond them."""
    height, width = pixels.shape[1:3]
    border = (0, size[1] - width, 0, size[0] - height)
    return torch.nn.functional.pad(pixels.permute(0, 3, 1, 2), border, mode="replicate")
