"""The layers that the two halves of Wan's video autoencoder share, run over the weights of diffusers'
`AutoencoderKLWan`: causal convolutions that remember two frames, norms, residual blocks, attention. Knows
neither half.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from chitu_diffusion.ops.vae_conv import CONVOLUTIONS, NORMS, phased_weight, weight_for
from chitu_diffusion.ops.vae_conv_gemm import flat_conv, flat_weight, suits_flat
from chitu_diffusion.ops.vae_norm_triton import has_triton
from chitu_diffusion.ops.vae_sum import Sum

REMEMBERED = 2  # frames that a causal convolution of length 3 in time needs from before
_WIDEST_HEAD = 256  # channels a head, up to which attention kernels are made for

ConvCache = dict[str, Tensor]
"""The last two frames that each causal convolution saw, [2, H, W, C]; empty before the first frame."""


@dataclass(frozen=True)
class VaeOptions:
    """How to compute what; every choice gives the same video up to rounding.

    Attributes:
        norm: "torch", or "triton" (one pass).
        convolution: a key of `ops.vae_conv.CONVOLUTIONS`, or "flat" (`vae_conv_gemm` where it suits, conv3d
            elsewhere).
        upsample: "phased" (a 2 x 2 convolution at the low resolution), or "nearest" (3 x 3 at the high one).
        attention: "sdpa", or "product" (float32 logits written out; one frame at a time).
        search: let cuDNN time its kernels for each new shape, in this work alone. The first run of a
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


def best_options(device: torch.device, channels: int) -> VaeOptions:
    """The fastest measured choices.

    On a CPU, convolutions in two dimensions are several times faster than in three. On an H200, 96 channels
    widened to 128 take 0.58 s a video of 832x480x81 (with search), conv3d as it is 0.62 s with search and
    without it.
    """
    if device.type != "cuda":
        return VaeOptions()
    attention = "product" if channels > _WIDEST_HEAD else "sdpa"
    return VaeOptions(
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


class VaeLayers:
    """One half of diffusers' VAE, read once: its weights are laid out for the kernels and kept as long as
    this object.

    Args:
        half: diffusers' encoder or decoder.
        ways: how to compute.
    """

    def __init__(self, half: Any, ways: VaeOptions) -> None:
        self.net = half
        self.ways = ways
        self._norm_silu, self._add_up = NORMS[ways.norm]
        self._plain = "conv3d" if ways.convolution == "flat" else ways.convolution
        self._convolve = CONVOLUTIONS[self._plain]
        self._weights: dict[str, Tensor] = {}
        self._names = {module: name for name, module in self.net.named_modules()}

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

    def _middle(self, block: Any, parts: Sum, memory: ConvCache) -> Sum:
        """The middle block, which looks at whole frames."""
        parts = self._residual(block.resnets[0], parts, memory)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            parts = self._residual(resnet, self._attended(attention, self._total(parts)), memory)
        return parts

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
        seen = like.new_empty(REMEMBERED + frames, height + 2 * border, width + 2 * border, channels)
        if border:
            seen[:, 0] = 0
            seen[:, -1] = 0
            seen[:, :, 0] = 0
            seen[:, :, -1] = 0
        before = memory.get(self._names[conv])
        seen[:REMEMBERED] = 0 if before is None else before
        return seen

    def _new(self, conv: nn.Module, seen: Tensor) -> Tensor:
        """Where the new frames go, [T, H, W, C]."""
        return seen[REMEMBERED:, 1:-1, 1:-1] if self._border(conv) else seen[REMEMBERED:]

    def _border(self, conv: Any) -> int:
        """1 for convolutions that `flat_conv` takes, which needs a border of zeros; 0 for others."""
        weight = conv.weight
        # its kernel would round float32 to TF32
        flat = self.ways.convolution == "flat" and (weight.dtype.itemsize == 2 or not weight.is_cuda)
        return int(flat and suits_flat(weight))

    def _convolved(self, conv: nn.Module, seen: Tensor, memory: ConvCache) -> Tensor:
        memory[self._names[conv]] = seen[-REMEMBERED:].clone()
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
        """A convolution's weight, laid out for the way it is computed in."""
        name = self._names[conv]
        if name not in self._weights:
            if self._border(conv):
                self._weights[name] = flat_weight(conv.weight)
            elif conv.weight.ndim == 5:
                self._weights[name] = self._laid_out(conv.weight)
            elif self.ways.upsample == "phased":
                self._weights[name] = phased_weight(conv.weight)
            else:
                self._weights[name] = conv.weight.contiguous(memory_format=torch.channels_last)
        return self._weights[name]

    def _laid_out(self, weight: Tensor) -> Tensor:
        return weight_for(self._plain, weight)


def spans(frames: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, end) of each call over latent frames: the first alone, then parts of at most `most`, even."""
    yield 0, 1
    rest = frames - 1
    if rest:
        calls = -(-rest // most)
        size = -(-rest // calls)
        for start in range(1, frames, size):
            yield start, min(start + size, frames)


@contextmanager
def searching_kernels(on: bool) -> Iterator[None]:
    """cuDNN's search on for the time of the block, other settings as they are."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def cut_to(parts: Sum, here: TileRect, there: TileRect) -> tuple[Sum, TileRect]:
    """Of a sum that covers the window `here`, what lies in `there`; and `there`."""
    if here == there:
        return parts, there
    top = there.top - here.top
    left = there.left - here.left
    return parts.cut(top, left, there.bottom - there.top, there.right - there.left), there


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one frame and one head, each [N, C]; logits and softmax in float32 and written out."""
    if query.is_cuda and query.dtype.itemsize < 4:
        logits = torch.mm(query, key.T, out_dtype=torch.float32)
    else:
        logits = query.float() @ key.float().T
    return logits.mul_(query.shape[-1] ** -0.5).softmax(dim=-1).to(value.dtype) @ value
