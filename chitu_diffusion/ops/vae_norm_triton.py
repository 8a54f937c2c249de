"""The decoder's Triton kernels; each has its twin in plain torch in `vae_conv`, where it is described."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from chitu_diffusion.errors import UsageError

if TYPE_CHECKING:
    from chitu_diffusion.ops.vae_sum import Sum

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU build of torch brings no triton
    triton = None

_TILE = 4096  # numbers of an activation that one program holds


def has_triton(device: torch.device) -> bool:
    """Whether the kernels run on this device as they are meant to."""
    return triton is not None and device.type == "cuda"


def triton_norm_silu(parts: Sum, gamma: Tensor, out: Tensor, total: Tensor | None) -> None:
    """`vae_conv.torch_norm_silu` in one pass."""
    _launch(parts, gamma, out, total)


def triton_add_up(parts: Sum, out: Tensor) -> None:
    """`vae_conv.torch_add_up` in one pass."""
    _launch(parts, None, None, out)


def _launch(parts: Sum, gamma: Tensor | None, out: Tensor | None, total: Tensor | None) -> None:
    if triton is None:
        raise UsageError('norm = "triton": triton is not installed; norm = "torch" computes the same')
    frames, height, width, channels = parts.shape
    value = parts.value
    some = total if out is None else out
    assert some is not None
    block_c = triton.next_power_of_2(channels)
    block_w = max(1, min(triton.next_power_of_2(width), _TILE // block_c))

    def strides(x: Tensor | None) -> tuple[int, int, int]:
        return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))

    for tensor in (value, parts.residual, out, total):
        assert tensor is None or tensor.stride(-1) == 1, "channels come last"
    _sum_norm_silu[(frames * height, triton.cdiv(width, block_w))](
        value,
        value if parts.residual is None else parts.residual,
        value if parts.bias is None else parts.bias,
        some if gamma is None else gamma,
        some if total is None else total,
        some if out is None else out,
        *strides(value),
        *strides(parts.residual),
        *strides(total),
        *strides(out),
        *parts.window[:2],
        height,
        width,
        channels,
        channels**0.5,
        HAS_RESIDUAL=parts.residual is not None,
        HAS_BIAS=parts.bias is not None,
        HAS_TOTAL=total is not None,
        HAS_NORM=gamma is not None,
        PHASED=parts.phased,
        BLOCK_W=block_w,
        BLOCK_C=block_c,
        num_warps=4 if block_w * block_c <= 2048 else 8,
    )


if triton is not None:

    @triton.jit
    def _sum_norm_silu(
        value,
        residual,
        bias,
        gamma,
        total,
        out,
        value_t,
        value_h,
        value_w,
        residual_t,
        residual_h,
        residual_w,
        total_t,
        total_h,
        total_w,
        out_t,
        out_h,
        out_w,
        top,
        left,
        height,
        width,
        channels,
        root,
        HAS_RESIDUAL: tl.constexpr,
        HAS_BIAS: tl.constexpr,
        HAS_TOTAL: tl.constexpr,
        HAS_NORM: tl.constexpr,
        PHASED: tl.constexpr,
        BLOCK_W: tl.constexpr,
        BLOCK_C: tl.constexpr,
    ):
        row = tl.program_id(0)
        t = (row // height).to(tl.int64)
        h = row % height
        w = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
        c = tl.arange(0, BLOCK_C)
        inside = (w < width)[:, None] & (c < channels)[None, :]
        if PHASED:
            y = h + top
            x = w + left
            place = t * value_t + (y // 2 + y % 2).to(tl.int64) * value_h
            places = (
                place + ((x // 2 + x % 2) * value_w + (2 * (y % 2) + x % 2) * channels)[:, None] + c[None, :]
            )
        else:
            places = t * value_t + h.to(tl.int64) * value_h + (w * value_w)[:, None] + c[None, :]
        s = tl.load(value + places, mask=inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            s += tl.load(bias + c, mask=c < channels, other=0.0).to(tl.float32)[None, :]
        if HAS_RESIDUAL:
            places = t * residual_t + h.to(tl.int64) * residual_h + (w * residual_w)[:, None] + c[None, :]
            s += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        if HAS_TOTAL:
            places = t * total_t + h.to(tl.int64) * total_h + (w * total_w)[:, None] + c[None, :]
            tl.store(total + places, s.to(total.dtype.element_ty), mask=inside)
        if HAS_NORM:
            length = tl.maximum(tl.sqrt(tl.sum(s * s, axis=1)), 1e-12)
            weight = tl.load(gamma + c, mask=c < channels, other=0.0).to(tl.float32)
            n = s * (root / length)[:, None] * weight[None, :]
            n = n / (1.0 + tl.exp(-n))
            places = t * out_t + h.to(tl.int64) * out_h + (w * out_w)[:, None] + c[None, :]
            tl.store(out + places, n.to(out.dtype.element_ty), mask=inside)
