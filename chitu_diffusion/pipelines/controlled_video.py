"""Controlled video (VACE, arXiv:2503.07598): a stream of blocks beside the network is told of a control
video, of which of its pixels are made anew, and of pictures of what shall be seen.

The control latents are what diffusers' `WanVACEPipeline` makes; of several reference images the authors' own
code (wan/vace.py) has them the other way round.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from chitu_diffusion.backend import DiffusionBackend
from chitu_diffusion.distributed.sharding import broadcast_from_rank0
from chitu_diffusion.media.image import InputImage, resized
from chitu_diffusion.media.input_video import InputVideo
from chitu_diffusion.pipelines.encoding import clip_pixels, edged, encode_clip, pixel_size, require_unchanged
from chitu_diffusion.pipelines.text_to_video import TextToVideo
from chitu_diffusion.pipelines.vae import encode_video
from chitu_diffusion.task import Conditioning, DiffusionUserParams


class ControlledVideo(TextToVideo):
    """Without video and pictures it is text to video, whose networks are told that all is made anew."""

    def condition(self, backend: DiffusionBackend, request: DiffusionUserParams) -> Conditioning:
        """The text, the control latents and their weight."""
        scale = 1.0 if request.conditioning_scale is None else request.conditioning_scale
        text = super().condition(backend, request)
        return replace(text, control_latents=encode_control(backend, request), control_scale=scale)

    def begins_from(self, backend: DiffusionBackend, request: DiffusionUserParams) -> None:
        """All is made from noise: a video is a control here."""


@torch.no_grad()
def encode_control(backend: DiffusionBackend, request: DiffusionUserParams) -> Tensor:
    """What a control stream is told, [1, 2 C + s s, R + T, H, W] float32 of whole patches: the latent of
    what is kept, that of what is made anew, grey elsewhere, and the mask's s x s pixels of each cell; before
    them a frame for each of R reference images.

    Args:
        request: resolved.

    Raises:
        UsageError: a file has changed, or is not there any more.
    """
    if backend.groups.rank == 0:
        for name, given in request.inputs().items():
            for each in given.images if name == "reference_images" else (given,):
                require_unchanged(each, name)
    frames = request.num_frames or 1
    size = pixel_size(backend, request)
    grey = ("grey", frames, size)
    mask: Tensor | None = None
    if request.mask is not None:
        mask = broadcast_from_rank0(lambda: _mask_pixels(request, size), backend.groups.world, backend.device)
    if request.video is None or mask is None:
        kept = encode_video(backend, lambda: torch.full((1, frames, 3, *size), 0.5), grey)
        made = kept if request.video is None else encode_clip(backend, request)
    else:
        content = (request.video.sha256, request.mask.sha256, frames, request.height, request.width)
        anew = (mask > 0.5).cpu()  # [T or 1, H, W]

        def part(shown: Tensor) -> Tensor:
            return torch.where(shown[:, None], clip_pixels(backend, request), 0.5)[None]

        kept = encode_video(backend, lambda: part(~anew), ("kept", *content))
        made = encode_video(backend, lambda: part(anew), ("made anew", *content))
    cells = _mask_cells(mask, backend.spec.geometry.stride, (frames, *size), kept)
    control = torch.cat([kept, made, cells], dim=1)
    for image in request.reference_images.images if request.reference_images else ():
        control = torch.cat([_reference(backend, image, request, like=control), control], dim=2)
    return control


def _mask_pixels(request: DiffusionUserParams, size: tuple[int, int]) -> Tensor:
    """The request's mask [T or 1, H, W] in [0, 1]: its first channel, as diffusers has it."""
    mask: InputImage | InputVideo = request.mask
    height = request.height or 0
    width = request.width or 0
    if isinstance(mask, InputVideo):
        count = 1 if mask.frames == 1 else request.num_frames or 1
        pixels = np.stack(list(mask.resized(count, height, width, "mask")))
    else:
        pixels = mask.resized(height, width, "mask")[None]
    return edged(torch.from_numpy(pixels), size)[:, 0].contiguous()


def _mask_cells(
    mask: Tensor | None, stride: tuple[int, int, int], shape: tuple[int, int, int], like: Tensor
) -> Tensor:
    """A mask [T or 1, H, W], None for ones, as s x s channels of the cells of `like` [1, C, t, h, w]."""
    rows, columns = stride[1:]
    mask = torch.ones((), device=like.device) if mask is None else mask.to(like.device)
    pixels = mask.expand(shape).unflatten(2, (-1, columns)).unflatten(1, (-1, rows))  # [T, h, s, w, s]
    channels = pixels.permute(2, 4, 0, 1, 3).flatten(0, 1)[None]
    return torch.nn.functional.interpolate(channels, size=like.shape[2:], mode="nearest-exact")


def _reference(
    backend: DiffusionBackend, image: InputImage, request: DiffusionUserParams, like: Tensor
) -> Tensor:
    """A reference image's frame of the control latents: its latent, grey's place and mask 0."""
    height = request.height or 0
    width = request.width or 0

    def frame() -> Tensor:
        pixels = letterboxed(backend, image, height, width)
        return edged(pixels[None].permute(0, 2, 3, 1), pixel_size(backend, request))[None]

    latent = encode_video(backend, frame, ("reference", image.sha256, height, width))
    found = like.new_zeros(like[:, :, :1].shape)
    found[:, : latent.shape[1]] = latent
    return found


def letterboxed(backend: DiffusionBackend, image: InputImage, height: int, width: int) -> Tensor:
    """A picture [3, height, width] in [0, 1], whole, in the middle of white. As diffusers has it: by Lanczos
    to whole latent cells, then without a filter to the size.
    """
    pixels = image.original("reference_images")
    steps = backend.spec.geometry.stride[1:]
    rows, columns = (max(step, side - side % step) for side, step in zip(pixels.shape, steps, strict=False))
    picture = torch.from_numpy(resized(pixels, rows, columns)).permute(2, 0, 1)
    scale = min(height / rows, width / columns)
    size = (max(1, int(rows * scale)), max(1, int(columns * scale)))
    small = torch.nn.functional.interpolate(picture[None], size=size, mode="bilinear", align_corners=False)[0]
    top = (height - size[0]) // 2
    left = (width - size[1]) // 2
    canvas = torch.ones(3, height, width)
    canvas[:, top : top + size[0], left : left + size[1]] = small
    return canvas
