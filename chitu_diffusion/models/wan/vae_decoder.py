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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResidualUpBlock
from torch import Tensor, nn

from chitu_diffusion.ops.vae_conv import (
    CONVOLUTIONS,
    NORMS,
    phased_weight,
    upsample_nearest,
    upsample_phased,
    weight_for,
)
from chitu_diffusion.ops.vae_conv_gemm import flat_conv, flat_weight, suits_flat
from chitu_diffusion.ops.vae_norm_triton import has_triton
from chitu_diffusion.ops.vae_sum import Sum

_REMEMBERED = 2  # frames that a causal convolution of length 3 in time needs from before
_WIDEST_HEAD = 256  # channels a head, up to which attention kernels are made for

ConvCache = dict[str, Tensor]
"""The last two frames that each causal convolution saw, [2, H, W, C]; empty before the first frame."""


@dataclass(frozen=True)
class DecodeOptions:
    """How to compute what; every choice gives the same video up to rounding.

    Attributes:
        norm: "torch", or "triton" (one pass).
        convolution: a key of `vae_kernels.CONVOLUTIONS`, or "flat" (`vae_flat` where it suits, conv3d
            elsewhere).
        upsample: "phased" (a 2 x 2 convolution at the low resolution), or "nearest" (3 x 3 at the high one).
        attention: "sdpa", or "product" (float32 logits written out; one frame at a time).
        search: let cuDNN time its kernels for each new shape, in the decode alone. The first decode of a
            shape takes longer, and two processes may choose differently, which shows in the last bits.
    """

    norm: str = "torch"
    convolution: str = "frames"
    upsample: str = "phased"
    attention: str = "sdpa"
    search: bool = False

    def __post_init__(self) -> None:
        assert self.norm in NORMS and self.convolution in (*CONVOLUTIONS, "flat"), self
        assert self.upsample in ("phased", "nearest") and self.attention in ("sdpa", "product"), self


def best_options(device: torch.device, channels: int) -> DecodeOptions:
    """The fastest measured choices.

    On a CPU, convolutions in two dimensions are several times faster than in three. On an H200, 96 channels
    widened to 128 take 0.58 s a video of 832x480x81 (with search), conv3d as it is 0.62 s with search and
    without it.
    """
    if device.type != "cuda":
        return DecodeOptions()
    attention = "product" if channels > _WIDEST_HEAD else "sdpa"
    return DecodeOptions(
        "triton" if has_triton(device) else "torch", "widened", "phased", attention, search=False
    )


class TileRect(NamedTuple):
    """A rectangle of a frame, in cells of some resolution; ends are exclusive."""

    top: int
    bottom: int
    left: int
    right: int

    def grown(self, by: int, height: int, width: int) -> TileRect:
        """With `by` more cells on every side, clipped at the frame."""
        top = max(self.top - by, 0)
        left = max(self.left - by, 0)
        return TileRect(top, min(self.bottom + by, height), left, min(self.right + by, width))

    @property
    def cells(self) -> int:
        """How many."""
        return (self.bottom - self.top) * (self.right - self.left)

    def times(self, factor: int) -> TileRect:
        """The same at another resolution."""
        return TileRect(*(factor * edge for edge in self))


