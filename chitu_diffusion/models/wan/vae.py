"""The video autoencoder: the weights of diffusers' `AutoencoderKLWan` behind a room that speaks this
project's shapes.

Latents come and go normalised (zero mean, unit deviation by the VAE's own statistics); videos are [B, T, C,
H, W] float32 in [0, 1]. The room owns the loop over frames, tiles and their memory; `vae_decoder` owns the
decoder's layers. It knows no request or device plan. Encoding is diffusers' own.

Decoding computes what diffusers computes, in another order: in float32 the video differs by rounding
(relative error about 1e-6), in bf16 by about as much as either differs from float32 (norms and sums are
rounded once here, there after each step). Whole frames, tiles and strips are one function: a window is
decoded with all neighbours that matter to it, so that tiles need no blending.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from chitu_diffusion.errors import UsageError
from chitu_diffusion.memory.estimate import LastStage
from chitu_diffusion.models.spec import LatentGeometry
from chitu_diffusion.models.wan.vae_decoder import (
    ConvCache,
    DecodeOptions,
    Decoder,
    TileRect,
    best_options,
    decode_bytes,
    searching_kernels,
    spans,
)

_MOST_FRAMES = 5
_MEMORY_BUDGET = 9 * 2**30
_TILED_BUDGET = 5 * 2**29
_CPU_BUDGET = 3 * 2**30
_LOWER_FRAMES = 16  # latent frames a call of the cheap half


class WanVAE(nn.Module):
    """Wan's causal 3D VAE (arXiv 2503.20314, section 4.1); Wan2.2's has shortcuts around its stages.

    Args:
        network: diffusers' VAE, with weights.
        frames_per_call: latent frames that one pass of the decoder takes; more is faster and costs memory.
            None takes up to 5, as `memory_budget` allows.
        memory_budget: bytes that a decode's activations may take on the device, the video included; a decode
            that cannot keep to it is refused. None aims at 9 GiB (tiles at 2.5, a CPU at 3) or what the
            device has free, and refuses nothing.
        ways: how to compute; None takes the fastest for the device.
    """

    def __init__(
        self,
        network: nn.Module,
        frames_per_call: int | None = None,
        *,
        memory_budget: int | None = None,
        ways: DecodeOptions | None = None,
    ) -> None:
        super().__init__()
        self.network: Any = network  # diffusers is untyped
        self.frames_per_call = frames_per_call
        self.memory_budget = memory_budget
        self.ways = ways
        self.stride = LatentGeometry.of_vae(cast(Any, network).config).stride
        """Pixels of a latent cell along (frames, rows, columns): (4, 8, 8) for Wan2.1's, t, s, s below."""

    @property
    def last_stage(self) -> LastStage:
        """Of the decoder, for an estimate."""
        config = self.network.config
        patch = int(config.patch_size or 1)
        return LastStage(int(config.decoder_base_dim or config.base_dim), self.stride[1] // patch, patch)

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decodes whole frames.

        Args:
            latent: [B, C, T, H, W], normalised.

        Returns:
            Video [B, t (T - 1) + 1, 3, s H, s W], float32 in [0, 1].

        Raises:
            UsageError: a latent of another shape, or one that the memory budget has no room for.
        """
        return self._decoded(latent, self._whole(latent), None)

    @torch.no_grad()
    def decode_tiled(self, latent: Tensor, tile_size: int = 8) -> Tensor:
        """Decodes tile by tile: memory follows the tile, not the frame. The same video as `decode`, up to
        rounding.

        Args:
            latent: [B, C, T, H, W], normalised.
            tile_size: in latent cells; a tile's neighbours, which are decoded with it, come on top. On 60 x
                104 cells, tiles of 32 cost a quarter more time than the whole frame, tiles of 8 three times
                as much.

        Returns, Raises:
            As `decode`.
        """
        if tile_size < 1:
            raise UsageError(f"tile_size = {tile_size}: use at least 1 cell")
        return self._decoded(latent, self._whole(latent), tile_size)

    @torch.no_grad()
    def decode_strip(self, latent: Tensor, low: int, high: int, axis: int = -1) -> Tensor:
        """A strip of what `decode` gives, up to rounding: for ranks that share a frame.

        The strip's neighbours are decoded with it only as far as they matter, which is less in every stage:
        at full resolution, where the time goes, a few pixels.

        Args:
            latent: [B, C, T, H, W], normalised; all of it.
            low, high: the strip, in latent cells along `axis`.
            axis: -1 for columns, -2 for rows.

        Returns:
            As `decode`, with s (high - low) pixels along `axis`.

        Raises:
            UsageError: as `decode`.
        """
        whole = self._whole(latent)
        window = whole._replace(left=low, right=high) if axis == -1 else whole._replace(top=low, bottom=high)
        return self._decoded(latent, window, None)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """The most likely latent of a video.

        Args:
            video: [B, T, 3, H, W] in [0, 1]; T is t n + 1, H and W multiples of s.

        Returns:
            [B, C, (T - 1) / t + 1, H / s, W / s], normalised, float32.
        """
        pixels = (video.transpose(1, 2) * 2 - 1).to(self._weight)
        with torch.autocast(pixels.device.type, enabled=False):
            latent = self.network.encode(pixels).latent_dist.mode().float()
        mean, deviation = self._statistics(latent)
        return cast(Tensor, (latent - mean) / deviation)

    def peak_bytes(self, latent: Tensor, tiles: Sequence[TileRect] = (), frames_per_call: int = 1) -> int:
        """Bytes that decoding takes on the device at its worst moment, the video included, the weights and
        cuDNN's workspace not.

        Args:
            latent: for its shape, [B, C, T, H, W].
            tiles: what is decoded at once, one after the other; none for whole frames.
            frames_per_call: latent frames that one pass takes.
        """
        frame = self._whole(latent)
        video = 4 * 3 * math.prod(self.stride) * frame.cells * latent.shape[2] * len(latent)
        frames = latent.shape[2]
        ways = self._ways()
        return video + max(
            decode_bytes(self.network, ways, frames, frame, tile, frames_per_call)
            for tile in tiles or [frame]
        )

    def _ways(self) -> DecodeOptions:
        return self.ways or best_options(self._weight.device, self.network.decoder.conv_in.out_channels)

    @property
    def _weight(self) -> Tensor:
        return cast(Tensor, self.network.post_quant_conv.weight)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.network.config
        mean, deviation = (
            like.new_tensor(values).view(1, -1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean, deviation

    def _whole(self, latent: Tensor) -> TileRect:
        channels = self.network.config.z_dim
        if latent.ndim != 5 or latent.shape[1] != channels or 0 in latent.shape:
            raise UsageError(f"latent is {list(latent.shape)}; expected [B, {channels}, T, H, W]")
        return TileRect(0, latent.shape[-2], 0, latent.shape[-1])

    def _decoded(self, latent: Tensor, window: TileRect, tile_size: int | None) -> Tensor:
        """A window of the video, in tiles or at once."""
        tiles = [window] if tile_size is None else _tiles(window, tile_size)
        most = self._frames_a_call(latent, tiles)
        device = self._weight.device
        ways = self._ways()
        stride, *pixels = self.stride
        frames = stride * (latent.shape[2] - 1) + 1
        cells = (window.bottom - window.top, window.right - window.left)
        height, width = (many * step for many, step in zip(cells, pixels, strict=True))
        video = torch.empty(len(latent), frames, 3, height, width, device=device)
        # runs in the dtype it was loaded in
        with torch.autocast(device.type, enabled=False), searching_kernels(ways.search):
            decoder = Decoder(self.network, ways)
            for clip, out in zip(latent, video, strict=True):
                low = _lower(decoder, self._denormalised(clip))
                for tile in tiles:
                    _upper(decoder, low, tile, most, self._within(out, tile, window))
        return video

    def _within(self, video: Tensor, tile: TileRect, window: TileRect) -> Tensor:
        """A tile's place in the video, [T, 3, H, W] of `window`."""
        _, rows, columns = self.stride
        top, bottom = ((row - window.top) * rows for row in (tile.top, tile.bottom))
        left, right = ((column - window.left) * columns for column in (tile.left, tile.right))
        return video[..., top:bottom, left:right]

    def _denormalised(self, clip: Tensor) -> Tensor:
        """[C, T, H, W], normalised -> what the decoder takes, [T, H, W, C]."""
        clip = clip.to(self._weight.device, torch.promote_types(clip.dtype, torch.float32))[None]
        mean, deviation = self._statistics(clip)
        return cast(Tensor, self.network.post_quant_conv((clip * deviation + mean).to(self._weight)))[
            0
        ].permute(1, 2, 3, 0)

    def _frames_a_call(self, latent: Tensor, tiles: list[TileRect]) -> int:
        """Latent frames a call that the budget has room for.

        Raises:
            UsageError: not even one.
        """
        if self.frames_per_call is not None:
            return self.frames_per_call
        budget = self.memory_budget or self._usual_budget(len(tiles) > 1)
        needs = {n: self.peak_bytes(latent, tiles, n) for n in range(_MOST_FRAMES, 0, -1)}
        if needs[1] > budget and self.memory_budget is not None:
            frames, height, width = latent.shape[2:]
            raise UsageError(
                f"decoding {frames} latent frames of {height} x {width} cells takes {needs[1] / 2**30:.2f} "
                f"GiB at least, the budget is {budget / 2**30:.2f} GiB: decode smaller tiles (low_mem_level "
                "= 1), or allow more"
            )
        return next((n for n, need in needs.items() if need <= budget), 1)

    def _usual_budget(self, tiled: bool) -> int:
        device = self._weight.device
        budget = _TILED_BUDGET if tiled else _MEMORY_BUDGET
        if device.type != "cuda":
            return min(budget, _CPU_BUDGET)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return min(budget, torch.cuda.mem_get_info(device)[0] + unused)


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    """The VAE of a config, with no weights (on the meta device).

    Raises:
        UsageError: a value that no such VAE can have.
    """
    if not config.get("dim_mult", True):
        raise UsageError("vae config has an empty dim_mult: use one number for each stage")
    with torch.device("meta"):
        network: Any = AutoencoderKLWan.from_config({"_class_name": "AutoencoderKLWan", **config})
    for name in ("latents_mean", "latents_std"):
        values = network.config[name]
        if not isinstance(values, list | tuple) or len(values) != network.config.z_dim:
            raise UsageError(f"vae config has {name}={values!r}: use {network.config.z_dim} numbers (z_dim)")
    patch = network.config.patch_size
    channels = network.config.out_channels
    if patch not in (None, 1, 2, 4, 8) or channels != 3 * (patch or 1) ** 2:
        raise UsageError(
            f"vae config has patch_size={patch!r}, out_channels={channels!r}: use 3 x patch_size^2 channels"
        )
    return cast(nn.Module, network)


def _lower(decoder: Decoder, x: Tensor) -> Tensor:
    memory: ConvCache = {}
    starts = range(0, len(x), _LOWER_FRAMES)
    return torch.cat([decoder.lower(x[start : start + _LOWER_FRAMES], memory) for start in starts])


def _upper(decoder: Decoder, low: Tensor, window: TileRect, most: int, out: Tensor) -> None:
    """Decodes a window of all frames into `out`, [T', 3, H, W], in [0, 1]."""
    memory: ConvCache = {}
    done = 0
    for start, end in spans(len(low), most):
        pixels = decoder.upper(low[start:end], window, memory)
        part = out[done : done + len(pixels)]
        part.copy_(pixels).clamp_(-1, 1).div_(2).add_(0.5)
        done += len(pixels)


def _tiles(window: TileRect, size: int) -> list[TileRect]:
    """The tiles that a window is cut into; a last one of less than half the size joins its neighbour."""

    def edges(low: int, high: int) -> list[int]:
        cuts = list(range(low + size, high, size))
        return [low, *(cut for cut in cuts if 2 * (high - cut) >= size), high]

    rows = edges(window.top, window.bottom)
    columns = edges(window.left, window.right)
    return [TileRect(*row, *column) for row in pairwise(rows) for column in pairwise(columns)]
