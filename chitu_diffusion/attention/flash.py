"""The exact kernels that torch brings for a GPU: cuDNN's, FlashAttention-2's and the memory-efficient one.

`scaled_dot_product_attention` keeps the log-sum-exp to itself and picks a kernel by rules of its own; the
operators under it hand the one out and leave no choice to be made. They have fake twins in torch, so that a
compiled block holds them without a break. cuDNN's and FlashAttention-2's (arXiv:2307.08691) want 16 bits; the
memory-efficient one also takes float32.
"""

import torch
from torch import Tensor

from chitu_diffusion.attention.kernels import AttentionKernel, dense, math_with_lse
from chitu_diffusion.attention.requirements import SIXTEEN_BITS, Requirements

_aten = torch.ops.aten


def _heads_first(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, S, H, D] -> [B, H, S, D] as torch wants it; views."""
    return tuple(x.transpose(1, 2) for x in tensors)


def _flash_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_flash_attention(*_heads_first(q, k, v), 0.0, False, False)[:2]
    return out.transpose(1, 2), lse.transpose(1, 2).float()


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _flash_with_lse(q, k, v)[0]


def _cudnn_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, True)[:2]
    # lse [B, H, S, 1], natural logarithm of the scaled scores' sum
    return out.transpose(1, 2), lse.reshape(lse.shape[:3]).transpose(1, 2).float()


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = _aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, False)[0]
    return out.transpose(1, 2)


def _efficient_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = _aten._scaled_dot_product_efficient_attention(*_heads_first(q, k, v), None, True)[:2]
    # the length of its lse is rounded up
    return out.transpose(1, 2), lse[:, :, : q.shape[1]].transpose(1, 2).float()


def _fused_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if q.device.type != "cuda":
        return math_with_lse(q, k, v)
    return _flash_with_lse(q, k, v) if q.dtype in SIXTEEN_BITS else _efficient_with_lse(q, k, v)


def _fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _fused_with_lse(q, k, v)[0]


fused = AttentionKernel("fused", exact=True, run=dense(_fused), run_with_lse=dense(_fused_with_lse))
flash = AttentionKernel(
    "flash",
    exact=True,
    run=dense(_flash),
    run_with_lse=dense(_flash_with_lse),
    requires=Requirements(
        ("cuda",), SIXTEEN_BITS, head_dim_step=8, head_dim_most=256, compute=((8, 0), (99, 9))
    ),
    autotuned=True,
)
cudnn = AttentionKernel(
    "cudnn",
    exact=True,
    run=dense(_cudnn),
    run_with_lse=dense(_cudnn_with_lse),
    requires=Requirements(
        ("cuda",), SIXTEEN_BITS, head_dim_step=8, head_dim_most=128, compute=((8, 0), (99, 9))
    ),
    autotuned=True,
)
