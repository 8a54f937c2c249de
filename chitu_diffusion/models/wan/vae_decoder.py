"""Wan's video decoder (arXiv 2503.20314, section 4.1), run over the weights of diffusers' `AutoencoderKLWan`.

The network has two halves. At the latent's resolution stand the only parts that look at a whole frame (the
middle block's attention); they are cheap. The up-sampling half is convolutions alone and takes nearly all
time and memory: it can be run for a window of the frame, with just the neighbours that still matter at each
stage, and for some frames at a time, with the last two frames that each causal convolution saw. Wan2.2's
decoder adds to each stage's result its input, with every number repeated to fill the larger frames.

The same function as diffusers' frame by frame walk: a causal convolution over several frames sees what it
would see over one after the other, and the first frame, which is not doubled in time, is walked alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualUpBlock
from torch import Tensor

from chitu_diffusion.models.wan.vae_layers import (
    REMEMBERED,
    ConvCache,
    TileRect,
    VaeLayers,
    VaeOptions,
    cut_to,
)
from chitu_diffusion.ops.vae_conv import upsample_nearest, upsample_phased
from chitu_diffusion.ops.vae_sum import Sum


class Decoder(VaeLayers):
    """diffusers' decoder, see `VaeLayers`.

    Args:
        network: diffusers' `AutoencoderKLWan`.
        ways: how to compute.
    """

    def __init__(self, network: Any, ways: VaeOptions) -> None:
        super().__init__(network.decoder, ways)
        self.patch = int(network.config.patch_size or 1)
        self.reaches = reaches(self.net)

    # -- halves

    def lower(self, x: Tensor, memory: ConvCache) -> Tensor:
        """[T, H, W, z] -> [T, H, W, C] at the latent's resolution, frames after those in `memory`."""
        seen = self._seen(self.net.conv_in, x.shape, x, memory)
        self._new(self.net.conv_in, seen).copy_(x)
        parts = Sum(self._convolved(self.net.conv_in, seen, memory), self.net.conv_in.bias)
        parts = self._middle(self.net.mid_block, parts, memory)
        return self._total(parts)

    def upper(self, x: Tensor, window: TileRect, memory: ConvCache) -> Tensor:
        """The up-sampling half for some frames and a window of them.

        Args:
            x: [T, H, W, C] of `lower`, whole frames; alone the first frame, or any number of later ones.
            window: in cells of x.
            memory: of the frames before, of this window.

        Returns:
            Pixels [4 T or 1, 3, 8 h, 8 w] around [-1, 1], a view of no particular strides.
        """
        first = not memory
        here = TileRect(0, x.shape[1], 0, x.shape[2])
        (height, width) = x.shape[1:3]
        parts = Sum(x)
        *block_reaches, last_reach = self.reaches
        for block, reach in zip(self.net.up_blocks, block_reaches, strict=True):
            parts, here = cut_to(parts, here, window.grown(reach, height, width))
            shortcut = shortcut_of(block)
            entering = None if shortcut is None else self._total(parts)
            parts = parts if entering is None else Sum(entering)
            for resnet in block.resnets:
                parts = self._residual(resnet, parts, memory)
            upsampler = upsampler_of(block)
            if upsampler is not None:
                parts = self._upsampled(upsampler, parts, memory, first)
                if entering is not None:
                    parts = replace(parts, residual=_repeated(entering, shortcut, first))
                here = here.times(2)
                window = window.times(2)
                height = 2 * height
                width = 2 * width
        parts, here = cut_to(parts, here, window.grown(last_reach, height, width))
        seen = self._normed(self.net.norm_out, self.net.conv_out, parts, None, memory)
        last = Sum(self._convolved(self.net.conv_out, seen, memory))
        pixels = cut_to(last, here, window)[0].value + self.net.conv_out.bias
        return _unpatched(pixels, self.patch)

    # -- its own layer

    def _upsampled(self, layer: Any, parts: Sum, memory: ConvCache, first: bool) -> Sum:
        x = (
            self._total(parts)
            if layer.mode == "upsample2d" or first
            else self._doubled(layer.time_conv, parts, memory)
        )
        if first and layer.mode == "upsample3d":
            # the first frame is neither doubled nor remembered
            memory[self._names[layer.time_conv]] = x.new_zeros(REMEMBERED, *x.shape[1:])
        conv = layer.resample[1]
        upsample = upsample_phased if self.ways.upsample == "phased" else upsample_nearest
        return upsample(x, self._weight(conv), conv.bias)

    def _doubled(self, conv: Any, parts: Sum, memory: ConvCache) -> Tensor:
        """Twice the frames: a frame's channels become those of two."""
        seen = self._seen(conv, parts.shape, parts.value, memory)
        self._add_up(parts, seen[REMEMBERED:])
        parts.release()
        # [T, 2, H, W, C]
        pairs = self._convolved(conv, seen, memory).unflatten(-1, (2, -1)).permute(0, 3, 1, 2, 4)
        frames = pairs.new_empty(pairs.shape)
        return torch.add(pairs, conv.bias.view(2, 1, 1, -1), out=frames).flatten(0, 1)


