"""The attention of many tokens to a text of few rows, with the norm of the queries inside.

Plain torch, and with `fused=True` one Triton kernel (`cross_attention_triton`) that never writes the normed
queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from chitu_diffusion.attention.kernels import sdpa, sdpa_weighted
from chitu_diffusion.ops.fused import HAS_TRITON

if HAS_TRITON:
    from chitu_diffusion.attention import cross_attention_triton


def has_fused_cross_attention(dtype: torch.dtype, device: torch.device, head_dim: int) -> bool:
    """Whether the kernel of `cross_attention` multiplies heads of that size in that dtype.

    A GPU's float32 is left to torch: the kernel's exact products have no matrix units there.
    """
    return head_dim in (16, 32, 64, 128) and (dtype.itemsize == 2 or device.type == "cpu")


def cross_attention(
    q: Tensor,
    weight: Tensor,
    eps: float,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    fused: bool = False,
) -> Tensor:
    """RMSNorm of q over all heads, rounded to the keys' dtype, and its attention to the rows of a text.

    Args:
        q: [B, S, heads * head_dim], as projected.
        weight: of the norm, [heads * head_dim].
        eps: added to the mean square.
        k, v: [B, L, heads, head_dim] in one dtype, k normed.
        bias: [B, L] or [1, L] float32, added to the scores, see `sdpa_weighted`; None for none.
        fused: one kernel, which never writes the normed queries; needs `has_fused_cross_attention`.

    Returns:
        [B, S, heads, head_dim] in v's dtype.
    """
    if fused:
        return cross_attention_triton.cross_attention(q, weight, k, v, bias, eps)
    q = F.rms_norm(q.to(weight.dtype), weight.shape, weight, eps).unflatten(2, k.shape[2:]).to(v.dtype)
    return sdpa(q, k, v) if bias is None else sdpa_weighted(q, k, v, bias)
