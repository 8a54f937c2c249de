"""Attention kernels: each a small value that says what it promises.

A kernel takes q [B, S, H, D] and k, v [B, L, H, D] and returns [B, S, H, D] in q's dtype: softmax(q k^T /
sqrt(D)) v, with no mask. This file knows tensors only; which kernel a run uses is chosen in
`chitu_diffusion.attention`, and how a sequence is spread over ranks is composed around a kernel elsewhere.
"""

import math as arithmetic
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from chitu_diffusion.attention.requirements import Requirements

AttentionFn = Callable[[Tensor, Tensor, Tensor], Tensor]
AttentionWithLse = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

# Rows of the score matrix that the reference kernel holds at a time: 1024 x 32,760 keys in float32 is 128 MiB
# a head.
_MATH_ROWS = 1024


@dataclass(frozen=True)
class AttentionKernel:
    """One way to compute attention.

    Attributes:
        name: what settings call it.
        exact: True if it is attention up to rounding in its own dtype; False for 8-bit and sparse kernels.
        run: (q, k, v) -> out.
        run_with_lse: (q, k, v) -> (out, lse [B, S, H] float32), or None. Ring attention merges partial
            results by the log-sum-exp of the scaled scores and admits only kernels that have it.
        needs: devices, dtypes, head sizes and packages.
        autotuned: whether `auto` times it against others; the rest is what `auto` falls back on, in the
            registry's order.
    """

    name: str
    exact: bool
    run: AttentionFn
    run_with_lse: AttentionWithLse | None = None
    requires: Requirements = field(default_factory=Requirements)
    autotuned: bool = False

    @property
    def gives_lse(self) -> bool:
        """Whether the log-sum-exp can be had."""
        return self.run_with_lse is not None

    def why_unavailable(
        self, device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
    ) -> str | None:
        """Why it cannot be used there, and what to do about it; None if it can. A dtype or head size of None
        is not asked.
        """
        unmet = self.requires.unmet(device, dtype, head_dim)
        return None if unmet is None else str(unmet)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q [B, S, H, D] over k, v [B, L, H, D]; returns [B, S, H, D]."""
        return self.run(q, k, v)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    # torch wants [B, H, S, D]; the transposes are views
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def sdpa_weighted(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention whose scores get `bias` [B or 1, L] float32 added, by key: log n makes one key weigh as much
    as n equal ones.

    The bias must not be rounded to 16 bits: at log 500 that is 1.6 % of the key's weight. The CPU's kernel
    takes it in float32. CUDA's want it in q's dtype; there each key stands twice, see `split_weight`.
    """
    if bias.dtype != q.dtype and q.device.type != "cpu":
        bias = split_weight(bias, q.dtype)
        k = torch.cat([k, k], dim=1)
        v = torch.cat([v, v], dim=1)
    mask = bias[:, None, None, :]
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask
    )
    return out.transpose(1, 2)


def split_weight(bias: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias [B, L], >= 0 or -inf, for keys that stand twice, [B, 2 L] in a coarser dtype, of the same weight
    to 5e-4.

    First the bias rounded down, then the log of the weight that this lacks (-inf for none): 1.6 % of 1.6 % is
    left.
    """
    coarse = bias.to(dtype)
    coarse = torch.where(coarse.float() > bias, coarse * (1 - torch.finfo(dtype).eps), coarse)
    missing = (bias.exp() - coarse.float().exp()).clamp_min(0).log()
    return torch.cat([coarse, missing.to(dtype)], dim=1)


def _math_rows(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    # q [B, H, s, D], k, v [B, H, L, D], all float32
    scores = q @ k.transpose(-1, -2) / arithmetic.sqrt(q.shape[-1])
    lse = scores.logsumexp(dim=-1)
    return (scores - lse[..., None]).exp() @ v, lse


def _math_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    q32, k32, v32 = (x.transpose(1, 2).float() for x in (q, k, v))
    parts = [_math_rows(rows, k32, v32) for rows in torch.split(q32, _MATH_ROWS, dim=2)]
    out = torch.cat([part for part, _ in parts], dim=2)  # [B, H, S, D]
    lse = torch.cat([part for _, part in parts], dim=2)  # [B, H, S]
    return out.transpose(1, 2).to(q.dtype), lse.transpose(1, 2)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _math_with_lse(q, k, v)[0]


sdpa = AttentionKernel("sdpa", exact=True, run=_sdpa)
math = AttentionKernel("math", exact=True, run=_math, run_with_lse=_math_with_lse)