class Decoder:
    """diffusers' decoder, read once: its weights are laid out for the kernels and kept as long as this
    object.

    Args:
        network: diffusers' `AutoencoderKLWan`.
        ways: how to compute.
    """

    def __init__(self, network: Any, ways: DecodeOptions) -> None:
        self.net = network.decoder
        self.ways = ways
        self.patch = int(network.config.patch_size or 1)
        self._norm_silu, self._add_up = NORMS[ways.norm]
        self._plain = "conv3d" if ways.convolution == "flat" else ways.convolution
        self._convolve = CONVOLUTIONS[self._plain]
        self._weights: dict[str, Tensor] = {}
        self._names = {module: name for name, module in self.net.named_modules()}
        self.reaches = reaches(self.net)

    # -- halves

    def lower(self, x: Tensor, memory: ConvCache) -> Tensor:
        """[T, H, W, z] -> [T, H, W, C] at the latent's resolution, frames after those in `memory`."""
        seen = self._seen(self.net.conv_in, x.shape, x, memory)
        self._new(self.net.conv_in, seen).copy_(x)
        parts = Sum(self._convolved(self.net.conv_in, seen, memory), self.net.conv_in.bias)
        middle = self.net.mid_block
        parts = self._residual(middle.resnets[0], parts, memory)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            parts = self._residual(resnet, self._attended(attention, self._total(parts)), memory)
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
            parts, here = _cut(parts, here, window.grown(reach, height, width))
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
        parts, here = _cut(parts, here, window.grown(last_reach, height, width))
        seen = self._normed(self.net.norm_out, self.net.conv_out, parts, None, memory)
        last = Sum(self._convolved(self.net.conv_out, seen, memory))
        pixels = _cut(last, here, window)[0].value + self.net.conv_out.bias
        return _unpatched(pixels, self.patch)

    # -- layers

    def _residual(self, block: Any, parts: Sum, memory: ConvCache) -> Sum:
        total = parts.value.new_empty(parts.shape)
        seen = self._normed(block.norm1, block.conv1, parts, total, memory)
        parts = Sum(self._convolved(block.conv1, seen, memory), block.conv1.bias)
        del seen
        seen = self._normed(block.norm2, block.conv2, parts, None, memory)
        value = self._convolved(block.conv2, seen, memory)
        if not isinstance(block.conv_shortcut, nn.Identity):
            shortcut = block.conv_shortcut
            total = F.linear(total, shortcut.weight.flatten(1), shortcut.bias)
        return Sum(value, block.conv2.bias, total)

    def _attended(self, block: Any, x: Tensor) -> Sum:
        channels = x.shape[-1]
        wide = x.float() if x.dtype.itemsize < 4 else x
        normed = (F.normalize(wide, dim=-1) * (block.norm.gamma.flatten() * channels**0.5)).to(x.dtype)
        qkv = F.linear(normed.flatten(1, 2), block.to_qkv.weight.flatten(1), block.to_qkv.bias)
        query, key, value = qkv.chunk(3, dim=-1)  # [T, H W, C]
        if self.ways.attention == "product":
            found = torch.stack([_attention(*frame) for frame in zip(query, key, value, strict=True)])
        else:
            found = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        return Sum(F.linear(found, block.proj.weight.flatten(1), block.proj.bias).view_as(x), None, x)

    def _upsampled(self, layer: Any, parts: Sum, memory: ConvCache, first: bool) -> Sum:
        x = (
            self._total(parts)
            if layer.mode == "upsample2d" or first
            else self._doubled(layer.time_conv, parts, memory)
        )
        if first and layer.mode == "upsample3d":
            # the first frame is neither doubled nor remembered
            memory[self._names[layer.time_conv]] = x.new_zeros(_REMEMBERED, *x.shape[1:])
        conv = layer.resample[1]
        upsample = upsample_phased if self.ways.upsample == "phased" else upsample_nearest
        return upsample(x, self._weight(conv), conv.bias)

    def _doubled(self, conv: Any, parts: Sum, memory: ConvCache) -> Tensor:
        """Twice the frames: a frame's channels become those of two."""
        seen = self._seen(conv, parts.shape, parts.value, memory)
        self._add_up(parts, seen[_REMEMBERED:])
        parts.release()
        # [T, 2, H, W, C]
        pairs = self._convolved(conv, seen, memory).unflatten(-1, (2, -1)).permute(0, 3, 1, 2, 4)
        frames = pairs.new_empty(pairs.shape)
        return torch.add(pairs, conv.bias.view(2, 1, 1, -1), out=frames).flatten(0, 1)

    # -- their parts

    def _normed(
        self, norm: Any, conv: nn.Module, parts: Sum, total: Tensor | None, memory: ConvCache
    ) -> Tensor:
        """What `conv` sees of the normalised sum: the frames that it remembers, then the new ones."""
        seen = self._seen(conv, parts.shape, parts.value, memory)
        self._norm_silu(parts, norm.gamma.flatten(), self._new(conv, seen), total)
        parts.release()
        return seen

    def _seen(self, conv: nn.Module, shape: tuple[int, ...], like: Tensor, memory: ConvCache) -> Tensor:
        """A convolution's input: the remembered frames in their place, the new ones yet to be written."""
        frames, height, width, channels = shape
        border = self._border(conv)
        seen = like.new_empty(_REMEMBERED + frames, height + 2 * border, width + 2 * border, channels)
        if border:
            seen[:, 0] = 0
            seen[:, -1] = 0
            seen[:, :, 0] = 0
            seen[:, :, -1] = 0
        before = memory.get(self._names[conv])
        seen[:_REMEMBERED] = 0 if before is None else before
        return seen

    def _new(self, conv: nn.Module, seen: Tensor) -> Tensor:
        """Where the new frames go, [T, H, W, C]."""
        return seen[_REMEMBERED:, 1:-1, 1:-1] if self._border(conv) else seen[_REMEMBERED:]

    def _border(self, conv: Any) -> int:
        """1 for convolutions that `flat_conv` takes, which needs a border of zeros; 0 for others."""
        weight = conv.weight
        # its kernel would round float32 to TF32
        flat = self.ways.convolution == "flat" and (weight.dtype.itemsize == 2 or not weight.is_cuda)
        return int(flat and suits_flat(weight))

    def _convolved(self, conv: nn.Module, seen: Tensor, memory: ConvCache) -> Tensor:
        memory[self._names[conv]] = seen[-_REMEMBERED:].clone()
        if self._border(conv):
            return flat_conv(seen, self._weight(conv), on_gpu=self.ways.norm == "triton")
        return self._convolve(seen, self._weight(conv))

    def _total(self, parts: Sum) -> Tensor:
        if parts.bias is None and parts.residual is None and not parts.phased:
            return parts.value.contiguous()
        total = parts.value.new_empty(parts.shape)
        self._add_up(parts, total)
        parts.release()
        return total

    def _weight(self, conv: Any) -> Tensor:
        name = self._names[conv]
        if name not in self._weights:
            weight = conv.weight
            if self._border(conv):
                self._weights[name] = flat_weight(weight)
            elif weight.ndim == 5:
                self._weights[name] = weight_for(self._plain, weight)
            elif self.ways.upsample == "phased":
                self._weights[name] = phased_weight(weight)
            else:
                self._weights[name] = weight.contiguous(memory_format=torch.channels_last)
        return self._weights[name]


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


