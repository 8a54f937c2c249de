"""FlashAttention-3 (arXiv:2407.08608) through the package fa3-fwd: Hopper's own instructions, bfloat16.

The call is an operator of ours with a fake twin, so that a compiled block holds it without a break and
without looking into the package. Knows the package's interface; nothing here is imported before the first
call.
"""

import torch
from torch import Tensor

from chitu_diffusion.attention.kernels import AttentionKernel, dense
from chitu_diffusion.attention.requirements import Package, Requirements
from chitu_diffusion.ops.custom_op import operator

FA3 = Package(
    module="fa3_fwd_interface",
    distribution="fa3-fwd",
    install="pip install --no-deps fa3-fwd==0.0.3 (built for CUDA 13 and torch 2.10 or later)",
)


@operator("chitu::fa3", device_types="cuda")
def fa3_op(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [B, S, H, D], k, v [B, L, H, D] bfloat16 -> out [B, S, H, D], lse [B, H, S] float32."""
    from fa3_fwd_interface import flash_attn_func

    out, lse = flash_attn_func(q, k, v, return_attn_probs=True)
    return out, lse


@fa3_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty(
        (batch, heads, tokens), dtype=torch.float32
    )


def _fa3_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = fa3_op(q, k, v)
    return out, lse.transpose(1, 2)


def _fa3(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _fa3_with_lse(q, k, v)[0]


fa3 = AttentionKernel(
    "fa3",
    exact=True,
    run=dense(_fa3),
    run_with_lse=dense(_fa3_with_lse),
    requires=Requirements(
        ("cuda",),
        (torch.bfloat16,),
        head_dim_step=8,
        head_dim_most=256,
        compute=((9, 0), (9, 9)),
        package=FA3,
    ),
    autotuned=True,
)
