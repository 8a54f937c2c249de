"""The video autoencoder: the weights of diffusers' `AutoencoderKLWan` behind a room that speaks this
project's shapes.

Latents come and go normalised (zero mean, unit deviation by the VAE's own statistics); videos are [B, T, C,
H, W] float32 in [0, 1]. The room owns the loop over frames, tiles and their memory; `vae_decoder` and
`vae_encoder` own the layers. It knows no request or device plan.

Both compute what diffusers computes, in another order: in float32 the result differs by rounding
(relative error about 1e-6), in bf16 by about as much as either differs from float32 (norms and sums are
rounded once here, there after each step). Whole frames, tiles and strips are one function: a window is
computed with all neighbours that matter to it, so that tiles need no blending.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from chitu_diffusion.errors import UsageError
from chitu_diffusion.memory.estimate import LastStage
from chitu_diffusion.models.spec import LatentGeometry
from chitu_diffusion.models.wan.vae_decoder import Decoder, decode_bytes
from chitu_diffusion.models.wan.vae_encoder import Encoder, encode_bytes
from chitu_diffusion.models.wan.vae_layers import (
    ConvCache,
    TileRect,
    VaeOptions,
    best_options,
    searching_kernels,
    spans,
)

_MOST_FRAMES = 5
_MOST_ENCODED = 2  # latent frames a call: 4 are 2 % faster on an H200, and take 2.5 GiB more
_MEMORY_BUDGET = 9 * 2**30
_TILED_BUDGET = 5 * 2**29
_CPU_BUDGET = 3 * 2**30
_REMEMBERED_LATENTS = 8
_LOWER_FRAMES = 16  # latent frames a call of the cheap halves


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
        ways: VaeOptions | None = None,
    ) -> None:
        super().__init__()
        self.network: Any = network  # diffusers is untyped
        self.frames_per_call = frames_per_call
        self.memory_budget = memory_budget
        self.ways = ways
        self.stride = LatentGeometry.of_vae(cast(Any, network).config).stride
        """Pixels of a latent cell along (frames, rows, columns): (4, 8, 8) for Wan2.1's, t, s, s below."""
        self._known: OrderedDict[Hashable, Tensor] = OrderedDict()

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
    def encode(self, video: Tensor, tile_size: int | None = None) -> Tensor:
        """The most likely latent of a video.

        Args:
            video: [B, T, 3, H, W] in [0, 1]; T is t n + 1, H and W multiples of s.
            tile_size: in latent cells; see `decode_tiled`. None encodes whole frames.

        Returns:
            [B, C, (T - 1) / t + 1, H / s, W / s], normalised, float32.

        Raises:
            UsageError: a video of another shape.
        """
        window = self._whole_video(video)
        return self.latent_of(self._features(video, window, tile_size))

    def recall(self, content: Hashable) -> Tensor | None:
        """A latent that was `remember`ed of the same content under the same weights, in main memory."""
        return self._known.get((content, self._weights_as_they_are()))

    def remember(self, content: Hashable, latent: Tensor) -> None:
        """Keeps the latent of a video for `recall`; of several the last ones."""
        self._known[content, self._weights_as_they_are()] = latent.to("cpu", copy=True)
        while len(self._known) > _REMEMBERED_LATENTS:
            self._known.popitem(last=False)

    def _weights_as_they_are(self) -> Hashable:
        # moving them between devices changes neither; loading others, or converting them, does
        return self._weight.dtype, sum(weight._version for weight in self.network.parameters())

    @torch.no_grad()
    def encode_strip(self, video: Tensor, low: int, high: int, axis: int = -1) -> Tensor:
        """A strip of what `latent_of` takes: for ranks that share a frame, as `decode_strip`.

        Args:
            video: as `encode`; all of it.
            low, high, axis: as `decode_strip`, in latent cells.

        Returns:
            [B, C', T, h, w], with high - low cells along `axis`; C' is the encoder's width.

        Raises:
            UsageError: as `encode`.
        """
        whole = self._whole_video(video)
        window = whole._replace(left=low, right=high) if axis == -1 else whole._replace(top=low, bottom=high)
        return self._features(video, window, None)

    @torch.no_grad()
    def latent_of(self, features: Tensor) -> Tensor:
        """The cheap half of `encode`: joined strips of `encode_strip`, [B, C', T, h, w], -> the latent."""
        device = self._weight.device
        with torch.autocast(device.type, enabled=False), searching_kernels(self._ways().search):
            encoder = Encoder(self.network, self._ways())
            clips = [_in_parts(encoder.lower, clip.permute(1, 2, 3, 0)) for clip in features]
        latent = torch.stack(clips).permute(0, 4, 1, 2, 3).float()
        mean, deviation = self._statistics(latent)
        return (latent - mean) / deviation

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

    def _ways(self) -> VaeOptions:
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

    def _whole_video(self, video: Tensor) -> TileRect:
        """The window of all of a video's latent cells."""
        stride, rows, columns = self.stride
        frames, channels, height, width = video.shape[1:] if video.ndim == 5 else (0,) * 4
        if channels != 3 or 0 in video.shape or (frames - 1) % stride or height % rows or width % columns:
            raise UsageError(
                f"video is {list(video.shape)}; expected [B, T, 3, H, W], T of {stride} n + 1, H a multiple "
                f"of {rows}, W of {columns}"
            )
        return TileRect(0, height // rows, 0, width // columns)

    def _features(self, video: Tensor, window: TileRect, tile_size: int | None) -> Tensor:
        """A window of what the encoder's large half gives, [B, C', T, h, w]."""
        device = self._weight.device
        ways = self._ways()
        stride = self.stride[0]
        frames = (video.shape[1] - 1) // stride + 1
        tiles = [window] if tile_size is None else _tiles(window, tile_size)
        whole = self._whole_video(video)
        many = self._frames_a_call(
            lambda n: self._encode_bytes(whole, tiles, frames, n), _MOST_ENCODED, len(tiles) > 1
        )
        with torch.autocast(device.type, enabled=False), searching_kernels(ways.search):
            encoder = Encoder(self.network, ways)
            shape = (frames, window.bottom - window.top, window.right - window.left, encoder.width)
            found = torch.empty(len(video), *shape, device=device, dtype=self._weight.dtype)
            for clip, out in zip(video, found, strict=True):
                for tile in tiles:
                    memory: ConvCache = {}
                    place = out[
                        :,
                        tile.top - window.top : tile.bottom - window.top,
                        tile.left - window.left : tile.right - window.left,
                    ]
                    for start, end in spans(frames, many):
                        part = clip[max(stride * (start - 1) + 1, 0) : stride * (end - 1) + 1]
                        pixels = part.to(device).mul(2).sub_(1).to(self._weight)
                        place[start:end] = encoder.upper(pixels, tile, memory)
        return found.permute(0, 4, 1, 2, 3)

    def _encode_bytes(self, whole: TileRect, tiles: list[TileRect], frames: int, many: int) -> int:
        per_call = many * self.stride[0]
        ways = self._ways()
        return max(encode_bytes(self.network, ways, whole, tile, frames, per_call) for tile in tiles)

    def _whole(self, latent: Tensor) -> TileRect:
        channels = self.network.config.z_dim
        if latent.ndim != 5 or latent.shape[1] != channels or 0 in latent.shape:
            raise UsageError(f"latent is {list(latent.shape)}; expected [B, {channels}, T, H, W]")
        return TileRect(0, latent.shape[-2], 0, latent.shape[-1])

    def _decoded(self, latent: Tensor, window: TileRect, tile_size: int | None) -> Tensor:
        """A window of the video, in tiles or at once."""
        tiles = [window] if tile_size is None else _tiles(window, tile_size)
        self._require_room(latent, tiles)
        most = self._frames_a_call(lambda n: self.peak_bytes(latent, tiles, n), _MOST_FRAMES, len(tiles) > 1)
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
                low = _in_parts(decoder.lower, self._denormalised(clip))
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

    def _frames_a_call(self, bytes_of: Callable[[int], int], most: int, tiled: bool) -> int:
        """Latent frames a call that the budget has room for; at least 1.

        Args:
            bytes_of: what so many frames a call take.
            most: more are not faster.
            tiled: whether tile by tile.
        """
        if self.frames_per_call is not None:
            return self.frames_per_call
        budget = self.memory_budget or self._usual_budget(tiled)
        return next((n for n in range(most, 1, -1) if bytes_of(n) <= budget), 1)

    def _require_room(self, latent: Tensor, tiles: list[TileRect]) -> None:
        """Whether a budget that was asked for has room for a frame a call.

        Raises:
            UsageError: it has not.
        """
        need = self.peak_bytes(latent, tiles)
        if self.frames_per_call is None and self.memory_budget is not None and need > self.memory_budget:
            frames, height, width = latent.shape[2:]
            raise UsageError(
                f"decoding {frames} latent frames of {height} x {width} cells takes {need / 2**30:.2f} "
                f"GiB at least, the budget is {self.memory_budget / 2**30:.2f} GiB: decode smaller tiles "
                "(low_mem_level = 1), or allow more"
            )

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
    if network.config.attn_scales:
        raise UsageError(
            f"vae config has attn_scales={network.config.attn_scales!r}: Wan's VAEs have none; use []"
        )
    patch = network.config.patch_size
    channels = network.config.out_channels
    if patch not in (None, 1, 2, 4, 8) or channels != 3 * (patch or 1) ** 2:
        raise UsageError(
            f"vae config has patch_size={patch!r}, out_channels={channels!r}: use 3 x patch_size^2 channels"
        )
    return cast(nn.Module, network)


def _in_parts(half: Callable[[Tensor, ConvCache], Tensor], x: Tensor) -> Tensor:
    """A cheap half over [T, H, W, C], some frames at a time."""
    memory: ConvCache = {}
    starts = range(0, len(x), _LOWER_FRAMES)
    return torch.cat([half(x[start : start + _LOWER_FRAMES], memory) for start in starts])


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
