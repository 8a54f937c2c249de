"""Wan's video encoder (arXiv 2503.20314, section 4.1), run over the weights of diffusers' `AutoencoderKLWan`.

The decoder's mirror: a down-sampling half of convolutions alone, which takes nearly all time and memory and
can be run for a window of the frame and for many frames at a time, and a cheap half at the latent's
resolution, whose attention looks at whole frames. The same function as diffusers' walk by four frames.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample, WanResidualDownBlock
from torch import Tensor

from chitu_diffusion.models.wan.vae_layers import (
    REMEMBERED,
    ConvCache,
    TileRect,
    VaeLayers,
    VaeOptions,
    cut_to,
)
from chitu_diffusion.ops.vae_sum import Sum

_ALIGNED = 8  # channels that a GPU's convolutions read at once in 16 bits


class Stage(NamedTuple):
    """Residual blocks at one resolution.

    Attributes:
        resnets: in order.
        halving: the layer that halves the frame after them, and time or not; None at the latent's resolution.
        shortcut: diffusers' `AvgDown3D` around all of it (Wan2.2-5B's VAE), or None.
    """

    resnets: list[Any]
    halving: Any = None
    shortcut: Any = None

    def seen(self, window: TileRect, height: int, width: int) -> tuple[TileRect, TileRect]:
        """Of a window of what comes out: what the last residual block must give, and the first be given.

        Args:
            height, width: of the frame before the stage.
        """
        last = window
        if self.halving is not None:  # cell i is made of cells 2 i to 2 i + 2
            last = TileRect(
                2 * window.top,
                min(2 * window.bottom + 1, height),
                2 * window.left,
                min(2 * window.right + 1, width),
            )
        return last, last.grown(2 * len(self.resnets), height, width)


def stages_of(encoder: Any) -> list[Stage]:
    """The stages of diffusers' encoder, from pixels to the latent's resolution."""
    stages = []
    resnets: list[Any] = []
    for block in encoder.down_blocks:
        if isinstance(block, WanResidualDownBlock):
            stages.append(Stage(list(block.resnets), block.downsampler, block.avg_shortcut))
        elif isinstance(block, WanResample):
            stages.append(Stage(resnets, block))
            resnets = []
        else:
            resnets.append(block)
    return [*stages, Stage(resnets)] if resnets else stages


class Encoder(VaeLayers):
    """diffusers' encoder, see `VaeLayers`.

    Args:
        network: diffusers' `AutoencoderKLWan`.
        ways: how to compute.
    """

    def __init__(self, network: Any, ways: VaeOptions) -> None:
        super().__init__(network.encoder, ways)
        self.patch = int(network.config.patch_size or 1)
        self.stages = stages_of(self.net)
        self.width = int(self.net.conv_out.in_channels)
        # the latent's mean; its deviation is not asked for
        channels = network.config.z_dim
        self._mean = (network.quant_conv.weight.flatten(1)[:channels], network.quant_conv.bias[:channels])

    # -- halves

    def upper(self, pixels: Tensor, window: TileRect, memory: ConvCache) -> Tensor:
        """The down-sampling half for some frames and a window of them.

        Args:
            pixels: [T, 3, H, W] around [-1, 1], whole frames; the first alone, then any number whose halves
                are whole frames.
            window: in cells of the latent.
            memory: of the frames before, of this window.

        Returns:
            [T', h, w, C] at the latent's resolution.
        """
        first = not memory
        height = pixels.shape[2] // self.patch
        width = pixels.shape[3] // self.patch
        needs = needed(self.stages, window, height, width)
        here = needs[0][0].grown(1, height, width)
        parts = self._taken_in(pixels, here, memory)
        for stage, (before, last, after) in zip(self.stages, needs, strict=True):
            parts, here = cut_to(parts, here, before)
            skipped = None
            if stage.shortcut is not None:
                whole = self._total(parts)
                parts = Sum(whole)
                skipped = _averaged(stage, _inner(whole, here, after, stage), first)
            for resnet in stage.resnets:
                parts = self._residual(resnet, parts, memory)
            parts, here = cut_to(parts, here, last)
            if stage.halving is not None:
                parts = self._halved(stage.halving, parts, after, memory, first)
                here = after
            if skipped is not None:
                parts = Sum(self._total(parts), None, skipped)
        return self._total(parts)

    def lower(self, x: Tensor, memory: ConvCache) -> Tensor:
        """[T, h, w, C] of `upper`, whole frames -> the latent's mean [T, h, w, z], frames after those in
        `memory`.
        """
        parts = self._middle(self.net.mid_block, Sum(x), memory)
        seen = self._normed(self.net.norm_out, self.net.conv_out, parts, None, memory)
        x = self._convolved(self.net.conv_out, seen, memory) + self.net.conv_out.bias
        return F.linear(x, *self._mean)

    # -- layers of its own

    def _taken_in(self, pixels: Tensor, window: TileRect, memory: ConvCache) -> Sum:
        """The first convolution, over a window in cells of the first stage."""
        top, bottom, left, right = window.times(self.patch)
        x = _patched(pixels[..., top:bottom, left:right], self.patch)
        conv = self.net.conv_in
        channels = x.shape[-1]
        missing = -channels % _ALIGNED if x.is_cuda and not self._border(conv) else 0
        seen = self._seen(conv, (*x.shape[:3], channels + missing), x, memory)
        new = self._new(conv, seen)
        new[..., :channels] = x
        new[..., channels:] = 0
        if missing and "conv_in" not in self._weights:
            self._weights["conv_in"] = self._laid_out(F.pad(conv.weight, (0, 0) * 3 + (0, missing)))
        return Sum(self._convolved(conv, seen, memory), conv.bias)

    def _strided_weight(self, conv: Any) -> Tensor:
        name = self._names[conv]
        if name not in self._weights:
            self._weights[name] = conv.weight.contiguous(memory_format=torch.channels_last)
        return self._weights[name]

    def _halved(self, layer: Any, parts: Sum, window: TileRect, memory: ConvCache, first: bool) -> Sum:
        """Half the rows and columns, and half the frames where the layer says so.

        Args:
            window: what comes out, in its own cells.
        """
        frames, height, width, channels = parts.shape
        rows = 2 * (window.bottom - window.top) + 1
        columns = 2 * (window.right - window.left) + 1
        seen = parts.value.new_empty(frames, rows, columns, channels)
        seen[:, height:] = 0  # beyond the frame, on these two sides alone
        seen[:, :, width:] = 0
        self._add_up(parts, seen[:, :height, :width])
        parts.release()
        conv = layer.resample[1]
        x = F.conv2d(seen.permute(0, 3, 1, 2), self._strided_weight(conv), stride=2).permute(0, 2, 3, 1)
        if layer.mode == "downsample2d":
            return Sum(x.contiguous(), conv.bias)
        x = (x + conv.bias).contiguous()
        name = self._names[layer.time_conv]
        before = memory.get(name)
        memory[name] = x[-1:].clone()
        if first or before is None:  # stands alone
            return Sum(x)
        x = torch.cat([before, x])
        weight = layer.time_conv.weight[..., 0, 0]  # [C', C, 3], two frames a step
        x = torch.cat([x[:-2:2], x[1:-1:2], x[2::2]], dim=-1)
        return Sum(F.linear(x, weight.transpose(1, 2).flatten(1)), layer.time_conv.bias)


def needed(
    stages: list[Stage], window: TileRect, height: int, width: int
) -> list[tuple[TileRect, TileRect, TileRect]]:
    """(what goes into, what its last residual block gives, what comes out) of each stage, each in its own
    cells, for a window of the latent.

    Args:
        height, width: of the frame in cells of the first stage.
    """
    sizes = []
    for stage in stages:
        sizes.append((height, width))
        if stage.halving is not None:
            height //= 2
            width //= 2
    found: list[tuple[TileRect, TileRect, TileRect]] = []
    for stage, size in zip(reversed(stages), reversed(sizes), strict=True):
        last, before = stage.seen(window, *size)
        found.insert(0, (before, last, window))
        window = before
    return found


def encode_bytes(
    network: Any, ways: VaeOptions, frame: TileRect, window: TileRect, frames: int, frames_per_call: int
) -> int:
    """Bytes at the worst moment of encoding one clip: activations, and the laid out copy of the weights.

    Args:
        network: diffusers' `AutoencoderKLWan`.
        ways: how it is computed. What cuDNN takes besides is not known here.
        frame, window: the whole frame and what is encoded at once, in latent cells.
        frames: of the latent.
        frames_per_call: of the video.
    """
    encoder = network.encoder
    stages = stages_of(encoder)
    item = network.quant_conv.weight.dtype.itemsize
    widest = encoder.conv_out.in_channels
    factor = 2 ** sum(stage.halving is not None for stage in stages)
    whole = frame.times(factor)
    worst = 6 * min(frames, 16) * frame.cells * widest * item
    remembered = 0
    batch = frames_per_call
    maps = (4 * item + 2 * max(item, 4) * (ways.norm == "torch")) // item
    for stage, (before, _, _) in zip(stages, needed(stages, window, whole.bottom, whole.right), strict=True):
        area = before.cells * item
        into = stage.resnets[0].conv1.in_channels
        out = stage.resnets[0].conv1.out_channels
        remembered += REMEMBERED * area * (into + (2 * len(stage.resnets) - 1) * out)
        held = maps + 2 * (stage.shortcut is not None)
        worst = max(worst, remembered + held * max(into, out) * (batch + 1) * area)
        if stage.halving is not None and stage.halving.mode == "downsample3d":
            batch = -(-batch // 2)
    features = 2 * frames * frame.cells * widest * item
    copies = sum(weight.numel() for weight in encoder.parameters()) * item
    return int(features + worst + copies)


def _inner(x: Tensor, here: TileRect, after: TileRect, stage: Stage) -> Tensor:
    """Of x, which covers `here`, the cells that a window of what comes out is the average of."""
    there = after if stage.halving is None else after.times(2)
    return cut_to(Sum(x), here, there)[0].value


def _averaged(stage: Stage, x: Tensor, first: bool) -> Tensor:
    """diffusers' `AvgDown3D`, [T, H, W, C] -> [T', h, w, C']: groups of neighbours' channels, averaged;
    before the first frame is nothing.
    """
    time = stage.shortcut.factor_t
    space = stage.shortcut.factor_s
    if first and time > 1:
        x = torch.cat([x.new_zeros(time - 1, *x.shape[1:]), x])
    x = x.unflatten(2, (-1, space)).unflatten(1, (-1, space)).unflatten(0, (-1, time))
    x = x.permute(0, 2, 4, 6, 1, 3, 5)  # [T', h, w, C, t, row, column]
    return x.flatten(3).unflatten(-1, (-1, stage.shortcut.group_size)).mean(dim=-1)


def _patched(x: Tensor, patch: int) -> Tensor:
    """[T, C, patch H, patch W] -> [T, H, W, C patch patch]; of a pixel's channels the column runs before the
    row.
    """
    x = x.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [T, C, H, row, W, column]
    return x.permute(0, 2, 4, 1, 5, 3).flatten(3)