def upsampler_of(block: Any) -> Any | None:
    """What makes a stage's result larger; the last stage has none."""
    if isinstance(block, WanResidualUpBlock):
        return block.upsampler
    return None if block.upsamplers is None else block.upsamplers[0]


def shortcut_of(block: Any) -> Any | None:
    """diffusers' `DupUp3D` around a stage of Wan2.2's decoder."""
    return block.avg_shortcut if isinstance(block, WanResidualUpBlock) else None


def reaches(decoder: Any) -> list[int]:
    """Cells beyond an edge that the result needs: at each block's entrance, before the last convolution."""
    found = [1]
    for block in reversed(decoder.up_blocks):
        # the upsampler's convolution at twice the resolution, then two convolutions in each residual block
        after = found[0] if upsampler_of(block) is None else (found[0] + 2) // 2
        found.insert(0, after + 2 * len(block.resnets))
    return found


def decode_bytes(
    network: Any, ways: VaeOptions, frames: int, frame: TileRect, window: TileRect, frames_per_call: int
) -> int:
    """Bytes at the worst moment of decoding one clip: activations, and the laid out copy of the weights.

    Args:
        network: diffusers' `AutoencoderKLWan`.
        ways: how it is computed. What cuDNN takes besides is not known here.
        frames: of the latent.
        frame, window: the whole frame and what is decoded at once, in latent cells.
        frames_per_call: latent frames a call.
    """
    decoder = network.decoder
    item = network.post_quant_conv.weight.dtype.itemsize
    _, height, _, width = frame
    batch = min(frames_per_call, max(frames - 1, 1))
    cells = height * width
    widest = decoder.conv_in.out_channels
    features = 2 * frames * cells * widest * item  # what the lower half leaves, in parts and joined
    worst = features + 4 * min(frames, 16) * cells * widest * item
    remembered = 0
    *block_reaches, last_reach = reaches(decoder)
    for block, reach in zip(decoder.up_blocks, block_reaches, strict=True):
        area = window.grown(reach, height, width).cells * item
        into = block.resnets[0].conv1.in_channels
        out = block.resnets[0].conv1.out_channels
        remembered += REMEMBERED * area * (into + (2 * len(block.resnets) - 1) * out)
        # at once: a sum's value and residual, the sum itself, and what the next convolution sees of it
        maps = (4 * item + 2 * max(item, 4) * (ways.norm == "torch")) // item
        # a shortcut's input stays until the end of the stage, and fills the larger frames beside its result
        entering = 0 if shortcut_of(block) is None else batch * area * into
        worst = max(worst, remembered + entering + maps * max(into, out) * (batch + 1) * area)
        upsampler = upsampler_of(block)
        if upsampler is not None:
            if upsampler.mode == "upsample3d":
                remembered += REMEMBERED * area * out
                worst = max(worst, remembered + entering + 6 * batch * area * out)
                batch *= 2
            larger = 4 * batch * area * upsampler.resample[1].out_channels
            repeated = larger if entering else 0
            worst = max(worst, remembered + entering + 2 * batch * area * out + larger + repeated)
            window = window.times(2)
            height = 2 * height
            width = 2 * width
    last = window.grown(last_reach, height, width).cells
    remembered += REMEMBERED * last * decoder.conv_out.in_channels * item
    pixels = 2 * batch * last * decoder.conv_out.out_channels * item
    worst = max(worst, remembered + 3 * (batch + 1) * last * decoder.conv_out.in_channels * item)
    # nearly; phased weights are larger
    copies = 2 * sum(weight.numel() for weight in decoder.parameters()) * item
    return int(features + worst + pixels + copies)


def _repeated(x: Tensor, shortcut: Any, first: bool) -> Tensor:
    """What a shortcut makes of a stage's input [T, H, W, C]: [t T, s H, s W, C'], each number as often as the
    larger frames have room for it. The first frame is not doubled.
    """
    time = shortcut.factor_t
    space = shortcut.factor_s
    numbers = x[..., None].expand(*x.shape, shortcut.repeats)
    numbers = numbers.reshape(*x.shape[:3], shortcut.out_channels, time, space, space)
    if first:
        numbers = numbers[..., -1:, :, :]
    return numbers.permute(0, 4, 1, 5, 2, 6, 3).flatten(4, 5).flatten(2, 3).flatten(0, 1)


def _unpatched(x: Tensor, patch: int) -> Tensor:
    """[T, H, W, C patch patch] -> [T, C, patch H, patch W]; of a pixel's channels the column runs before the
    row.
    """
    x = x.unflatten(-1, (-1, patch, patch)).permute(0, 3, 1, 5, 2, 4)  # [T, C, H, row, W, column]
    return x.flatten(4, 5).flatten(2, 3)