def spans(frames: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each call over latent frames: the first alone, then parts of at most `most`, even."""
    yield 0, 1
    rest = frames - 1
    if rest:
        calls = -(-rest // most)
        size = -(-rest // calls)
        for start in range(1, frames, size):
            yield start, min(start + size, frames)


def decode_bytes(
    network: Any, ways: DecodeOptions, frames: int, frame: TileRect, window: TileRect, frames_per_call: int
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
        remembered += _REMEMBERED * area * (into + (2 * len(block.resnets) - 1) * out)
        # at once: a sum's value and residual, the sum itself, and what the next convolution sees of it
        maps = (4 * item + 2 * max(item, 4) * (ways.norm == "torch")) // item
        # a shortcut's input stays until the end of the stage, and fills the larger frames beside its result
        entering = 0 if shortcut_of(block) is None else batch * area * into
        worst = max(worst, remembered + entering + maps * max(into, out) * (batch + 1) * area)
        upsampler = upsampler_of(block)
        if upsampler is not None:
            if upsampler.mode == "upsample3d":
                remembered += _REMEMBERED * area * out
                worst = max(worst, remembered + entering + 6 * batch * area * out)
                batch *= 2
            larger = 4 * batch * area * upsampler.resample[1].out_channels
            repeated = larger if entering else 0
            worst = max(worst, remembered + entering + 2 * batch * area * out + larger + repeated)
            window = window.times(2)
            height = 2 * height
            width = 2 * width
    last = window.grown(last_reach, height, width).cells
    remembered += _REMEMBERED * last * decoder.conv_out.in_channels * item
    pixels = 2 * batch * last * decoder.conv_out.out_channels * item
    worst = max(worst, remembered + 3 * (batch + 1) * last * decoder.conv_out.in_channels * item)
    # nearly; phased weights are larger
    copies = 2 * sum(weight.numel() for weight in decoder.parameters()) * item
    return int(features + worst + pixels + copies)


@contextmanager
def searching_kernels(on: bool) -> Iterator[None]:
    """cuDNN's search on for the time of the block, other settings as they are."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one frame and one head, each [N, C]; logits and softmax in float32 and written out."""
    if query.is_cuda and query.dtype.itemsize < 4:
        logits = torch.mm(query, key.T, out_dtype=torch.float32)
    else:
        logits = query.float() @ key.float().T
    return logits.mul_(query.shape[-1] ** -0.5).softmax(dim=-1).to(value.dtype) @ value


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


def _cut(parts: Sum, here: TileRect, there: TileRect) -> tuple[Sum, TileRect]:
    """Of a sum that covers the window `here`, what lies in `there`; and `there`."""
    if here == there:
        return parts, there
    top = there.top - here.top
    left = there.left - here.left
    return parts.cut(top, left, there.bottom - there.top, there.right - there.left), there


def _unpatched(x: Tensor, patch: int) -> Tensor:
    """[T, H, W, C patch patch] -> [T, C, patch H, patch W]; of a pixel's channels the column runs before the
    row.
    """
    x = x.unflatten(-1, (-1, patch, patch)).permute(0, 3, 1, 5, 2, 4)  # [T, C, H, row, W, column]
    return x.flatten(4, 5).flatten(2, 3)
