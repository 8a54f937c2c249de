"""What the video decoder computes with: "add up, normalise, SiLU" in one pass, and causal convolutions, each
in several ways.

Activations are frames with channels last, [T, H, W, C], contiguous. A convolution's result is not finished by
a pass of its own: its bias and its residual wait in a `Sum` until the next norm, which reads everything once
and writes the next convolution's input straight where that convolution reads it. Knows no layer of the
network.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from chitu_diffusion.ops.vae_norm_triton import triton_add_up, triton_norm_silu
from chitu_diffusion.ops.vae_sum import Sum

_TILE = 128
_SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's, which diffusers calls


# -- add up, normalise, SiLU

AddUp = Callable[[Sum, Tensor], None]
NormSilu = Callable[[Sum, Tensor, Tensor, Tensor | None], None]


def torch_add_up(parts: Sum, out: Tensor) -> None:
    """Writes the sum into `out`, [T, H, W, C]."""
    out.copy_(_added(parts, out.dtype))


def torch_norm_silu(parts: Sum, gamma: Tensor, out: Tensor, total: Tensor | None) -> None:
    """Writes silu(sum / |sum| sqrt(C) gamma) into `out`, [T, H, W, C], the norm being over channels.

    Args:
        parts: the sum.
        gamma: [C].
        out: where to; may be a part of a larger buffer.
        total: where the sum itself goes, or None.
    """
    x = _added(parts, torch.float32 if gamma.dtype.itemsize < 4 else gamma.dtype)
    if total is not None:
        total.copy_(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min_(_SMALLEST_NORM)
    x = (x / length).mul_(gamma.to(x.dtype) * x.shape[-1] ** 0.5)
    out.copy_(F.silu(x, inplace=True))


def _added(parts: Sum, dtype: torch.dtype) -> Tensor:
    x = _pixels(parts) if parts.phased else parts.value
    x = x.to(dtype)
    if parts.bias is not None:
        x = x + parts.bias.to(dtype)
    return x if parts.residual is None else x + parts.residual.to(dtype)


def _pixels(parts: Sum) -> Tensor:
    """The phases of a sum put side by side: [T, H, W, C]."""
    frames, rows, columns, channels = parts.value.shape
    phases = parts.value.unflatten(-1, (2, 2, -1))  # [T, H/2 + 1, W/2 + 1, y%2, x%2, C]
    whole = parts.value.new_empty(frames, rows - 1, 2, columns - 1, 2, channels // 4)
    for y in (0, 1):
        for x in (0, 1):
            whole[:, :, y, :, x] = phases[:, y : rows - 1 + y, x : columns - 1 + x, y, x]
    top, left, height, width = parts.window
    return whole.flatten(3, 4).flatten(1, 2)[:, top : top + height, left : left + width]


NORMS: dict[str, tuple[NormSilu, AddUp]] = {
    "torch": (torch_norm_silu, torch_add_up),
    "triton": (triton_norm_silu, triton_add_up),
}

# -- causal convolutions, without bias: ([kt - 1 + T, H, W, C], [C', C, kt, kh, kw]) -> [T, H, W, C'];
#    zeros around the frame, nothing before the first frame given

Convolution = Callable[[Tensor, Tensor], Tensor]


def conv3d(x: Tensor, weight: Tensor) -> Tensor:
    """The library's own convolution in three dimensions."""
    y = F.conv3d(x.permute(3, 0, 1, 2)[None], weight, padding=(0, weight.shape[3] // 2, weight.shape[4] // 2))
    return y[0].permute(1, 2, 3, 0).contiguous()


def conv_frames(x: Tensor, weight: Tensor) -> Tensor:
    """One convolution in two dimensions for each tap in time, over all frames at once, and their sum."""
    images = x.permute(0, 3, 1, 2)
    length = weight.shape[2]
    frames = len(images) - length + 1
    padding = (weight.shape[3] // 2, weight.shape[4] // 2)
    total: Tensor | None = None
    for tap in range(length):
        y = F.conv2d(images[tap : tap + frames], weight[:, :, tap], padding=padding)
        total = y if total is None else total.add_(y)
    return cast(Tensor, total).permute(0, 2, 3, 1).contiguous()


def conv_stacked(x: Tensor, weight: Tensor) -> Tensor:
    """One convolution in two dimensions over the taps in time stacked as channels, which copies the input."""
    length = weight.shape[2]
    padding = (weight.shape[3] // 2, weight.shape[4] // 2)
    frames = len(x) - length + 1
    images = torch.cat([x[tap : tap + frames] for tap in range(length)], dim=-1).permute(0, 3, 1, 2)
    y = F.conv2d(images, weight.transpose(1, 2).flatten(1, 2), padding=padding)
    return y.permute(0, 2, 3, 1).contiguous()


def conv_widened(x: Tensor, weight: Tensor) -> Tensor:
    """conv3d with 128 output channels where 65 to 127 are asked for: libraries' tiles are 128 wide."""
    width = len(weight)
    if not _TILE // 2 < width < _TILE:
        return conv3d(x, weight)
    wider = F.pad(weight, (0, 0) * 4 + (0, _TILE - width)).contiguous(memory_format=torch.channels_last_3d)
    return conv3d(x, wider)[..., :width]


CONVOLUTIONS: dict[str, Convolution] = {
    "conv3d": conv3d,
    "widened": conv_widened,
    "frames": conv_frames,
    "stacked": conv_stacked,
}


def weight_for(convolution: str, weight: Tensor) -> Tensor:
    """The weight [C', C, kt, kh, kw] laid out as this convolution reads it; same values, same shape."""
    if convolution in ("conv3d", "widened"):
        return weight.contiguous(memory_format=torch.channels_last_3d)
    taps = 2
    out = 0
    into = 1
    high = 3
    wide = 4
    order = (out, high, wide, taps, into) if convolution == "stacked" else (taps, out, high, wide, into)
    ordered = weight.permute(order).contiguous()
    return ordered.permute([order.index(axis) for axis in range(5)])


# -- nearest up-sampling by two, and a 3 x 3 convolution


def phased_weight(weight: Tensor) -> Tensor:
    """The 2 x 2 convolution at the low resolution that equals "nearest x 2, then 3 x 3" at the high one.

    Of the three pixels that a tap row sees after up-sampling two are the same pixel, so that their weights
    add up: (w0, w1 + w2) for even rows, (w0 + w1, w2) for odd ones, and so for columns. 4 x 4 products in
    place of 4 x 9.

    Args:
        weight: [C', C, 3, 3].

    Returns:
        [4 C', C, 2, 2], in float32 added up, in the weight's dtype; for padding 1.
    """
    even = weight.new_tensor([[1, 0, 0], [0, 1, 1]], dtype=torch.float32)
    odd = weight.new_tensor([[1, 1, 0], [0, 0, 1]], dtype=torch.float32)
    phases = torch.stack([even, odd])  # [phase, tap of 2, tap of 3]
    summed = torch.einsum(
        "ayk,bxl,oikl->aboiyx", phases.to(weight.device), phases.to(weight.device), weight.float()
    )
    return summed.flatten(0, 2).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def upsample_phased(x: Tensor, weight: Tensor, bias: Tensor | None) -> Sum:
    """[T, H, W, C] -> the sum of [T, 2 H, 2 W, C'], with `phased_weight(weight)`."""
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1).contiguous()
    return Sum(y, bias, phased=True, window=(0, 0, 2 * x.shape[1], 2 * x.shape[2]))


def upsample_nearest(x: Tensor, weight: Tensor, bias: Tensor | None) -> Sum:
    """The same by its definition, with the 3 x 3 weight; copying pixels is exact in any dtype."""
    frames, height, width, channels = x.shape
    larger = (
        x[:, :, None, :, None]
        .expand(frames, height, 2, width, 2, channels)
        .reshape(frames, 2 * height, 2 * width, -1)
    )
    y = F.conv2d(larger.permute(0, 3, 1, 2), weight, padding=1).permute(0, 2, 3, 1).contiguous()
    return Sum(y, bias)
