"""The video autoencoder: diffusers' `AutoencoderKLWan` behind a room that speaks this project's shapes.

Latents come and go normalised (zero mean, unit deviation by the VAE's own statistics); videos are [B, T, C, H, W]
float32 in [0, 1]. The room owns the loop over frames and tiles and knows the decoder's parts; it knows no request or
device plan.

Decoding has two halves. At the latent's resolution stand the only parts that look at a whole frame (the middle block's
attention); they are cheap, so they always see the whole frame. The up-sampling half is convolutions alone and takes
nearly all time and memory; it is what `decode_tiled` cuts into tiles. A tile's error therefore comes only from the
missing neighbours beyond its margin, and fades within it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from chitu_diffusion.errors import UsageError

_FADE_CELLS = 1.0
_MOST_FRAMES = 4
_FEATURE_BYTES = 512 * 2**20
_REMEMBERED = 2  # frames that a causal convolution of length 3 in time needs from before

# A convolution's memory: the last frames it saw, None at the start, or a word of diffusers' own for "the first frame".
Memory = list[Any]
Piece = Callable[[Tensor, Memory], Tensor]
Fade = Callable[[int, Tensor], Tensor]  # (pixels a cell, a tensor for device and dtype) -> weights along an axis


class Vae(nn.Module):
    """Wan's causal 3D VAE (arXiv 2503.20314, section 4.1).

    Args:
        network: diffusers' VAE, with weights.
        frames_per_call: latent frames that one pass of the decoder takes; more is faster and costs memory. None takes
            up to 4, as long as a feature map at full resolution stays within 512 MiB.
    """

    def __init__(self, network: nn.Module, frames_per_call: int | None = None) -> None:
        super().__init__()
        self.network: Any = network  # diffusers is untyped
        self.frames_per_call = frames_per_call

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decodes whole frames.

        Args:
            latent: [B, C, T, H, W], normalised.

        Returns:
            Video [B, 4 (T - 1) + 1, 3, 8 H, 8 W], float32 in [0, 1].

        Raises:
            UsageError: a latent of another shape.
        """
        pixels = self._run(self._upper, self._run(self._lower, self._denormalised(latent)))
        return _as_video(pixels)

    @torch.no_grad()
    def decode_tiled(self, latent: Tensor, tile_size: int = 8, overlap: int = 5) -> Tensor:
        """Decodes tile by tile: memory follows the tile, not the frame.

        Each tile is decoded with a margin of `overlap` on every inner side. Neighbours fade into each other linearly
        over the inner part of the margin (one cell, at most half of it) and as far into the tile; what lies beyond is
        context and is thrown away.

        Args:
            latent: [B, C, T, H, W], normalised.
            tile_size: of a tile without its margin, in latent cells.
            overlap: margin, in latent cells; from 14 on the result equals `decode` up to rounding.

        Returns:
            As `decode`.

        Raises:
            UsageError: a latent of another shape, or tiles that cannot be.
        """
        if tile_size < 1 or overlap < 0:
            raise UsageError(f"tile_size = {tile_size}, overlap = {overlap}: at least 1 cell, and at least 0, would do")
        low = self._run(self._lower, self._denormalised(latent))
        rows, columns = (list(_tiles(size, tile_size, overlap)) for size in low.shape[-2:])
        if len(rows) == len(columns) == 1:
            return _as_video(self._run(self._upper, low))
        video: Tensor | None = None
        for top, bottom, row_fade in rows:
            for left, right, column_fade in columns:
                tile = self._run(self._upper, low[..., top:bottom, left:right]).float()
                scale = tile.shape[-1] // (right - left)
                if video is None:
                    video = tile.new_zeros(*tile.shape[:3], low.shape[-2] * scale, low.shape[-1] * scale)
                weight = row_fade(scale, tile)[:, None] * column_fade(scale, tile)
                video[..., top * scale : bottom * scale, left * scale : right * scale] += tile * weight
        assert video is not None
        return _as_video(video)

    @torch.no_grad()
    def decode_strip(self, latent: Tensor, low: int, high: int, axis: int = -1) -> Tensor:
        """A strip of what `decode` gives, up to rounding: for ranks that share a frame.

        The strip's neighbours are decoded with it only as far as they matter, which is less in every stage: at full
        resolution, where the time goes, a few pixels.

        Args:
            latent: [B, C, T, H, W], normalised; all of it.
            low, high: the strip, in latent cells along `axis`.
            axis: -1 for columns, -2 for rows.

        Returns:
            As `decode`, with 8 (high - low) pixels along `axis`.

        Raises:
            UsageError: a latent of another shape.
        """
        lower = self._run(self._lower, self._denormalised(latent))
        return _as_video(self._run(partial(self._upper_strip, axis=axis, low=low, high=high), lower))

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """The most likely latent of a video.

        Args:
            video: [B, T, 3, H, W] in [0, 1]; T is 4n + 1, H and W multiples of 8.

        Returns:
            [B, C, (T - 1) / 4 + 1, H / 8, W / 8], normalised, float32.
        """
        pixels = video.transpose(1, 2).to(self._weight) * 2 - 1
        with torch.autocast(pixels.device.type, enabled=False):
            latent = self.network.encode(pixels).latent_dist.mode().float()
        mean, deviation = self._statistics(latent)
        return cast(Tensor, (latent - mean) / deviation)

    @property
    def _weight(self) -> Tensor:
        return cast(Tensor, self.network.post_quant_conv.weight)

    @property
    def _patch(self) -> int:
        # pixels a side that the decoder's last convolution gives as channels; wan-tiny has 2, the full-size VAE 1
        return int(self.network.config.patch_size or 1)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.network.config
        mean, deviation = (
            like.new_tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std)
        )
        return mean, deviation

    def _denormalised(self, latent: Tensor) -> Tensor:
        channels = self.network.config.z_dim
        if latent.ndim != 5 or latent.shape[1] != channels or 0 in latent.shape:
            raise UsageError(f"latent is {list(latent.shape)}; expected [B, {channels}, T, H, W]")
        latent = latent.to(self._weight)
        mean, deviation = self._statistics(latent)
        with torch.autocast(latent.device.type, enabled=False):
            return cast(Tensor, self.network.post_quant_conv(latent * deviation + mean))

    def _run(self, piece: Piece, x: Tensor) -> Tensor:
        """A causal piece over all frames, some at a time. The first frame goes alone: it is not doubled in time."""
        memory: Memory = [None] * len(list(self.network.decoder.modules()))
        starts = [0, *range(1, x.shape[2], self.frames_per_call or self._affordable_frames(x))]
        ends = [*starts[1:], x.shape[2]]
        with torch.autocast(x.device.type, enabled=False):  # the VAE runs in the dtype it was loaded in
            return torch.cat([piece(x[:, :, start:end], memory) for start, end in zip(starts, ends, strict=True)], dim=2)

    def _affordable_frames(self, x: Tensor) -> int:
        # a latent cell becomes 4 x 8 x 8 pixels, in patches of conv_out's input channels
        channels, side = self.network.decoder.conv_out.in_channels, 8 // self._patch
        frame_bytes = x.shape[0] * x.shape[-2] * x.shape[-1] * 4 * side * side * channels * x.element_size()
        return int(max(1, min(_MOST_FRAMES, _FEATURE_BYTES // frame_bytes)))

    def _lower(self, x: Tensor, memory: Memory) -> Tensor:
        decoder = self.network.decoder
        x = _causal(decoder.conv_in, x, memory, 0)
        return cast(Tensor, decoder.mid_block(x, feat_cache=memory, feat_idx=[1]))

    def _upper(self, x: Tensor, memory: Memory) -> Tensor:
        return self._upper_strip(x, memory, axis=-1, low=0, high=x.shape[-1])

    def _upper_strip(self, x: Tensor, memory: Memory, *, axis: int, low: int, high: int) -> Tensor:
        """The upper half for cells low..high along an axis of x: each block gets just as many neighbours as still matter."""
        decoder, place, start, size = self.network.decoder, [1], 0, x.shape[axis]
        *reaches, last_reach = self._reaches()
        for block, reach in zip(decoder.up_blocks, reaches, strict=True):
            x, start = _cut(x, axis, start, max(low - reach, 0), min(high + reach, size))
            x = block(x, feat_cache=memory, feat_idx=place)  # advances place[0]
            if block.upsamplers is not None:
                low, high, start, size = 2 * low, 2 * high, 2 * start, 2 * size
        x, start = _cut(x, axis, start, max(low - last_reach, 0), min(high + last_reach, size))
        x = _causal(decoder.conv_out, decoder.nonlinearity(decoder.norm_out(x)), memory, 0)
        return _unpatched(_cut(x, axis, start, low, high)[0], self._patch)

    def _reaches(self) -> list[int]:
        """Cells beyond an edge that the result looks at: at the entrance of each block, and before the last convolution."""
        reaches = [1]
        for block in reversed(self.network.decoder.up_blocks):
            # the upsampler's convolution at twice the resolution, then two convolutions in each residual block
            after = reaches[0] if block.upsamplers is None else (reaches[0] + 2) // 2
            reaches.insert(0, after + 2 * len(block.resnets))
        return reaches


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    """The VAE of a config, with no weights (on the meta device).

    Raises:
        UsageError: a VAE of another family than Wan2.1's, or a value that none can have.
    """
    if config.get("is_residual"):
        raise UsageError("vae config has is_residual=True (Wan2.2-5B's VAE): only Wan2.1's kind is supported")
    if not config.get("dim_mult", True):
        raise UsageError("vae config has an empty dim_mult: one number for each stage would do")
    with torch.device("meta"):
        network: Any = AutoencoderKLWan.from_config({"_class_name": "AutoencoderKLWan", **config})
    for name in ("latents_mean", "latents_std"):
        values = network.config[name]
        if not isinstance(values, list | tuple) or len(values) != network.config.z_dim:
            raise UsageError(f"vae config has {name}={values!r}: {network.config.z_dim} numbers (z_dim) would do")
    patch, channels = network.config.patch_size, network.config.out_channels
    if patch not in (None, 1, 2, 4, 8) or channels != 3 * (patch or 1) ** 2:
        raise UsageError(f"vae config has patch_size={patch!r}, out_channels={channels!r}: 3 x patch_size^2 channels would do")
    return cast(nn.Module, network)


def _cut(x: Tensor, axis: int, start: int, first: int, last: int) -> tuple[Tensor, int]:
    """Cells first..last of an x that begins at cell `start`; and where the result begins."""
    return x.narrow(axis, first - start, last - first), first


def _causal(conv: nn.Module, x: Tensor, memory: Memory, place: int) -> Tensor:
    """One causal convolution, which sees the frames that it remembers before x and then remembers x's last ones."""
    before = memory[place]
    seen = x if before is None else torch.cat([before, x], dim=2)
    memory[place] = seen[:, :, -_REMEMBERED:].clone()
    return cast(Tensor, conv(x, before))


def _unpatched(x: Tensor, patch: int) -> Tensor:
    """[B, C patch patch, T, H, W] -> [B, C, T, patch H, patch W]; of a pixel's channels the column runs before the row."""
    if patch == 1:
        return x
    x = x.unflatten(1, (-1, patch, patch)).permute(0, 1, 4, 5, 3, 6, 2)  # [B, C, T, H, row, W, column]
    return x.flatten(5, 6).flatten(3, 4)


def _as_video(pixels: Tensor) -> Tensor:
    return (pixels.float().clamp(-1, 1) / 2 + 0.5).transpose(1, 2)


def _tiles(size: int, tile: int, overlap: int) -> Iterator[tuple[int, int, Fade]]:
    """(start, end, weights) along one axis: margins included, clipped at the frame; weights sum to 1 over all tiles."""
    cuts = [*range(tile, size, tile)]
    edges = [0, *cuts, size]
    if len(edges) > 2 and 2 * (edges[-1] - edges[-2]) < tile:
        del edges[-2]  # a sliver joins its neighbour
    # two fades of one tile may not meet, or the weights would not sum to 1
    reach = min(overlap / 2, tile / 2, _FADE_CELLS)
    for low, high in pairwise(edges):
        start, end = max(low - overlap, 0), min(high + overlap, size)
        yield start, end, _fade(start, end, low if low > 0 else None, high if high < size else None, reach)


def _fade(start: int, end: int, low: int | None, high: int | None, reach: float) -> Fade:
    """Weights of a tile's pixels along one axis: linear ramps of `reach` cells to both sides of an inner edge."""

    def ramp(places: Tensor, edge: int) -> Tensor:
        return ((places - edge) / (2 * reach) + 0.5).clamp(0, 1) if reach else (places > edge).to(places.dtype)

    def weights(scale: int, like: Tensor) -> Tensor:
        # the pixels' centres, in cells
        places = start + (torch.arange((end - start) * scale, device=like.device, dtype=like.dtype) + 0.5) / scale
        rising = ramp(places, low) if low is not None else torch.ones_like(places)
        return rising * (1 - ramp(places, high)) if high is not None else rising

    return weights
